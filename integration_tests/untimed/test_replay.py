"""Record an engine's part and replay it: the same plans, the same results; and that it can fail."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from blockyard.cli.tests.conftest import Run, run  # noqa: F401 - a fixture
from blockyard.engine.v1 import engine_pb2
from blockyard.engine.v1 import plan_log_pb2 as log_pb
from blockyard.executor.v1 import executor_pb2 as pb
from blockyard.replay.difference import Difference, Steps
from blockyard.replay.run import Replay, ReplayError
from executor_svc.backends.checking.runner import FakeOptions, FakeRunner
from integration_tests.random_walk import Walk, walk
from integration_tests.recorded_session import RecordedSession
from integration_tests.stack import check_all, prompt, stack, submit_many
from integration_tests.walk_log import record_failure
from integration_tests.walk_request import OutputMismatchError
from scheduler_svc import planner
from scheduler_svc.plan_log import PlanLog
from scheduler_svc.plan_log_reader import _EVENTS, Event, PlanLogReader
from scheduler_svc.policy import Policy

NUM_STEPS: Final = 10_000
NUM_STEPS_SMALL: Final = 300
EVERY_STEP: Final = Steps()


Changed = Callable[[Callable[[list[Event]], object]], Path]


@pytest.fixture(scope="module")
def small_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "plans.log"
    RecordedSession(path, seed=1).record(NUM_STEPS_SMALL)
    return path


@pytest.fixture
def changed(small_log: Path, tmp_path: Path) -> Changed:
    """Writes the small log again, after its events were changed in place."""

    def change(how: Callable[[list[Event]], object]) -> Path:
        events = list(PlanLogReader([small_log]))
        how(events)
        path = tmp_path / "changed.log"
        path.unlink(missing_ok=True)
        log = PlanLog(path, Policy())
        kinds = {event_type: kind for kind, event_type in _EVENTS.items()}
        for event in events:
            log._write(kinds[type(event)], event)  # type: ignore[arg-type]  # an int
        log.close()
        return path

    return change


def replay(*paths: Path, steps: Steps = EVERY_STEP) -> Replay:
    done = Replay(paths, scheduler=True, executor=True, steps=steps)
    done.run(lambda _num_bytes: None)
    return done


def difference(paths: Sequence[Path], half: str) -> Difference:
    found = replay(*paths).differences
    assert half in found, "no difference was found"
    return found[half]


def nth(events: list[Event], event_type: type[Any], index: int) -> Any:
    return [event for event in events if isinstance(event, event_type)][index]


# ---- what cannot be replayed


def test_what_is_not_a_log(run: Run, tmp_path: Path) -> None:  # noqa: F811 - the fixture
    path = tmp_path / "x"
    assert run("replay", str(path)).exit_code == 2
    path.write_text("something else, and long enough")
    outcome = run("replay", str(path))
    assert outcome.exit_code == 2
    assert outcome.err == f"blockyard: {path}, byte 0: not a plan log\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument 'FILE...'"),
        (["x", "--from", "0"], "--from"),
        (["x", "--from", "9", "--to", "8"], "8 is before --from 9"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, run: Run) -> None:  # noqa: F811
    outcome = run("replay", *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.err


def test_a_log_that_was_cut_off_is_replayed_so_far(
    run: Run,  # noqa: F811
    small_log: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "cut.log"
    path.write_bytes(small_log.read_bytes()[:-1])
    outcome = run("replay", str(path))
    assert outcome.exit_code == 2
    assert "plans identical" in outcome.out
    assert "but only" in outcome.err


def test_an_unknown_policy(tmp_path: Path) -> None:
    path = tmp_path / "plans.log"
    log = PlanLog(None, Policy())
    log._header.policy.preemption = "prayer"
    log._file = log._create(path)
    log.close()
    with pytest.raises(ReplayError, match="prayer"):
        replay(path)


def test_another_version_is_told(run: Run, tmp_path: Path) -> None:  # noqa: F811
    path = tmp_path / "plans.log"
    log = PlanLog(None, Policy())
    log._header.software_version = "0.0.1"
    log._file = log._create(path)
    log.close()
    outcome = run("replay", str(path))
    assert outcome.exit_code == 0
    assert outcome.err == "recorded by blockyard 0.0.1, which may have planned otherwise\n"
    assert "0 plans legal; results not compared, they are of no executor" in outcome.out


# ---- the same again


def test_ten_thousand_steps_are_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "plans.log"
    session = RecordedSession(path, seed=2, max_file_bytes=1_000_000)
    session.record(NUM_STEPS)
    assert min(dataclasses.astuple(session.counts)) > 3, session.counts
    counters = dataclasses.asdict(session.scheduler.snapshot().counters)
    assert min(counters.values()) > 3, counters
    files = list(tmp_path.iterdir())
    assert len(files) > 1
    done = replay(*files)
    assert not done.differences
    assert f"{session.num_plans} plans identical" in done.halves["scheduler"].summary
    assert f"{session.num_plans} plans legal" in done.halves["executor"].summary


def test_the_hash_does_not_depend_on_the_process(small_log: Path) -> None:
    """Prefix-cache keys, the order of sets of strings and addresses differ between processes."""
    command = "import sys; from blockyard.cli.main import main; sys.exit(main())"
    outputs = [
        subprocess.run(
            [sys.executable, "-c", command, "replay", str(small_log)],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in (1, 2)
    ]
    assert outputs[0] == outputs[1]
    assert "plans identical, sha256 " in outputs[0]


def test_replay_needs_no_device_library() -> None:
    libraries = ("torch", "transformers", "cupy", "numba")
    check = f"import blockyard.cli.replay, sys; sys.exit(str(sys.modules.keys() & {libraries}))"
    done = subprocess.run(
        [sys.executable, "-c", check], check=False, capture_output=True, text=True
    )
    assert done.stderr == "set()\n"


def test_one_half(run: Run, small_log: Path) -> None:  # noqa: F811
    for half, other in (("scheduler", "executor"), ("executor", "scheduler")):
        outcome = run("replay", str(small_log), f"--{half}")
        assert (outcome.exit_code, outcome.err) == (0, "")
        assert f"{half}: " in outcome.out
        assert other not in outcome.out


def test_some_steps(run: Run, small_log: Path) -> None:  # noqa: F811
    outcome = run("replay", str(small_log), "--from", "5", "--to", "20")
    assert outcome.exit_code == 0
    assert "20 plans identical from step 5 on" in outcome.out
    assert "20 plans legal, 16 results identical" in outcome.out


def test_results_of_a_real_device_are_not_compared(changed: Changed) -> None:
    def move_elsewhere(events: list[Event]) -> None:
        for event in events:
            if isinstance(event, log_pb.EpochBegin):
                event.executor.device = "abacus"

    done = replay(changed(move_elsewhere))
    assert not done.differences
    summary = done.halves["executor"].summary
    assert summary.endswith("plans legal; results not compared, they are of abacus")


@pytest.mark.parametrize("seed", range(5))
def test_walks_are_the_same_again(seed: int) -> None:
    """With losses, restarts, other sizes, poisoned rows."""
    path = record_failure(lambda make: Walk(seed, make_scheduler=make).run())
    assert not replay(path).differences
    shutil.rmtree(path.parent)


def test_a_failed_walk_says_where_its_log_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeRunner, *arguments: object) -> np.ndarray:
        return np.zeros(1, np.uint64).repeat(len(original(self, *arguments)))

    original: Any = FakeRunner._contexts
    monkeypatch.setattr(FakeRunner, "_contexts", fail)
    with pytest.raises(OutputMismatchError) as caught:
        walk(0)
    monkeypatch.undo()
    (note,) = caught.value.__notes__
    path = Path(note.rpartition(" ")[2])
    done = replay(path)
    assert "scheduler" not in done.differences, "the scheduler was right"
    assert done.differences["executor"].step == 1
    shutil.rmtree(path.parent)


# ---- differences


def test_a_scheduler_that_decides_otherwise(
    run: Run,  # noqa: F811
    small_log: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planner, "pick_victim", lambda running, for_branch: None)
    outcome = run("replay", str(small_log))
    assert outcome.exit_code == 1
    assert outcome.err == "blockyard: the replay differs from the recording\n"
    assert "scheduler: differs at step " in outcome.out
    assert " recorded, " in outcome.out
    assert "plans legal" in outcome.out, "the executor's half goes on"


def test_another_plan(changed: Changed) -> None:
    def change(events: list[Event]) -> None:
        plan = next(e for e in events if isinstance(e, pb.StepPlan) and len(e.batch.rows) > 2)
        plan.batch.rows[1] = 11

    path = changed(change)
    found = difference([path], "scheduler")
    assert [d for d in found.details if "batch.rows[1]: 11 recorded, " in d]
    illegal = difference([path], "executor")
    assert (illegal.step, illegal.step_id) == (found.step, found.step_id)
    assert illegal.details[0].startswith("illegal: ")


def test_another_result(changed: Changed) -> None:
    def change(events: list[Event]) -> None:
        nth(events, pb.StepResult, 40).token_ids[0] ^= 1

    path = changed(change)
    found = difference([path], "executor")
    assert found.step == 41
    assert found.details[0].startswith("result.token_ids[0]: ")
    assert replay(path, steps=Steps(first=42)).differences.get("executor") is None


def test_a_request_that_never_came(changed: Changed) -> None:
    def change(events: list[Event]) -> None:
        events.remove(nth(events, log_pb.LoggedSubmit, 3))

    found = difference([changed(change)], "scheduler")
    assert any("new_rows.request_keys" in detail for detail in found.details), found


def test_a_plan_more_and_a_plan_less(changed: Changed) -> None:
    def drop(events: list[Event]) -> None:
        events.remove(nth(events, pb.StepPlan, 10))

    def add(events: list[Event]) -> None:
        index = events.index(nth(events, pb.StepPlan, 10))
        events.insert(index, events[index])

    assert difference([changed(drop)], "scheduler").details == ["a plan now, none recorded"]
    assert "illegal: epoch and step_id" in difference([changed(drop)], "executor").details[0]
    assert difference([changed(add)], "scheduler").details == ["a plan recorded, none now"]


def test_what_ended_the_recording_ends_the_replay(changed: Changed) -> None:
    """The engine writes an input down before it acts on it: here, a result of too few tokens."""

    def change(events: list[Event]) -> None:
        result = nth(events, pb.StepResult, 40)
        del result.token_ids[:]
        del events[events.index(result) + 1 :]

    found = difference([changed(change)], "scheduler")
    assert "AssertionError in __init__" in found.details[0]
    assert "committer.py" in found.details[0]


def test_a_stop_that_meets_nobody(changed: Changed) -> None:
    def change(events: list[Event]) -> None:
        nth(events, log_pb.LoggedStop, 0).key = 10**6

    found = difference([changed(change)], "scheduler")
    assert "request 1000000, stopped then, has ended before now" in found.details[0]


def test_other_answers_about_text(changed: Changed) -> None:
    def drop(events: list[Event]) -> None:
        events.remove(nth(events, log_pb.LoggedTextStop, 0))

    def add(events: list[Event]) -> None:
        index = events.index(nth(events, log_pb.LoggedTextStop, 0))
        events.insert(index, log_pb.LoggedTextStop())

    assert "more texts of beams" in difference([changed(drop)], "scheduler").details[0]
    assert "fewer texts of beams" in difference([changed(add)], "scheduler").details[0]


# ---- the engine


async def test_the_engine_writes_a_log_that_replays(tmp_path: Path) -> None:
    path = tmp_path / "plans.log"
    async with stack(tmp_path, plan_log=path) as system:
        client = system.client
        requests = await submit_many(client, 12)
        samples = client.submit(prompt(50, 9), 12, num_samples=3, temperature=1.0, seed=5)
        beams = client.submit(prompt(51, 9), 8, beam=engine_pb2.BeamSearch(width=3))
        aborted = client.submit(prompt(52, 4), 40)
        stopped = client.submit(prompt(53, 4), 40)
        refused = client.submit(prompt(54, 4), 10_000)
        await aborted.until(2)
        client.stop(aborted)
        await stopped.until(5)
        client.stop(stopped, 5)
        await check_all(requests)
        for output in (samples, beams, stopped):
            await output.finished()
        await refused.rejected()
        await client.flush_cache()
        await client.idle()
        await system.settled()
        system.engine.close()
        plans = system.runner.plans
    done = replay(path)
    assert not done.differences
    assert done.halves["executor"].summary == (
        f"{len(plans)} plans legal, {len(plans)} results identical"
    )
    kinds = {type(event) for event in PlanLogReader([path])}
    assert {log_pb.LoggedStop, engine_pb2.FlushCacheRequest} <= kinds


async def test_a_lost_executor_is_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "plans.log"
    options = FakeOptions(failures={7: RuntimeError("lost")})
    async with stack(tmp_path, options, plan_log=path) as system:
        await check_all(await submit_many(system.client, 8))
        await system.client.idle()
        system.engine.close()
    events = list(PlanLogReader([path]))
    assert sum(isinstance(event, log_pb.EpochBegin) for event in events) == 2
    assert not replay(path).differences


def test_an_engine_that_cannot_create_its_log_ends_at_once(tmp_path: Path) -> None:
    address, path = f"unix:{tmp_path}/x.sock", tmp_path / "no" / "plans.log"
    flags = ["--listen", address, "--executor", address, "--plan-log", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "scheduler_svc.engine", *flags],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2
    assert f"plan log {path}: No such file or directory" in done.stderr
