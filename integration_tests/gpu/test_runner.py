"""CudaRunner on a small random model: what plans do to blocks, inputs, graphs and samples.

Log-probabilities are compared with transformers' in float32, within what its own bfloat16 is off;
what must not depend on rows, blocks or timing is compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blockyard.executor.v1 import executor_pb2 as pb
from cupy_kernels.launch import Launch
from cupy_kernels.staging import WriteTable
from executor_svc.backends.cuda import arena
from executor_svc.backends.cuda.loading import CudaOptions, load_runner
from executor_svc.backends.cuda.runner import CudaRunner
from executor_svc.kv_pool import KvPoolError
from executor_svc.runner import StepOutputs
from executor_svc.tests.plan_driver import PlanDriver
from executor_svc.tests.plans import appends, batch, new_rows
from integration_tests.gpu.text_oracle import VOCAB, Oracle, Truth

RNG = np.random.default_rng(5)
PROMPT = RNG.integers(0, VOCAB, 45).tolist()
OTHER = RNG.integers(0, VOCAB, 133).tolist()
DRIVEN = pb.ROW_FLAG_DRIVEN
NUM_CANDIDATES = 8


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def oracle(path: Path) -> Oracle:
    return Oracle(path)


def load(path: Path, **changes: Any) -> CudaRunner:
    sizes: dict[str, Any] = {
        "block_size": 16,
        "max_rows": 24,
        "max_num_batched_tokens": 512,
        "max_model_len": None,
        "kv_memory_bytes": 16 << 20,
        "host_memory_bytes": 8 << 20,
        **changes,
    }
    return load_runner(path, CudaOptions(**sizes), lambda _stage, _done: None)


@pytest.fixture(scope="module")
def runner(path: Path, oracle: Oracle) -> CudaRunner:
    return load(path)


@pytest.fixture
def driver(runner: CudaRunner) -> PlanDriver:
    """A new epoch; what no row has written is NaN."""
    runner.reset()
    runner.pool.blocks.view(torch.bfloat16).fill_(torch.nan)
    torch.cuda.synchronize()
    return PlanDriver(runner)


def check(outputs: StepOutputs, expected: Sequence[Truth]) -> None:
    """Candidates of each sample against the truth."""
    assert not outputs.failed_rows
    ids = outputs.candidate_token_ids.reshape(len(expected), -1)
    logprobs = outputs.candidate_logprobs.reshape(len(expected), -1)
    for sample, truth in enumerate(expected):
        assert np.all(np.diff(logprobs[sample]) <= 0)
        best = np.sort(truth.logprobs)[::-1][: ids.shape[1]]
        for wanted in (truth.logprobs[ids[sample]], best):
            np.testing.assert_allclose(logprobs[sample], wanted, atol=truth.tolerance)
        drawn = truth.logprobs[outputs.token_ids[sample]]
        np.testing.assert_allclose(outputs.token_logprobs[sample], drawn, atol=truth.tolerance)


def driven(row: int, tokens: list[int], **fields: Any) -> dict[str, Any]:
    return {
        "row": row,
        "tokens": tokens,
        "flags": DRIVEN,
        "num_candidates": NUM_CANDIDATES,
        **fields,
    }


@pytest.mark.parametrize("chunk", [0, 1, 7, 16, 40])
def test_prefill_in_chunks(driver: PlanDriver, oracle: Oracle, chunk: int) -> None:
    outputs = driver.begin(3, OTHER, chunk=chunk, num_candidates=NUM_CANDIDATES)
    check(outputs, [oracle.last(OTHER)])


def test_another_text_would_be_noticed(driver: PlanDriver, oracle: Oracle) -> None:
    outputs = driver.begin(3, OTHER, num_candidates=NUM_CANDIDATES)
    another = [*OTHER[:16], *OTHER[32:48], *OTHER[16:32], *OTHER[48:]]  # two blocks exchanged
    with pytest.raises(AssertionError):
        check(outputs, [oracle.last(another)])


def test_every_token_of_a_step_is_scored(
    driver: PlanDriver, runner: CudaRunner, oracle: Oracle
) -> None:
    driver.begin(3, OTHER)  # more tokens than the head takes rows
    scores = runner.score(len(OTHER)).cpu().numpy()
    for score, truth in zip(scores, oracle.truths(OTHER), strict=True):
        np.testing.assert_allclose(score, truth.logprobs, atol=truth.tolerance)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8, 9, 24])
def test_decode_steps_of_every_graph(driver: PlanDriver, oracle: Oracle, num_rows: int) -> None:
    texts = [RNG.integers(0, VOCAB, 20 + 7 * row).tolist() for row in range(num_rows)]
    for row, text in enumerate(texts):
        driver.begin(row, text[:-4], flags=DRIVEN, num_candidates=NUM_CANDIDATES)
    truths = [oracle.truths(text) for text in texts]
    rows = list(range(num_rows))
    for step in range(-4, 0):
        inputs = pb.Inputs(rows=rows, token_ids=[text[step] for text in texts])
        outputs = driver.decode(*rows, inputs=inputs)
        check(outputs, [truth[len(truth) + step] for truth in truths])


def test_a_mixed_step(driver: PlanDriver, oracle: Oracle) -> None:
    driver.begin(0, PROMPT[:-1], flags=DRIVEN, num_candidates=NUM_CANDIDATES)
    driver.begin(7, OTHER[:40], flags=DRIVEN, num_candidates=NUM_CANDIDATES)
    grown = appends((0, driver.take(1)) if driver.lengths[0] % 16 == 0 else (7, driver.take(1)))
    new = [
        driven(2, OTHER, blocks=driver.take(len(OTHER))),
        driven(5, PROMPT[:9], blocks=driver.take(9)),
    ]
    outputs = driver.run(
        new_rows=new_rows(*new),
        appends=grown,
        inputs=pb.Inputs(rows=[0, 7], token_ids=[PROMPT[-1], OTHER[40]]),
        batch=batch((0, 1), (7, 1), (2, len(OTHER)), (5, 9), num_decode_rows=2),
    )
    texts = (PROMPT, OTHER[:41], OTHER, PROMPT[:9])
    check(outputs, [oracle.last(text) for text in texts])


def test_rows_and_blocks_change_no_bit(runner: CudaRunner) -> None:
    fields = {"temperature": 1.0, "seeds": 3}
    first = PlanDriver(runner, seed=1).generate(0, PROMPT, 30, **fields)
    second = PlanDriver(runner, seed=2).generate(21, PROMPT, 30, **fields)
    assert first == second
    assert len(set(first)) > 5


def test_steps_under_way_together(driver: PlanDriver, runner: CudaRunner) -> None:
    expected = driver.generate(0, PROMPT, 13)
    driver.begin(4, PROMPT)
    sampled, pending = [], []
    for _ in range(12):
        pending.append(driver.launch_decode(4))
        if len(pending) == 3:
            sampled.append(int(pending.pop(0).wait().token_ids[0]))
    sampled += [int(step.wait().token_ids[0]) for step in pending]
    assert sampled == expected[1:]


def test_a_shared_prefix_is_read_where_it_lies(driver: PlanDriver, oracle: Oracle) -> None:
    blocks = driver.take(48)
    donor = driven(0, PROMPT[:33], blocks=blocks)
    # Both rows in one plan: all keys are stored before any row attends.
    sharer = driven(1, PROMPT, computed=32, blocks=[*blocks[:2], *driver.take(1)])
    outputs = driver.run(new_rows=new_rows(donor, sharer), batch=batch((0, 33), (1, 13)))
    check(outputs, [oracle.last(PROMPT[:33]), oracle.last(PROMPT)])


@pytest.mark.parametrize("is_crowded", [False, True])
def test_swapping_moves_a_row(driver: PlanDriver, runner: CudaRunner, is_crowded: bool) -> None:
    """Its blocks are written over in the plan that swaps them out."""
    expected = driver.generate(0, PROMPT, 4)
    blocks = driver.take(48)
    new = new_rows({"row": 0, "tokens": PROMPT, "blocks": blocks})
    first = driver.run(new_rows=new, batch=batch((0, 45)))
    out = pb.BlockPairs(src=blocks, dst=[2, 0, 1])
    thief = new_rows({"row": 9, "tokens": OTHER[:48], "blocks": blocks})
    driver.run(swap_out=out, freed_rows=[0], new_rows=thief, batch=batch((9, 48)))
    moved = driver.take(48)
    tokens = [*PROMPT, int(first.token_ids[0])]
    back = new_rows({"row": 4, "tokens": tokens, "computed": 45, "blocks": moved})
    swap_in = pb.BlockPairs(src=[2, 0, 1], dst=moved)
    outputs = driver.run(new_rows=back, swap_in=swap_in, batch=batch((4, 1), num_decode_rows=1))
    sampled = [tokens[-1], int(outputs.token_ids[0])]
    driver.lengths[4] = 46
    sampled += [int(driver.decode(4).token_ids[0]) for _ in range(2)]
    assert sampled == expected


def test_many_blocks_go_and_come(runner: CudaRunner) -> None:
    """More than staging holds at once, both ways."""
    blocks, host = runner.pool.blocks, runner.pool.host
    count = min(len(host), runner.info.num_device_blocks // 3)
    pattern = torch.randint(0, 256, (count, blocks.shape[1]), dtype=torch.uint8)
    blocks[1 : count + 1] = pattern.cuda()
    torch.cuda.synchronize()
    driver = PlanDriver(runner)
    ids = list(range(count))
    driver.run(swap_out=pb.BlockPairs(src=[i + 1 for i in ids], dst=ids[::-1]))
    target = [i + 1 + count for i in ids]
    driver.run(swap_in=pb.BlockPairs(src=ids[::-1], dst=target))
    torch.cuda.synchronize()
    assert torch.equal(host[ids[::-1]], pattern)
    assert torch.equal(blocks[target].cpu(), pattern)


def test_a_fork_continues_from_a_copy_of_the_tail(driver: PlanDriver, oracle: Oracle) -> None:
    blocks, tail = driver.take(48), driver.take(1)
    new = new_rows(driven(4, PROMPT[:40], blocks=blocks))
    driver.run(new_rows=new, batch=batch((4, 40)))
    outputs = driver.run(
        copy=pb.BlockPairs(src=[blocks[2]], dst=tail),
        forks=pb.Forks(src_rows=[4], dst_rows=[6], tail_dst_block_ids=tail),
        inputs=pb.Inputs(rows=[4, 6], token_ids=[7, 8]),
        batch=batch((4, 1), (6, 1), num_decode_rows=2),
    )
    check(outputs, [oracle.last([*PROMPT[:40], token]) for token in (7, 8)])


def test_samples_start_from_the_prompts_logits(driver: PlanDriver) -> None:
    common = {"tokens": PROMPT, "temperature": 1.0, "seeds": 9}
    expected = []
    for branch in range(3):
        row = {"row": 0, "branches": branch, "blocks": driver.take(48), **common}
        outputs = driver.run(new_rows=new_rows(row), batch=batch((0, 45)))
        expected += outputs.token_ids.tolist()
        driver.run(freed_rows=[0])
    blocks = driver.take(48)
    rows: list[dict[str, Any]] = [{"row": 0, "blocks": blocks, **common}]
    rows += [
        {"row": n, "branches": n, "computed": 45, "logits_from": 1, "blocks": blocks, **common}
        for n in (1, 2)
    ]
    outputs = driver.run(new_rows=new_rows(*rows), batch=batch((0, 45)))
    assert outputs.token_ids.tolist() == expected
    assert len(set(expected)) > 1


def test_a_poisoned_row_fails_alone(driver: PlanDriver, runner: CudaRunner) -> None:
    expected = driver.generate(0, OTHER, 2)
    driver.begin(0, OTHER)
    blocks = driver.take(48)
    new = new_rows({"row": 3, "tokens": PROMPT, "blocks": blocks, "num_candidates": 2})
    driver.run(new_rows=new, batch=batch((3, 45)))
    driver.lengths[3] = 45
    runner.pool.blocks[blocks[0]].view(torch.bfloat16).fill_(torch.nan)
    torch.cuda.synchronize()
    outputs = driver.decode(0, 3)
    assert list(outputs.failed_rows) == [(3, pb.ROW_STATUS_NUMERIC)]
    assert outputs.token_ids.tolist() == [expected[1], 0]
    assert outputs.candidate_logprobs.tolist() == [0, 0]


def test_an_empty_plan_only_moves_blocks(driver: PlanDriver, runner: CudaRunner) -> None:
    blocks = runner.pool.blocks
    blocks[7] = 35
    torch.cuda.synchronize()
    pairs = {"swap_out": pb.BlockPairs(src=[7], dst=[0]), "copy": pb.BlockPairs(src=[7], dst=[9])}
    assert driver.run(**pairs).token_ids.size == 0
    torch.cuda.synchronize()
    assert (runner.pool.host[0] == 35).all()
    assert (blocks[9] == 35).all()


def test_the_padding_block_is_left_alone(driver: PlanDriver, runner: CudaRunner) -> None:
    driver.generate(0, PROMPT, 20)
    assert runner.pool.blocks[0].view(torch.bfloat16).isnan().all()


def test_a_new_row_takes_a_long_table(driver: PlanDriver, oracle: Oracle) -> None:
    text = RNG.integers(0, VOCAB, 500).tolist()
    check(driver.begin(0, text, num_candidates=NUM_CANDIDATES), [oracle.last(text)])


def test_changes_of_the_table_beyond_the_steps_room_take_the_whole_table(
    path: Path, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_entries: list[int] = []
    pack = WriteTable.pack

    def counted(self: WriteTable, *, entries: torch.Tensor, block_table: torch.Tensor) -> Launch:
        num_entries.append(len(entries))
        return pack(self, entries=entries, block_table=block_table)

    monkeypatch.setattr(arena, "EXTRA_INTS", 24)  # beside 64 tokens
    monkeypatch.setattr(WriteTable, "pack", counted)
    runner = load(path, max_num_batched_tokens=64)
    text = RNG.integers(0, VOCAB, 500).tolist()
    for epoch in range(2):  # the second one's rows have other blocks in the same places
        runner.reset()
        runner.pool.blocks.view(torch.bfloat16).fill_(torch.nan)
        torch.cuda.synchronize()
        driver, num_entries[:] = PlanDriver(runner, seed=epoch), []
        driver.begin(7, PROMPT[:-1], flags=DRIVEN, num_candidates=NUM_CANDIDATES)
        assert num_entries == [3]
        # The first of these plans names all of the row's 32 blocks.
        driver.begin(0, text[:-1], chunk=40, flags=DRIVEN, num_candidates=NUM_CANDIDATES)
        assert num_entries == [3]
        for row in (0, 7):
            blocks = driver.state.block_table[row, : driver.state.num_blocks[row]]
            found = runner._backend.block_table[row, : len(blocks)].cpu().numpy()
            np.testing.assert_array_equal(found, blocks)
        inputs = pb.Inputs(rows=[0, 7], token_ids=[text[-1], PROMPT[-1]])
        outputs = driver.decode(0, 7, inputs=inputs)
        check(outputs, [oracle.last(text), oracle.last(PROMPT)])


def test_candidates_of_steps_under_way_together(driver: PlanDriver) -> None:
    """Each step's are in memory of its own until they are read."""
    wanted = {"num_candidates": NUM_CANDIDATES}
    driver.begin(0, PROMPT, **wanted)
    expected = [driver.decode(0) for _ in range(9)]
    driver.begin(4, PROMPT, **wanted)
    found, pending = [], []
    for _ in range(9):
        pending.append(driver.launch_decode(4))
        if len(pending) == 3:
            found.append(pending.pop(0).wait())
    found += [step.wait() for step in pending]
    for one, other in zip(found, expected, strict=True):
        assert one.candidate_token_ids.tolist() == other.candidate_token_ids.tolist()
        assert one.candidate_logprobs.tolist() == other.candidate_logprobs.tolist()
        assert one.token_logprobs.tolist() == other.token_logprobs.tolist()


