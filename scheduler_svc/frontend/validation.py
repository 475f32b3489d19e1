"""Form checks of a GenerateRequest, before anything is queued. Pure functions.

What needs the queue or the pool is checked by the engine, which answers with a Rejection.
"""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

from blockyard.common.model_dir import ModelDir, SamplingDefaults
from blockyard.engine.v1 import engine_pb2 as engine_pb
from blockyard.v1 import generate_pb2 as pb
from scheduler_svc.errors import Reason, RequestError, invalid, too_long
from scheduler_svc.request import MAX_PRIORITY

MAX_REQUEST_ID_CHARACTERS: Final = 128
MAX_BEAM_WIDTH: Final = 32
MAX_LOGPROB_CANDIDATES: Final = 20
MAX_CACHE_SALT_BYTES: Final = 64
MAX_STOP_STRINGS: Final = 16
MAX_STOP_TOKEN_IDS: Final = 256
MAX_TEMPERATURE: Final = 100.0
SEED_BITS: Final = 63
ROLES: Final = frozenset({"system", "user", "assistant"})

_EARLY_STOPPING: Final = {
    pb.EARLY_STOPPING_UNSPECIFIED: engine_pb.EARLY_STOPPING_HEURISTIC,
    pb.EARLY_STOPPING_HEURISTIC: engine_pb.EARLY_STOPPING_HEURISTIC,
    pb.EARLY_STOPPING_AT_WIDTH: engine_pb.EARLY_STOPPING_AT_WIDTH,
    pb.EARLY_STOPPING_NEVER: engine_pb.EARLY_STOPPING_NEVER,
}


@dataclass(frozen=True, slots=True)
class Sampling:
    """Resolved sampling: the request's values, the model's defaults for the rest."""

    temperature: float
    top_k: int  # 0: off
    top_p: float  # 1: off
    min_p: float  # 0: off
    seed: int


@dataclass(frozen=True, slots=True)
class Stopping:
    """Resolved stop conditions."""

    max_tokens: int  # 0: what fits
    strings: tuple[str, ...]
    token_ids: tuple[int, ...]  # with the model's end-of-sequence ids unless ignored


@dataclass(frozen=True, slots=True)
class Choices:
    """How many outputs, and how they come about."""

    num_choices: int
    beam: engine_pb.BeamSearch | None  # None: independent samples


@dataclass(frozen=True, slots=True)
class Wanted:
    """All of a request but its input, checked and resolved."""

    sampling: Sampling
    stopping: Stopping
    choices: Choices
    num_logprobs: int  # with each token: 0 none, 1 + k: its own and the k likeliest
    cache: pb.PrefixCache
    priority: int = 0  # class of service; higher is served first


def check(request: pb.GenerateRequest, model: ModelDir, max_branches: int) -> Wanted:
    """Everything but the request id and the prompt's length. Raises RequestError."""
    check_input(request, model.vocab_size)
    choices = check_choices(request, max_branches)
    if choices.beam is None:
        sampling = check_sampling(request.sampling, model.sampling_defaults)
    else:
        sampling = check_beam_sampling(request.sampling)
    stopping = check_stopping(request, model.eos_token_ids, model.vocab_size)
    num_logprobs = check_logprobs(request)
    check_cache(request.cache)
    if abs(request.priority) > MAX_PRIORITY:
        raise invalid(
            "priority", f"must be in [{-MAX_PRIORITY}, {MAX_PRIORITY}]: {request.priority}"
        )
    return Wanted(sampling, stopping, choices, num_logprobs, request.cache, request.priority)


def check_request_id(request: pb.GenerateRequest) -> str:
    """The client's request id, or a new one. Raises RequestError."""
    request_id = request.request_id
    if len(request_id) > MAX_REQUEST_ID_CHARACTERS or not request_id.isprintable():
        raise invalid(
            "request_id", f"must be at most {MAX_REQUEST_ID_CHARACTERS} printable characters"
        )
    return request_id or uuid.uuid4().hex


