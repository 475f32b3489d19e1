// Reductions over a block of 1,024 threads; the result is on all of them. Needs device.cuh.

// In shared memory; free again when a reduction returns.
struct WarpResults {
  uint32 words[3][kWarpSize];
  uint64 long_words[kWarpSize];
};

__device__ __forceinline__ uint32 block_max(uint32 value, WarpResults& results) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  value = __reduce_max_sync(kFullWarp, value);
  if (lane == 0) results.words[0][warp] = value;
  __syncthreads();
  value = __reduce_max_sync(kFullWarp, results.words[0][lane]);
  __syncthreads();
  return value;
}

// Three sums at once, each below 2^32.
__device__ __forceinline__ void block_sums(uint32 (&values)[3], WarpResults& results) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 3; i++) {
    values[i] = __reduce_add_sync(kFullWarp, values[i]);
    if (lane == 0) results.words[i][warp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 3; i++) values[i] = __reduce_add_sync(kFullWarp, results.words[i][lane]);
  __syncthreads();
}

template <class Combine>
__device__ __forceinline__ uint64 block_reduce(uint64 value, WarpResults& results,
                                               Combine combine) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) {
    value = combine(value, __shfl_xor_sync(kFullWarp, value, mask));
  }
  if (lane == 0) results.long_words[warp] = value;
  __syncthreads();
  value = results.long_words[lane];
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) {
    value = combine(value, __shfl_xor_sync(kFullWarp, value, mask));
  }
  __syncthreads();
  return value;
}

__device__ __forceinline__ uint64 block_sum(uint64 value, WarpResults& results) {
  return block_reduce(value, results, [](uint64 a, uint64 b) { return a + b; });
}
