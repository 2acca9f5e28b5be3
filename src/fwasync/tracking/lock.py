"""`DirectoryLock`: one run at a time uses a directory.

Invariants
    * The operating system lets go of the lock when its process dies, however: a file that is left behind locks nothing.
    * Who holds it can be told: the file names process, machine and time.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path

from fwasync.errors import RunDirectoryError

__all__ = ("LOCK_FILE", "DirectoryLock")

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"

_HELD = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK)

if sys.platform == "win32":
    import msvcrt

    _BEYOND = 1 << 20  # a locked byte cannot be read there, so it is none of those that name the holder

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, _BEYOND, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class DirectoryLock:
    """A lock on a directory. Its methods block.

    Args:
        directory: It has to exist when the lock is taken.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock. On a file system that knows no locks, there is none; that is logged.

        Raises:
            RunDirectoryError: Another run has it; the text says who.
            OSError: The directory cannot be written.
        """
        path = self._directory / LOCK_FILE
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno in _HELD:
                os.close(descriptor)
                raise self._in_use() from None
            logger.warning("%s cannot be locked (%s): see to it that no other run uses it", self._directory, error)
        self._descriptor = descriptor
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now(UTC).isoformat("T", "seconds"),
        }
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(holder).encode() + b"\n")

    def check(self) -> None:
        """Look whether a run could take the lock; nothing is made or changed.

        Raises:
            RunDirectoryError: Another run has it, or there cannot be such a directory.
        """
        nearest = next(path for path in (self._directory, *self._directory.absolute().parents) if os.path.lexists(path))
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            what = "cannot be written" if nearest.is_dir() else "is no directory"
            raise RunDirectoryError(f"cannot make a run in {self._directory}: {nearest} {what}")
        try:
            descriptor = os.open(self._directory / LOCK_FILE, os.O_RDWR)
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunDirectoryError(f"cannot make a run in {self._directory}: {error.strerror or error}") from None
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno in _HELD:
                raise self._in_use() from None
        finally:
            os.close(descriptor)

    def _in_use(self) -> RunDirectoryError:
        holder = _holder(self._directory / LOCK_FILE)
        return RunDirectoryError(
            f"{self._directory} is in use by {holder}; let that run end, or choose another log_path"
        )

    def release(self) -> None:
        """Let go of it, if it was taken. The file stays: to remove it could take it from the next one."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"  # it has taken the lock, and not said its name yet
