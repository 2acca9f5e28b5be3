"""Results of asample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fwasync._wire.messages import SampledSequenceMessage, SampleResult
from fwasync._wire.protobuf.arrays import FLOAT32, INT32, array_of, buffer
from fwasync._wire.protobuf.fields import (
    ProtobufError,
    as_bytes,
    as_signed,
    delimited,
    fields,
    integer,
)

__all__ = ("decode_sample", "encode_sample")

_STOP_REASONS = ("stop", "length")


def encode_sample(result: SampleResult) -> bytes:
    """A `SampleResponse`."""
    parts = [delimited(1, *_sequence(sequence)) for sequence in result.sequences]
    if result.prompt_logprobs is not None:
        logprobs = np.asarray([np.nan if p is None else p for p in result.prompt_logprobs], dtype=np.float32)
        parts.append(delimited(2, buffer(logprobs, "<f4")))
    if result.topk_prompt_logprobs is not None:
        parts.append(delimited(3, *_topk(result.topk_prompt_logprobs)))
    return b"".join(parts)


def _sequence(sequence: SampledSequenceMessage) -> Iterator[bytes]:
    yield integer(1, _STOP_REASONS.index(sequence.stop_reason))
    yield delimited(2, buffer(np.asarray(sequence.tokens, dtype=np.int32), "<i4"))
    if sequence.logprobs is not None:
        yield delimited(3, buffer(np.asarray(sequence.logprobs, dtype=np.float32), "<f4"))


_EMPTY_LOGPROB = -99999.0


def _topk(positions: Sequence[Sequence[tuple[int, float]] | None]) -> Iterator[bytes]:
    # Without a column the number of positions could not be told apart from none asked for.
    width = max((len(position) for position in positions if position), default=1)
    tokens = np.zeros((len(positions), width), dtype=np.int32)
    logprobs = np.full((len(positions), width), _EMPTY_LOGPROB, dtype=np.float32)
    for index, position in enumerate(positions):
        for rank, (token, logprob) in enumerate(position or ()):
            tokens[index, rank], logprobs[index, rank] = token, logprob
    yield delimited(1, buffer(tokens, "<i4"))
    yield delimited(2, buffer(logprobs, "<f4"))
    yield integer(3, width)
    yield integer(4, len(positions))


def decode_sample(body: bytes) -> SampleResult:
    """Read a `SampleResponse`.

    Raises:
        ProtobufError: It is not one.
    """
    sequences: list[SampledSequenceMessage] = []
    prompt_logprobs: list[float | None] | None = None
    topk: list[list[tuple[int, float]] | None] | None = None
    for number, value in fields(body):
        match number:
            case 1:
                sequences.append(_read_sequence(as_bytes(value)))
            case 2:
                numbers = array_of(as_bytes(value), FLOAT32)
                prompt_logprobs = [None if np.isnan(p) else float(p) for p in numbers]
            case 3:
                topk = _read_topk(as_bytes(value))
            case _:
                pass
    return SampleResult(sequences=sequences, prompt_logprobs=prompt_logprobs, topk_prompt_logprobs=topk)


def _read_sequence(data: memoryview) -> SampledSequenceMessage:
    reason = 0
    tokens: list[int] = []
    logprobs: list[float] | None = None
    for number, value in fields(data):
        match number:
            case 1:
                reason = as_signed(value)
            case 2:
                tokens = array_of(as_bytes(value), INT32).tolist()
            case 3:
                logprobs = array_of(as_bytes(value), FLOAT32).tolist()
            case _:
                pass
    if reason not in (0, 1):
        raise ProtobufError(f"unknown stop reason {reason}")
    return SampledSequenceMessage(stop_reason=_STOP_REASONS[reason], tokens=tokens, logprobs=logprobs)


def _read_topk(data: memoryview) -> list[list[tuple[int, float]] | None]:
    found = dict(fields(data))
    width = as_signed(found.get(3, 0))
    tokens = array_of(as_bytes(found.get(1, memoryview(b""))), INT32)
    logprobs = array_of(as_bytes(found.get(2, memoryview(b""))), FLOAT32)
    if width == 0 or tokens.size != logprobs.size or tokens.size % width:
        raise ProtobufError(f"{tokens.size} tokens and {logprobs.size} logprobs do not fill rows of {width}")
    rows = zip(tokens.reshape(-1, width).tolist(), logprobs.reshape(-1, width).tolist(), strict=True)
    lists = [[(t, p) for t, p in zip(*row, strict=True) if p != _EMPTY_LOGPROB] for row in rows]
    return [entries or None for entries in lists]
