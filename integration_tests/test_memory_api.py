"""What front ends see of the memory manager, over gRPC, with engine and executor as processes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
import numpy as np
import pytest
import pytest_asyncio

from blockyard.engine.v1 import engine_pb2 as pb
from executor_svc.backends.checking.digests import candidates
from integration_tests.engine_client import EngineClient, Output, num_held_slots
from integration_tests.harness import Processes, running
from integration_tests.reference import SamplingParams, context_of, reference_output
from integration_tests.reference_beam import reference_beams, token_logprobs
from scheduler_svc.beam import BeamParams, EarlyStopping
from scheduler_svc.errors import ERRORS, Reason

VOCAB_SIZE: Final = 600
BLOCK_SIZE: Final = 4
NUM_BLOCKS: Final = 33
NUM_HOST_BLOCKS: Final = 40
MAX_ROWS: Final = 8
MAX_MODEL_LEN: Final = 100
TIMEOUT_S: Final = 60.0
WARM: Final = {"temperature": 0.7, "top_p": 1.0}
INVALID: Final = grpc.StatusCode.INVALID_ARGUMENT


@pytest_asyncio.fixture(scope="module")
async def address(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """An engine with a small pool that swaps; all tests share it. A rejected plan ends it."""
    processes = Processes(
        tmp_path_factory.mktemp("memory"),
        executor_flags=(
            *("--num-device-blocks", NUM_BLOCKS, "--num-host-blocks", NUM_HOST_BLOCKS),
            *("--block-size", BLOCK_SIZE, "--max-rows", MAX_ROWS, "--step-ms", 2),
            *("--vocab-size", VOCAB_SIZE, "--max-model-len", MAX_MODEL_LEN),
            *("--max-num-batched-tokens", 24),
        ),
        engine_flags=("--strict", "--preemption", "swap"),
    )
    async with running(processes):
        yield processes.engine_address


@pytest_asyncio.fixture
async def engine(address: str) -> AsyncIterator[EngineClient]:
    """A front end's stream; nothing is cached when the test begins."""
    async with asyncio.timeout(TIMEOUT_S), EngineClient(address) as engine:
        await engine.ready()
        await engine.idle()
        await engine.flush_cache()
        yield engine
        await engine.idle()


def prompt(seed: int, num_tokens: int) -> list[int]:
    """Random token ids."""
    rng = random.Random(seed)
    return [rng.randrange(VOCAB_SIZE) for _ in range(num_tokens)]


def sample(ids: list[int], num_tokens: int, seed: int, branch: int = 0) -> list[int]:
    """What a branch of a request with WARM sampling must bring."""
    params = SamplingParams(0.7, top_p=1.0, seed=seed, branch=branch)  # as WARM
    return reference_output(ids, num_tokens, VOCAB_SIZE, params)


def greedy(ids: list[int], num_tokens: int) -> list[int]:
    """What a greedy request must bring."""
    return reference_output(ids, num_tokens, VOCAB_SIZE)


async def run(engine: EngineClient, ids: list[int], num_tokens: int, **fields: Any) -> pb.Finish:
    """One greedy request, checked; returns its finish."""
    output = engine.submit(ids, num_tokens, **fields)
    finish = await output.finished()
    assert output.token_ids == greedy(ids, num_tokens)
    return finish


def finish_of(output: Output, branch: int) -> pb.Finish:
    """How a branch ended."""
    finish = output.choices[branch].finish
    assert finish is not None, f"branch {branch} has not ended"
    return finish


# ---- what is refused

