// The 16-bit element type of activations and of the KV cache: bfloat16 if ELEMENT_BF16, else half.
// Arithmetic is in float32; elements are handled in pairs, the lower address in the lower half.

#if ELEMENT_BF16
#define ELEMENT_PTX "bf16"

__device__ __forceinline__ float low_element(uint32 pair) { return __uint_as_float(pair << 16); }

__device__ __forceinline__ float high_element(uint32 pair) {
  return __uint_as_float(pair & 0xffff0000u);
}
#else
#define ELEMENT_PTX "f16"

__device__ __forceinline__ float low_element(uint32 pair) {
  float value;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}"
      : "=f"(value)
      : "r"(pair));
  return value;
}

__device__ __forceinline__ float high_element(uint32 pair) { return low_element(pair >> 16); }
#endif

// Rounds to nearest, ties to even.
__device__ __forceinline__ uint32 pack_elements(float low, float high) {
  uint32 pair;
  asm("cvt.rn." ELEMENT_PTX "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The greater and the lesser of two pairs, element by element; NaN if either is.
__device__ __forceinline__ uint32 max_elements(uint32 a, uint32 b) {
  uint32 pair;
  asm("max.NaN." ELEMENT_PTX "x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

__device__ __forceinline__ uint32 min_elements(uint32 a, uint32 b) {
  uint32 pair;
  asm("min.NaN." ELEMENT_PTX "x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}

// sums[16 x 8] += a[16 x 16] * b[16 x 8]. Lane l holds, with g = l / 4 and t = 2 * (l % 4):
// sums: (g, t), (g, t+1), (g+8, t), (g+8, t+1); a: pairs (g, t), (g+8, t), (g, t+8), (g+8, t+8);
// b: pairs of rows (t, t+1), (t+8, t+9) in column g.
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32 (&a)[4], uint32 b0,
                                             uint32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT_PTX "." ELEMENT_PTX
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
