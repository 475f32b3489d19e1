"""`blockyard generate --file`: many requests, a bounded number at a time, results in order."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from tqdm import tqdm

from blockyard.cli.errors import CommandError
from blockyard.cli.options import MAX_TIMEOUT_S, Target, conversation
from blockyard.client import AsyncClient, BlockyardError, Choice, GenerateOptions

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Batch:
    """What to run. `defaults` are options of lines that do not say otherwise."""

    target: Target
    source: Path
    output: Path | None
    concurrency: int
    defaults: GenerateOptions


async def run_batch(batch: Batch) -> int:
    """Run every line and write one result per line, in order; returns how many failed.

    A result has `index` (and `id`, if the line had one), and either `usage` and the output, or
    `error` with `code` and `message`. An output is `text`, `token_ids` and `finish_reason`, with
    `logprobs` and `score` where there are any; several are a list, `choices`. Raises
    BlockyardError if there is no server.
    """
    lines = _read_lines(batch.source)
    with ExitStack() as files:
        async with batch.target.server.async_client(batch.target.timeout) as client:
            model = await client.model()
            # Opened last: nothing is lost if there is no input or no server.
            output = _open_output(files, batch.output)
            is_chat = batch.target.is_chat_for(model)
            is_shown = not (output is sys.stdout and output.isatty())
            bar = files.enter_context(
                tqdm(total=len(lines), unit="req", file=sys.stderr, disable=not is_shown)
            )
            run = _Run(client, batch, is_chat, _OrderedWriter(output, bar))
            todo = iter(enumerate(lines))
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(batch.concurrency, len(lines))):
                    workers.create_task(run.work(todo))
        return run.writer.num_failed


class _OrderedWriter:
    """Writes results as soon as all earlier ones are written."""

    def __init__(self, output: TextIO, bar: tqdm[NoReturn]) -> None:
        self.num_failed = 0
        self._output = output
        self._bar = bar
        self._waiting: dict[int, Result] = {}
        self._num_written = 0

    def add(self, index: int, result: Result) -> None:
        """Take the result of line `index`, counted from 0."""
        self.num_failed += "error" in result
        self._waiting[index] = result
        self._bar.update()
        while self._num_written in self._waiting:
            line = json.dumps(self._waiting.pop(self._num_written), ensure_ascii=False)
            # A lone surrogate, which JSON can name and UTF-8 cannot, is written as it came: \ud800.
            self._output.write(line.encode("utf-8", "backslashreplace").decode() + "\n")
            self._num_written += 1
        self._output.flush()


@dataclass(frozen=True, slots=True)
class _Run:
    client: AsyncClient
    batch: Batch
    is_chat: bool
    writer: _OrderedWriter

    async def work(self, todo: Iterator[tuple[int, str]]) -> None:
        """Take lines until none is left."""
        for index, line in todo:
            self.writer.add(index, {"index": index, **await self._result(line)})

    async def _result(self, line: str) -> Result:
        """One line's outcome; nothing that is wrong with it raises."""
        head: Result = {}
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise _invalid("the line is not a JSON object")
            head = {"id": fields.pop("id")} if "id" in fields else {}
            return {**head, **await self._complete(fields)}
        except (ValueError, RecursionError) as error:
            message = f"not valid JSON: {error}"
            return {**head, "error": {"code": "INVALID_ARGUMENT", "message": message}}
        except BlockyardError as error:
            return {**head, "error": {"code": error.code, "message": error.message}}

    async def _complete(self, fields: dict[str, Any]) -> Result:
        prompt, token_ids = fields.pop("prompt", None), fields.pop("token_ids", None)
        messages, system = fields.pop("messages", None), fields.pop("system", None)
        timeout = _check_timeout(fields.pop("timeout", None))
        if self.is_chat and prompt is not None and messages is None and token_ids is None:
            if not isinstance(prompt, str):
                raise _invalid(f"prompt must be text: {prompt!r}")
            opening = self.batch.target.system if system is None else system
            messages, prompt = conversation(opening, prompt), None
        elif system is not None:
            raise _invalid("system goes with a prompt that is sent as a chat message")
        unknown = fields.keys() - GenerateOptions.__annotations__.keys()
        if unknown:
            raise _invalid(f"unknown field {min(unknown)!r}")
        options = cast("GenerateOptions", {**self.batch.defaults, **fields})
        completion = await self.client.complete(
            prompt, token_ids=token_ids, messages=messages, timeout=timeout, **options
        )
        outputs = [_output(choice, options) for choice in completion.choices]
        result = outputs[0] if len(outputs) == 1 else {"choices": outputs}
        return {**result, "usage": asdict(completion.usage)}


def _output(choice: Choice, options: GenerateOptions) -> Result:
    output: Result = {
        "text": choice.text,
        "token_ids": choice.token_ids,
        "finish_reason": choice.finish_reason,
    }
    if choice.logprobs:
        output["logprobs"] = [asdict(entry) for entry in choice.logprobs]
    if "beam" in options:
        output["score"] = choice.score
    return output


def _check_timeout(timeout: Any) -> float | None:
    """A line's timeout [s]. Raises BlockyardError."""
    if timeout is None:
        return None
    if not isinstance(timeout, int | float) or not 0 < timeout <= MAX_TIMEOUT_S:
        raise _invalid(
            f"timeout must be a number of seconds up to {MAX_TIMEOUT_S:.0f}: {timeout!r}"
        )
    return timeout


def _invalid(message: str) -> BlockyardError:
    return BlockyardError("INVALID_ARGUMENT", message)


def _read_lines(path: Path) -> list[str]:
    """The lines that are not blank; bytes that are not UTF-8 make their line invalid, not more."""
    if str(path) == "-":
        data = sys.stdin.buffer.read()
    else:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CommandError(f"{path}: {error.strerror}", 2) from error
    text = data.decode("utf-8-sig", "surrogateescape")
    return [line for line in text.split("\n") if line.strip()]


def _open_output(files: ExitStack, path: Path | None) -> TextIO:
    if path is None or str(path) == "-":
        return sys.stdout
    try:
        return files.enter_context(path.open("w", encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}", 2) from error
