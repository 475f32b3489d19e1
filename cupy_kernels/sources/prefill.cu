// Causal attention of runs of new tokens over their rows' paged context, new tokens included: whole
// prompts, chunks of prompts, and anything else with several queries per row. For all GPUs; Hopper
// has prefill_wgmma.cu too.
//
// A block of threads takes one KV head and up to kQueryRows query rows of one request; a query row
// is a (token, head) of the KV head's group, so that short runs still fill the tensor cores and
// keys are read once per group. The context streams through shared memory in spans of SPAN_TILES
// tiles, the next one under way while this one is used. Each warp owns its query rows from start to
// end: scores, softmax (online, in base 2, https://arxiv.org/abs/2307.08691) and output stay in its
// registers.

#include "device.cuh"
#include "element.cuh"
#include "kv_tile.cuh"
#include "prefill_item.cuh"

struct PrefillParams {
  const void* query;         // [num_tokens, query_stride], head h at h * HEAD_DIM
  void* out;                 // [num_tokens, num_kv_heads * group, HEAD_DIM]
  const void* pool;          // the layer's part of block 0
  const int* block_table;    // [max_rows, table_stride]
  const PrefillItem* items;  // [num_items], one per num_kv_heads blocks of threads
  int64 block_bytes;         // from block to block
  int query_stride;          // elements
  int table_stride;
  int num_items;
  int num_kv_heads;
  int group;                 // query heads per KV head
  int block_size;            // 16 times a power of two
  float scale_log2;          // of the scores, times log2(e)
};

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRowTiles = ROW_TILES;  // of 16 query rows, per warp
constexpr int kWarpRows = 16 * kRowTiles;
constexpr int kQueryRows = kWarps * kWarpRows;
constexpr int kSpanTiles = SPAN_TILES;
constexpr int kSpanTokens = kSpanTiles * kTileTokens;
constexpr int kSpanBytes = kSpanTiles * kTileBytes;
constexpr int kSteps = HEAD_DIM / 16;
constexpr int kRowChunks = HEAD_DIM / kChunkElements;

// A warp's query rows in shared memory, later its output, in atoms as in a tile:
// [HEAD_DIM / kAtomDims][kWarpRows][kAtomDims].
constexpr int kQueryAtomBytes = kWarpRows * kAtomRowBytes;
constexpr int kWarpQueryBytes = kWarpRows * HEAD_DIM * 2;

__device__ __forceinline__ int query_chunk_offset(int row, int chunk) {
  return chunk / kAtomChunks * kQueryAtomBytes + row * kAtomRowBytes +
         (chunk % kAtomChunks ^ swizzle(row % kGroupTokens)) * kChunkBytes;
}

__device__ __forceinline__ void load_query(uint32 shared, const PrefillParams& p,
                                           const QueryRows& rows, int lane) {
  for (int i = lane; i < kWarpRows * kRowChunks; i += kWarpSize) {
    const int row = i / kRowChunks, chunk = i % kRowChunks, in_item = rows.begin + row;
    const uint32 target = shared + query_chunk_offset(row, chunk);
    if (in_item < rows.count) {
      const int64 offset = row_offset(rows, in_item, p.group, p.query_stride);
      copy_async_16(target, static_cast<const char*>(p.query) + offset * 2 + chunk * kChunkBytes);
    } else {
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(target), "r"(0) : "memory");
    }
  }
}

// Copies a span of the context; all threads take part. Tiles that begin at `end` or later are not
// copied: their scores are masked, and their values must be cleared.
__device__ __forceinline__ void issue_span(uint32 shared, const char* pool, const int* table,
                                           const PrefillParams& p, int first_tile, int end) {
  const int block_shift = __ffs(p.block_size / kTileTokens) - 1;
  int block_ids[kSpanTiles];  // looked up together, before the first copy
#pragma unroll
  for (int i = 0; i < kSpanTiles; i++) {
    const int tile = first_tile + i;
    block_ids[i] = tile * kTileTokens < end ? table[tile >> block_shift] : 0;
  }
#pragma unroll
  for (int i = 0; i < kSpanTiles; i++) {
    const int tile = first_tile + i;
    if (tile * kTileTokens >= end) break;
    const int tile_in_block = tile & ((1 << block_shift) - 1);
    const char* source = pool + block_ids[i] * p.block_bytes + tile_in_block * kTileBytes;
#pragma unroll
    for (int j = threadIdx.x * kChunkBytes; j < kTileBytes; j += kThreads * kChunkBytes) {
      copy_async_16(shared + i * kTileBytes + j, source + j);
    }
  }
  commit_copies();
}

