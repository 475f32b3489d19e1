"""The command lines of a local server's processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from blockyard.launcher.child import ChildSpec
from blockyard.launcher.config import ServeSettings
from blockyard.launcher.run_dir import service_address

_SERVICE_GRACE_S: Final = 10.0
_FRONTEND_MARGIN_S: Final = 10.0
"""Beyond the time that a front end gives its streams."""


def service_specs(settings: ServeSettings, model_path: Path, run_dir: Path) -> list[ChildSpec]:
    """Executor and engine, in the order they are started."""
    executor, engine = (service_address(run_dir, name) for name in ("executor", "engine"))
    limits = _given(
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
    )
    executor_flags = [
        *("--listen", executor, "--model-dir", str(model_path)),
        *("--block-size", str(settings.block_size)),
        *_given(
            device=None if settings.device == "auto" else settings.device,
            load_format=None if settings.load_format == "auto" else settings.load_format,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            kv_memory=settings.kv_memory,
            max_rows=settings.max_num_seqs,
            num_threads=settings.num_threads,
            host_memory=settings.host_memory,
        ),
        *limits,
        *_common(settings),
    ]
    engine_flags = [
        *("--listen", engine, "--executor", executor, "--window", str(settings.window)),
        *_given(
            max_num_seqs=settings.max_num_seqs,
            metrics_address=settings.metrics_address or None,
            plan_log=settings.plan_log,
            preemption=settings.preemption,
        ),
        *("--model-dir", str(model_path)),
        *(() if settings.prefix_cache else ("--no-prefix-cache",)),
        *limits,
        *_tracing(settings),
        *_common(settings),
    ]
    return [
        _spec("executor", "executor_svc", executor_flags, _SERVICE_GRACE_S),
        _spec("engine", "scheduler_svc.engine", engine_flags, _SERVICE_GRACE_S),
    ]


def frontend_spec(
    settings: ServeSettings, model_path: Path, run_dir: Path, address: str, admin: str, index: int
) -> ChildSpec:
    """Front end number `index`, on the public `address`; `admin` is its own."""
    flags = [
        *("--engine", service_address(run_dir, "engine"), "--listen", address),
        # Also if there is one: while it is replaced there are two.
        *("--reuse-port", "--admin", admin, "--model-dir", str(model_path)),
        *_given(
            lame_duck_s=settings.lame_duck_s,
            drain_grace_s=settings.drain_grace_s,
            max_connection_age_s=settings.max_connection_age_s,
            tls_cert=settings.tls_cert,
            tls_key=settings.tls_key,
            tls_client_ca=settings.tls_client_ca,
            auth_tokens=settings.auth_tokens,
            max_client_streams=settings.max_client_streams,
            max_prompt_tokens=settings.max_prompt_tokens,
        ),
        *_tracing(settings),
        *_common(settings),
    ]
    name = "frontend" if settings.frontends == 1 else f"frontend-{index}"
    grace_s = settings.lame_duck_s + settings.drain_grace_s + _FRONTEND_MARGIN_S
    return _spec(name, "scheduler_svc.frontend", flags, grace_s)


def _common(settings: ServeSettings) -> list[str]:
    return [
        "--exit-with-parent",
        *(("--log-contents",) if settings.log_contents else ()),
        *("--log-format", settings.log_format),
        *("--log-level", settings.log_level),
    ]


def _tracing(settings: ServeSettings) -> list[str]:
    return _given(
        otlp_endpoint=settings.otlp_endpoint or None,
        trace_sample_ratio=settings.trace_sample_ratio,
    )


def _given(**values: float | str | Path | None) -> list[str]:
    """Flags for what is set."""
    flags = []
    for name, value in values.items():
        if value is not None:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def _spec(name: str, module: str, flags: list[str], grace_s: float) -> ChildSpec:
    return ChildSpec(name, (sys.executable, "-m", module, *flags), grace_s)
