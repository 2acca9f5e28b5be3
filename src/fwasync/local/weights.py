"""Checkpoints and snapshots on disk.

Invariants
    * A directory that has its final name is complete: it is written under a temporary name, its
      files are synced, and then it is renamed.
    * Names from the network never become a path without having matched a pattern.
    * The time of a directory is when it was written; notes that change later leave it alone.
    * Unnamed snapshots belong to a running process; they are gone after a restart.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

from safetensors import SafetensorError

__all__ = ("NameTaken", "Saved", "WeightStore", "WeightsPath", "check_name")

Kind = Literal["weights", "sampler_weights"]

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_MODEL = r"[A-Za-z0-9_-]+(?::[A-Za-z0-9_-]+)*"
_NOTES = "notes.json"
_PATH = re.compile(rf"tinker://({_MODEL})/(weights|sampler_weights)/({_NAME})")


class NameTaken(Exception):
    """There is already something of that name."""


def check_name(name: str) -> str:
    """The name itself.

    Raises:
        ValueError: It cannot name a checkpoint.
    """
    if re.fullmatch(_NAME, name) is None:
        raise ValueError(
            f"{name!r} cannot name a checkpoint: use at most 128 letters, digits, '.', '_' and '-', "
            "and start with a letter or digit"
        )
    return name


@dataclass(frozen=True, slots=True)
class WeightsPath:
    """`tinker://<model_id>/weights/<name>` or `…/sampler_weights/<name>`."""

    model_id: str
    kind: Kind
    name: str

    @classmethod
    def parse(cls, text: str) -> WeightsPath:
        """Read a path.

        Raises:
            ValueError: It is not one.
        """
        match = _PATH.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not a path of this service: it should look like "
                "tinker://<model_id>/weights/<name> or tinker://<model_id>/sampler_weights/<name>"
            )
        return cls(match[1], cast("Kind", match[2]), match[3])

    def __str__(self) -> str:
        return f"tinker://{self.model_id}/{self.kind}/{self.name}"


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint or snapshot that is there: where, since when (UTC), how large, and what was noted beside it."""

    path: WeightsPath
    directory: Path
    time: datetime
    size_bytes: int
    notes: Mapping[str, Any]


class WeightStore:
    """The checkpoints and snapshots below one data directory. Its methods block."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._unnamed = root / "unnamed"

    def clean(self) -> None:
        """Remove what an earlier process left half done, and its unnamed snapshots."""
        shutil.rmtree(self._unnamed, ignore_errors=True)
        for kind in ("weights", "sampler_weights"):
            for leftover in (self._root / kind).glob("*/.old-*"):
                # An overwrite was cut short between its two renames: the old one still counts.
                target = leftover.parent / leftover.name.removeprefix(".old-")
                if not target.exists():
                    leftover.rename(target)
            for leftover in (self._root / kind).glob("*/.*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def directory(self, path: WeightsPath) -> Path:
        """Where a checkpoint or snapshot is or would be."""
        # A colon is not allowed in names everywhere.
        return self._root / path.kind / path.model_id.replace(":", "~") / path.name

    def unnamed(self) -> Path:
        """A new place for an unnamed snapshot."""
        return self._unnamed / secrets.token_hex(8)

    def remove(self, directory: Path) -> None:
        """Remove an unnamed snapshot, if it is there."""
        if directory.parent != self._unnamed:
            raise ValueError(f"{directory} is not an unnamed snapshot")
        shutil.rmtree(directory, ignore_errors=True)

    def checkpoint_names(self) -> list[str]:
        """The names of all resumable checkpoints, oldest first."""
        found = [entry for entry in (self._root / "weights").glob("*/[!.]*") if entry.is_dir()]
        found.sort(key=lambda entry: (entry.stat().st_mtime_ns, entry.name))
        return list(dict.fromkeys(entry.name for entry in found))

    def saved(self) -> list[Saved]:
        """All named checkpoints and snapshots, newest first."""
        found: list[Saved] = []
        for kind in ("weights", "sampler_weights"):
            for directory in (self._root / kind).glob("*/[!.]*"):
                path = WeightsPath(directory.parent.name.replace("~", ":"), kind, directory.name)
                try:
                    written = datetime.fromtimestamp(directory.stat().st_mtime_ns / 1e9, UTC)
                    size = sum(entry.stat().st_size for entry in directory.iterdir())
                    found.append(Saved(path, directory, written, size, _read_notes(directory)))
                except OSError:
                    continue  # it was removed or overwritten just now
        return sorted(found, key=lambda entry: (entry.time, str(entry.path)), reverse=True)

    def note(self, path: WeightsPath, name: str, value: object) -> None:
        """Change what is noted beside a checkpoint or snapshot.

        Raises:
            FileNotFoundError: It is not there.
        """
        directory = self.directory(path)
        before = directory.stat()
        new = directory / ".notes"
        new.write_text(json.dumps({**_read_notes(directory), name: value}) + "\n", encoding="utf-8")
        new.replace(directory / _NOTES)
        os.utime(directory, ns=(before.st_atime_ns, before.st_mtime_ns))

    def delete(self, path: WeightsPath) -> None:
        """Remove a checkpoint or snapshot.

        Raises:
            FileNotFoundError: It is not there.
        """
        directory = self.directory(path)
        dying = directory.parent / f".dying-{secrets.token_hex(4)}"
        directory.rename(dying)
        shutil.rmtree(dying, ignore_errors=True)

    def write(
        self,
        target: Path,
        fill: Callable[[Path], None],
        notes: Mapping[str, object],
        *,
        overwrite: bool = False,
    ) -> None:
        """Write a directory as a whole or not at all.

        Args:
            target: Its final place.
            fill: Writes into a directory that exists and is empty.
            notes: What else is to be known of it; written beside as `notes.json`, `None` left out.
            overwrite: Whether it may take the place of one of the same name.

        Raises:
            NameTaken: The place is taken.
            OSError: It could not be written; nothing is left of it.
        """
        if target.exists() and not overwrite:
            raise NameTaken(target.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f".new-{target.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            fill(temporary)
            told = {name: value for name, value in notes.items() if value is not None}
            (temporary / _NOTES).write_text(json.dumps(told) + "\n", encoding="utf-8")
            for entry in temporary.iterdir():
                _sync(entry)
            now = time.time_ns()  # the file system's own clock may stand still for some milliseconds
            os.utime(temporary, ns=(now, now))
            _sync(temporary)
            self._move_in(temporary, target)
        except SafetensorError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(0, str(error)) from error
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _move_in(self, temporary: Path, target: Path) -> None:
        old = target.parent / f".old-{target.name}"
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        _sync(target.parent)
        shutil.rmtree(old, ignore_errors=True)


def _read_notes(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / _NOTES).read_bytes())
    except FileNotFoundError:
        return {}


def _sync(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return  # directories cannot be opened there
    descriptor = os.open(path, os.O_RDWR if path.is_file() and sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