def check_input(request: pb.GenerateRequest, vocab_size: int) -> None:
    """Exactly one input, not empty, well formed. Raises RequestError."""
    kind = request.WhichOneof("input")
    if kind is None:
        raise RequestError(
            Reason.INVALID_FIELD, "one of prompt, token_ids, chat must be set", subject="input"
        )
    if kind == "prompt" and not request.prompt:
        raise invalid("prompt", "is empty")
    if kind == "token_ids":
        _check_token_ids("token_ids.ids", request.token_ids.ids, vocab_size)
        if not request.token_ids.ids:
            raise invalid("token_ids.ids", "is empty")
    if kind == "chat":
        _check_chat(request.chat)


def check_sampling(params: pb.SamplingParams, defaults: SamplingDefaults) -> Sampling:
    """Ranges, and defaults for what is not set. Raises RequestError."""
    temperature = _set_or(params, "temperature", defaults.temperature)
    top_p = _set_or(params, "top_p", defaults.top_p)
    min_p = _set_or(params, "min_p", defaults.min_p)
    if not (math.isfinite(temperature) and 0 <= temperature <= MAX_TEMPERATURE):
        raise invalid("sampling.temperature", f"must be in [0, {MAX_TEMPERATURE:g}]: {temperature}")
    if not 0 < top_p <= 1:
        raise invalid("sampling.top_p", f"must be in (0, 1]: {top_p}")
    if not 0 <= min_p <= 1:
        raise invalid("sampling.min_p", f"must be in [0, 1]: {min_p}")
    return Sampling(
        temperature=temperature,
        top_k=params.top_k if params.HasField("top_k") else defaults.top_k,
        top_p=top_p,
        min_p=min_p,
        seed=_seed(params),
    )


def check_beam_sampling(params: pb.SamplingParams) -> Sampling:
    """Beam search draws nothing, so nothing may say how. Raises RequestError."""
    if params.temperature != 0:
        raise invalid(
            "sampling.temperature", f"must be 0 or not set with beam: {params.temperature}"
        )
    for field in ("top_k", "top_p", "min_p"):
        if params.HasField(field):
            raise invalid(f"sampling.{field}", "must not be set with beam")
    return Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=_seed(params))


def check_choices(request: pb.GenerateRequest, max_branches: int) -> Choices:
    """Samples or beams, within what the engine runs for one request. Raises RequestError."""
    if request.HasField("beam"):
        if request.num_samples:
            raise invalid("num_samples", "and beam exclude each other")
        beam = _check_beam(request.beam, max_branches)
        return Choices(beam.num_returned, beam)
    if request.num_samples > max_branches:
        raise invalid("num_samples", f"is {request.num_samples}, limit {max_branches}")
    return Choices(max(1, request.num_samples), None)


def check_logprobs(request: pb.GenerateRequest) -> int:
    """`Wanted.num_logprobs`. Raises RequestError."""
    if not request.HasField("logprobs"):
        return 0
    num_candidates = request.logprobs.num_candidates
    if num_candidates > MAX_LOGPROB_CANDIDATES:
        raise invalid(
            "logprobs.num_candidates", f"is {num_candidates}, limit {MAX_LOGPROB_CANDIDATES}"
        )
    if num_candidates and request.HasField("beam"):
        raise invalid("logprobs.num_candidates", f"must be 0 with beam: {num_candidates}")
    return 1 + num_candidates


def check_cache(cache: pb.PrefixCache) -> None:
    """With whom the prompt's KV may be shared. Raises RequestError."""
    if len(cache.salt) > MAX_CACHE_SALT_BYTES:
        raise invalid("cache.salt", f"has {len(cache.salt)} bytes, limit {MAX_CACHE_SALT_BYTES}")
    if cache.salt and cache.off:
        raise invalid("cache.salt", "and cache.off exclude each other")


