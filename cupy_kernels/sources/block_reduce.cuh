// Reductions and a search by a block of kThreads threads; the result is on all of them. Needs
// device.cuh.

constexpr int kNumWarps = kThreads / kWarpSize;

// In shared memory; free again when a reduction returns.
struct WarpResults {
  uint32 words[3][kNumWarps];
};

__device__ __forceinline__ uint32 block_max(uint32 value, WarpResults& results) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  value = __reduce_max_sync(kFullWarp, value);
  if (lane == 0) results.words[0][warp] = value;
  __syncthreads();
  value = __reduce_max_sync(kFullWarp, results.words[0][lane % kNumWarps]);
  __syncthreads();
  return value;
}

__device__ __forceinline__ uint64 warp_max(uint64 value) {
  const uint32 high = static_cast<uint32>(value >> 32), low = static_cast<uint32>(value);
  const uint32 highest = __reduce_max_sync(kFullWarp, high);
  return uint64{highest} << 32 | __reduce_max_sync(kFullWarp, high == highest ? low : 0);
}

__device__ __forceinline__ uint64 block_max(uint64 value, WarpResults& results) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  value = warp_max(value);
  if (lane == 0) {
    results.words[0][warp] = static_cast<uint32>(value);
    results.words[1][warp] = static_cast<uint32>(value >> 32);
  }
  __syncthreads();
  const int other = lane % kNumWarps;
  value = warp_max(uint64{results.words[1][other]} << 32 | results.words[0][other]);
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
  for (int i = 0; i < 3; i++) {
    values[i] = __reduce_add_sync(kFullWarp, lane < kNumWarps ? results.words[i][lane] : 0);
  }
  __syncthreads();
}

// Of values below 2^60.
__device__ __forceinline__ uint64 block_sum(uint64 value, WarpResults& results) {
  constexpr int kPartBits = 20;
  constexpr uint32 kPart = (1u << kPartBits) - 1;
  uint32 parts[3];
#pragma unroll
  for (int i = 0; i < 3; i++) parts[i] = static_cast<uint32>(value >> i * kPartBits) & kPart;
  block_sums(parts, results);
  return (uint64{parts[2]} << 2 * kPartBits) + (uint64{parts[1]} << kPartBits) + parts[0];
}

// The greatest number in [low, high] for which `holds` is true, as it must be for `low` and for all
// numbers below another one. Each warp asks for a different number, its threads for the same.
template <class Holds>
__device__ __forceinline__ uint32 block_search(uint32 low, uint32 high, Holds holds) {
  while (low < high) {
    const uint32 step = (high - low) / (kNumWarps + 1) + 1;
    const uint32 mine = low + (threadIdx.x / kWarpSize + 1) * step;
    const bool is_true = mine <= high && holds(mine);
    low += __syncthreads_count(is_true) / kWarpSize * step;
    high = min(high, low + step - 1);
  }
  return low;
}
