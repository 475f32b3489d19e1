"""nginx and haproxy with a few lines of configuration: streams pass unbuffered."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import statistics
import time
from collections.abc import AsyncIterator

import grpc
import pytest

from blockyard.client import AsyncClient, BlockyardError
from integration_tests.engine_client import EngineClient, num_held_slots
from integration_tests.mesh.peer import free_port, running_peer
from integration_tests.mesh.system import (
    MAX_STREAMS,
    STEP_S,
    VOCAB_SIZE,
    System,
    check,
    prompt,
    running_system,
)
from integration_tests.mesh.tools import HAPROXY, NGINX, need
from integration_tests.public_client import Answer, PublicClient
from integration_tests.reference import reference_output

pytestmark = pytest.mark.timeout(60)

NGINX_CONFIG = """
daemon off;
master_process off;
pid {directory}/nginx.pid;
error_log stderr;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {directory}/body;
  fastcgi_temp_path {directory}/fastcgi;
  proxy_temp_path {directory}/proxy;
  scgi_temp_path {directory}/scgi;
  uwsgi_temp_path {directory}/uwsgi;
  http2_max_concurrent_streams {max_streams};
  keepalive_requests 1000000;
  grpc_read_timeout 1h;
  grpc_send_timeout 1h;
  server {{
    listen 127.0.0.1:{port} http2;
    location / {{ grpc_pass grpc://{upstream}; }}
  }}
}}
"""

HAPROXY_CONFIG = """
global
  tune.h2.max-concurrent-streams {max_streams}
defaults
  mode http
  timeout connect 5s
  timeout client 1h
  timeout server 1h
frontend public
  bind 127.0.0.1:{port} proto h2
  default_backend blockyard
backend blockyard
  server frontend {upstream} proto h2
"""


@pytest.fixture(scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    async with running_system(tmp_path_factory.mktemp("plain"), 1) as system:
        yield system


@pytest.fixture(scope="module", params=["nginx", "haproxy"])
async def proxy(
    request: pytest.FixtureRequest, system: System, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[str]:
    """Address of a proxy in front of the system."""
    is_nginx = request.param == "nginx"
    binary = need(NGINX if is_nginx else HAPROXY)
    directory, port = tmp_path_factory.mktemp("proxy"), free_port()
    config = directory / "proxy.conf"
    text = (NGINX_CONFIG if is_nginx else HAPROXY_CONFIG).format(
        directory=directory, port=port, upstream=system.address(0), max_streams=MAX_STREAMS
    )
    config.write_text(text)
    command = [binary, *(("-e", "stderr", "-c") if is_nginx else ("-db", "-f")), config]
    async with running_peer(directory, request.param, command, port):
        yield f"127.0.0.1:{port}"


async def test_tokens_pass_as_they_come(proxy: str) -> None:
    num_tokens = 25
    async with PublicClient(proxy) as client:
        arrived_s, answer = [], Answer()
        async for message in client.start(prompt(1), num_tokens):
            arrived_s.append(time.monotonic())
            answer.add(message)
    assert answer.token_ids == reference_output(prompt(1), num_tokens, VOCAB_SIZE)
    assert answer.num_messages >= num_tokens
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(arrived_s)]
    assert 0.5 * STEP_S <= statistics.median(gaps_s) <= 1.5 * STEP_S, gaps_s


async def test_streams_of_one_connection_run_together(proxy: str) -> None:
    num_streams, num_tokens = MAX_STREAMS, 10
    async with PublicClient(proxy) as client:
        begin = time.monotonic()
        streams = (client.generate(prompt(number), num_tokens) for number in range(num_streams))
        answers = await asyncio.gather(*streams)
        elapsed_s = time.monotonic() - begin
    for number, answer in enumerate(answers):
        check(answer, number, num_tokens)
    assert elapsed_s < 10, "some waited for others to end"


async def test_errors_keep_their_details(proxy: str) -> None:
    async with AsyncClient(proxy) as client:
        with pytest.raises(BlockyardError) as caught:
            await client.complete(token_ids=[1], max_tokens=10**6)
    assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", "TOO_LONG")
    assert caught.value.fields == ("stop.max_tokens",)


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_who_leaves_frees_its_blocks(proxy: str, system: System, how: str) -> None:
    async with (
        PublicClient(proxy) as client,
        EngineClient(system.processes.engine_address) as engine,
    ):
        await engine.ready()
        answer = Answer()
        call = client.start(prompt(2), 3000, 0.5 if how == "deadline" else None)
        stream = asyncio.create_task(client.follow(call, answer))
        await engine.snapshot_when(lambda shot: num_held_slots(shot) > 0)
        if how == "cancel":
            await asyncio.sleep(0.1)
            call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stream
        begin = time.monotonic()
        await engine.snapshot_when(lambda shot: num_held_slots(shot) == 0)
        assert time.monotonic() - begin <= 1.0
        assert how == "cancel" or answer.code is grpc.StatusCode.DEADLINE_EXCEEDED
