// Keys and values of 16 consecutive tokens of one layer and KV head: one run of memory, a tile.
//
//   tile [2 groups of 8 tokens][K | V][HEAD_DIM / kAtomDims atoms][8 tokens][kAtomDims elements]
//
// Within an atom, 16-byte chunk c of token r is stored at place c ^ swizzle(r), so that the same
// chunk of 8 tokens lies in 8 different sets of shared-memory banks: matrices load without
// conflicts, transposed or not. Tiles are copied to shared memory as they are. With 64-element
// atoms the bytes are also the 128-byte swizzled operand image of Hopper's wgmma.
// Around it: block [layer][kv_head][block_size / 16 tiles].
//
// Needs device.cuh.

constexpr int kTileTokens = 16;
constexpr int kGroupTokens = 8;
constexpr int kChunkBytes = 16;
constexpr int kChunkElements = 8;
constexpr int kAtomDims = HEAD_DIM % 64 == 0 ? 64 : 32;
constexpr int kAtomRowBytes = kAtomDims * 2;
constexpr int kAtomChunks = kAtomDims / kChunkElements;
constexpr int kAtomBytes = kGroupTokens * kAtomRowBytes;
constexpr int kValueOffset = HEAD_DIM * kGroupTokens * 2;
constexpr int kGroupBytes = 2 * kValueOffset;
constexpr int kTileBytes = 2 * kGroupBytes;

__device__ __forceinline__ int swizzle(int token_in_group) {
  return kAtomDims == 64 ? token_in_group : token_in_group / 2;
}

// Bytes from the tile's begin to elements [8 * chunk, 8 * chunk + 8) of a token's key.
__device__ __forceinline__ int key_chunk_offset(int token, int chunk) {
  const int in_group = token % kGroupTokens;
  return token / kGroupTokens * kGroupBytes + chunk / kAtomChunks * kAtomBytes +
         in_group * kAtomRowBytes + (chunk % kAtomChunks ^ swizzle(in_group)) * kChunkBytes;
}

// Operands of the tensor cores for 16 tokens and dimensions [16 * step, 16 * step + 16) from a tile
// in shared memory, as four 8 x 8 matrices. Keys: tokens are the rows; matrix i has the tokens of
// group i % 2 and chunk i / 2. Values: dimensions are the rows; chunk i % 2 and group i / 2.
__device__ __forceinline__ void load_keys(uint32 (&keys)[4], uint32 tile, int step, int lane) {
  const int matrix = lane / 8, in_group = lane % 8, chunk = 2 * step % kAtomChunks + matrix / 2;
  load_matrices(keys, tile + matrix % 2 * kGroupBytes + 2 * step / kAtomChunks * kAtomBytes +
                          in_group * kAtomRowBytes + (chunk ^ swizzle(in_group)) * kChunkBytes);
}

__device__ __forceinline__ void load_values(uint32 (&values)[4], uint32 tile, int step, int lane) {
  const int matrix = lane / 8, in_group = lane % 8, chunk = 2 * step % kAtomChunks + matrix % 2;
  load_matrices_transposed(values, tile + kValueOffset + matrix / 2 * kGroupBytes +
                                       2 * step / kAtomChunks * kAtomBytes +
                                       in_group * kAtomRowBytes +
                                       (chunk ^ swizzle(in_group)) * kChunkBytes);
}

// Zero the values of tokens from `num_valid` on in a tile in shared memory: what is there may be
// NaN, and 0 * NaN is NaN. Called by a whole warp.
__device__ __forceinline__ void clear_values(uint32 tile, int num_valid, int lane) {
  constexpr int kRowChunks = HEAD_DIM / kChunkElements;
  for (int i = lane; i < kTileTokens * kRowChunks; i += kWarpSize) {
    const int token = i / kRowChunks;
    if (token >= num_valid) {
      const uint32 address = tile + kValueOffset + key_chunk_offset(token, i % kRowChunks);
      asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
    }
  }
}
