"""Is the GPU executor right on a real model? `python -m benchmarks.gpu_correctness --model MODEL`.

Beside transformers in bfloat16 on the same GPU: perplexity of running text by the runner alone,
and greedy text through the whole system in several modes, one of them while the executor is
killed. bfloat16 cannot be compared token for token: where an output leaves transformers', the two
tokens must be a near tie (see gpu_reference.py), and so must every token after it that is not
transformers' likeliest. Every part and mode survives the failure of another.

With --device cpu --quick it exercises itself without a GPU, in float32, without perplexity.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import uvloop
from tqdm import tqdm

from benchmarks import report
from benchmarks.correctness import NUM_OUTPUT_TOKENS
from benchmarks.gpu_modes import GpuMode, Served, gpu_modes, serve
from benchmarks.gpu_reference import Parting, Transformers
from benchmarks.hf_reference import Reference
from benchmarks.hf_worker import silence_transformers
from benchmarks.prompts import Prompt, few_prompts, varied_prompts
from benchmarks.report import Target
from blockyard.common import model_dir
from blockyard.models import store
from blockyard.models.errors import ModelImportError

_NAME: Final = "gpu_correctness"
_MODE_LIMIT_S: Final = {"cpu": 600.0, "cuda": 120.0}
_NUM_AT_ONCE: Final = {"cpu": 1, "cuda": 2}


@dataclass(slots=True)
class ModeResult:
    """One mode: what was served, and how it parts from the reference."""

    mode: GpuMode
    seconds: float = 0.0
    error: str = ""
    served: Served | None = None
    partings: list[Parting] = field(default_factory=list)

    @property
    def num_near_ties(self) -> int:
        """Outputs that part at one."""
        return sum(parting.is_near_tie for parting in self.partings)

    @property
    def num_others(self) -> int:
        """Outputs that part where there is no near tie."""
        return len(self.partings) - self.num_near_ties

    @property
    def num_far_tokens(self) -> int:
        """Tokens after a parting that are neither the likeliest nor a near tie with it."""
        return sum(parting.num_far_tokens for parting in self.partings)

    def targets(self) -> list[Target]:
        """Nothing wrong, and the mode did what it is for; NaN if it failed."""
        name = self.mode.name
        if self.served is None:
            return [Target(f"{name}: outputs", float("nan"), ">=", 1)]
        return [
            Target(f"{name}: other partings", self.num_others, "<=", 0),
            Target(f"{name}: far tokens after", self.num_far_tokens, "<=", 0),
            *(proof.target(name, self.served) for proof in self.mode.proofs),
        ]

    def document(self) -> dict[str, Any]:
        """JSON values."""
        found: dict[str, Any] = {"mode": self.mode.name, "seconds": round(self.seconds, 2)}
        if self.served is None:
            return found | {"error": self.error}
        return found | {
            "num_outputs": len(self.served.answers),
            "num_partings": len(self.partings),
            "num_near_ties": self.num_near_ties,
            "num_others": self.num_others,
            "num_far_tokens": self.num_far_tokens,
            "num_preemptions": self.served.num_preemptions,
            "num_kills": self.served.num_kills,
            "num_restarts": self.served.num_restarts,
            **asdict(self.served.evidence),
            "partings": [asdict(p) | {"is_near_tie": p.is_near_tie} for p in self.partings],
        }


class Judge:
    """Transformers' opinion of outputs, asked once for each."""

    def __init__(self, transformers: Transformers, found: Sequence[Reference]) -> None:
        """`found` are the references, in the order of the answers."""
        self._transformers = transformers
        self._found = found
        self._known: dict[tuple[str, tuple[int, ...]], Parting] = {}

    def judge(self, result: ModeResult) -> None:
        """Set and print the partings of a mode."""
        if result.served is None:
            return
        for reference, answer in zip(self._found, result.served.answers, strict=True):
            # Another number means that the two sides tokenise the prompt differently.
            assert answer.usage.prompt_tokens == len(reference.prompt_ids), reference.name
            assert len(answer.token_ids) == len(reference.output_ids), reference.name
            if list(answer.token_ids) != reference.output_ids:
                result.partings.append(self._parting(reference, answer.token_ids))
                _print_parting(result.mode.name, result.partings[-1])

    def _parting(self, reference: Reference, output_ids: tuple[int, ...]) -> Parting:
        key = reference.name, output_ids
        if key not in self._known:
            self._known[key] = self._transformers.judge(reference, list(output_ids))
        return self._known[key]


def _print_parting(mode: str, parting: Parting) -> None:
    kind = "near tie" if parting.is_near_tie else "OTHER"
    far = f"; {parting.num_far_tokens} FAR tokens after" if parting.num_far_tokens else ""
    print(
        f"{kind}: {mode}, {parting.prompt}, output token {parting.position}: "
        f"{parting.expected_id} expected, {parting.got_id} came; float32 logits differ by "
        f"{parting.gap:.3g}, bfloat16 is off by up to {parting.noise:.3g}{far}",
        flush=True,
    )


async def run_mode(mode: GpuMode, prompts: Sequence[Prompt], limit_s: float) -> ModeResult:
    """Serve in one mode; whatever is raised is recorded, since the other modes go on."""
    result, begin = ModeResult(mode), time.monotonic()
    try:
        result.served = await asyncio.wait_for(serve(mode, prompts), limit_s)
    except Exception as error:  # noqa: BLE001 - the edge of one mode
        result.error = f"{type(error).__name__}: {error}"
    result.seconds = time.monotonic() - begin
    said = f"FAILED: {result.error}" if result.error else "served"
    print(f"{mode.name}: {said} after {result.seconds:.1f} s", flush=True)
    return result


