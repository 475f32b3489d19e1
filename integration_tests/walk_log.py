"""Plan logs of schedulers that no engine drives: what `blockyard replay` needs of a failed walk."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from blockyard.common.columns import pack_u32
from blockyard.engine.v1 import engine_pb2
from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.backends.checking.runner import DEVICE
from executor_svc.plan import PlanError
from scheduler_svc import plan_codec
from scheduler_svc.beam import EarlyStopping
from scheduler_svc.cost_model import CostModel
from scheduler_svc.limits import Limits
from scheduler_svc.plan_log import PlanLog
from scheduler_svc.policy import Policy
from scheduler_svc.request import Branch, Request
from scheduler_svc.scheduler import Scheduler
from scheduler_svc.step_plan import Finished, StepOutput, StepPlan, StepTokens

Result = TypeVar("Result")
MakeScheduler = Callable[[Limits, Policy], Scheduler]

_EARLY_STOPPING: Final = {
    EarlyStopping.HEURISTIC: engine_pb2.EARLY_STOPPING_HEURISTIC,
    EarlyStopping.AT_WIDTH: engine_pb2.EARLY_STOPPING_AT_WIDTH,
    EarlyStopping.NEVER: engine_pb2.EARLY_STOPPING_NEVER,
}


def run_recorded(walk: Callable[[MakeScheduler], Result]) -> Result:
    """Run a walk with the scheduler that it is given; if it fails, run it again with a log.

    The error that is raised then has a note that says where the log is.
    """
    try:
        return walk(Scheduler)
    except (AssertionError, PlanError) as error:
        error.add_note(f"to look into it: blockyard replay {record_failure(walk)}")
        raise


def record_failure(walk: Callable[[MakeScheduler], object]) -> Path:
    """Run a walk that fails once more, with a log; returns the log's path."""
    path = Path(tempfile.mkdtemp(prefix="blockyard-walk-")) / "plans.log"
    with contextlib.ExitStack() as stack:

        def make(limits: Limits, policy: Policy) -> Scheduler:
            scheduler = RecordedScheduler(limits, policy, path)
            stack.callback(scheduler.log.close)
            return scheduler

        with contextlib.suppress(AssertionError, PlanError):
            walk(make)
    return path


class RecordedScheduler(Scheduler):
    """Writes down what it is told, as the engine does; its executor is as large as its limits."""

    def __init__(self, limits: Limits, policy: Policy, path: Path) -> None:
        """As Scheduler; the log begins at `path`. Close `log` at the end."""
        super().__init__(limits, policy)
        self.log = PlanLog(path, policy)
        self._prices = CostModel()

    def begin_epoch(self, epoch: int, limits: Limits) -> StepOutput:
        """See Scheduler."""
        self.log.begin_epoch(epoch, describe(limits), limits)
        self._log_prices()
        return super().begin_epoch(epoch, limits)

    def set_cost_model(self, cost_model: CostModel) -> None:
        """See Scheduler."""
        self._prices = cost_model
        if self.epoch:
            self._log_prices()
        super().set_cost_model(cost_model)

    def _log_prices(self) -> None:
        prices = self._prices
        self.log.cost_model(pb.CostModel(**dataclasses.asdict(prices)))

    def flush_cache(self) -> tuple[int, int]:
        """See Scheduler."""
        self.log.flush_cache()
        return super().flush_cache()

    def submit(self, request: Request) -> None:
        """See Scheduler."""
        self.log.submit(submit_of(request), request)
        super().submit(request)

    def abort(self, request: Request) -> None:
        """See Scheduler."""
        self.log.abort(request.key)
        super().abort(request)

    def stop(self, branch: Branch, num_output_tokens: int) -> Finished:
        """See Scheduler."""
        self.log.stop(branch.request.key, branch.index, num_output_tokens)
        return super().stop(branch, num_output_tokens)

    def plan(self, now_ns: int) -> StepPlan | None:
        """See Scheduler."""
        self.log.plan_call(now_ns)
        plan = super().plan(now_ns)
        if plan is not None:
            self.log.plan(plan_codec.encode(plan))
        return plan

    def commit(self, result: StepTokens) -> StepOutput:
        """See Scheduler."""
        rows = self.in_flight[0].sampling_rows.tolist()
        failed_rows = [row for row in rows if row in result.failed_rows]
        self.log.result(
            pb.StepResult(
                epoch=result.epoch,
                step_id=result.step_id,
                token_ids=result.token_ids.tolist(),
                failed_rows=failed_rows,
                failed_status=[pb.ROW_STATUS_NUMERIC] * len(failed_rows),
                candidate_token_ids=result.candidate_token_ids.tolist(),
                candidate_logprobs=result.candidate_logprobs.tolist(),
                token_logprobs=result.token_logprobs.tolist(),
            )
        )
        return super().commit(result)


def describe(limits: Limits) -> pb.DescribeResponse:
    """A checking executor of this size."""
    return pb.DescribeResponse(
        vocab_size=limits.vocab_size,
        max_model_len=limits.max_model_len,
        block_size=limits.block_size,
        num_device_blocks=limits.num_device_blocks,
        num_host_blocks=limits.num_host_blocks,
        max_rows=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        block_bytes=limits.block_bytes,
        device=DEVICE,
    )


def submit_of(request: Request) -> engine_pb2.Submit:
    """The submit that this request could have been made of."""
    sampling, beam = request.sampling, None
    if request.beam is not None:
        beam = engine_pb2.BeamSearch(
            width=request.beam.width,
            num_returned=request.beam.num_returned,
            length_penalty=request.beam.length_penalty,
            early_stopping=_EARLY_STOPPING[request.beam.early_stopping],
        )
    return engine_pb2.Submit(
        request_id=request.request_id,
        prompt_token_ids=pack_u32(request.prompt),
        max_tokens=request.max_total_tokens - request.num_prompt_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        stop_token_ids=sorted(request.stop_token_ids),
        num_samples=request.num_samples,
        beam=beam,
        num_logprobs=sampling.num_logprobs,
        cache_salt=request.cache_salt,
        cache_off=request.is_cache_private,
        # What it stops at is not known here; the log has what the check says.
        priority=request.priority,
        stop_strings=["?"] if request.is_text_stopped is not None else [],
    )
