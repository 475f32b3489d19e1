from __future__ import annotations

import pytest

from benchmarks.bench_control import Case, run_case, summarise
from benchmarks.control_core import measure_core
from benchmarks.processes import ProcessError, processes


async def test_a_small_case_measures_every_step() -> None:
    case = Case("small", num_rows=8, context_tokens=40)
    columns = await run_case(case, 30)
    assert {len(values) for values in columns.values()} == {30}
    assert set(columns["num_rows"].tolist()) == {8}
    assert not columns["num_changed_rows"].any()
    summary = summarise(columns)
    for name in ("plan_encode_us", "commit_us", "publish_us", "plan_bytes", "result_bytes"):
        assert summary[name]["p50"] > 0, name
    assert summary["period_us"]["mean"] >= 4500, "a step takes 5 ms"


def test_the_core_alone_is_measured() -> None:
    parts = measure_core(8, 40, 20)
    assert all(part["count"] == 20 and part["p50"] > 0 for part in parts.values())


async def test_a_child_that_cannot_start_says_why() -> None:
    async with processes() as children:
        address = children.socket("executor")
        flags = ["--listen", address, "--nonsense"]
        with pytest.raises(ProcessError, match="unrecognized arguments: --nonsense"):
            await children.start("executor", "integration_tests.fake_executor", flags, address)


async def test_a_child_that_fails_at_its_end_is_noticed() -> None:
    async with processes() as children:
        address = children.socket("executor")
        flags = ["--listen", address]
        pid = await children.start("executor", "integration_tests.fake_executor", flags, address)
        assert pid > 0
        await children.stop("executor")
        await children.start("executor", "integration_tests.fake_executor", flags, address)
        children._running["executor"].kill()
        with pytest.raises(ProcessError, match="executor ended with -9"):
            await children.stop("executor")
