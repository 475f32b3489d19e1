from __future__ import annotations

import itertools

import numpy as np
import pytest

from blockyard.simulate.generator import generate
from blockyard.simulate.prompts import Prompts
from blockyard.simulate.trace import NS_PER_S, Prefixes, Trace, TraceError

VOCAB_SIZE = 1000


def lengths_only(arrivals_s: list[float]) -> Trace:
    count = len(arrivals_s)
    return Trace(
        "plain",
        (np.array(arrivals_s) * NS_PER_S).astype(np.int64),
        np.arange(10, 10 + count, dtype=np.int32),
        np.full(count, 5, np.int32),
    )


def with_prefixes() -> Trace:
    """Three prompts: the second continues the first, the third shares its first block."""
    ids = [np.array(chain, np.int64) for chain in ([0, 1], [0, 1, 2], [0, 3])]
    return Trace(
        "chained",
        np.array([0, 1, 2], np.int64),
        np.array([700, 1100, 1024], np.int32),
        np.array([5, 5, 5], np.int32),
        Prefixes(np.concatenate(ids), np.array([0, 2, 5, 7])),
    )


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_is_positive(rate: float) -> None:
    with pytest.raises(TraceError, match="rate must be positive"):
        lengths_only([0, 1]).at_rate(rate)


def test_arrivals_at_one_moment_have_no_rate() -> None:
    for trace in (lengths_only([0]), lengths_only([3, 3])):
        with pytest.raises(TraceError, match="all requests arrive at once"):
            trace.at_rate(1)


def test_at_rate_keeps_the_pattern() -> None:
    trace = lengths_only([10, 11, 14]).at_rate(4)
    assert (trace.arrival_ns / NS_PER_S).tolist() == [0, 0.125, 0.5]


def test_all_at_once() -> None:
    assert lengths_only([0, 1, 2]).all_at_once().arrival_ns.tolist() == [0, 0, 0]


def test_fitting_leaves_out_the_long_ones() -> None:
    trace = with_prefixes().fitting(1029)
    assert trace.num_prompt_tokens.tolist() == [700, 1024]
    assert trace.prefixes is not None
    assert [trace.prefixes.of(i).tolist() for i in range(2)] == [[0, 1], [0, 3]]
    assert len(with_prefixes().fitting(704)) == 0


def test_taking_more_than_there_are_repeats_after_a_mean_gap() -> None:
    trace = lengths_only([0, 2, 4]).take(5)
    assert (trace.arrival_ns / NS_PER_S).tolist() == [0, 2, 4, 6, 8]
    assert trace.num_prompt_tokens.tolist() == [10, 11, 12, 10, 11]
    assert len(lengths_only([0, 2, 4]).take(2)) == 2


def test_repetitions_share_no_blocks() -> None:
    once, twice = with_prefixes(), with_prefixes().take(6)
    assert twice.prefixes is not None
    ids = twice.prefixes.ids.tolist()
    assert not set(ids[:7]) & set(ids[7:])
    assert twice.ideal_hit_ratio() == once.ideal_hit_ratio()


def test_ideal_hit_ratio_counts_tokens_not_blocks() -> None:
    # The second has blocks 0 and 1 whole, although 1 was partial when it was seen; the third 0.
    assert with_prefixes().ideal_hit_ratio() == (1024 + 512) / (700 + 1100 + 1024)
    assert lengths_only([0, 1]).ideal_hit_ratio() == 0.0


def test_equal_blocks_give_equal_tokens() -> None:
    first, second, third = map(Prompts(with_prefixes(), VOCAB_SIZE).of, range(3))
    assert [len(prompt) for prompt in (first, second, third)] == [700, 1100, 1024]
    np.testing.assert_array_equal(first, second[:700])
    np.testing.assert_array_equal(first[:512], third[:512])
    assert (third[512:700] != first[512:]).mean() > 0.9
    assert first.min() >= 0
    assert second.max() < VOCAB_SIZE
    assert len(np.unique(second)) > VOCAB_SIZE / 2


def test_prompts_without_blocks_do_not_begin_alike() -> None:
    prompts = Prompts(lengths_only([0] * 500), VOCAB_SIZE)
    assert [len(prompts.of(i)) for i in range(3)] == [10, 11, 12]
    assert len({prompts.of(i)[:10].tobytes() for i in range(500)}) == 500
    np.testing.assert_array_equal(prompts.of(7), prompts.of(7))


# ---- generated traces, against the statistics of the files they stand for


@pytest.mark.parametrize("kind", ["azure", "mooncake"])
def test_same_seed_same_trace(kind: str) -> None:
    first, again, other = (generate(kind, 50, seed) for seed in (1, 1, 2))
    for name in ("arrival_ns", "num_prompt_tokens", "num_output_tokens"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))


@pytest.mark.parametrize("kind", ["azure", "mooncake"])
def test_one_request(kind: str) -> None:
    trace = generate(kind, 1, 0)
    assert len(trace) == 1
    assert trace.arrival_ns[0] == 0


def gaps_of(trace: Trace) -> tuple[float, float]:
    """Mean rate [1/s] and coefficient of variation of the times between arrivals."""
    gaps = np.diff(trace.arrival_ns)
    return NS_PER_S / gaps.mean(), gaps.std() / gaps.mean()


def test_azure_like() -> None:
    trace = generate("azure", 20_000, 0)
    rate, variation = gaps_of(trace)
    assert rate == pytest.approx(5.53, rel=0.03)
    assert variation == pytest.approx(1.09, rel=0.05)
    assert trace.num_prompt_tokens.mean() == pytest.approx(1154.7, rel=0.02)
    assert trace.num_output_tokens.mean() == pytest.approx(211.1, rel=0.02)
    assert np.percentile(trace.num_prompt_tokens, (50, 95, 99)) == pytest.approx(
        (1020, 4083, 4142), rel=0.01
    )
    assert np.percentile(trace.num_output_tokens, (50, 95, 99)) == pytest.approx(
        (129, 451, 601), rel=0.01
    )


def test_mooncake_like() -> None:
    traces = [generate("mooncake", 2000, seed) for seed in range(6)]
    rates, variations = zip(*map(gaps_of, traces), strict=True)
    assert np.mean(rates) == pytest.approx(2.99, rel=0.05)
    assert np.mean(variations) == pytest.approx(2.82, rel=0.05)
    prompts = np.concatenate([trace.num_prompt_tokens for trace in traces])
    assert prompts.mean() == pytest.approx(13720.9, rel=0.05)
    assert np.percentile(prompts, (50, 95, 99)) == pytest.approx((7965, 47626, 98817), rel=0.1)
    outputs = np.concatenate([trace.num_output_tokens for trace in traces])
    assert outputs.mean() == pytest.approx(352.3, rel=0.02)
    assert np.mean([t.ideal_hit_ratio() for t in traces]) == pytest.approx(0.294, abs=0.02)


def test_mooncake_like_blocks_are_chained() -> None:
    trace = generate("mooncake", 500, 3)
    assert trace.prefixes is not None
    before: dict[int, int] = {}
    for index, num_tokens in enumerate(trace.num_prompt_tokens.tolist()):
        ids = trace.prefixes.of(index).tolist()
        assert len(ids) == -(-num_tokens // 512)
        assert ids[0] == 0
        for parent, block in itertools.pairwise(ids):
            assert before.setdefault(block, parent) == parent
    assert (np.diff(trace.arrival_ns) >= 0).all()
