"""Settings from flags and environment."""

from __future__ import annotations

import pydantic
import pytest

from executor_svc.config import ExecutorSettings

REQUIRED = ["--listen", "unix:/x", "--model-dir", "/m"]


def test_defaults_and_flags() -> None:
    settings = ExecutorSettings.parse([*REQUIRED, "--kv-memory", "512MiB", "--exit-with-parent"])
    assert settings.kv_memory == 512 << 20
    assert settings.exit_with_parent
    assert settings.block_size == 16
    assert settings.max_model_len is None
    assert settings.num_threads >= 1


def test_environment_yields_to_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKYARD_EXECUTOR_KV_MEMORY", "2GB")
    monkeypatch.setenv("BLOCKYARD_EXECUTOR_MAX_ROWS", "7")
    settings = ExecutorSettings.parse([*REQUIRED, "--max-rows", "9"])
    assert (settings.kv_memory, settings.max_rows) == (2_000_000_000, 9)


def test_settings_are_frozen() -> None:
    settings = ExecutorSettings.parse(REQUIRED)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        setattr(settings, "max_rows", 3)  # noqa: B010 - a plain assignment does not type


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--kv-memory", "lots"], "kv_memory"),
        (["--kv-memory", "0"], "kv_memory"),
        (["--host-memory=-1"], "host_memory"),
        (["--max-rows", "0"], "max_rows"),
        (["--block-size", "1000"], "block_size"),
        (["--log-level", "LOUD"], "log_level"),
    ],
)
def test_bad_values(flags: list[str], field: str) -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        ExecutorSettings.parse([*REQUIRED, *flags])
    assert caught.value.errors()[0]["loc"] == (field,)


def test_missing_values() -> None:
    with pytest.raises(pydantic.ValidationError, match="listen"):
        ExecutorSettings.parse([])
