"""Speed of the GPU kernels, against what the memory of the same device gives in the same run.

    python -m benchmarks.gpu_kernels [--parts prefill,sample]

Decode is reported as a share of the measured read ceiling, beside the share that FlashAttention-3
(as vLLM 0.26 ships it, paged, page 16) reached of its own run's ceiling on an H100: the devices
differ, so absolute times do not compare. Every part survives the failure of another; if only some
are asked for, nothing is written.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu_cases as cases
from benchmarks.gpu_timing import copy_ceiling, graph_us, host_us, read_ceiling
from benchmarks.report import Target, print_table, print_targets, write
from cupy_kernels import nvrtc
from cupy_kernels.copy_blocks import CopyBlocks
from cupy_kernels.cubins import target_of
from cupy_kernels.decode import SplitPlanner
from cupy_kernels.device import Device
from cupy_kernels.prefill import PrefillKernel, plain_prefill, prefill_kernel, wgmma_prefill
from cupy_kernels.shape import AttentionShape
from cupy_kernels.variants import model_variants
from cupy_kernels.write_kv import WriteKv

LLAMA_8B: Final = AttentionShape(32, 32, 8, 128, 16)
HEAD_DIM_64: Final = AttentionShape(32, 32, 8, 64, 16)
OTHERS: Final = {
    "smollm2-135m: 9 / 3 heads, head_dim 64": AttentionShape(30, 9, 3, 64, 16),
    "llama-3.2-1b: 32 / 8 heads, head_dim 64": AttentionShape(16, 32, 8, 64, 16),
    "phi-3.5-mini: 32 / 32 heads, head_dim 96": AttentionShape(32, 32, 32, 96, 16),
    "qwen2.5-7b: 28 / 4 heads, head_dim 128, block 64": AttentionShape(28, 28, 4, 128, 64),
    "gemma-2-2b: 8 / 4 heads, head_dim 256": AttentionShape(26, 8, 4, 256, 16),
    "16 heads over one, head_dim 128": AttentionShape(24, 128, 8, 128, 16),
}

# (rows, context) -> microseconds per layer on an H100, 32 query and 8 KV heads, head_dim 128.
FA3_H100_US: Final = {
    (1, 1024): 11.0,
    (1, 8192): 21.0,
    (1, 32768): 55.1,
    (8, 1024): 19.8,
    (8, 8192): 97.9,
    (32, 512): 31.9,
    (32, 2048): 98.2,
    (64, 1024): 102.3,
    (64, 4096): 363.9,
    (128, 1024): 193.0,
    (256, 512): 195.5,
    (256, 1024): 375.4,
}
FA3_H100_HEAD_DIM_64_US: Final = {(64, 1024): 61.9, (256, 1024): 217.2}
H100_READ: Final = 3.15e12  # bytes per second, in the same session as these

# (rows, new tokens, computed tokens) -> TFLOP/s on an H100.
FA3_H100_PREFILL: Final = {
    (16, 512, 0): 274,
    (8, 2048, 0): 480,
    (2, 8192, 0): 595,
    (1, 16384, 0): 614,
    (4, 2048, 8192): 551,
    (16, 256, 2048): 433,
}

Results = dict[str, Any]


def decode_shares(
    device: Device, pool: cases.Pool, read: float, anchors: dict[tuple[int, int], float]
) -> tuple[Results, list[Target]]:
    """Uniform batches beside FA3's."""
    results: Results = {}
    targets = []
    for (rows, context), fa3_us in anchors.items():
        step = cases.decode_step(device, pool, [context] * rows)
        us = graph_us(step.attend)
        share, fa3_share = (
            step.kv_bytes / time_us * 1e6 / rate
            for time_us, rate in ((us, read), (fa3_us, H100_READ))
        )
        name = f"{rows} x {context}, head_dim {pool.shape.head_dim}"
        results[name] = {"us": us, "share_of_read": share, "fa3_h100_share_of_read": fa3_share}
        targets.append(Target(f"decode {name}: share of read", share, ">=", fa3_share))
        print(f"decode {name}: {us:.1f} us, {share:.3f} of read, FA3 on H100 {fa3_share:.3f}")
    return results, targets


