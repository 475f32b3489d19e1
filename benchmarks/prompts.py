"""Prompts of many kinds for comparing outputs: prose, code, digits, languages, chats.

The texts come from this repository and from Python's standard library.
"""

# ruff: noqa: RUF001 - the letters of other scripts are meant

from __future__ import annotations

import argparse
import collections
import difflib
import fractions
import heapq
import inspect
import json
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from benchmarks.report import ROOT
from blockyard.common.model_dir import TOKENIZER_FILE

Input = dict[str, Any]
"""Exactly one of prompt (str), token_ids (list[int]) and messages (list of role and content)."""

_LENGTHS: Final = (1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 64, 65, 100, 127, 128, 129, 180, 255, 257)
"""Around the edges of blocks and of token budgets [tokens]."""
_LONG_LENGTHS: Final = (511, 1000, 1499, 1500)

_LANGUAGES: Final = {
    "german": "Die Bibliothek am Marktplatz öffnet jeden Morgen um neun Uhr, und",
    "french": "Le petit garçon regardait la mer depuis la fenêtre de sa chambre. Il pensait que",
    "spanish": "La receta de mi abuela para el gazpacho lleva tomates maduros, pepino y",
    "italian": "Quando il treno arrivò alla stazione di Bologna, il controllore",
    "portuguese": "O menino atravessou a ponte correndo porque queria chegar antes da",
    "polish": "Zażółć gęślą jaźń to zdanie, które",
    "turkish": "İstanbul'da yağmurlu bir günde vapura binmek",
    "russian": "Рано утром почтальон вышел из дома и увидел, что",
    "greek": "Το πρωί ο ήλιος ανέτειλε πάνω από το νησί και",
    "arabic": "في صباح يوم جميل خرج الولد من بيته ليشتري",
    "hebrew": "בוקר אחד יצאה הילדה לגן וראתה",
    "hindi": "एक समय की बात है, एक छोटे से गाँव में",
    "chinese": "从前有一座山，山里有一座庙，庙里",
    "japanese": "昔々、あるところにおじいさんとおばあさんが",
    "korean": "옛날 옛적에 깊은 산속에 호랑이 한 마리가",
    "emoji": "🎉🎉 Party tonight! 🕺💃 Bring 🍕 and",
}
_DIGITS: Final = {
    "pi": "3.14159265358979323846264338327950288419716939937510",
    "counting": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,",
    "sum": "12 + 30 = 42\n17 + 25 = 42\n123 + 456 =",
    "dates": "2023-01-31, 2023-02-28, 2023-03-31, 2023-04-30,",
    "table": "| n | n^2 |\n|---|---|\n| 1 | 1 |\n| 2 | 4 |\n| 3 |",
}
_CODE: Final[dict[str, Callable[..., Any]]] = {
    "dedent": textwrap.dedent,
    "merge": heapq.merge,
    "namedtuple": collections.namedtuple,
    "dumps": json.dumps,
    "unified_diff": difflib.unified_diff,
    "cleandoc": inspect.cleandoc,
}
_CODE_CHARACTERS: Final = 420
_QUESTIONS: Final = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in two sentences what a page table does.",
    "List three prime numbers larger than 100.",
    "Translate 'good morning' into German, Spanish and Japanese.",
    "Fix this Python line: for i in range(10) print(i)",
)
_SYSTEM: Final = "You are a terse assistant. Answer with one short sentence."


@dataclass(frozen=True, slots=True)
class Prompt:
    """A named input."""

    name: str
    input: Input


def varied_prompts(model_dir: Path) -> list[Prompt]:
    """More than 64 prompts of 1 to 1,500 tokens, the same in every run."""
    tokenizer = Tokenizer.from_file(str(model_dir / TOKENIZER_FILE))
    return [
        *_cut_texts(tokenizer),
        *(Prompt(f"language/{name}", {"prompt": text}) for name, text in _LANGUAGES.items()),
        *(Prompt(f"digits/{name}", {"prompt": text}) for name, text in _DIGITS.items()),
        *_code(),
        *_chats(),
    ]


def few_prompts(model_dir: Path) -> list[Prompt]:
    """Eight of them: each kind, and a length beyond one step's token budget."""
    wanted = {
        *("length/1", "length/17", "length/511", "language/french", "language/japanese"),
        *("digits/dates", "code/merge", "chat/turns"),
    }
    chosen = [prompt for prompt in varied_prompts(model_dir) if prompt.name in wanted]
    assert len(chosen) == len(wanted), "a name changed"
    return chosen


def running_text(model_dir: Path) -> list[int]:
    """Token ids of a long text, to cut prompts from."""
    tokenizer = Tokenizer.from_file(str(model_dir / TOKENIZER_FILE))
    documents = (argparse, collections, difflib, fractions, heapq, textwrap)
    text = "\n".join(inspect.getsource(document) for document in documents)
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    return list(tokenizer.encode(design + text, add_special_tokens=False).ids)


def _cut_texts(tokenizer: Tokenizer) -> Iterator[Prompt]:
    """Token ids of exact lengths, cut from different places of long texts."""
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    contract = ROOT / "protos" / "blockyard" / "executor" / "v1" / "executor.proto"
    texts = (
        design,
        contract.read_text(encoding="utf-8"),
        inspect.getdoc(fractions) or "",
        inspect.getsource(argparse),
    )
    streams = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    for index, length in enumerate((*_LENGTHS, *_LONG_LENGTHS)):
        candidates = [ids for ids in streams if len(ids) >= length]
        ids = candidates[index % len(candidates)]
        start = (index * 37) % (len(ids) - length + 1)
        yield Prompt(f"length/{length}", {"token_ids": ids[start : start + length]})


def _code() -> Iterator[Prompt]:
    for name, function in _CODE.items():
        yield Prompt(f"code/{name}", {"prompt": inspect.getsource(function)[:_CODE_CHARACTERS]})


def _chats() -> Iterator[Prompt]:
    for index, question in enumerate(_QUESTIONS):
        user = {"role": "user", "content": question}
        yield Prompt(f"chat/question-{index}", {"messages": [user]})
        system = {"role": "system", "content": _SYSTEM}
        yield Prompt(f"chat/system-{index}", {"messages": [system, user]})
    turns = [
        {"role": "user", "content": "My name is Ada and I like bridges."},
        {"role": "assistant", "content": "Nice to meet you, Ada! Which bridge do you like best?"},
        {"role": "user", "content": "The one in Sydney. What is my name, and what do I like?"},
    ]
    yield Prompt("chat/turns", {"messages": turns})
    unicode = [{"role": "user", "content": "Réponds en français : où est née Marie Curie ? 🇵🇱"}]
    yield Prompt("chat/unicode", {"messages": unicode})
