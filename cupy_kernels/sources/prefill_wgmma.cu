// The same as prefill.cu for Hopper (sm_90a): products of whole warpgroups, fed by the copy engine.
//
// Three warpgroups: two consumers with 64 query rows each, and a producer, one warp of which copies
// the context in spans of 128 tokens into a ring in shared memory, a bulk copy per tile. A tile's
// bytes are what wgmma reads: keys row by row, values transposed. The producer also clears the
// values behind the end of the context: their weight is 0, but what is there may be NaN.
//
// A consumer issues the scores of the next span together with the weighted values of the current
// one, then turns the scores into weights. The two take turns in issuing, so that one has the
// tensor cores while the other computes exponentials (https://arxiv.org/abs/2407.08608). Scores,
// weights and output stay in registers.
//
// A block of threads goes on to further pairs of item and KV head if there are more pairs than
// blocks; the producer then runs ahead of the consumers.

#include "device.cuh"
#include "element.cuh"
#include "kv_tile.cuh"
#include "prefill_item.cuh"
#include "span_ring.cuh"
#include "wgmma.cuh"

struct PrefillWgmmaParams {
  const void* query;         // [num_tokens, query_stride], head h at h * HEAD_DIM
  void* out;                 // [num_tokens, num_kv_heads * group, HEAD_DIM]
  const void* pool;          // the layer's part of block 0
  const int* block_table;    // [max_rows, table_stride]
  const PrefillItem* items;  // [num_items]
  int64 block_bytes;         // from block to block
  int query_stride;          // elements
  int table_stride;
  int num_items;
  int num_kv_heads;
  int group;                 // query heads per KV head
  int block_size;            // 16 times a power of two
  float scale_log2;          // of the scores, times log2(e)
};

constexpr int kConsumers = 2;
constexpr int kThreads = (kConsumers + 1) * kWarpgroupThreads;
constexpr int kGroupWarps = kWarpgroupThreads / kWarpSize;
// At launch each thread has 168, of 64 K.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;

constexpr int kWarpRows = 16;
constexpr int kRows = 64;  // query rows of a consumer
constexpr int kSteps = HEAD_DIM / 16;
constexpr int kAtomSteps = kAtomDims / 16;
constexpr int kRowChunks = HEAD_DIM / kChunkElements;
static_assert(kAtomDims == 64, "operands consist of atoms of 128-byte rows");

// A consumer's query rows, later its output, in atoms as in a tile:
// [HEAD_DIM / kAtomDims][kRows][kAtomDims].
constexpr int kQueryAtomBytes = kRows * kAtomRowBytes;
constexpr int kQueryBytes = kRows * HEAD_DIM * 2;

// Shared memory: the ring, query rows of each consumer, and a word per consumer thread.
constexpr int kQueryOffset = (kRingBytes + kAtomBytes - 1) / kAtomBytes * kAtomBytes;
constexpr int kWordsOffset = kQueryOffset + kConsumers * kQueryBytes;

// Barriers among consumers; a consumer's number is added.
constexpr int kTurnBarrier = 1;
constexpr int kConsumerBarrier = kTurnBarrier + kConsumers;

// An item for one KV head.
struct Work {
  PrefillItem item;
  int kv_head;
  int end;  // of the context
};

// Pairs of item and KV head, the costliest first: blocks of threads take them back and forth, so
// that whoever had the longest in one round has the shortest in the next.
struct Pairs {
  int count;
  int round;

  __device__ int index() const {
    const int place = round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    return round * gridDim.x + place;
  }

  __device__ bool is_over() const { return index() >= count; }
};

__device__ __forceinline__ Work work_at(const PrefillWgmmaParams& p, int index) {
  const PrefillItem item = p.items[index / p.num_kv_heads];
  return {item, index % p.num_kv_heads, item.first_position + item.num_queries};
}

// The producer's part, by one warp.
__device__ __forceinline__ void produce(const PrefillWgmmaParams& p, uint32 ring, int lane) {
  const int block_tiles = p.block_size / kTileTokens;
  Stage stage = {ring, 0, 0};
  for (Pairs pairs = {p.num_items * p.num_kv_heads, 0}; !pairs.is_over(); pairs.round++) {
    const Work work = work_at(p, pairs.index());
    const Context context = {
        static_cast<const char*>(p.pool) + work.kv_head * block_tiles * kTileBytes,
        p.block_table + int64{work.item.row} * p.table_stride, p.block_bytes,
        __ffs(block_tiles) - 1, work.end};
    const Stage last = copy_spans(context, stage, lane);
    const int num_valid = count_last_tokens(work.end);
    if (num_valid < kSpanTokens) clear_span(last, num_valid, lane);
    stage = last.next();
  }
}

