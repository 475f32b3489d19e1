"""One exported metric: its name, its meaning, how it is read, and how it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, TypeAlias

from prometheus_client.utils import floatToGoString

from scheduler_svc.engine.metrics.reading import Reading
from scheduler_svc.telemetry.buckets import Bounds
from scheduler_svc.telemetry.histogram import Exemplar, Histogram

_ENGINE_INDEX: Final = "0"  # readers of the vllm: names expect the label; there is one engine

Values: TypeAlias = Mapping[tuple[str, ...], float]
"""A value for each combination of a family's own labels."""

Type = Literal["gauge", "counter", "histogram"]

_SUFFIXES: Final[Mapping[Type, tuple[str, ...]]] = {
    "gauge": ("",),
    "counter": ("_total",),
    "histogram": ("_bucket", "_count", "_sum"),
}
_number: Callable[[float], str] = floatToGoString  # has no types
_ESCAPES: Final = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


@dataclass(frozen=True, slots=True)
class Family:
    """One metric; the name of a counter is without `_total`."""

    type: Type
    name: str
    documentation: str
    read: Callable[[Reading], float | Values | Histogram]
    labels: tuple[str, ...] = ()
    """Beside those that all series have."""

    @property
    def sample_names(self) -> Iterator[str]:
        """The names of its series, as a scraper stores them."""
        return (self.name + suffix for suffix in _SUFFIXES[self.type])

    def write(self, reading: Reading, *, is_openmetrics: bool) -> str:
        """Its lines, with its values of now; with exemplars under OpenMetrics."""
        # Only OpenMetrics calls the family of a counter otherwise than its series.
        is_short = is_openmetrics or self.type != "counter"
        name = self.name if is_short else f"{self.name}_total"
        head = f"# HELP {name} {self.documentation}\n# TYPE {name} {self.type}\n"
        common = f'engine="{_ENGINE_INDEX}",model_name="{_escaped(reading.model_name)}"'
        value = self.read(reading)
        if isinstance(value, Histogram):
            return head + "".join(self._histogram_lines(value, common, is_openmetrics))
        values: Values = value if isinstance(value, Mapping) else {(): value}
        return head + "".join(self._value_lines(values, common))

    def _value_lines(self, values: Values, common: str) -> Iterator[str]:
        (suffix,) = _SUFFIXES[self.type]
        for own, value in values.items():
            labels = [common, *map(_label, self.labels, own)]
            yield f"{self.name}{suffix}{{{','.join(labels)}}} {_number(value)}\n"

    def _histogram_lines(
        self, histogram: Histogram, common: str, is_openmetrics: bool
    ) -> Iterator[str]:
        name, total = self.name, 0
        bounds = _bound_names(histogram.bounds)
        for index, (bound, count) in enumerate(zip(bounds, histogram.counts, strict=True)):
            total += count
            line = f'{name}_bucket{{{common},le="{bound}"}} {total}.0'
            if is_openmetrics and (exemplar := histogram.exemplars.get(index)) is not None:
                line += _exemplar(exemplar)
            yield line + "\n"
        yield f"{name}_count{{{common}}} {total}.0\n"
        yield f"{name}_sum{{{common}}} {_number(histogram.sum)}\n"


def _escaped(value: str) -> str:
    return value.translate(_ESCAPES)


def _label(name: str, value: str) -> str:
    return f'{name}="{_escaped(value)}"'


def _exemplar(exemplar: Exemplar) -> str:
    labels = _label("trace_id", exemplar.trace_id.hex())
    return f" # {{{labels}}} {_number(exemplar.value)} {exemplar.unix_s:.3f}"


@lru_cache
def _bound_names(bounds: Bounds) -> tuple[str, ...]:
    return (*map(_number, bounds), "+Inf")
