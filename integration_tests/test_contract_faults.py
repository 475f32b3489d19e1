"""The wire contract when something breaks: streams, epochs, plans, models."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path
from typing import Final

import grpc
import grpc.aio
import pytest

from blockyard.common.protocol import ENGINE_PROTOCOL_VERSION
from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.executor.v1 import executor_pb2
from executor_svc.backends.checking.runner import FakeOptions, FakeRunner
from executor_svc.plan import Plan
from executor_svc.row_state import RowState
from executor_svc.runner import PendingStep, StepBatch
from integration_tests.engine_client import EngineClient
from integration_tests.harness import (
    FAKE_DIGEST,
    RecordingRunner,
    engine_in_process,
    executor_in_process,
    until,
)
from integration_tests.stack import INFO, check_all, prompt, stack, submit_many
from integration_tests.uds_proxy import UdsProxy
from scheduler_svc import plan_codec
from scheduler_svc.executor_client import PlanRejectedError
from scheduler_svc.step_plan import StepPlan

WINDOWS: Final = (1, 2, 3)
State = pb.WatchExecutorResponse


@pytest.mark.parametrize("window", WINDOWS)
async def test_a_cut_stream_goes_on_in_the_same_epoch(window: int, tmp_path: Path) -> None:
    rng = random.Random(window)
    proxy = UdsProxy(tmp_path / "proxy.sock", tmp_path / "executor.sock")
    options = FakeOptions(step_s=0.004)
    async with proxy, stack(tmp_path, options, executor=proxy.address, window=window) as system:
        requests = await submit_many(system.client, 16)
        num_cuts = 0
        while not all(output.ended.is_set() for output, _ in requests):
            await asyncio.sleep(rng.uniform(0.0, 0.06))
            proxy.delay_s = rng.choice([0.0, 0.003])
            if system.engine.client.is_ready:
                proxy.cut()
                num_cuts += 1
        await check_all(requests)
        assert num_cuts >= 4
        shot = await system.client.snapshot()
        assert shot.counters.num_recoveries == 0
        step_ids = [plan.step_id for plan in system.runner.plans]
        assert step_ids == list(range(1, len(step_ids) + 1))  # none twice, none missing


async def test_a_stalled_stream_is_noticed_and_goes_on_in_the_same_epoch(tmp_path: Path) -> None:
    proxy = UdsProxy(tmp_path / "proxy.sock", tmp_path / "executor.sock")
    options = FakeOptions(step_s=0.01)
    up = stack(tmp_path, options, executor=proxy.address, heartbeat_timeout_s=1.2)
    async with proxy, up as system:
        requests = await submit_many(system.client, 12)
        await system.plans(10)
        proxy.stall()
        await system.client.watch_until(State.STATE_UNRESPONSIVE, "silent")
        proxy.resume()
        await check_all(requests)
        assert (await system.client.idle()).counters.num_recoveries == 0


async def test_a_new_executor_begins_a_new_epoch_and_outputs_go_on(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/restarted.sock"
    options = FakeOptions(step_s=0.01)
    async with contextlib.AsyncExitStack() as life:
        await life.enter_async_context(executor_in_process(RecordingRunner(INFO, options), address))
        async with stack(tmp_path, executor=address) as system:
            client = system.engine.client
            requests = await submit_many(system.client, 24)
            epochs = [client.epoch]
            for _ in range(2):
                await asyncio.sleep(0.1)
                await life.aclose()
                runner = RecordingRunner(INFO, options)
                await life.enter_async_context(executor_in_process(runner, address))
                await until(lambda: client.epoch not in epochs)
                epochs.append(client.epoch)
            await check_all(requests)
            shot = await system.client.idle()
            assert shot.counters.num_recoveries == 2
            assert {plan.epoch for plan in runner.plans} == {shot.epoch}


async def test_a_fault_is_survived(tmp_path: Path) -> None:
    options = FakeOptions(step_s=0.002, failures={9: RuntimeError("a step failed")})
    async with stack(tmp_path, options) as system:
        await check_all(await submit_many(system.client, 12))
        assert (await system.client.idle()).counters.num_recoveries == 1


class PoisonRunner(RecordingRunner):
    """Faults whenever a row with this seed is in the batch."""

    SEED: Final = 13

    def launch(self, plan: Plan, state: RowState, batch: StepBatch) -> PendingStep:
        """See Runner.launch."""
        if (state.seeds[batch.rows] == self.SEED).any():
            raise RuntimeError("poisoned")
        return super().launch(plan, state, batch)


async def test_a_request_that_ends_four_epochs_fails_and_the_others_complete(
    tmp_path: Path,
) -> None:
    async with stack(tmp_path, runner_type=PoisonRunner) as system:
        before = await submit_many(system.client, 6)
        poison = system.client.submit(prompt(1, 9), 5, seed=PoisonRunner.SEED)
        finish = await poison.finished()
        assert finish.reason == pb.FINISH_REASON_ERROR
        assert finish.num_recoveries == 4
        assert "executor was lost" in finish.error_message
        await check_all(before)
        assert (await system.client.idle()).counters.num_recoveries == 4


def break_plan(patch: pytest.MonkeyPatch, step_id: int) -> None:
    """Let the scheduler send one plan with a bug: its batch names a row twice."""
    encode = plan_codec.encode
    broken: list[StepPlan] = []

    def buggy(plan: StepPlan) -> executor_pb2.StepPlan:
        message = encode(plan)
        if plan.step_id == step_id and not broken:
            broken.append(plan)
            message.batch.CopyFrom(executor_pb2.Batch(rows=[0, 0], num_decode_rows=2))
        return message

    patch.setattr(plan_codec, "encode", buggy)


async def test_a_rejected_plan_costs_an_epoch_in_production(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_plan(monkeypatch, step_id=5)
    async with stack(tmp_path, strict=False) as system:
        await check_all(await submit_many(system.client, 8))
        assert (await system.client.idle()).counters.num_recoveries == 1


async def test_a_rejected_plan_ends_a_strict_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_plan(monkeypatch, step_id=2)

    async def run() -> None:
        async with stack(tmp_path, strict=True) as system:
            output = system.client.submit(prompt(1, 3), 9)
            await output.ended.wait()

    with pytest.raises(PlanRejectedError, match="row twice"):
        await run()


async def test_another_model_is_refused_by_the_engine(tmp_path: Path) -> None:
    executor, listen = f"unix:{tmp_path}/executor.sock", f"unix:{tmp_path}/engine.sock"
    async with (
        executor_in_process(FakeRunner(INFO), executor),
        engine_in_process(listen, executor, model_digest="another"),
        EngineClient(listen) as client,
    ):
        await client.watch_until(State.STATE_INCOMPATIBLE, f"{FAKE_DIGEST}, expected another")
        await until(lambda: bool(client.states))
        assert not client.states[-1].ready
        output = client.submit([1], 1)
        await output.ended.wait()
        assert output.rejection is not None
        assert output.rejection.reason == "NOT_READY"


@pytest.mark.parametrize(
    ("hello", "code", "message"),
    [
        (
            pb.Hello(protocol_version=ENGINE_PROTOCOL_VERSION + 1),
            grpc.StatusCode.FAILED_PRECONDITION,
            "protocol",
        ),
        (
            pb.Hello(protocol_version=ENGINE_PROTOCOL_VERSION, model_digest="another"),
            grpc.StatusCode.FAILED_PRECONDITION,
            "digest another",
        ),
        (None, grpc.StatusCode.INVALID_ARGUMENT, "hello"),
    ],
)
async def test_a_front_end_that_does_not_fit_is_refused(
    hello: pb.Hello | None, code: grpc.StatusCode, message: str, tmp_path: Path
) -> None:
    async with stack(tmp_path) as system:
        call = system.client.stub.Connect()
        first = pb.ConnectRequest(submit=pb.SubmitBatch())
        await call.write(first if hello is None else pb.ConnectRequest(hello=hello))
        assert await call.code() is code
        assert message in str(await call.details())


async def test_a_report_of_metrics_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    async with stack(tmp_path) as system:
        call = system.client.stub.Connect()
        hello = pb.Hello(protocol_version=ENGINE_PROTOCOL_VERSION)
        wrong = pb.FrontendMetrics(e2e_latency=pb.HistogramIncrease(counts=[1, 2, 3]))
        await call.write(pb.ConnectRequest(hello=hello))
        await call.write(pb.ConnectRequest(metrics=wrong))
        with pytest.raises(grpc.aio.AioRpcError, match="a histogram of 3 buckets") as caught:
            async for _ in call:
                pass
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await check_all(await submit_many(system.client, 2))


async def test_a_new_engine_waits_for_a_live_one_and_then_gets_a_clean_executor(
    tmp_path: Path,
) -> None:
    proxy = UdsProxy(tmp_path / "proxy.sock", tmp_path / "executor.sock")
    listen = f"unix:{tmp_path}/second.sock"
    async with proxy, stack(tmp_path, executor=proxy.address) as system:
        system.client.submit(prompt(1, 9), 40)
        async with (
            engine_in_process(listen, f"unix:{tmp_path}/executor.sock"),
            EngineClient(listen) as client,
        ):
            await client.watch_until(State.STATE_CONNECTING, "another scheduler's stream is live")
            proxy.stall()  # the first engine falls silent, its stream stays
            await client.ready()
            await check_all(await submit_many(client, 8))
            assert (await client.idle()).counters.num_recoveries == 0
        proxy.resume()


@pytest.mark.timeout(60)
async def test_a_slow_link_is_slow_but_works(tmp_path: Path) -> None:
    proxy = UdsProxy(tmp_path / "proxy.sock", tmp_path / "executor.sock")
    proxy.delay_s = 0.15
    async with proxy, stack(tmp_path, executor=proxy.address) as system:
        await system.client.ready()
        await check_all(await submit_many(system.client, 4))
        assert (await system.client.idle()).counters.num_recoveries == 0
