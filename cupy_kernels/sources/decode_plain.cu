// Attention of one query token per row over its paged context, in the plainest form: one block of
// threads per (query, head), float32 throughout, no splits. The second oracle of `decode`.

#include "device.cuh"
#include "element.cuh"
#include "kv_tile.cuh"

struct DecodePlainParams {
  const void* query;       // [num_rows, query_stride], head h at h * HEAD_DIM
  void* out;               // [num_rows, num_heads, HEAD_DIM]
  const void* pool;        // the layer's part of block 0
  const int* block_table;  // [max_rows, table_stride]
  const int* rows;         // [num_rows], into the block table
  const int* seq_lens;     // [num_rows], this step's token included; 0: nothing is written
  int64 block_bytes;       // from block to block
  int query_stride;        // elements
  int table_stride;
  int num_heads;
  int group;               // query heads per KV head
  int block_size;
  float scale;             // of the scores
};

constexpr int kWarps = 4;
constexpr int kDimsPerLane = HEAD_DIM / kWarpSize;

__device__ __forceinline__ float element_at(const void* base, int64 index) {
  const uint32 pair = static_cast<const uint32*>(base)[index / 2];
  return index % 2 ? high_element(pair) : low_element(pair);
}

// A softmax over part of the context: its maximum, its sum, and the weighted sum of values.
struct Partial {
  float max;
  float sum;
  float values[kDimsPerLane];
};

__device__ __forceinline__ void add_token(Partial& part, const char* tile, int token,
                                          const float (&query)[kDimsPerLane]) {
  float score = 0;
  float value[kDimsPerLane];
#pragma unroll
  for (int i = 0; i < kDimsPerLane; i++) {
    const int dim = threadIdx.x % kWarpSize + i * kWarpSize;
    const char* chunk = tile + key_chunk_offset(token, dim / kChunkElements);
    score += query[i] * element_at(chunk, dim % kChunkElements);
    value[i] = element_at(chunk + kValueOffset, dim % kChunkElements);
  }
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) score += __shfl_xor_sync(kFullWarp, score, mask);
  const float max = fmaxf(part.max, score);
  const float fade = expf(part.max - max), weight = expf(score - max);
  part.max = max;
  part.sum = part.sum * fade + weight;
#pragma unroll
  for (int i = 0; i < kDimsPerLane; i++) {
    part.values[i] = part.values[i] * fade + weight * value[i];
  }
}

__device__ __forceinline__ void write_merged(const Partial& part, void* out, int64 first) {
  __shared__ float maxima[kWarps], sums[kWarps], values[kWarps][HEAD_DIM];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  maxima[warp] = part.max;
  sums[warp] = part.sum;
#pragma unroll
  for (int i = 0; i < kDimsPerLane; i++) values[warp][lane + i * kWarpSize] = part.values[i];
  __syncthreads();
  for (int dim = 2 * threadIdx.x; dim < HEAD_DIM; dim += 2 * blockDim.x) {
    float max = kLowest, sum = 0, low = 0, high = 0;
    for (int w = 0; w < kWarps; w++) max = fmaxf(max, maxima[w]);
    for (int w = 0; w < kWarps; w++) {
      const float factor = expf(maxima[w] - max);
      sum += factor * sums[w];
      low += factor * values[w][dim];
      high += factor * values[w][dim + 1];
    }
    static_cast<uint32*>(out)[(first + dim) / 2] = pack_elements(low / sum, high / sum);
  }
}

extern "C" __global__ void __launch_bounds__(kWarps* kWarpSize)
    decode_plain(const __grid_constant__ DecodePlainParams p) {
  release_successor();
  wait_for_predecessor();
  const int index = blockIdx.x / p.num_heads, head = blockIdx.x % p.num_heads;
  const int seq_len = p.seq_lens[index];
  if (seq_len == 0) return;
  const int* table = p.block_table + int64{p.rows[index]} * p.table_stride;
  const int head_tiles = p.block_size / kTileTokens;
  const char* pool = static_cast<const char*>(p.pool) + head / p.group * head_tiles * kTileBytes;

  float query[kDimsPerLane];
  Partial part = {kLowest, 0, {}};
#pragma unroll
  for (int i = 0; i < kDimsPerLane; i++) {
    const int dim = threadIdx.x % kWarpSize + i * kWarpSize;
    const int64 offset = int64{index} * p.query_stride + head * HEAD_DIM + dim;
    query[i] = p.scale * element_at(p.query, offset);
  }
  for (int token = threadIdx.x / kWarpSize; token < seq_len; token += kWarps) {
    const int tile = token % p.block_size / kTileTokens;
    const char* block = pool + table[token / p.block_size] * p.block_bytes;
    add_token(part, block + tile * kTileBytes, token % kTileTokens, query);
  }
  write_merged(part, p.out, (int64{index} * p.num_heads + head) * HEAD_DIM);
}
