from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_figures, gpu_session
from benchmarks.engine_watch import ServerLoad
from benchmarks.gpu_record import Session
from benchmarks.gpu_stages import STAGES, UnknownNameError, chosen, loads_of
from benchmarks.report import RESULTS_DIR
from blockyard.bench.workload import make_workload
from blockyard.engine.v1 import engine_pb2 as pb

H100 = "NVIDIA H100 80GB HBM3 (bfloat16)"


def session(out: Path, minutes: float = 1.0) -> Session:
    return Session(argparse.Namespace(out=out, minutes=minutes))


def on(device: str, **parts: Any) -> dict[str, Any]:
    """A load's report."""
    return {"model": {"device": device}, **parts}


def w1(requests_per_s: float, device: str = H100, num_cached_tokens: int = 0) -> dict[str, Any]:
    load: dict[str, Any] = {"requests_per_s": requests_per_s, "output_tokens_per_s": 4948.0}
    load |= {"ttft_ms": {}, "tpot_ms": {}, "num_cached_tokens": num_cached_tokens}
    return on(device, load=load, steps=None, server={"kv_waste": 0.005})


async def test_failures_are_recorded_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fails() -> dict[str, Any]:
        raise ValueError("no such luck")

    async def works() -> dict[str, Any]:
        return w1(30.0)

    async def transformers() -> dict[str, Any]:
        return {"requests_per_s": 1.5}

    running = session(tmp_path / "out")
    assert not await running.attempt("llama-8b", "W2", 1, fails)
    assert await running.attempt("llama-8b", "W1", 1, works)
    assert await running.attempt("hf", "static batch", 1, transformers)
    shown = capsys.readouterr().out
    assert "llama-8b W2: FAILED after 0 s: ValueError: no such luck" in shown
    assert "llama-8b W1: 30.00 req/s, 4948 output tok/s" in shown
    lines = (tmp_path / "out" / "measured.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["W2", "W1", "static batch"]
    document = json.loads((tmp_path / "out" / "gpu_session.json").read_text())
    assert document["results"]["speed_over_transformers"] == 20
    speeds = {c["what"]: c["speed"] for c in document["results"]["comparisons"]}
    assert speeds == {"requests_per_s": 1.5, "output_tokens_per_s": 1.0}
    assert {target["name"] for target in document["targets"]} == {
        "llama-8b W1 requests_per_s, speed / vLLM's",
        "KV waste on W1",
    }
    assert running.num_failed == 1


async def test_nothing_begins_that_the_budget_has_no_time_for(tmp_path: Path) -> None:
    begun = []

    async def work() -> dict[str, Any]:
        begun.append(1)
        return {}

    running = session(tmp_path, minutes=0.5)
    assert not await running.attempt("a", "long", 31, work)
    assert await running.attempt("a", "short", 1, work)
    assert begun == [1]
    first = json.loads((tmp_path / "measured.jsonl").read_text().splitlines()[0])
    assert first["error"].startswith("OutOfTimeError: needs 31 s")


def test_speed_is_above_1_where_ours_is_better() -> None:
    report = on(H100, load={"ttft_ms": {"p50": 22.0}}, steps={"tpot_ms": 13.1})
    (step,) = gpu_figures.compare("llama-8b", "L(8)", report)
    assert step.speed == pytest.approx(7.07 / 13.1)
    (first, *_) = gpu_figures.compare("llama-8b", "A(4)", report)
    assert (first.what, first.speed) == ("ttft_ms.p50", 2.0)
    (target,) = gpu_figures.targets([first])
    assert target.is_met
    assert not list(gpu_figures.compare("llama-8b", "W9", report))


def test_the_small_model_must_take_1_6_ms_a_step() -> None:
    for tpot_ms, is_met in ((1.59, True), (1.61, False)):
        report = on(H100, steps={"tpot_ms": tpot_ms})
        found = list(gpu_figures.compare("smollm-135m", "L(1)", report))
        assert [target.is_met for target in gpu_figures.targets(found)] == [is_met]


INCOMPARABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "another GPU": ("ran on NVIDIA H200", w1(24.2, "NVIDIA H200 (bfloat16)")),
    "another H100": ("ran on NVIDIA H100 PCIe", w1(24.2, "NVIDIA H100 PCIe (bfloat16)")),
    "an unknown GPU": ("an unknown device", {"load": {"requests_per_s": 24.2}}),
    "cached prompts": ("17 prompt tokens", w1(24.2, num_cached_tokens=17)),
    "cached prompts of L": (
        "5 prompt tokens",
        on(H100, steps={"tpot_ms": 1.0}, prefill={"num_cached_tokens": 5}),
    ),
}


