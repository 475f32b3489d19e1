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
constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarpSize;

__device__ __forceinline__ int ceil_divide(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ int num_parts(int tiles, int chunk) {
  return tiles == 0 ? 0 : max(1, (2 * tiles + chunk) / (2 * chunk));
}

__device__ __forceinline__ int chunk_tiles(const SplitPlanParams& p, int total_tiles) {
  const int work = total_tiles * p.num_kv_heads;
  const int splits = work <= p.small_tiles ? p.num_sms : 2 * p.num_sms;
  const int wanted = min(max(ceil_divide(work, splits), p.min_chunk_tiles), p.max_chunk_tiles);
  return max(wanted, ceil_divide(work, p.capacity - p.num_rows * p.num_kv_heads));
}

// Adds up the threads' values in `sum`, in shared memory.
__device__ __forceinline__ void add_to(int* sum, int value) {
  value = __reduce_add_sync(kFullWarp, value);
  if (threadIdx.x % kWarpSize == 0) atomicAdd(sum, value);
}

// The items of batch index `i`, written by one warp.
__device__ __forceinline__ void write_items(const SplitPlanParams& p, int i, int first, int parts,
                                            int lane) {
  const int seq_len = p.seq_lens[i], row = p.rows[i];
  const int tiles = ceil_divide(seq_len, kTileTokens);
  for (int k = lane; k < parts * p.num_kv_heads; k += kWarpSize) {
    const int part = k % parts;
    const int begin = tiles * part / parts, end = tiles * (part + 1) / parts;
    p.items[first + k] = {i, row, k / parts, begin, end - begin, seq_len, part, parts};
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    split_plan(const __grid_constant__ SplitPlanParams p) {
  __shared__ int total_tiles, total_parts;
  // Sort key of each row, greater first, no two are equal; and its number of parts.
  __shared__ uint2 ranked[kMaxRows];
  __shared__ int parts_before[kWarps][kWarpSize];
  release_successor();
  wait_for_predecessor();
  if (threadIdx.x == 0) total_tiles = total_parts = 0;
  __syncthreads();
  int tiles = 0;
  for (int i = threadIdx.x; i < p.num_rows; i += kThreads) {
    tiles += ceil_divide(p.seq_lens[i], kTileTokens);
  }
  add_to(&total_tiles, tiles);
  __syncthreads();

  const int chunk = chunk_tiles(p, total_tiles);
  int parts = 0;
  for (int i = threadIdx.x; i < p.num_rows; i += kThreads) {
    const int row_tiles = ceil_divide(p.seq_lens[i], kTileTokens);
    const int row_parts = num_parts(row_tiles, chunk);
    const int longest = row_parts == 0 ? 0 : ceil_divide(row_tiles, row_parts);
    ranked[i] = make_uint2(longest * kMaxRows + kMaxRows - 1 - i, row_parts);
    parts += row_parts;
  }
  add_to(&total_parts, parts);
  __syncthreads();

  // Each lane finds the place of one row, each warp looks at a share of all rows.
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int first_row = blockIdx.x * kWarpSize, mine = first_row + lane;
  const uint32 key = mine < p.num_rows ? ranked[mine].x : 0;
  int before = 0;
#pragma unroll 8
  for (int j = warp; j < p.num_rows; j += kWarps) {
    before += ranked[j].x > key ? ranked[j].y : 0;
  }
  parts_before[warp][lane] = before;
  __syncthreads();
  for (int k = warp; k < kWarpSize && first_row + k < p.num_rows; k += kWarps) {
    int first = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w++) first += parts_before[w][k];
    write_items(p, first_row + k, first * p.num_kv_heads, ranked[first_row + k].y, lane);
  }

  const int thread = blockIdx.x * kThreads + threadIdx.x, num_threads = gridDim.x * kThreads;
  const int num_items = total_parts * p.num_kv_heads;
  for (int i = num_items + thread; i < p.capacity; i += num_threads) p.items[i] = {};
  for (int i = thread; i < p.num_rows * p.num_kv_heads; i += num_threads) p.arrivals[i] = 0;
}
