"""What the engine refuses: a submit that can never run, or one too many."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from blockyard.common.columns import unpack_u32
from blockyard.common.model_dir import ModelDirError
from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.beam import MAX_WIDTH, BeamParams, EarlyStopping
from scheduler_svc.errors import Reason, RequestError, invalid, too_long
from scheduler_svc.limits import Limits
from scheduler_svc.prefix_cache import MAX_SALT_BYTES
from scheduler_svc.request import MAX_BRANCHES, MAX_PRIORITY, Request, Sampling, TokenIds

MAX_LOGPROBS: Final = 20
"""Most likeliest tokens that a client may ask for beside each token."""

TextStop = Callable[[Sequence[str]], Callable[[TokenIds], bool]]
"""Makes the check whether output tokens complete one of these strings. Raises ModelDirError."""

_EARLY_STOPPING: Final = {
    pb.EARLY_STOPPING_UNSPECIFIED: EarlyStopping.HEURISTIC,
    pb.EARLY_STOPPING_HEURISTIC: EarlyStopping.HEURISTIC,
    pb.EARLY_STOPPING_AT_WIDTH: EarlyStopping.AT_WIDTH,
    pb.EARLY_STOPPING_NEVER: EarlyStopping.NEVER,
}


def rejection(request_id: int, error: RequestError) -> pb.Rejection:
    """The answer to the front end."""
    return pb.Rejection(
        request_id=request_id,
        message=str(error),
        reason=error.reason,
        subject=error.subject,
        retry_delay_ns=int((error.retry_delay_s or 0) * 1e9),
    )


def max_branches(limits: Limits) -> int:
    """Most samples or beams of one request that this executor runs at once."""
    return min(MAX_BRANCHES, limits.max_num_seqs)


def build_request(
    submit: pb.Submit,
    limits: Limits,
    *,
    key: int,
    frontend: int,
    now_ns: int,
    deadline_ns: int = 0,
    text_stop: TextStop | None = None,
) -> Request:
    """Make a request of a submit.

    Args:
        submit: what a front end sent; its own deadline, on another clock, is not looked at.
        limits: what it must fit.
        key: the engine's id of it; the order of keys is that of arrival.
        frontend: index of the link it came over.
        now_ns: its time of arrival [ns].
        deadline_ns: on the clock of `now_ns`; 0: none.
        text_stop: for beam search with stop strings.

    Raises RequestError if it can never run on this executor.
    """
    if abs(submit.priority) > MAX_PRIORITY:
        raise invalid("priority", f"is {submit.priority}, at most {MAX_PRIORITY} either way")
    if len(submit.prompt_token_ids) % 4:
        raise invalid("input", "is not a whole number of uint32")
    prompt = unpack_u32(submit.prompt_token_ids)
    if not len(prompt):
        raise invalid("input", "is empty: the prompt has no tokens")
    if int(prompt.max()) >= limits.vocab_size:
        raise invalid(
            "input", f"has token id {prompt.max()} outside the vocabulary of {limits.vocab_size}"
        )
    if any(token_id >= limits.vocab_size for token_id in submit.stop_token_ids):
        raise invalid(
            "stop.token_ids", f"has one that is outside the vocabulary of {limits.vocab_size}"
        )
    if len(submit.cache_salt) > MAX_SALT_BYTES:
        raise invalid("cache.salt", f"has {len(submit.cache_salt)} bytes, at most {MAX_SALT_BYTES}")
    num_samples = _num_samples(submit, limits)
    beam = _beam(submit, limits) if submit.HasField("beam") else None
    return Request(
        key=key,
        frontend=frontend,
        request_id=submit.request_id,
        prompt=prompt.astype(np.int32),
        max_total_tokens=_max_total_tokens(len(prompt), submit.max_tokens, beam, limits),
        arrival_ns=now_ns,
        deadline_ns=deadline_ns,
        priority=submit.priority,
        sampling=_sampling(submit),
        stop_token_ids=frozenset(submit.stop_token_ids),
        is_text_stopped=_text_stop(submit, text_stop),
        num_samples=num_samples,
        beam=beam,
        cache_salt=submit.cache_salt,
        is_cache_private=submit.cache_off,
    )


def _num_samples(submit: pb.Submit, limits: Limits) -> int:
    most = max_branches(limits)
    if submit.num_samples > most:
        raise invalid("num_samples", f"is {submit.num_samples}, at most {most} run at once")
    if submit.num_samples > 1 and submit.HasField("beam"):
        raise invalid("num_samples", "and beam exclude each other")
    return max(1, submit.num_samples)


def _beam(submit: pb.Submit, limits: Limits) -> BeamParams:
    beam, most = submit.beam, min(MAX_WIDTH, max_branches(limits))
    if not 1 <= beam.width <= most:
        raise invalid("beam.width", f"is {beam.width}, it must be 1 to {most}")
    if beam.num_returned > beam.width:
        raise invalid("beam.num_choices", f"is {beam.num_returned}, beam.width only {beam.width}")
    if not math.isfinite(beam.length_penalty):
        raise invalid("beam.length_penalty", f"is {beam.length_penalty}")
    if beam.early_stopping not in _EARLY_STOPPING:
        raise invalid("beam.early_stopping", f"is {beam.early_stopping}")
    if submit.temperature:
        raise invalid("sampling.temperature", f"must be 0 with beam, it is {submit.temperature}")
    if submit.num_logprobs > 1:
        raise invalid(
            "logprobs.num_candidates",
            "must be 0: beams have the log-probability of their own tokens",
        )
    return BeamParams(
        beam.width,
        max(1, beam.num_returned),
        beam.length_penalty,
        _EARLY_STOPPING[beam.early_stopping],
    )


def _text_stop(submit: pb.Submit, text_stop: TextStop | None) -> Callable[[TokenIds], bool] | None:
    if not submit.stop_strings:
        return None
    if not submit.HasField("beam"):
        raise invalid("stop.strings", "are the front end's business, except with beam search")
    if text_stop is None:
        raise RequestError(
            Reason.NOT_CONFIGURED,
            "beam search with stop strings needs an engine that was given the model directory",
        )
    try:
        return text_stop(submit.stop_strings)
    except ModelDirError as error:
        raise RequestError(Reason.NOT_CONFIGURED, str(error)) from error


def _max_total_tokens(
    num_prompt_tokens: int, max_tokens: int, beam: BeamParams | None, limits: Limits
) -> int:
    longest, holders = limits.max_total_tokens, ""
    if beam is not None:
        longest = min(longest, limits.max_beam_tokens(num_prompt_tokens, beam.width))
        holders = f" for {beam.width} beams"
    if num_prompt_tokens >= longest:
        raise too_long(
            "input",
            f"the prompt has {num_prompt_tokens} tokens; model and KV memory hold {longest} "
            f"tokens of prompt and output together{holders}",
        )
    total = num_prompt_tokens + max_tokens
    if total > longest:
        raise too_long(
            "stop.max_tokens",
            f"{num_prompt_tokens} prompt tokens and max_tokens {max_tokens} exceed the {longest} "
            f"tokens that model and KV memory hold{holders}",
        )
    return total if max_tokens else longest


def _sampling(submit: pb.Submit) -> Sampling:
    for name, highest in (("temperature", math.inf), ("top_p", 1.0), ("min_p", 1.0)):
        value = getattr(submit, name)
        if not math.isfinite(value) or not 0 <= value <= highest:
            raise invalid(f"sampling.{name}", f"is {value}")
    if submit.num_logprobs > 1 + MAX_LOGPROBS:
        raise invalid(
            "logprobs.num_candidates",
            f"plus one is {submit.num_logprobs}, at most {1 + MAX_LOGPROBS}",
        )
    return Sampling(
        submit.temperature,
        submit.top_k,
        submit.top_p,
        submit.min_p,
        submit.seed,
        submit.num_logprobs,
    )
