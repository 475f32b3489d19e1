"""Metrics with vLLM's names and labels: what its dashboards, autoscalers and routers read.

The InferencePool endpoint picker, for one, takes the queue, the KV usage, the block sizes and the
LoRA adapters from here. Speculative decoding has names too, but there is none here.
"""

from __future__ import annotations

from typing import Final

from scheduler_svc.engine.metrics.family import Family, Values
from scheduler_svc.engine.metrics.reading import Reading


def _usage(reading: Reading) -> float:
    device = reading.snapshot.device
    held = device.num_stored + device.num_in_flight + device.num_unused
    usable = device.num_slots - device.num_padding
    return held / usable if usable else 0.0


def _cache_config(reading: Reading) -> Values:
    block_size = reading.snapshot.block_size
    num_blocks = reading.snapshot.device.num_slots // block_size if block_size else 0
    return {(str(block_size), str(num_blocks)): 1}


def _waiting_by_reason(reading: Reading) -> Values:
    num_deferred = reading.snapshot.num_deferred
    return {
        ("capacity",): reading.snapshot.num_waiting - num_deferred,
        ("deferred",): num_deferred,
    }


def _hits(reading: Reading) -> float:
    counters = reading.snapshot.counters
    return counters.num_hit_tokens_device + counters.num_hit_tokens_host


def _preemptions(reading: Reading) -> float:
    counters = reading.snapshot.counters
    return counters.num_preemptions_by_recompute + counters.num_preemptions_by_swap


def _ended(reading: Reading) -> Values:
    return {(reason,): count for reason, count in reading.recorder.ended.items()}


VLLM_FAMILIES: Final = (
    # Now.
    Family(
        "gauge",
        "vllm:num_requests_running",
        "Branches that hold a row of the executor.",
        lambda r: r.snapshot.num_running,
    ),
    Family(
        "gauge",
        "vllm:num_requests_waiting",
        "Branches in the queue; a request that waits for its first prefill is one.",
        lambda r: r.snapshot.num_waiting,
    ),
    Family(
        "gauge",
        "vllm:num_requests_waiting_by_reason",
        "Branches in the queue: for want of rows or blocks, or held back for a moment.",
        _waiting_by_reason,
        ("reason",),
    ),
    Family(
        "gauge",
        "vllm:kv_cache_usage_perc",
        "Part of the usable device blocks that requests hold, 0 to 1.",
        _usage,
    ),
    Family(
        "gauge",
        "vllm:cache_config_info",
        "Sizes of the device pool, in the labels; the padding block is counted.",
        _cache_config,
        ("block_size", "num_gpu_blocks"),
    ),
    Family(
        "gauge",
        "vllm:lora_requests_info",
        "LoRA adapters, in the labels: none can be loaded.",
        lambda r: {("0", "", ""): 1},
        ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
    ),
    # Since the engine started.
    Family(
        "counter",
        "vllm:prefix_cache_queries",
        "Tokens of admitted branches that the prefix cache was asked for.",
        lambda r: r.snapshot.counters.num_queried_tokens,
    ),
    Family(
        "counter",
        "vllm:prefix_cache_hits",
        "Tokens of admitted branches that the prefix cache had, on either pool.",
        _hits,
    ),
    Family(
        "counter",
        "vllm:num_preemptions",
        "Branches preempted, of either kind.",
        _preemptions,
    ),
    Family(
        "counter",
        "vllm:prompt_tokens",
        "Prompt tokens of requests that were queued.",
        lambda r: r.snapshot.counters.num_prompt_tokens,
    ),
    Family(
        "counter",
        "vllm:prompt_tokens_cached",
        "Prompt tokens of requests that ended by themselves which the prefix cache had.",
        lambda r: r.recorder.num_cached_tokens,
    ),
    Family(
        "counter",
        "vllm:generation_tokens",
        "Output tokens.",
        lambda r: r.snapshot.counters.num_output_tokens,
    ),
    Family(
        "counter",
        "vllm:request_success",
        "Branches that ended, by reason; an aborted request counts once.",
        _ended,
        ("finished_reason",),
    ),
    # Steps and tokens.
    Family(
        "histogram",
        "vllm:iteration_tokens_total",
        "Tokens computed in a step, of prompts and outputs.",
        lambda r: r.recorder.step_tokens,
    ),
    Family(
        "histogram",
        "vllm:inter_token_latency_seconds",
        "Time between two tokens of a branch, at the engine.",
        lambda r: r.recorder.inter_token,
    ),
    # Requests, as clients of the front ends see them.
    Family(
        "histogram",
        "vllm:time_to_first_token_seconds",
        "From the arrival of a request at a front end to its first token there.",
        lambda r: r.frontends.time_to_first_token,
    ),
    Family(
        "histogram",
        "vllm:e2e_request_latency_seconds",
        "From the arrival of a request to the end of its complete answer, at a front end.",
        lambda r: r.frontends.e2e_latency,
    ),
    Family(
        "histogram",
        "vllm:request_time_per_output_token_seconds",
        "Time from first to last token of a complete answer, by the tokens after the first.",
        lambda r: r.frontends.time_per_output_token,
    ),
    # Requests that ended by themselves, at the engine.
    Family(
        "histogram",
        "vllm:request_queue_time_seconds",
        "From the arrival of a request at the engine to its first admission.",
        lambda r: r.recorder.queue,
    ),
    Family(
        "histogram",
        "vllm:request_prefill_time_seconds",
        "From the first admission of a request to its first token.",
        lambda r: r.recorder.prefill,
    ),
    Family(
        "histogram",
        "vllm:request_decode_time_seconds",
        "From the first token of a request to its end.",
        lambda r: r.recorder.decode,
    ),
    Family(
        "histogram",
        "vllm:request_inference_time_seconds",
        "From the first admission of a request to its end.",
        lambda r: r.recorder.inference,
    ),
    Family(
        "histogram",
        "vllm:request_prompt_tokens",
        "Prompt tokens of a request.",
        lambda r: r.recorder.prompt_tokens,
    ),
    Family(
        "histogram",
        "vllm:request_generation_tokens",
        "Output tokens of a branch.",
        lambda r: r.recorder.generation_tokens,
    ),
    Family(
        "histogram",
        "vllm:request_max_num_generation_tokens",
        "Output tokens of a request's longest branch.",
        lambda r: r.recorder.longest_output,
    ),
    Family(
        "histogram",
        "vllm:request_params_max_tokens",
        "Output tokens that a request might have had: what it asked for, or what fits.",
        lambda r: r.recorder.max_tokens,
    ),
    Family(
        "histogram",
        "vllm:request_params_n",
        "Choices that a request asked for.",
        lambda r: r.recorder.num_choices,
    ),
)
