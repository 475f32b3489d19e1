"""The answer to a scrape: text 0.0.4, or OpenMetrics with exemplars for scrapers that prefer it.

Names keep their colon in both; prometheus_client would make an underscore of it under OpenMetrics,
and take 4 ms for such an answer on the loop that schedules, where this takes less than one.
"""

from __future__ import annotations

import asyncio
import enum
from typing import Final, NamedTuple

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics.exposition import ALLOWUTF8, CONTENT_TYPE_LATEST

from scheduler_svc.engine.metrics.families import FAMILIES
from scheduler_svc.engine.metrics.reading import MetricsSource

_OPENMETRICS: Final = "application/openmetrics-text"


class Format(enum.Enum):
    """What can be answered; the value is the content type."""

    TEXT = CONTENT_TYPE_PLAIN_0_0_4
    OPENMETRICS = CONTENT_TYPE_LATEST
    OPENMETRICS_UTF8 = f"{CONTENT_TYPE_LATEST}; escaping={ALLOWUTF8}"
    """For scrapers that ask for this escaping; the same bytes."""


class _Offer(NamedTuple):
    """One entry of an Accept header."""

    media_type: str
    parameters: dict[str, str]

    @property
    def quality(self) -> float:
        """From 0, refused, to 1."""
        try:
            return float(self.parameters.get("q", "1"))
        except ValueError:
            return 0.0


def choose_format(accept: str) -> Format:
    """The best answer to an Accept header; what makes no sense gets text."""
    offers = [_offer(entry) for entry in accept.split(",")]
    best_text = max((o.quality for o in offers if o.media_type == "text/plain"), default=0.0)
    ours = [o for o in offers if o.media_type == _OPENMETRICS and o.quality > 0]
    if not ours or max(o.quality for o in ours) < best_text:
        return Format.TEXT
    is_utf8 = any(o.parameters.get("escaping") == ALLOWUTF8 for o in ours)
    return Format.OPENMETRICS_UTF8 if is_utf8 else Format.OPENMETRICS


def _offer(entry: str) -> _Offer:
    media_type, *parameters = (part.strip() for part in entry.split(";"))
    pairs = (parameter.partition("=") for parameter in parameters)
    return _Offer(media_type.lower(), {name.strip(): value.strip() for name, _, value in pairs})


async def render(source: MetricsSource, chosen: Format) -> bytes:
    """The body. Nothing before an executor has opened.

    The loop goes round after each family, so that no step waits for all of them.
    """
    parts: list[str] = []
    is_openmetrics = chosen is not Format.TEXT
    if (reading := source.read_metrics()) is not None:
        for family in FAMILIES:
            parts.append(family.write(reading, is_openmetrics=is_openmetrics))
            await asyncio.sleep(0)
    if is_openmetrics:
        parts.append("# EOF\n")
    return "".join(parts).encode()
