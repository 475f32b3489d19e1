"""Metrics that only Blockyard has: memory by class, what a step costs, front ends, processes."""

from __future__ import annotations

from typing import Final

from scheduler_svc.engine.metrics.family import Family, Values
from scheduler_svc.engine.metrics.reading import Reading


def _slots(reading: Reading) -> Values:
    device, host = reading.snapshot.device, reading.snapshot.host
    return {
        ("device", "stored"): device.num_stored,
        ("device", "in_flight"): device.num_in_flight,
        ("device", "unused"): device.num_unused,
        ("device", "cached"): device.num_cached,
        ("device", "free"): device.num_free,
        ("device", "padding"): device.num_padding,
        ("host", "swapped"): host.num_swapped,
        ("host", "cached"): host.num_cached,
        ("host", "free"): host.num_free,
    }


def _waste(reading: Reading) -> float:
    device = reading.snapshot.device
    held = device.num_stored + device.num_in_flight + device.num_unused
    return device.num_unused / held if held else 0.0


def _hits(reading: Reading) -> Values:
    counters = reading.snapshot.counters
    return {
        ("device",): counters.num_hit_tokens_device,
        ("host",): counters.num_hit_tokens_host,
    }


def _preemptions(reading: Reading) -> Values:
    counters = reading.snapshot.counters
    return {
        ("recompute",): counters.num_preemptions_by_recompute,
        ("swap",): counters.num_preemptions_by_swap,
    }


def _device_seconds(reading: Reading) -> Values:
    return {(phase,): ns / 1e9 for phase, ns in reading.recorder.device_ns.items()}


def _loop_lag(reading: Reading) -> Values:
    frontends = (report.loop_lag_s for report in reading.frontends.connected)
    return {
        ("engine",): reading.engine_loop_lag_s,
        ("frontend",): max(frontends, default=0.0),
    }


def _cpu_seconds(reading: Reading) -> Values:
    return {
        ("engine",): reading.engine_usage.cpu_s,
        ("frontend",): reading.frontends.cpu_seconds,
        ("executor",): reading.executor_usage.cpu_s,
    }


def _resident_bytes(reading: Reading) -> Values:
    return {
        ("engine",): reading.engine_usage.resident_bytes,
        ("frontend",): sum(report.resident_bytes for report in reading.frontends.connected),
        ("executor",): reading.executor_usage.resident_bytes,
    }


_MEMORY: Final = (
    Family(
        "gauge",
        "blockyard_kv_slots",
        "Token slots by class; the classes of a pool sum to the pool.",
        _slots,
        ("pool", "class"),
    ),
    Family(
        "gauge",
        "blockyard_kv_slots_saved_by_sharing",
        "Device slots that sharing saves: referenced minus distinct.",
        lambda r: r.snapshot.device.num_saved_by_sharing,
    ),
    Family(
        "gauge",
        "blockyard_kv_waste_ratio",
        "Share of held slots that hold nothing and wait for nothing under way, 0 to 1.",
        _waste,
    ),
    Family(
        "counter",
        "blockyard_prefix_cache_hit_tokens",
        "Prefix cache hits by the pool that had the tokens.",
        _hits,
        ("pool",),
    ),
    Family(
        "counter",
        "blockyard_preemptions",
        "Branches preempted, by what becomes of their blocks.",
        _preemptions,
        ("kind",),
    ),
    Family(
        "counter",
        "blockyard_swapped_out_blocks",
        "Blocks moved from the device to the host.",
        lambda r: r.snapshot.counters.num_swapped_out,
    ),
    Family(
        "counter",
        "blockyard_swapped_in_blocks",
        "Blocks moved from the host to the device.",
        lambda r: r.snapshot.counters.num_swapped_in,
    ),
    Family(
        "counter",
        "blockyard_swap_seconds",
        "Time that steps with swaps took to move blocks.",
        lambda r: r.recorder.swap_ns / 1e9,
    ),
    Family(
        "counter",
        "blockyard_recomputed_tokens",
        "Tokens computed again after a preemption or the loss of an executor.",
        lambda r: r.recorder.num_recomputed_tokens,
    ),
    Family(
        "counter",
        "blockyard_recompute_seconds",
        "Forward time of steps, in proportion to their recomputed tokens.",
        lambda r: r.recorder.recompute_ns / 1e9,
    ),
    Family(
        "counter",
        "blockyard_copied_blocks",
        "Partial blocks copied so that branches could part.",
        lambda r: r.snapshot.counters.num_copied,
    ),
    Family(
        "counter",
        "blockyard_evicted_blocks",
        "Cached blocks given up for new ones.",
        lambda r: r.snapshot.counters.num_evicted,
    ),
)