__device__ __forceinline__ int query_chunk_offset(int row, int chunk) {
  return chunk / kAtomChunks * kQueryAtomBytes + row * kAtomRowBytes +
         (chunk % kAtomChunks ^ swizzle(row % kGroupTokens)) * kChunkBytes;
}

// The warp's query rows to shared memory, from its row `first` there on; missing ones are zero.
__device__ __forceinline__ void load_query(char* staging, const PrefillWgmmaParams& p,
                                           const QueryRows& rows, int first, int lane) {
  constexpr int kPieces = kWarpRows * kRowChunks / kWarpSize;
  Vector16 pieces[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; i++) {
    const int row = rows.begin + (i * kWarpSize + lane) / kRowChunks;
    pieces[i] = {};
    if (row < rows.count) {
      const int64 offset = row_offset(rows, row, p.group, p.query_stride);
      const char* source = static_cast<const char*>(p.query) + offset * 2;
      pieces[i] = reinterpret_cast<const Vector16*>(source)[lane % kRowChunks];
    }
  }
#pragma unroll
  for (int i = 0; i < kPieces; i++) {
    const int row = first + (i * kWarpSize + lane) / kRowChunks;
    *reinterpret_cast<Vector16*>(staging + query_chunk_offset(row, lane % kRowChunks)) = pieces[i];
  }
}

// Lane l of a warp holds, with g = l / 4 and t = 2 * (l % 4), query rows g (index 0) and g + 8 (1)
// of its 16: of a span's scores the tokens 8 * n + t and t + 1, of the output such dimensions.
struct Softmax {
  float max[2];
  float sums[2];   // this lane's share
  float fades[2];  // what sums under the maximum before are to be multiplied by
  float out[HEAD_DIM / 2];
};

using Scores = float[kSpanTokens / 2];
using Weights = uint32[kSpanTokens / 4];  // scores in pairs

__device__ __forceinline__ void score_span(Scores& scores, uint32 query, uint32 span) {
  fence_products();
#pragma unroll
  for (int step = 0; step < kSteps; step++) {
    const int atom = step / kAtomSteps, in_atom = step % kAtomSteps * 2 * kChunkBytes;
    multiply_rows(scores,
                  operand(query + atom * kQueryAtomBytes + in_atom, kAtomBytes, kChunkBytes),
                  operand(span + atom * kAtomBytes + in_atom, kGroupBytes, kChunkBytes), step > 0);
  }
  commit_products();
}

__device__ __forceinline__ void add_values(Softmax& softmax, const Weights& weights, uint32 span) {
  fence_products();
#pragma unroll
  for (int tile = 0; tile < kSpanTiles; tile++) {
    const uint32 values = span + tile * kTileBytes + kValueOffset;
    multiply_add(softmax.out, weights + 4 * tile, operand(values, kGroupBytes, kAtomBytes));
  }
  commit_products();
}

// Hides the tokens behind each query: of row i those after last_seen[i], counted from this lane's
// first token of the span.
__device__ __forceinline__ void mask_span(Scores& scores, const int (&last_seen)[2]) {
#pragma unroll
  for (int n = 0; n < kSpanTokens / 8; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (8 * n + i % 2 > last_seen[i / 2]) scores[4 * n + i] = kLowest;
    }
  }
}

// Turns scores into weights.
__device__ __forceinline__ void soften(Softmax& softmax, Scores& scores, float scale_log2) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float max = kLowest;
#pragma unroll
    for (int n = 0; n < kSpanTokens / 8; n++) {
      max = fmaxf(max, fmaxf(scores[4 * n + 2 * i], scores[4 * n + 2 * i + 1]));
    }
    max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, 1));
    max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, 2));
    max = fmaxf(max * scale_log2, softmax.max[i]);
    softmax.fades[i] = exp2_approx(softmax.max[i] - max);
    softmax.max[i] = max;
    softmax.sums[i] *= softmax.fades[i];
