"""What the client sends and returns; the two clients share all of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Required, TypedDict

from blockyard.client.errors import BlockyardError
from blockyard.v1 import generate_pb2 as pb

FinishReason = Literal["stop", "length"]
_FINISH_REASONS: dict[int, FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}


class Message(TypedDict):
    """One turn of a chat."""

    role: Required[str]  # "system", "user" or "assistant"
    content: Required[str]


class GenerateOptions(TypedDict, total=False):
    """Options of a request. Those left out take the model's defaults, see generate.proto."""

    max_tokens: int
    temperature: float  # 0: greedy
    top_k: int
    top_p: float
    min_p: float
    seed: int
    stop: str | Sequence[str]  # text that ends the output; not part of it
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    request_id: str
    skip_text: bool  # token ids alone


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took. `seed` gives the same output again."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    seed: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next piece of an output. The last one of a choice has `finish_reason`."""

    text: str
    token_ids: tuple[int, ...]
    choice_index: int
    finish_reason: FinishReason | None
    stopped_by: int | str | None
    """The stop token's id or the stop string, if one ended the output."""
    usage: Usage | None
    """In the last chunk of the request."""
    request_id: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole output."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stopped_by: int | str | None
    usage: Usage
    request_id: str


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


def build_request(
    prompt: str | None,
    token_ids: Iterable[int] | None,
    messages: Iterable[Message] | None,
    options: GenerateOptions,
) -> pb.GenerateRequest:
    """The request of exactly one input. Raises BlockyardError INVALID_ARGUMENT."""
    given = [value for value in (prompt, token_ids, messages) if value is not None]
    if len(given) != 1:
        raise _invalid("give exactly one of prompt, token_ids and messages")
    unknown = options.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        raise _invalid(f"unknown option {min(unknown)!r}")
    try:
        request = pb.GenerateRequest(
            sampling=_sampling(options),
            stop=_stop(options),
            request_id=options.get("request_id", ""),
            skip_text=options.get("skip_text", False),
        )
        if prompt is not None:
            request.prompt = prompt
        elif token_ids is not None:
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(token_ids)
        elif messages is not None:
            request.chat.SetInParent()
            request.chat.messages.extend(pb.ChatMessage(**message) for message in messages)
    except (TypeError, ValueError) as error:  # protobuf's own: a wrong type, or out of range
        raise _invalid(str(error)) from error
    return request


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
    )


def completion(response: pb.GenerateUnaryResponse) -> Completion:
    """From the wire; the first choice."""
    choice = response.choices[0]
    return Completion(
        text=choice.text,
        token_ids=tuple(choice.token_ids),
        finish_reason=_FINISH_REASONS.get(choice.finish_reason),
        stopped_by=_stopped_by(choice.stop_reason),
        usage=_usage(response.usage),
        request_id=response.request_id,
    )


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
    )


def _sampling(options: GenerateOptions) -> pb.SamplingParams:
    return pb.SamplingParams(
        temperature=options.get("temperature"),
        top_k=options.get("top_k"),
        top_p=options.get("top_p"),
        min_p=options.get("min_p"),
        seed=options.get("seed"),
    )


def _stop(options: GenerateOptions) -> pb.StopConditions:
    strings = options.get("stop", ())
    return pb.StopConditions(
        max_tokens=options.get("max_tokens"),
        strings=[strings] if isinstance(strings, str) else strings,
        token_ids=options.get("stop_token_ids", ()),
        ignore_eos=options.get("ignore_eos", False),
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
    )


def _invalid(message: str) -> BlockyardError:
    return BlockyardError("INVALID_ARGUMENT", message)
