"""grpcurl and buf curl: what people type. They know the API by reflection alone."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from integration_tests.mesh.system import VOCAB_SIZE, System, prompt, running_system
from integration_tests.mesh.tools import BUF, GRPCURL, need
from integration_tests.reference import reference_output

pytestmark = pytest.mark.timeout(60)

SERVICE = "blockyard.v1.GenerateService"
HEALTH = "grpc.health.v1.Health"
NUM_TOKENS = 6


@pytest.fixture(scope="module")
async def system(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    directory = tmp_path_factory.mktemp("curl")
    async with running_system(directory, 1, "--admin", f"unix:{directory}/admin.sock") as system:
        yield system


class Curl:
    """Either program, with the flags that let them do the same."""

    def __init__(self, binary: Path, address: str, *, is_buf: bool) -> None:
        self._binary, self._address, self._is_buf = binary, address, is_buf
        is_socket = address.startswith("/")
        self._server = ("-unix", address) if is_socket else (address,)

    async def services(self) -> list[str]:
        """Names of the services."""
        if self._is_buf:
            code, out, error = await self._run(
                *("curl", "--http2-prior-knowledge", "--protocol", "grpc", "--list-services"),
                f"http://{self._address}",
            )
        else:
            code, out, error = await self._run("-plaintext", *self._server, "list")
        assert code == 0, error
        return out.split()

    async def call(self, method: str, request: object) -> tuple[int, list[Any], str]:
        """Exit code, messages, and what it says of an error."""
        data = json.dumps(request)
        if self._is_buf:
            flags = ("--http2-prior-knowledge", "--protocol", "grpc", "--data", data)
            url = f"http://{self._address}/{method}"
            code, out, error = await self._run("curl", *flags, url)
        else:
            code, out, error = await self._run(*("-plaintext", "-d", data, *self._server, method))
        return code, _messages(out), _with_details(error)

    async def _run(self, *words: str) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(str(self._binary), *words),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, error = await asyncio.wait_for(process.communicate(), 20)
        assert process.returncode is not None
        return process.returncode, out.decode(), error.decode()


def _with_details(error: str) -> str:
    """buf prints details as they are on the wire."""
    values = re.findall(r'"value": "([^"]*)"', error)
    details = (base64.b64decode(value + "==").decode(errors="replace") for value in values)
    return "\n".join([error, *details])


def _messages(text: str) -> list[Any]:
    """JSON documents, one after another, with the names that the proto gives their fields."""
    decoder, found, rest = json.JSONDecoder(), [], text.lstrip()
    while rest:
        message, end = decoder.raw_decode(rest)
        found.append({re.sub("[A-Z]", _underscored, name): message[name] for name in message})
        rest = rest[end:].lstrip()
    return found


def _underscored(capital: re.Match[str]) -> str:
    return f"_{capital[0].lower()}"


@pytest.fixture(params=["grpcurl", "buf"])
def curl(request: pytest.FixtureRequest, system: System) -> Curl:
    is_buf = request.param == "buf"
    return Curl(need(BUF if is_buf else GRPCURL), system.address(0), is_buf=is_buf)


async def test_list(curl: Curl) -> None:
    assert {SERVICE, HEALTH} <= set(await curl.services())


async def test_stream(curl: Curl) -> None:
    request = {
        "tokenIds": {"ids": prompt(1)},
        "sampling": {"temperature": 0},
        "stop": {"maxTokens": NUM_TOKENS, "ignoreEos": True},
    }
    code, messages, error = await curl.call(f"{SERVICE}/Generate", request)
    assert code == 0, error
    token_ids = [token_id for message in messages for token_id in message.get("token_ids", [])]
    assert token_ids == reference_output(prompt(1), NUM_TOKENS, VOCAB_SIZE)
    assert len(messages) > 1
    assert "usage" in messages[-1]


async def test_error(curl: Curl) -> None:
    request = {"prompt": "a", "stop": {"maxTokens": 0}}
    code, messages, error = await curl.call(f"{SERVICE}/Generate", request)
    assert code != 0
    assert not messages
    for word in ("stop.max_tokens", "INVALID_FIELD", "blockyard.v1"):
        assert word in error


@pytest.mark.parametrize("name", ["", SERVICE, "liveness", "progress"])
async def test_health(curl: Curl, name: str) -> None:
    code, messages, error = await curl.call(f"{HEALTH}/Check", {"service": name})
    assert code == 0, error
    assert messages == [{"status": "SERVING"}]


async def test_health_of_an_unknown_name(curl: Curl) -> None:
    code, _, error = await curl.call(f"{HEALTH}/Check", {"service": "nobody"})
    assert code != 0
    assert "unknown service 'nobody'" in error


async def test_channelz_is_for_operators_only(system: System) -> None:
    """Peers' addresses are nobody else's business: the public port does not tell them."""
    binary = need(GRPCURL)
    public = Curl(binary, system.address(0), is_buf=False)
    assert "grpc.channelz.v1.Channelz" not in await public.services()
    admin = system.processes.frontends[0].log_path.parent / "admin.sock"
    operator = Curl(binary, str(admin), is_buf=False)
    assert "grpc.channelz.v1.Channelz" in await operator.services()
    code, messages, error = await operator.call("grpc.channelz.v1.Channelz/GetServers", {})
    assert code == 0, error
    assert len(messages[0]["server"]) == 2
    code, messages, _ = await operator.call(f"{HEALTH}/Check", {"service": "progress"})
    assert (code, messages) == (0, [{"status": "SERVING"}])
