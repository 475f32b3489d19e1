"""Whole measurements: client processes against a server of this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blockyard.bench.client import Progress
from blockyard.bench.load import LoadError, Target, Watch, run_load
from blockyard.bench.report import Options, Phase, measure, table
from blockyard.bench.tests.token_server import token_server
from blockyard.bench.workload import Workload, WorkloadError, WorkloadSpec, make_workload
from blockyard.client import BlockyardError, Endpoint


def test_requests_of_several_processes_are_all_sent_once() -> None:
    phases: list[Phase] = []
    num_ended = 0

    def begin(phase: Phase) -> Watch:
        phases.append(phase)

        def on_progress(progress: Progress) -> None:
            nonlocal num_ended
            num_ended += progress.num_ended

        return on_progress

    with token_server() as server:
        options = Options(Endpoint(server.address), num_clients=3, num_warm_ups=2)
        report = measure(WorkloadSpec("N4", num_requests=8, top_p=0.5), options, begin)
    assert phases == [Phase("warm-up", 2), Phase("N4", 8)]
    assert num_ended == 10
    assert report.num_failed == report.num_skipped == 0
    assert report.load.num_output_tokens == 8 * 4 * 256
    assert (report.load.num_cached_tokens, report.load.num_preemptions) == (24, 8)
    assert len(report.load.client_cores) == 3
    assert report.load.tokens_per_message == 2
    requests = server.requests[2:]
    assert len({tuple(request.token_ids.ids) for request in requests}) == 8
    assert len({request.sampling.seed for request in requests}) == 8
    for request in requests:
        assert max(request.token_ids.ids) < 50
        assert request.skip_text
        assert request.stop.ignore_eos
        assert (request.num_samples, request.stop.max_tokens) == (4, 256)
        assert (request.sampling.temperature, request.sampling.top_p) == (1.0, 0.5)


def test_l_measures_steps_from_two_loads() -> None:
    with token_server(delay_s=0.001) as server:
        report = measure(WorkloadSpec("L", batch=2), Options(Endpoint(server.address)))
    assert report.steps is not None
    assert report.prefill is not None
    assert (report.load.num_output_tokens, report.prefill.num_output_tokens) == (514, 2)
    # 128 messages more, each after at least a millisecond.
    assert report.steps.tpot_ms >= 0.5
    prompts = [tuple(request.token_ids.ids) for request in server.requests]
    assert len(set(prompts)) == 4, "the second load must not find the first one's prompts cached"
    assert "time per step" in table(report)


def test_failures_are_counted_and_do_not_stop_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "four.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,5,9\n0,6,9\n0,7,9\n0,9000,9\n")
    with token_server(failing_length=5, short_length=6) as server:
        report = measure(WorkloadSpec("trace", path), Options(Endpoint(server.address)))
    assert (report.load.num_requests, report.num_failed, report.num_skipped) == (3, 2, 1)
    assert set(report.load.errors) == {
        "INTERNAL: this one fails",
        "CUT_SHORT: the server sent fewer tokens than were asked for",
    }
    assert report.load.num_output_tokens == 9
    shown = table(report)
    assert "1 failed: INTERNAL: this one fails" in shown
    assert "1 requests left out" in shown
    json.dumps(report.document(WorkloadSpec("trace", path), Options(Endpoint(server.address))))


def test_what_is_late_fails() -> None:
    workload = make_workload(WorkloadSpec("L", batch=2))
    with token_server(delay_s=0.05) as server:
        target = Target(Endpoint(server.address), vocab_size=50, time_limit_s=0.3)
        result = run_load(workload, target)
    assert [request.error for request in result.requests] == [
        "TIME_LIMIT: not complete after 0.3 s"
    ] * 2


def test_requests_that_never_fit(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,9000,9\n")
    with token_server() as server, pytest.raises(WorkloadError, match="larger --max-model-len"):
        measure(WorkloadSpec("trace", path), Options(Endpoint(server.address)))


def test_no_server() -> None:
    workload = make_workload(WorkloadSpec("L", batch=1))
    with pytest.raises(BlockyardError, match="UNAVAILABLE"):
        run_load(workload, Target(Endpoint("127.0.0.1:1"), vocab_size=50))


def test_a_dead_client_process_is_an_error() -> None:
    workload = make_workload(WorkloadSpec("L", batch=1))
    broken = Workload("broken", workload.trace, "", num_samples=-1)  # max() of no choices
    with token_server() as server, pytest.raises(LoadError, match="died"):
        run_load(broken, Target(Endpoint(server.address), vocab_size=50))
