"""Server-sent events of completions, however they are cut."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from fwasync._wire.completions import DONE, EventDecoder, encode_event


@given(st.lists(st.binary(max_size=20).filter(lambda data: not set(data) & {10, 13})), st.data())
def test_what_is_encoded_is_decoded(payloads, data):
    stream = b"".join(map(encode_event, payloads))
    ends = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    decoder = EventDecoder()
    pieces = [stream[start:end] for start, end in zip([0, *ends], [*ends, len(stream)], strict=True)]
    assert [event for piece in pieces for event in decoder.feed(piece)] == payloads


@given(st.sampled_from([b"\n", b"\r", b"\r\n"]), st.integers(1, 5))
def test_all_line_ends_are_known(end, size):
    lines = [b": hello", b"data: one", b"event: x", b"data:two", b"", b"data: [DONE]", b"", b"data: lost"]
    stream = end.join(lines)
    decoder = EventDecoder()
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    assert [event for piece in pieces for event in decoder.feed(piece)] == [b"one\ntwo", DONE]


LINES = [b"data: a", b"data: b", b"data:", b"data: ", b": c", b"id: 1", b"", b""]
BLOCKS = [b"data: a\n\n", b"data: b\n\n", *(line + end for line in LINES for end in (b"\n", b"\r\n", b"\r"))]


@example([b"data: a\n", b"data: b\n\n"])
@given(st.lists(st.lists(st.sampled_from(BLOCKS), max_size=4).map(b"".join), max_size=6))
def test_however_events_come_they_are_the_same(pieces: list[bytes]) -> None:
    some, single = EventDecoder(), EventDecoder()
    found = [event for piece in pieces for event in some.feed(piece)]
    assert found == [event for byte in b"".join(pieces) for event in single.feed(bytes([byte]))]
