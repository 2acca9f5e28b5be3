"""Chat templates: Jinja sources that turn messages into text, run in a sandbox.

The environment is the one that chat templates are written for: block lines are trimmed, `raise_exception` refuses a
conversation, `strftime_now` tells the date, `tojson` does not escape for HTML, and `{% generation %}` encloses what the
assistant says. A template comes with a tokenizer, so it is not trusted: it can neither change its inputs nor reach
beyond them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fwasync.data.rendering import RenderRefusal
from fwasync.errors import UsageError

__all__ = ("MARKS", "ChatTemplate", "Span")

Span = tuple[int, int]
"""From the first character to behind the last."""

MARKS = "\ufdd0\ufdd1"
"""Two characters that Unicode keeps from texts: where `{% generation %}` begins, and where it ends."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja source.
        names: What it may use beside the messages, such as `bos_token` or `enable_thinking`.

    Raises:
        UsageError: The source is not a template.
    """

    def __init__(self, source: str, names: Mapping[str, Any]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        functions: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        environment.globals.update(functions)
        self._names = dict(names)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(f"the tokenizer's chat template cannot be used: line {error.lineno}: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> tuple[str, list[Span]]:
        """The text of a conversation, and where in it the template says that the assistant speaks.

        Raises:
            RenderRefusal: The template does not take it.
        """
        try:
            text = self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=list(tools) or None,
                documents=None,
                **self._names,
            )
        except Exception as error:  # whatever its expressions came to
            raise RenderRefusal(f"the chat template refuses it: {error}") from error
        return _without_marks(text)


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: its text, between marks."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 has it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in MARKS)
        return [start, *body, end]


def _without_marks(text: str) -> tuple[str, list[Span]]:
    pieces: list[str] = []
    spans: list[Span] = []
    length = start = 0
    for piece in re.split(f"([{MARKS}])", text):
        if piece == MARKS[0]:
            start = length
        elif piece == MARKS[1]:
            spans.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
