// Matrix products of a warpgroup (four warps) on Hopper's tensor cores: wgmma, sm_90a only.
//
// A product is asynchronous: the registers it adds to or reads from may not be touched between
// commit_products and wait_products. Operands in shared memory are named by descriptors; here they
// always consist of atoms of 8 rows of 128 bytes, the 16-byte chunks of row r stored at places
// c ^ r, and atoms begin at multiples of 1,024 bytes. What is written there by plain stores must be
// followed by fence_copy_engine before a barrier.
// Reference: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
//
// Needs device.cuh, element.cuh.

constexpr int kWarpgroupThreads = 128;

// How many registers each thread of this warpgroup has from here on, a multiple of 8.
template <int count>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

template <int count>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// Barriers 1 to 15 among `threads` threads; 0 is that of __syncthreads. Whoever only arrives does
// not wait for the others.
__device__ __forceinline__ void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// An operand whose atoms lie `group_stride` bytes apart from 8 rows to the next 8, and
// `atom_stride` from 64 columns to the next 64. The latter only counts where a row is an index of
// summation (values: a row is a token); otherwise a product's 16 columns lie within one atom.
__device__ __forceinline__ uint64 operand(uint32 address, int group_stride, int atom_stride) {
  return uint64{(address & 0x3ffff) >> 4} | uint64(atom_stride >> 4) << 16 |
         uint64(group_stride >> 4) << 32 | 1ull << 62;
}

// Before the first product after sums or weights were written by other instructions.
__device__ __forceinline__ void fence_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most `pending` of the groups committed are under way.
template <int pending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Sums are [64 rows x n]. Warp w of the warpgroup has rows 16 * w to 16 * w + 15, and lane l of it,
// with g = l / 4 and t = 2 * (l % 4), at index 4 * i: (g, 8 * i + t), then t + 1, and the same two
// of row g + 8. A left operand in registers has the layout of multiply_add's.
#define SUMS_64 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define SUM_OPERANDS_64(d) \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), \
  "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
  "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), \
  "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), \
  "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), \
  "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), \
  "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), \
  "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), \
  "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define SUMS_32 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define SUM_OPERANDS_32(d) \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), \
  "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
  "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), \
  "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), \
  "+f"(d[30]), "+f"(d[31])

// Uses of these registers stay on their side of this point: to the compiler a product is over when
// it is issued, and waiting names no registers.
__device__ __forceinline__ void pin(float (&sums)[64]) {
  asm volatile("" : SUM_OPERANDS_64(sums)::"memory");
}

__device__ __forceinline__ void pin(float (&sums)[32]) {
  asm volatile("" : SUM_OPERANDS_32(sums)::"memory");
}

// sums[64 x 128] = a[64 x 16] b[16 x 128], added to what is there if `adds`; in shared memory the
// index of summation runs along the rows of both.
__device__ __forceinline__ void multiply_rows(float (&sums)[64], uint64 a, uint64 b, bool adds) {
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." ELEMENT_PTX "." ELEMENT_PTX
               " " SUMS_64 ", %64, %65, adds, 1, 1, 0, 0;\n}"
               : SUM_OPERANDS_64(sums)
               : "l"(a), "l"(b), "r"(int{adds}));
}

// sums[64 x n] += a[64 x 16] b[16 x n]; each row of b has one index of summation.
__device__ __forceinline__ void multiply_add(float (&sums)[64], const uint32* a, uint64 b) {
  asm volatile("{\n.reg .pred adds;\nsetp.eq.b32 adds, 0, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." ELEMENT_PTX "." ELEMENT_PTX
               " " SUMS_64 ", {%64, %65, %66, %67}, %68, adds, 1, 1, 1;\n}"
               : SUM_OPERANDS_64(sums)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void multiply_add(float (&sums)[32], const uint32* a, uint64 b) {
  asm volatile("{\n.reg .pred adds;\nsetp.eq.b32 adds, 0, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." ELEMENT_PTX "." ELEMENT_PTX
               " " SUMS_32 ", {%32, %33, %34, %35}, %36, adds, 1, 1, 1;\n}"
               : SUM_OPERANDS_32(sums)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