async def greedy_text(
    flags: argparse.Namespace, model_path: Path, transformers: Transformers
) -> list[ModeResult]:
    """All modes, a few at once, while transformers answers the same prompts; then the judgement."""
    prompts = (few_prompts if flags.quick else varied_prompts)(model_path)
    lengths = [len(ids) for ids in transformers.tokenize(prompts)]
    places = asyncio.Semaphore(flags.parallel or _NUM_AT_ONCE[flags.device])

    async def run(mode: GpuMode) -> ModeResult:
        async with places:
            return await run_mode(mode, prompts, _MODE_LIMIT_S[flags.device])

    def references() -> list[Reference]:
        with tqdm(total=len(prompts), desc="transformers") as progress:
            return transformers.references(prompts, NUM_OUTPUT_TOKENS, progress.update)

    modes = gpu_modes(model_dir.load(model_path), flags.device, lengths)
    answering = asyncio.create_task(asyncio.to_thread(references))
    results = await asyncio.gather(*(run(mode) for mode in modes))
    judge = Judge(transformers, await answering)
    for result in results:
        judge.judge(result)
    return results


def _row(result: ModeResult, served: Served) -> tuple[object, ...]:
    return (
        *(result.mode.name, len(served.answers), len(result.partings), result.num_near_ties),
        *(result.num_others, result.num_far_tokens, served.num_preemptions),
        *(served.evidence.num_swapped_out, served.num_restarts, served.evidence.num_steps),
        result.seconds,
    )


def print_modes(results: Sequence[ModeResult]) -> None:
    """One row for each that was served."""
    rows = [_row(result, result.served) for result in results if result.served is not None]
    headers = (
        *("mode", "outputs", "parted", "near ties", "others", "far after"),
        *("preempted", "swapped", "restarts", "steps", "seconds"),
    )
    report.print_table(f"{NUM_OUTPUT_TOKENS} greedy tokens each", headers, rows)


class Run:
    """Results and targets of the parts so far."""

    def __init__(self, flags: argparse.Namespace, model_path: Path) -> None:
        self._flags = flags
        self._model_path = model_path
        self.results: dict[str, Any] = {
            "model": model_path.name,
            "device": _device(flags.device),
            "num_output_tokens": NUM_OUTPUT_TOKENS,
        }
        self.targets: list[Target] = []
        self.has_failed = False

    def parts(self, transformers: Transformers) -> None:
        """Both of them; one that fails is told of."""
        parts = (self._perplexity, self._greedy_text)
        for part in parts[self._flags.device == "cpu" :]:
            try:
                part(transformers)
            except Exception:  # noqa: BLE001 - the other part is worth its device time
                traceback.print_exc()
                self.has_failed = True

    def _perplexity(self, transformers: Transformers) -> None:
        from benchmarks import gpu_perplexity  # needs a GPU's libraries

        found, targets = gpu_perplexity.measure(self._model_path, transformers)
        self.results["perplexity"] = found
        self.targets += targets
        torch.cuda.empty_cache()

    def _greedy_text(self, transformers: Transformers) -> None:
        modes = uvloop.run(greedy_text(self._flags, self._model_path, transformers))
        print_modes(modes)
        self.results["modes"] = [result.document() for result in modes]
        self.targets += [target for result in modes for target in result.targets()]
        self.has_failed |= any(result.error for result in modes)

    def write(self) -> None:
        """To --output or, unless --quick was given, among the benchmarks' results."""
        folder: Path | None = self._flags.output
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            document = report.document(_NAME, self.results, self.targets)
            path = folder / f"{_NAME}.json"
            path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        elif not self._flags.quick:
            report.write(_NAME, self.results, self.targets)


def _device(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"name": "cpu", "dtype": "float32"}
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "num_sms": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "cuda": torch.version.cuda,
        "dtype": "bfloat16",
    }


def _flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{_NAME}", description=__doc__)
    add = parser.add_argument
    add("--model", default=store.DEFAULT_MODEL, help="stored name, directory or .gguf file")
    add("--output", type=Path, help="folder for the JSON; default: benchmarks/results")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--quick", action="store_true", help="eight prompts; without --output nothing is written")
    add("--parallel", type=int, help="modes served at once")
    return parser.parse_args()


def main() -> int:
    """Run both parts, print, write; exit codes as in benchmarks/__init__.py, 2 if a part failed."""
    flags = _flags()
    if flags.device == "cuda" and not torch.cuda.is_available():
        print("cannot run: torch sees no GPU", file=sys.stderr)
        return 2
    begin = time.monotonic()
    silence_transformers()
    try:
        model_path = store.resolve(flags.model)
    except ModelImportError as error:
        print(f"cannot run: {error}", file=sys.stderr)
        return 2
    run = Run(flags, model_path)
    run.parts(Transformers(model_path, flags.device))
    run.results["seconds"] = round(time.monotonic() - begin, 1)
    are_met = report.print_targets(run.targets)
    run.write()
    print(f"{run.results['seconds']:.0f} s in all")
    return 2 if run.has_failed else 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())
