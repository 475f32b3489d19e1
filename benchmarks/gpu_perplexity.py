"""Perplexity of running text by our GPU runner, beside transformers' on the same GPU.

A log-probability in bfloat16 is off by 0.06 (standard deviation, SmolLM2-135M), differently in
every implementation: over one page of 1,024 tokens, perplexities differ by 0.2 % for that alone,
over 64 pages by 0.03 %. So many pages count, each in a context of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.gpu_reference import Transformers, chosen
from benchmarks.prompts import running_text
from benchmarks.report import Target, print_table
from executor_svc.backends.cuda.loading import CudaOptions, load_runner
from executor_svc.backends.cuda.runner import CudaRunner
from executor_svc.tests.plan_driver import PlanDriver
from executor_svc.tests.plans import batch, new_rows

PAGE_TOKENS: Final = 1024
NUM_PAGES: Final = 64
CHUNK_TOKENS: Final = 256
_MAX_DEVIATION_PERCENT: Final = 0.1
_MAX_ERROR_RATIO: Final = 1.25
"""Mean error against float32, ours over transformers'."""
_KV_BYTES: Final = 64 << 20
_NAN_BYTE: Final = 0xFF  # two of them are NaN in bfloat16 and in half precision
_OURS: Final = {"prefill at once": PAGE_TOKENS, f"chunks of {CHUNK_TOKENS}": CHUNK_TOKENS}

Results = dict[str, Any]


def measure(model_path: Path, transformers: Transformers) -> tuple[Results, list[Target]]:
    """Score all pages in every way; prints a table.

    Raises what executor_svc.backends.cuda.loading.load_runner does, and FatalDeviceError.
    """
    options = CudaOptions(
        block_size=16,
        max_rows=64,
        max_num_batched_tokens=PAGE_TOKENS,
        max_model_len=PAGE_TOKENS,
        kv_memory_bytes=_KV_BYTES,
    )
    runner = load_runner(model_path, options, lambda _stage, _done: None)
    text = running_text(model_path)[: NUM_PAGES * PAGE_TOKENS]
    pages = [text[begin : begin + PAGE_TOKENS] for begin in range(0, len(text), PAGE_TOKENS)]
    scores: dict[str, list[Tensor]] = {"float32": [], "bfloat16": []}
    scores |= {name: [] for name in _OURS}
    for page in pages:
        exact, rounded = transformers.next_logprobs(page)
        scores["float32"].append(exact)
        scores["bfloat16"].append(rounded)
        for name, chunk in _OURS.items():
            scores[name].append(next_logprobs(runner, page, chunk))
    return compare({name: torch.stack(parts).double().cpu() for name, parts in scores.items()})


def next_logprobs(runner: CudaRunner, tokens: list[int], chunk: int) -> Tensor:
    """Log-probability of each token but the first [n - 1], prefilled in chunks in a new epoch.

    In blocks that depend on `chunk`; what others left in any block is NaN now, so that whatever
    reads it would show.
    """
    runner.reset()
    torch.cuda.synchronize()
    runner.pool.blocks.fill_(_NAN_BYTE)
    torch.cuda.synchronize()
    driver = PlanDriver(runner, seed=chunk)
    new: dict[str, Any] = {
        "new_rows": new_rows({"row": 0, "tokens": tokens, "blocks": driver.take(len(tokens))})
    }
    found = []
    for begin in range(0, len(tokens), chunk):
        count = min(chunk, len(tokens) - begin)
        driver.run(**new, batch=batch((0, count)))
        new = {}
        found.append(chosen(runner.score(count), tokens[begin : begin + count + 1]))
    return torch.cat(found)


def compare(scores: dict[str, Tensor]) -> tuple[Results, list[Target]]:
    """Perplexities of log-probabilities [pages, tokens - 1], float64, by who said them."""
    exact, theirs = scores["float32"], scores["bfloat16"]
    perplexities = {name: _perplexity(values) for name, values in scores.items()}
    errors = {name: float((values - exact).abs().mean()) for name, values in scores.items()}
    deviations = {name: _deviation(values, theirs) for name, values in scores.items()}
    labels = {name: f"transformers, {name}" for name in ("float32", "bfloat16")}
    labels |= {name: f"ours, {name}" for name in _OURS}
    rows = [
        (label, perplexities[name], errors[name], deviations[name])
        for name, label in labels.items()
    ]
    headers = ("by", "perplexity", "mean error of a log-probability", "% off transformers bfloat16")
    print_table(f"{len(exact)} pages of {PAGE_TOKENS} tokens of running text", headers, rows)
    targets = []
    for name in _OURS:
        off, ratio = abs(deviations[name]), errors[name] / errors["bfloat16"]
        limit = _MAX_DEVIATION_PERCENT
        targets.append(Target(f"perplexity, {name}: off transformers'", off, "<=", limit, "%"))
        what = f"error, {name}, over transformers' bfloat16"
        targets.append(Target(what, ratio, "<=", _MAX_ERROR_RATIO))
    results = {
        "num_pages": len(exact),
        "page_tokens": PAGE_TOKENS,
        "perplexity": perplexities,
        "mean_error_of_logprob": errors,
        "percent_off_transformers_bfloat16": deviations,
        "percent_off_first_page": {n: _deviation(v[:1], theirs[:1]) for n, v in scores.items()},
    }
    return results, targets


def _perplexity(logprobs: Tensor) -> float:
    return float((-logprobs.mean()).exp())


def _deviation(logprobs: Tensor, expected: Tensor) -> float:
    """Of the perplexity, in percent."""
    return 100 * (_perplexity(logprobs) / _perplexity(expected) - 1)
