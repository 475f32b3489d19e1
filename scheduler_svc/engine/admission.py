"""What the engine refuses: a submit that can never run, or one too many."""

from __future__ import annotations

import math

import grpc
import numpy as np

from blockyard.common.columns import unpack_u32
from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.request import Request, Sampling
from scheduler_svc.scheduler import Limits


class RejectedError(Exception):
    """The submit is refused, with a gRPC status code."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        """Carry the status and a message for the client."""
        super().__init__(message)
        self.code = code

    def as_rejection(self, request_id: int) -> pb.Rejection:
        """The answer to the front end."""
        return pb.Rejection(request_id=request_id, code=self.code.value[0], message=str(self))


def _invalid(message: str) -> RejectedError:
    return RejectedError(grpc.StatusCode.INVALID_ARGUMENT, message)


def build_request(
    submit: pb.Submit, limits: Limits, *, key: int, frontend: int, now_ns: int
) -> Request:
    """Make a request of a submit. Raises RejectedError if it can never run on this executor."""
    if len(submit.prompt_token_ids) % 4:
        raise _invalid("prompt_token_ids is not a whole number of uint32")
    prompt = unpack_u32(submit.prompt_token_ids)
    if not len(prompt):
        raise _invalid("the prompt is empty")
    if int(prompt.max()) >= limits.vocab_size:
        raise _invalid(f"token id {prompt.max()} is outside the vocabulary of {limits.vocab_size}")
    if any(token_id >= limits.vocab_size for token_id in submit.stop_token_ids):
        raise _invalid(f"a stop token id is outside the vocabulary of {limits.vocab_size}")
    return Request(
        key=key,
        frontend=frontend,
        request_id=submit.request_id,
        token_ids=prompt.astype(np.int32),
        num_prompt_tokens=len(prompt),
        max_total_tokens=_max_total_tokens(len(prompt), submit.max_tokens, limits),
        arrival_ns=now_ns,
        sampling=_sampling(submit),
        stop_token_ids=frozenset(submit.stop_token_ids),
    )


def _max_total_tokens(num_prompt_tokens: int, max_tokens: int, limits: Limits) -> int:
    longest = limits.max_total_tokens
    if num_prompt_tokens >= longest:
        raise _invalid(
            f"the prompt has {num_prompt_tokens} tokens; model and KV memory hold {longest} "
            "tokens of prompt and output together"
        )
    total = num_prompt_tokens + max_tokens
    if total > longest:
        raise _invalid(
            f"{num_prompt_tokens} prompt tokens and max_tokens {max_tokens} exceed the {longest} "
            "tokens that model and KV memory hold"
        )
    return total if max_tokens else longest


def _sampling(submit: pb.Submit) -> Sampling:
    for name, highest in (("temperature", math.inf), ("top_p", 1.0), ("min_p", 1.0)):
        value = getattr(submit, name)
        if not math.isfinite(value) or not 0 <= value <= highest:
            raise _invalid(f"{name} is {value}")
    return Sampling(submit.temperature, submit.top_k, submit.top_p, submit.min_p, submit.seed)