BEAM: Final = pb.BeamSearch(width=2)
BAD_SUBMITS: Final[dict[str, tuple[dict[str, Any], grpc.StatusCode, str]]] = {
    "beams of width 0": ({"beam": pb.BeamSearch()}, INVALID, "beam.width"),
    "more beams than rows": ({"beam": pb.BeamSearch(width=9)}, INVALID, "beam.width"),
    "more returned than kept": (
        {"beam": pb.BeamSearch(width=2, num_returned=3)},
        INVALID,
        "beam.num_choices",
    ),
    "penalty that is no number": (
        {"beam": pb.BeamSearch(width=2, length_penalty=float("nan"))},
        INVALID,
        "beam.length_penalty",
    ),
    "unknown early stopping": (
        {"beam": pb.BeamSearch(width=2, early_stopping=9)},  # type: ignore[arg-type] # no such value
        INVALID,
        "beam.early_stopping",
    ),
    "beams and samples": ({"beam": BEAM, "num_samples": 2}, INVALID, "exclude"),
    "beams with a temperature": ({"beam": BEAM, "temperature": 0.5}, INVALID, "temperature"),
    "beams with candidates": ({"beam": BEAM, "num_logprobs": 2}, INVALID, "log-prob"),
    "beams with stop strings, no tokenizer": (
        {"beam": BEAM, "stop_strings": ["x"]},
        grpc.StatusCode.FAILED_PRECONDITION,
        "model directory",
    ),
    "stop strings without beams": ({"stop_strings": ["x"]}, INVALID, "stop.strings"),
    "more samples than rows": ({"num_samples": 9}, INVALID, "num_samples"),
    "too many log-probabilities": ({"num_logprobs": 22}, INVALID, "logprobs.num_candidates"),
    "salt too long": ({"cache_salt": b"s" * 65}, INVALID, "cache.salt"),
}


@pytest.mark.parametrize("name", BAD_SUBMITS)
async def test_a_bad_submit_is_refused_by_itself(name: str, engine: EngineClient) -> None:
    fields, code, message = BAD_SUBMITS[name]
    good = engine.submit([1, 2, 3], 5)
    rejection = await engine.submit([1, 2, 3], 5, **fields).rejected()
    assert ERRORS[Reason(rejection.reason)].code is code
    assert message in rejection.message
    await good.finished()
    assert good.token_ids == greedy([1, 2, 3], 5)


async def test_beams_must_fit_whole_samples_one_by_one(engine: EngineClient) -> None:
    ids = prompt(1, 50)  # twelve full blocks shared; twenty blocks for what follows
    rejection = await engine.submit(ids, 30, beam=pb.BeamSearch(width=8)).rejected()
    assert rejection.reason == Reason.TOO_LONG
    assert "8 beams" in rejection.message
    output = engine.submit(ids, 30, num_samples=8, seed=3, **WARM)
    assert (await output.finished()).num_prompt_tokens == 50
    for branch in range(8):
        assert output.choices[branch].token_ids == sample(ids, 30, 3, branch)


# ---- branches and how they end


async def test_each_sample_has_its_own_finish(engine: EngineClient) -> None:
    ids = prompt(2, 6)
    wanted = [sample(ids, 20, 6, branch) for branch in range(3)]
    stop = wanted[1][4]
    assert stop not in wanted[0] + wanted[2]
    output = engine.submit(ids, 20, num_samples=3, seed=6, stop_token_ids=[stop], **WARM)
    await output.finished()
    assert [output.choices[i].token_ids for i in range(3)] == [wanted[0], wanted[1][:5], wanted[2]]
    finishes = [finish_of(output, branch) for branch in range(3)]
    reasons = [finish.reason for finish in finishes]
    length, stopped = pb.FINISH_REASON_LENGTH, pb.FINISH_REASON_STOP
    assert reasons == [length, stopped, length]
    assert [finish.num_output_tokens for finish in finishes] == [20, 5, 20]
    assert [finish.HasField("stop_token_id") for finish in finishes] == [False, True, False]
    assert finishes[1].stop_token_id == stop
    assert {finish.num_prompt_tokens for finish in finishes} == {6}
    assert sum(finish.HasField("blocks") for finish in finishes) == 1  # the last one's
    assert not finishes[1].HasField("blocks")


