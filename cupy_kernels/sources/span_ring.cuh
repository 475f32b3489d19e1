// A paged context on its way through shared memory, in spans of 128 tokens: one producer warp
// copies them into a ring of stages, a bulk copy per tile, and consumer warps free them.
//
// A span is its tiles, one behind the other. In the last one, what lies behind the end of the
// context may be NaN: keys there are for consumers to mask, values are cleared by the producer, for
// 0 * NaN is NaN. Hopper only.
//
// Needs device.cuh, kv_tile.cuh.

constexpr int kSpanTiles = 8;
constexpr int kSpanTokens = kSpanTiles * kTileTokens;
constexpr int kSpanBytes = kSpanTiles * kTileBytes;
constexpr int kStages = STAGES;  // spans in shared memory

// The ring in shared memory: spans, and for each stage three barriers.
constexpr int kFilledOffset = kStages * kSpanBytes;
constexpr int kFreedOffset = kFilledOffset + kStages * 8;
constexpr int kClearedOffset = kFreedOffset + kStages * 8;
constexpr int kRingBytes = kClearedOffset + kStages * 8;

// Where the producer or a consumer stands.
struct Stage {
  uint32 ring;  // address
  int number;
  uint32 parity;

  __device__ uint32 span() const { return ring + number * kSpanBytes; }
  __device__ uint32 filled() const { return ring + kFilledOffset + number * 8; }
  __device__ uint32 freed() const { return ring + kFreedOffset + number * 8; }
  __device__ uint32 cleared() const { return ring + kClearedOffset + number * 8; }

  __device__ Stage next() const {
    const bool wraps = number + 1 == kStages;
    return {ring, wraps ? 0 : number + 1, parity ^ uint32{wraps}};
  }
};

// By one thread for each stage, before anything else; all threads must be told.
__device__ __forceinline__ void init_stage(const Stage& stage, int consumer_warps) {
  barrier_init(stage.filled(), 1);
  barrier_init(stage.freed(), consumer_warps);
  barrier_init(stage.cleared(), 1);
  fence_copy_engine();
}

// Parities of the `cleared` barriers: each flips when its stage holds a span that is cleared.
struct ClearedParities {
  uint32 bits;

  __device__ uint32 take(const Stage& stage) {
    const uint32 parity = bits >> stage.number & 1;
    bits ^= 1u << stage.number;
    return parity;
  }
};

__device__ __forceinline__ int count_spans(int end) {
  return (end + kSpanTokens - 1) / kSpanTokens;
}

// Tokens in the last span; if there are fewer than kSpanTokens, the span is cleared.
__device__ __forceinline__ int count_last_tokens(int end) {
  return (end - 1) % kSpanTokens + 1;
}

// A context of tokens [0, end).
struct Context {
  const char* pool;  // of the KV head
  const int* table;  // of the row
  int64 block_bytes;
  int block_shift;   // log2 of a block's tiles
  int end;

  __device__ int block_id(int tile) const {
    return tile * kTileTokens < end ? table[tile >> block_shift] : 0;
  }

  __device__ const char* locate(int tile, int block_id) const {
    return pool + block_id * block_bytes + (tile & ((1 << block_shift) - 1)) * kTileBytes;
  }
};

// Copies all spans, lane i the i-th tile of each. Returns the last one's stage.
__device__ __forceinline__ Stage copy_spans(const Context& context, Stage stage, int lane) {
  const int num_tiles = (context.end + kTileTokens - 1) / kTileTokens;
  Stage last = stage;
  int block_id = lane < kSpanTiles ? context.block_id(lane) : 0;
#pragma unroll 1
  for (int first = 0; first < num_tiles; first += kSpanTiles) {
    const int count = min(num_tiles - first, kSpanTiles);
    const char* tile = context.locate(first + lane, block_id);
    if (lane < kSpanTiles) block_id = context.block_id(first + kSpanTiles + lane);
    barrier_wait(stage.freed(), stage.parity ^ 1);
    if (lane == 0) barrier_expect(stage.filled(), count * kTileBytes);
    __syncwarp();
    if (lane < count) {
      copy_expected(stage.span() + lane * kTileBytes, tile, kTileBytes, stage.filled());
    }
    last = stage;
    stage = stage.next();
  }
  return last;
}

// Clears the values of tokens from `num_valid` on in a span that has been copied.
__device__ __forceinline__ void clear_span(const Stage& stage, int num_valid, int lane) {
  barrier_wait(stage.filled(), stage.parity);
#pragma unroll 1
  for (int tile = num_valid / kTileTokens; tile < kSpanTiles; tile++) {
    clear_values(stage.span() + tile * kTileBytes, num_valid - tile * kTileTokens, lane);
  }
  fence_copy_engine();  // tensor cores read the way the copy engine does
  __syncwarp();
  if (lane == 0) barrier_arrive(stage.cleared());
}
