"""Every metric that is exported: the table that docs/metrics.md, dashboards and alerts follow."""

from __future__ import annotations

from typing import Final

from scheduler_svc.engine.metrics.families_own import OWN_FAMILIES
from scheduler_svc.engine.metrics.families_vllm import VLLM_FAMILIES
from scheduler_svc.engine.metrics.family import Family

FAMILIES: Final[tuple[Family, ...]] = (*VLLM_FAMILIES, *OWN_FAMILIES)


def exported_names() -> frozenset[str]:
    """Names of all series, as a scraper stores them: with _total, _bucket, _sum and _count."""
    return frozenset(name for family in FAMILIES for name in family.sample_names)
