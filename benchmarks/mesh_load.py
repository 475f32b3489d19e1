"""What one front-end process streams: `python -m benchmarks.mesh_load`.

256 streams of a simulated executor, every token a message of its own (`--max-merge-ms 0`), then
merged as the front end sees fit; each read by the Python client and by h2load. Then 1,000 streams
for a minute, each compared with a reference that knows no KV blocks.
"""

from __future__ import annotations

import argparse
import asyncio
import pathlib
import re
import resource
import struct
import sys
import time
from dataclasses import asdict, dataclass
from typing import Final

import uvloop

from benchmarks import report
from benchmarks.bench_streams import run_stream
from benchmarks.load_system import VOCAB_SIZE, LoadSystem, load_system
from benchmarks.processes import ProcessError
from benchmarks.report import Target
from benchmarks.workloads import Work, equal
from blockyard.client import AsyncClient, BlockyardError
from blockyard.v1 import generate_pb2 as pb
from integration_tests.mesh.tools import H2LOAD, ToolUnavailableError, find
from integration_tests.reference import reference_output

NUM_STREAMS: Final = 256
MANY_STREAMS: Final = 1000
MANY_S: Final = 60.0
MIN_MESSAGES_PER_S: Final = 8_000
MIN_TOKENS_PER_S: Final = 40_000

_PROMPT_TOKENS: Final = 16
_MESSAGE_STEP_MS: Final = 20.0
"""12,800 tokens/s: more than what is asked for, so that the front end is the limit."""
_TOKEN_STEP_MS: Final = 4.0
_MANY_STEP_MS: Final = 100.0
_REQUEST_ID: Final = "load"
_MESSAGE_BYTES: Final = 5 + (2 + len(_REQUEST_ID)) + 2
"""Of a message without its tokens: gRPC's prefix, the request's id, tag and length of the ids."""
_LAST_BYTES: Final = 80
"""At most: finish reason, usage and trailers' share of a stream's end."""


@dataclass(frozen=True, slots=True)
class Rate:
    """One load of NUM_STREAMS streams, from the first request to the last token."""

    duration_s: float
    num_tokens: int
    num_messages: int  # with h2load: at least so many, from the bytes that it counted
    frontend_cpu_s: float
    client_cpu_s: float

    @property
    def messages_per_s(self) -> float:
        """Of the front-end process."""
        return self.num_messages / self.duration_s

    @property
    def tokens_per_s(self) -> float:
        """Of the front-end process."""
        return self.num_tokens / self.duration_s

    @property
    def cpu_us_per_message(self) -> float:
        """CPU time of the front end."""
        return self.frontend_cpu_s / self.num_messages * 1e6

    @property
    def client_cpu_us_per_message(self) -> float:
        """CPU time of the client, which has the machine's cores to share with the front end."""
        return self.client_cpu_s / self.num_messages * 1e6


def works(num_streams: int, num_tokens: int) -> list[Work]:
    """Equally long requests."""
    return equal(
        num_streams, VOCAB_SIZE, num_prompt_tokens=_PROMPT_TOKENS, num_output_tokens=num_tokens
    )


async def load_python(system: LoadSystem, num_tokens: int) -> Rate:
    """Streams of one Python client."""
    begin_s, begin_cpu_s = time.monotonic(), system.frontend_cpu_s
    begin_client_s = time.process_time()
    async with AsyncClient(system.address, timeout=300) as client:
        each = works(NUM_STREAMS, num_tokens)
        streams = await asyncio.gather(*(run_stream(client, work) for work in each))
    duration_s = time.monotonic() - begin_s
    assert all(len(stream.token_ids) == num_tokens for stream in streams), "tokens were lost"
    num_messages = sum(stream.num_messages for stream in streams)
    cpu_s, client_cpu_s = system.frontend_cpu_s - begin_cpu_s, time.process_time() - begin_client_s
    return Rate(duration_s, NUM_STREAMS * num_tokens, num_messages, cpu_s, client_cpu_s)


async def load_h2load(system: LoadSystem, program: pathlib.Path, num_tokens: int) -> Rate:
    """The same streams for a client written in C. Raises ProcessError."""
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=range(100, 100 + _PROMPT_TOKENS)),
        stop=pb.StopConditions(max_tokens=num_tokens, ignore_eos=True),
        sampling=pb.SamplingParams(temperature=0, seed=1),
        request_id=_REQUEST_ID,
        skip_text=True,
    ).SerializeToString()
    path = system.children.run_dir / "request"
    path.write_bytes(b"\0" + struct.pack(">I", len(request)) + request)
    socket = system.address.removeprefix("unix:")
    command = [str(program), f"--base-uri=unix:{socket}", "-n", str(NUM_STREAMS), "-c", "1"]
    command += ["-m", str(NUM_STREAMS), "-d", str(path), "-H", "content-type: application/grpc"]
    command += ["-H", "te: trailers", "http://front/blockyard.v1.GenerateService/Generate"]
    begin_s, begin_cpu_s = time.monotonic(), system.frontend_cpu_s
    begin_client_s = _children_cpu_s()
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output = (await process.communicate())[0].decode()
    duration_s, cpu_s = time.monotonic() - begin_s, system.frontend_cpu_s - begin_cpu_s
    done = re.search(r"(\d+) succeeded", output)
    sent = re.search(r"headers \(.*\), (?:[\d.]+\w+) \((\d+)\) data", output)
    if done is None or sent is None or int(done[1]) != NUM_STREAMS:
        raise ProcessError(f"h2load did not get through:\n{output}")
    num_messages = _num_messages(int(sent[1]), num_tokens)
    client_cpu_s = _children_cpu_s() - begin_client_s
    return Rate(duration_s, NUM_STREAMS * num_tokens, num_messages, cpu_s, client_cpu_s)


