"""ModelRunner on a tiny model: what plans do to blocks, inputs and samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blockyard.common.model_dir import ModelDirError
from blockyard.executor.v1 import executor_pb2 as pb
from executor_svc.kv_pool import KvPoolError
from executor_svc.model.errors import ModelError, UnsupportedModelError, WeightsError
from executor_svc.model_runner import ModelRunner, tokens_per_step
from executor_svc.tests.models import tiny_config, write_model
from executor_svc.tests.plans import batch, new_rows
from executor_svc.tests.runner_stack import RunnerStack, block_bytes_of

PROMPT = np.random.default_rng(5).integers(0, 101, 45).tolist()
DRIVEN = pb.ROW_FLAG_DRIVEN
OTHER = np.random.default_rng(6).integers(0, 101, 33).tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_model(path, tiny_config())
    return path


@pytest.fixture
def stack(path: Path) -> RunnerStack:
    return RunnerStack(path)


def pair(src: int, dst: int) -> pb.BlockPairs:
    return pb.BlockPairs(src=[src], dst=[dst])


def test_info_says_what_was_built(path: Path) -> None:
    stages = []
    runner = ModelRunner.load(
        path,
        kv_memory_bytes=10 * block_bytes_of(path, 32) + 5,
        block_size=32,
        max_rows=3,
        max_num_batched_tokens=64,
        max_model_len=100,
        num_threads=1,
        num_host_blocks=2,
        progress=lambda stage, done: stages.append((stage, done)),
    )
    info = runner.info
    assert (info.num_device_blocks, info.num_host_blocks, info.block_size) == (10, 2, 32)
    assert (info.max_model_len, info.max_rows, info.max_num_batched_tokens) == (100, 3, 64)
    assert (info.model_name, info.model_digest, info.vocab_size) == ("tiny", "sha256:tiny", 101)
    assert info.block_bytes == 2 * 3 * 2 * 32 * 32 * 4
    assert stages[-1] == ("ready", 1.0)


def test_chunks_rows_and_blocks_do_not_change_the_tokens(path: Path) -> None:
    first, second = RunnerStack(path, seed=1), RunnerStack(path, seed=2)
    expected = first.generate(0, PROMPT, 30, temperature=1.0, seeds=3)
    assert second.generate(5, PROMPT, 30, temperature=1.0, seeds=3) == expected
    assert second.generate(2, PROMPT, 30, chunk=7, temperature=1.0, seeds=3) == expected
    assert len(set(expected)) > 5


def test_a_ragged_mixed_batch_gives_each_row_its_own_tokens(path: Path) -> None:
    alone, stack = RunnerStack(path), RunnerStack(path)
    expected = {
        0: alone.generate(0, PROMPT, 12, temperature=0.9, seeds=1),
        1: alone.generate(1, OTHER, 9, temperature=0.0),
    }
    sampled = {0: stack.begin(0, PROMPT, temperature=0.9, seeds=1).token_ids.tolist(), 1: []}
    sampled[0] += stack.decode(0).token_ids.tolist()
    # One plan decodes row 0 and begins row 1; its second chunk rides with another decode step.
    stack.lengths[0] += 1
    new = new_rows({"row": 1, "tokens": OTHER, "blocks": stack.take(len(OTHER))})
    outputs = stack.run(new_rows=new, batch=batch((0, 1), (1, 20), num_decode_rows=1))
    sampled[0] += outputs.token_ids.tolist()
    stack.lengths[0] += 1
    grown = pb.BlockAppends(rows=[0], counts=[1], block_ids=stack.take(1))
    outputs = stack.run(appends=grown, batch=batch((0, 1), (1, 13), num_decode_rows=1))
    stack.lengths[1] = len(OTHER)
    for row, token in enumerate(outputs.token_ids.tolist()):
        sampled[row].append(token)
    for _ in range(8):
        for row, token in enumerate(stack.decode(0, 1).token_ids.tolist()):
            sampled[row].append(token)
    assert sampled == expected


def test_a_shared_prefix_is_read_where_it_lies(stack: RunnerStack) -> None:
    expected = stack.generate(0, PROMPT, 5)
    blocks = stack.take(48)
    donor = {"row": 0, "tokens": PROMPT[:33], "blocks": blocks}
    # Both rows in one plan: all keys are stored before any row attends.
    sharer = {"row": 1, "tokens": PROMPT, "computed": 32, "blocks": [*blocks[:2], *stack.take(1)]}
    outputs = stack.run(new_rows=new_rows(donor, sharer), batch=batch((0, 33), (1, 13)))
    stack.lengths[1] = 45
    sampled = [int(outputs.token_ids[1])]
    sampled += [int(stack.decode(1).token_ids[0]) for _ in range(4)]
    assert sampled == expected


def test_swapping_moves_a_row(path: Path) -> None:
    stack = RunnerStack(path, num_host_blocks=3)
    expected = stack.generate(0, PROMPT, 6)
    blocks = stack.take(48)
    new = new_rows({"row": 0, "tokens": PROMPT, "blocks": blocks})
    first = stack.run(new_rows=new, batch=batch((0, 45)))
    out = pb.BlockPairs(src=blocks, dst=[2, 0, 1])
    stack.run(swap_out=out, freed_rows=[0])
    stack.pool.device[blocks] = np.nan
    moved = stack.take(48)
    tokens = [*PROMPT, int(first.token_ids[0])]
    back = new_rows({"row": 4, "tokens": tokens, "computed": 45, "blocks": moved})
    swap_in = pb.BlockPairs(src=[2, 0, 1], dst=moved)
    outputs = stack.run(new_rows=back, swap_in=swap_in, batch=batch((4, 1), num_decode_rows=1))
    sampled = [tokens[-1], int(outputs.token_ids[0])]
    stack.lengths[4] = 46
    sampled += [int(stack.decode(4).token_ids[0]) for _ in range(2)]
    assert sampled == expected[:4]


def test_a_fork_continues_from_a_copy_of_the_tail(stack: RunnerStack) -> None:
    expected = [
        int(stack.begin(row, [*PROMPT[:40], token]).token_ids[0])
        for row, token in enumerate((7, 8))
    ]
    blocks, tail = stack.take(48), stack.take(1)
    new = new_rows({"row": 4, "tokens": PROMPT[:40], "blocks": blocks, "flags": DRIVEN})
    stack.run(new_rows=new, batch=batch((4, 40)))
    forked = stack.run(
        copy=pair(blocks[2], tail[0]),
        forks=pb.Forks(src_rows=[4], dst_rows=[6], tail_dst_block_ids=tail),
        inputs=pb.Inputs(rows=[4, 6], token_ids=[7, 8]),
        batch=batch((4, 1), (6, 1), num_decode_rows=2),
    )
    assert forked.token_ids.tolist() == expected
    assert expected[0] != expected[1]


def test_samples_start_from_the_prompts_logits(stack: RunnerStack) -> None:
    expected = [
        stack.generate(0, PROMPT, 1, temperature=1.0, seeds=9, branches=branch)[0]
        for branch in range(3)
    ]
    blocks = stack.take(48)
    common = {"tokens": PROMPT, "temperature": 1.0, "seeds": 9, "blocks": blocks}
    rows = [{"row": 0, **common}] + [
        {"row": n, "branches": n, "computed": 45, "logits_from": 1, **common} for n in (1, 2)
    ]
    outputs = stack.run(new_rows=new_rows(*rows), batch=batch((0, 45)))
    assert outputs.token_ids.tolist() == expected
    assert len(set(expected)) > 1


def test_driven_rows_take_the_schedulers_inputs(stack: RunnerStack) -> None:
    stack.begin(0, PROMPT, flags=DRIVEN, num_candidates=8)
    inputs = pb.Inputs(rows=[0], token_ids=[OTHER[0]])
    driven = stack.run(inputs=inputs, batch=batch((0, 1), num_decode_rows=1))
    whole = stack.begin(1, [*PROMPT, OTHER[0]], num_candidates=8)
    assert driven.candidate_token_ids.tolist() == whole.candidate_token_ids.tolist()
    np.testing.assert_allclose(driven.candidate_logprobs, whole.candidate_logprobs, atol=1e-4)


def test_penalties_see_tokens_that_are_not_on_the_host_yet(stack: RunnerStack) -> None:
    # The stack never reports results back, so every sampled token is missing on the host.
    fields: dict[str, Any] = {"flags": pb.ROW_FLAG_HISTORY, "presence_penalty": 100.0}
    sampled = [int(stack.begin(0, PROMPT, **fields).token_ids[0])]
    sampled += [int(stack.decode(0).token_ids[0]) for _ in range(3)]
    assert len(set(sampled)) == 4
    repeated = stack.generate(1, PROMPT, 4, flags=pb.ROW_FLAG_HISTORY, presence_penalty=-100.0)
    assert len(set(repeated)) == 1


def test_a_poisoned_row_fails_alone(stack: RunnerStack) -> None:
    expected = stack.generate(0, OTHER, 2)
    stack.begin(0, OTHER)
    blocks = stack.take(48)
    new = new_rows({"row": 3, "tokens": PROMPT, "blocks": blocks})
    stack.run(new_rows=new, batch=batch((3, 45)))
    stack.lengths[3] = 45
    stack.pool.device[blocks[0]] = np.nan
    outputs = stack.decode(0, 3)
    assert list(outputs.failed_rows) == [(3, pb.ROW_STATUS_NUMERIC)]
    assert outputs.token_ids.tolist() == [expected[1], 0]


def test_an_empty_plan_only_moves_blocks(path: Path) -> None:
    stack = RunnerStack(path, num_host_blocks=1)
    stack.pool.device[7] = 3.5
    outputs = stack.run(swap_out=pair(7, 0), copy=pair(7, 9))
    assert outputs.token_ids.size == 0
    assert (stack.pool.host[0] == 3.5).all()
    assert (stack.pool.device[9] == 3.5).all()


def test_the_padding_block_is_left_alone(stack: RunnerStack) -> None:
    stack.generate(0, PROMPT, 20)
    assert np.isnan(stack.pool.device[0]).all()


def test_timings_cover_the_step(stack: RunnerStack) -> None:
    outputs = stack.begin(0, PROMPT)
    assert outputs.forward_ns > 0
    assert outputs.sample_ns > 0
    assert stack.decode(0).idle_ns > 0


def edit_config(path: Path, **changes: object) -> None:
    config_path = path / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "memory", "max_len", "error"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, 1 << 20, None, UnsupportedModelError),
        ({"intermediate_size": 176}, 1 << 20, None, WeightsError),
        ({"num_hidden_layers": 2}, 1 << 20, None, WeightsError),
        ({"num_hidden_layers": 4}, 1 << 20, None, WeightsError),
        ({}, 1000, None, KvPoolError),
        ({}, 1 << 20, 513, ModelError),
        ({"vocab_size": "many"}, 1 << 20, None, ModelDirError),
    ],
)
def test_what_cannot_be_served_is_a_typed_error(
    tmp_path: Path,
    changes: dict[str, object],
    memory: int,
    max_len: int | None,
    error: type[Exception],
) -> None:
    write_model(tmp_path, tiny_config())
    edit_config(tmp_path, **changes)
    with pytest.raises(error):
        ModelRunner.load(
            tmp_path,
            kv_memory_bytes=memory,
            block_size=16,
            max_rows=2,
            max_num_batched_tokens=32,
            max_model_len=max_len,
            num_threads=1,
        )


@pytest.mark.parametrize(
    ("tokens_per_s", "tokens"),
    [(1.0, 64), (215.0, 64), (330.0, 96), (640.0, 192), (1_250.0, 256)],
)
def test_slow_machines_take_smaller_steps(tokens_per_s: float, tokens: int) -> None:
    assert tokens_per_step(tokens_per_s) == tokens


def test_tokens_of_a_step_are_chosen_if_not_set(path: Path) -> None:
    runner = RunnerStack(path, max_rows=100, max_num_batched_tokens=None).runner
    assert runner.info.max_num_batched_tokens in range(100, 257)
