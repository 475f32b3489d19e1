"""The real services, started and supervised, on a tiny random model."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pydantic
import pytest

from blockyard.client import AsyncClient, BlockyardError, Client, Tls
from blockyard.common.tests.authority import Authority
from blockyard.launcher.child import ChildSpec, ServeError
from blockyard.launcher.commands import frontend_spec, service_specs
from blockyard.launcher.config import ServeSettings
from blockyard.launcher.server import LocalServer
from blockyard.models import store
from blockyard.models.tests.tiny_gguf import TinyGguf

Folders = pytest.TempPathFactory


@pytest.fixture(scope="module")
def model(tmp_path_factory: Folders) -> Path:
    """An imported model directory."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKYARD_HOME", str(folder))
        return store.resolve(str(TinyGguf().write(folder / "tiny.gguf")), is_quiet=True)


def _settings(model: Path, listen: str = "127.0.0.1:0") -> ServeSettings:
    return ServeSettings(model=str(model), listen=listen, kv_memory="16MiB", num_threads=1)


def _child_specs(settings: ServeSettings) -> list[ChildSpec]:
    """Of executor, engine and the first front end."""
    model, run_dir = Path("model"), Path("run")
    frontend = frontend_spec(settings, model, run_dir, "127.0.0.1:1", "unix:run/admin.sock", 0)
    return [*service_specs(settings, model, run_dir), frontend]


def _executor_flags(settings: ServeSettings) -> dict[str, str]:
    """Flag -> value; the executor's flags without a value do not count."""
    executor, *_ = _child_specs(settings)
    assert executor.name == "executor"
    words = [word for word in executor.command[3:] if word != "--exit-with-parent"]
    return dict(zip(words[::2], words[1::2], strict=True))


def test_engine_and_front_ends_are_traced_if_asked() -> None:
    for settings, is_traced in (
        (ServeSettings(), False),
        (ServeSettings(otlp_endpoint="collector:4317", trace_sample_ratio=0.5, frontends=2), True),
    ):
        _, *others = _child_specs(settings)
        for spec in others:
            flags = " ".join(spec.command)
            wanted = "--otlp-endpoint collector:4317 --trace-sample-ratio 0.5"
            assert (wanted in flags) == is_traced


def test_security_settings_reach_the_front_ends() -> None:
    settings = ServeSettings(
        tls_cert=Path("c"),
        tls_key=Path("k"),
        tls_client_ca=Path("a"),
        auth_tokens=Path("t"),
        max_client_streams=3,
        max_prompt_tokens=5,
        log_contents=True,
    )
    *services, frontend = _child_specs(settings)
    flags = " ".join(frontend.command)
    wanted = "--tls-cert c --tls-key k --tls-client-ca a --auth-tokens t"
    assert f"{wanted} --max-client-streams 3 --max-prompt-tokens 5" in flags
    for spec in services:
        assert "--tls-cert" not in spec.command
    assert all("--log-contents" in spec.command for spec in (*services, frontend))


_DEVICE_FLAGS = {"--device", "--load-format", "--gpu-memory-utilization", "--kv-memory"}


def test_what_is_not_set_is_left_to_the_executor() -> None:
    assert not _executor_flags(ServeSettings()).keys() & _DEVICE_FLAGS


def test_device_settings_reach_the_executor_alone() -> None:
    settings = ServeSettings(
        device="cuda", load_format="dummy", gpu_memory_utilization=0.85, kv_memory="4GiB"
    )
    flags = _executor_flags(settings)
    assert {flag: flags[flag] for flag in _DEVICE_FLAGS} == {
        "--device": "cuda",
        "--load-format": "dummy",
        "--gpu-memory-utilization": "0.85",
        "--kv-memory": "4GiB",
    }
    for spec in _child_specs(settings)[1:]:
        assert not set(spec.command) & _DEVICE_FLAGS


@pytest.mark.parametrize(
    "values",
    [
        {"device": "tpu"},
        {"load_format": "gguf"},
        {"gpu_memory_utilization": 0},
        {"gpu_memory_utilization": 1.5},
        {"kv_memory": "lots"},
        {"otlp_endpoint": "collector"},
        {"trace_sample_ratio": 2},
    ],
)
def test_impossible_device_settings_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(pydantic.ValidationError, match=next(iter(values))):
        ServeSettings.model_validate(values)


