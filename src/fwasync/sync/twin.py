"""What the blocking twins share: an async client that a lease holds open, and iterators of what it lists."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, ParamSpec, Self, TypeVar

from fwasync.errors import ClosedError, UsageError
from fwasync.sync.portal import Lease

__all__ = ("OpenTwin", "Twin", "iterate")

C = TypeVar("C", bound=AbstractAsyncContextManager[Any])
P = ParamSpec("P")
R = TypeVar("R")

_END: Any = object()


class Twin(Generic[C]):
    """A context manager around an async client.

    Args:
        client: The async client, not entered yet.
    """

    def __init__(self, client: C) -> None:
        self._client = client
        self._held: Lease[Any] | None = None

    def __repr__(self) -> str:
        return repr(self._client).replace(type(self._client).__name__, type(self).__name__, 1)

    def close(self) -> None:
        """Leave the client before its block ends, as the end of the block would. May be called again."""
        if self._held is not None:
            self._held.close()

    def __enter__(self) -> Self:
        if self._held is not None:
            raise UsageError(f"a {type(self).__name__} is entered once; create another one")
        try:
            self._held = Lease(self._client)
            return self
        except BaseException as error:  # also between the two
            self.__exit__(type(error), error, None)
            raise

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._held is not None:
            self._held.close(exc)

    @property
    def _lease(self) -> Lease[Any]:
        if self._held is None:
            raise ClosedError(f"the {type(self).__name__} is not open: use it as `with ... as client:`")
        return self._held


class OpenTwin(Twin[C]):
    """A twin that is open as soon as it is made, for recipes without `with`.

    Use it in a `with` block, or `close()` it. One that is forgotten is closed when its last reference goes, or when the
    interpreter ends.

    Args:
        opened: What to enter, which gives the client; or a twin to share the client of, which is not closed from here.
    """

    def __init__(self, opened: AbstractAsyncContextManager[C] | OpenTwin[C]) -> None:
        self._is_owner = not isinstance(opened, OpenTwin)
        lease: Lease[C] = opened._lease if isinstance(opened, OpenTwin) else Lease(opened)
        super().__init__(lease.value)
        self._held = lease

    def close(self) -> None:
        """Leave the client, if it is not that of another. May be called again."""
        if self._is_owner:
            super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._is_owner:
            super().__exit__(exc_type, exc, tb)


def iterate(
    lease: Lease[Any], listing: Callable[P, AsyncGenerator[R, None]], *args: P.args, **kwargs: P.kwargs
) -> Iterator[R]:
    """The rows of an async generator, each awaited on the loop when it is asked for.

    One that is not read to its end is closed by the loop, which asyncio sees to.
    """
    rows = listing(*args, **kwargs)

    async def following() -> R:
        return await anext(rows, _END)

    following.__qualname__ = getattr(listing, "__qualname__", "")
    while (row := lease.run(following)) is not _END:
        yield row
