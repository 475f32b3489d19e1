// One block of threads' share of a decode step: some tiles of the context of one (query, KV head).
// The items of a (query, KV head) lie side by side in part order.
struct alignas(32) WorkItem {
  int query;       // index in the batch
  int row;         // index in the block table
  int kv_head;
  int first_tile;
  int num_tiles;   // 0: nothing to do
  int seq_len;     // of the whole row
  int part;
  int num_parts;
};
