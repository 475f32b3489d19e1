// Draws one token from each row of logits: temperature, top-k, top-p of what top-k left, min-p,
// then Gumbel-max with a random word per (seed, branch, position, token). executor_svc/sampler.py
// defines it. A cluster of blocks of threads per row: several while there are SMs to spare.
//
// Every filter keeps the tokens from some logit on, ties included, so all of them are one
// threshold. Logits have 16 bits: mapped to integers of the same order, a threshold is found
// exactly by bisection.
//
// The row is read once for its highest logit. Each thread keeps the highest of its own share, and
// the n-th highest of those bounds a set of at least n tokens, seldom of many more. These are
// gathered in shared memory by a second pass, which also sums the weights of the row, and all the
// rest happens there, in every block of the cluster alike: each warp tries another threshold, as
// barriers are what takes the time. If they are too light for top-p, more are gathered once; if
// they still are, or are too many to fit, bisection reads the whole row again for each bit. Who
// sums what depends on the size of the cluster, and the order in which tokens are gathered is left
// to chance, so weights are summed as integers: a row's token depends neither on its batch nor on
// luck. (Gathered tokens are rounded one by one, those of the whole row by eight: where a batch
// decides which of both is searched, a limit of top-p that falls between the two sums, some 1e-7 of
// the weight apart, can keep one token more or less.)

#include "device.cuh"
#include "element.cuh"

constexpr int kThreads = 512;
constexpr int kBlocksPerSm = __CUDA_ARCH__ >= 900 ? 2 : 1;  // before, registers would spill

#include "block_reduce.cuh"
#include "cluster_exchange.cuh"
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

constexpr int kCapacity = 2560;  // gathered tokens of a row
// How many tokens to gather for top-p, where ids say nothing about likelihood: a first try and a
// second one.
constexpr float kFewTokens = 350, kManyTokens = 1900;
constexpr uint32 kNearKeys = 4912;  // as many as a search finds its way through in three rounds
constexpr int kUnitBits = 40;      // weights are counted in units of 2^-40,
constexpr int kGatheredBits = 32;  // those of single tokens in units of 2^-32
constexpr float kMaxGumbel = 23.f;  // -log(-log(u)) of the greatest u is less
constexpr float kLog2E = 1.4426950408889634f;

struct Random {
  uint64 seed;
  uint32 branch;
  uint32 position;

  __device__ RandomWords words_of(int id) const { return philox(id / 4, position, branch, seed); }
};

// A row's parameters.
struct Chosen {
  float temperature;
  int top_k;
  float top_p, min_p;
  Random random;
};

// What the threads of a block share.
struct Shared {
  WarpResults warps;
  Inboxes inboxes;
  Chosen chosen;
  float to_beat;
  union {  // of the highest logit in each thread's share; two are read at once
    unsigned short share_keys[kThreads];
    uint32 share_key_pairs[kThreads / 2];
  };
  // Tokens that this block gathered.
  int num_gathered;
  unsigned short keys[kCapacity];
  int ids[kCapacity];
  // Those of the whole cluster.
  unsigned short all_keys[kCapacity];
  int all_ids[kCapacity];
  uint32 all_weights[kCapacity];
};

struct Sum {
  int count;
  uint64 weight;

  __device__ bool reaches(const Sum& wanted) const {
    return count >= wanted.count && weight >= wanted.weight;
  }
};

__device__ __forceinline__ Sum cluster_sum(const Sum& sum, Exchange& exchange) {
  const Message* messages = exchange.all({static_cast<uint64>(sum.count), sum.weight});
  Sum total = {0, 0};
  for_each_message(messages, [&](const Message& message) {
    total.count += static_cast<int>(message.first);
    total.weight += message.second;
  });
  return total;
}

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
  return __float2ull_rn(weight * static_cast<float>(uint64{1} << kUnitBits));
}

