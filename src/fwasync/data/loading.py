"""Files of data without stalling the event loop: rows are read and tokenized in a worker thread, a slice at a time.

Invariants
    * Between two slices the loop hears how far it is, and can stop it: nothing goes on behind a caller's back.
    * What is at a URL is downloaded to a temporary file first, which is gone when the reading ends.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import anyio.to_thread

from fwasync._http.download import download, without_query
from fwasync._http.retry import RetryPolicy
from fwasync.data.jsonl import JsonLines

__all__ = ("OnProgress", "Progress", "open_lines", "source_name", "take_all")

T = TypeVar("T")

_SLICE_S = 0.05
_RETRY = RetryPolicy(budget_s=60.0)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the reading of a file is: its line, and bytes of all its bytes."""

    line: int
    bytes_read: int
    bytes_total: int


OnProgress = Callable[[Progress], None]
"""Called on the event loop, a few times a second."""


def source_name(source: str | Path) -> str:
    """What a source is called: its path, or its URL without the query, which may be a secret of a signed URL."""
    return without_query(str(source)) if _is_url(source) else str(source)


def _is_url(source: str | Path) -> bool:
    return not isinstance(source, Path) and source.startswith(("http://", "https://"))


@asynccontextmanager
async def open_lines(source: str | Path, *, max_rows: int | None = None) -> AsyncGenerator[JsonLines]:
    """The rows of a file, or of an http(s) URL.

    Args:
        source: A path, or a URL; it is tried for a minute if it must be, and an answer may take 30 seconds to go on.
        max_rows: Read so many rows at most.

    Raises:
        FwasyncError: The URL cannot be had; see `fwasync._http.download`.

    **Cancellation:** the download ends, and its file is removed.
    """
    if not _is_url(source):
        yield JsonLines(source, max_rows=max_rows)
        return
    directory = await anyio.to_thread.run_sync(lambda: tempfile.TemporaryDirectory(prefix="fwasync-data-"))
    try:
        path = Path(directory.name) / "data.jsonl"
        await download(str(source), path, retry=_RETRY)
        yield JsonLines(path, name=source_name(source), max_rows=max_rows)
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(directory.cleanup)


async def take_all(
    lines: JsonLines, items: Iterator[T], take: Callable[[T], None], on_progress: OnProgress | None = None
) -> None:
    """Draw all items, which are made of the lines of a file, and hand them to `take`; both in a worker thread.

    What they raise is passed on.

    **Cancellation:** the slice that is running, of some hundredths of a second and at least one item, ends first.
    """

    def slice_of_work() -> bool:
        end = time.perf_counter() + _SLICE_S
        for item in items:
            take(item)
            if time.perf_counter() >= end:
                return True
        return False

    while await anyio.to_thread.run_sync(slice_of_work):
        if on_progress is not None:
            on_progress(Progress(lines.line, lines.bytes_read, lines.bytes_total))
    if on_progress is not None:
        on_progress(Progress(lines.line, lines.bytes_read, lines.bytes_total))
