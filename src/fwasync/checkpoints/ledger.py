"""`CheckpointLedger`: `checkpoints.jsonl`, one line for each checkpoint or snapshot that a run has saved.

An entry is appended after the service has saved what it names, and is on the disk when `append` returns. A
crash in the middle of an append leaves a torn last line: it is skipped by readers and removed by the next
append, so that every line before the last is whole. A broken line anywhere else is an error.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import anyio.to_thread

from fwasync.errors import CheckpointLedgerError, UsageError

__all__ = ("CheckpointEntry", "CheckpointLedger")

logger = logging.getLogger(__name__)

_FILE = "checkpoints.jsonl"
_KEYS = ("name", "step", "data_consumed", "source_job_id", "state_path", "sampler_path")


@dataclass(frozen=True, slots=True)
class CheckpointEntry:
    """What was saved, and where the run stood.

    Attributes:
        name: The checkpoint's name, such as `"step-10"`.
        step: The optimizer steps that were done.
        data_consumed: How much of the data set was consumed, in the recipe's own count.
        source_job_id: The trainer job that saved it.
        state_path: Where the resumable trainer state is; `None` if that was not saved.
        sampler_path: The snapshot for samplers; `None` if that was not saved.
        extra: Further keys of the line, as JSON values.
    """

    name: str
    step: int
    data_consumed: int = 0
    source_job_id: str | None = None
    state_path: str | None = None
    sampler_path: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])


class CheckpointLedger:
    """The checkpoints of the run in `log_path`. One process appends to it at a time."""

    def __init__(self, log_path: str | Path) -> None:
        self.path = Path(log_path) / _FILE
        self._lock = threading.Lock()

    async def append(self, entry: CheckpointEntry) -> None:
        """Add an entry, and wait until it is on the disk. The directory is made if it is missing.

        Raises:
            CheckpointLedgerError: It cannot be written; the ledger is as it was.
            UsageError: `extra` is not JSON, or repeats a key that the entry has itself.

        **Cancellation:** the entry is written as a whole, or not at all.
        """
        line = _line(entry)
        try:
            await anyio.to_thread.run_sync(self._append, line)
        except OSError as error:
            raise CheckpointLedgerError(
                f"cannot write {self.path}: {error.strerror or error}; the checkpoint {entry.name!r} exists on the "
                "service, and this run can only be resumed from it by giving its path"
            ) from error

    async def entries(self) -> list[CheckpointEntry]:
        """Read all entries, the oldest first. A file that does not exist has none.

        A last line that was torn by a crash is skipped, with a warning in the log.

        Raises:
            CheckpointLedgerError: Another line is broken, or the file cannot be read.

        **Cancellation:** leaves nothing behind.
        """
        try:
            content = await anyio.to_thread.run_sync(self.path.read_bytes)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointLedgerError(f"cannot read {self.path}: {error.strerror or error}") from error
        *lines, last = content.split(b"\n")
        entries = [self._parsed(line, number) for number, line in enumerate(lines, 1) if line.strip()]
        if last.strip():
            try:
                entries.append(_entry(last))
            except ValueError:
                logger.warning("%s: line %d was torn by a crash and is skipped", self.path, len(lines) + 1)
        return entries

    async def latest(self, *, resumable: bool = True) -> CheckpointEntry | None:
        """Find the newest entry; with `resumable`, the newest that has a `state_path`.

        Raises:
            CheckpointLedgerError: As `entries`.

        **Cancellation:** leaves nothing behind.
        """
        entries = await self.entries()
        return next((entry for entry in reversed(entries) if entry.state_path or not resumable), None)

    def _parsed(self, line: bytes, number: int) -> CheckpointEntry:
        try:
            return _entry(line)
        except ValueError as error:
            raise CheckpointLedgerError(
                f"{self.path}, line {number}, is broken: {error}; mend or remove that line by hand"
            ) from error

    def _append(self, line: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, self.path.open("a+b", buffering=0) as file:
            start = self._end_of_whole_lines(file)
            try:
                _write_all(file, line)
                os.fsync(file.fileno())
            except OSError:
                file.truncate(start)
                raise

    def _end_of_whole_lines(self, file: BinaryIO) -> int:
        """End the last line properly: one that lacks only its newline gets it, one that was torn is removed."""
        file.seek(0)
        content = file.read()
        start = content.rfind(b"\n") + 1
        last = content[start:]
        if not last:
            return len(content)
        try:
            _entry(last)
        except ValueError:
            logger.warning("%s: the last line was torn by a crash and is removed: %r", self.path, last)
            file.truncate(start)
            return start
        _write_all(file, b"\n")
        return len(content) + 1


def _write_all(file: BinaryIO, content: bytes) -> None:
    while content:
        content = content[file.write(content) :]


def _line(entry: CheckpointEntry) -> bytes:
    clash = sorted(set(_KEYS) & set(entry.extra))
    if clash:
        raise UsageError(f"the extra keys of checkpoint {entry.name!r} repeat {clash}, which are fields of the entry")
    own = {key: getattr(entry, key) for key in _KEYS}
    known = {key: value for key, value in own.items() if value is not None}
    try:
        return json.dumps({**known, **entry.extra}, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise UsageError(f"checkpoint {entry.name!r} cannot be written as JSON: {error}") from error


def _entry(line: bytes) -> CheckpointEntry:
    """Read a line.

    Raises:
        ValueError: It is not the JSON of an entry.
    """
    parsed: object = json.loads(line.decode())
    if not isinstance(parsed, dict):
        raise ValueError("it is not a JSON object")
    values = cast("dict[str, Any]", parsed)
    known = {key: values[key] for key in _KEYS if values.get(key) is not None}
    known.setdefault("step", 0)
    for key, value in known.items():
        wanted = int if key in ("step", "data_consumed") else str
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ValueError(f"{key!r} is {value!r}")
    if "name" not in known:
        raise ValueError("it has no 'name'")
    return CheckpointEntry(**known, extra={key: value for key, value in values.items() if key not in _KEYS})
