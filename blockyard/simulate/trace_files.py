"""Reads the two public kinds of trace: Azure's CSV of lengths and Mooncake's JSON lines."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from blockyard.simulate.trace import NS_PER_S, TRACE_BLOCK_TOKENS, Prefixes, Trace, TraceError

FORMATS: Final = ("auto", "azure", "mooncake")

_AZURE_COLUMNS: Final = ("arrival_s", "prompt_tokens", "output_tokens")
_AZURE_PUBLISHED: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
"""The column names of the file as its authors publish it; the first is a date and time."""
_MOONCAKE_FIELDS: Final = ("timestamp", "input_length", "output_length", "hash_ids")
Raw = TypeVar("Raw")
Value = TypeVar("Value")

_MAX_TOKENS: Final = 10**8
"""Longest prompt or output taken for one; more is a mistake in the file."""


@dataclass(frozen=True, slots=True)
class _Line:
    """One request as read."""

    arrival_ns: int
    num_prompt_tokens: int
    num_output_tokens: int
    block_ids: list[int] | None = None


def read_trace(path: Path, kind: str = "auto") -> Trace:
    """Read a trace file; `kind` is one of FORMATS.

    Raises:
        TraceError: unreadable or empty file, unknown format, missing column, bad or negative
            number, arrivals that go back in time; names the file and the line.
    """
    if kind not in FORMATS:
        raise TraceError(f"unknown trace format {kind!r}; it is one of {', '.join(FORMATS)}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            numbered = [(n, line) for n, line in enumerate(file, start=1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise TraceError(f"{path}: {reason}") from error
    if not numbered:
        raise TraceError(f"{path}: the file is empty")
    if kind == "auto":
        kind = _detect(path, numbered[0][1])
    parse = _azure_lines if kind == "azure" else _mooncake_lines
    return _trace(path, parse(path, numbered))


def _detect(path: Path, first_line: str) -> str:
    if first_line.lstrip().startswith("{"):
        return "mooncake"
    names = {name.strip() for name in first_line.split(",")}
    if names & {*_AZURE_COLUMNS, *_AZURE_PUBLISHED}:
        return "azure"
    raise TraceError(f"{path}:1: neither the header of an Azure trace nor a Mooncake line")


def _trace(path: Path, lines: Iterable[tuple[int, _Line]]) -> Trace:
    """Columns of the lines, with arrivals counted from the first."""
    read: list[_Line] = []
    for number, line in lines:
        if read and line.arrival_ns < read[-1].arrival_ns:
            raise TraceError(f"{path}:{number}: arrives before the request above it")
        read.append(line)
    if not read:
        raise TraceError(f"{path}: no requests")
    arrival_ns = np.array([line.arrival_ns for line in read], np.int64)
    block_ids = [line.block_ids for line in read if line.block_ids is not None]
    prefixes = None
    if block_ids:
        counts = [len(ids) for ids in block_ids]
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        prefixes = Prefixes(np.concatenate([np.array(ids, np.int64) for ids in block_ids]), starts)
    return Trace(
        path.stem,
        arrival_ns - arrival_ns[0],
        np.array([line.num_prompt_tokens for line in read], np.int32),
        np.array([line.num_output_tokens for line in read], np.int32),
        prefixes,
    )


# ---- Azure


def _azure_lines(path: Path, numbered: list[tuple[int, str]]) -> Iterator[tuple[int, _Line]]:
    header = [name.strip() for name in numbered[0][1].split(",")]
    is_published = _AZURE_PUBLISHED[0] in header
    columns = _AZURE_PUBLISHED if is_published else _AZURE_COLUMNS
    missing = [name for name in columns if name not in header]
    if missing:
        raise TraceError(f"{path}:{numbered[0][0]}: no column {', '.join(missing)}")
    places = [header.index(name) for name in columns]
    arrival = _timestamp_ns if is_published else _seconds_ns
    for number, text in numbered[1:]:
        cells = text.split(",")
        if len(cells) != len(header):
            raise TraceError(f"{path}:{number}: {len(cells)} columns instead of {len(header)}")
        cell = dict(zip(columns, (cells[place].strip() for place in places), strict=True))
        when, prompt, output = columns
        yield (
            number,
            _Line(
                _parsed(path, number, when, cell[when], arrival),
                _parsed(path, number, prompt, cell[prompt], _length),
                _parsed(path, number, output, cell[output], _length),
            ),
        )


def _seconds_ns(text: str) -> int:
    seconds = float(text)
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError("must be a time of 0 or later")
    return round(seconds * NS_PER_S)


def _timestamp_ns(text: str) -> int:
    moment = datetime.datetime.fromisoformat(text).replace(tzinfo=datetime.UTC)
    return round(moment.timestamp() * 1e6) * 1000


def _length(text: str) -> int:
    return _checked_length(int(text))


# ---- Mooncake


def _mooncake_lines(path: Path, numbered: list[tuple[int, str]]) -> Iterator[tuple[int, _Line]]:
    for number, text in numbered:
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TraceError(f"{path}:{number}: not a JSON object: {error}") from error
        if not isinstance(fields, dict):
            raise TraceError(f"{path}:{number}: not a JSON object")
        missing = [name for name in _MOONCAKE_FIELDS if name not in fields]
        if missing:
            raise TraceError(f"{path}:{number}: no field {', '.join(missing)}")
        when, prompt, output, blocks = _MOONCAKE_FIELDS
        line = _Line(
            _parsed(path, number, when, fields[when], _milliseconds_ns),
            _parsed(path, number, prompt, fields[prompt], _json_length),
            _parsed(path, number, output, fields[output], _json_length),
            _parsed(path, number, blocks, fields[blocks], _block_ids),
        )
        num_blocks = -(-line.num_prompt_tokens // TRACE_BLOCK_TOKENS)
        if len(line.block_ids or ()) != num_blocks:
            raise TraceError(
                f"{path}:{number}: {blocks} must have {num_blocks} ids of {TRACE_BLOCK_TOKENS} "
                f"tokens for {prompt} {line.num_prompt_tokens}"
            )
        yield number, line


def _milliseconds_ns(value: Any) -> int:
    return _seconds_ns(str(value)) // 1000


def _json_length(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("must be an integer")
    return _checked_length(value)


def _block_ids(value: Any) -> list[int]:
    is_valid = isinstance(value, list) and all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**62 for i in value
    )
    if not is_valid:
        raise ValueError("must be a list of integers of 0 or more")
    return list(value)


# ---- values


def _checked_length(value: int) -> int:
    if not 1 <= value <= _MAX_TOKENS:
        raise ValueError(f"must be 1 to {_MAX_TOKENS} tokens")
    return value


def _parsed(path: Path, number: int, name: str, raw: Raw, parse: Callable[[Raw], Value]) -> Value:
    try:
        return parse(raw)
    except ValueError as error:
        raise TraceError(f"{path}:{number}: {name} {raw!r}: {error}") from error