// Lane l holds, with g = l / 4 and t = 2 * (l % 4), query rows 16 * m + g and 8 more of row tile m:
// of a tile's scores the tokens 8 * n + t and t + 1, of the output the dimensions 8 * n + t, t + 1.
struct Softmax {
  float max[kRowTiles][2];
  float sums[kRowTiles][2];  // this lane's share
  float out[kRowTiles][2 * kSteps][4];
};

using Scores = float[kRowTiles][2 * kSpanTiles][4];

__device__ __forceinline__ void score_span(Scores& scores, uint32 query, uint32 span, int lane) {
  const int row = lane % 16, chunk = lane / 16;
#pragma unroll
  for (int step = 0; step < kSteps; step++) {
    uint32 queries[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) {
      load_matrices(queries[m], query + query_chunk_offset(16 * m + row, 2 * step + chunk));
    }
#pragma unroll
    for (int tile = 0; tile < kSpanTiles; tile++) {
      uint32 keys[4];
      load_keys(keys, span + tile * kTileBytes, step, lane);
#pragma unroll
      for (int m = 0; m < kRowTiles; m++) {
        multiply_add(scores[m][2 * tile], queries[m], keys[0], keys[2]);
        multiply_add(scores[m][2 * tile + 1], queries[m], keys[1], keys[3]);
      }
    }
  }
}

// Hides the tokens behind each query. The span begins `behind` tokens after the item's first query.
__device__ __forceinline__ void mask_span(Scores& scores, const QueryRows& rows, int group,
                                          int behind, int lane) {
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int last_seen = (rows.begin + 16 * m + 8 * i + lane / 4) / group - behind;
#pragma unroll
      for (int n = 0; n < 2 * kSpanTiles; n++) {
        const int token = 8 * n + 2 * (lane % 4);
        if (token > last_seen) scores[m][n][2 * i] = kLowest;
        if (token + 1 > last_seen) scores[m][n][2 * i + 1] = kLowest;
      }
    }
  }
}

// Turns scores into weights and fades what was summed under a smaller maximum. All rows go through
// each stage together, without a branch in between: a scheduler has two warps only, so that what
// hides the latency of one row's instructions must be those of the others.
__device__ __forceinline__ void soften(Softmax& softmax, Scores& scores, float scale_log2) {
  float fades[kRowTiles][2];
  bool has_faded = false;
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float max = kLowest;
#pragma unroll
      for (int n = 0; n < 2 * kSpanTiles; n++) {
        max = fmaxf(max, fmaxf(scores[m][n][2 * i], scores[m][n][2 * i + 1]));
      }
      max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, 1));
      max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, 2));
      max = fmaxf(max * scale_log2, softmax.max[m][i]);
      fades[m][i] = exp2_approx(softmax.max[m][i] - max);
      softmax.max[m][i] = max;
      has_faded |= fades[m][i] != 1;
    }
  }
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float even = 0, odd = 0;
#pragma unroll
      for (int n = 0; n < 2 * kSpanTiles; n++) {
        float& first = scores[m][n][2 * i];
        float& second = scores[m][n][2 * i + 1];
        first = exp2_approx(first * scale_log2 - softmax.max[m][i]);
        second = exp2_approx(second * scale_log2 - softmax.max[m][i]);
        even += first;
        odd += second;
      }
      softmax.sums[m][i] = softmax.sums[m][i] * fades[m][i] + (even + odd);
    }
  }
  if (!__any_sync(kFullWarp, has_faded)) return;  // maxima settle early
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
    for (int n = 0; n < 2 * kSteps; n++) {
#pragma unroll
      for (int j = 0; j < 4; j++) softmax.out[m][n][j] *= fades[m][j / 2];
    }
  }
}

