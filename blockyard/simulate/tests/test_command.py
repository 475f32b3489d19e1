from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from blockyard.cli.main import main
from blockyard.simulate.plot import PlotError, check_plot, plot_pools
from blockyard.simulate.policies import POLICY_NAMES
from blockyard.simulate.run import simulate
from blockyard.simulate.summary import Percentiles, short_prompt_waste, summarise
from blockyard.simulate.tests.setups import STEP_NS, ragged, requests, setup

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run_command(*arguments: str) -> tuple[int, str, str]:
        """Exit code, output, errors."""
        monkeypatch.setattr("sys.argv", ["blockyard", "simulate", *arguments])
        exit_code = main()
        captured = capsys.readouterr()
        return exit_code, captured.out, captured.err

    return run_command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --trace or --generate"),
        (["--trace", "x", "--generate", "azure"], "give either --trace or --generate"),
        (["--trace", "/no/such/file"], "/no/such/file: No such file"),
        (["--generate", "openai"], "'openai' is not one of"),
        (["--generate", "azure", "--requests", "0"], "--requests"),
        (["--generate", "azure", "--rate", "0"], "a rate must be positive"),
        (["--generate", "azure", "--rate", "nan"], "a rate must be positive"),
        (["--generate", "azure", "--rate", "fast"], "'fast' is neither a number nor 'closed'"),
        (["--generate", "azure", "--rate", "5", "--requests", "1"], "arrive at once"),
        (["--generate", "azure", "--policy", "orca"], "'orca' is not one of"),
        (["--generate", "azure", "--blocks", "9", "--kv-gib", "1"], "either --blocks or --kv-gib"),
        (["--generate", "azure", "--kv-gib", "0.000001"], "0 blocks hold no request"),
        (["--generate", "azure", "--blocks", "1"], "no request fits 17 tokens"),
        (["--generate", "azure", "--window", "4"], "--window"),
        (["--generate", "azure", "--max-num-batched-tokens", "8"], "max_num_seqs (256)"),
        (["--generate", "azure", "--cost-model", "abacus"], "abacus: No such file"),
    ],
)
def test_what_is_asked_for_wrongly(run: Run, arguments: list[str], message: str) -> None:
    exit_code, _, error = run(*arguments)
    assert exit_code == 2
    assert message in error
    assert "Traceback" not in error


def test_policies_side_by_side(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    arguments = ["--generate", "azure", "--requests", "40", "--rate", "closed", "--policy", "all"]
    exit_code, out, _ = run(*arguments, "--json", str(path))
    assert exit_code == 0
    assert "azure-like: 40 requests on llama-8b-h100, 27,648 blocks of 16 tokens" in out
    report = json.loads(path.read_text())
    assert list(report["policies"]) == list(POLICY_NAMES)
    waste = {name: figures["waste_pooled"] for name, figures in report["policies"].items()}
    assert waste["blockyard"] < 0.02 < waste["orca-oracle"] < waste["orca-pow2"] < waste["orca-max"]
    assert f"{waste['blockyard']:.2%}".replace("%", " %") in out
    assert report["short_prompt_waste"]["blockyard"]["1"] == pytest.approx(15 / 32)
    assert "blockyard: 46.9% with 1 output tokens" in out


def test_one_policy_of_a_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,30,4\n1,9000,5\n")
    exit_code, out, _ = run("--trace", str(path), "--requests", "3", "--policy", "orca-pow2")
    assert exit_code == 0
    assert "2 (1)" in out
    assert "orca-pow2" in out
    assert "static" not in out


def test_sizes_that_the_short_prompt_does_not_fit(run: Run) -> None:
    exit_code, out, _ = run("--generate", "azure", "--requests", "300", "--max-model-len", "100")
    assert exit_code == 0
    assert "128 output tokens" not in out
    assert "46.9% with 1 output tokens, 23.5% with 16 output tokens\n" in out


def test_conversations_say_what_could_be_cached(run: Run) -> None:
    exit_code, out, _ = run("--generate", "mooncake", "--requests", "30", "--blocks", "100000")
    assert exit_code == 0
    assert "prompt tokens that an infinite cache has: " in out


def test_a_path_that_cannot_be_written(run: Run) -> None:
    arguments = ("--generate", "azure", "--requests", "2", "--json", "/no/such/folder/out.json")
    exit_code, _, error = run(*arguments)
    assert (exit_code, error) == (
        2,
        "blockyard: /no/such/folder/out.json: No such file or directory\n",
    )


# ---- figures


def test_times_are_those_of_the_requests() -> None:
    summary = summarise(simulate(requests((10, 1), (10, 5), (10, 9)), setup(window=1)))
    assert summary.ttft_ms == Percentiles(1.0, 1.0, 1.0)
    assert summary.tpot_ms == Percentiles(1.0, 1.0, 1.0)
    assert summary.latency_ms.p50 == 5 * STEP_NS / 1e6
    assert summary.duration_s == 9 * STEP_NS / 1e9
    assert summary.output_tokens_per_s == pytest.approx(15 / summary.duration_s)
    assert summary.device_busy == 1.0
    assert summary.mean_num_running == pytest.approx(15 / 9)


def test_percentiles_of_nothing() -> None:
    assert Percentiles.of(np.empty(0)) == Percentiles(0.0, 0.0, 0.0)


def test_a_short_prompt_wastes_nearly_half() -> None:
    waste = short_prompt_waste(setup())
    assert waste[1] == 15 / 32
    assert waste[16] == pytest.approx(1 - np.arange(17, 33).mean() / 32)


# ---- pictures


def test_a_picture_without_matplotlib(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    exit_code, out, error = run("--generate", "azure", "--plot", "out.png")
    assert (exit_code, out) == (2, "")
    assert "pip install matplotlib" in error


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(PlotError, match=r"\.png or \.svg"):
        check_plot(tmp_path / "out.gif")
    outcomes = {"blockyard": simulate(ragged(20, seed=1), setup())}
    with pytest.raises(PlotError, match="No such file"):
        plot_pools(tmp_path / "no" / "out.png", outcomes)
    plot_pools(tmp_path / "out.svg", outcomes)
    assert "blockyard" in (tmp_path / "out.svg").read_text()
