"""JSONL files: rows one by one, and chats from them.

Invariants
    * A file is read whole or refused: a row is never skipped, blank lines excepted.
    * Every faulty row is counted, and the first ten faults are told, each with its line, its field and the reason.
    * Of a file no more is held than what was made of its rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import orjson

from fwasync.data.messages import ROLES, Fault, Message, kind_of, read_messages, read_tools
from fwasync.errors import DatasetError

__all__ = (
    "CHAT_EXAMPLE",
    "ROLES",
    "Chat",
    "Fault",
    "Faults",
    "JsonLines",
    "JsonRow",
    "Message",
    "Parse",
    "Problem",
    "collect",
    "read_chat",
    "read_chats",
    "read_conversation",
)

T = TypeVar("T")

_TOLD = 10
_NO_JSONL = {
    b"\x1f\x8b": "is gzip: unpack it first",
    b"\x28\xb5\x2f\xfd": "is zstd: unpack it first",
    b"PK\x03\x04": "is a zip archive: unpack it first",
    b"PAR1": "is Parquet: write its rows as JSON, one a line",
    b"\xff\xfe": "is UTF-16: save it as UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
}
"""What files are that begin so; no line of JSON does."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A row of a file: its messages, its line in the file, counted from 1, and the tools that it may use."""

    messages: tuple[Message, ...]
    line: int
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a row: line from 1 (0 is the file itself), field (may be empty) and reason."""

    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        where = ", ".join(filter(None, (f"line {self.line}" if self.line else "", self.field)))
        return f"{where}: {self.reason}" if where else self.reason


JsonRow = dict[str, object]
"""A row, decoded."""

Parse = Callable[[JsonRow, int], T | list[Fault]]
"""Makes something of a row and its line, or says what is wrong with it."""


class Faults:
    """The faults of one file: the first ones in words, the others in number."""

    def __init__(self, name: str | Path) -> None:
        self.name = name
        self._told: list[Problem] = []
        self._count = 0
        self._rows = 0
        self._line = -1

    def add(self, problem: Problem) -> None:
        """Take a fault; those of one row come one after the other."""
        self._count += 1
        self._rows += problem.line != self._line
        self._line = problem.line
        if len(self._told) < _TOLD:
            self._told.append(problem)

    def check(self) -> None:
        """Tell them, all at once.

        Raises:
            DatasetError: If there are any.
        """
        if not self._count:
            return
        told = [f"  {problem}" for problem in self._told]
        if self._count > _TOLD:
            told.append(f"  … and {self._count - _TOLD} more")
        head = f"{self.name} has {self._rows} faulty {'row' if self._rows == 1 else 'rows'}:"
        raise DatasetError("\n".join([head, *told]), problems=tuple(self._told))


class JsonLines:
    """A JSONL file, read row by row.

    Args:
        path: The file.
        name: What it is called in errors; by default its path.
        max_rows: Read so many rows at most.
    """

    def __init__(self, path: str | Path, *, name: str | None = None, max_rows: int | None = None) -> None:
        self.path = Path(path)
        self._max_rows = max_rows
        self.name = name or str(path)
        self.line = 0
        """The line that was read last."""
        self.bytes_read = 0
        """How much of the file was read."""
        self.bytes_total = 0
        """How long it is; known when reading has begun."""

    def rows(self, parse: Parse[T]) -> Generator[T | Problem]:
        """What `parse` makes of each row, in order, read as it is asked for. This blocks while it reads.

        Raises:
            DatasetError: The file cannot be read.
        """
        left = -1 if self._max_rows is None else self._max_rows
        try:
            with self.path.open("rb") as file:
                self.bytes_total = os.fstat(file.fileno()).st_size
                for self.line, text in enumerate(file, 1):
                    self.bytes_read += len(text)
                    if self.line == 1:
                        self._check_kind(text)
                    bare = text.removeprefix(b"\xef\xbb\xbf").strip() if self.line == 1 else text.strip()
                    if bare and not left:
                        return
                    if bare:
                        left -= 1
                        yield from _read_row(bare, self.line, parse)
        except FileNotFoundError:
            raise DatasetError(f"{self.name}: there is no such file") from None
        except IsADirectoryError:
            raise DatasetError(f"{self.name} is a directory; name a JSONL file") from None
        except OSError as error:
            raise DatasetError(f"{self.name} cannot be read: {error.strerror or error}") from None

    def _check_kind(self, beginning: bytes) -> None:
        for signature, told in _NO_JSONL.items():
            if beginning.startswith(signature):
                raise DatasetError(f"{self.name} {told}")


def collect(lines: JsonLines, items: Iterable[T | Problem], *, example: str) -> list[T]:
    """The rows of a file, if none is faulty; `example` is what one looks like, for who has none.

    Raises:
        DatasetError: The file cannot be read, has no rows, or has faulty ones.
    """
    faults = Faults(lines.name)
    found: list[T] = []
    for item in items:
        if isinstance(item, Problem):
            faults.add(item)
        else:
            found.append(item)
    faults.check()
    if not found:
        raise DatasetError(f"{lines.name} is empty; it needs a row such as {example}")
    return found


CHAT_EXAMPLE = '{"messages": [{"role": "user", …}, {"role": "assistant", …}]}'


def read_chats(path: str | Path) -> list[Chat]:
    """Read chats from a JSONL file.

    A row is `{"messages": [{"role": …, "content": …}, …]}`, with at least one message of the assistant; see
    `fwasync.data.messages` for what a message may have. `tools` of a row are handed to the chat template; its other
    keys are left to their owner. Blank lines are allowed.

    This blocks while it reads: on an event loop, call it through `anyio.to_thread.run_sync`, or use
    `fwasync.data.supervised.load_supervised`, which holds no more than the tokens.

    Raises:
        DatasetError: The file cannot be read, has no rows, or has faulty ones.
    """
    lines = JsonLines(path)
    return collect(lines, lines.rows(read_chat), example=CHAT_EXAMPLE)


def read_chat(row: JsonRow, line: int) -> Chat | list[Fault]:
    """A row as a chat, or what is wrong with it."""
    messages, tools, faults = read_conversation(row)
    if not faults and all(message.role != "assistant" for message in messages):
        faults = [("messages", "no message is from the assistant, so there is nothing to learn")]
    return faults or Chat(messages, line, tools)


def read_conversation(row: JsonRow) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...], list[Fault]]:
    """The `messages` and `tools` of a row, and what is wrong with them."""
    if "messages" not in row:
        keys = ", ".join(map(repr, row)) or "no keys at all"
        return (), (), [("messages", f"it is missing; the row has {keys}")]
    messages, faults = read_messages(row["messages"], "messages")
    tools, more = read_tools(row.get("tools"), "tools")
    return messages, tools, faults + more


def _read_row(text: bytes, line: int, parse: Parse[T]) -> Iterator[T | Problem]:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: byte 0x{text[error.start]:02x} at column {error.start + 1}; save the file as UTF-8"
        yield Problem(line, "", reason)
        return
    try:
        row: object = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        yield Problem(line, "", f"not JSON: {error.msg} at column {error.colno}")
        return
    if not isinstance(row, dict):
        yield Problem(line, "", f"it is {kind_of(row)}; each line must be an object")
        return
    found = parse(cast("JsonRow", row), line)
    if isinstance(found, list):
        yield from (Problem(line, field, reason) for field, reason in cast("list[Fault]", found))
    else:
        yield found
