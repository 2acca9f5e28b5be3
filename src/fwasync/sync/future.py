"""`SyncFuture`: an operation that was submitted, to be asked for its result from a thread."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio

from fwasync.errors import OperationTimeoutError
from fwasync.sync.portal import Lease

if TYPE_CHECKING:
    from fwasync.training.future import APIFuture
    from fwasync.training.operation import State

__all__ = ("SyncFuture", "for_threads")

T = TypeVar("T")

_UNSET: Any = object()
_DECIDED = ("done", "failed", "withdrawn")


class SyncFuture(Generic[T]):
    """The blocking twin of `APIFuture`. Any thread may use it, and may still read a result that is known when the
    client was closed.

    Ctrl-C while `result` waits withdraws an operation that is still queued; one that was sent will take effect.
    """

    def __init__(self, future: APIFuture[T], lease: Lease[Any]) -> None:
        self._future = future
        self._lease = lease
        self._waiting = 0

    def __repr__(self) -> str:
        return repr(self._future).replace("APIFuture", "SyncFuture", 1)

    def result(self, timeout: float | None = _UNSET) -> T:
        """Wait for the result; the errors are those of `APIFuture.result`.

        Args:
            timeout: Seconds this wait may take; `None` is without a limit. Unset is the verb's own `timeout`. When they
                are over the operation goes on, even if it is still queued, and can be asked for its result again.
        """
        lease = self._lease
        if not lease.open and self.state in _DECIDED:
            lease = Lease(nullcontext())  # what is known can be told without the client, though not without a loop
        try:
            return lease.run(self._result, timeout)
        except OperationTimeoutError as error:
            raise for_threads(error, self) from None
        except (KeyboardInterrupt, SystemExit):
            # Here and not where the wait was cancelled: it may not have begun.
            if self._waiting == 0:
                self.cancel()
            raise
        finally:
            if lease is not self._lease:
                lease.close()

    def cancel(self) -> bool:
        """Withdraw the operation if it is still queued; says whether that was possible."""
        return self._lease.open and self._lease.call(self._future.cancel)

    @property
    def state(self) -> State:
        """`queued`, `admitting` (being sent), `admitted` (the service has it), `done`, `failed`, `withdrawn`."""
        return self._future.state

    @property
    def request_id(self) -> str | None:
        """The service's id of the operation (of its last request, where it took several)."""
        return self._future.request_id

    @property
    def took_effect(self) -> bool | None:
        """Whether the service applied it or will; `None` while that is open or cannot be known."""
        return self._future.took_effect

    async def _result(self, timeout: float | None) -> T:
        """As `APIFuture.result`, but the end of a `timeout` does not withdraw what is queued: the caller still holds
        the future, and may come back.
        """
        if self.state in _DECIDED:
            return await self._future.result(None)
        operation = self._future._operation  # pyright: ignore[reportPrivateUsage]  # the future does not tell of its admission
        limit = operation.timeout if timeout is _UNSET else timeout
        started = anyio.current_time()
        with anyio.move_on_after(limit) as scope:
            self._waiting += 1
            try:
                await operation.admitted()
            finally:
                self._waiting -= 1
        waited = anyio.current_time() - started
        if scope.cancelled_caught:
            raise OperationTimeoutError(
                f"{operation.verb} has no result after {waited:.1f} s: {operation.state}; it keeps its place, and can "
                "be asked for its result again",
                request_id=self.request_id,
            )
        return await self._future.result(None if limit is None else limit - waited)


def for_threads(error: OperationTimeoutError, future: SyncFuture[Any]) -> OperationTimeoutError:
    """The same error for a caller who cannot await: it carries the blocking future."""
    return OperationTimeoutError(
        str(error),
        future=future,  # pyright: ignore[reportArgumentType]  # the twin of what is annotated there
        request_id=error.request_id,
    )
