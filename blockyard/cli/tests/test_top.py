"""`blockyard top` against an engine service that answers what the test says."""

from __future__ import annotations

import concurrent.futures
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import grpc
import pytest

from blockyard.cli.tests.conftest import Run
from blockyard.client.tests.scripted_server import ScriptedServer
from blockyard.common.grpc_options import LINK_OPTIONS
from blockyard.engine.v1 import engine_pb2 as pb
from blockyard.launcher.run_dir import create_run_dir, service_address


class FakeEngine:
    """Serves snapshots at `address`; each has 100 output tokens more than the one before."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.failure: grpc.StatusCode | None = None
        self.delay_s = 0.0
        self._num_output_tokens = 0
        self._server: grpc.Server | None = None

    def start(self) -> None:
        self._num_output_tokens = 0
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(2), options=LINK_OPTIONS)
        snapshot = grpc.unary_unary_rpc_method_handler(
            self._snapshot,
            request_deserializer=pb.SnapshotRequest.FromString,
            response_serializer=pb.SnapshotResponse.SerializeToString,
        )
        handler = grpc.method_handlers_generic_handler(
            "blockyard.engine.v1.EngineService", {"Snapshot": snapshot}
        )
        self._server.add_generic_rpc_handlers((handler,))
        self._server.add_insecure_port(self.address)
        self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop(0).wait()
            self._server = None

    def _snapshot(
        self, _: pb.SnapshotRequest, context: grpc.ServicerContext
    ) -> pb.SnapshotResponse:
        time.sleep(self.delay_s)
        if self.failure is not None:
            context.abort(self.failure, "by order")
        self._num_output_tokens += 100
        return pb.SnapshotResponse(
            device=pb.DevicePool(num_slots=48, num_stored=16, num_free=16, num_padding=16),
            counters=pb.Counters(num_output_tokens=self._num_output_tokens),
        )


@pytest.fixture(autouse=True)
def _empty_temp_dir(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No server of this machine's user is found."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("run")))


@pytest.fixture
def make_engine() -> Iterator[Callable[[], FakeEngine]]:
    """Starts engines where a launcher would."""
    engines: list[FakeEngine] = []

    def make() -> FakeEngine:
        engine = FakeEngine(service_address(create_run_dir(), "engine"))
        engines.append(engine)
        engine.start()
        return engine

    yield make
    for engine in engines:
        engine.stop()


@pytest.fixture
def engine(make_engine: Callable[[], FakeEngine]) -> FakeEngine:
    return make_engine()


def between_frames(monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], None]) -> None:
    """One second passes between two frames, and one of the actions; then comes Ctrl-C."""
    waiting = iter(actions)
    clock = SimpleNamespace(now=0.0)

    def sleep(seconds: float) -> None:
        action = next(waiting, None)
        if action is None:
            raise KeyboardInterrupt
        clock.now += seconds
        action()

    fake_time = SimpleNamespace(sleep=sleep, monotonic=lambda: clock.now)
    monkeypatch.setattr("blockyard.cli.top.time", fake_time)


def nothing() -> None:
    pass


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "somewhere"], "'somewhere' is not host:port, nor unix:/path"),
        (["--engine", ""], "'' is not host:port, nor unix:/path"),
        (["--engine", "host:99999"], "is not host:port"),
        (["--interval", "0"], "0.0 is not in 0.1 to 3600.0"),
        (["--interval", "nan"], "nan is not in"),
        (["--interval", "inf"], "inf is not in"),
        (["--interval", "soon"], "not a valid float"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, run: Run) -> None:
    outcome = run("top", *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_no_server(run: Run) -> None:
    outcome = run("top")
    assert (outcome.exit_code, outcome.out) == (1, "")
    assert outcome.err == "blockyard: no server runs here; start one with: blockyard serve\n"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "unix:/no/such/socket"])
def test_no_engine_at_the_address(address: str, run: Run) -> None:
    outcome = run("top", "--engine", address)
    assert (outcome.exit_code, outcome.err) == (1, f"blockyard: no engine at {address}\n")


def test_several_servers_have_to_be_told_apart(
    run: Run, make_engine: Callable[[], FakeEngine]
) -> None:
    addresses = sorted(make_engine().address for _ in range(2))
    outcome = run("top", "--once")
    assert outcome.exit_code == 1
    assert outcome.err == (
        "blockyard: several servers run here; choose one:\n"
        f"  --engine {addresses[0]}\n  --engine {addresses[1]}\n"
    )


def test_a_public_server_is_not_an_engine(run: Run, server: ScriptedServer) -> None:
    outcome = run("top", "--engine", server.address)
    assert outcome.exit_code == 1
    assert outcome.err == f"blockyard: what listens at {server.address} is not an engine\n"


def test_an_engine_that_fails_ends_it(run: Run, engine: FakeEngine) -> None:
    engine.failure = grpc.StatusCode.INTERNAL
    outcome = run("top")
    assert (outcome.exit_code, outcome.err) == (1, "blockyard: INTERNAL: by order\n")


def test_an_engine_that_does_not_answer(
    run: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockyard.cli.top._ANSWER_TIMEOUT_S", 0.1)
    engine.delay_s = 0.5
    outcome = run("top", "--engine", engine.address)
    assert outcome.exit_code == 1
    assert outcome.err == f"blockyard: the engine at {engine.address} does not answer\n"


# ---- frames


def test_help(run: Run) -> None:
    outcome = run("top", "--help")
    assert outcome.exit_code == 0
    assert outcome.out.startswith("Usage: blockyard top")


def test_once_measures_one_interval(
    run: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    between_frames(monkeypatch, nothing)
    outcome = run("top", "--once", "--interval", "2")
    assert outcome.exit_code == 0
    assert outcome.out.startswith(f"blockyard top  {engine.address}\n"[:80])
    assert "tokens/s  0.0 in  50.0 out\n" in outcome.out
    assert "\x1b" not in outcome.out


def test_frames_until_ctrl_c(run: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    between_frames(monkeypatch, nothing, nothing)
    outcome = run("top")
    assert (outcome.exit_code, outcome.err) == (0, "")
    rates = [line for line in outcome.out.splitlines() if line.startswith("tokens/s")]
    assert rates == ["tokens/s  - in  - out", *["tokens/s  0.0 in  100 out"] * 2]


@pytest.mark.parametrize("is_given", [False, True])
def test_an_engine_that_goes_away_is_waited_for(
    is_given: bool, run: Run, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    between_frames(monkeypatch, engine.stop, nothing, engine.start, nothing)
    outcome = run("top", *(["--engine", engine.address] if is_given else []))
    assert (outcome.exit_code, outcome.err) == (0, "")
    lost = f"no engine at {engine.address}"
    still_lost = lost if is_given else "no server runs here"
    assert [
        line.partition(";")[0]
        for line in outcome.out.splitlines()
        if line.startswith(("no ", "trying", "tokens/s"))
    ] == [
        "tokens/s  - in  - out",
        *(lost, "trying again"),
        *(still_lost, "trying again"),
        "tokens/s  - in  - out",
        "tokens/s  0.0 in  100 out",
    ]


def test_another_server_is_found_after_the_first_has_ended(
    run: Run, make_engine: Callable[[], FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_engine(), FakeEngine(service_address(create_run_dir(), "engine"))
    between_frames(monkeypatch, first.stop, second.start)
    try:
        outcome = run("top")
    finally:
        second.stop()
    assert f"blockyard top  {first.address}"[:80] in outcome.out
    assert outcome.out.rindex("trying again") < outcome.out.rindex(second.address[:60])


def test_a_terminal_is_drawn_over_and_ctrl_c_is_clean(engine: FakeEngine) -> None:
    ours, theirs = pty.openpty()
    code = "from blockyard.cli.main import main; raise SystemExit(main())"
    arguments = ["top", "--engine", engine.address, "--interval", "0.1"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        os.close(theirs)
        shown = ""
        while shown.count("\x1b[H") < 3:
            shown += os.read(ours, 4096).decode()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    os.close(ours)
    assert (process.returncode, errors) == (0, "")
    assert shown.startswith("\x1b[2J\x1b[Hblockyard top  ")
    assert "\x1b[32m#" in shown  # green