// The weight of a vector's tokens, or of those with values from `least` on. What lies behind the
// vocabulary is the lowest finite number and weighs nothing, but for a row that has no higher one.
template <bool has_least>
__device__ __forceinline__ uint64 weight_of_vector(const Row& row, const Vector16& vector,
                                                   float least) {
  float weight = 0;
#pragma unroll
  for (int i = 0; i < kVector; i++) {
    const float value = value_at(vector, i);
    if (!has_least || value >= least) weight += weight_of(row, value);
  }
  return units_of(weight);
}

// The tokens of the whole row. `above`: how many have a key from `pivot` on, and their weight.
// `search`: the greatest key in [low, high] from which on they are as many and as heavy as wanted;
// `low` must be such a key, or lie below all. All threads of the cluster call them.
struct WholeRow {
  const Row& row;
  Shared& shared;
  Exchange& exchange;

  __device__ uint32 search(uint32 low, uint32 high, const Sum& wanted) const {
    while (low < high) {
      const uint32 middle = (low + high + 1) / 2;
      if (above(middle).reaches(wanted)) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }

  __device__ Sum above(uint32 pivot) const {
    const float least = value_of(pivot);
    uint32 count = 0;
    uint64 weight = 0;
    for_each_vector<4>(row, [&](int id, const Vector16& vector) {
      if (highest_of(vector) < least) return;
#pragma unroll
      for (int i = 0; i < kVector; i++) {
        count += value_at(vector, i) >= least && id + i < row.vocab_size;
      }
      weight += weight_of_vector<true>(row, vector, least);
    });
    uint32 sums[3] = {count, 0, 0};
    block_sums(sums, shared.warps);
    return cluster_sum({static_cast<int>(sums[0]), block_sum(weight, shared.warps)}, exchange);
  }
};

// The same for the gathered tokens; warps may ask for different keys.
struct Gathered {
  const Shared& shared;
  int num_tokens;

  __device__ uint32 search(uint32 low, uint32 high, const Sum& wanted) const {
    return block_search(low, high, [&](uint32 key) { return above(key).reaches(wanted); });
  }

