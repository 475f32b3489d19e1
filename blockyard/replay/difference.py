"""What a replay compares, and what it does otherwise than the recording, column by column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from blockyard.common.columns import unpack_u32


@dataclass(frozen=True, slots=True)
class Steps:
    """Which plans to compare, counted from 1 over the whole log."""

    first: int = 1
    last: int | None = None  # None: to the end

    def are_over(self, num_plans: int) -> bool:
        """Whether nothing is left to compare after so many plans."""
        return self.last is not None and num_plans >= self.last


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a replay left the recording, and how."""

    step: int  # the plan's place in the log, from 1
    epoch: int
    step_id: int
    details: Sequence[str]  # one line per column that differs

    def __str__(self) -> str:
        lines = "".join(f"\n  {detail}" for detail in self.details)
        return f"step {self.step} (epoch {self.epoch}, step_id {self.step_id}){lines}"


def compare(recorded: Message, now: Message, prefix: str = "") -> Iterator[str]:
    """One line for each field, at any depth, that differs between two messages of one type."""
    for field in recorded.DESCRIPTOR.fields:
        name = prefix + field.name
        before, after = getattr(recorded, field.name), getattr(now, field.name)
        if field.message_type is not None:
            has_before, has_after = recorded.HasField(field.name), now.HasField(field.name)
            if has_before and has_after:
                yield from compare(before, after, f"{name}.")
            elif has_before or has_after:
                yield f"{name}: {_present(has_before)} recorded, {_present(has_after)} now"
        elif field.is_repeated or field.type == FieldDescriptor.TYPE_BYTES:
            yield from _compare_columns(name, _column(before), _column(after))
        elif before != after:
            yield f"{name}: {before} recorded, {after} now"


def _present(has_field: bool) -> str:
    return "set" if has_field else "not set"


def _column(values: Any) -> list[Any]:
    """The values of a repeated field, or the ids of a `u32 bytes` field."""
    return list(unpack_u32(values)) if isinstance(values, bytes) else list(values)


def _compare_columns(name: str, recorded: list[Any], now: list[Any]) -> Iterator[str]:
    if recorded == now:
        return
    both = min(len(recorded), len(now))
    index = next((i for i in range(both) if recorded[i] != now[i]), both)
    before, after = _at(recorded, index), _at(now, index)
    lengths = ""
    if len(recorded) != len(now):
        lengths = f" (of {len(recorded)} recorded, {len(now)} now)"
    yield f"{name}[{index}]: {before} recorded, {after} now{lengths}"


def _at(values: list[Any], index: int) -> str:
    return str(values[index]) if index < len(values) else "nothing"
