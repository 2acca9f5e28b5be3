"""Records of resources, each in a JSON file of its own below the data directory.

Invariants
    * A file that has its final name is complete: it is written beside and renamed.
    * What was put is on disk when `put` returns, so it survives the death of the process.
    * Used on the event loop's thread only; the files are a few hundred bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from fwasync.local.data_dir import DataDirError

__all__ = ("Record", "Shelf")


class Record(msgspec.Struct, kw_only=True):
    """What every record has: its id, and when it was made (seconds since the epoch)."""

    id: str
    created: float


R = TypeVar("R", bound=Record)


class Shelf(Generic[R]):
    """The records of one kind, oldest first.

    Args:
        directory: Where the files are; made when something is put.
        type_: What a record is.

    Raises:
        DataDirError: A file there cannot be read.
    """

    def __init__(self, directory: Path, type_: type[R]) -> None:
        self._directory = directory
        found: list[R] = []
        for file in sorted(directory.glob("*.json")):
            try:
                found.append(msgspec.json.decode(file.read_bytes(), type=type_))
            except (OSError, msgspec.MsgspecError) as error:
                raise DataDirError(f"{file} cannot be read: {error}") from None
        found.sort(key=lambda record: record.created)
        self._records = {record.id: record for record in found}

    def find(self, name: str) -> R | None:
        """The record of that id."""
        return self._records.get(name)

    def all(self) -> list[R]:
        """All records, oldest first."""
        return list(self._records.values())

    def put(self, record: R) -> None:
        """Write a record, new or changed."""
        self._directory.mkdir(parents=True, exist_ok=True)
        new = self._directory / f".{record.id}.new"
        new.write_bytes(msgspec.json.encode(record))
        new.replace(self._file(record.id))
        self._records[record.id] = record

    def remove(self, record: R) -> None:
        """Forget a record, as if it had never been."""
        self._file(record.id).unlink(missing_ok=True)
        del self._records[record.id]

    def _file(self, name: str) -> Path:
        return self._directory / f"{name}.json"