async def test_a_stop_string_ends_one_sample(engine: EngineClient) -> None:
    ids = prompt(3, 6)
    output = engine.submit(ids, 40, num_samples=3, seed=8, **WARM)
    await output.until(6, branch=1)
    engine.stop(output, num_output_tokens=4, branch=1)
    engine.stop(output, num_output_tokens=2, branch=1)  # it has ended
    engine.stop(output, num_output_tokens=2, branch=3)  # there is none
    await output.finished()
    assert sorted(output.choices) == [0, 1, 2]
    stopped = finish_of(output, 1)
    assert (stopped.reason, stopped.num_output_tokens) == (pb.FINISH_REASON_STOP, 4)
    assert not stopped.HasField("stop_token_id")
    for branch in (0, 2):
        assert output.choices[branch].token_ids == sample(ids, 40, 8, branch)
        assert finish_of(output, branch).reason == pb.FINISH_REASON_LENGTH


async def test_the_last_stop_string_ends_the_request(engine: EngineClient) -> None:
    output = engine.submit(prompt(4, 6), 60, num_samples=2, seed=9, **WARM)
    await output.until(3, branch=0)
    await output.until(3, branch=1)
    engine.stop(output, num_output_tokens=3, branch=1)
    engine.stop(output, num_output_tokens=2, branch=0)
    finish = await output.finished()
    assert (finish.branch, finish.num_output_tokens) == (0, 2)


async def test_an_abort_ends_all_branches(engine: EngineClient) -> None:
    samples = engine.submit(prompt(5, 9), 80, num_samples=3, seed=1, **WARM)
    beams = engine.submit(prompt(6, 9), 30, beam=pb.BeamSearch(width=3, num_returned=2))
    await asyncio.gather(samples.until(2), beams.until(1))
    engine.stop(samples)
    engine.stop(beams)
    await engine.idle()
    assert not any(each.ended.is_set() for each in (samples, beams))


@pytest.mark.parametrize(
    ("early_stopping", "reference"),
    [
        (pb.EARLY_STOPPING_UNSPECIFIED, EarlyStopping.HEURISTIC),
        (pb.EARLY_STOPPING_AT_WIDTH, EarlyStopping.AT_WIDTH),
        (pb.EARLY_STOPPING_NEVER, EarlyStopping.NEVER),
    ],
)
async def test_hypotheses_come_best_first_and_end_together(
    early_stopping: pb.EarlyStopping.ValueType, reference: EarlyStopping, engine: EngineClient
) -> None:
    ids, penalty = prompt(7, 11), 1.5
    params = BeamParams(4, 3, penalty, reference)
    stops = frozenset(range(0, VOCAB_SIZE, 11))
    wanted = reference_beams(ids, 25, VOCAB_SIZE, params, stops)
    beam = pb.BeamSearch(
        width=4, num_returned=3, length_penalty=penalty, early_stopping=early_stopping
    )
    output = engine.submit(ids, 25, beam=beam, stop_token_ids=sorted(stops), num_logprobs=1)
    last = await output.finished()
    assert last.branch == 2
    for branch, hypothesis in enumerate(wanted):
        choice, finish = output.choices[branch], finish_of(output, branch)
        assert choice.token_ids == hypothesis.token_ids.tolist()
        assert finish.score == pytest.approx(hypothesis.score, rel=1e-5)
        assert finish.num_output_tokens == len(choice.token_ids)
        is_stopped = choice.token_ids[-1] in stops
        assert finish.reason == (pb.FINISH_REASON_STOP if is_stopped else pb.FINISH_REASON_LENGTH)
        logprobs = token_logprobs(ids, choice.token_ids, VOCAB_SIZE)
        assert [each.logprob for each in choice.logprobs] == pytest.approx(logprobs, rel=1e-5)
    scores = [finish_of(output, branch).score for branch in range(3)]
    assert scores == sorted(scores, reverse=True)


