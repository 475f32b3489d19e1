"""Envoy 1.40 in front of two front ends, as the sidecars and gateways of a mesh are."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc
import pytest

from blockyard.client import AsyncClient, BlockyardError
from blockyard.v1 import generate_pb2 as pb
from integration_tests.engine_client import EngineClient, num_held_slots
from integration_tests.mesh.envoy import CLUSTER_HEADER, HEALTH_INTERVAL_S, Envoy, running_envoy
from integration_tests.mesh.peer import free_port
from integration_tests.mesh.system import STEP_S, VOCAB_SIZE, System, check, prompt, running_system
from integration_tests.public_client import Answer, PublicClient
from integration_tests.reference import reference_output

pytestmark = pytest.mark.timeout(60)

LAME_DUCK_S = 1.0
NOTICE_S = 0.050
"""How long after a client's end its blocks may still be held, beside the step under way."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """Envoy before two front ends; a cluster `flaky` has one more that never has an engine."""

    system: System
    envoy: Envoy
    public: PublicClient

    @contextlib.asynccontextmanager
    async def engine(self) -> AsyncIterator[EngineClient]:
        async with EngineClient(self.system.processes.engine_address) as engine:
            await engine.ready()
            yield engine


@pytest.fixture(scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mesh]:
    directory = tmp_path_factory.mktemp("mesh")
    lonely_port = free_port()
    async with running_system(
        directory, 2, "--lame-duck-s", LAME_DUCK_S, "--drain-grace-s", 20
    ) as system:
        lonely, _ = system.processes.add_frontend(
            system.model,
            *("--engine", f"unix:{directory}/nobody.sock"),
            listen=f"127.0.0.1:{lonely_port}",
        )
        await lonely.start()
        clusters = {"blockyard": system.ports, "flaky": (lonely_port, system.ports[0])}
        async with (
            running_envoy(directory, clusters) as envoy,
            PublicClient(envoy.address) as public,
        ):
            await envoy.until_healthy("blockyard", system.ports)
            yield Mesh(system, envoy, public)


async def test_least_request_spreads_streams_over_both(mesh: Mesh) -> None:
    before = await mesh.envoy.hosts("blockyard")
    answers = await asyncio.gather(*(mesh.public.generate(prompt(n), 10) for n in range(40)))
    for number, answer in enumerate(answers):
        check(answer, number, 10)
    after = await mesh.envoy.hosts("blockyard")
    shares = [after[port]["rq_total"] - before[port]["rq_total"] for port in mesh.system.ports]
    assert sum(shares) == 40
    assert min(shares) >= 10, shares


async def test_a_refusal_before_the_first_message_is_retried_elsewhere(mesh: Mesh) -> None:
    retries = "cluster.flaky.upstream_rq_retry"
    before = await mesh.envoy.stat(retries)
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt(3)), stop=pb.StopConditions(max_tokens=5, ignore_eos=True)
    )
    request.sampling.temperature = 0
    for _ in range(10):
        answer = Answer()
        call = mesh.public.stub.Generate(request, metadata=((CLUSTER_HEADER, "flaky"),))
        await mesh.public.follow(call, answer)
        check(answer, 3, 5)
    assert await mesh.envoy.stat(retries) - before >= 2  # the lonely one was asked first


async def test_nothing_is_retried_after_the_first_message(mesh: Mesh) -> None:
    engine = mesh.system.processes.engine
    retries = "cluster.blockyard.upstream_rq_retry"
    before = await mesh.envoy.stat(retries)
    answer = Answer()
    stream = asyncio.create_task(mesh.public.follow(mesh.public.start(prompt(4), 2000), answer))
    while len(answer.token_ids) < 3:  # noqa: ASYNC110 - another task appends
        await asyncio.sleep(0.01)
    await engine.restart()
    await stream
    assert answer.code is grpc.StatusCode.UNAVAILABLE
    assert "engine was lost" in answer.details
    received = answer.token_ids
    assert received == reference_output(prompt(4), len(received), VOCAB_SIZE)
    assert await mesh.envoy.stat(retries) == before
    await asyncio.gather(*(mesh.system.serving(index) for index in range(2)))
    await mesh.envoy.until_healthy("blockyard", mesh.system.ports)
    check(await mesh.public.generate(prompt(4), 5), 4, 5)


async def test_errors_keep_their_details(mesh: Mesh) -> None:
    async with AsyncClient(mesh.envoy.address) as client:
        with pytest.raises(BlockyardError) as caught:
            await client.complete(token_ids=[1], max_tokens=10**6)
    error = caught.value
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "TOO_LONG")
    assert error.fields == ("stop.max_tokens",)


