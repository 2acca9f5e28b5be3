"""`APIFuture`: what every verb of the training client returns."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any, Generic, TypeVar

import anyio

from fwasync.errors import OperationTimeoutError
from fwasync.training.operation import Operation, State

__all__ = ("APIFuture",)

T = TypeVar("T")

_UNSET: Any = object()


class APIFuture(Generic[T]):
    """The result of an operation that was submitted, to be awaited.

    It can be awaited many times and from several tasks, also after a wait was cancelled or timed out:

    ```python
    fb = client.forward_backward(batch)   # submitted, in this order
    opt = client.optim_step(adam)
    await fb
    await opt
    ```

    **Cancellation** of a wait ends that wait only. An operation that was still queued, and that nobody else
    waits for, is withdrawn: the service never sees it. One that was admitted will take effect; `state` tells.
    """

    def __init__(self, operation: Operation[T]) -> None:
        self._operation = operation

    def __await__(self) -> Generator[Any, Any, T]:
        return self.result().__await__()

    async def result(self, timeout: float | None = _UNSET) -> T:
        """Wait for the result.

        Args:
            timeout: Seconds this wait may take; `None` is without a limit. Unset is the verb's own `timeout`. A result
                that is here is returned whatever the time.

        Raises:
            OperationTimeoutError: The time is up. The operation is untouched by that and can be awaited
                again, unless it was still queued and nobody else waits for it: then it is withdrawn.
            OperationFailedError: The service ran it and it failed.
            OperationWithdrawnError: It was withdrawn before it was sent.
            ResultLostError: The service no longer knows the result.
            SequenceBrokenError: An earlier operation left the order of this client in doubt.
            ServiceError: The service refused it.
            TransportError: The service could not be asked for longer than the retry budget.

        **Cancellation:** see the class.
        """
        operation = self._operation
        if operation.decided:
            return await operation.wait()
        limit: float | None = operation.timeout if timeout is _UNSET else timeout
        started = _now()
        with anyio.move_on_after(limit) as scope:
            return await operation.wait()
        assert scope.cancelled_caught
        raise OperationTimeoutError(
            f"{operation.verb} has no result after {_now() - started:.1f} s: {operation.story()}{_later(operation)}",
            future=self,
            request_id=self.request_id,
        )

    def cancel(self) -> bool:
        """Withdraw the operation if it is still queued; says whether that was possible.

        An operation that was already sent cannot be taken back: no trainer service offers that.
        """
        return self._operation.withdraw()

    @property
    def state(self) -> State:
        """`queued`, `admitting` (being sent), `admitted` (the service has it), `done`, `failed`, `withdrawn`."""
        return self._operation.state

    @property
    def request_id(self) -> str | None:
        """The service's id of the operation (of its last request, where it took several)."""
        ids = self._operation.request_ids
        return ids[-1] if ids else None

    @property
    def took_effect(self) -> bool | None:
        """Whether the service applied it or will; `None` while that is open or cannot be known."""
        return self._operation.took_effect

    def __repr__(self) -> str:
        request = "" if self.request_id is None else f" request_id={self.request_id}"
        return f"<APIFuture {self._operation.verb} {self._operation.state} took_effect={self.took_effect}{request}>"


def _later(operation: Operation[Any]) -> str:
    return ", it will take effect; await the future again for its result" if operation.state == "admitted" else ""


def _now() -> float:
    return asyncio.get_running_loop().time()
