from __future__ import annotations

from pathlib import Path

import pytest

from executor_svc.__main__ import main
from executor_svc.kv_pool import KvPoolError
from executor_svc.main_memory import (
    available_bytes,
    check_can_lock,
    check_pools_fit,
    limit_bytes,
)
from executor_svc.tests.models import tiny_config, write_model


def test_a_containers_limit_counts_if_it_is_less(tmp_path: Path) -> None:
    machine = limit_bytes([])
    assert machine > 1 << 28
    for text, expected in (("max\n", machine), ("1048576\n", 1 << 20), (str(1 << 62), machine)):
        (tmp_path / "limit").write_text(text)
        assert limit_bytes([tmp_path / "missing", tmp_path / "limit"]) == expected


def test_pools_larger_than_memory_are_refused() -> None:
    check_pools_fit(1 << 20, 1 << 20)
    with pytest.raises(KvPoolError, match=r"^KV memory of \d+\.\d GiB: there are only .* GiB"):
        check_pools_fit(limit_bytes() + 1, 0)
    with pytest.raises(KvPoolError, match="and host memory of"):
        check_pools_fit(1, limit_bytes())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MemTotal: 9999 kB\nMemAvailable:     2048 kB\n", 2 << 20),
        (f"MemAvailable: {1 << 60} kB\n", None),
        ("MemFree: 1 kB\n", None),
        ("MemAvailable:\n", None),
    ],
)
def test_what_is_available_counts_for_locked_memory(
    tmp_path: Path, text: str, expected: int | None
) -> None:
    meminfo = tmp_path / "meminfo"
    assert available_bytes(meminfo) == limit_bytes()  # there is none
    meminfo.write_text(text)
    expected = expected or limit_bytes()
    assert available_bytes(meminfo) == expected
    check_can_lock(expected, meminfo)
    with pytest.raises(KvPoolError, match=r"only \d+\.\d GiB are available; .*--host-memory"):
        check_can_lock(expected + 1, meminfo)


def test_the_process_says_so_before_it_loads_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model", tiny_config())
    arguments = ["--listen", f"unix:{tmp_path}/x.sock", "--model-dir", f"{tmp_path}/model"]
    assert main([*arguments, "--kv-memory", "4096TiB"]) == 2
    assert "GiB of memory" in capsys.readouterr().err