async def test_injected_faults_hit_only_whom_they_are_for(mesh: Mesh) -> None:
    def call(*headers: tuple[str, str]) -> tuple[asyncio.Task[None], Answer]:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt(5)),
            stop=pb.StopConditions(max_tokens=3, ignore_eos=True),
        )
        request.sampling.temperature = 0
        answer = Answer()
        stream = mesh.public.stub.Generate(request, metadata=headers)
        return asyncio.create_task(mesh.public.follow(stream, answer)), answer

    begin = time.monotonic()
    failing, failed = call(("x-envoy-fault-abort-grpc-request", "14"))
    late, delayed = call(("x-envoy-fault-delay-request", "400"))
    sound, untouched = call()
    await asyncio.gather(failing, sound)
    assert failed.code is grpc.StatusCode.UNAVAILABLE
    check(untouched, 5, 3)
    assert not late.done()
    await late
    assert time.monotonic() - begin >= 0.4
    check(delayed, 5, 3)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_who_leaves_frees_its_blocks_at_once(mesh: Mesh, how: str) -> None:
    times_s = []
    async with mesh.engine() as engine:
        for _ in range(5):
            answer = Answer()
            call = mesh.public.start(prompt(6), 3000, 0.4 if how == "deadline" else None)
            stream = asyncio.create_task(mesh.public.follow(call, answer))
            await engine.snapshot_when(lambda shot: num_held_slots(shot) > 0)
            if how == "cancel":
                await asyncio.sleep(0.1)
                call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await stream
            begin = time.monotonic()
            await engine.snapshot_when(lambda shot: num_held_slots(shot) == 0)
            times_s.append(time.monotonic() - begin)
            assert how == "cancel" or answer.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert statistics.median(times_s) <= STEP_S + NOTICE_S, times_s


async def test_200_streams_outlive_the_end_of_one_of_two_front_ends(mesh: Mesh) -> None:
    leaver, port = mesh.system.frontends[0], mesh.system.ports[0]
    # Several connections, as many clients would have.
    clients = [PublicClient(mesh.envoy.address) for _ in range(4)]
    async with contextlib.AsyncExitStack() as stack:
        for client in clients:
            await stack.enter_async_context(client)
        answers = [Answer() for _ in range(200)]
        streams = [
            asyncio.create_task(client.follow(client.start(prompt(number), 60), answers[number]))
            for number, client in zip(range(200), clients * 50, strict=True)
        ]
        while not all(answer.token_ids for answer in answers):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        active = {p: h["rq_active"] for p, h in (await mesh.envoy.hosts("blockyard")).items()}
        assert active[port] >= 50, active
        told_s = time.monotonic()
        leaver.send_signal(signal.SIGTERM)
        # And requests keep coming.
        late: list[Answer] = []
        while not all(stream.done() for stream in streams):
            late.append(await mesh.public.generate(prompt(len(late)), 3))
        await asyncio.gather(*streams)
    for number, answer in enumerate(answers):
        check(answer, number, 60)
    for number, answer in enumerate(late):
        check(answer, number, 3)
    assert await leaver.exit_code() == 0
    assert time.monotonic() - told_s >= LAME_DUCK_S > 2 * HEALTH_INTERVAL_S
    await mesh.envoy.until_healthy("blockyard", mesh.system.ports[1:])
    await leaver.start()
    await mesh.envoy.until_healthy("blockyard", mesh.system.ports)


async def test_front_ends_restarted_one_after_the_other_fail_nobody(mesh: Mesh) -> None:
    is_over = asyncio.Event()
    answers: list[tuple[int, Answer]] = []

    async def ask(client: PublicClient, number: int) -> None:
        while not is_over.is_set():
            answers.append((number, await client.generate(prompt(number), 5 + 5 * (number % 4))))

    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(PublicClient(mesh.envoy.address)) for _ in range(3)
        ]
        load = [asyncio.create_task(ask(clients[number % 3], number)) for number in range(24)]
        for index, frontend in enumerate(mesh.system.frontends):
            frontend.send_signal(signal.SIGTERM)
            assert await frontend.exit_code() == 0
            await frontend.start()
            await mesh.system.serving(index)
            await mesh.envoy.until_healthy("blockyard", mesh.system.ports)
        is_over.set()
        await asyncio.gather(*load)
    for number, answer in answers:
        check(answer, number, 5 + 5 * (number % 4))
    assert len(answers) >= 100
