// One warp's stream of tiles from a paged context into shared memory.
//
// Where there is a copy engine (compute capability 9.0), one lane issues a copy per tile; elsewhere
// all lanes copy 16 bytes at a time. USE_COPY_ENGINE=0 takes the latter everywhere, for tests.

#ifndef USE_COPY_ENGINE
#define USE_COPY_ENGINE (__CUDA_ARCH__ >= 900)
#endif

constexpr int kWarps = 4;  // that share an item, taking its tiles in turn
constexpr int kStages = STAGES;

// Tiles that a warp has under way: copies are issued and awaited in order.
struct TileRing {
  uint32 slots;  // shared-memory address of kStages tiles
  uint64 policy;
#if USE_COPY_ENGINE
  uint32 barriers;

  __device__ void init(int lane) {
    if (lane < kStages) barrier_init(barriers + 8 * lane, 1);
    fence_copy_engine();
    __syncwarp();
  }

  __device__ void issue(int slot, const char* tile, bool is_wanted, int lane) {
    if (lane == 0 && is_wanted) {
      copy_bulk(slots + slot * kTileBytes, tile, kTileBytes, barriers + 8 * slot, policy);
    }
  }

  __device__ void wait(int slot, int parity) { barrier_wait(barriers + 8 * slot, parity); }
#else
  // Commits a group even if there is nothing to copy: `wait` counts groups.
  __device__ void issue(int slot, const char* tile, bool is_wanted, int lane) {
    if (is_wanted) {
      const uint32 target = slots + slot * kTileBytes;
#pragma unroll
      for (int i = lane * kChunkBytes; i < kTileBytes; i += kWarpSize * kChunkBytes) {
        copy_async_16(target + i, tile + i, policy);
      }
    }
    commit_copies();
  }

  __device__ void wait(int, int) {
    wait_copies<kStages - 1>();
    __syncwarp();
  }
#endif
};

// Where a warp's tiles lie; looks block ids up 32 tiles at a time.
struct TileCursor {
  const char* pool;  // of the KV head
  const int* table;  // of the row
  int64 block_bytes;
  int first;         // this warp's first tile in the row
  int count;
  int block_shift;   // log2 of a block's tiles
  int block_ids;     // lane i: of this warp's tile i in the window of 32

  __device__ void load_window(int begin, int lane) {
    const int tile = first + (begin + lane) * kWarps;
    block_ids = begin + lane < count ? table[tile >> block_shift] : 0;
  }

  __device__ const char* locate(int k, int lane) {
    if (k % kWarpSize == 0 && k > 0) load_window(k, lane);
    const int block_id = __shfl_sync(kFullWarp, block_ids, k % kWarpSize);
    const int tile_in_block = (first + k * kWarps) & ((1 << block_shift) - 1);
    return pool + block_id * block_bytes + tile_in_block * kTileBytes;
  }
};
