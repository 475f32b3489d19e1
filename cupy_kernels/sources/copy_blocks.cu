// Copies whole blocks within the pool, all pairs at once. No block may be both source and target.

#include "device.cuh"

struct CopyBlocksParams {
  void* pool;            // block 0
  const int* sources;    // [num_pairs] block ids
  const int* targets;    // [num_pairs] block ids
  int64 block_bytes;     // a multiple of 16
  int pieces_per_block;  // of kPieceVectors each, the last one may be shorter
};

constexpr int kThreads = 512;
constexpr int kUnroll = 4;
constexpr int kPieceVectors = kThreads * kUnroll;

extern "C" __global__ void __launch_bounds__(kThreads)
    copy_blocks(const __grid_constant__ CopyBlocksParams p) {
  release_successor();
  wait_for_predecessor();
  const int pair = blockIdx.x / p.pieces_per_block, piece = blockIdx.x % p.pieces_per_block;
  const int64 num_vectors = p.block_bytes / sizeof(Vector16);
  Vector16* pool = static_cast<Vector16*>(p.pool);
  const Vector16* source = pool + p.sources[pair] * num_vectors;
  Vector16* target = pool + p.targets[pair] * num_vectors;
  const int64 first = int64{piece} * kPieceVectors + threadIdx.x;
  Vector16 vectors[kUnroll];
#pragma unroll
  for (int i = 0; i < kUnroll; i++) {
    if (first + i * kThreads < num_vectors) vectors[i] = source[first + i * kThreads];
  }
#pragma unroll
  for (int i = 0; i < kUnroll; i++) {
    if (first + i * kThreads < num_vectors) target[first + i * kThreads] = vectors[i];
  }
}
