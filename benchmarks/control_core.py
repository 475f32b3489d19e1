"""The scheduler and its codec alone, in one process: what is left without gRPC and a loop."""

from __future__ import annotations

import time
from typing import Final

import numpy as np

from benchmarks.report import percentiles
from blockyard.executor.v1 import executor_pb2 as pb
from scheduler_svc import plan_codec
from scheduler_svc.limits import Limits
from scheduler_svc.request import Request
from scheduler_svc.scheduler import Scheduler

_BLOCK_SIZE: Final = 16
_EPOCH: Final = 1


def measure_core(num_rows: int, context_tokens: int, num_steps: int) -> dict[str, dict[str, float]]:
    """Percentiles of plan, encode, decode and commit [us] in steady decode at window 1."""
    scheduler = _steady_scheduler(num_rows, context_tokens, num_steps)
    names = ("plan_us", "encode_us", "decode_us", "commit_us")
    samples: dict[str, list[int]] = {name: [] for name in names}
    for _ in range(num_steps):
        stamps = [time.perf_counter_ns()]
        plan = scheduler.plan(0)
        assert plan is not None
        stamps.append(time.perf_counter_ns())
        plan_codec.encode(plan).SerializeToString()
        stamps.append(time.perf_counter_ns())
        data = _result(plan.step_id, len(plan.sampling_rows)).SerializeToString()
        result = pb.StepResult.FromString(data)
        stamps.append(time.perf_counter_ns())
        tokens = plan_codec.decode(result)
        stamps.append(time.perf_counter_ns())
        scheduler.commit(tokens)
        stamps.append(time.perf_counter_ns())
        plan_ns, encode_ns, _, decode_ns, commit_ns = np.diff(stamps).tolist()
        for name, value in zip(names, (plan_ns, encode_ns, decode_ns, commit_ns), strict=True):
            samples[name].append(value)
    return {name: percentiles(values, 1e3) for name, values in samples.items()}


def _steady_scheduler(num_rows: int, context_tokens: int, num_steps: int) -> Scheduler:
    """All rows decode; none ends within `num_steps`."""
    longest = context_tokens + num_steps + 100
    limits = Limits(
        num_device_blocks=num_rows * (longest // _BLOCK_SIZE + 1) + 1,
        block_size=_BLOCK_SIZE,
        max_num_seqs=num_rows,
        max_num_batched_tokens=num_rows * context_tokens,
        max_model_len=longest,
        vocab_size=1000,
    )
    scheduler = Scheduler(limits)
    scheduler.begin_epoch(_EPOCH, limits)
    for key in range(num_rows):
        num_prompt_tokens = context_tokens - key % _BLOCK_SIZE
        request = Request(
            key=key,
            frontend=1,
            request_id=key,
            prompt=np.full(num_prompt_tokens, key, np.int32),  # nothing to share
            max_total_tokens=longest,
            arrival_ns=0,
        )
        scheduler.submit(request)
    plan = scheduler.plan(0)
    assert plan is not None
    assert len(plan.sampling_rows) == num_rows, "not all prompts fit one step"
    scheduler.commit(plan_codec.decode(_result(plan.step_id, num_rows)))
    return scheduler


def _result(step_id: int, num_tokens: int) -> pb.StepResult:
    return pb.StepResult(epoch=_EPOCH, step_id=step_id, token_ids=[500] * num_tokens)
