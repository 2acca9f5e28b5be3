"""Long work on the event loop, in slices.

Encoders hold the interpreter's lock, so a worker thread would not protect the loop from them; doing a
millisecond of work and yielding does.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TypeVar

import anyio.lowlevel

__all__ = ("in_slices",)

T = TypeVar("T")

_SLICE_S = 0.001


async def in_slices(items: Iterable[T]) -> list[T]:
    """All items of a lazily computed iterable; other tasks run after each millisecond of work."""
    done: list[T] = []
    slice_end = time.perf_counter() + _SLICE_S
    for item in items:
        done.append(item)
        if time.perf_counter() >= slice_end:
            await anyio.lowlevel.checkpoint()
            slice_end = time.perf_counter() + _SLICE_S
    return done
