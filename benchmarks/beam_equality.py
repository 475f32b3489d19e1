"""Beam search of the whole system against transformers': `python -m benchmarks.beam_equality`.

Every search goes through front end, engine and executor beside others, and all its hypotheses must
come out token for token, and with the scores, that transformers' float32 `generate` has for the
prompt alone. Float32 sums depend on their order, so two continuations may tie. A difference counts
as a tie only if transformers itself gives our output once log-probabilities at close choices are
changed, each by less than ten times what its logits differ between batch 1 and batch 32.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import uvloop
from tqdm import tqdm

from benchmarks import report
from benchmarks.hf_peer import HfPeer, PeerError, hf_peer
from benchmarks.hf_reference import noise, references
from benchmarks.prompts import Prompt, varied_prompts
from benchmarks.report import LOCAL_DIR, Target
from blockyard.bench.environment import versions
from blockyard.client import AsyncClient, BlockyardError
from blockyard.client.request import EarlyStopping
from blockyard.common import model_dir
from blockyard.launcher.child import ServeError
from blockyard.launcher.config import ServeSettings
from blockyard.launcher.server import LocalServer
from blockyard.models import store
from blockyard.models.errors import ModelImportError

NUM_OUTPUT_TOKENS: Final = 48
MAX_SCORE_DIFFERENCE: Final = 1e-3
MAX_TIED_SHARE: Final = 0.05
_TIE_FACTOR: Final = 10
_MAX_NUDGES: Final = 3
_MAX_RERUNS: Final = 16
_NUM_THREADS: Final = 2
_NUM_HF_THREADS: Final = 1
"""More wait for each other on a machine that does anything else: ten times slower."""
_NUM_CONCURRENT: Final = 6
_TIMEOUT_S: Final = 600.0
_NUM_NOISE_PROMPTS: Final = 32
_KINDS: Final = {"chat": 14, "digits": 5, "code": 6, "language": 8, "length": 7}
"""How many prompts of each kind: chats first, for they end by themselves."""

EARLY_STOPPING: Final[dict[EarlyStopping, bool | str]] = {
    "heuristic": False,
    "at_width": True,
    "never": "never",
}
"""By our names, transformers' own."""


