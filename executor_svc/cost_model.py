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
"""Fewer say nothing: the model is all zero until then."""


class StepSamples:
    """What recent steps moved and how long they took. Written by one thread, read by another."""

    def __init__(self, info: RunnerInfo) -> None:
        self._info = info
        self._swap_bytes_per_s = info.swap_bytes_per_s
        # [step, (1, tokens, context bytes, swapped bytes, ns)]; a row is written in one go.
        self._samples = np.zeros((WINDOW_STEPS, 5))
        self._num_steps = 0

    def add(self, plan: Plan, batch: StepBatch, step_ns: int) -> None:
        """Remember one step; empty batches and unmeasured steps say nothing and are left out."""
        if not batch.rows.size or step_ns <= 0:
            return
        features = step_features(self._info, plan, batch)
        self._samples[self._num_steps % WINDOW_STEPS] = (*features, step_ns)
        self._num_steps += 1

    def fit(self) -> pb.CostModel:
        """Least squares of the relative error over the window, no price below zero.

        All zero while there are too few steps, or all steps have about the same number of tokens,
        so that the price of a step cannot be told from the price of its tokens. Where swaps run
        beside the steps, whose times then do not tell of them, their price is what was measured at
        start.
        """
        samples = self._samples[: self._num_steps].copy()
        tokens = samples[:, 1]
        if len(samples) < MIN_STEPS or tokens.max() < 2 * tokens.min():
            return pb.CostModel()
        cost = fit_steps(samples[:, :4], samples[:, 4])
        if self._swap_bytes_per_s:
            cost.swap_bytes_per_s = self._swap_bytes_per_s
        return cost


def step_features(
    info: RunnerInfo, plan: Plan, batch: StepBatch
) -> tuple[float, float, float, float]:
    """What a step's time depends on: 1, tokens, bytes of context read, bytes swapped."""
    context_tokens = int((batch.num_computed_tokens + batch.num_scheduled_tokens).sum())
    swapped_blocks = plan.swap_out.src.size + plan.swap_in.src.size
    return (
        1.0,
        batch.token_ids.size,
        context_tokens * info.block_bytes / info.block_size,
        swapped_blocks * info.block_bytes,
    )


def fit_steps(features: np.ndarray, times_ns: np.ndarray) -> pb.CostModel:
    """Prices for step_features [n, 4] and times [n]; see StepSamples.fit."""
    step_ns, token_ns, context_ns, swap_ns = _fit_non_negative(features, times_ns)
    return pb.CostModel(
        step_ns=step_ns,
        token_ns=token_ns,
        kv_bytes_per_s=1e9 / context_ns if context_ns else 0.0,
        swap_bytes_per_s=1e9 / swap_ns if swap_ns else 0.0,
    )


def _fit_non_negative(features: np.ndarray, times: np.ndarray) -> list[float]:
    """Coefficients [k] of features [n, k] for times [n]; the most negative is dropped, repeatedly.

    Relative errors are minimised, so that a long step, or a slow first one, weighs no more.
    """
    weighted = features / times[:, None]
    scale = np.maximum(np.abs(weighted).max(axis=0), 1e-300)
    coefficients = np.zeros(features.shape[1])
    active = np.flatnonzero(weighted.any(axis=0))
    while active.size:
        found = np.linalg.lstsq(weighted[:, active] / scale[active], np.ones(len(times)))[0]
        if found.min() >= 0:
            coefficients[active] = found / scale[active]
            break
        active = np.delete(active, found.argmin())
    return [float(value) for value in coefficients]