@pytest.mark.parametrize("temperature", [9e-7, 1e-20, 1e-38, 1e-45])
def test_a_tiny_temperature_is_greedy(driver: PlanDriver, temperature: float) -> None:
    expected = driver.generate(0, PROMPT, 12)
    for seed in range(3):
        assert driver.generate(0, PROMPT, 12, temperature=temperature, seeds=seed) == expected


def test_timings_come_from_the_device(driver: PlanDriver) -> None:
    driver.begin(0, PROMPT)
    driver.decode(0)
    outputs = driver.decode(0)
    assert 0 < outputs.forward_ns < 1e8
    assert 0 < outputs.sample_ns < 1e8
    assert 0 <= outputs.idle_ns < 1e9


def test_what_the_memory_does_not_hold(path: Path, oracle: Oracle) -> None:
    with pytest.raises(KvPoolError, match="at least 2"):
        load(path, kv_memory_bytes=1000)
    with pytest.raises(KvPoolError, match="--max-num-batched-tokens"):
        load(path, kv_memory_bytes=1 << 50)


def test_half_precision(path: Path, oracle: Oracle) -> None:
    driver = PlanDriver(load(path, element="float16"))
    outputs = driver.begin(0, PROMPT, num_candidates=NUM_CANDIDATES)
    check(outputs, [oracle.last(PROMPT)])
