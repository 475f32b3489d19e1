// Draws one token from each row of logits: temperature, top-k, top-p of what top-k left, min-p,
// then Gumbel-max with a random word per (seed, branch, position, token). executor_svc/sampler.py
// defines it. One block of threads per row.
//
// Every filter keeps the tokens from some logit on, ties included, so all of them are one
// threshold. Logits have 16 bits: mapped to integers of the same order, a threshold is found
// exactly by bisection.
//
// The row is read once for its highest logit. Each thread keeps the highest of its own share, and
// the n-th highest of those bounds a set of at least n tokens, seldom of many more. These are
// gathered in shared memory by a second pass, which also sums the weights of the row, and all the
// rest happens there. Only if they are too light for top-p, or too many to fit, does bisection read
// the whole row again for each bit. The order in which tokens are gathered is left to chance, so
// their weights are summed as integers of 2^-40: a row's token depends neither on its batch nor on
// luck.

#include "device.cuh"
#include "element.cuh"
#include "block_reduce.cuh"
#include "philox.cuh"
#include "vocab_row.cuh"

struct SampleParams {
  const void* logits;        // [num_rows, stride]
  const float* temperature;  // [num_rows]; 0 takes the highest logit, the lowest id among equals
  const int* top_k;          // [num_rows]; 0: off
  const float* top_p;        // [num_rows]; 0 and 1: off
  const float* min_p;        // [num_rows]; 0: off
  const uint64* seeds;       // [num_rows]
  const int* branches;       // [num_rows]
  const int* positions;      // [num_rows], of the token to be drawn
  int* token_ids;            // [num_rows]; 0 for failed rows
  int* status;               // [num_rows]; 1: NaN or Inf among the logits, else 0
  const int* rows;           // [num_rows], or null: nothing is kept in last_tokens
  int* last_tokens;          // [max_rows], or null; entry rows[i] is written as token_ids[i]
  int vocab_size;
  int stride;                // a multiple of 8; what lies behind vocab_size is ignored
};

constexpr int kCapacity = 4096;  // gathered tokens
constexpr int kTokensPerThread = kCapacity / kThreads;
// How many threads' highest logits bound the tokens gathered for top-p: a first try (some 700
// tokens where ids say nothing about likelihood) and a second one (some 3,000).
constexpr int kFewThreads = 512, kManyThreads = 970;
constexpr float kWeightUnits = 1099511627776.f;  // 2^40
constexpr int kLowBits = 21;  // so that sums of either part of 4,096 weights fit 32 bits
constexpr float kMaxGumbel = 23.f;  // -log(-log(u)) of the greatest u is less
constexpr float kLog2E = 1.4426950408889634f;

// What the threads of a block share.
struct Shared {
  WarpResults warps;
  int num_gathered;
  unsigned short keys[kCapacity];
  int ids[kCapacity];
};

struct Sum {
  int count;
  uint64 weight;
};

// How far a logit lies below the highest, in units of the temperature: 0 or less. Scores count from
// there, so that none overflows and the highest one's noise is never lost, however small the
// temperature is.
__device__ __forceinline__ float score_of(const Row& row, float value) {
  return (value - row.highest) / row.temperature;
}

// exp(score), by a product instead of the quotient.
__device__ __forceinline__ float weight_of(const Row& row, float value) {
  return exp2_approx((value - row.highest) * row.scale_log2);
}

__device__ __forceinline__ uint64 units_of(float weight) {
  return __float2ull_rn(weight * kWeightUnits);
}

// The tokens of the whole row, or those gathered: how many have a key from `pivot` on, their
// weight.
struct WholeRow {
  const Row& row;

  __device__ Sum above(uint32 pivot, Shared& shared) const {
    const float least = value_of(pivot);
    uint32 count = 0;
    float weight = 0;  // summed in the order of ids
    for_each_vector<4>(row, [&](int id, const Vector16& vector) {
      if (highest_of(vector) < least) return;
#pragma unroll
      for (int i = 0; i < kVector; i++) {
        const float value = value_at(vector, i);
        if (value < least || id + i >= row.vocab_size) continue;
        count++;
        weight += weight_of(row, value);
      }
    });
    uint32 sums[3] = {count, 0, 0};
    block_sums(sums, shared.warps);
    return {static_cast<int>(sums[0]), block_sum(units_of(weight), shared.warps)};
  }
};

struct Gathered {
  uint32 keys[kTokensPerThread];  // of this thread; 0: none
  uint64 weights[kTokensPerThread];

  __device__ Gathered(const Row& row, const Shared& shared) {
#pragma unroll
    for (int k = 0; k < kTokensPerThread; k++) {
      const int i = threadIdx.x + k * kThreads;
      keys[k] = i < shared.num_gathered ? shared.keys[i] : 0;
      weights[k] = keys[k] == 0 ? 0 : units_of(weight_of(row, value_of(keys[k])));
    }
  }

