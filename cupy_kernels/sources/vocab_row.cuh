// A row of logits under one block of 1,024 threads. Logits have 16 bits; as keys, integers in the
// same order, they can be bisected exactly. Needs device.cuh, element.cuh and block_reduce.cuh.

constexpr int kThreads = 1024;
constexpr int kVector = 8;  // logits read at once
constexpr float kGreatestFinite = 3.4028234e38f, kLeastFinite = -kGreatestFinite;
constexpr uint32 kExponentBits = ELEMENT_BF16 ? 0x7f80u : 0x7c00u;
constexpr uint32 kLowestKey = 0x8000u - kExponentBits;  // of a finite logit
constexpr uint32 kLowestBits = 0x7fffu + kExponentBits;

// A row's logits and what turns them into weights.
struct Row {
  const Vector16* vectors;
  int vocab_size;
  float temperature;
  float scale_log2;  // log2(e) / temperature, or the greatest finite number
  float highest;
};

// What the first pass finds.
struct Highest {
  uint32 key;
  int id;            // the lowest that has it
  uint32 share_key;  // of the highest logit in this thread's share; 0 if that is empty
};

// Integers in the order of the logits; -0 equals 0.
__device__ __forceinline__ uint32 key_of(uint32 bits) {
  if (bits == 0x8000u) bits = 0;
  return bits & 0x8000u ? 0xffffu - bits : bits | 0x8000u;
}

__device__ __forceinline__ float value_of(uint32 key) {
  return low_element(key & 0x8000u ? key ^ 0x8000u : 0xffffu - key);
}

// Calls visit(id of its first logit, vector) for this thread's vectors of the row, in order, with
// `batch` of them under way. What lies behind the vocabulary is the lowest finite number.
template <int batch, class Visit>
__device__ __forceinline__ void for_each_vector(const Row& row, Visit visit) {
  const int num_vectors = (row.vocab_size + kVector - 1) / kVector;
  for (int first = threadIdx.x; first < num_vectors; first += batch * kThreads) {
    Vector16 vectors[batch];
#pragma unroll
    for (int k = 0; k < batch; k++) {
      if (first + k * kThreads < num_vectors) vectors[k] = row.vectors[first + k * kThreads];
    }
#pragma unroll
    for (int k = 0; k < batch; k++) {
      const int id = (first + k * kThreads) * kVector;
      if (id >= row.vocab_size) break;
      if (id + kVector > row.vocab_size) {
#pragma unroll
        for (int i = 0; i < kVector; i++) {
          uint32& pair = vectors[k].words[i / 2];
          const uint32 other = i % 2 ? pair & 0xffffu : pair & 0xffff0000u;
          if (id + i >= row.vocab_size) pair = other | kLowestBits << i % 2 * 16;
        }
      }
      visit(id, vectors[k]);
    }
  }
}

__device__ __forceinline__ uint32 bits_at(const Vector16& vector, int i) {
  return i % 2 ? vector.words[i / 2] >> 16 : vector.words[i / 2] & 0xffffu;
}

__device__ __forceinline__ float value_at(const Vector16& vector, int i) {
  return i % 2 ? high_element(vector.words[i / 2]) : low_element(vector.words[i / 2]);
}

__device__ __forceinline__ float highest_of(const Vector16& vector) {
  const uint32 pair = max_elements(max_elements(vector.words[0], vector.words[1]),
                                   max_elements(vector.words[2], vector.words[3]));
  return fmaxf(low_element(pair), high_element(pair));
}

// False if there is a NaN or Inf.
__device__ bool find_highest(const Row& row, Highest& highest, WarpResults& results) {
  float best = kLeastFinite;
  int first = -1;
  uint32 greatest = kLowestBits * 0x10001u, least = (kLowestBits & 0x7fffu) * 0x10001u;
  for_each_vector<4>(row, [&](int id, const Vector16& vector) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      greatest = max_elements(greatest, vector.words[i]);
      least = min_elements(least, vector.words[i]);
    }
    const float value = highest_of(vector);
    if (value > best || first < 0) {
      best = value;
      first = id;
    }
  });
  bool is_finite = true;
#pragma unroll
  for (int shift = 0; shift < 32; shift += 16) {
    is_finite &= (greatest >> shift & kExponentBits) != kExponentBits;
    is_finite &= (least >> shift & kExponentBits) != kExponentBits;
  }
  highest.share_key = first < 0 ? 0 : key_of(pack_elements(best, 0) & 0xffffu);
  highest.key = block_max(highest.share_key, results);
  uint32 id = 0xffffffffu;
  if (highest.share_key == highest.key) {
    const Vector16 vector = row.vectors[first / kVector];
#pragma unroll
    for (int i = kVector - 1; i >= 0; i--) {
      if (key_of(bits_at(vector, i)) == highest.key) id = first + i;
    }
  }
  highest.id = ~block_max(~id, results);
  return __syncthreads_and(is_finite);
}
