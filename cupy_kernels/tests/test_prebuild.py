"""The prebuild command fills a cache that an executor finds."""

from __future__ import annotations

import pathlib

import pytest

from cupy_kernels.cubins import CubinCache
from cupy_kernels.prebuild import main
from cupy_kernels.shape import AttentionShape
from cupy_kernels.tests.compiling import needs_nvrtc
from cupy_kernels.variants import MAX_SHARED_BYTES, model_variants


@pytest.mark.parametrize("option", [["--target", "sm_75"], ["--head-dim", "80"], []])
def test_bad_options_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--heads", "8", "--kv-heads", "2", *option])
    assert "usage" in capsys.readouterr().err


def test_an_unsupported_model_is_named(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads = ["--heads", "9", "--kv-heads", "2", "--head-dim", "64"]
    assert main([*heads, "--target", "sm_80", "--cache", str(tmp_path)]) == 1
    assert "9 query heads over 2 KV heads" in capsys.readouterr().err


@needs_nvrtc
def test_everything_is_found_in_the_cache(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = ["--heads", "8", "--kv-heads", "2", "--head-dim", "64"]
    assert main([*heads, "--target", "sm_80", "--cache", str(tmp_path)]) == 0

    def refuse(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr("cupy_kernels.cubins.build", refuse)
    for variant in model_variants(AttentionShape(30, 8, 2, 64, 16), MAX_SHARED_BYTES["sm_80"]):
        assert CubinCache(tmp_path).get(variant, "sm_80").exists()
