"""Sampling against its definition in float64, by sorting; and statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from cupy_kernels.device import Device
from cupy_kernels.sample import Sample, SamplingColumns
from cupy_kernels.shape import ElementType
from integration_tests.gpu.cases import stream

Float64Array = npt.NDArray[np.float64]

VOCAB = 1003  # of 1008 places
# Float32 against float64: scores closer than this may win either way, and the edge of top-p may
# fall on either side of a token this close to it.
SCORE_ERROR = 2e-5
MASS_ERROR = 1e-5


def random_logits(
    num_rows: int,
    vocab: int = VOCAB,
    spread: float = 3.0,
    seed: int = 0,
    element: ElementType = "bfloat16",
) -> Tensor:
    """Rows of ceil(vocab / 8) * 8 places, those behind vocab NaN."""
    generator = torch.Generator("cuda").manual_seed(seed)
    logits = torch.full((num_rows, -(-vocab // 8) * 8), torch.nan, device="cuda")
    logits[:, :vocab] = torch.randn(num_rows, vocab, generator=generator, device="cuda") * spread
    dtype: torch.dtype = getattr(torch, element)
    return logits.to(dtype)


class Draw:
    """One launch; parameters are given as values, sequences or not at all."""

    def __init__(self, logits: Tensor, vocab: int = VOCAB, **chosen: Any) -> None:
        self.logits, self.vocab = logits, vocab
        defaults: dict[str, tuple[Any, type]] = {
            "temperature": (1.0, np.float32),
            "top_k": (0, np.int32),
            "top_p": (0.0, np.float32),
            "min_p": (0.0, np.float32),
            "seeds": (7, np.int64),
            "branches": (0, np.int32),
            "positions": (np.arange(100, 100 + len(logits)), np.int32),
        }
        assert chosen.keys() <= defaults.keys()
        self.columns: dict[str, npt.NDArray[Any]] = {
            name: np.broadcast_to(np.asarray(chosen.get(name, default), dtype), len(logits)).copy()
            for name, (default, dtype) in defaults.items()
        }

    def run(self, device: Device) -> tuple[list[int], list[int]]:
        """Token ids and status of all rows."""
        results = torch.full((2, len(self.logits)), -7, dtype=torch.int32, device="cuda")
        columns = {name: torch.from_numpy(c).cuda() for name, c in self.columns.items()}
        element: ElementType = "bfloat16" if self.logits.dtype == torch.bfloat16 else "float16"
        launch = Sample(device, element).pack(
            logits=self.logits,
            vocab_size=self.vocab,
            columns=SamplingColumns(**columns),
            token_ids=results[0],
            status=results[1],
        )
        launch.run(stream())
        torch.cuda.synchronize()
        return results[0].tolist(), results[1].tolist()

    def tokens(self, device: Device) -> list[int]:
        tokens, status = self.run(device)
        assert status == [0] * len(tokens)
        return tokens

    def is_right(self, row: int, token: int) -> bool:
        """Whether the definition gives this token for the row, within float32's rounding."""
        logits = self.logits[row, : self.vocab].double().cpu().numpy()
        column = {name: c[row].item() for name, c in self.columns.items()}
        scores = logits / column["temperature"]
        noise = gumbels(self.vocab, column["positions"], column["branches"], column["seeds"])
        for mass_error in (0.0, MASS_ERROR, -MASS_ERROR):
            keep = kept(
                scores, column["top_k"], column["top_p"] * (1 + mass_error), column["min_p"]
            )
            total = np.where(keep, scores + noise, -np.inf)
            if total[token] >= total.max() - SCORE_ERROR * max(1.0, abs(total.max())):
                return True
        return False


