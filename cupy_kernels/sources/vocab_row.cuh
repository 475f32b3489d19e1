// A row of logits under a cluster of blocks of threads, whose warps take turns of 32 vectors.
// Logits have 16 bits; as keys, integers in the same order, they can be bisected exactly. Needs
// device.cuh, element.cuh, block_reduce.cuh and cluster_exchange.cuh.

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
  bool is_finite;  // there is no NaN and no Inf
  uint32 key;
  int id;  // the lowest that has it
};

// Integers in the order of the logits; -0 equals 0.
__device__ __forceinline__ uint32 key_of(uint32 bits) {
  if (bits == 0x8000u) bits = 0;
  return bits & 0x8000u ? 0xffffu - bits : bits | 0x8000u;
}

__device__ __forceinline__ float value_of(uint32 key) {
  return low_element(key & 0x8000u ? key ^ 0x8000u : 0xffffu - key);
}

// The first of this thread's vectors, and how far its next one is.
__device__ __forceinline__ int first_vector() {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  return (warp * cluster_size() + cluster_rank()) * kWarpSize + lane;
}

__device__ __forceinline__ int vector_step() { return kThreads * cluster_size(); }

// Calls visit(id of its first logit, vector) for this thread's vectors of the row, in order, with
// `batch` of them under way. What lies behind the vocabulary is the lowest finite number.
template <int batch, class Visit>
__device__ __forceinline__ void for_each_vector(const Row& row, Visit visit) {
  const int num_vectors = (row.vocab_size + kVector - 1) / kVector, step = vector_step();
  for (int first = first_vector(); first < num_vectors; first += batch * step) {
    Vector16 vectors[batch];
#pragma unroll
    for (int k = 0; k < batch; k++) {
      if (first + k * step < num_vectors) vectors[k] = row.vectors[first + k * step];
    }
#pragma unroll
    for (int k = 0; k < batch; k++) {
      const int id = (first + k * step) * kVector;
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

// Leaves the key of the highest logit in each thread's share in `share_keys`, 0 if that is empty.
__device__ __forceinline__ Highest find_highest(const Row& row,
                                                unsigned short (&share_keys)[kThreads],
                                                WarpResults& results, Exchange& exchange) {
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
  const uint32 share_key = first < 0 ? 0 : key_of(pack_elements(best, 0) & 0xffffu);
  share_keys[threadIdx.x] = static_cast<unsigned short>(share_key);
  uint32 id = 0xffffffffu;
  if (first >= 0) {
    const Vector16 vector = row.vectors[first / kVector];
#pragma unroll
    for (int i = kVector - 1; i >= 0; i--) {
      if (key_of(bits_at(vector, i)) == share_key) id = first + i;
    }
  }
  // What is not finite is higher than all else.
  const uint32 high = is_finite ? share_key : 0x10000u;
  uint64 top = block_max(uint64{high} << 32 | ~id, results);
  const Message* messages = exchange.all({top, 0});
  for_each_message(messages, [&](const Message& message) { top = max(top, message.first); });
  const uint32 key = static_cast<uint32>(top >> 32);
  return {key <= 0xffffu, key, static_cast<int>(~static_cast<uint32>(top))};
}
