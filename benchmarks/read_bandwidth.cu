// Reads memory once, as fast as plain loads go: the ceiling that kernels are compared with.

#include "device.cuh"

struct ReadBandwidthParams {
  const void* source;  // [num_vectors] of 16 bytes
  uint64 num_vectors;  // a multiple of kUnroll * threads of a block
  void* sink;          // never written
};

constexpr int kUnroll = 8;

extern "C" __global__ void __launch_bounds__(512)
    read_bandwidth(const __grid_constant__ ReadBandwidthParams p) {
  wait_for_predecessor();
  const Vector16* source = static_cast<const Vector16*>(p.source) +
                           blockIdx.x * uint64{blockDim.x} * kUnroll + threadIdx.x;
  uint32 all = 0;
#pragma unroll
  for (int i = 0; i < kUnroll; i++) {
    uint32 words[4];
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "l"(source + i * blockDim.x));
    all ^= words[0] ^ words[1] ^ words[2] ^ words[3];
  }
  if (all == 0x12345679u) static_cast<uint32*>(p.sink)[0] = all;
}
