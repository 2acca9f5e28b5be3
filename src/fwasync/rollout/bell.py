"""A bell: wakes whoever waits for something to change."""

from __future__ import annotations

import anyio

__all__ = ("Bell",)


class Bell:
    """Wakes everyone who waits at that moment; they look for themselves at what has changed."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def ring(self) -> None:
        """Wake them."""
        self._event.set()
        self._event = anyio.Event()

    async def wait(self) -> None:
        """Wait for the next ring."""
        await self._event.wait()
