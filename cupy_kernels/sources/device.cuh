// Types and instructions that all kernels share. No headers: NVRTC then compiles a kernel in well
// under a second, and the source text alone decides what comes out (it is the key of the cache).

typedef unsigned int uint32;
typedef unsigned long long uint64;
typedef long long int64;

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarpSize = 32;

// Stands for minus infinity: exp2 of a difference of two of them is not NaN.
constexpr float kLowest = -1e30f;

struct alignas(16) Vector16 {
  uint32 words[4];
};

// A kernel may be launched before the one ahead of it has ended. Nothing that others write may be
// touched before this returns, nor be read by __ldg after it: that takes memory to be constant for
// as long as the kernel runs, so the compiler may move it to the front.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once every block of threads has called this or ended, the next kernel may be launched.
__device__ __forceinline__ void release_successor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The blocks of threads that run together on neighbouring SMs and reach each other's shared memory;
// one alone before compute capability 9.0. Such memory may be touched once all have started, which
// a cluster_sync tells, and until its owner has passed another one.
__device__ __forceinline__ int cluster_rank() {
  uint32 rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

__device__ __forceinline__ int cluster_size() {
  uint32 size = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return static_cast<int>(size);
}

__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// Where the block of threads with `rank` has what `local` points to in this one's shared memory.
template <class Value>
__device__ __forceinline__ Value* in_block(Value* local, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64 address;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(local), "r"(rank));
  return reinterpret_cast<Value*>(address);
#else
  return local;
#endif
}

__device__ __forceinline__ uint32 shared_address(const void* pointer) {
  return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32 (&registers)[4], uint32 row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(row_address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32 (&registers)[4],
                                                         uint32 row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(row_address)
               : "memory");
}

// An 8 x 8 matrix of 16-bit elements held by a warp, two neighbours of a row per lane.
__device__ __forceinline__ uint32 transpose_matrix(uint32 pair) {
  uint32 transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// For what is read once: it should be the first to leave the second-level cache.
__device__ __forceinline__ uint64 evict_first_policy() {
  uint64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// 16 bytes from global to shared memory, past the first-level cache.
__device__ __forceinline__ void copy_async_16(uint32 target, const void* source) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(target), "l"(source)
               : "memory");
}

__device__ __forceinline__ void copy_async_16(uint32 target, const void* source,
                                              uint64 cache_policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;"
               ::"r"(target), "l"(source), "l"(cache_policy)
               : "memory");
}

// The same for 4 or 8 bytes, which other threads may read soon.
template <int bytes>
__device__ __forceinline__ void copy_async(void* target, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(target)),
               "l"(source), "n"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most `pending` of this thread's committed groups are under way.
template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void barrier_init(uint32 barrier, uint32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Barriers initialised and shared memory written so far become visible to the copy engine.
__device__ __forceinline__ void fence_copy_engine() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_wait(uint32 barrier, uint32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred is_done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 is_done, [%0], %1;\n"
      "@!is_done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the barrier wait for so many bytes from the copy engine, too.
__device__ __forceinline__ void barrier_expect(uint32 barrier, uint32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// One copy of `bytes` (a multiple of 16) by the copy engine; `barrier` counts the bytes.
__device__ __forceinline__ void copy_bulk(uint32 target, const void* source, uint32 bytes,
                                          uint32 barrier, uint64 cache_policy) {
  barrier_expect(barrier, bytes);
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(target),
      "l"(source), "r"(bytes), "r"(barrier), "l"(cache_policy)
      : "memory");
}

// The same for bytes that `barrier` expects already, and that others will read again.
__device__ __forceinline__ void copy_expected(uint32 target, const void* source, uint32 bytes,
                                              uint32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(target), "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}
#endif