def decode_llama(device: Device, read: float) -> tuple[Results, list[Target]]:
    """Llama-8B's heads: uniform batches, ragged ones, and the cache write before."""
    pool = cases.Pool.random(LLAMA_8B, 18_000)
    results, targets = decode_shares(device, pool, read, FA3_H100_US)
    for name, rows, low, high in (
        ("64 x 512..16k", 64, 512, 16384),
        ("200 x 64..4k", 200, 64, 4096),
        ("16 x 256..8k", 16, 256, 8192),
        ("24 x 900..1100", 24, 900, 1100),
    ):
        rng = np.random.default_rng(0)
        lengths = np.exp(rng.uniform(np.log(low), np.log(high), rows)).astype(int).tolist()
        while sum(-(-length // 16) for length in lengths) >= len(pool.blocks) - 1:
            lengths.pop()
        ragged = cases.decode_step(device, pool, lengths)
        uniform = cases.decode_step(device, pool, [sum(lengths) // len(lengths)] * len(lengths))
        ragged_us, uniform_us = graph_us(ragged.attend), graph_us(uniform.attend)
        share = ragged.kv_bytes / ragged_us * 1e6 / read
        speed = ragged.kv_bytes / ragged_us * uniform_us / uniform.kv_bytes
        results[f"ragged {name}"] = {
            "us": ragged_us,
            "share_of_read": share,
            "speed_of_uniform": speed,
        }
        targets.append(Target(f"decode ragged {name}: of uniform", speed, ">=", 0.95))
        print(f"decode ragged {name}: {ragged_us:.1f} us, {share:.3f} of read, {speed:.3f}")
    for rows, context in ((1, 1024), (8, 1024), (64, 1024)):
        step = cases.decode_step(device, pool, [context] * rows)
        pairs = [launch for pair in zip(step.write, step.attend, strict=True) for launch in pair]
        results[f"write_kv + decode {rows} x {context}"] = {"us": 2 * graph_us(pairs)}
    return results, targets


def decode_head_dim_64(device: Device, read: float) -> tuple[Results, list[Target]]:
    """Half the bytes per token."""
    pool = cases.Pool.random(HEAD_DIM_64, 17_000)
    return decode_shares(device, pool, read, FA3_H100_HEAD_DIM_64_US)


def decode_other_shapes(device: Device, read: float) -> tuple[Results, list[Target]]:
    """The same kernel for other models: 128 rows of 1,024 tokens.

    The aim is 4 us beside reading at 92 % of the ceiling.
    """
    results: Results = {}
    targets = []
    for name, shape in OTHERS.items():
        pool = cases.Pool.random(shape, 128 * 1024 // shape.block_size + 2)
        step = cases.decode_step(device, pool, [1024] * 128)
        us = graph_us(step.attend)
        share = step.kv_bytes / us * 1e6 / read
        mb = step.kv_bytes / 1e6
        results[name] = {"us": us, "kv_mb": mb, "share_of_read": share}
        aim_us = step.kv_bytes / (0.92 * read) * 1e6 + 4
        targets.append(Target(f"decode {name}", us, "<=", aim_us, "us"))
        print(f"decode {name}: {us:.1f} us for {mb:.0f} MB, {share:.3f} of read")
        del pool, step
        torch.cuda.empty_cache()
    return results, targets


def start(device: Device, _: float) -> tuple[Results, list[Target]]:
    """Loading all kernels of Llama-8B from the cache."""
    with tempfile.TemporaryDirectory() as folder:
        for _run in range(2):  # the first one fills the cache
            begin = time.perf_counter()
            fresh = Device.open(device.ordinal, pathlib.Path(folder))
            target = target_of(fresh.capability)
            for variant in model_variants(LLAMA_8B, fresh.max_shared_bytes, target):
                fresh.load(variant)
            seconds = time.perf_counter() - begin
    print(f"warm start: {seconds:.3f} s")
    return {"warm_s": seconds}, [Target("warm start of all kernels", seconds, "<=", 0.5, "s")]


def plans(device: Device, _: float) -> tuple[Results, list[Target]]:
    """The work list, and what a launch costs the host."""
    results: Results = {}
    for rows in (1, 64, 256, 1024):
        lengths = np.random.default_rng(0).integers(1, 8000, rows).tolist()
        work = cases.decode_work(device, LLAMA_8B, rows)
        columns = cases.int32(range(rows)), cases.int32(lengths)
        launch = SplitPlanner(device, LLAMA_8B).pack(
            rows=columns[0], seq_lens=columns[1], work=work
        )
        results[str(rows)] = {"us": graph_us([launch] * 50), "host_us": host_us(launch)}
        print(f"plan {rows}: {results[str(rows)]}")
    return results, [
        Target("plan of 1024 rows", results["1024"]["us"], "<=", 3, "us"),
        Target("host time of a launch", results["1"]["host_us"], "<=", 4, "us"),
    ]


def writes(device: Device, _: float) -> tuple[Results, list[Target]]:
    """Rotation and cache write, against a plain copy."""
    copy = copy_ceiling()
    shape = LLAMA_8B
    pool = cases.Pool.random(shape, 2_000)
    angles = torch.randn(40_000, shape.head_dim, device="cuda")
    kernel = WriteKv(device, shape, 1e-5)
    results: Results = {}
    for tokens in (1, 64, 1024, 4096, 16384):
        num_inputs = max(1, min(32, 600_000_000 // (tokens * shape.qkv_size * 2)))
        inputs = [cases.random_qkv(shape, tokens) for _ in range(num_inputs)]
        positions = cases.int32(range(tokens))
        launches = [
            kernel.pack(
                qkv=inputs[layer % num_inputs],
                angles=angles,
                positions=positions,
                slot_mapping=positions + 16,
                pool=pool.blocks,
                layer=layer,
            )
            for layer in range(shape.num_layers)
        ]
        us = graph_us(launches)
        num_bytes = tokens * shape.head_dim * 4 * (shape.num_heads + 2 * shape.num_kv_heads)
        results[str(tokens)] = {"us": us, "share_of_copy": num_bytes / us * 1e6 / copy}
        print(f"write_kv {tokens}: {results[str(tokens)]}")
    return results, [
        Target("write_kv of 1 token", results["1"]["us"], "<=", 3, "us"),
        Target("write_kv of 4096: share of copy", results["4096"]["share_of_copy"], ">=", 0.85),
    ]


def block_copies(device: Device, _: float) -> tuple[Results, list[Target]]:
    """Whole blocks of 2 MiB within the pool."""
    copy = copy_ceiling()
    pool = cases.Pool.random(LLAMA_8B, 2_000)
    kernel = CopyBlocks(device)
    results: Results = {}
    for count in (1, 8, 128, 512):
        ids = torch.randperm(2_000, device="cuda").int()
        pairs = {"sources": ids[:count].clone(), "targets": ids[1000 : 1000 + count].clone()}
        us = graph_us([kernel.pack(pool=pool.blocks, **pairs)] * 8)
        moved = 2 * count * LLAMA_8B.block_bytes
        results[str(count)] = {"us": us, "share_of_copy": moved / us * 1e6 / copy}
        print(f"copy {count} blocks: {results[str(count)]}")
    return results, [
        Target("copy of one block", results["1"]["us"], "<=", 4, "us"),
        Target("copy of 128 blocks: share of copy", results["128"]["share_of_copy"], ">=", 0.9),
    ]


def samplers(device: Device, _: float) -> tuple[Results, list[Target]]:
    """One token per row of 128,256 logits, some hundreds of them likely; and of flat rows."""
    vocab = 128_256
    results: Results = {}
    for rows in (1, 64, 256):
        spread = torch.randn(rows, vocab, device="cuda") * 2
        likely = torch.rand(vocab, device="cuda") < 300 / vocab
        peaked = torch.where(likely, spread * 1.5 + 12, spread).bfloat16()
        for name, logits, chosen in (
            ("greedy", peaked, {"temperature": 0.0}),
            ("temperature 1", peaked, {}),
            ("top_k 50", peaked, {"top_k": 50}),
            ("top_p 0.95", peaked, {"top_p": 0.95}),
            ("flat, top_p 0.95", (spread / 4).bfloat16(), {"top_p": 0.95}),
        ):
            launch, keep = cases.sampler_launch(device, logits, vocab, **chosen)
            us = graph_us([launch] * 16)
            results[f"{rows}, {name}"] = {"us": us}
            print(f"sample {rows} rows, {name}: {us:.1f} us")
            del keep
    return results, [
        Target(f"sample {rows} rows, {name}", results[f"{rows}, {name}"]["us"], "<=", limit, "us")
        for name in ("greedy", "temperature 1", "top_k 50", "top_p 0.95")
        for rows, limit in ((1, 12), (64, 30), (256, 80))
    ]


def dense_us(rows: int, tokens: int, backend: SDPBackend) -> float:
    """torch's attention on dense tensors of as many heads, causal."""
    size = (rows, LLAMA_8B.num_heads, tokens, LLAMA_8B.head_dim)
    query, key, value = (torch.randn(size, device="cuda").bfloat16() for _ in range(3))

    def attend() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    with sdpa_kernel(backend):
        return graph_us([attend] * 4)


def prefill_kernels(device: Device, shape: AttentionShape) -> dict[str, PrefillKernel]:
    """Those that a device can run, whichever of them is chosen for it."""
    found = {"plain": plain_prefill(shape)}
    if target_of(device.capability) == "sm_90a":
        found["wgmma"] = wgmma_prefill(shape)
    return found


def prefills(device: Device, _: float) -> tuple[Results, list[Target]]:
    """Prompts and chunks, by each kernel; beside it torch's dense ones, FA3 on an H100."""
    pool = cases.Pool.random(AttentionShape(4, 32, 8, 128, 16), 2_600)
    kernels = prefill_kernels(device, pool.shape)
    chosen = prefill_kernel(pool.shape, target_of(device.capability))
    results: Results = {}
    targets = []
    for (rows, new, computed), fa3 in FA3_H100_PREFILL.items():
        name = f"{rows} x {new} after {computed}"
        step = cases.prefill_step(device, pool, kernels, rows, new, computed)
        speeds = {kernel: step.flops / graph_us(step.attend[kernel]) / 1e6 for kernel in kernels}
        tflops = next(speeds[kernel] for kernel in kernels if kernels[kernel] == chosen)
        results[name] = {"tflops": tflops, "fa3_h100_tflops": fa3}
        results[name] |= {f"{kernel}_tflops": speed for kernel, speed in speeds.items()}
        if computed == 0:
            for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                dense = step.flops / dense_us(rows, new, backend) / 1e6
                results[name][f"torch_{backend.name.lower()}_tflops"] = dense
            flash = results[name]["torch_flash_attention_tflops"]
            targets.append(Target(f"prefill {name}: TFLOP/s", tflops, ">=", flash))
        print(f"prefill {name}: {results[name]}", flush=True)
    return results, targets


PARTS: Final[dict[str, Callable[[Device, float], tuple[Results, list[Target]]]]] = {
    "decode": decode_llama,
    "decode_head_dim_64": decode_head_dim_64,
    "decode_other_shapes": decode_other_shapes,
    "start": start,
    "plan": plans,
    "write_kv": writes,
    "copy_blocks": block_copies,
    "sample": samplers,
    "prefill": prefills,
}


def _parts() -> list[str]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels")
    parser.add_argument("--parts", help=f"comma-separated; default: {','.join(PARTS)}")
    names: str | None = parser.parse_args().parts
    chosen = list(PARTS) if names is None else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in PARTS:
            parser.error(f"unknown part {name!r}; known are {', '.join(PARTS)}")
    return chosen


def main() -> int:
    """Run the parts; 0: all targets met, 1: one missed, 2: a part could not run."""
    parts = _parts()
    device = Device.open()
    read = read_ceiling(device)
    results: Results = {
        "device": {
            "name": device.name,
            "compute_capability": ".".join(str(part) for part in device.capability),
            "num_sms": device.num_sms,
            "nvrtc": ".".join(str(part) for part in nvrtc.version()),
            "read_bytes_per_s": read,
            "copy_bytes_per_s": copy_ceiling(),
            "fa3_device": f"H100, read {H100_READ:.3g} bytes/s",
        }
    }
    print(results["device"])
    targets: list[Target] = []
    has_failed = False
    for name in parts:
        try:
            results[name], more = PARTS[name](device, read)
            targets += more
        except Exception:  # noqa: BLE001 - the other parts are worth their device time
            traceback.print_exc()
            has_failed = True
        torch.cuda.empty_cache()
    print_table("Parts", ("part", "cases"), [(name, len(found)) for name, found in results.items()])
    are_met = print_targets(targets)
    if parts == list(PARTS):
        write("gpu_kernels", results, targets)
    return 2 if has_failed else 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())
