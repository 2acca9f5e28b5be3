"""Files that are whole at every moment: lines added at the end, and texts that replace each other.

Everything here blocks and is called in worker threads; all failures are `OSError`.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

__all__ = ("LineFile", "write_atomically")


class LineFile:
    """Lines that wait in memory until `drain` adds them to an existing file.

    `add` never blocks. `drain` may be called from several threads at once; lines keep the order of `add`.
    When writing fails, what was not written waits for the next `drain`, which goes on at the very byte where
    the last one stopped: a line that was cut off by a full disk becomes whole once there is room again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: deque[bytes] = deque()
        self._unwritten = b""
        self._lock = threading.Lock()

    def add(self, line: bytes) -> None:
        """Add a line, which ends in a newline."""
        self._lines.append(line)

    def drain(self, sync: bool = False) -> None:
        """Write what was added before this call; `sync` also waits for the disk.

        The file is opened anew each time and not created, so that its removal is noticed.
        """
        with self._lock:
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            self._unwritten += b"".join(lines)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                while self._unwritten:
                    written = os.write(descriptor, self._unwritten)
                    self._unwritten = self._unwritten[written:]
                if sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def keep(self, wanted: Callable[[bytes], bool]) -> None:
        """Write what was added, then leave out the lines that are not wanted, all at once."""
        self.drain()
        with self._lock:
            lines = self.path.read_bytes().splitlines(keepends=True)
            write_atomically(self.path, b"".join(line for line in lines if wanted(line)).decode())


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, finds the old one or the new one and nothing between.

    Characters that UTF-8 cannot express (lone surrogates) are written as escapes.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
