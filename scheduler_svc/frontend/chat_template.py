"""Chat templates: the model's jinja2 source, rendered as its publisher's library would.

The template comes from the model directory, not from a client, but it is still foreign code: it
runs in jinja's immutable sandbox, `range` has a budget for the whole render (so nested loops end),
and the output is bounded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MAX_RANGE_ITEMS: Final = 100_000
"""Numbers that all `range` calls of one render may yield together."""
MAX_RENDERED_CHARACTERS: Final = 16 << 20

# What running a template can raise besides jinja's own errors: it is Python underneath.
_TEMPLATE_FAILURES: Final = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplateError(Exception):
    """The template cannot be compiled, or does not take these messages."""


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for training; here its content is just text."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _RangeBudget:
    def __init__(self, num_items: int) -> None:
        self._num_left = num_items

    def range(self, *bounds: int) -> range:
        items = range(*bounds)
        self._num_left -= len(items)
        if self._num_left < 0:
            raise jinja2.TemplateRuntimeError("the template's loops are too long")
        return items


class ChatTemplate:
    """A compiled template. Rendering is thread safe."""

    def __init__(self, source: str, bos_token: str, eos_token: str) -> None:
        """Compile. Raises ChatTemplateError."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"chat template does not compile: {error}") from error
        self._special_tokens = {"bos_token": bos_token, "eos_token": eos_token}

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt for the assistant's next message; messages are {"role", "content"}.

        Raises ChatTemplateError.
        """
        budget = _RangeBudget(MAX_RANGE_ITEMS)
        chunks = self._template.generate(
            messages=list(messages),
            add_generation_prompt=True,
            range=budget.range,
            **self._special_tokens,
        )
        try:
            return _join_bounded(chunks)
        except _TEMPLATE_FAILURES as error:
            raise ChatTemplateError(f"chat template: {error or type(error).__name__}") from error


def _join_bounded(chunks: Iterator[str]) -> str:
    parts: list[str] = []
    num_characters = 0
    for chunk in chunks:
        parts.append(chunk)
        num_characters += len(chunk)
        if num_characters > MAX_RENDERED_CHARACTERS:
            raise jinja2.TemplateRuntimeError("the rendered prompt is too long")
    return "".join(parts)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(style: str) -> str:
    return datetime.now().strftime(style)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja's own filter this does not escape HTML, which models never saw."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
