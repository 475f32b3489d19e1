"""Whether a plan is held until beams can join it, or goes out without them."""

from __future__ import annotations

from typing import Final

from blockyard.executor.v1 import executor_pb2 as pb

MAX_DELAY: Final = 0.15
"""Share of a step by which the rows beside beams may be slowed down."""

_WEIGHT: Final = 0.1
_FORGETTING: Final = 0.99
_FIRST_BUBBLE_NS: Final = 1e6


class BeamPace:
    """Step time and bubble, as moving averages of what the executor measures.

    The next input of a beam is known only once the last result is committed. Held plans leave the
    device idle for a bubble each step; plans that go out at once leave beams out of every other
    step. So plans are held while the bubble is small beside the step.
    """

    def __init__(self) -> None:
        self._step_ns = 0.0
        self._bubble_ns = _FIRST_BUBBLE_NS

    @property
    def should_hold(self) -> bool:
        """Whether to plan only when nothing is in flight, while beams run."""
        return self._bubble_ns <= MAX_DELAY * self._step_ns

    def observe(self, timings: pb.StepTimings) -> None:
        """Take a step's timings; one before which the device was idle shows the bubble."""
        step_ns = timings.apply_ns + timings.forward_ns + timings.sample_ns
        self._step_ns += _WEIGHT * (step_ns - self._step_ns)
        if timings.idle_ns:
            self._bubble_ns += _WEIGHT * (min(timings.idle_ns, step_ns) - self._bubble_ns)
        else:
            self._bubble_ns *= _FORGETTING  # so that it is tried again now and then
