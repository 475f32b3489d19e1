"""The price of a step, fitted from the executor's own timings: protos, CostModel."""

from __future__ import annotations

from typing import Final

import numpy as np

from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.plan import Plan
from executor_svc.runner import RunnerInfo, StepBatch

WINDOW_STEPS: Final = 256
"""Steps that the fit looks back on."""

MIN_STEPS: Final = 32
"""Fewer say nothing."""

NUM_FEATURES: Final = 5
TOKENS, PAIRS = 1, 4
"""See step_features."""

_FREE_TOKENS: Final = (0, 64, 128, 192, 224, 256, 288, 320)
"""What is tried for CostModel.free_tokens."""


class StepSamples:
    """What recent steps moved and how long they took. Written by one thread, read by another."""

    def __init__(self, info: RunnerInfo) -> None:
        self._info = info
        self._swap_bytes_per_s = info.swap_bytes_per_s
        # [step, (*step_features, ns)]; a row is written in one go.
        self._samples = np.zeros((WINDOW_STEPS, NUM_FEATURES + 1))
        self._num_steps = 0
        self._known = pb.CostModel()

    def add(self, plan: Plan, batch: StepBatch, step_ns: int) -> None:
        """Remember one step; empty batches and unmeasured steps say nothing and are left out."""
        if not batch.rows.size or step_ns <= 0:
            return
        features = step_features(self._info, plan, batch)
        self._samples[self._num_steps % WINDOW_STEPS] = (*features, step_ns)
        self._num_steps += 1

    def fit(self) -> pb.CostModel:
        """Least squares of the relative error over the window, no price below zero.

        A window whose steps are too few, or have all about the same number of tokens, cannot tell
        the price of a step from the price of its tokens: then the last prices found count, which
        are zero at first. Likewise one without swaps does not change their price. Where swaps run
        beside the steps, whose times then do not tell of them, their price is what was measured at
        start. Pairs have their price only from prompts of different lengths; else the last one
        counts.
        """
        samples = self._samples[: self._num_steps].copy()
        if _tells_prices(samples[:, TOKENS]):
            found = self._fit(samples[:, :NUM_FEATURES], samples[:, NUM_FEATURES])
            if found.token_ns:
                found.swap_bytes_per_s = found.swap_bytes_per_s or self._known.swap_bytes_per_s
                self._known = found
        cost = pb.CostModel()
        cost.CopyFrom(self._known)
        if self._swap_bytes_per_s:
            cost.swap_bytes_per_s = self._swap_bytes_per_s
        return cost

    def _fit(self, features: np.ndarray, times_ns: np.ndarray) -> pb.CostModel:
        if _tells_pairs(features):
            found = fit_steps(features, times_ns)
            if found.token_ns:
                return found
        pair_ns = self._known.pair_ns
        rest_ns = np.maximum(times_ns - pair_ns * features[:, PAIRS], times_ns / 10)
        features[:, PAIRS] = 0
        found = fit_steps(features, rest_ns)
        found.pair_ns = pair_ns
        return found


def _tells_pairs(features: np.ndarray) -> bool:
    """Whether large steps, of step_features [n], differ in how many pairs they have for a token.

    Small ones have few of both, whatever their price is.
    """
    steps = features[
        (features[:, PAIRS] > 0) & (features[:, TOKENS] >= features[:, TOKENS].max() / 4)
    ]
    per_token = steps[:, PAIRS] / steps[:, TOKENS]
    return per_token.size >= MIN_STEPS // 4 and bool(per_token.max() >= 2 * per_token.min())


def _tells_prices(tokens: np.ndarray) -> bool:
    """Whether steps of so many tokens [n] are enough, and different enough, for a fit."""
    return len(tokens) >= MIN_STEPS and bool(tokens.max() >= 2 * tokens.min())


def step_features(
    info: RunnerInfo, plan: Plan, batch: StepBatch
) -> tuple[float, float, float, float, float]:
    """What a step's time depends on: 1, tokens, bytes of context read, bytes swapped, pairs."""
    context_tokens = int((batch.num_computed_tokens + batch.num_scheduled_tokens).sum())
    swapped_blocks = plan.swap_out.src.size + plan.swap_in.src.size
    new = batch.num_scheduled_tokens[batch.num_decode_rows :].astype(np.float64)
    old = batch.num_computed_tokens[batch.num_decode_rows :]
    return (
        1.0,
        batch.token_ids.size,
        context_tokens * info.block_bytes / info.block_size,
        swapped_blocks * info.block_bytes,
        float((new * old + new * (new + 1) / 2).sum()),
    )


def fit_steps(
    features: np.ndarray, times_ns: np.ndarray, weights: np.ndarray | None = None
) -> pb.CostModel:
    """Prices for step_features [n, NUM_FEATURES] and times [n]; see StepSamples.fit.

    weights [n] are of the squares of the relative errors; None: all the same.
    """
    roots = np.ones(len(times_ns)) if weights is None else np.sqrt(weights)
    tokens = features[:, TOKENS]
    # Free tokens can be told only if some steps have far more.
    candidates = [free for free in _FREE_TOKENS if free <= tokens.max() / 2]
    fits = [_fit_with(features, times_ns, roots, free) for free in candidates]

    def error(cost: pb.CostModel) -> float:
        return float(np.square(roots * (predict_ns(cost, features) / times_ns - 1)).sum())

    return min(fits, key=error)


def predict_ns(cost: pb.CostModel, features: np.ndarray) -> np.ndarray:
    """Times [n] of steps with step_features [n, NUM_FEATURES]."""
    rates = (cost.kv_bytes_per_s, cost.swap_bytes_per_s)
    per_byte = (1e9 / rate if rate else 0.0 for rate in rates)
    prices = [cost.step_ns, cost.token_ns, *per_byte, cost.pair_ns]
    times_ns: np.ndarray = _priced(features, cost.free_tokens) @ np.array(prices)
    return times_ns


def _priced(features: np.ndarray, free_tokens: int) -> np.ndarray:
    priced = features.copy()
    priced[:, TOKENS] = np.maximum(priced[:, TOKENS] - free_tokens, 0)
    return priced


def _fit_with(
    features: np.ndarray, times_ns: np.ndarray, roots: np.ndarray, free_tokens: int
) -> pb.CostModel:
    prices = _fit_non_negative(_priced(features, free_tokens), times_ns, roots)
    step_ns, token_ns, context_ns, swap_ns, pair_ns = prices
    return pb.CostModel(
        step_ns=step_ns,
        token_ns=token_ns,
        kv_bytes_per_s=1e9 / context_ns if context_ns else 0.0,
        swap_bytes_per_s=1e9 / swap_ns if swap_ns else 0.0,
        free_tokens=free_tokens,
        pair_ns=pair_ns,
    )


def _fit_non_negative(features: np.ndarray, times: np.ndarray, roots: np.ndarray) -> list[float]:
    """Coefficients [k] of features [n, k] for times [n]; the most negative is dropped, repeatedly.

    Relative errors times `roots` [n] are minimised, so that a long step, or a slow first one,
    weighs no more.
    """
    weighted = features / times[:, None] * roots[:, None]
    scale = np.maximum(np.abs(weighted).max(axis=0), 1e-300)
    coefficients = np.zeros(features.shape[1])
    active = np.flatnonzero(weighted.any(axis=0))
    while active.size:
        found = np.linalg.lstsq(weighted[:, active] / scale[active], roots)[0]
        if found.min() >= 0:
            coefficients[active] = found / scale[active]
            break
        active = np.delete(active, found.argmin())
    return [float(value) for value in coefficients]
