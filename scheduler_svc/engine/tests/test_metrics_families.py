"""What the exported figures say, and that the table, the page and the endpoint agree."""

from __future__ import annotations

import pathlib
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from blockyard.engine.v1 import engine_pb2 as pb
from scheduler_svc.engine.metrics.exposition import Format, render
from scheduler_svc.engine.metrics.families import FAMILIES, exported_names
from scheduler_svc.engine.metrics.frontends import FrontendTotals, MetricsReportError
from scheduler_svc.engine.tests.metrics_source import SNAPSHOT, FakeSource
from scheduler_svc.telemetry import buckets

ROOT = pathlib.Path(__file__).parents[3]

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def values(source: FakeSource) -> Values:
    """Samples by name and own labels; the labels that all have are checked and left out."""
    found = {}
    body = (await render(source, Format.TEXT)).decode()
    for family in text_string_to_metric_families(body):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "tiny"
            assert labels.pop("engine") == "0"
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


def report(**fields: object) -> pb.FrontendMetrics:
    return pb.FrontendMetrics(**fields)  # type: ignore[arg-type]  # the test's own


# ---- reports of front ends


@pytest.mark.parametrize(
    ("increase", "problem"),
    [
        (pb.HistogramIncrease(counts=[1, 2]), "of 2 buckets, not 22"),
        (pb.HistogramIncrease(exemplars=[pb.Exemplar(bucket=22)]), "not there"),
    ],
)
def test_a_report_that_does_not_fit_changes_nothing(
    increase: pb.HistogramIncrease, problem: str
) -> None:
    totals = FrontendTotals()
    wrong = pb.FrontendMetrics(
        time_to_first_token=pb.HistogramIncrease(counts=[1] * 23, sum=1),
        e2e_latency=increase,
        num_tokens=5,
    )
    with pytest.raises(MetricsReportError, match=problem):
        totals.add(1, wrong)
    assert (totals.num_tokens, totals.time_to_first_token.sum, list(totals.connected)) == (0, 0, [])


async def test_reports_add_up_and_outlive_their_front_end() -> None:
    source = FakeSource()
    counts = [0] * (len(buckets.TIME_TO_FIRST_TOKEN) + 1)
    counts[3] = 2
    common = {
        "time_to_first_token": pb.HistogramIncrease(counts=counts, sum=0.03),
        "rpcs": [
            pb.RpcIncrease(method="Generate", code="OK", count=3),
            pb.RpcIncrease(
                method="Generate", code="RESOURCE_EXHAUSTED", reason="SLOW_READER", count=1
            ),
        ],
        "num_messages": 10,
        "num_tokens": 40,
        "cpu_seconds": 0.5,
        "resident_bytes": 100,
        "num_open_streams": 4,
    }
    source.frontends.add(1, report(**common, loop_lag_s=0.5, coalescing_interval_s=0.02))
    source.frontends.add(2, report(**common, loop_lag_s=0.1, coalescing_interval_s=0.05))
    both = await values(source)
    source.frontends.leave(1)
    one = await values(source)
    for found in (both, one):
        assert found["vllm:time_to_first_token_seconds_count", ()] == 4
        assert found["vllm:time_to_first_token_seconds_sum", ()] == pytest.approx(0.06)
        assert found["blockyard_stream_messages_total", ()] == 20
        assert found["blockyard_stream_tokens_total", ()] == 80
        assert found["blockyard_slow_readers_total", ()] == 2
        labels = (("code", "OK"), ("method", "Generate"), ("reason", ""))
        assert found["blockyard_rpcs_total", labels] == 6
        assert found["blockyard_process_cpu_seconds_total", (("process", "frontend"),)] == 1
    process = (("process", "frontend"),)
    for key, two, left in (
        (("blockyard_event_loop_lag_seconds", process), 0.5, 0.1),
        (("blockyard_coalescing_interval_seconds", ()), 0.05, 0.05),
        (("blockyard_process_resident_bytes", process), 200, 100),
        (("blockyard_open_streams", ()), 8, 4),
    ):
        assert (both[key], one[key]) == (two, left)


# ---- figures of the engine