def gumbels(vocab: int, position: int, branch: int, seed: int) -> Float64Array:
    """-log(-log(u)) of Philox4x32-10's words, written from the paper's description."""
    mask = np.uint64(0xFFFFFFFF)
    blocks = np.arange(-(-vocab // 4), dtype=np.uint64)
    c = [blocks, np.full_like(blocks, position), np.full_like(blocks, branch), 0 * blocks]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        high0, high1 = p0 >> np.uint64(32), p1 >> np.uint64(32)
        c = [high1 ^ c[1] ^ np.uint64(k0), p1 & mask, high0 ^ c[3] ^ np.uint64(k1), p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    uniform = (np.stack(c, axis=1).reshape(-1)[:vocab].astype(np.float64) + 0.5) / 2.0**32
    result: Float64Array = -np.log(-np.log(uniform))
    return result


def kept(scores: Float64Array, top_k: int, top_p: float, min_p: float) -> npt.NDArray[np.bool_]:
    """Tokens [vocab] that all filters keep, ties included; scores are logits / temperature."""
    keep = np.ones(scores.size, np.bool_)
    if 0 < top_k < scores.size:
        keep &= scores >= np.sort(scores)[-top_k]
    weights = np.where(keep, np.exp(scores - scores.max()), 0.0)
    if 0.0 < top_p < 1.0:
        values, where = np.unique(-scores, return_inverse=True)
        mass = np.bincount(where, weights, values.size)
        above = np.cumsum(mass) - mass
        keep &= above[where] < top_p * mass.sum()
    if min_p > 0.0:
        keep &= weights >= min_p * (1 - 1e-6)
    return keep


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": VOCAB + 5},
    {"top_p": 0.9},
    {"top_p": 0.999, "temperature": 4.0},
    {"top_p": 1e-6},
    {"top_p": 1.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.7, "min_p": 0.02, "temperature": 1.3},
]


@pytest.mark.parametrize("element", ["bfloat16", "float16"])
@pytest.mark.parametrize("chosen", FILTERS, ids=str)
def test_tokens_follow_the_definition(
    device: Device, chosen: dict[str, Any], element: ElementType
) -> None:
    rng = np.random.default_rng(1)
    draw = Draw(
        random_logits(64, element=element),
        seeds=rng.integers(-(2**63), 2**63, 64),
        branches=np.arange(64),
        **chosen,
    )
    for row, token in enumerate(draw.tokens(device)):
        assert draw.is_right(row, token), (row, token)


@pytest.mark.parametrize("vocab", [1, 8, 9, 49152, 128256, 151936])
def test_all_sizes_of_vocabulary(device: Device, vocab: int) -> None:
    filters: list[dict[str, Any]] = [
        {},
        {"top_p": 0.9},
        {"top_k": 20},
        {"top_p": 0.95, "min_p": 0.01},
    ]
    for chosen in filters:
        draw = Draw(random_logits(6, vocab, seed=vocab), vocab, **chosen)
        for row, token in enumerate(draw.tokens(device)):
            assert draw.is_right(row, token), (chosen, row, token)


FLAT: list[Callable[[], Draw]] = [
    lambda: Draw(random_logits(4, 49152, 0.5), 49152, top_p=0.97),
    lambda: Draw(random_logits(4, 49152, 0.5), 49152, top_k=30_000),
    lambda: Draw(random_logits(4, 49152, 0.5), 49152, top_k=30_000, top_p=0.8),
    lambda: Draw(torch.zeros(4, 49152, device="cuda").bfloat16(), 49152, top_k=5),
    lambda: Draw(torch.zeros(4, 49152, device="cuda").bfloat16(), 49152, top_p=0.5),
    lambda: Draw(random_logits(4, 49152, 30.0), 49152, temperature=0.01, top_k=20_000),
]


@pytest.mark.parametrize("make", FLAT)
def test_more_likely_tokens_than_fit_shared_memory(
    device: Device, make: Callable[[], Draw]
) -> None:
    draw = make()
    for row, token in enumerate(draw.tokens(device)):
        assert draw.is_right(row, token), (row, token)


def test_temperature_0_takes_the_first_of_the_highest(device: Device) -> None:
    logits = random_logits(5)
    logits[1, [40, 700, 1002]] = 90
    logits[2, :VOCAB] = -0.0
    logits[2, 500] = 0.0
    tokens = Draw(logits, temperature=0.0, top_p=0.5).tokens(device)
    assert tokens[1:3] == [40, 0]
    highest = logits[:, :VOCAB].float().max(dim=1).values.tolist()
    assert [logits[row, token].item() for row, token in enumerate(tokens)] == highest


# float32 has numbers below 1.2e-38, but with fewer digits.
COLD = [1e-5, 1e-6, 1e-7, 1e-12, 1e-20, 1e-30, 1e-37, 1e-38, 1e-40, 1e-45]


@pytest.mark.parametrize("element", ["bfloat16", "float16"])
@pytest.mark.parametrize("temperature", COLD)
@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 20}, {"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.5}, {"top_k": 9, "top_p": 0.5}],
    ids=str,
)
def test_a_tiny_temperature_leaves_the_highest(
    device: Device, element: ElementType, temperature: float, filters: dict[str, Any]
) -> None:
    """One of those that have the highest logit: the one with the greatest noise."""
    logits = random_logits(9, element=element)
    logits[1:, [5, 300, 301, 999]] = 12.0
    logits[2] -= 100  # all are negative
    logits[3] -= 12  # the highest is 0
    logits[4, :VOCAB] = -30000.0  # all are equal, and scores far beyond float32
    logits[5, 7] = logits[5, 800] = 30000.0
    draw = Draw(logits, temperature=temperature, seeds=np.arange(9), **filters)
    for row, token in enumerate(draw.tokens(device)):
        found = logits[row, :VOCAB].double().cpu().numpy()
        noise = gumbels(VOCAB, 100 + row, 0, row)
        assert token == np.where(found == found.max(), noise, -np.inf).argmax(), row
        assert draw.is_right(row, token), row


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}], ids=str)
def test_minus_zero_equals_zero(device: Device, filters: dict[str, Any]) -> None:
    zeros = [3, 4, 250, 600, 601, 1002]
    logits = torch.full((300, 1008), -1.0, device="cuda").bfloat16()
    logits[:, zeros[::2]] = 0.0
    logits[:, zeros[1::2]] = -0.0
    draw = Draw(logits, temperature=0.05, **filters)
    tokens = draw.tokens(device)
    assert set(tokens) == set(zeros)
    assert all(draw.is_right(row, token) for row, token in enumerate(tokens[:20]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite_fail_alone(device: Device, bad: float) -> None:
    logits = random_logits(7)
    expected = Draw(logits, top_p=0.9).tokens(device)
    logits[1, 3] = bad
    logits[4, VOCAB - 1] = bad
    tokens, status = Draw(logits, top_p=0.9).run(device)
    assert status == [0, 1, 0, 0, 1, 0, 0]
    assert tokens[1] == tokens[4] == 0
    good = [0, 2, 3, 5, 6]
    assert [tokens[row] for row in good] == [expected[row] for row in good]


@pytest.mark.parametrize("chosen", FILTERS, ids=str)
def test_a_token_depends_on_its_own_row_only(device: Device, chosen: dict[str, Any]) -> None:
    logits, positions = random_logits(1, 128256).repeat(300, 1), np.arange(300) % 10
    tokens = Draw(logits, 128256, positions=positions, **chosen).tokens(device)
    for row in range(10, 300):
        assert tokens[row] == tokens[row % 10]
    # Fewer rows get more SMs each.
    for num_rows in (1, 10, 24, 50):
        few = Draw(logits[:num_rows], 128256, positions=positions[:num_rows], **chosen)
        assert few.tokens(device) == tokens[:num_rows]


@pytest.mark.parametrize("top_p", [0.5, 0.97])
def test_a_flat_row_does_not_depend_on_its_batch_either(device: Device, top_p: float) -> None:
    logits = random_logits(1, 49152, 0.5).repeat(140, 1)
    tokens = Draw(logits, 49152, top_p=top_p).tokens(device)
    for num_rows in (1, 20, 40):
        assert Draw(logits[:num_rows], 49152, top_p=top_p).tokens(device) == tokens[:num_rows]


def test_tokens_come_as_often_as_they_should(device: Device) -> None:
    vocab, num_draws = 24, 200_000
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(3)).bfloat16()
    logits = row.cuda().repeat(num_draws, 1)
    tokens = Draw(logits, vocab, temperature=0.8, positions=np.arange(num_draws)).tokens(device)
    counts = np.bincount(tokens, minlength=vocab)
    expected = num_draws * torch.softmax(row.double() / float(np.float32(0.8)), dim=0).numpy()
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # 23 degrees of freedom: 99.9 % lie below 49.7.
    assert chi_square < 49.7


def test_a_stride_that_vectors_do_not_divide_is_our_mistake(device: Device) -> None:
    with pytest.raises(AssertionError, match="1003"):
        Draw(torch.zeros(1, 1003, device="cuda").bfloat16()).run(device)
