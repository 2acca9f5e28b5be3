"""Completions of token ids, `POST /inference/v1/completions`: messages and server-sent events, for both directions.

A request with fields that are not known is refused. An answer is one JSON object, or the same in pieces as events, the
last of which is `[DONE]`. A client reads what it needs of it and skips the rest, which would take most of the time of
decoding; a service writes all (`Whole…`). Pure: no I/O.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from fwasync._wire.messages import Message, decode, encode

__all__ = (
    "DONE",
    "EVENT_STREAM",
    "PATH",
    "Completion",
    "CompletionChoice",
    "CompletionRequest",
    "EventDecoder",
    "Logprobs",
    "LongCompletion",
    "RawOutput",
    "TokenRow",
    "Usage",
    "WholeCompletion",
    "WholeRawOutput",
    "WholeTokenRow",
    "encode_event",
    "encode_group",
)

PATH = "/inference/v1/completions"
EVENT_STREAM = "text/event-stream"
DONE = b"[DONE]"

_ROWS = re.compile(rb'"logprobs"\s*:\s*\{\s*"content"\s*:\s*\[')
_CUT = 32 * 1024  # bytes of rows that are read at a time, in a fraction of a millisecond
_CUTS = 8  # places that are tried


class CompletionRequest(Message, forbid_unknown_fields=True):
    """Continue a prompt of token ids (or of text). `top_k=0` and `top_p=1` truncate nothing.

    `logprobs` is the structured form; its older form, a number, is not spoken. `echo` puts the prompt in front of the
    completion, `echo_last` its last tokens.
    """

    model: str
    prompt: list[int] | str
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    echo: bool | None = None
    echo_last: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    raw_output: bool | None = None
    return_token_ids: bool | None = None
    perf_metrics_in_response: bool | None = None
    include_routing_matrix: bool | None = None
    prompt_cache_key: str | None = None
    user: str | None = None


class TokenRow(Message, gc=False):
    """What is read of a token. `logprob` is the model's own, `sampling_logprob` that of the distribution drawn from."""

    logprob: float | None = None
    sampling_logprob: float | None = None
    token_id: int | None = None
    routing_matrix: str | None = None


class WholeTokenRow(TokenRow, gc=False):
    """All that a service tells of one token."""

    token: str | None = None
    bytes: list[int] | None = None
    text_offset: int | None = None


class Logprobs(Message, gc=False):
    """The rows of a choice, as many as it has tokens. Older servers name other fields, which are left out here."""

    content: Sequence[TokenRow] | None = None


class RawOutput(Message, gc=False):
    """What is read of the token ids behind a choice; those of an echo are part of the completion's."""

    prompt_token_ids: list[int] | None = None
    completion_token_ids: list[int] | None = None


class WholeRawOutput(RawOutput, gc=False):
    """All that a service tells of the token ids behind a choice."""

    prompt_fragments: list[Any] | None = None
    completion: str | None = None


class CompletionChoice(Message, gc=False):
    """One completion, or a piece of one. `finish_reason` is `stop`, `length` or `error`.

    An index of 0 and a finish_reason of null are sent too: readers of other makes rely on them.
    """

    index: int = msgspec.field(default_factory=int)
    text: str | None = None
    finish_reason: str | None = msgspec.field(default_factory=type(None))
    logprobs: Logprobs | None = None
    raw_output: RawOutput | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Usage(Message, gc=False):
    """How many tokens it took."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None


class Completion(Message, gc=False):
    """What is read of an answer, or of one event of it. `perf_metrics` are seconds and counts, as text.

    `error` is an event of its own, by which a service tells that it failed after the answer had begun.
    """

    choices: list[CompletionChoice] | None = None
    usage: Usage | None = None
    perf_metrics: dict[str, str | int | float] | None = None
    error: Any = None


class WholeCompletion(Completion, gc=False):
    """All that a service tells in an answer, or in one event of it."""

    id: str | None = None
    object: str | None = None
    created: int | None = None
    model: str | None = None


class LongCompletion:
    """A whole answer that is long, to be read in steps: first `rows`, some hundred at a time, then the `rest`.

    Rows are cut where one seems to end. Within a row, in a text or in a list, it may look the same: then what was cut
    cannot be read, and an earlier place is tried. Rows that cannot be cut remain in the rest.
    """

    def __init__(self, body: bytes) -> None:
        found = _ROWS.search(body)
        self._body = body
        self._start = self._end = found.end() if found else len(body)

    def rows(self) -> Iterator[list[TokenRow]]:
        """Rows of the only choice's logprobs, in order."""
        while rows := self._next():
            yield rows

    def rest(self) -> bytes:
        """The answer without the rows that came."""
        return self._body[: self._start] + self._body[self._end :]

    def _next(self) -> list[TokenRow]:
        cut = self._end + _CUT
        for _ in range(_CUTS):
            cut = self._body.rfind(b"},", self._end, cut)
            if cut < 0:
                break
            try:
                rows = decode(b"[" + self._body[self._end : cut + 1] + b"]", list[TokenRow])
            except msgspec.MsgspecError:
                continue
            self._end = cut + 2
            return rows
        return []


def encode_group(request: CompletionRequest, size: int) -> list[list[bytes]]:
    """The bodies, in pieces, of a group of requests that differ in their seeds: the request's own and those after it.

    The prompt, which may be long, is encoded once and shared.
    """
    seed = request.seed
    if seed is None:
        return [[encode(request)]] * size
    shared = encode(msgspec.structs.replace(request, seed=None))[:-1]
    return [[shared, b',"seed":%d}' % (seed + number)] for number in range(size)]


def encode_event(data: bytes) -> bytes:
    """One event with one line of data."""
    return b"data: " + data + b"\n\n"


class EventDecoder:
    r"""Takes a stream of events apart, however it is cut into pieces.

    Lines end with `\n`, `\r\n` or `\r`; a blank line ends an event; lines of data are joined with `\n`, after one
    leading space is taken off; comments and other fields are ignored. An event that no blank line has ended is none.
    """

    __slots__ = ("_after_cr", "_data", "_rest")

    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[bytes] = []
        self._after_cr = False

    def feed(self, piece: bytes) -> list[bytes]:
        """The data of the events that this piece completes."""
        is_between = not (self._rest or self._data or self._after_cr)
        if is_between and piece.startswith(b"data: ") and piece.endswith(b"\n\n") and b"\r" not in piece:
            events = piece[6:-2].split(b"\n\ndata: ")
            if b"\n" not in b"".join(events):
                return events  # as they mostly come: whole, and of one line each
        if self._after_cr and piece:
            # The second half of a line end that was cut in two.
            piece = piece.removeprefix(b"\n")
            self._after_cr = False
        if b"\r" in piece:
            self._after_cr = piece.endswith(b"\r")
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        events: list[bytes] = []
        *lines, rest = piece.split(b"\n")
        if lines and self._rest:
            lines[0] = bytes(self._rest + lines[0])
            self._rest.clear()
        self._rest += rest
        for line in lines:
            if not line:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data.clear()
            elif line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
            elif line == b"data":
                self._data.append(b"")
        return events
