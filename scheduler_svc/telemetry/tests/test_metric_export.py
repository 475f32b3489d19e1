from __future__ import annotations

import logging
import time

import pytest

from scheduler_svc.telemetry.export import SHUTDOWN_S
from scheduler_svc.telemetry.loss_report import LossReport
from scheduler_svc.telemetry.metric_export import MetricExport


def test_what_is_lost_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    losses = LossReport("metrics", "there:1")
    with caplog.at_level(logging.INFO):
        for is_taken in (True, False, False, True, False):
            losses.note(is_taken=is_taken)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "WARNING"]
    assert "no metrics: the collector at there:1" in caplog.text


def test_nobody_waits_long_for_a_collector_that_is_not_there() -> None:
    export = MetricExport.to_collector("127.0.0.1:1", "s", list)
    begin = time.monotonic()
    export.close()
    export.close()
    assert time.monotonic() - begin < 2 * SHUTDOWN_S + 1
