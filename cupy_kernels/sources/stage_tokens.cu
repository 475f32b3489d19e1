// What a step's kernels read of its tokens, from the few numbers that the host sends: ids, places
// in the block table, slots. Ids that the host does not know yet were sampled on the device.

#include "device.cuh"

// One token of the batch, as the host lays it out.
struct alignas(16) StagedToken {
  int token_id;  // below 0: the row's last sampled token
  int row;
  int position;
  int is_real;   // 0: padding up to the size of a captured graph
};

struct StageTokensParams {
  const StagedToken* tokens;  // [num_tokens]
  const int* last_tokens;     // [max_rows], sampled last
  const int* block_table;     // [max_rows, table_stride]
  int* token_ids;             // [num_tokens], the rest written; 0 for padding
  int* rows;                  // [num_tokens]; 0 for padding
  int* positions;             // [num_tokens]; 0 for padding
  int* slot_mapping;          // [num_tokens], block_id * block_size + offset; -1 for padding
  int* seq_lens;              // [num_tokens], this token included; 0 for padding
  int num_tokens;
  int table_stride;
  int block_size;
};

extern "C" __global__ void __launch_bounds__(256)
    stage_tokens(const __grid_constant__ StageTokensParams p) {
  release_successor();
  wait_for_predecessor();
  const int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= p.num_tokens) return;
  const StagedToken token = p.tokens[index];
  const int* table = p.block_table + int64{token.row} * p.table_stride;
  const int id = token.token_id < 0 ? p.last_tokens[token.row] : token.token_id;
  const int slot = table[token.position / p.block_size] * p.block_size +
                   token.position % p.block_size;
  p.token_ids[index] = token.is_real ? id : 0;
  p.rows[index] = token.is_real ? token.row : 0;
  p.positions[index] = token.is_real ? token.position : 0;
  p.slot_mapping[index] = token.is_real ? slot : -1;
  p.seq_lens[index] = token.is_real ? token.position + 1 : 0;
}