def _children_cpu_s() -> float:
    """CPU time of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _num_messages(num_bytes: int, num_tokens: int) -> int:
    """Fewest messages that so many bytes of DATA can be."""
    # An id under 128 takes one byte, others two; two is the most here, so this is a lower bound.
    without_tokens = num_bytes - NUM_STREAMS * (2 * num_tokens + _LAST_BYTES)
    return max(0, without_tokens // _MESSAGE_BYTES)


async def rates(
    step_ms: float, num_tokens: int, program: pathlib.Path, *flags: str
) -> dict[str, Rate]:
    """Both clients on a fresh system whose tokens are not checked, the faster way to have many."""
    async with load_system(
        num_rows=NUM_STREAMS,
        step_ms=step_ms,
        executor_flags=["--no-check-content"],
        frontend_flags=flags,
    ) as system:
        return {
            "python": await load_python(system, num_tokens),
            "h2load": await load_h2load(system, program, num_tokens),
        }


async def many_streams(num_streams: int, duration_s: float) -> dict[str, float]:
    """Streams that last so long, all at once; how many differ from the reference."""
    num_tokens = int(duration_s / (_MANY_STEP_MS / 1e3))
    each = works(num_streams, num_tokens)
    async with load_system(num_rows=num_streams, step_ms=_MANY_STEP_MS) as system:
        begin_s, begin_cpu_s = time.monotonic(), system.frontend_cpu_s
        async with AsyncClient(system.address, timeout=600) as client:
            streams = await asyncio.gather(*(run_stream(client, work) for work in each))
        elapsed_s, cpu_s = time.monotonic() - begin_s, system.frontend_cpu_s - begin_cpu_s
    first_s = max(stream.arrivals_s[0] for stream in streams)
    together_s = min(stream.arrivals_s[-1] for stream in streams) - first_s
    wrong = sum(
        stream.token_ids != reference_output(work.token_ids, num_tokens, VOCAB_SIZE)
        for stream, work in zip(streams, each, strict=True)
    )
    return {
        "num_streams": num_streams,
        "num_tokens_each": num_tokens,
        "num_wrong": wrong,
        "elapsed_s": elapsed_s,
        "together_s": together_s,
        "frontend_cores": cpu_s / elapsed_s,
        "num_messages": sum(stream.num_messages for stream in streams),
    }


def print_rates(rates: dict[str, dict[str, Rate]]) -> None:
    """The table."""
    rows = [
        (
            f"{case}, {client}",
            r.messages_per_s,
            r.tokens_per_s,
            r.cpu_us_per_message,
            r.client_cpu_us_per_message,
        )
        for case, by_client in rates.items()
        for client, r in by_client.items()
    ]
    headers = ("", "messages/s", "tokens/s", "front end us/message", "client us/message")
    report.print_table(f"{NUM_STREAMS} streams, one front-end process", headers, rows)


def targets(rates: dict[str, dict[str, Rate]], many: dict[str, float]) -> list[Target]:
    """What is asked for."""
    reached = []
    for client in ("python", "h2load"):
        messages = rates["not merged"][client].messages_per_s
        tokens = rates["merged"][client].tokens_per_s
        name = f"messages/s, not merged, {client}"
        reached.append(Target(name, messages, ">=", MIN_MESSAGES_PER_S, "/s"))
        reached.append(Target(f"tokens/s, merged, {client}", tokens, ">=", MIN_TOKENS_PER_S, "/s"))
    return [
        *reached,
        Target("streams at once", many["num_streams"], ">=", MANY_STREAMS),
        Target("time for which all of them ran", many["together_s"], ">=", MANY_S * 0.95, "s"),
        Target("streams that differ from the reference", many["num_wrong"], "<=", 0),
    ]


async def measure(program: pathlib.Path) -> tuple[dict[str, dict[str, Rate]], dict[str, float]]:
    """All of it."""
    print("not merged", flush=True)
    not_merged = await rates(_MESSAGE_STEP_MS, 500, program, "--max-merge-ms", "0")
    print("merged", flush=True)
    merged = await rates(_TOKEN_STEP_MS, 2000, program)
    print(f"{MANY_STREAMS} streams", flush=True)
    many = await many_streams(MANY_STREAMS, MANY_S)
    return {"not merged": not_merged, "merged": merged}, many


def main() -> int:
    """Measure, print, write results/mesh_load.json; exit codes as in benchmarks/__init__.py."""
    argparse.ArgumentParser(prog="python -m benchmarks.mesh_load", description=__doc__).parse_args()
    try:
        measured, many = uvloop.run(measure(find(H2LOAD)))
    except (ProcessError, BlockyardError, ToolUnavailableError) as error:
        print(f"cannot run: {error}", file=sys.stderr)
        return 2
    print_rates(measured)
    report.print_table("Many streams", tuple(many), [tuple(many.values())])
    reached = targets(measured, many)
    are_met = report.print_targets(reached)
    results = {
        "step_ms": {"not merged": _MESSAGE_STEP_MS, "merged": _TOKEN_STEP_MS},
        "rates": {
            case: {
                client: {
                    **asdict(rate),
                    "messages_per_s": rate.messages_per_s,
                    "tokens_per_s": rate.tokens_per_s,
                    "cpu_us_per_message": rate.cpu_us_per_message,
                    "client_cpu_us_per_message": rate.client_cpu_us_per_message,
                }
                for client, rate in by_client.items()
            }
            for case, by_client in measured.items()
        },
        "many_streams": many,
    }
    report.write("mesh_load", results, reached)
    return 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())