@pytest.fixture
async def server(model: Path) -> AsyncIterator[LocalServer]:
    async with LocalServer(_settings(model)) as running:
        yield running


async def _generate(address: str) -> tuple[int, ...]:
    """Greedy tokens; retried while a part of the server is replaced."""
    deadline = time.monotonic() + 60
    async with AsyncClient(address) as client:
        while True:
            try:
                completion = await client.complete(
                    "the and the", temperature=0, max_tokens=8, ignore_eos=True, timeout=30
                )
            except BlockyardError as error:
                if error.code != "UNAVAILABLE" or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)
            else:
                return completion.token_ids


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def _until_replaced(server: LocalServer, name: str, pid: int) -> None:
    deadline = time.monotonic() + 30
    while server.pids.get(name, pid) == pid:
        assert time.monotonic() < deadline, f"{name} was not replaced"
        await asyncio.sleep(0.02)


async def test_every_part_is_replaced_and_the_answer_stays(server: LocalServer) -> None:
    assert server.pids.keys() == {"executor", "engine", "frontend"}
    expected = await _generate(server.address)
    assert len(expected) == 8
    for name in ("frontend", "engine", "executor"):
        pid = server.pids[name]
        os.kill(pid, signal.SIGKILL)
        await _until_replaced(server, name, pid)
        assert await _generate(server.address) == expected, name


async def test_a_hung_executor_is_replaced(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKYARD_ENGINE_HEARTBEAT_TIMEOUT_S", "2")
    async with LocalServer(_settings(model)) as server:
        expected = await _generate(server.address)
        pid = server.pids["executor"]
        os.kill(pid, signal.SIGSTOP)
        await _until_replaced(server, "executor", pid)
        assert await _generate(server.address) == expected
        assert not _is_running(pid)


async def test_leaving_ends_everything_and_leaves_no_files(model: Path) -> None:
    async with LocalServer(_settings(model)) as server:
        pids = list(server.pids.values())
        run_dir = server._run_dir
        assert run_dir is not None
        assert run_dir.stat().st_mode & 0o777 == 0o700
    assert not any(_is_running(pid) for pid in pids)
    assert not run_dir.exists()


async def test_clients_learn_what_computes(server: LocalServer) -> None:
    async with AsyncClient(server.address) as client:
        assert (await client.model()).device.startswith("cpu")


async def test_several_front_ends_share_the_port(model: Path) -> None:
    settings = _settings(model).model_copy(update={"frontends": 2})
    async with LocalServer(settings) as server:
        assert {"frontend-0", "frontend-1"} <= server.pids.keys()
        assert len(await _generate(server.address)) == 8


async def test_a_taken_port_is_a_configuration_error(server: LocalServer, model: Path) -> None:
    with pytest.raises(ServeError, match="in use") as caught:
        async with LocalServer(_settings(model, listen=server.address)):
            pass
    assert caught.value.exit_code == 2


async def test_a_taken_metrics_port_is_told_and_serving_goes_on(model: Path) -> None:
    lines: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        settings = _settings(model).model_copy(update={"metrics_address": address})
        async with LocalServer(settings, lambda _name, line: lines.append(line)) as server:
            assert len(await _generate(server.address)) == 8
    assert any(f"metrics: cannot listen on {address}" in line for line in lines)


async def test_memory_too_small_is_a_configuration_error(model: Path) -> None:
    settings = _settings(model).model_copy(update={"kv_memory": "1KiB"})
    with pytest.raises(ServeError, match="cannot run with these settings") as caught:
        async with LocalServer(settings):
            pass
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"\x00" * 100, r"executor cannot run.*model\.safetensors: not a"),
        ("tokenizer.json", b"{}", r"frontend cannot run.*tokenizer\.json: cannot be used"),
        ("chat_template.jinja", b"{% if %}", "frontend cannot run.*template does not compile"),
    ],
)
async def test_a_damaged_model_is_a_configuration_error(
    file: str, content: bytes, message: str, model: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "damaged")
    (tmp_path / "damaged" / file).write_bytes(content)
    with pytest.raises(ServeError, match=f"(?s){message}") as caught:
        async with LocalServer(_settings(tmp_path / "damaged")):
            pass
    assert caught.value.exit_code == 2


