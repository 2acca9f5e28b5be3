"""What the blocking twins share: an async client that a lease holds open, between `with` and its end."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from fwasync.errors import ClosedError, UsageError
from fwasync.sync.portal import Lease

__all__ = ("Twin",)

C = TypeVar("C", bound=AbstractAsyncContextManager[Any])


class Twin(Generic[C]):
    """A context manager around an async client.

    Args:
        client: The async client, not entered yet.
    """

    def __init__(self, client: C) -> None:
        self._client = client
        self._held: Lease[Any] | None = None

    def __repr__(self) -> str:
        return repr(self._client).replace("<Async", "<", 1)

    def close(self) -> None:
        """Leave the client before its block ends, as the end of the block would. May be called again."""
        if self._held is not None:
            self._held.close()

    def __enter__(self) -> Self:
        if self._held is not None:
            raise UsageError(f"a {type(self).__name__} is entered once; create another one")
        self._held = Lease(self._client)
        return self

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
