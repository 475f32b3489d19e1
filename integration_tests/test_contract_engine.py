"""The wire contract as the real engine and the real executor service keep it together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import pytest

from blockyard.common.columns import pack_u32
from blockyard.common.protocol import ENGINE_PROTOCOL_VERSION
from blockyard.engine.v1 import engine_pb2 as pb
from executor_svc.backends.checking.runner import FakeOptions
from integration_tests.stack import INFO, check_all, expected, prompt, stack, submit_many

WINDOWS: Final = (1, 2, 3)
HELLO: Final = pb.Hello(protocol_version=ENGINE_PROTOCOL_VERSION)


@pytest.mark.parametrize("window", WINDOWS)
async def test_every_window_gives_the_same_output(window: int, tmp_path: Path) -> None:
    async with stack(tmp_path, FakeOptions(step_s=0.001), window=window) as system:
        await check_all(await submit_many(system.client, 24))
        shot = await system.client.idle()
        assert shot.counters.num_preemptions_by_recompute > 0
        assert not any(plan.epoch != shot.epoch for plan in system.runner.plans)


@pytest.mark.parametrize("window", WINDOWS)
async def test_the_window_is_filled_and_never_exceeded(window: int, tmp_path: Path) -> None:
    async with stack(tmp_path, window=window) as system:
        system.runner.gate.clear()
        output = system.client.submit(prompt(1, 4), 20)
        await system.plans(1)
        await asyncio.sleep(0.05)
        assert system.engine.client.num_in_flight == window
        system.runner.gate.set()
        await output.finished()


@pytest.mark.parametrize("window", WINDOWS)
async def test_a_stop_token_is_noticed_late_and_its_row_freed_in_the_next_plan(
    window: int, tmp_path: Path
) -> None:
    ids = prompt(2, 5)
    wanted = expected(ids, 20)
    async with stack(tmp_path, FakeOptions(step_s=0.005), window=window) as system:
        output = system.client.submit(ids, 20, stop_token_ids=[wanted[3]])
        finish = await output.finished()
        assert output.token_ids == wanted[:4]
        assert (finish.reason, finish.stop_token_id) == (pb.FINISH_REASON_STOP, wanted[3])
        plans = await system.plans(4 + window)
    # Step 4 samples the stop token; the window - 1 plans behind it were sent before its commit.
    assert [plan.freed_rows.size for plan in plans] == [0] * (3 + window) + [1]
    assert not plans[-1].same_batch
    assert not plans[-1].batch_rows.size  # nothing left to run: an empty plan says it


async def test_a_length_stop_costs_no_step(tmp_path: Path) -> None:
    async with stack(tmp_path, FakeOptions(step_s=0.002), window=3) as system:
        output = system.client.submit(prompt(3, 5), 6)
        await output.finished()
        await system.plans(7)
        assert len(system.plans_with_rows()) == 6
        assert system.runner.plans[-1].freed_rows.tolist() == [0]


async def test_an_abort_frees_in_the_next_plan_and_others_go_on(tmp_path: Path) -> None:
    async with stack(tmp_path, FakeOptions(step_s=0.005), window=1) as system:
        client = system.client
        aborted = client.submit(prompt(4, 5), 50)
        other = client.submit(prompt(5, 5), 20)
        await asyncio.gather(aborted.until(2), other.until(2))
        client.stop(aborted)
        shot = await client.snapshot()  # on the same channel, so after the stop was read
        num_plans = len(system.runner.plans)
        assert shot.num_running == 1
        await other.finished()
        assert other.token_ids == expected(prompt(5, 5), 20)
        assert not aborted.ended.is_set()
        freeing = [i for i, plan in enumerate(system.runner.plans) if plan.freed_rows.size]
        assert freeing[0] <= num_plans + 1
        await client.idle()


async def test_a_stop_string_found_by_the_front_end_truncates_usage(tmp_path: Path) -> None:
    async with stack(tmp_path, FakeOptions(step_s=0.002)) as system:
        output = system.client.submit(prompt(6, 5), 50)
        await output.until(5)
        system.client.stop(output, num_output_tokens=3)
        finish = await output.finished()
        assert (finish.reason, finish.num_output_tokens) == (pb.FINISH_REASON_STOP, 3)
        await system.client.idle()


async def test_a_row_without_finite_logits_fails_its_request_alone(tmp_path: Path) -> None:
    async with stack(tmp_path, FakeOptions(nan_seeds={666})) as system:
        bad = system.client.submit(prompt(7, 9), 20, seed=666)
        requests = await submit_many(system.client, 8)
        finish = await bad.finished()
        assert finish.reason == pb.FINISH_REASON_ERROR
        assert "not finite" in finish.error_message
        assert not bad.token_ids
        await check_all(requests)


async def test_the_same_seed_gives_the_same_tokens_in_any_company(tmp_path: Path) -> None:
    ids, sampling = prompt(8, 11), {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 2**63}
    outputs = []
    for number, company in enumerate((0, 3, 12)):
        directory = tmp_path / str(number)
        directory.mkdir()
        options = FakeOptions(order_seed=number)
        async with stack(directory, options, window=number + 1) as system:
            others = await submit_many(system.client, company)
            output = system.client.submit(ids, 24, **sampling)
            await output.finished()
            await check_all(others)
            outputs.append(output.token_ids)
    assert outputs == [expected(ids, 24, **sampling)] * 3
    assert outputs[0] != expected(ids, 24, **{**sampling, "seed": 1})


@pytest.mark.parametrize(
    ("num_prompt_tokens", "max_tokens", "message"),
    [(64, 1, "64"), (63, 2, "64"), (1000, 0, "64"), (0, 1, "empty")],
)
async def test_what_can_never_fit_is_refused(
    num_prompt_tokens: int, max_tokens: int, message: str, tmp_path: Path
) -> None:
    async with stack(tmp_path) as system:
        output = system.client.submit(prompt(9, num_prompt_tokens), max_tokens)
        await output.ended.wait()
        assert output.rejection is not None
        assert output.rejection.reason == ("TOO_LONG" if num_prompt_tokens else "INVALID_FIELD")
        assert message in output.rejection.message
        largest = system.client.submit(prompt(9, 60), 4)
        assert (await largest.finished()).num_output_tokens == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_token_ids": b"12345"}, "whole number"),
        ({"prompt_token_ids": pack_u32([INFO.vocab_size])}, "vocabulary"),
        ({"stop_token_ids": [INFO.vocab_size]}, "vocabulary"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"max_tokens": 2**32 - 1}, "exceed"),
    ],
    ids=str,
)
async def test_a_bad_submit_is_refused_by_itself(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    async with stack(tmp_path) as system:
        good = await submit_many(system.client, 2)
        bad = system.client.submit([1, 2, 3], **{"max_tokens": 5, "temperature": 0.5, **fields})
        await bad.ended.wait()
        assert bad.rejection is not None
        assert bad.rejection.reason in ("INVALID_FIELD", "TOO_LONG")
        assert message in bad.rejection.message
        await check_all(good)
        assert (await system.client.idle()).counters.num_recoveries == 0


async def test_a_request_id_in_use_is_refused(tmp_path: Path) -> None:
    async with stack(tmp_path, FakeOptions(step_s=0.005)) as system:
        call = system.client.stub.Connect()
        await call.write(pb.ConnectRequest(hello=HELLO))
        submit = pb.Submit(request_id=5, prompt_token_ids=pack_u32([1, 2]), max_tokens=40)
        await call.write(pb.ConnectRequest(submit=pb.SubmitBatch(submits=[submit, submit])))
        async for frame in call:
            if frame.output.rejections:
                assert frame.output.rejections[0].reason == "INTERNAL_ERROR"
                break
        call.cancel()
        await system.client.idle()


async def read_all(call: AsyncIterable[pb.ConnectResponse]) -> None:
    """Read a stream to its end. Raises AioRpcError if that is none."""
    async for _ in call:
        pass


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (
            pb.ConnectRequest(stop=pb.StopBatch(request_ids=[1, 2], num_output_tokens=[1])),
            "not parallel",
        ),
        (pb.ConnectRequest(stop=pb.StopBatch(request_ids=[1], branches=[1, 2])), "not parallel"),
        (pb.ConnectRequest(hello=HELLO), "hello"),
        (pb.ConnectRequest(), "None"),
    ],
    ids=["tokens not parallel", "branches not parallel", "second hello", "nothing"],
)
async def test_a_frame_that_does_not_belong_ends_the_stream(
    frame: pb.ConnectRequest, message: str, tmp_path: Path
) -> None:
    async with stack(tmp_path) as system:
        call = system.client.stub.Connect()
        await call.write(pb.ConnectRequest(hello=HELLO))
        submit = pb.Submit(request_id=1, prompt_token_ids=pack_u32([1, 2]), max_tokens=40)
        await call.write(pb.ConnectRequest(submit=pb.SubmitBatch(submits=[submit])))
        await call.write(frame)
        with pytest.raises(grpc.aio.AioRpcError, match=message) as caught:
            await asyncio.wait_for(read_all(call), 5)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await system.client.idle()  # what the stream still had is aborted
