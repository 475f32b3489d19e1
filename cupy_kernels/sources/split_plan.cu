// Cuts a decode step's attention into work items, once per step, on the device: a captured graph
// then serves all lengths. The blocks of threads share nothing; each reads all lengths.
//
// A row is cut into round(tiles / chunk) parts, at least one. The chunk is what gives every SM one
// item, or two where much is read: then an SM needs more bytes under way, and merging more parts
// costs less than it gains. The number of items stays within `capacity`, because
// sum(max(1, round(tiles / chunk))) is at most num_rows + total / chunk and the chunk is raised
// accordingly. Longest items come first. Everything is counted in 32 bits: tiles times KV heads
// times parts of a row must stay below 2^31.

#include "device.cuh"
#include "work_item.cuh"

struct SplitPlanParams {
  const int* rows;      // [num_rows], into the block table
  const int* seq_lens;  // [num_rows], this step's token included; 0: no item
  WorkItem* items;      // [capacity], those without work have num_tiles 0
  int* arrivals;        // [num_rows, num_kv_heads], set to 0
  int num_rows;         // at most kMaxRows
  int num_kv_heads;
  int capacity;         // more than num_rows * num_kv_heads
  int num_sms;
  int small_tiles;      // over all KV heads; if at most so many are read, that is little
  int min_chunk_tiles;
  int max_chunk_tiles;
};

constexpr int kTileTokens = 16;
constexpr int kMaxRows = 2048;
constexpr int kWarps = 8;  // each plans one row
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kRowsPerThread = kMaxRows / kThreads, kRowsAtOnce = 4;

__device__ __forceinline__ int ceil_divide(int a, int b) { return (a + b - 1) / b; }

// a / b for a >= 0, b > 0 and a quotient below 2^20, in a fraction of the usual time: the first
// guess is off by one at most.
__device__ __forceinline__ int divide(int a, int b) {
  const int guess = static_cast<int>(__fdividef(static_cast<float>(a), static_cast<float>(b)));
  const int rest = a - guess * b;
  return guess + (rest >= b) - (rest < 0);
}

__device__ __forceinline__ int tiles_of(int seq_len) {
  return (seq_len + kTileTokens - 1) / kTileTokens;
}

__device__ __forceinline__ int num_parts(int tiles, int chunk) {
  return tiles == 0 ? 0 : max(1, divide(2 * tiles + chunk, 2 * chunk));
}

__device__ __forceinline__ int chunk_tiles(const SplitPlanParams& p, int total_tiles) {
  const int work = total_tiles * p.num_kv_heads;
  const int splits = work <= p.small_tiles ? p.num_sms : 2 * p.num_sms;
  const int wanted = min(max(ceil_divide(work, splits), p.min_chunk_tiles), p.max_chunk_tiles);
  return max(wanted, ceil_divide(work, p.capacity - p.num_rows * p.num_kv_heads));
}

// Leaves the sum over this thread's warp for `block_total`.
__device__ __forceinline__ void add_to(int (&sums)[kWarps], int value) {
  value = __reduce_add_sync(kFullWarp, value);
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = value;
}

__device__ __forceinline__ int block_total(const int (&sums)[kWarps]) {
  int total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; w++) total += sums[w];
  return total;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    split_plan(const __grid_constant__ SplitPlanParams p) {
  __shared__ int tile_sums[kWarps], part_sums[kWarps];
  // Sort key of each row, greater first, no two are equal; and its number of parts.
  __shared__ uint2 ranked[kMaxRows];
  release_successor();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int mine = blockIdx.x * kWarps + warp;  // batch index of this warp's row
  const int thread = blockIdx.x * kThreads + threadIdx.x, num_threads = gridDim.x * kThreads;
  wait_for_predecessor();
  const int row = mine < p.num_rows ? p.rows[mine] : 0;
  const int seq_len = mine < p.num_rows ? p.seq_lens[mine] : 0;
  int row_tiles[kRowsPerThread], sum = 0;
#pragma unroll
  for (int k = 0; k < kRowsPerThread; k++) {
    const int i = threadIdx.x + k * kThreads;
    row_tiles[k] = i < p.num_rows ? tiles_of(p.seq_lens[i]) : 0;
    sum += row_tiles[k];
  }
  for (int i = thread; i < p.num_rows * p.num_kv_heads; i += num_threads) p.arrivals[i] = 0;
  add_to(tile_sums, sum);
  __syncthreads();

  const int chunk = chunk_tiles(p, block_total(tile_sums));
  sum = 0;
#pragma unroll
  for (int first = 0; first < kRowsPerThread; first += kRowsAtOnce) {
    if (first * kThreads >= p.num_rows) break;
#pragma unroll
    for (int k = first; k < first + kRowsAtOnce; k++) {  // those behind the last row are empty
      const int i = threadIdx.x + k * kThreads;
      const int parts = num_parts(row_tiles[k], chunk), divisor = max(1, parts);
      const int longest = divide(row_tiles[k] + divisor - 1, divisor);
      ranked[i] = make_uint2(longest * kMaxRows + kMaxRows - 1 - i, parts);
      sum += parts;
    }
  }
  add_to(part_sums, sum);
  __syncthreads();

  if (mine < p.num_rows) {
    const uint2 rank = ranked[mine];
    int before = 0;
#pragma unroll 8
    for (int j = lane; j < p.num_rows; j += kWarpSize) {
      const uint2 other = ranked[j];
      before += other.x > rank.x ? other.y : 0;
    }
    const int first = __reduce_add_sync(kFullWarp, before) * p.num_kv_heads;
    const int parts = rank.y, tiles = tiles_of(seq_len);
    for (int k = lane; k < parts * p.num_kv_heads; k += kWarpSize) {
      const int head = divide(k, parts), part = k - head * parts;
      const int begin = divide(tiles * part, parts), end = divide(tiles * (part + 1), parts);
      p.items[first + k] = {mine, row, head, begin, end - begin, seq_len, part, parts};
    }
  }
  const int num_items = block_total(part_sums) * p.num_kv_heads;
  for (int i = num_items + thread; i < p.capacity; i += num_threads) p.items[i] = {};
}
