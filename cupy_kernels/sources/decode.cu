// Attention of one query token per row over its paged context (https://arxiv.org/abs/2309.06180),
// with the context split over blocks of threads (flash decoding) by the work list of `split_plan`.
//
// Every warp streams its own tiles: warp w of an item takes its tiles w, w + kWarps, ..., keeps
// STAGES of them under way in a ring in shared memory, and needs no barrier with other warps until
// the end. All query heads of a KV head are one operand of the tensor cores' product, so a tile is
// read once: S^T[16 tokens x 8 heads] = K Q^T, then O^T[HEAD_DIM x 8 heads] += V^T P^T. In this
// form scores, maxima and outputs of a head live in the same lanes. Softmax is online, in base 2.
//
// Where a row is split, parts leave (max, sum, O) in float32; whoever arrives last merges them in
// part order. A row's result depends on its chunks only, never on which block ran first or on where
// its KV blocks lie.

#include "device.cuh"
#include "element.cuh"
#include "kv_tile.cuh"
#include "tile_ring.cuh"
#include "work_item.cuh"

struct DecodeParams {
  const void* query;       // [num_rows, query_stride], head h at h * HEAD_DIM
  void* out;               // [num_rows, num_kv_heads * group, HEAD_DIM]
  const void* pool;        // the layer's part of block 0
  const int* block_table;  // [max_rows, table_stride]
  const WorkItem* items;   // one per block of threads
  float* partial_out;      // [items, group, HEAD_DIM]
  float2* partial_norms;   // [items, group], (max, sum) in base 2
  int* arrivals;           // [num_rows, num_kv_heads], 0 before and after
  int64 block_bytes;       // from block to block
  int query_stride;        // elements
  int table_stride;
  int num_kv_heads;
  int group;               // query heads per KV head, at most 8 * HEAD_TILES
  int block_size;          // 16 times a power of two
  float scale_log2;        // of the scores, times log2(e)
};

constexpr int kThreads = kWarps * kWarpSize;
constexpr int kHeadTiles = HEAD_TILES;  // of 8 query heads
constexpr int kSteps = HEAD_DIM / 16;   // of 16 dimensions
constexpr int kQuads = HEAD_DIM / 4;    // of 4 dimensions, in merges
// Rows of the merge buffer are padded so that writing the transposed output has no bank conflict.
constexpr int kMergeStride = HEAD_DIM + 4;

// Running softmax of one warp. Lane l holds heads t, t + 1 of each tile of 8 heads, t = 2 * (l %
// 4), and of the output dimensions 16 * step + l / 4 and 8 more; `sums` are this lane's share.
struct Softmax {
  float max[kHeadTiles][2];
  float sums[kHeadTiles][2];
  float out[kSteps][kHeadTiles][4];
};

struct QueryOperand {
  uint32 pairs[kSteps][kHeadTiles][2];
};

__device__ __forceinline__ void load_query(QueryOperand& query, const DecodeParams& p,
                                           const WorkItem& item, int lane) {
  const uint32* base = static_cast<const uint32*>(p.query);
#pragma unroll
  for (int n = 0; n < kHeadTiles; n++) {
    const int head = 8 * n + lane / 4;
    const int64 offset = int64{item.query} * p.query_stride +
                         (item.kv_head * p.group + head) * HEAD_DIM + 2 * (lane % 4);
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        query.pairs[step][n][i] = head < p.group ? base[(offset + 16 * step + 8 * i) / 2] : 0;
      }
    }
  }
}

// Scores of 16 tokens against the heads; tokens from `num_valid` on get kLowest.
__device__ __forceinline__ void score_tile(float (&scores)[kHeadTiles][4], uint32 tile,
                                           int num_valid, const QueryOperand& query, int lane) {
  float odd[kHeadTiles][4] = {};  // two chains of dependent products instead of one
#pragma unroll
  for (int step = 0; step < kSteps; step++) {
    uint32 keys[4];
    load_keys(keys, tile, step, lane);
#pragma unroll
    for (int n = 0; n < kHeadTiles; n++) {
      multiply_add(step % 2 ? odd[n] : scores[n], keys, query.pairs[step][n][0],
                   query.pairs[step][n][1]);
    }
  }
#pragma unroll
  for (int n = 0; n < kHeadTiles; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int token = lane / 4 + i / 2 * kGroupTokens;
      scores[n][i] = token < num_valid ? scores[n][i] + odd[n][i] : kLowest;
    }
  }
}

