"""The lane: operations of one model, admitted one after the other in the order of the calls.

The number of a request (`seq_id`) is given when it is sent, so an operation that is withdrawn while it is
queued leaves no hole. Numbers start at 1 and go up by one with each acknowledged request.

**Rejected numbers.** A definite refusal of a request leaves open whether the service counted its number. The
next request is sent with that same number: a service that did not count it takes it, one that did says that
the number belongs to another request (409), and then the following number is right. Neither case can leave a
hole or apply anything twice. A 409 that may be about a name which is taken, and not about the number, refuses
that request only. Where a request was neither refused nor acknowledged, was turned away at the door (a key, a limit)
after an attempt that nobody answered, or a refusal came in the middle of an operation, no rule is safe, and the lane is
broken: all that is queued, and all that comes, fails with `SequenceBrokenError`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

import anyio

from fwasync._http.client import Answer
from fwasync._http.reading import read
from fwasync._http.retrieve import retrieve
from fwasync._http.session import Session
from fwasync._wire.codec import Codec
from fwasync._wire.futures import NotReady
from fwasync._wire.messages import Submitted
from fwasync.errors import (
    ClosedError,
    ConflictError,
    FwasyncError,
    SequenceBrokenError,
    ServiceError,
)
from fwasync.training.operation import EFFECT_UNKNOWN, AnyOperation

__all__ = ("Lane",)

# What a service says of a model it does not know, perhaps because its session is over.
_GONE = (404, 410)
_TOO_MANY = 429
# Refusals before anything looks at the number: of an earlier attempt that may have got further they say nothing.
_AT_THE_DOOR = (401, 403, _TOO_MANY)
_PARTS_AT_A_TIME = 8
_NAMING = ("save_weights", "save_weights_for_sampler")


class Lane:
    """The order of one model's operations, and their way to the service.

    Args:
        session: Where the model lives.
        model_id: The model.
    """

    def __init__(self, session: Session, model_id: str) -> None:
        self.model_id = model_id
        self._session = session
        self._queue: deque[AnyOperation] = deque()
        self._current: AnyOperation | None = None
        self._wakeup = asyncio.Event()
        self._next_number = 1
        self._number_in_doubt = False
        self._attempt_in_doubt = False
        self._broken: str | None = None
        self._closed = False
        self._scope = anyio.CancelScope(shield=True)

    @property
    def queued(self) -> int:
        """How many operations wait for their turn."""
        return len(self._queue)

    @property
    def admitting(self) -> int:
        """How many operations are being sent: one or none."""
        return int(self._current is not None)

    @property
    def last_number(self) -> int:
        """The number of the last acknowledged request; 0 before the first."""
        return self._next_number - 1

    @property
    def broken(self) -> bool:
        """Whether the order is in doubt."""
        return self._broken is not None

    def append(self, operation: AnyOperation) -> None:
        """Give an operation its place in the order.

        Raises:
            ClosedError: The client was left.
        """
        if self._closed:
            raise ClosedError(f"{operation.verb}: the training client is closed; submit inside its `async with` block")
        self._queue.append(operation)
        self._wakeup.set()

    async def run(self) -> None:
        """Admit operations until closed. Runs in the client's task group, shielded from the callers' cancellation."""
        with self._scope:
            while True:
                while self._queue:
                    await self._admit(self._queue.popleft())
                self._wakeup.clear()
                await self._wakeup.wait()

    async def _admit(self, operation: AnyOperation) -> None:
        if operation.state == "withdrawn":
            return
        if self._broken is not None:
            operation.fail(self._broken_error(operation.verb), took_effect=False)
            return
        self._current = operation
        await operation.admit(self)
        self._current = None

    async def aclose(self, *, grace_s: float) -> None:
        """Withdraw what is queued, let the admission in flight end within `grace_s` seconds, and stop."""
        self._closed = True
        while self._queue:
            self._queue.popleft().withdraw()
        try:
            await self._finish_admission(grace_s)
        finally:
            self._scope.cancel()

    async def _finish_admission(self, grace_s: float) -> None:
        current = self._current
        if current is None:
            return
        try:
            with anyio.move_on_after(grace_s, shield=True):
                await current.admitted()
        finally:
            if not current.decided and current.state == "admitting":
                told = "had no effect" if current.harmless else "may have taken effect"
                error = SequenceBrokenError(f"{current.verb} was still being sent when its client was left; it {told}")
                current.fail(error, took_effect=False if current.harmless else None)

    # -- what an operation uses while it has its turn ------------------------------------------

    async def send(
        self,
        path: str,
        bodies: Sequence[Callable[[int], list[bytes]]],
        *,
        content_type: str = "application/json",
        on_sent: Callable[[str | int], None],
    ) -> list[str | int]:
        """Send the requests of one operation until they are acknowledged, under consecutive numbers.

        The first goes alone; when it was accepted the others follow together, a few at a time: services put them in
        order by their numbers.

        Args:
            path: Below `/api/v1`.
            bodies: For each request what gives its body for a number.
            content_type: What the bodies are.
            on_sent: Told of each request id, as it is acknowledged.

        Returns:
            The request ids, in the order of the bodies.

        Raises:
            SequenceBrokenError: The order is in doubt from here on; what was sent may or may not have taken effect.
            ServiceError: The service refused the first; nothing was accepted, and the lane goes on.
            TransportError: No answer; the lane is broken from here on. So it is after a failure of the service
                itself (5xx), or an answer that cannot be read.
        """
        first, *rest = bodies
        request_ids = [await self._send_first(path, first, content_type)]
        on_sent(request_ids[0])
        if rest:
            request_ids += await self._send_rest(path, rest, content_type, on_sent)
        return request_ids

    async def _send_first(self, path: str, body: Callable[[int], list[bytes]], content_type: str) -> str | int:
        try:
            submitted = read(path, await self._send_numbered(path, body, content_type), Submitted)
        except EFFECT_UNKNOWN as error:
            self._broken = f"{path} was not acknowledged and may or may not have taken effect ({error})"
            raise
        except ServiceError as error:
            self._number_in_doubt = True
            if error.status in _GONE:
                await self._session.confirm()
            if self._attempt_in_doubt and error.status in _AT_THE_DOOR:
                self._broken = f"{path} was not answered at first, and then refused ({error}); it may have taken effect"
                raise self._broken_error(path) from error
            raise
        self._next_number += 1
        self._number_in_doubt = False
        return submitted.request_id

    async def _send_rest(
        self,
        path: str,
        bodies: Sequence[Callable[[int], list[bytes]]],
        content_type: str,
        on_sent: Callable[[str | int], None],
    ) -> list[str | int]:
        request_ids: list[str | int] = [""] * len(bodies)
        errors: list[Exception] = []
        limiter = anyio.CapacityLimiter(_PARTS_AT_A_TIME)
        first_number = self._next_number

        async def send(index: int) -> None:
            try:
                async with limiter:
                    body = bodies[index](first_number + index)
                    answer = await self._session.http.call("POST", path, body, content_type=content_type)
                request_ids[index] = read(path, answer, Submitted).request_id
                on_sent(request_ids[index])
            except FwasyncError as error:
                errors.append(error)

        async with anyio.create_task_group() as group:
            for index in range(len(bodies)):
                group.start_soon(send, index)
        if errors:
            self._broken = (
                f"{len(errors)} of {len(bodies) + 1} parts of one batch for {path} were not accepted, "
                f"the others were ({errors[0]})"
            )
            raise self._broken_error(path) from errors[0]
        self._next_number += len(bodies)
        return request_ids

    async def _send_numbered(self, path: str, body: Callable[[int], list[bytes]], content_type: str) -> bytes:
        _ = self._session.session_id  # raises if the session is lost
        try:
            return await self._call(path, body(self._next_number), content_type)
        except ConflictError as error:
            if not self._number_in_doubt or not _is_about_the_number(path, error):
                raise
        self._next_number += 1
        self._number_in_doubt = False
        return await self._call(path, body(self._next_number), content_type)

    async def _call(self, path: str, body: list[bytes], content_type: str) -> bytes:
        self._attempt_in_doubt = False
        http = self._session.http
        return await http.call("POST", path, body, content_type=content_type, on_failure=self._note_failure)

    def _note_failure(self, status: int | None, _before: int) -> None:
        self._attempt_in_doubt |= status != _TOO_MANY

    async def fetch(
        self,
        request_id: str | int,
        *,
        what: str,
        accept: str = "application/json",
        on_wait: Callable[[NotReady], None] | None = None,
    ) -> Answer:
        """The answer that is a request's result."""
        return await retrieve(self._session.http, request_id, what=what, accept=accept, on_wait=on_wait)

    @property
    def codec(self) -> Codec:
        """How batches are sent."""
        return self._session.codec

    def refuses_json(self) -> bool:
        """Go over to protobuf, where that was left open; says whether it was."""
        return self._session.refuses_json()

    def _broken_error(self, what: str) -> SequenceBrokenError:
        return SequenceBrokenError(
            f"{what}: the order of operations of model {self.model_id} is in doubt: {self._broken}. Leave this client, "
            "create a new one, and load the last checkpoint."
        )


def _is_about_the_number(path: str, error: ConflictError) -> bool:
    """Whether a conflict means that the number was used. Where a name is given, it may be the name instead."""
    return path not in _NAMING or "seq" in str(error).lower()
