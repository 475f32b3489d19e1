"""The engine: intake -> plan -> send -> commit -> publish, all on one event loop.

There is no thread and no lock. Whatever happens (a submit, a result, a link that ends) changes
the scheduler's state and then calls `pump`, which plans while the window has room.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

from blockyard.common.logs import event
from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.executor.v1 import executor_pb2
from scheduler_svc import plan_codec
from scheduler_svc.config import EngineSettings
from scheduler_svc.cost_model import CostModel
from scheduler_svc.engine.admission import build_request, max_branches, rejection
from scheduler_svc.engine.beam_pace import BeamPace
from scheduler_svc.engine.executor_limits import limits_of
from scheduler_svc.engine.link import FrontendLink
from scheduler_svc.engine.metrics.frontends import FrontendTotals
from scheduler_svc.engine.metrics.recorder import MetricsRecorder
from scheduler_svc.engine.observer import EngineObserver
from scheduler_svc.engine.progress import ProgressWatch
from scheduler_svc.engine.queue_bound import QueueBound, deadline_error
from scheduler_svc.engine.reports import finish_message, snapshot_message
from scheduler_svc.engine.text_stop import TextStops
from scheduler_svc.engine.tracing import EngineTracing
from scheduler_svc.errors import Reason, RequestError
from scheduler_svc.executor_client import (
    ExecutorClient,
    IncompatibleExecutorError,
    LinkState,
    LinkTimeouts,
)
from scheduler_svc.health import HealthServicer
from scheduler_svc.plan_log import PlanLog
from scheduler_svc.policy import Policy
from scheduler_svc.request import Request
from scheduler_svc.scheduler import Scheduler, StuckError
from scheduler_svc.step_plan import Finished, StepOutput

logger = logging.getLogger(__name__)


class Engine:
    """One scheduler, one executor link, any number of front-end links."""

    def __init__(self, settings: EngineSettings, tracing: EngineTracing | None = None) -> None:
        """Create an engine that has not met its executor yet.

        Raises PlanLogPathError, or FileError if a certificate cannot be used.
        """
        self.security = settings.link_security()
        self.recorder = MetricsRecorder() if settings.metrics_address else None
        self.frontends = FrontendTotals()
        self._observer = EngineObserver(tracing, self.recorder)
        self._settings = settings
        self._policy = Policy(settings.preemption, settings.prefix_cache)
        self._log = PlanLog(settings.plan_log, self._policy, settings.plan_log_max_bytes)
        self._text_stops = TextStops(settings.model_dir) if settings.model_dir else None
        self._pace = BeamPace()
        self._bound = QueueBound(settings.max_waiting, settings.max_waiting_tokens)
        self.scheduler: Scheduler | None = None
        self.client = ExecutorClient(
            settings.executor,
            self,
            LinkTimeouts(settings.heartbeat_timeout_s, settings.progress_timeout_s),
            security=self.security,
            executor_name=settings.executor_name,
            strict=settings.strict,
        )
        self.health = HealthServicer([pb.DESCRIPTOR.services_by_name["EngineService"].full_name])
        self._progress = ProgressWatch(settings.progress_timeout_s, self._is_idle, self._announce)
        self._info: executor_pb2.DescribeResponse | None = None
        self._links: dict[int, FrontendLink] = {}
        self._all_left = asyncio.Event()
        self._all_left.set()
        self._num_links = 0
        self._num_requests = 0
        self._link_state = pb.WatchExecutorResponse(state=pb.WatchExecutorResponse.STATE_CONNECTING)
        self._link_state_changed = asyncio.Event()

    async def run(self) -> None:
        """Keep the executor's link up and watch its progress until cancelled; raises on a bug."""
        watching = asyncio.create_task(self._progress.run())
        try:
            await self.client.run()
        finally:
            watching.cancel()

    def close(self) -> None:
        """Write out what the plan log holds back; the engine must not go on."""
        self._log.close()

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
        assert self._info is not None
        limits = limits_of(self._info, self._settings)
        self._log.begin_epoch(epoch, self._info, limits)
        if self.scheduler is None:
            self.scheduler = Scheduler(limits, self._policy)
        event(
            logger,
            "epoch begins",
            epoch=epoch,
            blocks=limits.num_device_blocks - 1,
            max_num_seqs=limits.max_num_seqs,
            budget=limits.max_num_batched_tokens,
        )
        output = self.scheduler.begin_epoch(epoch, limits)
        self._observer.epoch_ended()
        self._publish(output)
        self._progress.advanced()
        self._announce()

    def on_result(self, result: executor_pb2.StepResult) -> None:
        """Commit a step, plan the next, then tell the front ends."""
        scheduler, observer = self.scheduler, self._observer
        assert scheduler is not None
        arrived_ns = time.monotonic_ns()
        self._log.result(result)
        self._pace.observe(result.timings)
        self._progress.advanced()
        observer.arrived(scheduler, arrived_ns)
        began_ns = time.monotonic_ns()
        output = scheduler.commit(plan_codec.decode(result))
        times_ns = (arrived_ns, began_ns, time.monotonic_ns())
        self.pump()
        observer.committed(result, output, times_ns, is_resting=not self.client.num_in_flight)
        self._publish(output)

    def on_cost_model(self, cost_model: executor_pb2.CostModel) -> None:
        """Take the executor's newest prices."""
        if self.scheduler is not None:
            self._log.cost_model(cost_model)
            self.scheduler.set_cost_model(CostModel.of(cost_model))

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
        if state is LinkState.UNRESPONSIVE:
            self._progress.lost()
        self.pump()

    def _is_idle(self) -> bool:
        """Whether the executor is there, and has nothing to do."""
        has_work = self.scheduler is not None and self.scheduler.has_work
        return self.client.is_ready and not self.client.num_in_flight and not has_work

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
            and self.client.num_in_flight < self._window(scheduler)
            and scheduler.has_work
        ):
            now_ns = time.monotonic_ns()
            self._log.plan_call(now_ns)
            try:
                plan = scheduler.plan(now_ns)
            except StuckError as error:
                if self._settings.strict:
                    raise
                logger.critical("%s; starting over", error)
                self.client.reset(str(error))
                return
            for request in scheduler.take_expired():
                self._expire(request)
            if plan is None:
                return
            planned_ns = time.monotonic_ns()
            message = plan_codec.encode(plan)
            times_ns = (now_ns, planned_ns, time.monotonic_ns())
            self._log.plan(message)
            self.client.send(message)
            self._observer.planned(plan, scheduler, times_ns)

    def _window(self, scheduler: Scheduler) -> int:
        """Plans that may be in flight; one if the next is better held until beams can join it."""
        if scheduler.has_beams_in_flight and self._pace.should_hold:
            return 1
        return self._settings.window

    # ---- the front ends' side

    @property
    def num_frontends(self) -> int:
        """Front ends connected."""
        return len(self._links)

    def attach(self, hello: pb.Hello) -> FrontendLink:
        """Begin a front end's link."""
        self._num_links += 1
        link = FrontendLink(self._num_links, hello.frontend_id)
        self._links[link.index] = link
        self._all_left.clear()
        link.push_state(self.state())
        return link

    def detach(self, link: FrontendLink) -> None:
        """End a front end's link and abort what it still had."""
        del self._links[link.index]
        self.frontends.leave(link.index)
        for request_id in list(link.requests):
            self._abort(link, request_id)
        self.pump()
        if not self._links:
            self._all_left.set()

    async def until_left(self, limit_s: float) -> None:
        """Wait until no front end is connected, but not longer than the limit."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_left.wait(), limit_s)

    def _announce(self) -> None:
        """Tell front ends, and whoever asks for the health, how the engine is."""
        state = self.state()
        self.health.update(is_ready=state.ready, is_progressing=not state.stalled)
        for link in self._links.values():
            link.push_state(state)

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
            max_branches=max_branches(limits),
            device=self._info.device,
            stalled=self._progress.is_stalled,
            wants_metrics=self.recorder is not None,
        )

    def submit(self, link: FrontendLink, submits: pb.SubmitBatch) -> None:
        """Queue requests; each that cannot run is rejected by itself."""
        for submit in submits.submits:
            try:
                self._submit(link, submit)
            except RequestError as error:
                link.push_rejection(rejection(submit.request_id, error))
        self.pump()

    def _submit(self, link: FrontendLink, submit: pb.Submit) -> None:
        if self.scheduler is None:
            raise RequestError(
                Reason.NOT_READY, "no executor has connected yet; retry", retry_delay_s=1.0
            )
        if submit.request_id in link.requests:
            raise RequestError(Reason.INTERNAL_ERROR, "the front end's request_id is in use")
        num_prompt_tokens = len(submit.prompt_token_ids) // 4
        self._bound.make_room(self.scheduler, num_prompt_tokens, self._drop_late)
        self._num_requests += 1
        now_ns = time.monotonic_ns()
        request = build_request(
            submit,
            self.scheduler.limits,
            key=self._num_requests,
            frontend=link.index,
            now_ns=now_ns,
            deadline_ns=_on_clock(submit.deadline_unix_ns, now_ns),
            text_stop=self._text_stops,
        )
        link.requests[submit.request_id] = request
        self._log.submit(submit, request)
        self.scheduler.submit(request)
        self._observer.queued(request, submit)

    def _drop_late(self, request: Request) -> None:
        """Give up a waiting request that can hardly meet its deadline for one that may."""
        assert self.scheduler is not None
        self._log.abort(request.key)
        self.scheduler.drop(request)
        self._expire(request)

    def _expire(self, request: Request) -> None:
        """Tell the front end of a request that was dropped for its deadline."""
        self._observer.expired(request)
        owner = self._links.get(request.frontend)
        if owner is not None and owner.requests.pop(request.request_id, None) is not None:
            owner.push_rejection(rejection(request.request_id, deadline_error()))

    def stop(self, link: FrontendLink, stops: pb.StopBatch) -> None:
        """End branches or whole requests early; what has ended already is ignored."""
        counts = stops.num_output_tokens or [0] * len(stops.request_ids)
        branches = stops.branches or [0] * len(stops.request_ids)
        for request_id, branch, count in zip(stops.request_ids, branches, counts, strict=True):
            if count:
                self._stop(link, request_id, branch, count)
            else:
                self._abort(link, request_id)
        self.pump()

    def _abort(self, link: FrontendLink, request_id: int) -> None:
        request = link.requests.pop(request_id, None)
        if request is not None and self.scheduler is not None:
            self._log.abort(request.key)
            self.scheduler.abort(request)
            self._observer.aborted(request)

    def _stop(self, link: FrontendLink, request_id: int, index: int, num_tokens: int) -> None:
        request = link.requests.get(request_id)
        if request is None or self.scheduler is None or request.beam is not None:
            return
        if index >= len(request.branches) or request.branches[index].status.is_finished:
            return
        self._log.stop(request.key, index, num_tokens)
        self._finish(link, self.scheduler.stop(request.branches[index], num_tokens))

    def _publish(self, output: StepOutput) -> None:
        """Hand each front end its part of a step; a link that is gone gets nothing."""
        if len(output.token_ids):
            for link in self._links.values():
                link.push_tokens(output)
        for finished in output.finished:
            owner = self._links.get(finished.request.frontend)
            if owner is not None:
                self._finish(owner, finished)

    def _finish(self, link: FrontendLink, finished: Finished) -> None:
        self._observer.finished(finished)
        if finished.is_last:
            link.requests.pop(finished.request.request_id, None)
        link.push_finish(finish_message(finished))

    def flush_cache(self) -> pb.FlushCacheResponse:
        """Forget every cached block that nobody holds."""
        if self.scheduler is None:
            return pb.FlushCacheResponse()
        self._log.flush_cache()
        num_device_blocks, num_host_blocks = self.scheduler.flush_cache()
        return pb.FlushCacheResponse(
            num_device_blocks=num_device_blocks, num_host_blocks=num_host_blocks
        )

    def snapshot(self) -> pb.SnapshotResponse:
        """Queues and pools between two steps; see the proto for the classes."""
        if self.scheduler is None:
            return pb.SnapshotResponse()
        return snapshot_message(self.scheduler)


def _on_clock(unix_ns: int, now_ns: int) -> int:
    """A moment of UNIX time on the clock that says `now_ns` now [ns]; 0 is none on both."""
    return max(1, now_ns + unix_ns - time.time_ns()) if unix_ns else 0
