"""Our own connections to one service: any number of them, the one that was used last is used first.

Who sends many requests limits them before they get here. There is nothing to wait for but the network, so nothing that
a cancelled request could leave locked.

Invariants
    * A connection is either lent to one request or idle in the pool, and closed in every other case.
    * All connections are of one event loop, that of the first request; requests from another are refused.
    * Nothing runs in the background; the one timer, that closes what is idle for too long, ends with the pool.
"""

from __future__ import annotations

import asyncio
import selectors
import ssl
from collections.abc import Mapping

import anyio

from fwasync._http.carrier import Body, Unanswered
from fwasync._http.connection import Connection
from fwasync._http.dial import Dialer
from fwasync._http.heads import Heads
from fwasync._http.incoming import Incoming
from fwasync.errors import ClosedError, UsageError

__all__ = ("Pool",)

_SURELY_OPEN_S = 1.0  # no service closes an idle connection sooner
_MOST_TURNS = 20  # of the loop, in which sockets are closed


class Pool:
    """A `carrier.Carrier` with connections of its own. It opens nothing before its first request.

    Args:
        host: A name or an IP address.
        port: Its port.
        heads: Makes the heads of requests.
        tls: What is trusted; `None` for plain http.
    """

    def __init__(self, host: str, port: int, heads: Heads, tls: ssl.SSLContext | None = None) -> None:
        self._host, self._port = host, port
        self._heads = heads
        self._tls = tls
        self._dialer = Dialer(host, port)
        self._connecting: set[anyio.CancelScope] = set()
        self._open: set[Connection] = set()
        self._idle: dict[Connection, float] = {}  # since when; the newest is last
        self._sweeping: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False

    async def send(self, method: str, path: str, headers: Mapping[str, str], body: Body, deadline: float) -> Incoming:
        """Send a request once, until the head of its answer has come; see `carrier.Carrier`."""
        self._require_this_loop()
        size = sum(map(len, body))
        head = self._heads.head(method, path, headers, size)
        connection = self._reused() or await self._connect(deadline)
        incoming = connection.lend(answers_head=method == "HEAD")
        await incoming.send(head, body, size, deadline)
        return incoming

    async def aclose(self) -> None:
        """Close all sockets, also those that are being connected. What takes no waiting is not waited for."""
        self._is_closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        for scope in self._connecting:
            scope.cancel()
        for connection in tuple(self._open):
            connection.abort()
        for _ in range(_MOST_TURNS):
            if not (self._open or self._connecting):
                return
            await asyncio.sleep(0)

    # -- a connection

    def _reused(self) -> Connection | None:
        self._require_open()
        if not self._idle:
            return None
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection, since = self._idle.popitem()
            if now < connection.expires and (now - since < _SURELY_OPEN_S or not _is_readable(connection.fileno)):
                return connection
            connection.abort()
        return None

    async def _connect(self, deadline: float) -> Connection:
        where = f"{self._host}:{self._port}"
        scope = anyio.CancelScope(deadline=deadline)
        self._connecting.add(scope)
        try:
            with scope:
                return await self._connected()
        except (OSError, UnicodeError) as error:  # a name may be none
            raise Unanswered(f"cannot connect to {where}: {error or type(error).__name__}", connected=False) from error
        finally:
            self._connecting.discard(scope)
        self._require_open()
        raise Unanswered(f"no connection to {where} in time", connected=False)

    async def _connected(self) -> Connection:
        loop = asyncio.get_running_loop()
        sock = await self._dialer.dial()
        connection = Connection(self)
        self._open.add(connection)
        try:
            plain, _ = await loop.create_connection(lambda: connection, sock=sock)
            if self._tls is not None:
                # In two steps: a handshake that is cancelled as it begins would leave the socket open otherwise.
                secure = await loop.start_tls(plain, connection, self._tls, server_hostname=self._host)
                if secure is None:
                    raise OSError("the connection was closed in the TLS handshake")
                connection.connection_made(secure)
            self._require_open()
        except BaseException:
            connection.abort()
            self._open.discard(connection)
            raise
        return connection

    def _require_open(self) -> None:
        if self._is_closed:
            raise ClosedError(f"the connections to {self._host} are closed: a client is entered once, make another one")

    def _require_this_loop(self) -> None:
        # What comes on a connection would wake a loop that does not run, or runs elsewhere.
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise UsageError(
                f"the connections to {self._host} belong to another event loop, on which this client was used first; "
                "make a client on each loop, inside of what `asyncio.run` runs"
            )

    # -- what connections tell

    def idle(self, connection: Connection, for_s: float) -> None:
        """Keep a connection for another exchange."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        connection.expires = now + for_s
        self._idle[connection] = now
        if self._sweeping is None:
            self._sweeping = loop.call_at(connection.expires, self._sweep)

    def useless(self, connection: Connection) -> None:
        """Keep a connection no longer."""
        self._idle.pop(connection, None)

    def closed(self, connection: Connection) -> None:
        """Forget a connection."""
        self._open.discard(connection)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in tuple(self._idle):
            if connection.expires <= now:
                connection.abort()
        self._sweeping = None
        if self._idle:
            self._sweeping = loop.call_at(min(each.expires for each in self._idle), self._sweep)


def _is_readable(fileno: int) -> bool:
    """Whether something has come over a connection on which nothing should: mostly its end."""
    if fileno < 0:
        return True
    with selectors.DefaultSelector() as selector:
        selector.register(fileno, selectors.EVENT_READ)
        return bool(selector.select(0))
