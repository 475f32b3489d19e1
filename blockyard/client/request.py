"""What the clients send."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Required, TypedDict

from blockyard.client.errors import BlockyardError
from blockyard.v1 import generate_pb2 as pb

EarlyStopping = Literal["heuristic", "at_width", "never"]
"""When a search with `width` ended hypotheses is over: no running beam beats them at its present
length, at once, or no running beam can beat them at any length."""
_EARLY_STOPPING: dict[str, pb.EarlyStopping.ValueType] = {
    "heuristic": pb.EARLY_STOPPING_HEURISTIC,
    "at_width": pb.EARLY_STOPPING_AT_WIDTH,
    "never": pb.EARLY_STOPPING_NEVER,
}


class Message(TypedDict):
    """One turn of a chat."""

    role: Required[str]  # "system", "user" or "assistant"
    content: Required[str]


class BeamSearch(TypedDict, total=False):
    """Beam search instead of sampling, see generate.proto."""

    width: Required[int]  # beams kept at each step
    num_choices: int  # returned, best first; 1 if left out
    length_penalty: float  # score = log-probability / output tokens ** length_penalty
    early_stopping: EarlyStopping


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
    num_samples: int  # independent samples, each a choice
    beam: BeamSearch
    logprobs: int  # with every token its log-probability and those of so many likeliest ones
    cache_salt: bytes | str  # share KV only with requests of the same salt; text as UTF-8
    cache_off: bool  # share KV with no other request
    priority: int  # class of service, -10 to 10; higher is served first


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
    request = pb.GenerateRequest()
    with _naming("prompt"):
        if prompt is not None:
            request.prompt = prompt
    with _naming("token_ids"):
        if token_ids is not None:
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(token_ids)
    with _naming("messages"):
        if messages is not None:
            request.chat.SetInParent()
            request.chat.messages.extend(pb.ChatMessage(**message) for message in messages)
    for name, value in options.items():
        if value is not None:
            with _naming(name):
                _set_option(request, name, value)
    return request


@contextlib.contextmanager
def _naming(field: str) -> Iterator[None]:
    """Protobuf's own errors, a wrong type or range or text that is not UTF-8, with the field."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise _invalid(f"{field}: {error}") from error


def _set_option(request: pb.GenerateRequest, name: str, value: Any) -> None:
    """Set one of GenerateOptions. Raises TypeError, ValueError."""
    match name:
        case "temperature" | "top_k" | "top_p" | "min_p" | "seed":
            setattr(request.sampling, name, value)
        case "max_tokens" | "ignore_eos":
            setattr(request.stop, name, value)
        case "stop":
            request.stop.strings.extend([value] if isinstance(value, str) else value)
        case "stop_token_ids":
            request.stop.token_ids.extend(value)
        case "beam":
            request.beam.CopyFrom(_beam(value))
        case "logprobs":
            request.logprobs.num_candidates = value
            request.logprobs.SetInParent()
        case "cache_salt":
            request.cache.salt = value.encode() if isinstance(value, str) else value
        case "cache_off":
            request.cache.off = value
        case _:
            setattr(request, name, value)


def _beam(options: BeamSearch) -> pb.BeamSearch:
    fields: dict[str, Any] = dict(options)
    early_stopping = fields.pop("early_stopping", "heuristic")
    if early_stopping not in _EARLY_STOPPING:
        names = ", ".join(_EARLY_STOPPING)
        raise ValueError(f"early_stopping must be one of {names}: {early_stopping!r}")
    return pb.BeamSearch(**fields, early_stopping=_EARLY_STOPPING[early_stopping])


def _invalid(message: str) -> BlockyardError:
    return BlockyardError("INVALID_ARGUMENT", message)