async def test_names_that_others_read() -> None:
    found = {
        (name, labels): value
        for (name, labels), value in (await values(FakeSource())).items()
        if name.startswith("vllm:") and not re.search("_(bucket|sum|count)$", name)
    }
    expected: Values = {
        ("vllm:num_requests_running", ()): 5,
        ("vllm:num_requests_waiting", ()): 3,
        ("vllm:num_requests_waiting_by_reason", (("reason", "capacity"),)): 2,
        ("vllm:num_requests_waiting_by_reason", (("reason", "deferred"),)): 1,
        ("vllm:kv_cache_usage_perc", ()): 0.5,
        ("vllm:cache_config_info", (("block_size", "16"), ("num_gpu_blocks", "101"))): 1,
        (
            "vllm:lora_requests_info",
            (("max_lora", "0"), ("running_lora_adapters", ""), ("waiting_lora_adapters", "")),
        ): 1,
        ("vllm:prefix_cache_queries_total", ()): 1000,
        ("vllm:prefix_cache_hits_total", ()): 211,
        ("vllm:num_preemptions_total", ()): 207,
        ("vllm:prompt_tokens_total", ()): 111,
        ("vllm:prompt_tokens_cached_total", ()): 0,
        ("vllm:generation_tokens_total", ()): 2**53,
        **{
            ("vllm:request_success_total", (("finished_reason", reason),)): 0
            for reason in ("stop", "length", "abort", "error")
        },
    }
    assert found == expected


async def test_counters_and_gauges_of_our_own() -> None:
    found = await values(FakeSource(is_executor_ready=False))
    expected: Values = {
        ("blockyard_finished_requests_total", ()): 101,
        ("blockyard_expired_requests_total", ()): 114,
        ("blockyard_recoveries_total", ()): 102,
        ("blockyard_preemptions_total", (("kind", "recompute"),)): 103,
        ("blockyard_preemptions_total", (("kind", "swap"),)): 104,
        ("blockyard_prefix_cache_hit_tokens_total", (("pool", "device"),)): 105,
        ("blockyard_prefix_cache_hit_tokens_total", (("pool", "host"),)): 106,
        ("blockyard_evicted_blocks_total", ()): 107,
        ("blockyard_copied_blocks_total", ()): 108,
        ("blockyard_swapped_out_blocks_total", ()): 109,
        ("blockyard_swapped_in_blocks_total", ()): 110,
        ("blockyard_steps_total", ()): 113,
        ("blockyard_kv_slots_saved_by_sharing", ()): 64,
        ("blockyard_kv_waste_ratio", ()): 0.11,
        ("blockyard_waiting_prompt_tokens", ()): 96,
        ("blockyard_estimated_wait_seconds", ()): 1.5,
        ("blockyard_executor_ready", ()): 0,
        ("blockyard_frontends", ()): 2,
        ("blockyard_event_loop_lag_seconds", (("process", "engine"),)): 0.25,
        ("blockyard_event_loop_lag_seconds", (("process", "frontend"),)): 0,
        ("blockyard_process_cpu_seconds_total", (("process", "engine"),)): 1.5,
        ("blockyard_process_cpu_seconds_total", (("process", "executor"),)): 2.5,
        ("blockyard_process_resident_bytes", (("process", "engine"),)): 1000,
        ("blockyard_process_resident_bytes", (("process", "executor"),)): 2000,
    }
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("pool", ["device", "host"])
async def test_every_class_of_a_pool_is_there_and_they_sum_to_it(pool: str) -> None:
    shown = getattr(SNAPSHOT, pool)
    expected = {
        field.name.removeprefix("num_"): getattr(shown, field.name)
        for field in shown.DESCRIPTOR.fields
        if field.name not in ("num_slots", "num_saved_by_sharing")
    }
    found = {
        dict(labels)["class"]: value
        for (name, labels), value in (await values(FakeSource())).items()
        if name == "blockyard_kv_slots" and dict(labels)["pool"] == pool
    }
    assert found == expected
    assert sum(found.values()) == shown.num_slots


async def test_an_empty_pool_and_an_odd_model_name() -> None:
    body = (await render(FakeSource(pb.SnapshotResponse(), 'a "b"\\\nc'), Format.TEXT)).decode()
    families = list(text_string_to_metric_families(body))
    names = {sample.labels["model_name"] for family in families for sample in family.samples}
    assert names == {'a "b"\\\nc'}
    usage = next(f for f in families if f.name == "vllm:kv_cache_usage_perc")
    assert usage.samples[0].value == 0


# ---- the table


async def test_the_table_names_what_is_served() -> None:
    source = FakeSource()
    source.frontends.add(1, pb.FrontendMetrics(rpcs=[pb.RpcIncrease(method="m", count=1)]))
    found = await values(source)
    assert {name for name, _ in found} == exported_names()
    labels = {name: {key for key, _ in pairs} - {"le"} for name, pairs in found}
    for family in FAMILIES:
        for name in family.sample_names:
            assert labels[name] == set(family.labels), name


def test_the_page_lists_what_is_served() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    listed = re.findall(r"^\| `([a-z_:0-9]+)` \| (\w+)", page, re.MULTILINE)
    suffix = {"counter": "_total"}
    assert sorted(listed) == sorted(
        (family.name + suffix.get(family.type, ""), family.type) for family in FAMILIES
    )
