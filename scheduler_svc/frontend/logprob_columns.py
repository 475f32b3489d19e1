"""The log-probability columns of an OutputBatch, as a message per token."""

from __future__ import annotations

import itertools

from blockyard.engine.v1 import engine_pb2 as engine_pb
from blockyard.v1 import generate_pb2 as pb


class LogprobColumns:
    """Reads the columns of one batch from front to back."""

    def __init__(self, batch: engine_pb.OutputBatch) -> None:
        """Begin at the batch's first token."""
        self._num_logprobs = iter(batch.num_logprobs)
        self._token_logprobs = iter(batch.token_logprobs)
        self._candidate_token_ids = batch.candidate_token_ids
        self._candidate_logprobs = batch.candidate_logprobs
        self._num_candidates_read = 0

    def take(self, num_tokens: int) -> list[pb.TokenLogprob]:
        """Those of the next tokens, all of one request; empty if it asked for none."""
        counts = itertools.islice(self._num_logprobs, num_tokens)
        found = [self._read(count - 1) for count in counts if count]
        assert len(found) in (0, num_tokens), (len(found), num_tokens)
        return found

    def _read(self, num_candidates: int) -> pb.TokenLogprob:
        begin = self._num_candidates_read
        self._num_candidates_read = end = begin + num_candidates
        return pb.TokenLogprob(
            logprob=next(self._token_logprobs),
            candidate_token_ids=self._candidate_token_ids[begin:end],
            candidate_logprobs=self._candidate_logprobs[begin:end],
        )
