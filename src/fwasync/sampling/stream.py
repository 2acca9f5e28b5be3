"""A completion that comes in pieces, and whole at its end.

Invariants
    * `completion` is there only after the last piece, and is what the unstreamed answer would have been.
    * An answer that ends without saying so has broken off: that is an error, never a short completion.
    * What goes wrong is told at the piece where it went wrong, after all that came before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import anyio
import msgspec

from fwasync._http.client import Answer, Streamed, Unanswered
from fwasync._wire.completions import DONE, Completion, EventDecoder, TokenRow, Usage
from fwasync._wire.messages import decode
from fwasync.errors import ProtocolError, StreamBrokenError, UsageError
from fwasync.sampling.completions import CompletionReader, SampledCompletion
from fwasync.sampling.server_metrics import ServerMetrics, read_metrics

__all__ = ("CompletionPiece", "CompletionStream")


class CompletionPiece(msgspec.Struct, frozen=True, gc=False):
    """What came together.

    Attributes:
        text: Its text, possibly empty.
        token_ids: Its token ids, as far as they are told: with `logprobs`.
        logprobs: Their logprobs in nats, with `logprobs`.
        finish_reason: Why the completion ended, in its last piece.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None = None


class CompletionStream:
    """An async iterator of the pieces; made by `AsyncDeploymentSampler.stream_with_prompt_tokens`."""

    __slots__ = (
        "_completion",
        "_decoder",
        "_events",
        "_first_at",
        "_perf",
        "_reader",
        "_refusal",
        "_source",
        "_started",
        "_usage",
    )

    def __init__(
        self,
        source: Streamed,
        reader: CompletionReader,
        *,
        started: float,
        refusal: Callable[[Answer], Exception],
    ) -> None:
        self._source = source
        self._refusal = refusal
        self._reader = reader
        self._started = started
        self._first_at: float | None = None
        self._decoder = EventDecoder()
        self._events: list[bytes] = []  # that have come and were not given out; the next one is last
        self._usage: Usage | None = None
        self._perf: dict[str, str | int | float] | None = None
        self._completion: SampledCompletion | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the last piece has come."""
        return self._completion is not None

    @property
    def completion(self) -> SampledCompletion:
        """The whole completion.

        Raises:
            UsageError: The stream was not read to its end.
        """
        if self._completion is None:
            raise UsageError("the completion is not there: read the stream to its end first")
        return self._completion

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> CompletionPiece:
        """The next piece.

        Raises:
            StreamBrokenError: The answer broke off.
            ServiceError: The service tells that it failed on the way, or what comes is no completion (`ProtocolError`).

        **Cancellation:** the stream is over; leave the block.
        """
        while self._completion is None:
            if not self._events:
                await self._receive()
            elif (event := self._events.pop()).startswith(DONE):
                self._completion = self._reader.completion()
            elif (piece := self._piece(event)) is not None:
                return piece
        raise StopAsyncIteration

    def metrics(self, *, retry: int) -> ServerMetrics:
        """The metrics of the answer, as far as it was read."""
        return read_metrics(
            self._source.headers,
            self._perf,
            status=200,
            retry=retry,
            latency_s=anyio.current_time() - self._started,
            ttft_s=None if self._first_at is None else self._first_at - self._started,
            completion_tokens=self._usage and self._usage.completion_tokens,
        )

    async def _receive(self) -> None:
        """Wait for events, or for the end."""
        try:
            data = await self._source.piece()
        except Unanswered as error:
            raise StreamBrokenError(f"completions: the stream broke off ({error}); ask again") from error
        if data is not None:
            self._events = self._decoder.feed(data)
            self._events.reverse()
        elif self._reader.has_end:
            self._completion = self._reader.completion()
        else:
            raise StreamBrokenError("completions: the stream broke off before its end; ask again")

    def _piece(self, event: bytes) -> CompletionPiece | None:
        try:
            message = decode(event, Completion)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"completions: an event of the stream is no completion ({error})") from error
        if message.error is not None:
            raise self._refusal(Answer(_status(message.error), event, self._source.headers))
        self._usage = message.usage or self._usage
        self._perf = message.perf_metrics or self._perf
        if not message.choices:
            return None
        if self._first_at is None:
            self._first_at = anyio.current_time()
        text, finish_reason = "", None
        rows: Sequence[TokenRow] = ()
        for choice in message.choices:
            self._reader.add(choice)
            text += choice.text or ""
            finish_reason = choice.finish_reason or finish_reason
            if choice.logprobs is not None and choice.logprobs.content:
                rows = [*rows, *choice.logprobs.content] if rows else choice.logprobs.content
        return CompletionPiece(
            text,
            [row.token_id for row in rows if row.token_id is not None],
            [row.logprob for row in rows if row.logprob is not None],
            finish_reason,
        )


def _status(error: Any) -> int:
    """The HTTP status that a service would have answered with, had it known in time."""
    code = cast("dict[str, Any]", error).get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code <= 599 else 500