__device__ __forceinline__ void add_values(Softmax& softmax, const Scores& weights, uint32 span,
                                           int lane) {
#pragma unroll
  for (int tile = 0; tile < kSpanTiles; tile++) {
    uint32 operand[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float(&pairs)[4] = weights[m][2 * tile + i / 2];
        operand[m][i] = pack_elements(pairs[i % 2 * 2], pairs[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      uint32 values[4];
      load_values(values, span + tile * kTileBytes, step, lane);
#pragma unroll
      for (int m = 0; m < kRowTiles; m++) {
        multiply_add(softmax.out[m][2 * step], operand[m], values[0], values[2]);
        multiply_add(softmax.out[m][2 * step + 1], operand[m], values[1], values[3]);
      }
    }
  }
}

// Through the warp's part of shared memory, so that rows leave in 16-byte pieces side by side.
__device__ __forceinline__ void write_out(const Softmax& softmax, char* staging,
                                          const PrefillParams& p, const QueryRows& rows, int lane) {
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float sum = softmax.sums[m][i];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      const float scale = 1 / sum;
      const int row = 16 * m + 8 * i + lane / 4;
#pragma unroll
      for (int n = 0; n < 2 * kSteps; n++) {
        const float(&values)[4] = softmax.out[m][n];
        uint32* chunk = reinterpret_cast<uint32*>(staging + query_chunk_offset(row, n));
        chunk[lane % 4] = pack_elements(values[2 * i] * scale, values[2 * i + 1] * scale);
      }
    }
  }
  __syncwarp();
  const int stride = p.num_kv_heads * p.group * HEAD_DIM;
  for (int i = lane; i < kWarpRows * kRowChunks; i += kWarpSize) {
    const int row = i / kRowChunks, chunk = i % kRowChunks, in_item = rows.begin + row;
    if (in_item < rows.count) {
      char* target = static_cast<char*>(p.out) + row_offset(rows, in_item, p.group, stride) * 2;
      reinterpret_cast<Vector16*>(target)[chunk] =
          *reinterpret_cast<const Vector16*>(staging + query_chunk_offset(row, chunk));
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    prefill(const __grid_constant__ PrefillParams p) {
  extern __shared__ __align__(1024) char shared[];
  release_successor();
  wait_for_predecessor();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  // Blocks of one KV head are neighbours: together they read its keys and values about once.
  const PrefillItem item = p.items[blockIdx.x % p.num_items];
  const int kv_head = blockIdx.x / p.num_items;
  const QueryRows rows = {item.first_query, kv_head * p.group, warp * kWarpRows,
                          item.num_queries * p.group};
  const int end = item.first_position + item.num_queries;
  const int num_spans = (end + kSpanTokens - 1) / kSpanTokens;
  const char* pool = static_cast<const char*>(p.pool) +
                     kv_head * (p.block_size / kTileTokens) * kTileBytes;
  const int* table = p.block_table + int64{item.row} * p.table_stride;

  char* staging = shared + warp * kWarpQueryBytes;
  const uint32 query = shared_address(staging);
  const uint32 spans = shared_address(shared) + kWarps * kWarpQueryBytes;
  load_query(query, p, rows, lane);
  issue_span(spans, pool, table, p, 0, end);

  Softmax softmax = {};
#pragma unroll
  for (int m = 0; m < kRowTiles; m++) softmax.max[m][0] = softmax.max[m][1] = kLowest;

  for (int k = 0; k < num_spans; k++) {
    const uint32 span = spans + k % 2 * kSpanBytes;
    wait_copies<0>();
    __syncthreads();  // this span is there, and nobody uses the one before any more
    if (k + 1 < num_spans) {
      issue_span(spans + (k + 1) % 2 * kSpanBytes, pool, table, p, (k + 1) * kSpanTiles, end);
    }
    const int num_valid = end - k * kSpanTokens;
    if (num_valid < kSpanTokens) {
      for (int tile = warp; tile < kSpanTiles; tile += kWarps) {
        clear_values(span + tile * kTileBytes, num_valid - tile * kTileTokens, lane);
      }
      __syncthreads();
    }
    Scores scores = {};
    score_span(scores, query, span, lane);
    const int behind = k * kSpanTokens - item.first_position;
    if (behind + kSpanTokens > 1) mask_span(scores, rows, p.group, behind, lane);
    soften(softmax, scores, p.scale_log2);
    add_values(softmax, scores, span, lane);
  }
  write_out(softmax, staging, p, rows, lane);
}
