"""Waiting for a future's result: long polls until the service has it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

import anyio

from fwasync._http.client import Answer, Http, Unanswered
from fwasync._wire import protobuf
from fwasync._wire.futures import (
    Expired,
    Failed,
    NotReady,
    Outcome,
    PayloadHeld,
    Ready,
    Transient,
    read_outcome,
)
from fwasync._wire.messages import RetrieveFutureRequest, encode
from fwasync.errors import OperationFailedError, ResultLostError, RetryBudgetExhaustedError

__all__ = ("retrieve",)

_POLL_TIMEOUT_S = 60.0
# A service that says "not ready" at once, instead of holding the poll, is not asked more often than this.
_SHORTEST_POLL_S = 0.02


async def retrieve(
    http: Http,
    request_id: str | int,
    *,
    what: str,
    accept: str = "application/json",
    on_wait: Callable[[NotReady], None] | None = None,
) -> Answer:
    """The answer that is the result, as soon as the service has it.

    It may be called again and again, also after it was cancelled.

    Args:
        http: The service.
        request_id: The future.
        what: The operation's name, for errors.
        accept: What the result may come in.
        on_wait: Told of every "not ready".

    The service's retry policy bounds an unbroken row of polls that fail; a poll that is answered starts the budget
    anew.

    Raises:
        OperationFailedError: The operation ran and failed.
        ResultLostError: The service does not know the future any more.
        ServiceError: The service refuses to be asked (a bad key …).
        RetryBudgetExhaustedError: The service could not be asked for the whole budget.

    **Cancellation:** the poll is dropped; nothing changes on the service.
    """
    clock = asyncio.get_running_loop().time
    metadata_only = True
    failures = 0
    failing_since = 0.0
    while True:
        started = clock()
        poll = await _poll(http, request_id, metadata_only=metadata_only, accept=accept)
        match poll.outcome:
            case Ready():
                assert poll.answer is not None
                return poll.answer
            case Failed(message, category):
                raise OperationFailedError(
                    f"{what} failed on the service ({category}): {message}",
                    category=category,
                    request_id=str(request_id),
                )
            case Expired(message):
                raise ResultLostError(
                    f"{what}: the service does not know request {request_id} (any more): {message}. "
                    "It may have taken effect; load the last checkpoint to be sure of the state.",
                    request_id=str(request_id),
                )
            case PayloadHeld() if metadata_only:
                metadata_only, failures, delay = False, 0, 0.0
            case NotReady():
                failures, delay = 0, started + _SHORTEST_POLL_S - clock()
                if on_wait is not None:
                    on_wait(poll.outcome)
            case Transient() | PayloadHeld():  # a payload that is asked for and still held is no answer either
                failing_since = failing_since if failures else started
                failures += 1
                failing_s = clock() - failing_since
                delay = http.retry.delay(
                    failures,
                    elapsed_s=failing_s,
                    jitter=random.random(),
                    retry_after_s=poll.answer.retry_after_s if poll.answer else None,
                )
                if delay is None:
                    raise RetryBudgetExhaustedError(
                        f"{what}: the result of request {request_id} could not be asked for during "
                        f"{failing_s:.0f} s ({poll.failure}). It can be awaited again."
                    )
        await anyio.sleep(max(0.0, delay))


@dataclass(slots=True)
class _Poll:
    outcome: Outcome
    answer: Answer | None = None
    failure: str = ""


async def _poll(http: Http, request_id: str | int, *, metadata_only: bool, accept: str) -> _Poll:
    body = encode(RetrieveFutureRequest(request_id=request_id, allow_metadata_only=metadata_only))
    try:
        answer = await http.attempt("POST", "retrieve_future", [body], accept=accept, timeout=_POLL_TIMEOUT_S)
    except Unanswered as error:
        return _Poll(Transient(), failure=str(error))
    if answer.status == 200 and protobuf.CONTENT_TYPE in answer.content_type:
        return _Poll(Ready(), answer)
    text = "" if answer.status == 200 else http.error_text(answer)
    outcome = read_outcome(answer.status, answer.body, text=text)
    if outcome is None:
        raise http.refusal(answer, "retrieve_future")
    return _Poll(outcome, answer, f"status {answer.status} {text}".rstrip())
