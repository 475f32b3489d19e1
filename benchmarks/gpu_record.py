"""What a measuring session has measured so far: kept, compared and written at once."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks import gpu_figures, report
from benchmarks.dummy_models import SHAPES
from benchmarks.report import Target

FIRST_MODEL: Final = next(iter(SHAPES))

Json = dict[str, Any]


class OutOfTimeError(Exception):
    """The budget has no room for it."""


class Session:
    """What was measured so far, and how much time is left."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags
        self.out: Path = flags.out
        self._end_s = time.monotonic() + 60 * flags.minutes
        self._records: list[Json] = []
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def left_s(self) -> float:
        """Of the budget."""
        left_s: float = self._end_s - time.monotonic()
        return left_s

    @property
    def num_failed(self) -> int:
        """Things that failed or had no time."""
        return sum("error" in record for record in self._records)

    async def attempt(
        self, stage: str, name: str, seconds: float, work: Callable[[], Awaitable[Json]]
    ) -> bool:
        """Do one thing, if there is time for it, and record what came out; whether it succeeded.

        This is where the session survives: whatever is raised is recorded.
        """
        start_s = time.monotonic()
        record: Json = {"stage": stage, "name": name}
        try:
            if self.left_s < seconds:
                raise OutOfTimeError(f"needs {seconds:.0f} s, {max(0.0, self.left_s):.0f} s left")
            record |= await work()
        except Exception as error:  # noqa: BLE001 - the edge of one measurement
            record["error"] = f"{type(error).__name__}: {error}"
        record["took_s"] = round(time.monotonic() - start_s, 2)
        self._add(record)
        return "error" not in record

    def _add(self, record: Json) -> None:
        self._records.append(record)
        with (self.out / "measured.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        title = f"[{self.left_s:5.0f} s left] {record['stage']} {record['name']}: "
        print(title + _in_short(record), flush=True)
        self.write()

    def write(self) -> None:
        """Write gpu_session.json, whole or not at all."""
        document = report.document("gpu_session", self.results(), self.targets())
        path = self.out / "gpu_session.json"
        fresh = path.with_suffix(".tmp")
        fresh.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        fresh.replace(path)

    def results(self) -> Json:
        """Records, comparisons with vLLM and why others are none, the ratio to transformers."""
        return {
            "records": self._records,
            "comparisons": [asdict(comparison) for comparison in self.comparisons()],
            "not_comparable": self.incomparable(),
            "speed_over_transformers": self._hf_ratio(),
        }

    def comparisons(self) -> list[gpu_figures.Comparison]:
        """Every figure that vLLM has too, of loads in which nothing failed."""
        return [
            comparison
            for record in self._loads()
            for comparison in gpu_figures.compare(record["stage"], record["name"], record)
        ]

    def incomparable(self) -> dict[str, str]:
        """Loads that vLLM has figures of, too, but which may not be held against them: why."""
        reasons = {
            f"{record['stage']} {record['name']}": gpu_figures.incomparable(record)
            for record in self._loads()
            if record["name"] in gpu_figures.FIGURES.get(record["stage"], {})
        }
        return {load: reason for load, reason in reasons.items() if reason}

    def _loads(self) -> list[Json]:
        return [record for record in self._records if "load" in record and "error" not in record]

    def targets(self) -> list[Target]:
        """Those that this session can tell of."""
        found = gpu_figures.targets(self.comparisons())
        for stage, limit_s in (
            (FIRST_MODEL, gpu_figures.MAX_START_S),
            ("restart", gpu_figures.MAX_WARM_START_S),
        ):
            if (record := self._find(stage, "start")) is not None:
                found.append(Target(f"{stage} start", record["ready_s"], "<=", limit_s, "s"))
        if (record := self._find(FIRST_MODEL, "W1")) is not None:
            waste = record["server"]["kv_waste"]
            if waste is not None:
                found.append(Target("KV waste on W1", 100 * waste, "<=", 1.0, "%"))
        return found

    def _hf_ratio(self) -> float | None:
        ours, theirs = self._find(FIRST_MODEL, "W1"), self._find("hf", "static batch")
        if ours is None or theirs is None:
            return None
        return float(ours["load"]["requests_per_s"] / theirs["requests_per_s"])

    def _find(self, stage: str, name: str) -> Json | None:
        for record in self._records:
            if (record["stage"], record["name"]) == (stage, name) and "error" not in record:
                return record
        return None


def _in_short(record: Json) -> str:
    """One line about a record."""
    if "error" in record:
        return f"FAILED after {record['took_s']:.0f} s: {record['error'][:600]}"
    if "load" not in record:
        return json.dumps({k: v for k, v in record.items() if k not in ("stage", "name")})[:600]
    load = record["load"]
    parts = [
        f"{load['requests_per_s']:.2f} req/s",
        f"{load['output_tokens_per_s']:.0f} output tok/s",
    ]
    if record["steps"]:
        steps = record["steps"]
        parts.append(f"step {steps['tpot_ms']:.2f} ms")
        parts.append(f"prefill {steps['prefill_tokens_per_s']:.0f} tok/s")
    for what in ("ttft", "tpot"):
        found = load[f"{what}_ms"]
        if found:
            shown = " / ".join(f"{found[p]:.1f}" for p in ("p50", "p90", "p99"))
            parts.append(f"{what.upper()} {shown} ms")
    return ", ".join(parts)