@pytest.mark.parametrize("name", INCOMPARABLE)
def test_what_may_not_be_held_against_the_figures_is_not(name: str) -> None:
    reason, report = INCOMPARABLE[name]
    assert reason in gpu_figures.incomparable(report)
    for workload in ("W1", "L(1)"):
        assert not list(gpu_figures.compare("llama-8b", workload, report))
    assert not gpu_figures.incomparable(w1(24.2))


async def test_a_session_says_plainly_what_is_not_comparable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def on_h200() -> dict[str, Any]:
        return w1(24.2, "NVIDIA H200 (bfloat16)")

    async def start() -> dict[str, Any]:
        return {"ready_s": 5.0}

    running = session(tmp_path)
    assert await running.attempt("llama-8b", "start", 1, start)
    assert await running.attempt("llama-8b", "W1", 1, on_h200)
    document = json.loads((tmp_path / "gpu_session.json").read_text())
    assert document["results"]["comparisons"] == []
    assert document["results"]["not_comparable"].keys() == {"llama-8b W1"}
    assert not any("vLLM" in target["name"] for target in document["targets"])
    capsys.readouterr()
    gpu_session._print_results(running)
    shown = capsys.readouterr().out
    assert "llama-8b W1 is not comparable with vLLM's" in shown
    assert "H200" in shown
    assert "speed" not in shown


@pytest.mark.parametrize(
    "path", sorted(RESULTS_DIR.glob("gpu_session*.json")), ids=lambda path: path.name
)
def test_committed_sessions_compare_only_what_is_comparable(path: Path) -> None:
    document = json.loads(path.read_text())
    results = document["results"]
    for record in results["records"]:
        name = f"{record['stage']} {record['name']}"
        if "load" in record and gpu_figures.incomparable(record):
            assert name in results["not_comparable"]
            assert not any(f"{c['model']} {c['workload']}" == name for c in results["comparisons"])
            targets = [target["name"] for target in document["targets"]]
            assert not any(t.startswith(name) and "vLLM" in t for t in targets)


@pytest.mark.parametrize("model", gpu_figures.FIGURES)
def test_every_figure_has_a_load_and_every_load_can_be_made(model: str) -> None:
    loads = loads_of(model, None)
    assert {load.name for load in loads} == set(gpu_figures.FIGURES[model])
    assert len({load.spec.seed for load in loads}) == len(loads)
    for load in loads:
        assert load.name.startswith(make_workload(load.spec).name)


def test_stages_are_chosen_by_name() -> None:
    assert chosen(None, STAGES, "stage") == list(STAGES)
    assert chosen("hf, llama-8b", STAGES, "stage") == ["llama-8b", "hf"]
    with pytest.raises(UnknownNameError, match="unknown stage 'llama-9b'; known are ceilings"):
        chosen("llama-9b", STAGES, "stage")


def test_waste_is_weighed_by_what_was_held() -> None:
    load = ServerLoad()
    for stored, unused in ((90, 10), (300, 0)):
        pool = pb.DevicePool(num_slots=816, num_padding=16, num_stored=stored, num_unused=unused)
        load.add(pb.SnapshotResponse(device=pool, num_running=stored // 10))
    found = load.document()
    assert found["kv_waste"] == pytest.approx(10 / 400)
    assert found["max_held_share"] == pytest.approx(300 / 800)
    assert found["max_running"] == 30


def test_a_stage_that_cannot_start_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "no model"
    arguments = ["--model-dir", str(missing), "--stages", "llama-1b,smollm-135m"]
    monkeypatch.setattr(sys, "argv", ["gpu_session", "--out", str(tmp_path / "out"), *arguments])
    assert gpu_session.main() == 1
    shown = capsys.readouterr().out
    assert shown.count("start: FAILED") == 2
    assert "2 failed" in shown