def check_stopping(
    request: pb.GenerateRequest, eos_token_ids: tuple[int, ...], vocab_size: int
) -> Stopping:
    """Stop conditions. Raises RequestError."""
    stop = request.stop
    if stop.HasField("max_tokens") and stop.max_tokens == 0:
        raise invalid("stop.max_tokens", "must be at least 1")
    if len(stop.strings) > MAX_STOP_STRINGS:
        raise invalid("stop.strings", f"has {len(stop.strings)} entries, limit {MAX_STOP_STRINGS}")
    if not all(stop.strings):
        raise invalid("stop.strings", "has an empty entry")
    if stop.strings and request.skip_text:
        raise invalid("stop.strings", "needs text, which skip_text turns off")
    if len(stop.token_ids) > MAX_STOP_TOKEN_IDS:
        raise invalid(
            "stop.token_ids", f"has {len(stop.token_ids)} entries, limit {MAX_STOP_TOKEN_IDS}"
        )
    _check_token_ids("stop.token_ids", stop.token_ids, vocab_size)
    token_ids = dict.fromkeys(stop.token_ids)
    if not stop.ignore_eos:
        token_ids |= dict.fromkeys(eos_token_ids)
    return Stopping(stop.max_tokens, tuple(stop.strings), tuple(token_ids))


def check_length(num_prompt_tokens: int, max_tokens: int, max_model_len: int) -> None:
    """Prompt and output must fit together; `max_tokens` 0 asks for one token at least."""
    if num_prompt_tokens == 0:
        raise invalid("input", "has no tokens: the prompt is empty")
    if num_prompt_tokens >= max_model_len:
        raise too_long(
            "input",
            f"the prompt has {num_prompt_tokens} tokens; prompt and output together may have "
            f"{max_model_len}, and at least one is output",
        )
    if num_prompt_tokens + max_tokens > max_model_len:
        raise too_long(
            "stop.max_tokens",
            f"prompt ({num_prompt_tokens} tokens) + stop.max_tokens ({max_tokens}) = "
            f"{num_prompt_tokens + max_tokens}, more than the {max_model_len} that fit",
        )


def _check_beam(beam: pb.BeamSearch, max_branches: int) -> engine_pb.BeamSearch:
    widest = min(MAX_BEAM_WIDTH, max_branches)
    if not 1 <= beam.width <= widest:
        raise invalid("beam.width", f"must be 1 to {widest}: {beam.width}")
    if beam.num_choices > beam.width:
        raise invalid(
            "beam.num_choices", f"is {beam.num_choices}, more than beam.width ({beam.width})"
        )
    length_penalty = beam.length_penalty if beam.HasField("length_penalty") else 1.0
    if not math.isfinite(length_penalty):
        raise invalid("beam.length_penalty", f"must be finite: {length_penalty}")
    if beam.early_stopping not in _EARLY_STOPPING:
        raise invalid("beam.early_stopping", f"has no value {beam.early_stopping}")
    return engine_pb.BeamSearch(
        width=beam.width,
        num_returned=max(1, beam.num_choices),
        length_penalty=length_penalty,
        early_stopping=_EARLY_STOPPING[beam.early_stopping],
    )


def _seed(params: pb.SamplingParams) -> int:
    return params.seed if params.HasField("seed") else secrets.randbits(SEED_BITS)


def _set_or(
    params: pb.SamplingParams, field: Literal["temperature", "top_p", "min_p"], default: float
) -> float:
    value: float = getattr(params, field)
    return value if params.HasField(field) else default


def _check_token_ids(field: str, token_ids: Collection[int], vocab_size: int) -> None:
    # Unsigned on the wire, so only the upper end can be wrong.
    largest = max(token_ids, default=0)
    if largest >= vocab_size:
        raise invalid(field, f"holds {largest}; the vocabulary has {vocab_size} ids")


def _check_chat(chat: pb.ChatMessages) -> None:
    if not chat.messages:
        raise invalid("chat.messages", "is empty")
    for index, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise invalid(
                f"chat.messages[{index}].role",
                f"must be one of {', '.join(sorted(ROLES))}: {message.role[:32]!r}",
            )