@dataclass(frozen=True, slots=True)
class Case:
    """One beam search: a prompt and how it is searched."""

    prompt: str
    token_ids: list[int]
    width: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = "heuristic"

    @property
    def setting(self) -> str:
        """For people."""
        text = f"width {self.width}, penalty {self.length_penalty:g}"
        return f"{text}, {self.early_stopping.replace('_', ' ')}"

    @property
    def options(self) -> dict[str, Any]:
        """For `generate`."""
        return {
            "num_beams": self.width,
            "length_penalty": self.length_penalty,
            "early_stopping": EARLY_STOPPING[self.early_stopping],
            "max_new_tokens": NUM_OUTPUT_TOKENS,
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """All hypotheses of a search, best first."""

    sequences: list[list[int]]
    scores: list[float]


@dataclass(slots=True)
class Difference:
    """A search that came out otherwise."""

    setting: str
    prompt: str
    choice: int  # the first that differs
    expected: list[int]
    got: list[int]
    score_difference: float  # of these two
    changes: list[float] | None = None  # of log-probabilities that make it a tie


def cases(model_path: Path, token_ids: dict[str, list[int]], is_quick: bool) -> list[Case]:
    """All searches: 40 prompts at three widths, ten of them in six more settings."""
    names = [prompt.name for prompt in chosen_prompts(model_path)]
    if is_quick:
        return [
            Case(name, token_ids[name], 4, length_penalty, early_stopping)
            for name, length_penalty, early_stopping in zip(
                names[::12], (1.0, 0.6, 2.0, 1.0), itertools.cycle(EARLY_STOPPING), strict=False
            )
        ]
    settings = itertools.product((0.6, 2.0), EARLY_STOPPING)
    return [
        *(Case(name, token_ids[name], width) for width in (2, 4, 8) for name in names),
        *(Case(name, token_ids[name], 4, *setting) for setting in settings for name in names[:10]),
    ]


def chosen_prompts(model_path: Path) -> list[Prompt]:
    """40 prompts of all kinds, no long ones."""
    left = Counter(_KINDS)
    chosen = []
    for prompt in varied_prompts(model_path):
        kind = prompt.name.partition("/")[0]
        if left[kind]:
            left[kind] -= 1
            chosen.append(prompt)
    assert not left.total(), "a kind has fewer prompts than it had"
    return sorted(chosen, key=lambda prompt: list(_KINDS).index(prompt.name.partition("/")[0]))


async def expected_answers(
    peer: HfPeer, searches: Sequence[Case], model_digest: str
) -> list[Answer]:
    """What transformers finds, one search at a time; kept in local/."""
    libraries = {name: versions()[name] for name in ("torch", "transformers")}
    found = []
    for case in tqdm(searches, desc="transformers"):
        key = json.dumps([model_digest, case.token_ids, case.options, libraries])
        path = LOCAL_DIR / f"hf-beams-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if not path.exists():
            answer = await peer.beams(case.token_ids, case.options)
            LOCAL_DIR.mkdir(exist_ok=True)
            path.write_text(json.dumps(answer), encoding="utf-8")
        stored = json.loads(path.read_text(encoding="utf-8"))
        found.append(Answer(stored["sequences"], stored["scores"]))
    return found


async def our_answers(model_path: Path, searches: Sequence[Case]) -> list[Answer]:
    """The same through the whole system, several at a time. Raises ServeError, BlockyardError."""
    settings = ServeSettings.model_validate(
        {"model": str(model_path), "listen": "127.0.0.1:0", "num_threads": _NUM_THREADS}
    )
    room = asyncio.Semaphore(_NUM_CONCURRENT)
    async with LocalServer(settings) as server, AsyncClient(server.address) as client:
        with tqdm(total=len(searches), desc="blockyard") as progress:

            async def ask(case: Case) -> Answer:
                async with room:
                    answer = await search(client, case)
                progress.update()
                return answer

            return await asyncio.gather(*map(ask, searches))


async def search(client: AsyncClient, case: Case) -> Answer:
    """One search over the streaming call: its best hypothesis arrives in pieces."""
    sequences: list[list[int]] = [[] for _ in range(case.width)]
    scores = [float("nan")] * case.width
    async for chunk in client.generate(
        token_ids=case.token_ids,
        max_tokens=NUM_OUTPUT_TOKENS,
        skip_text=True,
        timeout=_TIMEOUT_S,
        beam={
            "width": case.width,
            "num_choices": case.width,
            "length_penalty": case.length_penalty,
            "early_stopping": case.early_stopping,
        },
    ):
        sequences[chunk.choice_index] += chunk.token_ids
        if chunk.finish_reason:
            scores[chunk.choice_index] = chunk.score
    return Answer(sequences, scores)


def difference(case: Case, expected: Answer, got: Answer) -> Difference | None:
    """The first choice with another sequence, or with a score too far off; None: equal."""
    pairs = zip(expected.sequences, got.sequences, expected.scores, got.scores, strict=True)
    for choice, (theirs, ours, their_score, our_score) in enumerate(pairs):
        apart = abs(their_score - our_score)
        if theirs != ours or not apart <= MAX_SCORE_DIFFERENCE:
            return Difference(case.setting, case.prompt, choice, theirs, ours, apart)
    return None


async def explain(peer: HfPeer, case: Case, got: Answer, bound: float) -> list[float] | None:
    """The changes of log-probabilities, each below `bound`, that make transformers' output ours.

    None if no few are found.
    """
    waiting: list[list[dict[str, Any]]] = [[]]
    for _ in range(_MAX_RERUNS):
        if not waiting:
            break
        nudges = waiting.pop(0)
        answer = await peer.beams(case.token_ids, case.options, bound, nudges)
        if _is_same_but_order(case, Answer(answer["sequences"], answer["scores"]), got, bound):
            return [nudge["by"] for nudge in nudges]
        if len(nudges) < _MAX_NUDGES:
            last = max((len(nudge["output_ids"]) for nudge in nudges), default=-1)
            waiting += [
                [*nudges, close] for close in answer["close"] if len(close["output_ids"]) > last
            ]
    return None


def _is_same_but_order(case: Case, expected: Answer, got: Answer, bound: float) -> bool:
    """Whether the two hold the same hypotheses, and those out of order have tied scores."""
    if sorted(expected.sequences) != sorted(got.sequences):
        return False
    scores = dict(zip(map(tuple, expected.sequences), expected.scores, strict=True))
    for sequence, our_score, score_there in zip(
        got.sequences, got.scores, expected.scores, strict=True
    ):
        score = scores[tuple(sequence)]
        total_apart = abs(score - score_there) * len(sequence) ** case.length_penalty
        if total_apart >= bound or not abs(score - our_score) <= MAX_SCORE_DIFFERENCE:
            return False
    return True


async def compare(model_path: Path, is_quick: bool) -> tuple[list[Case], list[Difference], float]:
    """Both sides, and which differences are ties; returns also the noise of transformers."""
    model = model_dir.load(model_path)
    prompts = chosen_prompts(model_path)
    async with hf_peer(model_path, _NUM_HF_THREADS) as peer:
        ids = await peer.tokenize([prompt.input for prompt in prompts])
        token_ids = dict(zip((prompt.name for prompt in prompts), ids, strict=True))
        searches = cases(model_path, token_ids, is_quick)
        expected = await expected_answers(peer, searches, model.digest)
    got = await our_answers(model_path, searches)
    differences = []
    async with hf_peer(model_path, _NUM_HF_THREADS) as peer:
        used = prompts[: 4 if is_quick else _NUM_NOISE_PROMPTS]
        greedy = await references(peer, used, NUM_OUTPUT_TOKENS, model.digest)
        noise_level = await noise(peer, greedy)
        for case, theirs, ours in zip(searches, expected, got, strict=True):
            if (found := difference(case, theirs, ours)) is None:
                continue
            found.changes = await explain(peer, case, ours, _TIE_FACTOR * noise_level)
            differences.append(found)
            _print(found)
    return searches, differences, noise_level


def _print(found: Difference) -> None:
    pairs = enumerate(zip(found.expected, found.got, strict=False))
    position = next((index for index, (a, b) in pairs if a != b), None)
    if found.changes is None:
        kind = "WRONG"
    else:
        kind = f"tie (changes of {', '.join(f'{abs(by):.2g}' for by in found.changes) or 'none'})"
    print(
        f"{kind}: {found.setting}, {found.prompt}, choice {found.choice} from output token "
        f"{position}; scores differ by {found.score_difference:.3g}",
        flush=True,
    )


def targets(searches: Sequence[Case], differences: Sequence[Difference]) -> list[Target]:
    """No wrong output, and few ties."""
    num_ties = sum(found.changes is not None for found in differences)
    most = max(1, int(MAX_TIED_SHARE * len(searches)))
    return [
        Target("wrong searches", len(differences) - num_ties, "<=", 0),
        Target("ties", num_ties, "<=", most),
    ]


def main() -> int:
    """Compare, print, write results/beam_equality.json; exit codes as in benchmarks/__init__.py."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beam_equality", description=__doc__)
    parser.add_argument("--model", default=store.DEFAULT_MODEL)
    parser.add_argument("--quick", action="store_true", help="four searches; nothing is written")
    flags = parser.parse_args()
    try:
        model_path = store.resolve(flags.model)
        searches, differences, noise_level = uvloop.run(compare(model_path, flags.quick))
    except (ModelImportError, ServeError, PeerError, BlockyardError) as error:
        print(f"cannot run: {error}", file=sys.stderr)
        return 2
    rows = []
    for setting, count in Counter(case.setting for case in searches).items():
        found = [each for each in differences if each.setting == setting]
        num_wrong = sum(each.changes is None for each in found)
        rows.append((setting, count, count - len(found), len(found) - num_wrong, num_wrong))
    headers = ("setting", "searches", "equal", "ties", "wrong")
    report.print_table(f"beam searches, up to {NUM_OUTPUT_TOKENS} tokens", headers, rows)
    print(f"transformers' own logits, batch 1 against 32: {noise_level:.3g}")
    reached = targets(searches, differences)
    are_met = report.print_targets(reached)
    results = {
        "model": model_path.name,
        "num_output_tokens": NUM_OUTPUT_TOKENS,
        "transformers_batch_noise": noise_level,
        "settings": [dict(zip(headers, row, strict=True)) for row in rows],
        "differences": [asdict(found) for found in differences],
    }
    if not flags.quick:
        report.write("beam_equality", results, reached)
    return 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())
