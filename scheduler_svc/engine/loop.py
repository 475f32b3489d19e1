"""The engine: intake -> plan -> send -> commit -> publish, all on one event loop.

There is no thread and no lock. Whatever happens (a submit, a result, a link that ends) changes
the scheduler's state and then calls `pump`, which plans while the window has room.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator

import grpc
import numpy as np

from blockyard.common.logs import event
from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.executor.v1 import executor_pb2
from scheduler_svc import plan_codec
from scheduler_svc.config import EngineSettings
from scheduler_svc.engine.admission import RejectedError, build_request
from scheduler_svc.engine.link import FrontendLink
from scheduler_svc.executor_client import (
    ExecutorClient,
    IncompatibleExecutorError,
    LinkState,
    LinkTimeouts,
)
from scheduler_svc.request import RequestStatus
from scheduler_svc.scheduler import Limits, Scheduler
from scheduler_svc.step_plan import Finished, StepOutput

logger = logging.getLogger(__name__)

_REASONS = {
    RequestStatus.FINISHED_STOP: pb.FINISH_REASON_STOP,
    RequestStatus.FINISHED_LENGTH: pb.FINISH_REASON_LENGTH,
    RequestStatus.FINISHED_ERROR: pb.FINISH_REASON_ERROR,
}


class Engine:
    """One scheduler, one executor link, any number of front-end links."""

    def __init__(self, settings: EngineSettings) -> None:
        """Create an engine that has not met its executor yet."""
        self._settings = settings
        self.scheduler: Scheduler | None = None
        self.client = ExecutorClient(
            settings.executor,
            self,
            LinkTimeouts(settings.heartbeat_timeout_s, settings.progress_timeout_s),
            strict=settings.strict,
        )
        self._info: executor_pb2.DescribeResponse | None = None
        self._links: dict[int, FrontendLink] = {}
        self._num_links = 0
        self._num_requests = 0
        self._num_finished = 0
        self._num_epochs = 0
        self._link_state = pb.WatchExecutorResponse(state=pb.WatchExecutorResponse.STATE_CONNECTING)
        self._link_state_changed = asyncio.Event()

    # ---- the executor's side (executor_client.Handler)

    def on_describe(self, info: executor_pb2.DescribeResponse) -> None:
        """Take the executor's sizes; refuse another model than the first one."""
        known = self._settings.model_digest or (self._info.model_digest if self._info else "")
        if known and info.model_digest != known:
            raise IncompatibleExecutorError(
                f"the executor serves model digest {info.model_digest}, expected {known}"
            )
        self._info = info

    def on_new_epoch(self, epoch: int) -> None:
        """Start over on an empty executor; requests keep their tokens and wait again."""
        limits = self._limits()
        if self.scheduler is None:
            self.scheduler = Scheduler(limits)
        self._num_epochs += 1
        event(
            logger,
            "epoch begins",
            epoch=epoch,
            blocks=limits.num_device_blocks - 1,
            max_num_seqs=limits.max_num_seqs,
            budget=limits.max_num_batched_tokens,
        )
        self._publish(self.scheduler.begin_epoch(epoch, limits))
        for link in self._links.values():
            link.push_state(self.state())

    def _limits(self) -> Limits:
        assert self._info is not None
        info, settings = self._info, self._settings
        budget = min(
            settings.max_num_batched_tokens or info.max_num_batched_tokens,
            info.max_num_batched_tokens,
        )
        return Limits(
            num_device_blocks=info.num_device_blocks,
            block_size=info.block_size,
            max_num_seqs=min(settings.max_num_seqs, info.max_rows, budget),
            max_num_batched_tokens=budget,
            max_model_len=min(settings.max_model_len or info.max_model_len, info.max_model_len),
            vocab_size=info.vocab_size,
            watermark_blocks=int(settings.watermark * info.num_device_blocks),
        )

    def on_result(self, result: executor_pb2.StepResult) -> None:
        """Commit a step, plan the next, then tell the front ends."""
        assert self.scheduler is not None
        output = self.scheduler.commit(plan_codec.decode(result))
        self.pump()
        self._publish(output)

    def on_state(self, state: LinkState, message: str) -> None:
        """Tell the supervisor, and go on if the executor is there."""
        if (state.name, message) != (self._link_state_name, self._link_state.message):
            event(logger, "executor link", state=state.name.lower(), reason=message or "-")
        self._link_state = pb.WatchExecutorResponse(
            state=pb.WatchExecutorResponse.State.Value(f"STATE_{state.name}"),
            epoch=self.client.epoch,
            message=message,
        )
        self._link_state_changed.set()
        self._link_state_changed = asyncio.Event()
        self.pump()

    @property
    def _link_state_name(self) -> str:
        name = pb.WatchExecutorResponse.State.Name(self._link_state.state)
        return name.removeprefix("STATE_")

    async def watch(self) -> AsyncIterator[pb.WatchExecutorResponse]:
        """The executor link's state now, and after every change."""
        while True:
            changed = self._link_state_changed
            yield self._link_state
            await changed.wait()

    def pump(self) -> None:
        """Plan and send while the window has room and there is something to say."""
        scheduler = self.scheduler
        while (
            scheduler is not None
            and self.client.is_ready
            and self.client.num_in_flight < self._settings.window
            and scheduler.has_work
        ):
            plan = scheduler.plan(time.monotonic_ns())
            if plan is None:
                return
            self.client.send(plan_codec.encode(plan))

    # ---- the front ends' side

    def attach(self, hello: pb.Hello) -> FrontendLink:
        """Begin a front end's link."""
        self._num_links += 1
        link = FrontendLink(self._num_links, hello.frontend_id)
        self._links[link.index] = link
        link.push_state(self.state())
        return link

    def detach(self, link: FrontendLink) -> None:
        """End a front end's link and abort what it still had."""
        del self._links[link.index]
        for request_id in list(link.requests):
            self._stop(link, request_id, 0)
        self.pump()

    def state(self) -> pb.EngineState:
        """What front ends need to know."""
        if self.scheduler is None or self._info is None:
            return pb.EngineState(ready=False)
        limits = self.scheduler.limits
        return pb.EngineState(
            ready=True,
            model_name=self._info.model_name,
            model_digest=self._info.model_digest,
            vocab_size=limits.vocab_size,
            max_model_len=limits.max_total_tokens,
            block_size=limits.block_size,
            num_device_blocks=limits.num_device_blocks - 1,
            max_num_seqs=limits.max_num_seqs,
        )

    def submit(self, link: FrontendLink, submits: pb.SubmitBatch) -> None:
        """Queue requests; each that cannot run is rejected by itself."""
        for submit in submits.submits:
            try:
                self._submit(link, submit)
            except RejectedError as error:
                link.push_rejection(error.as_rejection(submit.request_id))
        self.pump()

    def _submit(self, link: FrontendLink, submit: pb.Submit) -> None:
        if self.scheduler is None:
            raise RejectedError(grpc.StatusCode.UNAVAILABLE, "no executor has connected yet")
        if len(self.scheduler.waiting) >= self._settings.max_waiting:
            raise RejectedError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"the queue is full ({self._settings.max_waiting} requests); try again later",
            )
        if submit.request_id in link.requests:
            raise RejectedError(grpc.StatusCode.ALREADY_EXISTS, "request_id is in use")
        self._num_requests += 1
        request = build_request(
            submit,
            self.scheduler.limits,
            key=self._num_requests,
            frontend=link.index,
            now_ns=time.monotonic_ns(),
        )
        link.requests[submit.request_id] = request
        self.scheduler.submit(request)

    def stop(self, link: FrontendLink, stops: pb.StopBatch) -> None:
        """End requests early; ids that have ended already are ignored."""
        counts = stops.num_output_tokens or [0] * len(stops.request_ids)
        for request_id, count in zip(stops.request_ids, counts, strict=True):
            self._stop(link, request_id, count)
        self.pump()

    def _stop(self, link: FrontendLink, request_id: int, num_output_tokens: int) -> None:
        request = link.requests.pop(request_id, None)
        if request is None or self.scheduler is None:
            return
        self._num_finished += 1
        if num_output_tokens:
            self.scheduler.finish(request, RequestStatus.FINISHED_STOP)
            link.push_finish(self._finish(Finished(request, num_output_tokens)))
        else:
            self.scheduler.finish(request, RequestStatus.FINISHED_ABORTED)

    def _publish(self, output: StepOutput) -> None:
        """Hand each front end its part of a step; a link that is gone gets nothing."""
        frontends = output.frontends
        for index in np.unique(frontends).tolist() if len(frontends) else ():
            if (link := self._links.get(index)) is not None:
                mine = frontends == index
                link.push_tokens(output.request_ids[mine], output.token_ids[mine])
        for finished in output.finished:
            link = self._links.get(finished.request.frontend)
            if link is not None:
                self._num_finished += 1
                link.requests.pop(finished.request.request_id, None)
                link.push_finish(self._finish(finished))

    @staticmethod
    def _finish(finished: Finished) -> pb.Finish:
        request = finished.request
        return pb.Finish(
            request_id=request.request_id,
            reason=_REASONS[request.status],
            stop_token_id=finished.stop_token_id,
            error_message=finished.error_message,
            num_prompt_tokens=request.num_prompt_tokens,
            num_output_tokens=finished.num_output_tokens,
            num_preemptions=request.num_preemptions,
            num_recoveries=request.num_recoveries,
            queue_ns=max(0, request.first_admitted_ns - request.arrival_ns),
        )

    def snapshot(self) -> pb.SnapshotResponse:
        """Queues and pool between two steps; see the proto for the classes."""
        if self.scheduler is None:
            return pb.SnapshotResponse()
        scheduler, pool = self.scheduler, self.scheduler.kv.pool
        rows = [request.row for request in scheduler.running.values()]
        num_stored = int(scheduler.rows.num_planned[rows].sum())
        return pb.SnapshotResponse(
            epoch=scheduler.epoch,
            step_id=scheduler.last_step_id,
            num_waiting=len(scheduler.waiting),
            num_running=len(rows),
            num_device_blocks=pool.num_usable,
            num_free_blocks=pool.num_free,
            num_used_blocks=pool.num_used,
            num_stored_tokens=num_stored,
            num_unused_slots=pool.num_used * scheduler.limits.block_size - num_stored,
            num_preemptions=scheduler.num_preemptions,
            num_finished=self._num_finished,
            num_recoveries=max(0, self._num_epochs - 1),
        )
