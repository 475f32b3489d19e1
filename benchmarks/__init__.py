"""Workloads, peers and measurements. Each command prints a table and writes results/NAME.json.

    python -m benchmarks.bench_control    what scheduling and the wire cost; no model
    python -m benchmarks.bench_streams    256 streams through the front end; no model
    python -m benchmarks.mesh_load        what one front-end process streams, to two kinds of client
    python -m benchmarks.soak             memory under refusals and over 200,000 requests
    python -m benchmarks.tracing_cost     CPU time of tracing and metrics, by step and by request
    python -m benchmarks.hostile_input    100,000 malformed requests and connections
    python -m benchmarks.bench_cpu        the whole system beside transformers, on this CPU
    python -m benchmarks.gpu_kernels      the GPU kernels against their device's memory
    python -m benchmarks.gpu_session      the whole system on a GPU beside vLLM and transformers
    python -m benchmarks.correctness      greedy output, token for token, against transformers
    python -m benchmarks.gpu_correctness  perplexity and greedy output on a GPU, near ties judged
    python -m benchmarks.beam_equality    beam searches and their scores, against transformers
    python -m benchmarks.simulate_waste   KV held and not used, by policy; simulated, as are:
    python -m benchmarks.simulate_prefix, simulate_oversubscription, simulate_overload,
        simulate_speed

Exit codes: 0 all targets met, 1 one missed, 2 it could not run.
"""