#pragma unroll
    for (int n = 0; n < kSpanTokens / 8; n++) {
#pragma unroll
      for (int j = 4 * n + 2 * i; j < 4 * n + 2 * i + 2; j++) {
        scores[j] = exp2_approx(scores[j] * scale_log2 - max);
        softmax.sums[i] += scores[j];
      }
    }
  }
}

__device__ __forceinline__ void fade_output(Softmax& softmax) {
#pragma unroll
  for (int n = 0; n < HEAD_DIM / 2; n++) softmax.out[n] *= softmax.fades[n / 2 % 2];
}

__device__ __forceinline__ void pack_weights(Weights& weights, const Scores& scores) {
#pragma unroll
  for (int n = 0; n < kSpanTokens / 4; n++) {
    weights[n] = pack_elements(scores[2 * n], scores[2 * n + 1]);
  }
}

// A consumer's place: of 128 threads, with a part of shared memory for query rows and output.
struct Consumer {
  int number;
  int warp;  // of the consumer
  int lane;
  char* staging;
  uint32 query;  // its address
  uint32 word;   // address of the thread's

  // What `value` depends on is computed before a wait for products that follows: ptxas moves
  // arithmetic behind such a wait, where it overlaps nothing, but moves no store. Nobody reads the
  // word. (A branch would do the same, but makes ptxas run products one by one.)
  __device__ void hold(float value) const {
    asm volatile("st.volatile.shared.f32 [%0], %1;" ::"r"(word), "f"(value) : "memory");
  }

  __device__ void await_turn() const {
    sync_threads(kTurnBarrier + number, kConsumers * kWarpgroupThreads);
  }

  __device__ void pass_turn() const {
    arrive_threads(kTurnBarrier + 1 - number, kConsumers * kWarpgroupThreads);
  }

  __device__ void sync() const { sync_threads(kConsumerBarrier + number, kWarpgroupThreads); }

  __device__ void free(const Stage& stage) const {
    if (lane == 0) barrier_arrive(stage.freed());
  }
};

// Scores of span number `next` while the values of the one before, in `stage`, are added up.
template <bool is_masked>
__device__ __forceinline__ void advance(Softmax& softmax, Scores& scores, Weights& weights,
                                        Stage& stage, const Consumer& self,
                                        const int (&positions)[2], int next, float scale_log2) {
  const Stage ahead = stage.next();
  barrier_wait(ahead.filled(), ahead.parity);
  self.await_turn();
  score_span(scores, self.query, ahead.span());
  add_values(softmax, weights, stage.span());
  self.pass_turn();
  wait_products<1>();
  pin(scores);
  if (is_masked) {
    const int begin = next * kSpanTokens;
    mask_span(scores, {positions[0] - begin, positions[1] - begin});
  }
  soften(softmax, scores, scale_log2);
  self.hold(softmax.sums[0] + softmax.sums[1]);  // exponentials run beside the product of values
  pin(scores);
  wait_products<0>();
  pin(softmax.out);
  pin(scores);  // not earlier: packed weights go where the product reads
  self.free(stage);
  fade_output(softmax);
  pack_weights(weights, scores);
  stage = ahead;
}

// Attention of the consumer's rows. Returns the last span's stage.
__device__ __forceinline__ Stage attend(Softmax& softmax, const Consumer& self, const Work& work,
                                        const QueryRows& rows, Stage stage,
                                        ClearedParities& parities, int group, float scale_log2) {
  int positions[2];  // of the lane's two rows, from the lane's first token of a span
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = rows.begin + 8 * i + self.lane / 4;
    positions[i] = work.item.first_position + row / group - 2 * (self.lane % 4);
    softmax.max[i] = kLowest;
  }
  // Every query sees all of the spans before this one.
  const int first_masked = (work.item.first_position + 1) / kSpanTokens;
  const int num_spans = count_spans(work.end);
  Scores scores = {};
  Weights weights;
  barrier_wait(stage.filled(), stage.parity);
  score_span(scores, self.query, stage.span());
  wait_products<0>();
  pin(scores);
  if (first_masked == 0) mask_span(scores, positions);
  soften(softmax, scores, scale_log2);
  pack_weights(weights, scores);
  int next = 1;
  for (; next < first_masked; next++) {
    advance<false>(softmax, scores, weights, stage, self, positions, next, scale_log2);
  }
  for (; next < num_spans; next++) {
    advance<true>(softmax, scores, weights, stage, self, positions, next, scale_log2);
  }
  if (count_last_tokens(work.end) < kSpanTokens) {
    barrier_wait(stage.cleared(), parities.take(stage));
  }
  add_values(softmax, weights, stage.span());
  wait_products<0>();
  pin(softmax.out);
  self.free(stage);
  return stage;
}

