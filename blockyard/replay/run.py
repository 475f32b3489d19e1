"""One pass over a plan log, through one half of the system or both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from blockyard.common.version import software_version
from blockyard.replay.difference import Difference, Steps
from blockyard.replay.executor import ExecutorReplay
from blockyard.replay.scheduler import SchedulerReplay
from scheduler_svc.plan_log import policy_of
from scheduler_svc.plan_log_reader import Event, PlanLogError, PlanLogReader


class ReplayError(Exception):
    """The log cannot be read, or not to its end."""


class Half(Protocol):
    """SchedulerReplay or ExecutorReplay."""

    @property
    def summary(self) -> str:
        """What was found so far, for people."""

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to compare."""

    def apply(self, event: Event) -> Difference | None:
        """Take what happened next; returns what came out otherwise, after which it must end."""

    def finish(self) -> Difference | None:
        """The log ends here; returns what came out otherwise."""


class Replay:
    """A log, and the halves that it goes through."""

    def __init__(
        self, paths: Sequence[Path], *, scheduler: bool, executor: bool, steps: Steps
    ) -> None:
        """Read the headers.

        Args:
            paths: files of one log, in any order.
            scheduler: replay the scheduler's half.
            executor: replay the executor's half.
            steps: which plans and results to compare; both halves stop after the last.

        Raises ReplayError.
        """
        try:
            self._reader = PlanLogReader(paths)
            policy = policy_of(self._reader.header.policy)
        except (PlanLogError, OSError, ValueError) as error:  # ValueError: an unknown policy
            raise ReplayError(str(error)) from error
        self.halves: dict[str, Half] = {}
        self.differences: dict[str, Difference] = {}
        """The first one of each half that has any, by the half's name."""
        if scheduler:
            self.halves["scheduler"] = SchedulerReplay(policy, steps)
        if executor:
            self.halves["executor"] = ExecutorReplay(steps)

    @property
    def num_bytes(self) -> int:
        """Of the log."""
        return self._reader.num_bytes

    @property
    def other_version(self) -> str | None:
        """The software that wrote the log, if it is not this one."""
        version = self._reader.header.software_version
        return version if version != software_version() else None

    def run(self, on_progress: Callable[[int], object]) -> None:
        """Replay until both halves are done.

        Args:
            on_progress: called with the bytes read so far.

        Raises ReplayError if the log cannot be read on; what was found before stays.
        """
        try:
            for event in self._reader:
                if not (active := self._active()):
                    return
                for name, half in active.items():
                    self._note(name, half.apply(event))
                on_progress(self._reader.num_bytes_read)
        except (PlanLogError, OSError) as error:
            raise ReplayError(str(error)) from error
        for name, half in self._active().items():
            self._note(name, half.finish())

    def _active(self) -> Mapping[str, Half]:
        return {
            name: half
            for name, half in self.halves.items()
            if name not in self.differences and not half.is_done
        }

    def _note(self, name: str, difference: Difference | None) -> None:
        if difference is not None:
            self.differences[name] = difference
