"""Transformers' `generate` on a GPU: `python -m benchmarks.hf_static MODEL [TRACE]`.

Random bf16 weights of one of the public shapes; the first 32 requests of W1 in one static batch,
padded on the left, which runs to the longest output. Prints JSON; only tokens that were asked for
count.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Final, cast

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.dummy_models import config_of
from blockyard.bench.workload import WorkloadSpec, make_workload
from blockyard.simulate.prompts import Prompts
from blockyard.simulate.trace import Trace

BATCH_SIZE: Final = 32
_WARM_UP_TOKENS: Final = 8
_PAD_ID: Final = 0


def _model(name: str) -> Any:
    """Random weights, made on the GPU."""
    fields = config_of(name)
    del fields["torch_dtype"], fields["architectures"]
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("cuda"):
        model = cast("Any", AutoModelForCausalLM).from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.02)
        else:
            parameter.fill_(1)
    return model.eval()


def _padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, both [batch, longest], padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), _PAD_ID)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.cuda(), mask.cuda()


def _generate(model: Any, prompts: list[list[int]], num_output_tokens: int) -> float:
    """Seconds of one batch, all rows to the same length."""
    ids, mask = _padded(prompts)
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    model.generate(
        ids,
        attention_mask=mask,
        min_new_tokens=num_output_tokens,
        max_new_tokens=num_output_tokens,
        do_sample=False,
        pad_token_id=_PAD_ID,
    )
    torch.cuda.synchronize()
    return time.perf_counter() - start_s


def measure(name: str, trace: Trace) -> dict[str, Any]:
    """One batch of all requests of the trace."""
    model = _model(name)
    prompts = Prompts(trace, model.config.vocab_size)
    batch = [prompts.of(index).tolist() for index in range(len(trace))]
    _generate(model, batch[:2], _WARM_UP_TOKENS)
    seconds = _generate(model, batch, int(trace.num_output_tokens.max()))
    return {
        "model": name,
        "transformers": transformers.__version__,
        "attention": model.config._attn_implementation,
        "batch_size": len(trace),
        "seconds": seconds,
        "requests_per_s": len(trace) / seconds,
        "output_tokens_per_s": int(trace.num_output_tokens.sum()) / seconds,
        "longest_output_tokens": int(trace.num_output_tokens.max()),
    }


def main() -> int:
    """Measure and print; exit code 2 without a GPU."""
    if not torch.cuda.is_available():
        print("cannot run: torch sees no GPU", file=sys.stderr)
        return 2
    name, *rest = sys.argv[1:]
    trace_path = Path(rest[0]) if rest else None
    workload = make_workload(WorkloadSpec("W1", trace_path))
    with torch.inference_mode():
        print(json.dumps(measure(name, workload.trace.take(BATCH_SIZE))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