// Through the warp's part of shared memory, so that rows leave in 16-byte pieces side by side.
__device__ __forceinline__ void write_out(const Softmax& softmax, const Consumer& self,
                                          const PrefillWgmmaParams& p, const QueryRows& rows) {
  const int lane = self.lane, first = self.warp * kWarpRows;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float sum = softmax.sums[i];
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    const float scale = 1 / sum;
#pragma unroll
    for (int n = 0; n < kRowChunks; n++) {
      const int row = first + 8 * i + lane / 4;
      uint32* chunk = reinterpret_cast<uint32*>(self.staging + query_chunk_offset(row, n));
      const float low = softmax.out[4 * n + 2 * i], high = softmax.out[4 * n + 2 * i + 1];
      chunk[lane % 4] = pack_elements(low * scale, high * scale);
    }
  }
  __syncwarp();
  const int stride = p.num_kv_heads * p.group * HEAD_DIM;
  for (int i = lane; i < kWarpRows * kRowChunks; i += kWarpSize) {
    const int row = i / kRowChunks, chunk = i % kRowChunks, in_item = rows.begin + row;
    if (in_item < rows.count) {
      char* target = static_cast<char*>(p.out) + row_offset(rows, in_item, p.group, stride) * 2;
      reinterpret_cast<Vector16*>(target)[chunk] = *reinterpret_cast<const Vector16*>(
          self.staging + query_chunk_offset(first + row, chunk));
    }
  }
  __syncwarp();
}

__device__ __forceinline__ void consume(const PrefillWgmmaParams& p, const Consumer& self,
                                        uint32 ring) {
  Stage stage = {ring, 0, 0};
  ClearedParities parities = {};
  if (self.number == 1) self.pass_turn();
  Pairs pairs = {p.num_items * p.num_kv_heads, 0};
  Work next = work_at(p, pairs.index());  // a grid has no more blocks than there are pairs
  while (!pairs.is_over()) {
    const Work work = next;
    const QueryRows rows = {work.item.first_query, work.kv_head * p.group,
                            self.number * kRows + self.warp * kWarpRows,
                            work.item.num_queries * p.group};
    load_query(self.staging, p, rows, self.warp * kWarpRows, self.lane);
    pairs.round++;
    if (!pairs.is_over()) next = work_at(p, pairs.index());
    fence_copy_engine();
    self.sync();
    Softmax softmax = {};
    stage = attend(softmax, self, work, rows, stage, parities, p.group, p.scale_log2).next();
    self.sync();  // nobody reads query rows any more
    write_out(softmax, self, p, rows);
  }
  if (self.number == 0) self.await_turn();  // so that every turn passed is taken
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    prefill_wgmma(const __grid_constant__ PrefillWgmmaParams p) {
  extern __shared__ __align__(1024) char shared[];
  release_successor();
  const uint32 ring = shared_address(shared);
  const int thread = threadIdx.x, lane = thread % kWarpSize;
  const int warp = thread / kWarpSize % kGroupWarps;
  // Alike in all lanes, and known to be.
  const int warpgroup = __shfl_sync(kFullWarp, thread / kWarpgroupThreads, 0);
  if (thread < kStages) init_stage({ring, thread, 0}, kConsumers * kGroupWarps);
  __syncthreads();
  wait_for_predecessor();
  if (warpgroup == kConsumers) {
    shrink_registers<kProducerRegisters>();
    if (warp == 0) produce(p, ring, lane);
  } else {
    grow_registers<kConsumerRegisters>();
    const int rows = kQueryOffset + warpgroup * kQueryBytes, word = kWordsOffset + thread * 4;
    consume(p, {warpgroup, warp, lane, shared + rows, ring + rows, ring + word}, ring);
  }
}
