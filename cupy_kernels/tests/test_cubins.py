"""Compiling: what goes wrong, and what the cache keeps apart."""

from __future__ import annotations

import pathlib

import pytest

from cupy_kernels import cubins, nvrtc
from cupy_kernels.cubins import CubinCache, target_of
from cupy_kernels.errors import CompileError, GpuTooOldError, MissingLibraryError
from cupy_kernels.source import Variant
from cupy_kernels.tests.compiling import needs_nvrtc

TINY = 'extern "C" __global__ void tiny(int* out) { out[0] = VALUE; }\n'


@pytest.fixture
def tiny(tmp_path: pathlib.Path) -> Variant:
    (tmp_path / "tiny.cu").write_text(TINY)
    return Variant("tiny", {"VALUE": 1}, folder=tmp_path)


@pytest.mark.parametrize("capability", [(7, 5), (7, 0), (6, 1)])
def test_old_gpus_are_named(capability: tuple[int, int]) -> None:
    with pytest.raises(GpuTooOldError, match=rf"{capability[0]}\.{capability[1]}; .* 8\.0"):
        target_of(capability)


def test_only_hopper_gets_the_architecture_specific_target() -> None:
    capabilities = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    targets = [target_of(capability) for capability in capabilities]
    assert targets == ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"]


@needs_nvrtc
def test_a_broken_source_raises_with_the_log(tmp_path: pathlib.Path) -> None:
    (tmp_path / "broken.cu").write_text("int x = missing_name;\n")
    with pytest.raises(CompileError, match=r'broken\.cu.*(.|\n)*"missing_name" is undefined'):
        cubins.build(Variant("broken", folder=tmp_path), "sm_80")


@needs_nvrtc
def test_an_unknown_target_raises(tiny: Variant) -> None:
    with pytest.raises(CompileError, match="sm_12345"):
        cubins.build(tiny, "sm_12345")


@needs_nvrtc
def test_the_cache_compiles_once(tiny: Variant, tmp_path: pathlib.Path) -> None:
    cache = CubinCache(tmp_path / "deep" / "cache")
    path = cache.get(tiny, "sm_80")
    assert path.read_bytes()[:4] == b"\x7fELF"
    path.write_bytes(b"kept")
    assert cache.get(tiny, "sm_80").read_bytes() == b"kept"
    assert list(cache.folder.iterdir()) == [path]


@needs_nvrtc
def test_whatever_decides_the_binary_decides_the_file(
    tiny: Variant, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CubinCache(tmp_path / "cache")
    paths = {cache.get(tiny, "sm_80"), cache.get(tiny, "sm_90a")}
    paths.add(cache.get(Variant("tiny", {"VALUE": 2}, folder=tmp_path), "sm_80"))
    (tmp_path / "tiny.cu").write_text(TINY + "// changed\n")
    paths.add(cache.get(tiny, "sm_80"))
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 99))
    paths.add(cache.get(tiny, "sm_80"))
    monkeypatch.setattr(cubins, "_OPTIONS", ("-std=c++17",))
    paths.add(cache.get(tiny, "sm_80"))
    assert len(paths) == 6


def test_without_the_compiler_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvrtc._library.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(nvrtc, "_LIBRARY", "libnvrtc-missing.so")
    with pytest.raises(MissingLibraryError, match="pip install 'nvidia-cuda-nvrtc"):
        nvrtc.version()
