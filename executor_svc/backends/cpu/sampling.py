"""The per-row work of sampling: one row of logits in, one token out. See executor_svc.sampler.

Every filter keeps the tokens above some logit, ties included, so all of them together are one
threshold. The Gumbel-max draw needs two logarithms per kept token; without a filter that would be
the whole vocabulary, so tokens that cannot beat the best score so far are passed over by
-log(u) >= 1 - u, which needs none.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import prange

from executor_svc.backends.cpu.jit import inlined, kernel, parallel_kernel
from executor_svc.backends.cpu.philox import philox
from executor_svc.backends.cpu.simd import (
    LANES,
    FloatArray,
    add,
    any_above,
    exp,
    fma,
    load,
    max_lanes,
    maximum,
    mul,
    splat,
    store,
    sum_lanes,
    zero,
)

U32Array = npt.NDArray[np.uint32]
U64Array = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.int32]
IndexArray = npt.NDArray[np.int64]

IS_SAMPLED, IS_NUMERIC_FAILURE = 0, 1

_MASK = np.uint64(0xFFFFFFFF)
_CHUNK_BLOCKS = 256
# A float32 sum per 1,024 tokens, those added in float64: relative error about 1e-7.
_SUM_SPAN = 64 * LANES
_UNIT = 2.0**-32
_MAX_FLOAT32 = np.finfo(np.float32).max


@inlined
def _is_finite(logits: FloatArray) -> bool:
    checks = zero()
    whole = logits.size // LANES * LANES
    for i in range(0, whole, LANES):
        # Zero for every finite value, NaN for the others; not folded, NaN keeps its meaning.
        checks = fma(load(logits, i), zero(), checks)
    is_finite = bool(sum_lanes(checks) == np.float32(0))
    for i in range(whole, logits.size):  # compared, for a sum may be reordered and overflow
        is_finite &= bool(np.abs(logits[i]) <= _MAX_FLOAT32)
    return is_finite


@inlined
def _highest(logits: FloatArray) -> np.float32:
    whole = logits.size // LANES * LANES
    highest = splat(np.float32(-np.inf))
    for i in range(0, whole, LANES):
        highest = maximum(highest, load(logits, i))
    result = max_lanes(highest)
    for i in range(whole, logits.size):
        result = max(result, logits[i])
    return result


@inlined
def _first_index(logits: FloatArray, value: np.float32) -> int:
    for i in range(logits.size):
        if logits[i] == value:
            return i
    return 0


@inlined
def _exponentiate(
    logits: FloatArray, highest: np.float32, temperature: np.float32, out: FloatArray
) -> float:
    """out = exp((logits - highest) / temperature); returns the sum."""
    whole = logits.size // LANES * LANES
    offset, scale = splat(-highest), splat(np.float32(1) / temperature)
    total = 0.0
    for begin in range(0, whole, _SUM_SPAN):
        sums = zero()
        for i in range(begin, min(begin + _SUM_SPAN, whole), LANES):
            weights = exp(mul(add(load(logits, i), offset), scale))
            store(out, i, weights)
            sums = add(sums, weights)
        total += float(sum_lanes(sums))
    for i in range(whole, logits.size):
        out[i] = np.exp((logits[i] - highest) / temperature)
        total += float(out[i])
    return total


@inlined
def _gumbel(word: np.uint64) -> float:
    uniform = (float(word) + 0.5) * _UNIT
    return float(-np.log(-np.log(uniform)))


@inlined
def _draw_all(
    logits: FloatArray,
    weights: FloatArray,
    temperature: float,
    highest_id: int,
    position: np.uint64,
    branch: np.uint64,
    seed: np.uint64,
) -> int:
    """Gumbel-max over the whole vocabulary; weights are exp((logits - highest) / temperature)."""
    k0, k1 = seed & _MASK, seed >> np.uint64(32)
    words = np.empty((4, _CHUNK_BLOCKS), np.uint32)
    highest = logits[highest_id] / temperature
    block = philox(np.uint64(highest_id // 4), position, branch, np.uint64(0), k0, k1)
    best, best_id = highest + _gumbel(block[highest_id % 4]), highest_id
    for begin in range(0, logits.size, 4 * _CHUNK_BLOCKS):
        for b in range(_CHUNK_BLOCKS):
            counter = np.uint64(begin // 4 + b)
            w0, w1, w2, w3 = philox(counter, position, branch, np.uint64(0), k0, k1)
            words[0, b], words[1, b], words[2, b], words[3, b] = w0, w1, w2, w3
        reach = np.float32(np.exp(highest - best) * 1.0001)
        for i in range(begin, min(begin + 4 * _CHUNK_BLOCKS, logits.size)):
            word = words[i & 3, (i - begin) >> 2]
            # 1 - u < weight * exp(highest - best), with room for float32 rounding.
            if np.float32(~word) * np.float32(_UNIT) <= weights[i] * reach:
                score = logits[i] / temperature + _gumbel(word)
                if score > best or (score == best and i < best_id):
                    best, best_id = score, i
    return best_id


@inlined
def _draw_above(
    logits: FloatArray,
    threshold: np.float32,
    temperature: float,
    position: np.uint64,
    branch: np.uint64,
    seed: np.uint64,
) -> int:
    """Gumbel-max over the tokens with logits >= threshold."""
    k0, k1 = seed & _MASK, seed >> np.uint64(32)
    best, best_id = -np.inf, 0
    for i in range(logits.size):
        if logits[i] >= threshold:
            block = philox(np.uint64(i // 4), position, branch, np.uint64(0), k0, k1)
            score = logits[i] / temperature + _gumbel(block[i % 4])
            if score > best:
                best, best_id = score, i
    return best_id


@inlined
def _likeliest(
    logits: FloatArray,
    weights: FloatArray,
    highest: np.float32,
    temperature: float,
    count: int,
    mass: float,
) -> FloatArray:
    """Logits in descending order: at least the `count` highest and enough to weigh `mass`."""
    pivot = highest
    for span in (2.0, 4.0, 8.0, 16.0, 32.0, np.inf):
        pivot = np.float32(highest - temperature * span)
        num_above = 0
        weight = np.float32(0)
        for i in range(logits.size):
            is_above = logits[i] >= pivot
            num_above += is_above
            weight += weights[i] if is_above else np.float32(0)
        if num_above >= count and weight >= mass:
            break
    found = np.empty(num_above, np.float32)
    n = 0
    for i in range(logits.size):
        if logits[i] >= pivot:
            found[n] = logits[i]
            n += 1
    return np.sort(found)[::-1]


@inlined
def _threshold(
    logits: FloatArray,
    weights: FloatArray,
    total: float,
    highest: np.float32,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> np.float32:
    """Lowest logit that top-k, then top-p of what is left, then min-p keep; ties are kept."""
    threshold = np.float32(-np.inf)
    has_top_k = 0 < top_k < logits.size
    has_top_p = 0.0 < top_p < 1.0
    if has_top_k or has_top_p:
        # With top-k, its count alone decides how many are needed. Rounding may ask for a little
        # more mass than there is; the last span takes everything.
        count = top_k if has_top_k else 1
        mass = 0.0 if has_top_k else top_p * total * 1.00001
        ordered = _likeliest(logits, weights, highest, temperature, count, mass)
        num_kept = ordered.size
        if has_top_k:
            threshold = ordered[top_k - 1]
            num_kept = np.searchsorted(-ordered, -threshold, side="right")
            total = 0.0
            for i in range(num_kept):
                total += np.exp((float(ordered[i]) - highest) / temperature)
        if has_top_p:
            above = 0.0
            for i in range(num_kept):
                if above >= top_p * total:
                    break
                threshold = ordered[i]
                above += np.exp((float(ordered[i]) - highest) / temperature)
    if min_p > 0.0:
        threshold = max(threshold, np.float32(highest + temperature * np.log(min_p)))
    return min(threshold, highest)


@parallel_kernel
def draw(
    logits: FloatArray,
    temperature: FloatArray,
    filters: npt.NDArray[np.float64],
    seeds: U64Array,
    branches: U32Array,
    positions: IntArray,
    num_threads: int,
    tokens: IntArray,
    status: IntArray,
) -> None:
    """One token for each row of logits [n, vocab_size].

    Args:
        logits: after penalties.
        temperature: [n]; 0 takes the highest logit, the lowest id among equals.
        filters: [n, 3]: top_k, top_p, min_p; 0 is off, and so is 1 for top_p.
        seeds, branches, positions: [n], the random stream and the place in it.
        num_threads: rows are dealt out to this many.
        tokens: [n], written; 0 for failed rows.
        status: [n], written: IS_SAMPLED or IS_NUMERIC_FAILURE.
    """
    for thread in prange(num_threads):
        weights = np.empty(logits.shape[1], np.float32)
        for row in range(thread, len(logits), num_threads):
            scores = logits[row]
            tokens[row] = 0
            status[row] = IS_NUMERIC_FAILURE
            if not _is_finite(scores):
                continue
            status[row] = IS_SAMPLED
            highest = _highest(scores)
            highest_id = _first_index(scores, highest)
            heat = float(temperature[row])
            if heat == 0.0:
                tokens[row] = highest_id
                continue
            position, branch = np.uint64(positions[row]), np.uint64(branches[row])
            total = _exponentiate(scores, highest, temperature[row], weights)
            threshold = _threshold(
                scores,
                weights,
                total,
                highest,
                heat,
                int(filters[row, 0]),
                filters[row, 1],
                filters[row, 2],
            )
            if threshold == -np.inf:
                tokens[row] = _draw_all(
                    scores, weights, heat, highest_id, position, branch, seeds[row]
                )
            else:
                tokens[row] = _draw_above(scores, threshold, heat, position, branch, seeds[row])


@inlined
def _log_total(logits: FloatArray, highest: np.float32) -> float:
    """Logarithm of the sum of exp(logits)."""
    whole = logits.size // LANES * LANES
    offset = splat(-highest)
    total = 0.0
    for begin in range(0, whole, _SUM_SPAN):
        sums = zero()
        for i in range(begin, min(begin + _SUM_SPAN, whole), LANES):
            sums = add(sums, exp(add(load(logits, i), offset)))
        total += float(sum_lanes(sums))
    for i in range(whole, logits.size):
        total += float(np.exp(logits[i] - highest))
    return float(highest + np.log(total))


@inlined
def _insert(logits: FloatArray, i: int, ids: IntArray, best: FloatArray) -> None:
    """Put token i among the best so far, behind its equals, if it is likelier than the last."""
    at = ids.size - 1
    if logits[i] > best[at]:
        while at > 0 and logits[i] > best[at - 1]:
            best[at], ids[at] = best[at - 1], ids[at - 1]
            at -= 1
        best[at], ids[at] = logits[i], i


@inlined
def _select_best(logits: FloatArray, ids: IntArray, best: FloatArray) -> None:
    """Fill ids and best [k] with the k highest logits in descending order, equals in id order."""
    best[:] = -np.inf
    last = ids.size - 1
    whole = logits.size // LANES * LANES
    floor = splat(best[last])
    for begin in range(0, whole, LANES):
        # Seldom true once the first few vectors are through.
        if any_above(load(logits, begin), floor):
            for i in range(begin, begin + LANES):
                _insert(logits, i, ids, best)
            floor = splat(best[last])
    for i in range(whole, logits.size):
        _insert(logits, i, ids, best)


@parallel_kernel
def rank(
    logits: FloatArray,
    rows: IndexArray,
    tokens: IntArray,
    status: IntArray,
    ends: IndexArray,
    num_threads: int,
    ids: IntArray,
    logprobs: FloatArray,
    token_logprobs: FloatArray,
) -> None:
    """The likeliest tokens of some rows of logits [n, vocab_size], best first, equals in id order.

    Args:
        logits: after penalties, before temperature.
        rows: [m], which rows.
        tokens, status: [n], what `draw` wrote; for failed rows nothing is written here.
        ends: [m], ascending; row i's candidates stand from ends[i - 1] (0 for the first) to
            ends[i], at least one for each.
        num_threads: rows are dealt out to this many.
        ids: [ends[-1]], written.
        logprobs: [ends[-1]], written: log-probabilities of `ids`.
        token_logprobs: [m], written: those of `tokens`.
    """
    for thread in prange(num_threads):
        for i in range(thread, rows.size, num_threads):
            scores = logits[rows[i]]
            if status[rows[i]] != IS_SAMPLED:
                continue
            begin = ends[i - 1] if i > 0 else 0
            best = logprobs[begin : ends[i]]
            _select_best(scores, ids[begin : ends[i]], best)
            log_total = _log_total(scores, best[0])
            for k in range(best.size):
                best[k] -= log_total
            token_logprobs[i] = scores[tokens[rows[i]]] - log_total


@kernel
def penalise(
    logits: FloatArray,
    history: U32Array,
    num_prompt_tokens: int,
    repetition: np.float32,
    presence: np.float32,
    frequency: np.float32,
) -> None:
    """Change one row of logits in place for the tokens of its history, prompt first.

    Repetition divides positive and multiplies negative logits of every token seen; presence and
    frequency subtract once and per occurrence for tokens of the output.
    """
    counts = np.zeros(logits.size, np.int32)
    is_seen = np.zeros(logits.size, np.bool_)
    for n in range(history.size):
        token = history[n]
        if not is_seen[token]:
            is_seen[token] = True
            score = logits[token]
            logits[token] = score / repetition if score > 0 else score * repetition
        counts[token] += n >= num_prompt_tokens
    for n in range(num_prompt_tokens, history.size):
        token = history[n]
        if counts[token]:
            logits[token] -= presence + frequency * counts[token]
            counts[token] = 0