// Turns scores into weights and fades what was summed under a smaller maximum.
__device__ __forceinline__ void soften(Softmax& softmax, float (&scores)[kHeadTiles][4],
                                       float scale_log2) {
#pragma unroll
  for (int n = 0; n < kHeadTiles; n++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float max = fmaxf(scores[n][i], scores[n][i + 2]) * scale_log2;
#pragma unroll
      for (int mask = 4; mask < kWarpSize; mask *= 2) {
        max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, mask));
      }
      max = fmaxf(max, softmax.max[n][i]);
      const float fade = exp2_approx(softmax.max[n][i] - max);
      softmax.max[n][i] = max;
      scores[n][i] = exp2_approx(scores[n][i] * scale_log2 - max);
      scores[n][i + 2] = exp2_approx(scores[n][i + 2] * scale_log2 - max);
      softmax.sums[n][i] = softmax.sums[n][i] * fade + scores[n][i] + scores[n][i + 2];
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        softmax.out[step][n][i] *= fade;
        softmax.out[step][n][i + 2] *= fade;
      }
    }
  }
}

__device__ __forceinline__ void add_values(Softmax& softmax, const float (&weights)[kHeadTiles][4],
                                           uint32 tile, int lane) {
  uint32 operand[kHeadTiles][2];
#pragma unroll
  for (int n = 0; n < kHeadTiles; n++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      operand[n][i] = transpose_matrix(pack_elements(weights[n][2 * i], weights[n][2 * i + 1]));
    }
  }
#pragma unroll
  for (int step = 0; step < kSteps; step++) {
    uint32 values[4];
    load_values(values, tile, step, lane);
#pragma unroll
    for (int n = 0; n < kHeadTiles; n++) {
      multiply_add(softmax.out[step][n], values, operand[n][0], operand[n][1]);
    }
  }
}

__device__ __forceinline__ void attend_tiles(Softmax& softmax, TileRing& ring, TileCursor& cursor,
                                             const QueryOperand& query, int seq_len,
                                             float scale_log2, int lane) {
  int slot = 0, parity = 0;
  for (int k = 0; k < cursor.count; k++) {
    const uint32 tile = ring.slots + slot * kTileBytes;
    const int num_valid = seq_len - (cursor.first + k * kWarps) * kTileTokens;
    ring.wait(slot, parity);
    if (num_valid < kTileTokens) {
      clear_values(tile, num_valid, lane);
#if USE_COPY_ENGINE
      fence_copy_engine();  // the slot's next copy comes after these stores
#endif
      __syncwarp();
    }
    float scores[kHeadTiles][4] = {};
    score_tile(scores, tile, num_valid, query, lane);
    soften(softmax, scores, scale_log2);
    add_values(softmax, scores, tile, lane);
    __syncwarp();
    const bool is_wanted = k + kStages < cursor.count;
    ring.issue(slot, is_wanted ? cursor.locate(k + kStages, lane) : nullptr, is_wanted, lane);
    slot = slot + 1 == kStages ? 0 : slot + 1;
    parity ^= slot == 0;
  }
}

// Shared memory after the last tile: (max, sum) and output of each warp's heads.
struct MergeBuffer {
  float2* norms;  // [kWarps, 8 * kHeadTiles]
  float* out;     // [kWarps, 8 * kHeadTiles, kMergeStride]
};

__device__ __forceinline__ void store_softmax(const Softmax& softmax, const MergeBuffer& buffer,
                                              int warp, int lane) {
#pragma unroll
  for (int n = 0; n < kHeadTiles; n++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int head = (warp * kHeadTiles + n) * 8 + 2 * (lane % 4) + i;
      float sum = softmax.sums[n][i];
#pragma unroll
      for (int mask = 4; mask < kWarpSize; mask *= 2) sum += __shfl_xor_sync(kFullWarp, sum, mask);
      if (lane < 4) buffer.norms[head] = make_float2(softmax.max[n][i], sum);
      float* row = buffer.out + head * kMergeStride + lane / 4;
#pragma unroll
      for (int step = 0; step < kSteps; step++) {
        row[16 * step] = softmax.out[step][n][i];
        row[16 * step + 8] = softmax.out[step][n][i + 2];
      }
    }
  }
}

// Sum of softmaxes over disjoint parts of the context, for 4 dimensions of a head.
struct Merged {
  float max = kLowest;
  float sum = 0;
  float4 out = {};

  __device__ void add(float2 norm, float4 part) {
    const float new_max = fmaxf(max, norm.x);
    const float fade = exp2_approx(max - new_max), factor = exp2_approx(norm.x - new_max);
    max = new_max;
    sum = sum * fade + norm.y * factor;
    out.x = out.x * fade + part.x * factor;
    out.y = out.y * fade + part.y * factor;
    out.z = out.z * fade + part.z * factor;
    out.w = out.w * fade + part.w * factor;
  }
};

__device__ __forceinline__ void write_out(const DecodeParams& p, const WorkItem& item, int head,
                                          int quad, const Merged& merged) {
  const int heads = item.query * p.num_kv_heads + item.kv_head;
  const int64 target = (int64{heads} * p.group + head) * kQuads + quad;
  const float scale = 1 / merged.sum;
  static_cast<uint2*>(p.out)[target] =
      make_uint2(pack_elements(merged.out.x * scale, merged.out.y * scale),
                 pack_elements(merged.out.z * scale, merged.out.w * scale));
}