  __device__ Sum above(uint32 pivot, Shared& shared) const {
    uint64 weight = 0;
    uint32 sums[3] = {};
#pragma unroll
    for (int k = 0; k < kTokensPerThread; k++) {
      sums[0] += keys[k] >= pivot;
      weight += keys[k] >= pivot ? weights[k] : 0;
    }
    sums[1] = static_cast<uint32>(weight >> kLowBits);
    sums[2] = static_cast<uint32>(weight) & ((1u << kLowBits) - 1);
    block_sums(sums, shared.warps);
    return {static_cast<int>(sums[0]), (uint64{sums[1]} << kLowBits) + sums[2]};
  }
};

// The greatest key in [low, high] from which on tokens are as many and as heavy as wanted; `low`
// must be such a key.
template <class Tokens>
__device__ uint32 bisect(const Tokens& tokens, uint32 low, uint32 high, const Sum& wanted,
                         Shared& shared) {
  while (low < high) {
    const uint32 middle = (low + high + 1) / 2;
    const Sum found = tokens.above(middle, shared);
    if (found.count >= wanted.count && found.weight >= wanted.weight) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Rounded up, so that the weight of a whole row is enough for any top_p below 1.
__device__ __forceinline__ uint64 share_of(uint64 weight, float top_p) {
  return min(weight, static_cast<uint64>(ceil(static_cast<double>(weight) * top_p)));
}

// Puts the tokens with keys from `pivot` on into shared memory, as many as fit. Returns how many
// there are, and the weight of the whole row if that is asked for.
__device__ Sum gather(const Row& row, uint32 pivot, bool has_total, Shared& shared) {
  if (threadIdx.x == 0) shared.num_gathered = 0;
  __syncthreads();
  const float least = value_of(pivot);
  float total = 0;
  for_each_vector<4>(row, [&](int id, const Vector16& vector) {
    if (has_total) {
#pragma unroll
      for (int i = 0; i < kVector; i++) total += weight_of(row, value_at(vector, i));
    }
    if (highest_of(vector) < least) return;
#pragma unroll
    for (int i = 0; i < kVector; i++) {
      if (value_at(vector, i) < least || id + i >= row.vocab_size) continue;
      const int place = atomicAdd(&shared.num_gathered, 1);
      if (place < kCapacity) {
        shared.keys[place] = static_cast<unsigned short>(key_of(bits_at(vector, i)));
        shared.ids[place] = id + i;
      }
    }
  });
  const uint64 weight = block_sum(units_of(total), shared.warps);
  const int count = shared.num_gathered;
  __syncthreads();
  return {count, weight};
}

struct Filters {
  int top_k;    // 0: off
  float top_p;  // 0: off
};

// The lowest key that top-k, then top-p of what is left, keep among `tokens`, which hold all tokens
// from `low` on and enough for both.
template <class Tokens>
__device__ uint32 filter(const Tokens& tokens, const Filters& filters, uint32 low, uint32 high,
                         uint64 total, Shared& shared) {
  if (filters.top_k > 0) {
    low = bisect(tokens, low, high, {filters.top_k, 0}, shared);
    total = tokens.above(low, shared).weight;
  }
  if (filters.top_p > 0) {
    low = bisect(tokens, low, high, {1, share_of(total, filters.top_p)}, shared);
  }
  return low;
}

// -log(-log(u)) for u = (word + 1/2) / 2^32, accurate at both ends.
__device__ __forceinline__ float gumbel(uint32 word) {
  constexpr float kUnit = 1.f / 4294967296.f;
  const float rest = (static_cast<float>(~word) + 0.5f) * kUnit;  // 1 - u
  const float minus_log =
      word >> 31 ? -log1pf(-rest) : -logf((static_cast<float>(word) + 0.5f) * kUnit);
  return -logf(minus_log);
}

// Which token wins so far: greater is better, and among equals the lower id.
__device__ __forceinline__ uint64 contender(float score, int id) {
  const uint32 bits = __float_as_uint(score);
  const uint32 ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64{ordered} << 32 | ~static_cast<uint32>(id);
}

struct Random {
  uint64 seed;
  uint32 branch;
  uint32 position;

  __device__ RandomWords words_of(int id) const { return philox(id / 4, position, branch, seed); }
};

// The winner among `best` and this thread's gathered tokens.
__device__ uint64 draw_gathered(const Row& row, const Random& random, float least, uint64 best,
                                const Shared& shared) {
  for (int i = threadIdx.x; i < shared.num_gathered; i += kThreads) {
    const float value = value_of(shared.keys[i]);
    if (value < least) continue;
    const int id = shared.ids[i];
    const float noise = gumbel(random.words_of(id).words[id % 4]);
    best = max(best, contender(score_of(row, value) + noise, id));
  }
  return best;
}

// The winner among `best` and this thread's tokens of the row. Tokens that cannot beat the one with
// the highest logit, which scores `to_beat`, are passed over.
__device__ uint64 draw_from_row(const Row& row, const Random& random, float least, float to_beat,
                                uint64 best) {
  least = fmaxf(least, row.highest + (to_beat - kMaxGumbel) * row.temperature);
  for_each_vector<1>(row, [&](int first, const Vector16& vector) {
    if (highest_of(vector) < least) return;
#pragma unroll
    for (int half = 0; half < kVector; half += 4) {
      const RandomWords random_words = random.words_of(first + half);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        // -log(-log(u)) is at most -log(1 - u), which costs less.
        const uint32 word = random_words.words[i];
        const float value = value_at(vector, half + i), score = score_of(row, value);
        const float bound = score - __logf((static_cast<float>(~word) + 0.5f) / 4294967296.f);
        const int id = first + half + i;
        if (value >= least && bound + 0.001f >= to_beat && id < row.vocab_size) {
          best = max(best, contender(score + gumbel(word), id));
        }
      }
    }
  });
  return best;
}

// The greatest key that at least `count` threads' shares reach, or the lowest key.
__device__ uint32 bound(const Highest& highest, int count) {
  uint32 low = kLowestKey, high = highest.key;
  while (low < high) {
    const uint32 middle = (low + high + 1) / 2;
    if (__syncthreads_count(highest.share_key >= middle) >= count) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// What the filters leave: tokens with logits from `least` on; if they were gathered, all are.
struct Kept {
  float least;
  bool are_gathered;
};

__device__ __forceinline__ Kept keep(const Row& row, const Highest& highest,
                                     const Filters& filters, Shared& shared) {
  const bool has_top_k = filters.top_k > 0;
  if (!has_top_k && filters.top_p == 0) return {kLeastFinite, false};
  const int first_try = has_top_k ? filters.top_k : kFewThreads;
  for (int count = first_try;; count = kManyThreads) {
    const uint32 pivot = bound(highest, count);
    const Sum found = gather(row, pivot, !has_top_k, shared);
    if (found.count <= kCapacity) {
      const Gathered tokens(row, shared);
      const Sum all = tokens.above(pivot, shared);
      if (has_top_k ? all.count >= filters.top_k
                    : all.weight >= share_of(found.weight, filters.top_p)) {
        return {value_of(filter(tokens, filters, pivot, highest.key, found.weight, shared)), true};
      }
    }
    if (has_top_k || count == kManyThreads) {
      const WholeRow tokens = {row};
      const uint32 key = filter(tokens, filters, kLowestKey, highest.key, found.weight, shared);
      return {value_of(key), false};
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    sample(const __grid_constant__ SampleParams p) {
  __shared__ Shared shared;
  release_successor();
  wait_for_predecessor();
  const int index = blockIdx.x;
  const float temperature = p.temperature[index];
  Row row = {static_cast<const Vector16*>(p.logits) + int64{index} * (p.stride / kVector),
             p.vocab_size, temperature, fminf(kLog2E / temperature, kGreatestFinite), 0};
  Highest highest;
  const bool is_finite = find_highest(row, highest, shared.warps);
  int token = highest.id;
  if (is_finite && temperature > 0) {
    row.highest = value_of(highest.key);
    const Random random = {p.seeds[index], static_cast<uint32>(p.branches[index]),
                           static_cast<uint32>(p.positions[index])};
    const int top_k = p.top_k[index];
    const float top_p = p.top_p[index], min_p = p.min_p[index];
    const Filters filters = {top_k < p.vocab_size ? top_k : 0, top_p < 1 ? top_p : 0};
    const Kept kept = keep(row, highest, filters, shared);
    float least = kept.least;
    if (min_p > 0) least = fmaxf(least, row.highest + temperature * fminf(logf(min_p), 0));
    // The highest logit is always kept.
    const float to_beat = gumbel(random.words_of(token).words[token % 4]);
    uint64 best = contender(to_beat, token);
    best = kept.are_gathered ? draw_gathered(row, random, least, best, shared)
                             : draw_from_row(row, random, least, to_beat, best);
    best = block_reduce(best, shared.warps, [](uint64 a, uint64 b) { return max(a, b); });
    token = static_cast<int>(~static_cast<uint32>(best));
  }
  if (threadIdx.x == 0) {
    if (!is_finite) token = 0;
    p.token_ids[index] = token;
    p.status[index] = !is_finite;
    if (p.rows) p.last_tokens[p.rows[index]] = token;
  }
}
