from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from scheduler_svc.errors import ERRORS, Reason, RequestError
from scheduler_svc.frontend.status import status_of

API = Path(__file__).parents[2] / "docs" / "api.md"


def test_every_reason_is_in_the_table_and_the_table_in_the_documentation() -> None:
    assert set(ERRORS) == set(Reason)
    rows = [
        f"| {reason} | {kind.code.name} | {kind.when} | {kind.remedy} "
        f"| {'yes' if kind.is_retryable else 'no'} |"
        for reason, kind in ERRORS.items()
    ]
    text = API.read_text()
    assert [row for row in rows if row not in text] == []


def test_only_what_may_succeed_later_is_retryable() -> None:
    retryable = {kind.code for kind in ERRORS.values() if kind.is_retryable}
    assert retryable == {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}


@pytest.mark.parametrize("reason", Reason)
def test_every_error_has_a_status_of_its_code_with_its_reason(reason: Reason) -> None:
    status = status_of(RequestError(reason, "message", subject="a.b", retry_delay_s=0.25))
    assert (status.code, status.message) == (ERRORS[reason].code.value[0], "message")
    names = [detail.TypeName().removeprefix("google.rpc.") for detail in status.details]
    assert names[0] == "ErrorInfo"
    assert names[1] in ("BadRequest", "QuotaFailure")
    assert names[2] == "RetryInfo"
    assert reason.encode() in status.details[0].value