// Merges the warps; the result is the output, or this part's share of it.
__device__ __forceinline__ void merge_warps(const DecodeParams& p, const WorkItem& item,
                                            const MergeBuffer& buffer) {
  for (int i = threadIdx.x; i < p.group * kQuads; i += kThreads) {
    const int head = i / kQuads, quad = i % kQuads;
    Merged merged;
#pragma unroll
    for (int warp = 0; warp < kWarps; warp++) {
      const int source = warp * kHeadTiles * 8 + head;
      const float* out = buffer.out + source * kMergeStride + quad * 4;
      merged.add(buffer.norms[source], *reinterpret_cast<const float4*>(out));
    }
    if (item.num_parts == 1) {
      write_out(p, item, head, quad, merged);
    } else {
      const int64 target = int64{blockIdx.x} * p.group + head;
      reinterpret_cast<float4*>(p.partial_out)[target * kQuads + quad] = merged.out;
      if (quad == 0) p.partial_norms[target] = make_float2(merged.max, merged.sum);
    }
  }
}

// Whether all other parts of the (query, KV head) are done; what they wrote is then visible.
__device__ __forceinline__ bool is_last_arrival(const DecodeParams& p, const WorkItem& item) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    int* arrivals = p.arrivals + item.query * p.num_kv_heads + item.kv_head;
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(arrivals)
                 : "memory");
    is_last = before == item.num_parts - 1;
    if (is_last) *arrivals = 0;
  }
  __syncthreads();
  return is_last;
}

__device__ __forceinline__ void merge_parts(const DecodeParams& p, const WorkItem& item) {
  constexpr int kBatch = 16;  // parts loaded at once: their latencies overlap
  const int64 first = int64{blockIdx.x} - item.part;
  for (int i = threadIdx.x; i < p.group * kQuads; i += kThreads) {
    const int head = i / kQuads, quad = i % kQuads;
    Merged merged;
    for (int begin = 0; begin < item.num_parts; begin += kBatch) {
      float2 norms[kBatch];
      float4 outs[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; j++) {
        const int part = min(begin + j, item.num_parts - 1);
        const int64 source = (first + part) * p.group + head;
        norms[j] = __ldcg(p.partial_norms + source);
        outs[j] = __ldcg(reinterpret_cast<const float4*>(p.partial_out) + source * kQuads + quad);
      }
#pragma unroll
      for (int j = 0; j < kBatch; j++) {
        if (begin + j < item.num_parts) merged.add(norms[j], outs[j]);
      }
    }
    write_out(p, item, head, quad, merged);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS_PER_SM)
    decode(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(128) char shared[];
  __shared__ float2 norms[kWarps * 8 * kHeadTiles];
  // No early release: the next kernel's blocks would share the SMs unevenly with this one's.
  wait_for_predecessor();
  const WorkItem item = p.items[blockIdx.x];
  if (item.num_tiles == 0) return;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;

  TileCursor cursor;
  cursor.pool = static_cast<const char*>(p.pool) +
                item.kv_head * (p.block_size / kTileTokens) * kTileBytes;
  cursor.block_shift = __ffs(p.block_size / kTileTokens) - 1;
  cursor.table = p.block_table + int64{item.row} * p.table_stride;
  cursor.block_bytes = p.block_bytes;
  cursor.first = item.first_tile + warp;
  cursor.count = max(0, (item.num_tiles - warp + kWarps - 1) / kWarps);
  cursor.load_window(0, lane);

  TileRing ring;
  ring.slots = shared_address(shared) + warp * kStages * kTileBytes;
  ring.policy = evict_first_policy();
#if USE_COPY_ENGINE
  __shared__ alignas(8) uint64 barriers[kWarps * kStages];
  ring.barriers = shared_address(barriers + warp * kStages);
  ring.init(lane);
#endif
#pragma unroll
  for (int k = 0; k < kStages; k++) {
    const bool is_wanted = k < cursor.count;
    ring.issue(k, is_wanted ? cursor.locate(k, lane) : nullptr, is_wanted, lane);
  }

  QueryOperand query;
  load_query(query, p, item, lane);
  Softmax softmax = {};
#pragma unroll
  for (int n = 0; n < kHeadTiles; n++) softmax.max[n][0] = softmax.max[n][1] = kLowest;
  attend_tiles(softmax, ring, cursor, query, item.seq_len, p.scale_log2, lane);

  const MergeBuffer buffer = {norms, reinterpret_cast<float*>(shared)};
  __syncthreads();  // the buffer takes the place of all warps' tiles
  store_softmax(softmax, buffer, warp, lane);
  __syncthreads();
  merge_warps(p, item, buffer);
  if (item.num_parts > 1 && is_last_arrival(p, item)) merge_parts(p, item);
}
