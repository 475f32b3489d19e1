"""Constants of the wire contracts that both sides must agree on."""

from __future__ import annotations

from typing import Final

EXECUTOR_PROTOCOL_VERSION: Final = 1
"""blockyard.executor.v1; checked at Open."""

ENGINE_PROTOCOL_VERSION: Final = 4
"""blockyard.engine.v1; checked at Hello."""

PADDING_BLOCK_ID: Final = 0
"""Never allocated; kernels may read it for padding rows."""

KEPT_RESULTS: Final = 4
"""Results that an executor keeps for a scheduler that reconnects."""

MAX_WINDOW: Final = 3
"""Most plans sent and not yet committed. Less than KEPT_RESULTS, so a resend never misses."""

HEARTBEAT_INTERVAL_S: Final = 1.0
"""Both sides of the step stream send a heartbeat at least this often."""