_REQUESTS: Final = (
    Family(
        "gauge",
        "blockyard_waiting_prompt_tokens",
        "Prompts of requests that have not run yet.",
        lambda r: r.snapshot.num_waiting_tokens,
    ),
    Family(
        "gauge",
        "blockyard_estimated_wait_seconds",
        "How long a request queued now would wait; 0 while that is not known.",
        lambda r: r.snapshot.estimated_wait_ns / 1e9,
    ),
    Family(
        "counter",
        "blockyard_finished_requests",
        "Requests that ended, for whatever reason.",
        lambda r: r.snapshot.counters.num_finished,
    ),
    Family(
        "counter",
        "blockyard_expired_requests",
        "Requests dropped before their prefill, for their deadline.",
        lambda r: r.snapshot.counters.num_expired,
    ),
    Family(
        "counter",
        "blockyard_rpcs",
        "Calls of the public API that ended, by status and reason of the error.",
        lambda r: r.frontends.rpcs,
        ("method", "code", "reason"),
    ),
    Family(
        "counter",
        "blockyard_slow_readers",
        "Streams ended because their client read too slowly.",
        lambda r: r.frontends.num_slow_readers,
    ),
    Family(
        "gauge",
        "blockyard_open_streams",
        "Calls of the public API under way.",
        lambda r: sum(report.num_open_streams for report in r.frontends.connected),
    ),
    Family(
        "counter",
        "blockyard_stream_messages",
        "Messages sent to clients of streams.",
        lambda r: r.frontends.num_messages,
    ),
    Family(
        "counter",
        "blockyard_stream_tokens",
        "Tokens in them; more than one each are merged ones.",
        lambda r: r.frontends.num_tokens,
    ),
    Family(
        "gauge",
        "blockyard_coalescing_interval_seconds",
        "How long the busiest front end merges tokens before it sends them; 0: not at all.",
        lambda r: max((each.coalescing_interval_s for each in r.frontends.connected), default=0.0),
    ),
)

_STEPS: Final = (
    Family(
        "counter",
        "blockyard_steps",
        "Steps planned and sent.",
        lambda r: r.snapshot.counters.num_steps,
    ),
    Family(
        "histogram",
        "blockyard_step_plan_seconds",
        "Deciding a step.",
        lambda r: r.recorder.plan,
    ),
    Family(
        "histogram",
        "blockyard_step_encode_seconds",
        "Encoding a plan.",
        lambda r: r.recorder.encode,
    ),
    Family(
        "histogram",
        "blockyard_step_commit_seconds",
        "Decoding and committing the result of a step.",
        lambda r: r.recorder.commit,
    ),
    Family(
        "histogram",
        "blockyard_window_bubble_seconds",
        "The device's idle time before a step, while there was work.",
        lambda r: r.recorder.window_bubble,
    ),
    Family(
        "counter",
        "blockyard_device_seconds",
        "What the device's time went to; idle is any time without a step.",
        _device_seconds,
        ("phase",),
    ),
    Family(
        "counter",
        "blockyard_step_apply_seconds",
        "The executor's checking and applying of plans.",
        lambda r: r.recorder.apply_ns / 1e9,
    ),
    Family(
        "gauge",
        "blockyard_executor_ready",
        "1 while the executor takes plans, else 0.",
        lambda r: r.is_executor_ready,
    ),
    Family(
        "counter",
        "blockyard_recoveries",
        "Executor epochs after the first.",
        lambda r: r.snapshot.counters.num_recoveries,
    ),
)

_PROCESSES: Final = (
    Family(
        "gauge",
        "blockyard_frontends",
        "Front ends connected.",
        lambda r: r.num_frontends,
    ),
    Family(
        "gauge",
        "blockyard_event_loop_lag_seconds",
        "How late the event loop runs: the engine's, and the latest one of a front end.",
        _loop_lag,
        ("process",),
    ),
    Family(
        "counter",
        "blockyard_process_cpu_seconds",
        "CPU time; of all front ends together.",
        _cpu_seconds,
        ("process",),
    ),
    Family(
        "gauge",
        "blockyard_process_resident_bytes",
        "Resident memory; of all front ends together.",
        _resident_bytes,
        ("process",),
    ),
)

OWN_FAMILIES: Final = (*_MEMORY, *_REQUESTS, *_STEPS, *_PROCESSES)
