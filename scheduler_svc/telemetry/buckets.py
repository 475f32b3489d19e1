"""Upper bounds of histogram buckets. Existing dashboards and queries expect exactly these."""

from __future__ import annotations

from typing import Final

Bounds = tuple[float, ...]

# Seconds, as vLLM has them.
TIME_TO_FIRST_TOKEN: Final[Bounds] = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN: Final[Bounds] = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST: Final[Bounds] = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)

# Tokens, as vLLM has them, but for any longest sequence.
TOKENS: Final[Bounds] = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
STEP_TOKENS: Final[Bounds] = (1.0, *(float(8 << power) for power in range(12)))
NUM_CHOICES: Final[Bounds] = (1.0, 2.0, 5.0, 10.0, 20.0)

# Seconds, of what a step costs the engine, and the device's waiting for it.
STEP: Final[Bounds] = (
    *(20e-6, 50e-6, 75e-6, 100e-6, 150e-6, 200e-6, 300e-6, 500e-6),
    *(1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3),
)

# Seconds, from the GenAI conventions.
GEN_AI_REQUEST_DURATION: Final[Bounds] = tuple(0.01 * 2**power for power in range(14))
GEN_AI_TIME_PER_OUTPUT_TOKEN: Final[Bounds] = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
GEN_AI_TIME_TO_FIRST_TOKEN: Final[Bounds] = TIME_TO_FIRST_TOKEN[:16]
