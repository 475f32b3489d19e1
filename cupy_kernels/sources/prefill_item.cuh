// What a block of threads of the prefill kernels takes at a time: some new tokens of one row of the
// batch, for all query heads of one KV head. A query row is a (token, head) of them.
//
// Needs device.cuh.

// Some consecutive new tokens of one row; tokens times group fit the block's query rows.
struct alignas(16) PrefillItem {
  int row;             // in the block table
  int first_query;     // index of the first token in the batch
  int num_queries;
  int first_position;  // of the first token in its row
};

// A warp's share of an item: query row r is token r / group of the item, head r % group.
struct QueryRows {
  int64 first_query;
  int head;   // first of the group
  int begin;  // the warp's first row in the item
  int count;  // rows of the item
};

// Offset in elements of a query row in a [tokens, stride] array.
__device__ __forceinline__ int64 row_offset(const QueryRows& rows, int row, int group, int stride) {
  return (rows.first_query + row / group) * stride + (rows.head + row % group) * HEAD_DIM;
}