async def test_a_proxy_is_not_asked_for_this_machine(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with LocalServer(_settings(model)) as server:
        assert len(await _generate(server.address)) == 8


def _serve(model: Path, *more_flags: str) -> subprocess.Popen[str]:
    flags = ["--model", str(model), "--listen", "127.0.0.1:0", "--kv-memory", "16MiB"]
    code = "from blockyard.cli.main import main; raise SystemExit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, "serve", "--num-threads", "1", *flags, *more_flags],
        stderr=subprocess.PIPE,
        text=True,
    )


def _until_ready(launcher: subprocess.Popen[str]) -> tuple[str, list[int]]:
    """Read the start-up lines; returns the address and the pids of the children."""
    assert launcher.stderr is not None
    pids = []
    for line in launcher.stderr:
        words = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if " serve: started " in line:
            pids.append(int(words["pid"]))
        if " serve: ready " in line:
            return words["address"], pids
    raise AssertionError("the launcher ended")


def test_killing_the_launcher_leaves_no_orphans(model: Path) -> None:
    with _serve(model) as launcher:
        _, pids = _until_ready(launcher)
        assert len(pids) == 3
        assert all(map(_is_running, pids))
        launcher.kill()
    deadline = time.monotonic() + 5
    while any(map(_is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_signal_replaces_the_front_end_and_its_stream_goes_on(model: Path) -> None:
    with _serve(model) as launcher:
        address, pids = _until_ready(launcher)
        assert launcher.stderr is not None
        with Client(address) as client:
            chunks = client.generate("the", temperature=0, max_tokens=100, ignore_eos=True)
            tokens = list(next(chunks).token_ids)
            launcher.send_signal(signal.SIGUSR2)
            for chunk in chunks:
                tokens += chunk.token_ids
            assert len(tokens) == 100
            log = []
            for line in launcher.stderr:
                log.append(line)
                if "rolling restart done" in line:
                    break
            assert sum("started frontend" in line for line in log) == 1
            assert sum(map(_is_running, pids)) == len(pids) - 1
            assert len(client.complete("the", temperature=0, max_tokens=5).token_ids) <= 5
        launcher.terminate()
        launcher.communicate(timeout=30)
        assert launcher.returncode == 0


def test_a_second_signal_ends_all_at_once(model: Path) -> None:
    with _serve(model, "--lame-duck-s", "30") as launcher:
        _, pids = _until_ready(launcher)
        launcher.terminate()
        time.sleep(0.3)
        assert all(map(_is_running, pids))
        begin = time.monotonic()
        launcher.terminate()
        launcher.communicate(timeout=30)
        assert launcher.returncode == 128 + signal.SIGTERM
        assert time.monotonic() - begin < 5
    assert not any(map(_is_running, pids))


def test_interrupt_lets_streams_finish_in_order(model: Path) -> None:
    with _serve(model) as launcher:
        address, pids = _until_ready(launcher)
        with Client(address) as client:
            chunks = client.generate("the", temperature=0, max_tokens=100, ignore_eos=True)
            tokens = list(next(chunks).token_ids)
            launcher.send_signal(signal.SIGINT)
            for chunk in chunks:
                tokens += chunk.token_ids
        assert len(tokens) == 100
        launcher.communicate(timeout=30)
        assert launcher.returncode == 0
    assert not any(map(_is_running, pids))


async def test_a_server_with_tls_and_tokens(model: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair, own = authority.issue("server", "127.0.0.1"), authority.issue("own", "alice.example")
    token = "alice-0123456789abcdef"
    (tmp_path / "tokens").write_text(f"alice {token}\n")
    secured = {
        "tls_cert": pair.cert,
        "tls_key": pair.key,
        "tls_client_ca": authority.ca,
        "auth_tokens": tmp_path / "tokens",
    }
    tls = Tls(authority.ca, own.cert, own.key)
    async with LocalServer(_settings(model).model_copy(update=secured)) as server:
        async with AsyncClient(server.address, tls=tls, token=token) as client:
            answer = await client.complete(token_ids=[1, 2], max_tokens=2, ignore_eos=True)
            assert len(answer.choices[0].token_ids) == 2
        async with AsyncClient(server.address, tls=tls) as other:
            with pytest.raises(BlockyardError) as caught:
                await other.model()
            assert caught.value.reason == "UNAUTHENTICATED"
