// silu(gate) * up, the activation of Llama's feed-forward layers
// (https://arxiv.org/abs/2002.05202).

#include "device.cuh"
#include "element.cuh"

struct SiluMulParams {
  const void* gate_up;  // [num_tokens, 2 * intermediate], gate first
  void* out;            // [num_tokens, intermediate]
  int num_tokens;
  int intermediate;     // a multiple of 8
};

__device__ __forceinline__ float silu(float x) { return x / (1 + __expf(-x)); }

extern "C" __global__ void __launch_bounds__(256)
    silu_mul(const __grid_constant__ SiluMulParams p) {
  release_successor();
  wait_for_predecessor();
  const int num_vectors = p.intermediate / 8;
  const int64 index = int64{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64 token = index / num_vectors;
  if (token >= p.num_tokens) return;
  const Vector16* gates = static_cast<const Vector16*>(p.gate_up) + index + token * num_vectors;
  const Vector16 gate = gates[0], up = gates[num_vectors];
  Vector16 out;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    out.words[i] = pack_elements(silu(low_element(gate.words[i])) * low_element(up.words[i]),
                                 silu(high_element(gate.words[i])) * high_element(up.words[i]));
  }
  static_cast<Vector16*>(p.out)[index] = out;
}
