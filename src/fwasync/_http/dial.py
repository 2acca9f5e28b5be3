"""Opening sockets to one host: its addresses are asked for once for many connections, and tried in a race.

Invariants
    * Nothing runs on after a call that ended, but the system's own look-up of a name in its thread.
    * A socket that is not returned is closed.
"""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from typing import TypeAlias

import anyio

__all__ = ("Dialer",)

_FRESH_S = 10.0
_HEAD_START_S = 0.25  # of an address before the next one, as RFC 8305 has it

_Address: TypeAlias = tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]]
_Info: TypeAlias = tuple[
    socket.AddressFamily,
    socket.SocketKind,
    int,
    str,
    tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes],
]


class Dialer:
    """Opens sockets to one host and port.

    Addresses are believed for ten seconds, and the one that answered first comes first the next time.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._addresses: list[_Address] = []
        self._stale_at = 0.0
        self._asking: asyncio.Future[list[_Info]] | None = None

    async def dial(self) -> socket.socket:
        """A socket that is connected, and does not block.

        Raises:
            OSError: No address answers, or the name has none.

        **Cancellation:** every socket is closed.
        """
        addresses = await self._resolve()
        try:
            if len(addresses) == 1:
                return await _open(addresses[0])
            opened, address = await _race(addresses)
        except OSError:
            self._stale_at = 0.0
            raise
        if addresses[0] != address and address in addresses:
            addresses.remove(address)
            addresses.insert(0, address)
        return opened

    async def _resolve(self) -> list[_Address]:
        loop = asyncio.get_running_loop()
        if loop.time() < self._stale_at:
            return self._addresses
        if self._asking is None:
            ask = partial(socket.getaddrinfo, self._host, self._port, type=socket.SOCK_STREAM)
            try:
                self._found(ask(flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV), loop)
                return self._addresses
            except OSError:  # it is a name
                self._asking = loop.run_in_executor(None, ask)
                self._asking.add_done_callback(partial(self._answered, loop=loop))
        await asyncio.shield(self._asking)  # others wait for it too
        return self._addresses

    def _answered(self, asking: asyncio.Future[list[_Info]], *, loop: asyncio.AbstractEventLoop) -> None:
        self._asking = None
        if not asking.cancelled() and asking.exception() is None:
            self._found(asking.result(), loop)

    def _found(self, infos: list[_Info], loop: asyncio.AbstractEventLoop) -> None:
        self._addresses = [(info[0], info[4]) for info in infos]
        self._stale_at = loop.time() + _FRESH_S


async def _race(addresses: list[_Address]) -> tuple[socket.socket, _Address]:
    """The first of several that answers. Each begins a little after the one before, or when that has failed."""
    won: list[tuple[socket.socket, _Address]] = []
    failures: list[OSError] = []

    async def run(address: _Address, failed: anyio.Event) -> None:
        try:
            opened = await _open(address)
        except OSError as error:
            failures.append(error)
            failed.set()
            return
        won.append((opened, address))
        group.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as group:
            for address in tuple(addresses):
                failed = anyio.Event()
                group.start_soon(run, address, failed)
                with anyio.move_on_after(_HEAD_START_S):
                    await failed.wait()
    except BaseException:
        for opened, _ in won:
            opened.close()
        raise
    for opened, _ in won[1:]:
        opened.close()
    if not won:
        raise failures[0] if failures else OSError("the name has no address")
    return won[0]


async def _open(address: _Address) -> socket.socket:
    opened = socket.socket(address[0], socket.SOCK_STREAM)
    try:
        opened.setblocking(False)
        # What is written goes out at once: otherwise the end of a request waits until its beginning is acknowledged.
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(opened, address[1])
    except BaseException:
        opened.close()
        raise
    return opened
