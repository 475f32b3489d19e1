// Rotates the queries of a step in place, and stores its rotated keys and its values in their slots
// of the KV cache. Given norm weights, each query or key head is first normalised (RMS).
//
// Rotary embedding (https://arxiv.org/abs/2104.09864), halves paired: elements i and i + D/2 turn
// by the token's angle i. Everything in float32, rounded once. Keys stay as they are in `qkv`.

#include "device.cuh"
#include "element.cuh"
#include "kv_tile.cuh"

struct WriteKvParams {
  void* qkv;               // [num_tokens, num_heads + 2 * num_kv_heads, HEAD_DIM]
  const float* angles;     // [positions, HEAD_DIM], cosines, then sines
  const int* positions;    // [num_tokens]
  const int* slot_mapping; // [num_tokens], block_id * block_size + offset; below 0: not stored
  const void* q_norm;      // [HEAD_DIM] or null
  const void* k_norm;      // [HEAD_DIM] or null
  void* pool;              // the layer's part of block 0
  int64 block_bytes;       // from block to block
  int num_tokens;
  int num_heads;
  int num_kv_heads;
  int block_size;
  float rms_norm_eps;
};

constexpr int kHalf = HEAD_DIM / 2;
// A thread holds a chunk of the lower half and its partner of the upper half.
constexpr int kThreadsUsed = kHalf / kChunkElements;
constexpr int kThreadsPerHead = kThreadsUsed <= 4 ? 4 : kThreadsUsed <= 8 ? 8 : 16;

// As many as registers allow without spilling: more bytes are under way.
constexpr int kBlocksPerSm = HEAD_DIM == 96 ? 5 : 6;

struct HeadChunks {
  float low[kChunkElements];
  float high[kChunkElements];
};

__device__ __forceinline__ void unpack(const Vector16& chunk, float (&values)[kChunkElements]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    values[2 * i] = low_element(chunk.words[i]);
    values[2 * i + 1] = high_element(chunk.words[i]);
  }
}

__device__ __forceinline__ Vector16 pack(const float (&values)[kChunkElements]) {
  Vector16 chunk;
#pragma unroll
  for (int i = 0; i < 4; i++) chunk.words[i] = pack_elements(values[2 * i], values[2 * i + 1]);
  return chunk;
}

// Called by all threads of a warp; those of a head share its sum of squares.
__device__ __forceinline__ void normalise(HeadChunks& head, const void* weight, int thread,
                                          float eps) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kChunkElements; i++) {
    sum += head.low[i] * head.low[i] + head.high[i] * head.high[i];
  }
#pragma unroll
  for (int mask = 1; mask < kThreadsPerHead; mask *= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, mask);
  }
  if (weight == nullptr || thread >= kThreadsUsed) return;
  const float scale = rsqrtf(sum / HEAD_DIM + eps);
  const Vector16* chunks = static_cast<const Vector16*>(weight);
  HeadChunks weights;
  unpack(chunks[thread], weights.low);
  unpack(chunks[thread + kThreadsUsed], weights.high);
#pragma unroll
  for (int i = 0; i < kChunkElements; i++) {
    head.low[i] *= scale * weights.low[i];
    head.high[i] *= scale * weights.high[i];
  }
}

__device__ __forceinline__ void rotate_pair(float& low, float& high, float cosine, float sine) {
  const float turned = low * cosine - high * sine;
  high = high * cosine + low * sine;
  low = turned;
}

__device__ __forceinline__ void rotate(HeadChunks& head, const float* angles, int thread) {
  const float4* cosines = reinterpret_cast<const float4*>(angles + thread * kChunkElements);
  const float4* sines = reinterpret_cast<const float4*>(angles + kHalf + thread * kChunkElements);
#pragma unroll
  for (int i = 0; i < kChunkElements / 4; i++) {
    const float4 c = __ldg(cosines + i), s = __ldg(sines + i);
    rotate_pair(head.low[4 * i], head.high[4 * i], c.x, s.x);
    rotate_pair(head.low[4 * i + 1], head.high[4 * i + 1], c.y, s.y);
    rotate_pair(head.low[4 * i + 2], head.high[4 * i + 2], c.z, s.z);
    rotate_pair(head.low[4 * i + 3], head.high[4 * i + 3], c.w, s.w);
  }
}

__device__ __forceinline__ char* key_address(const WriteKvParams& p, int slot, int kv_head) {
  const int offset = slot % p.block_size;
  const int tile = kv_head * (p.block_size / kTileTokens) + offset / kTileTokens;
  return static_cast<char*>(p.pool) + slot / p.block_size * p.block_bytes + tile * kTileBytes;
}

extern "C" __global__ void __launch_bounds__(256, kBlocksPerSm)
    write_kv(const __grid_constant__ WriteKvParams p) {
  release_successor();
  wait_for_predecessor();
  const int thread = threadIdx.x % kThreadsPerHead;
  const int num_slices = p.num_heads + 2 * p.num_kv_heads;
  const int index = (blockIdx.x * blockDim.x + threadIdx.x) / kThreadsPerHead;
  const int token = index / num_slices, slice = index % num_slices;
  const bool is_live = token < p.num_tokens && thread < kThreadsUsed;
  const bool is_query = slice < p.num_heads;
  const bool is_value = slice >= p.num_heads + p.num_kv_heads;

  Vector16* chunks = static_cast<Vector16*>(p.qkv) + int64{index} * (2 * kThreadsUsed);
  Vector16 low = {}, high = {};
  int slot = -1, position = 0;
  if (is_live) {
    position = p.positions[token];
    slot = p.slot_mapping[token];
    low = chunks[thread];
    high = chunks[thread + kThreadsUsed];
  }
  HeadChunks head;
  unpack(low, head.low);
  unpack(high, head.high);
  if (p.q_norm != nullptr || p.k_norm != nullptr) {
    normalise(head, is_query ? p.q_norm : is_value ? nullptr : p.k_norm, thread, p.rms_norm_eps);
  }
  if (!is_live) return;
  if (!is_value) {
    rotate(head, p.angles + int64{position} * HEAD_DIM, thread);
    low = pack(head.low);
    high = pack(head.high);
  }
  if (is_query) {
    chunks[thread] = low;
    chunks[thread + kThreadsUsed] = high;
  } else if (slot >= 0) {
    const int kv_head = slice - p.num_heads - (is_value ? p.num_kv_heads : 0);
    const int token_in_tile = slot % kTileTokens;
    char* tile = key_address(p, slot, kv_head) + (is_value ? kValueOffset : 0);
    *reinterpret_cast<Vector16*>(tile + key_chunk_offset(token_in_tile, thread)) = low;
    *reinterpret_cast<Vector16*>(tile + key_chunk_offset(token_in_tile, thread + kThreadsUsed)) =
        high;
  }
}
