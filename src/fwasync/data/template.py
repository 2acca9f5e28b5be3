"""Chat templates: Jinja sources that turn messages into text, run in a sandbox.

The environment is the one that chat templates are written for: block lines are trimmed, `raise_exception` refuses a
conversation, `tojson` does not escape for HTML. A template comes with a tokenizer, so it is not trusted: it can
neither change its inputs nor reach beyond them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fwasync.errors import UsageError

__all__ = ("ChatTemplate", "TemplateRefusal")


class TemplateRefusal(UsageError):
    """The template cannot render these messages; the text is its own reason."""


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja source.
        names: What it may use beside the messages, such as `bos_token`.

    Raises:
        UsageError: The source is not a template.
    """

    def __init__(self, source: str, names: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception  # pyright: ignore[reportArgumentType]  # any object
        self._names = dict(names)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(f"the tokenizer's chat template cannot be used: line {error.lineno}: {error}") from error

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """The text of a conversation.

        Raises:
            TemplateRefusal: The template does not take it.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._names,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise TemplateRefusal(f"the chat template refuses it: {error}") from error


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
