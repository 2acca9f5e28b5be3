"""Chats from a JSONL file: one object with `messages` a line.

Invariants
    * A file is read whole or refused: a row is never skipped, blank lines excepted.
    * Every faulty row is told, the first ten in words, each with its line, its field and the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import orjson

from fwasync.errors import DatasetError

__all__ = ("ROLES", "Chat", "Message", "Problem", "read_chats", "refuse")

ROLES = ("system", "user", "assistant", "tool")

_TOLD = 10
_FIELDS = frozenset({"role", "content"})


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A row of a file: its messages, and its line in the file, counted from 1."""

    messages: tuple[Message, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a row: line from 1 (0 is the file itself), field (may be empty) and reason."""

    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        where = ", ".join(filter(None, (f"line {self.line}" if self.line else "", self.field)))
        return f"{where}: {self.reason}" if where else self.reason


def read_chats(path: str | Path) -> list[Chat]:
    """Read chats from a JSONL file.

    A row is `{"messages": [{"role": …, "content": …}, …]}`, with roles system, user, assistant and tool, text as
    content, and at least one message of the assistant. Other keys of a row are left to their owner; other keys of a
    message are refused, because they would ask for something that is not done here. Blank lines are allowed.

    This blocks while it reads: on an event loop, call it through `anyio.to_thread.run_sync`.

    Raises:
        DatasetError: The file cannot be read, has no rows, or has faulty ones.
    """
    path = Path(path)
    chats: list[Chat] = []
    problems: list[Problem] = []
    try:
        with path.open("rb") as file:
            for line, text in enumerate(file, 1):
                stripped = text.removeprefix(b"\xef\xbb\xbf").strip() if line == 1 else text.strip()
                if not stripped:
                    continue
                found = _read_row(stripped, line)
                if isinstance(found, Chat):
                    chats.append(found)
                else:
                    problems.extend(found)
    except FileNotFoundError:
        raise DatasetError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise DatasetError(f"{path} is a directory; name a JSONL file") from None
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}") from None
    if problems:
        refuse(path, problems)
    if not chats:
        raise DatasetError(f'{path} is empty; it needs a row such as {{"messages": [{{"role": "user", …}}, …]}}')
    return chats


def refuse(path: str | Path, problems: Iterable[Problem]) -> None:
    """Tell what is wrong with a file, all at once.

    Raises:
        DatasetError: If there is a problem at all.
    """
    found = tuple(problems)
    if not found:
        return
    rows = len({problem.line for problem in found})
    told = [f"  {problem}" for problem in found[:_TOLD]]
    if len(found) > _TOLD:
        told.append(f"  … and {len(found) - _TOLD} more")
    head = f"{path} has {rows} faulty {'row' if rows == 1 else 'rows'}:"
    raise DatasetError("\n".join([head, *told]), problems=found[:_TOLD])


def _read_row(text: bytes, line: int) -> Chat | list[Problem]:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: byte 0x{text[error.start]:02x} at column {error.start + 1}; save the file as UTF-8"
        return [Problem(line, "", reason)]
    try:
        row: object = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return [Problem(line, "", f"not JSON: {error.msg} at column {error.colno}")]
    if not isinstance(row, dict):
        return [Problem(line, "", f"it is {_kind(row)}; each line must be an object with messages")]
    fields = cast("dict[str, object]", row)
    if "messages" not in fields:
        keys = ", ".join(map(repr, fields)) or "no keys at all"
        return [Problem(line, "messages", f"it is missing; the row has {keys}")]
    if fields.get("tools"):
        return [Problem(line, "tools", "rows with tools are not supported")]
    return _read_messages(fields["messages"], line)


def _read_messages(given: object, line: int) -> Chat | list[Problem]:
    if not isinstance(given, list):
        return [Problem(line, "messages", f"it is {_kind(given)}; it must be a list")]
    if not given:
        return [Problem(line, "messages", "it is empty")]
    messages: list[Message] = []
    problems: list[Problem] = []
    for index, message in enumerate(cast("list[object]", given)):
        faults = [Problem(line, f"messages[{index}]{name}", reason) for name, reason in _faults(message)]
        problems.extend(faults)
        if not faults:
            fields = cast("dict[str, str]", message)
            messages.append(Message(fields["role"], fields["content"]))
    if problems:
        return problems
    if all(message.role != "assistant" for message in messages):
        return [Problem(line, "messages", "no message is from the assistant, so there is nothing to learn")]
    return Chat(tuple(messages), line)


def _faults(message: object) -> Iterator[tuple[str, str]]:
    """Field (such as `.role`) and reason of everything that is wrong with a message."""
    if not isinstance(message, dict):
        yield "", f"it is {_kind(message)}; it must be an object with role and content"
        return
    fields = cast("dict[str, Any]", message)
    role, content = fields.get("role"), fields.get("content")
    if "role" not in fields:
        yield ".role", "it is missing"
    elif role not in ROLES:
        yield ".role", f"{role!r} is not a role; use {', '.join(ROLES)}"
    if "content" not in fields:
        yield ".content", "it is missing"
    elif not isinstance(content, str):
        yield ".content", f"it is {_kind(content)}; it must be a string"
    elif not content and role == "assistant":
        yield ".content", "the assistant's answer is empty"
    for name in fields.keys() - _FIELDS:
        yield f".{name}", "a message has role and content; nothing else is supported"


def _kind(value: object) -> str:
    if value is None:
        return "null"
    kinds = (
        (bool, "a boolean"),
        (int | float, "a number"),
        (str, "a string"),
        (list, "a list"),
        (dict, "an object"),
    )
    return next(name for kind, name in kinds if isinstance(value, kind))
