// Philox4x32-10, random words as a pure function of a counter and a key: Salmon et al., "Parallel
// random numbers: as easy as 1, 2, 3", SC 2011, https://doi.org/10.1145/2063384.2063405.

struct RandomWords {
  uint32 words[4];
};

__device__ __forceinline__ RandomWords philox(uint32 c0, uint32 c1, uint32 c2, uint64 key) {
  uint32 c3 = 0, k0 = static_cast<uint32>(key), k1 = static_cast<uint32>(key >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64 product0 = uint64{0xD2511F53u} * c0, product1 = uint64{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32>(product1);
    c3 = static_cast<uint32>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}
