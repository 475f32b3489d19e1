"""Sampling as sampler.py's docstring defines it, in float64 and by sorting: the oracle."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from executor_svc.backends.cpu.jit import kernel
from executor_svc.backends.cpu.philox import Words, philox

Float64Array = npt.NDArray[np.float64]


def philox_words(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """The generator in plain Python integers, written from the paper's description."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


@kernel
def compiled_philox(
    c0: np.uint64, c1: np.uint64, c2: np.uint64, c3: np.uint64, k0: np.uint64, k1: np.uint64
) -> Words:
    """The kernels' generator, callable."""
    return philox(c0, c1, c2, c3, k0, k1)


def kept(
    logits: npt.NDArray[np.float32], temperature: float, top_k: int, top_p: float, min_p: float
) -> npt.NDArray[np.bool_]:
    """Tokens [vocab_size] that all filters keep, ties included."""
    scores = logits.astype(np.float64) / temperature
    keep = np.ones(scores.size, np.bool_)
    if 0 < top_k < scores.size:
        keep &= scores >= np.sort(scores)[-top_k]
    weights = np.where(keep, np.exp(scores - scores.max()), 0.0)
    if 0.0 < top_p < 1.0:
        probabilities = weights / weights.sum()
        above = np.array([probabilities[scores > score].sum() for score in scores])
        keep &= above < top_p
    if min_p > 0.0:
        keep &= weights >= min_p
    return keep


def draw(
    logits: npt.NDArray[np.float32],
    keep: npt.NDArray[np.bool_],
    temperature: float,
    position: int,
    branch: int,
    seed: int,
) -> int:
    """Gumbel-max over the kept tokens."""
    key = (seed & 0xFFFFFFFF, seed >> 32)
    words = [
        word
        for block in range(-(-logits.size // 4))
        for word in philox_words((block, position, branch, 0), key)
    ][: logits.size]
    uniform = (np.array(words, np.float64) + 0.5) / 2.0**32
    scores = logits.astype(np.float64) / temperature - np.log(-np.log(uniform))
    return int(np.argmax(np.where(keep, scores, -np.inf)))


def log_softmax(logits: npt.NDArray[np.float32]) -> Float64Array:
    """Log-probabilities [vocab_size]."""
    wide = logits.astype(np.float64)
    result: Float64Array = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    return result