  __device__ Sum above(uint32 pivot) const {
    uint32 count = 0;
    uint64 weight = 0;
#pragma unroll 8
    for (int i = threadIdx.x % kWarpSize; i < num_tokens; i += kWarpSize) {
      const bool is_above = shared.all_keys[i] >= pivot;
      count += is_above;
      weight += is_above ? shared.all_weights[i] : 0;
    }
    constexpr int kPartBits = 24;
    const uint32 low = static_cast<uint32>(weight) & ((1u << kPartBits) - 1);
    const uint32 high = static_cast<uint32>(weight >> kPartBits);
    weight = (uint64{__reduce_add_sync(kFullWarp, high)} << kPartBits) +
             __reduce_add_sync(kFullWarp, low);
    return {static_cast<int>(__reduce_add_sync(kFullWarp, count)),
            weight << (kUnitBits - kGatheredBits)};
  }
};

// Rounded up, so that the weight of a whole row is enough for any top_p below 1.
__device__ __forceinline__ uint64 share_of(uint64 weight, float top_p) {
  return min(weight, static_cast<uint64>(ceil(static_cast<double>(weight) * top_p)));
}

// Puts this block's tokens with keys from `pivot` on behind those in its shared memory, as many as
// fit. Returns how many each block has, and the weight of its part of the row if that is asked for.
__device__ const Message* gather(const Row& row, uint32 pivot, bool has_total, Shared& shared,
                                 Exchange& exchange) {
  const float least = value_of(pivot);
  uint64 total = 0;
  for_each_vector<4>(row, [&](int id, const Vector16& vector) {
    if (has_total) total += weight_of_vector<false>(row, vector, 0);
    if (highest_of(vector) < least) return;
    uint32 hits = 0;
#pragma unroll
    for (int i = 0; i < kVector; i++) {
      if (value_at(vector, i) >= least && id + i < row.vocab_size) hits |= 1u << i;
    }
    int place = atomicAdd(&shared.num_gathered, __popc(hits));
#pragma unroll
    for (int i = 0; i < kVector; i++) {
      if ((hits >> i & 1) == 0) continue;
      if (place < kCapacity) {
        shared.keys[place] = static_cast<unsigned short>(key_of(bits_at(vector, i)));
        shared.ids[place] = id + i;
      }
      place++;
    }
  });
  const uint64 weight = block_sum(total, shared.warps);
  return exchange.all({static_cast<uint64>(shared.num_gathered), weight});
}

// Copies what all blocks gathered, `counts` says how many, into this one's shared memory.
__device__ void collect(const Row& row, Shared& shared, const Message* counts) {
  const int threads = kThreads / cluster_size(), rank = threadIdx.x / threads;
  const int count = static_cast<int>(counts[rank].first);
  int place = 0;
  for (int other = 0; other < rank; other++) place += static_cast<int>(counts[other].first);
  const unsigned short* keys = in_block(shared.keys, rank);
  const int* ids = in_block(shared.ids, rank);
  for (int i = threadIdx.x % threads; i < count; i += threads) {
    const uint32 key = keys[i];
    const float weight = weight_of(row, value_of(key));
    shared.all_keys[place + i] = static_cast<unsigned short>(key);
    shared.all_ids[place + i] = ids[i];
    shared.all_weights[place + i] =
        __float2uint_rn(weight * static_cast<float>(uint64{1} << kGatheredBits));  // saturates
  }
  __syncthreads();
}

struct Filters {
  int top_k;    // 0: off
  float top_p;  // 0: off
};

// The lowest key that top-k, then top-p of what is left, keep among `tokens`, which hold all tokens
// above `low`; `low` if these are not enough.
template <class Tokens>
__device__ uint32 filter(const Tokens& tokens, const Filters& filters, uint32 low, uint32 high,
                         uint64 total) {
  if (filters.top_k > 0) {
    const uint32 key = tokens.search(low, high, {filters.top_k, 0});
    if (key == low || filters.top_p == 0) return key;
    low = key;
    total = tokens.above(low).weight;
  }
  if (filters.top_p > 0) {
    low = tokens.search(low, high, {1, share_of(total, filters.top_p)});
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

// The winner among this thread's of all gathered tokens.
__device__ uint64 draw_gathered(const Row& row, const Random& random, float least, int num_tokens,
                                const Shared& shared) {
  uint64 best = 0;
  for (int i = threadIdx.x; i < num_tokens; i += kThreads) {
    const float value = value_of(shared.all_keys[i]);
    if (value < least) continue;
    const int id = shared.all_ids[i];
    const float noise = gumbel(random.words_of(id).words[id % 4]);
    best = max(best, contender(score_of(row, value) + noise, id));
  }
  return best;
}

// The score in base 2, by a product instead of the quotient.
__device__ __forceinline__ float score_log2(const Row& row, float value) {
  return (value - row.highest) * row.scale_log2;
}

// A total that some token from `least` on reaches, in base 2, or `to_beat`: of four tokens of each
// thread. With u the uniform number of a word, -log(-log(u)) is at most -log(1 - u), and from
// u = 1/2 on at least that minus 1 - u. Totals that matter are above -38, where what is approximate
// is off by 1e-5, far less than the 0.02 allowed here and the 2 % in `draw_from_row`.
__device__ float reached_log2(const Row& row, const Random& random, float least, float to_beat,
                              Shared& shared) {
  float reached = to_beat * kLog2E;
  const int first = first_vector();
  if (first * kVector + kVector <= row.vocab_size) {
    const Vector16 vector = row.vectors[first];
    const RandomWords random_words = random.words_of(first * kVector);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float value = value_at(vector, i);
      const float rest = static_cast<float>(~random_words.words[i]) + 0.5f;
      const float total = score_log2(row, value) + 32.f - log2_approx(rest);
      const float safe = total - rest * (kLog2E / 4294967296.f) - 0.02f;
      if (random_words.words[i] >> 31 && value >= least) reached = fmaxf(reached, safe);
    }
  }
  const uint32 bits = __float_as_uint(reached);
  const uint32 ordered = block_max(bits >> 31 ? ~bits : bits | 0x80000000u, shared.warps);
  return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

// The winner among `best` and this thread's tokens of the row. `to_beat` is the total of the token
// with the highest logit: what cannot reach it, or what some others reach, is passed over.
__device__ uint64 draw_from_row(const Row& row, const Random& random, float least, float to_beat,
                                uint64 best, Shared& shared) {
  const float reached = reached_log2(row, random, least, to_beat, shared);
  least = fmaxf(least, row.highest + (to_beat - kMaxGumbel) * row.temperature);
  for_each_vector<1>(row, [&](int first, const Vector16& vector) {
    const float highest = highest_of(vector);
    if (highest < least) return;
    // Words whose complement is greater lose, even with the vector's highest logit.
    const float bound = exp2_approx(score_log2(row, highest) - reached + 32.f) * 1.02f + 1.f;
    const uint32 limit = __float2uint_rz(bound);  // saturates
#pragma unroll
    for (int half = 0; half < kVector; half += 4) {
      const RandomWords random_words = random.words_of(first + half);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        if (~random_words.words[i] > limit) continue;
        const float value = value_at(vector, half + i);
        const int id = first + half + i;
        if (value >= least && id < row.vocab_size) {
          best = max(best, contender(score_of(row, value) + gumbel(random_words.words[i]), id));
        }
      }
    }
  });
  return best;
}

// The greatest key that at least `count` threads' shares reach, or the lowest key.
__device__ uint32 bound(const Shared& shared, uint32 highest, int count) {
  constexpr int kPairs = kThreads / kWarpSize / 2;
  uint32 pairs[kPairs];
#pragma unroll
  for (int k = 0; k < kPairs; k++) {
    pairs[k] = shared.share_key_pairs[k * kWarpSize + threadIdx.x % kWarpSize];
  }
  const auto reaches = [&](uint32 key) {
    uint32 found = 0;
#pragma unroll
    for (int k = 0; k < kPairs; k++) {
      found += (pairs[k] & 0xffffu) >= key;
      found += pairs[k] >> 16 >= key;
    }
    return static_cast<int>(__reduce_add_sync(kFullWarp, found)) >= count;
  };
  const bool is_near = highest > kLowestKey + kNearKeys && reaches(highest - kNearKeys);
  return block_search(is_near ? highest - kNearKeys : kLowestKey, highest, reaches);
}

// Of so many threads of a block the shares hold one of `num_tokens` tokens scattered over the row.
__device__ int threads_with(float num_tokens, const Row& row) {
  const int num_blocks = cluster_size();
  const float vectors = static_cast<float>(row.vocab_size) / kVector;
  const float threads = fminf(kThreads, vectors / num_blocks);
  const float hit = 1.f - exp2_approx(-kLog2E * num_tokens / (threads * num_blocks));
  return max(1, static_cast<int>(threads * hit));
}

// What the filters leave: tokens with logits from `least` on. If they are among those gathered: of
// how many; else 0.
struct Kept {
  float least;
  int num_gathered;
};

__device__ __forceinline__ Kept keep(const Row& row, const Highest& highest,
                                     const Filters& filters, Shared& shared, Exchange& exchange) {
  const bool has_top_k = filters.top_k > 0;
  if (!has_top_k && filters.top_p == 0) return {kLeastFinite, 0};
  for (float num_tokens = kFewTokens;; num_tokens = kManyTokens) {
    const int count = has_top_k ? (filters.top_k + cluster_size() - 1) / cluster_size()
                                : threads_with(num_tokens, row);
    if (threadIdx.x == 0) shared.num_gathered = 0;
    // The lowest one of the blocks' own: so many tokens of the row reach that, seldom many more.
    const Message* pivots = exchange.all({bound(shared, highest.key, count), 0});
    uint32 pivot = highest.key;
    for_each_message(pivots, [&](const Message& message) {
      pivot = min(pivot, static_cast<uint32>(message.first));
    });
    const Message* counts = gather(row, pivot, !has_top_k, shared, exchange);
    Sum found = {0, 0};
    for_each_message(counts, [&](const Message& message) {
      found.count += static_cast<int>(message.first);
      found.weight += message.second;
    });
    if (found.count <= kCapacity) {
      collect(row, shared, counts);
      const Gathered tokens = {shared, found.count};
      const uint32 key = filter(tokens, filters, pivot - 1, highest.key, found.weight);
      if (key >= pivot) return {value_of(key), found.count};  // else they are too few or too light
    }
    if (has_top_k || num_tokens == kManyTokens) {
      const WholeRow tokens = {row, shared, exchange};
      return {value_of(filter(tokens, filters, kLowestKey - 1, highest.key, found.weight)), 0};
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    sample(const __grid_constant__ SampleParams p) {
  __shared__ Shared shared;
  release_successor();
  Exchange exchange(shared.inboxes);
  wait_for_predecessor();
  const int index = blockIdx.x / cluster_size();
  Chosen& chosen = shared.chosen;
  if (threadIdx.x == 0) {  // beside the row, not when they are needed
    copy_async<4>(&chosen.temperature, p.temperature + index);
    copy_async<4>(&chosen.top_k, p.top_k + index);
    copy_async<4>(&chosen.top_p, p.top_p + index);
    copy_async<4>(&chosen.min_p, p.min_p + index);
    copy_async<8>(&chosen.random.seed, p.seeds + index);
    copy_async<4>(&chosen.random.branch, p.branches + index);
    copy_async<4>(&chosen.random.position, p.positions + index);
    commit_copies();
  }
  Row row = {static_cast<const Vector16*>(p.logits) + int64{index} * (p.stride / kVector),
             p.vocab_size, 0, 0, 0};
  const Highest highest = find_highest(row, shared.share_keys, shared.warps, exchange);
  wait_copies<0>();
  __syncthreads();
  int token = highest.id;
  if (highest.is_finite && chosen.temperature > 0) {
    row.highest = value_of(highest.key);
    row.temperature = chosen.temperature;
    row.scale_log2 = fminf(kLog2E / row.temperature, kGreatestFinite);
    const Filters filters = {chosen.top_k < p.vocab_size ? chosen.top_k : 0,
                             chosen.top_p < 1 ? chosen.top_p : 0};
    const Kept kept = keep(row, highest, filters, shared, exchange);
    const Random random = chosen.random;
    float least = kept.least;
    if (chosen.min_p > 0) {
      least = fmaxf(least, row.highest + row.temperature * fminf(logf(chosen.min_p), 0));
    }
    uint64 best;
    if (kept.num_gathered > 0) {
      cluster_arrive();  // nothing is read from other blocks any more
      best = draw_gathered(row, random, least, kept.num_gathered, shared);
      best = block_max(best, shared.warps);
      cluster_wait();
    } else {
      // The highest logit is always kept.
      if (threadIdx.x < kWarpSize) {  // the same for all threads, so one warp does
        shared.to_beat = gumbel(random.words_of(token).words[token % 4]);
      }
      __syncthreads();
      const float to_beat = shared.to_beat;
      best = draw_from_row(row, random, least, to_beat, contender(to_beat, token), shared);
      best = block_max(best, shared.warps);
      const Message* winners = exchange.all({best, 0});
      for_each_message(winners, [&](const Message& winner) { best = max(best, winner.first); });
    }
    token = static_cast<int>(~static_cast<uint32>(best));
  }
  if (cluster_rank() == 0 && threadIdx.x == 0) {
    if (!highest.is_finite) token = 0;
    p.token_ids[index] = token;
    p.status[index] = !highest.is_finite;
    if (p.rows) p.last_tokens[p.rows[index]] = token;
  }
}
