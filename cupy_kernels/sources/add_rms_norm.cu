// Adds to the residual stream, rounds, and normalises the sum by its root mean square
// (https://arxiv.org/abs/1910.07467). One block of threads per token; float32 inside.

#include "device.cuh"
#include "element.cuh"

struct AddRmsNormParams {
  void* residual;      // [num_tokens, hidden]; changed if there is a delta
  const void* delta;   // [num_tokens, hidden] or null
  const void* weight;  // [hidden]
  void* out;           // [num_tokens, hidden]
  int hidden;          // a multiple of 8, at most 8 * kVectors * threads
  float eps;
};

constexpr int kVectors = 2;  // of 8 elements, per thread
constexpr int kMaxWarps = 32;

// Sum over the block of threads, on all of them.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float sums[kMaxWarps];
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) value += __shfl_xor_sync(kFullWarp, value, mask);
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < blockDim.x / kWarpSize; warp++) total += sums[warp];
  return total;
}

extern "C" __global__ void __launch_bounds__(1024)
    add_rms_norm(const __grid_constant__ AddRmsNormParams p) {
  release_successor();
  wait_for_predecessor();
  const int num_vectors = p.hidden / 8;
  const int64 first = int64{blockIdx.x} * num_vectors;
  Vector16* residual = static_cast<Vector16*>(p.residual) + first;
  Vector16 sums[kVectors] = {};
  float square_sum = 0;
#pragma unroll
  for (int k = 0; k < kVectors; k++) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i >= num_vectors) break;
    sums[k] = residual[i];
    if (p.delta != nullptr) {
      const Vector16 delta = static_cast<const Vector16*>(p.delta)[first + i];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const uint32 old = sums[k].words[j];
        sums[k].words[j] = pack_elements(low_element(old) + low_element(delta.words[j]),
                                         high_element(old) + high_element(delta.words[j]));
      }
      residual[i] = sums[k];
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float low = low_element(sums[k].words[j]), high = high_element(sums[k].words[j]);
      square_sum += low * low + high * high;
    }
  }
  const float scale = rsqrtf(block_sum(square_sum) / p.hidden + p.eps);
#pragma unroll
  for (int k = 0; k < kVectors; k++) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i >= num_vectors) break;
    const Vector16 weight = static_cast<const Vector16*>(p.weight)[i];
    Vector16 out;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint32 sum = sums[k].words[j], w = weight.words[j];
      out.words[j] = pack_elements(low_element(sum) * scale * low_element(w),
                                   high_element(sum) * scale * high_element(w));
    }
    static_cast<Vector16*>(p.out)[first + i] = out;
  }
}
