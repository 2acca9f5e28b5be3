"""Prompts for rollouts: conversations that the model is to continue, with what their reward needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwasync.data.jsonl import Fault, JsonRow, Problem, collect, read_conversation
from fwasync.data.loading import OnProgress, open_lines, take_all
from fwasync.data.messages import Message

__all__ = ("PromptRow", "load_prompts", "read_prompt")

_EXAMPLE = '{"messages": [{"role": "user", …}], "ground_truth": …}'


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A row of a file of prompts.

    Attributes:
        messages: The conversation, without answers at its end: the model gives those.
        ground_truth: What the reward function knows and the model does not; `None` if the row has none.
        metadata: All other keys of the row.
        line: Its line in the file, from 1.
        tools: What the assistant may call.
    """

    messages: tuple[Message, ...]
    ground_truth: Any
    metadata: dict[str, Any]
    line: int
    tools: tuple[dict[str, Any], ...] = ()


async def load_prompts(
    source: str | Path, *, max_rows: int | None = None, on_progress: OnProgress | None = None
) -> tuple[PromptRow, ...]:
    """Read a file of prompts: `{"messages": […], "ground_truth": …}` a line, other keys travel as metadata.

    Args:
        source: A path, or an http(s) URL.
        max_rows: Read so many rows at most.
        on_progress: Told on the event loop how far it is.

    Raises:
        DatasetError: The file cannot be read, has no rows, or has faulty ones.
        ServiceError, TransportError: The URL cannot be had.

    **Cancellation:** the reading stops within a slice, of some hundredths of a second; nothing goes on.
    """
    found: list[PromptRow | Problem] = []
    async with open_lines(source, max_rows=max_rows) as lines:
        await take_all(lines, lines.rows(read_prompt), found.append, on_progress)
    return tuple(collect(lines, found, example=_EXAMPLE))


def read_prompt(row: JsonRow, line: int) -> PromptRow | list[Fault]:
    """A row as a prompt, or what is wrong with it."""
    messages, tools, faults = read_conversation(row)
    if faults:
        return faults
    end = len(messages)
    while end and messages[end - 1].role == "assistant":
        end -= 1
    if not end:
        return [("messages", "all are from the assistant, so there is nothing to continue")]
    metadata = {key: value for key, value in row.items() if key not in ("messages", "tools", "ground_truth")}
    return PromptRow(messages[:end], row.get("ground_truth"), metadata, line, tools)