async def test_log_probabilities_come_with_their_tokens(engine: EngineClient) -> None:
    ids = prompt(8, 7)
    plain = engine.submit(ids, 6)  # in the same steps, and asks for none
    own = engine.submit(ids, 6, num_logprobs=1, seed=2, **WARM)
    both = engine.submit(ids, 6, num_logprobs=4, num_samples=2, seed=3, **WARM)
    for output in (plain, own, both):
        await output.finished()
    assert not plain.choices[0].logprobs
    for choice, num_candidates in ((own.choices[0], 0), (both.choices[0], 3), (both.choices[1], 3)):
        wanted = token_logprobs(ids, choice.token_ids, VOCAB_SIZE)
        assert [each.logprob for each in choice.logprobs] == pytest.approx(wanted, rel=1e-5)
        for index, each in enumerate(choice.logprobs):
            (context,) = context_of([*ids, *choice.token_ids[:index]])
            token_ids, logprobs = candidates(context, num_candidates, VOCAB_SIZE)
            assert each.candidate_token_ids == token_ids.tolist()
            assert np.allclose(each.candidate_logprobs, logprobs)


# ---- the prefix cache


async def test_a_prompt_seen_before_is_cached_but_for_its_last_block(engine: EngineClient) -> None:
    ids = prompt(10, 4 * BLOCK_SIZE)
    assert (await run(engine, ids, 4)).num_cached_tokens == 0
    assert (await run(engine, ids, 4)).num_cached_tokens == 3 * BLOCK_SIZE  # one token is computed
    longer = [*ids, *greedy(ids, 4)]
    assert (await run(engine, longer, 4)).num_cached_tokens == 4 * BLOCK_SIZE
    assert (await run(engine, ids[1:], 4)).num_cached_tokens == 0


async def test_salts_never_meet(engine: EngineClient) -> None:
    ids = prompt(11, 13)
    for fields in ({}, {"cache_salt": b"a"}, {"cache_salt": b"b"}, {"cache_off": True}):
        assert (await run(engine, ids, 3, **fields)).num_cached_tokens == 0
    assert (await run(engine, ids, 3, cache_salt=b"a")).num_cached_tokens == 12
    assert (await run(engine, ids, 3, cache_off=True)).num_cached_tokens == 0


async def test_a_private_request_still_shares_with_itself(engine: EngineClient) -> None:
    ids = prompt(12, 9)
    output = engine.submit(ids, 5, num_samples=3, seed=1, cache_off=True, **WARM)
    assert (await output.finished()).blocks.num_shared == 2 * 2  # two full blocks, two samples
    for branch in range(3):
        assert output.choices[branch].token_ids == sample(ids, 5, 1, branch)


async def test_flushing_forgets_what_is_cached(engine: EngineClient) -> None:
    ids = prompt(13, 13)
    await run(engine, ids, 4)
    shot = await engine.idle()
    flushed = await engine.flush_cache()
    assert flushed.num_device_blocks == shot.device.num_cached // BLOCK_SIZE > 0
    assert flushed.num_host_blocks == shot.host.num_cached // BLOCK_SIZE
    shot = await engine.idle()
    assert shot.device.num_cached == shot.host.num_cached == 0
    assert (await run(engine, ids, 4)).num_cached_tokens == 0
    assert (await run(engine, ids, 4)).num_cached_tokens == 12


async def test_flushing_twice_finds_nothing(engine: EngineClient) -> None:
    flushed = await engine.flush_cache()
    assert (flushed.num_device_blocks, flushed.num_host_blocks) == (0, 0)


async def test_flushing_leaves_running_requests_their_blocks(engine: EngineClient) -> None:
    ids = prompt(14, 21)
    output = engine.submit(ids, 40, num_samples=2, seed=4, **WARM)
    beams = engine.submit(ids, 12, beam=pb.BeamSearch(width=3))
    while not (output.ended.is_set() and beams.ended.is_set()):
        await engine.flush_cache()
        await asyncio.sleep(0.004)
    for branch in range(2):
        assert output.choices[branch].token_ids == sample(ids, 40, 4, branch)
    [hypothesis] = reference_beams(ids, 12, VOCAB_SIZE, BeamParams(3, 1, 0.0), frozenset())
    assert beams.token_ids == hypothesis.token_ids.tolist()


