"""What the clients return."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from blockyard.v1 import generate_pb2 as pb

FinishReason = Literal["stop", "length"]
_FINISH_REASONS: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took. `seed` gives the same output again."""

    prompt_tokens: int
    output_tokens: int
    """Of all choices."""
    cached_tokens: int
    """Prompt tokens whose KV was found in the prefix cache."""
    seed: int
    preemptions: int
    block_seconds: float
    """Integral of KV blocks held over time [block * s]."""
    blocks_shared: int
    """Taken over from the cache or another choice instead of being computed."""
    blocks_copied: int
    """So that choices could part."""
    blocks_swapped_out: int
    blocks_swapped_in: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms of probabilities under the model, before temperature and filters."""

    logprob: float
    candidates: tuple[tuple[int, float], ...]
    """(token id, its log-probability) of the likeliest tokens, best first."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next piece of a choice. The last one of a choice has `finish_reason`."""

    text: str
    token_ids: tuple[int, ...]
    choice_index: int
    finish_reason: FinishReason | None
    stopped_by: int | str | None
    """The stop token's id or the stop string, if one ended the choice."""
    usage: Usage | None
    """In the last chunk of the request."""
    request_id: str
    logprobs: tuple[TokenLogprob, ...]
    """Parallel to `token_ids`, if asked for."""
    score: float
    """Of a beam search's choice, in its last chunk."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole output of a request."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stopped_by: int | str | None
    """The stop token's id or the stop string, if one ended it."""
    logprobs: tuple[TokenLogprob, ...]
    """Parallel to `token_ids`, if asked for."""
    score: float
    """Of a beam search."""


@dataclass(frozen=True, slots=True)
class Completion:
    """All outputs of a request; of the first one, `text` and the like are at hand."""

    choices: tuple[Choice, ...]
    """By index; of a beam search, best first."""
    usage: Usage
    request_id: str

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the first choice."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Of the first choice."""
        return self.choices[0].finish_reason

    @property
    def stopped_by(self) -> int | str | None:
        """Of the first choice."""
        return self.choices[0].stopped_by


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model served, and its limits."""

    name: str
    digest: str
    vocab_size: int
    max_model_len: int
    """Longest prompt + output [tokens]."""
    has_chat_template: bool
    eos_token_ids: tuple[int, ...]
    version: str
    max_branches: int
    """Most samples or beams of one request."""
    device: str
    """What computes, for people."""


def chunk(response: pb.GenerateResponse) -> Chunk:
    """From the wire."""
    return Chunk(
        text=response.text,
        token_ids=tuple(response.token_ids),
        choice_index=response.choice_index,
        finish_reason=_FINISH_REASONS.get(response.finish_reason),
        stopped_by=_stopped_by(response.stop_reason),
        usage=_usage(response.usage) if response.HasField("usage") else None,
        request_id=response.request_id,
        logprobs=_logprobs(response.logprobs),
        score=response.score,
    )


def completion(response: pb.GenerateUnaryResponse) -> Completion:
    """From the wire."""
    choices = tuple(
        Choice(
            index=choice.index,
            text=choice.text,
            token_ids=tuple(choice.token_ids),
            finish_reason=_FINISH_REASONS.get(choice.finish_reason),
            stopped_by=_stopped_by(choice.stop_reason),
            logprobs=_logprobs(choice.logprobs),
            score=choice.score,
        )
        for choice in response.choices
    )
    return Completion(choices, _usage(response.usage), response.request_id)


def model_info(response: pb.GetModelResponse) -> ModelInfo:
    """From the wire."""
    return ModelInfo(
        name=response.name,
        digest=response.digest,
        vocab_size=response.vocab_size,
        max_model_len=response.max_model_len,
        has_chat_template=response.has_chat_template,
        eos_token_ids=tuple(response.eos_token_ids),
        version=response.version,
        max_branches=response.max_branches,
        device=response.device,
    )


def _stopped_by(reason: pb.StopReason) -> int | str | None:
    match reason.WhichOneof("reason"):
        case "token_id":
            return reason.token_id
        case "string":
            return reason.string
    return None


def _usage(usage: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        output_tokens=usage.output_tokens,
        cached_tokens=usage.cached_tokens,
        seed=usage.seed,
        preemptions=usage.preemptions,
        block_seconds=usage.block_seconds,
        blocks_shared=usage.blocks_shared,
        blocks_copied=usage.blocks_copied,
        blocks_swapped_out=usage.blocks_swapped_out,
        blocks_swapped_in=usage.blocks_swapped_in,
    )


def _logprobs(entries: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            entry.logprob,
            tuple(zip(entry.candidate_token_ids, entry.candidate_logprobs, strict=True)),
        )
        for entry in entries
    )
