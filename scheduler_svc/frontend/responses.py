"""What clients are sent, from what the fan-out releases. Responses are serialised here, once."""

from __future__ import annotations

from collections.abc import Iterator

from blockyard.v1 import generate_pb2 as pb
from scheduler_svc.frontend.choice_output import Chunk, Ending
from scheduler_svc.frontend.output_stream import EngineUsage, Output, OutputStream
from scheduler_svc.frontend.request_log import RequestRecord


def stream_responses(
    output: Output, stream: OutputStream, record: RequestRecord
) -> Iterator[bytes]:
    """A GenerateResponse for each chunk; the last one has the usage, if that is known."""
    chunks = output.chunks or [Chunk(0, [], [], "", None)]
    for chunk in chunks:
        response = pb.GenerateResponse(
            request_id=record.request_id,
            choice_index=chunk.choice_index,
            text=chunk.text,
            token_ids=chunk.token_ids,
            logprobs=chunk.logprobs,
        )
        _set_ending(response, chunk.ending)
        if output.usage is not None and chunk is chunks[-1]:
            response.usage.CopyFrom(_usage(output.usage, stream, record))
        yield response.SerializeToString()


class UnaryResponse:
    """Collects outputs into one GenerateUnaryResponse."""

    def __init__(self) -> None:
        """Start without choices."""
        self._choices: dict[int, pb.Choice] = {}

    def add(self, output: Output) -> None:
        """Append to the choices."""
        for chunk in output.chunks:
            index = chunk.choice_index
            choice = self._choices.setdefault(index, pb.Choice(index=index))
            choice.text += chunk.text
            choice.token_ids.extend(chunk.token_ids)
            choice.logprobs.extend(chunk.logprobs)
            _set_ending(choice, chunk.ending)

    def serialise(self, usage: EngineUsage, stream: OutputStream, record: RequestRecord) -> bytes:
        """The response, choices in order of their index."""
        return pb.GenerateUnaryResponse(
            request_id=record.request_id,
            choices=[self._choices[index] for index in sorted(self._choices)],
            usage=_usage(usage, stream, record),
        ).SerializeToString()


def _set_ending(target: pb.GenerateResponse | pb.Choice, ending: Ending | None) -> None:
    if ending is None:
        return
    target.finish_reason = ending.reason
    target.score = ending.score
    if ending.stop_token_id is not None:
        target.stop_reason.token_id = ending.stop_token_id
    if ending.stop_string is not None:
        target.stop_reason.string = ending.stop_string


def _usage(usage: EngineUsage, stream: OutputStream, record: RequestRecord) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=record.num_prompt_tokens,
        output_tokens=stream.num_output_tokens,
        cached_tokens=usage.num_cached_tokens,
        seed=record.seed,
        preemptions=usage.num_preemptions,
        block_seconds=usage.blocks.block_seconds,
        blocks_shared=usage.blocks.num_shared,
        blocks_copied=usage.blocks.num_copied,
        blocks_swapped_out=usage.blocks.num_swapped_out,
        blocks_swapped_in=usage.blocks.num_swapped_in,
    )