# ---- what is counted


async def test_usage_says_what_was_shared_and_copied(engine: EngineClient) -> None:
    ids = prompt(15, 2 * BLOCK_SIZE + 2)
    output = engine.submit(ids, 12, num_samples=3, seed=5, **WARM)
    blocks = (await output.finished()).blocks
    assert (blocks.num_shared, blocks.num_copied) == (2 * 2, 2)
    assert (blocks.num_swapped_out, blocks.num_swapped_in) == (0, 0)
    assert 0 < blocks.block_seconds < 3 * 6 * TIMEOUT_S
    again = await engine.submit(ids, 1).finished()
    assert (again.num_cached_tokens, again.blocks.num_shared) == (8, 2)
    assert again.blocks.num_copied == 0


async def test_the_classes_of_both_pools_always_sum_up(engine: EngineClient) -> None:
    before = (await engine.snapshot()).counters
    rng = random.Random(1)
    outputs = []
    for number in range(30):
        ids, num_tokens = prompt(number % 9, rng.randint(1, 40)), rng.randint(1, 40)
        fields: dict[str, Any] = {"num_samples": rng.choice([1, 1, 3]), "seed": number, **WARM}
        outputs.append((engine.submit(ids, num_tokens, **fields), ids, num_tokens, number))
    seen = {"saved": 0, "swapped": 0, "cached": 0, "in flight": 0}
    while not all(output.ended.is_set() for output, *_ in outputs):
        shot = await engine.snapshot()  # which checks the sums
        assert shot.device.num_slots == NUM_BLOCKS * BLOCK_SIZE
        assert shot.host.num_slots == NUM_HOST_BLOCKS * BLOCK_SIZE
        assert shot.device.num_padding == shot.block_size == BLOCK_SIZE
        assert shot.num_running <= MAX_ROWS
        seen["saved"] += shot.device.num_saved_by_sharing > 0
        seen["swapped"] += shot.host.num_swapped > 0
        seen["cached"] += shot.device.num_cached > 0
        seen["in flight"] += shot.device.num_in_flight > 0
        await asyncio.sleep(0.002)
    assert all(seen.values()), seen
    for output, ids, num_tokens, seed in outputs:
        for branch, choice in output.choices.items():
            assert choice.token_ids == sample(ids, num_tokens, seed, branch)
    shot = await engine.idle()
    assert num_held_slots(shot) == 0
    check_counters(before, shot.counters, [output for output, *_ in outputs])


def check_counters(before: pb.Counters, after: pb.Counters, outputs: list[Output]) -> None:
    """What the engine counted must be the sum of what it told of each request."""

    def rise(name: str) -> int:
        return int(getattr(after, name) - getattr(before, name))

    choices = [choice for output in outputs for choice in output.choices.values()]
    last = [output.finish for output in outputs if output.finish is not None]
    assert rise("num_finished") == len(last) == len(outputs)
    assert rise("num_output_tokens") == sum(len(choice.token_ids) for choice in choices)
    assert rise("num_prompt_tokens") == sum(finish.num_prompt_tokens for finish in last)
    assert rise("num_copied") <= sum(finish.blocks.num_copied for finish in last)
    swapped_in = sum(finish.blocks.num_swapped_in for finish in last)
    assert rise("num_swapped_in") == swapped_in > 0
    # Blocks that are evicted go to the host, too, and are nobody's.
    assert rise("num_swapped_out") >= sum(finish.blocks.num_swapped_out for finish in last) > 0
    num_preemptions = rise("num_preemptions_by_swap") + rise("num_preemptions_by_recompute")
    assert num_preemptions == sum(finish.num_preemptions for finish in last) > 0
    num_hits = rise("num_hit_tokens_device") + rise("num_hit_tokens_host")
    assert 0 < num_hits < rise("num_queried_tokens")
    assert rise("num_evicted") > 0
    assert rise("num_recoveries") == 0
