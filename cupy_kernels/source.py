"""Kernel sources: assembling the text of a variant, and reading its parameter struct.

A kernel NAME is sources/NAME.cu: it includes fragments (*.cuh) by name, declares one struct
`NameParams` of pointers and numbers, and one `extern "C" __global__` function NAME that takes it by
value. The struct in the source is the only declaration: Python reads field names and types there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

SOURCES: Final = Path(__file__).parent / "sources"

_INCLUDE: Final = re.compile(r'^#include "(\w+\.cuh)"\n', re.MULTILINE)
_FIELD: Final = re.compile(r"^(?:const )?(\w+)( ?\*)? ?(\w+)$")
_COMMENT: Final = re.compile(r"//.*")
_NUMBERS: Final = {"int": np.int32, "float": np.float32, "int64": np.int64, "uint64": np.uint64}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with its compile-time constants."""

    name: str
    defines: Mapping[str, int] = field(default_factory=dict)
    folder: Path = SOURCES

    @property
    def label(self) -> str:
        """For people: decode(HEAD_DIM=128, ...)."""
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.defines.items())})"

    def text(self) -> str:
        """The whole source: defines, then the file with its fragments in place."""
        lines = [f"#define {key} {value}\n" for key, value in self.defines.items()]
        body = (self.folder / f"{self.name}.cu").read_text(encoding="utf-8")
        return "".join(lines) + _INCLUDE.sub(_fragment, body)

    def params_dtype(self) -> np.dtype[np.void]:
        """The parameter struct, laid out as the compiler does. Addresses are uint64."""
        return params_dtype(self.text(), self.params_name)

    @property
    def params_name(self) -> str:
        """DecodeParams for decode."""
        return "".join(word.capitalize() for word in self.name.split("_")) + "Params"


def _fragment(include: re.Match[str]) -> str:
    return (SOURCES / include[1]).read_text(encoding="utf-8")


def params_dtype(text: str, struct: str) -> np.dtype[np.void]:
    """Read `struct` in C source text. Raises ValueError for anything but pointers and numbers."""
    found = re.search(rf"^struct {struct} {{\n(.*?)^}};", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"no struct {struct}")
    fields = []
    for line in _COMMENT.sub("", found[1]).split(";"):
        declaration = " ".join(line.split())
        if not declaration:
            continue
        match = _FIELD.match(declaration)
        kind = match and (np.uint64 if match[2] else _NUMBERS.get(match[1]))
        if not match or kind is None:
            raise ValueError(f"{struct}: cannot read {declaration!r}")
        fields.append((match[3], kind))
    return np.dtype(fields, align=True)
