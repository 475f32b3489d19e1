"""What the log says of a collector that does not take what it is sent."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


class LossReport:
    """One line when something begins to be lost, and one when it arrives again."""

    def __init__(self, what: str, endpoint: str) -> None:
        """`what` is sent to the collector at `endpoint`, e.g. traces."""
        self._what = what
        self._endpoint = endpoint
        self._is_failing = False

    def note(self, *, is_taken: bool) -> None:
        """Something was sent, and taken or not."""
        if not is_taken and not self._is_failing:
            log.warning("no %s: the collector at %s does not take them", self._what, self._endpoint)
        elif is_taken and self._is_failing:
            log.info("the collector at %s takes %s again", self._endpoint, self._what)
        self._is_failing = not is_taken
