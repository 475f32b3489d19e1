"""Skips what needs the compiler where it is not installed."""

from __future__ import annotations

import pytest

from cupy_kernels import nvrtc
from cupy_kernels.errors import MissingLibraryError


def _missing() -> str:
    try:
        nvrtc.version()
    except MissingLibraryError as error:
        return str(error)
    return ""


needs_nvrtc = pytest.mark.skipif(bool(_missing()), reason=_missing() or "NVRTC is there")
