"""One choice of a request on its way to the client: tokens in as they come, chunks out.

Taking tokens costs little; text is made when a chunk is taken, except with stop strings, which must
be looked for token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from blockyard.engine.v1 import engine_pb2 as engine_pb
from blockyard.v1 import generate_pb2 as pb
from scheduler_svc.frontend.detokenizer import Detokenizer
from scheduler_svc.frontend.stop_strings import StopStrings


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a choice is complete."""

    reason: pb.FinishReason.ValueType
    stop_token_id: int | None = None
    stop_string: str | None = None
    score: float = 0.0  # of a beam search


class Chunk(NamedTuple):
    """What a client has not got yet of one choice."""

    choice_index: int
    token_ids: list[int]
    logprobs: list[pb.TokenLogprob]  # parallel to token_ids; empty: not asked for
    text: str
    ending: Ending | None  # in the last chunk of the choice


class ChoiceOutput:
    """Buffer of one choice."""

    def __init__(
        self,
        index: int,
        stop_token_ids: frozenset[int],
        detokenizer: Detokenizer | None,
        stop_strings: StopStrings | None,
        *,
        is_beam: bool,
    ) -> None:
        """Start empty.

        Args:
            index: of the choice, and its branch at the engine.
            stop_token_ids: their text is not part of the output.
            detokenizer: None: no text.
            stop_strings: needs a detokenizer.
            is_beam: only the engine ends it, with a score; a stop string just cuts the rest off.
        """
        self.num_output_tokens = 0
        self._index = index
        self._stop_token_ids = stop_token_ids
        self._detokenizer = detokenizer
        self._stop_strings = stop_strings
        self._is_beam = is_beam
        self._token_ids: list[int] = []
        self._logprobs: list[pb.TokenLogprob] = []
        self._text: list[str] = []
        self._stop_string: str | None = None  # the one found
        self._ending: Ending | None = None
        self._is_ending_taken = False

    @property
    def is_open(self) -> bool:
        """Whether more tokens are wanted."""
        return self._ending is None and self._stop_string is None

    @property
    def has_ended(self) -> bool:
        """Whether its ending is known."""
        return self._ending is not None

    @property
    def num_buffered_tokens(self) -> int:
        """Tokens that nobody took yet."""
        return len(self._token_ids)

    def push(self, token_ids: Sequence[int], logprobs: Sequence[pb.TokenLogprob]) -> bool:
        """Take new tokens while open; their log-probabilities are parallel, or empty.

        Returns whether that ended the choice: num_output_tokens are kept, the rest is dropped.
        """
        if self._stop_strings is not None:
            return self._push_matching(token_ids, logprobs, self._stop_strings)
        self._token_ids.extend(token_ids)
        self._logprobs.extend(logprobs)
        self.num_output_tokens += len(token_ids)
        return False

    def finish(self, finish: engine_pb.Finish) -> None:
        """The engine's end of the branch; its last tokens were pushed before."""
        if self._ending is not None:
            return
        stop_string = self._stop_string or self._end_text()
        if stop_string is not None:
            reason = pb.FINISH_REASON_STOP
            self._ending = Ending(reason, stop_string=stop_string, score=finish.score)
        else:
            self._ending = _ending_of(finish)

    def take(self) -> Chunk | None:
        """What is new, or None."""
        ending = None if self._is_ending_taken else self._ending
        if not self._token_ids and ending is None:
            return None
        token_ids, self._token_ids = self._token_ids, []
        logprobs, self._logprobs = self._logprobs, []
        if self._stop_strings is None:
            self._text.append(self._decode(token_ids))
            if ending is not None and self._detokenizer is not None:
                self._text.append(self._detokenizer.flush())
        text = "".join(self._text)
        self._text.clear()
        self._is_ending_taken = ending is not None
        return Chunk(self._index, token_ids, logprobs, text, ending)

    def drop(self) -> None:
        """Forget what nobody took."""
        self._token_ids.clear()
        self._logprobs.clear()
        self._text.clear()

    def _push_matching(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[pb.TokenLogprob],
        stop_strings: StopStrings,
    ) -> bool:
        num_taken = 0
        for token_id in token_ids:
            num_taken += 1
            text, self._stop_string = stop_strings.feed(self._decode([token_id]))
            self._text.append(text)
            if self._stop_string is not None:
                break
        self._token_ids.extend(token_ids[:num_taken])
        self._logprobs.extend(logprobs[:num_taken])
        self.num_output_tokens += num_taken
        if self._stop_string is None or self._is_beam:
            return False
        self._ending = Ending(pb.FINISH_REASON_STOP, stop_string=self._stop_string)
        return True

    def _decode(self, token_ids: Sequence[int]) -> str:
        if self._detokenizer is None or not token_ids:
            return ""
        # A stop token ends the choice, so it can only be the last.
        if token_ids[-1] in self._stop_token_ids:
            token_ids = token_ids[:-1]
        return self._detokenizer.feed(token_ids)

    def _end_text(self) -> str | None:
        """Release text that was held back; even that can complete a stop string."""
        if self._stop_strings is None or self._detokenizer is None:
            return None
        text, found = self._stop_strings.feed(self._detokenizer.flush())
        self._text.append(text)
        if found is None:
            self._text.append(self._stop_strings.flush())
        return found


def _ending_of(finish: engine_pb.Finish) -> Ending:
    if finish.reason == engine_pb.FINISH_REASON_LENGTH:
        return Ending(pb.FINISH_REASON_LENGTH, score=finish.score)
    token_id = finish.stop_token_id if finish.HasField("stop_token_id") else None
    return Ending(pb.FINISH_REASON_STOP, stop_token_id=token_id, score=finish.score)
