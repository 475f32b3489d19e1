from __future__ import annotations

import pytest

from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.frontend.logprob_columns import LogprobColumns

# Four tokens: with two candidates, two without any log-probability, with its own only.
BATCH = pb.OutputBatch(
    token_ids=[7, 8, 9, 10],
    num_logprobs=[3, 0, 0, 1],
    token_logprobs=[-1, -4],
    candidate_token_ids=[70, 71],
    candidate_logprobs=[-0.5, -2],
)


def test_each_request_gets_its_own() -> None:
    columns = LogprobColumns(BATCH)
    (first,) = columns.take(1)
    assert first.logprob == -1
    assert list(first.candidate_token_ids) == [70, 71]
    assert list(first.candidate_logprobs) == [-0.5, -2]
    assert columns.take(2) == []
    (last,) = columns.take(1)
    assert (last.logprob, len(last.candidate_token_ids)) == (-4, 0)


def test_a_request_has_them_for_all_tokens_or_none() -> None:
    with pytest.raises(AssertionError):
        LogprobColumns(BATCH).take(2)
