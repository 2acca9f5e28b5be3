"""The data directory: who uses it, and the key to its service.

Invariants
    * One live service per directory; the operating system lets go of the lock when a process dies, however.
    * The key's file can be read by its owner only.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

__all__ = ("KEY_VARIABLE", "DataDirError", "api_key_of", "claim", "read_key")

KEY_VARIABLE = "FWASYNC_LOCAL_API_KEY"

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class DataDirError(Exception):
    """The directory cannot be used; the message says why."""


def claim(root: Path) -> int:
    """Make the directory if need be and lock it. The lock lasts as long as the returned descriptor.

    Raises:
        DataDirError: It cannot be written, or a live service has it.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise DataDirError(f"the data directory {root} cannot be written: {error.strerror}") from None
    try:
        _lock(descriptor)
    except OSError:
        os.close(descriptor)
        raise DataDirError(
            f"the data directory {root} is in use by another service: stop that one or choose another directory"
        ) from None
    return descriptor


def read_key(root: Path) -> str | None:
    """The key in the directory, if there is one."""
    try:
        return (root / "api_key").read_text(encoding="ascii").strip() or None
    except FileNotFoundError:
        return None


def api_key_of(root: Path) -> str:
    """The key of the service: from the environment, else from the directory, else a new one put there.

    Raises:
        DataDirError: It cannot be read or written.
    """
    key = os.environ.get(KEY_VARIABLE)
    if key:
        return key
    try:
        key = read_key(root)
        if key is None:
            key = f"tml-{secrets.token_urlsafe(24)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            with os.fdopen(os.open(root / "api_key", flags, 0o600), "w", encoding="ascii") as file:
                file.write(key + "\n")
    except (OSError, UnicodeError) as error:
        raise DataDirError(f"the key in {root} cannot be read or written: {error}") from None
    return key
