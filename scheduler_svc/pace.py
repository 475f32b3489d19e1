"""How long requests run, learnt from those that ended by themselves."""

from __future__ import annotations

from typing import Final

_WEIGHT: Final = 0.05

CAUTION: Final = 1.15
"""Of the mean: what is counted on, for half of all requests take longer than the mean."""


class Pace:
    """Moving averages over ended branches. Nothing is known, and all is 0, before the first."""

    def __init__(self) -> None:
        self._num_seen = 0
        self._service_ns = 0.0  # from first admission to end
        self._output_tokens = 0.0
        self._max_output_tokens = 0.0

    def observe(self, service_ns: int, num_output_tokens: int, max_output_tokens: int) -> None:
        """A branch ended so long after its request was first admitted [ns]."""
        self._num_seen += 1
        weight = max(_WEIGHT, 1 / self._num_seen)
        self._service_ns += weight * (service_ns - self._service_ns)
        self._output_tokens += weight * (num_output_tokens - self._output_tokens)
        self._max_output_tokens += weight * (max_output_tokens - self._max_output_tokens)

    def expected_ns(self, max_output_tokens: int) -> float:
        """Service time of one more, with caution [ns].

        It will use the share of its longest output that others used of theirs, at the speed that
        they had: at today's load, for a step with more rows takes longer.
        """
        if not self._num_seen:
            return 0.0
        return CAUTION * max_output_tokens / self._max_output_tokens * self._service_ns

    def wait_ns(self, num_waiting: int, num_running: int) -> float:
        """Until so many that wait have entered, while as many as now run [ns]."""
        return num_waiting * self._service_ns / max(1, num_running)
