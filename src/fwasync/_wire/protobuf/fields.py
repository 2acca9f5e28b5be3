"""Just enough of the protobuf encoding: fields as bytes, and bytes as fields.

Tensors dominate these messages, and in protobuf a tensor is its buffer. Writing the few fields around it by hand costs
less than a library's message objects, which copy each buffer several times.

Wire format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Iterator

__all__ = (
    "ProtobufError",
    "as_bool",
    "as_bytes",
    "as_double",
    "as_integers",
    "as_signed",
    "as_text",
    "delimited",
    "double",
    "enclosed",
    "fields",
    "integer",
    "map_entry",
    "packed",
    "text",
)

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
_DOUBLE = struct.Struct("<d")

Value = int | memoryview
"""A varint, or the bytes of everything else."""


class ProtobufError(ValueError):
    """The bytes are not the message they should be."""


# -- writing ---------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)  # keys and the same few sizes, again and again
def _varint(value: int) -> bytes:
    value &= 0xFFFF_FFFF_FFFF_FFFF  # negative numbers are written in two's complement
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def integer(number: int, value: int) -> bytes:
    """An int32, int64, uint32, enum or bool field; the default 0 is left out."""
    return _varint(number << 3 | _VARINT) + _varint(value) if value else b""


def double(number: int, value: float) -> bytes:
    """A double field, also when it is zero."""
    return _varint(number << 3 | _FIXED64) + _DOUBLE.pack(value)


def delimited(number: int, *parts: bytes | memoryview) -> bytes:
    """A bytes, string or message field made of parts, also when it is empty."""
    size = sum(map(len, parts))
    return b"".join((_varint(number << 3 | _DELIMITED), _varint(size), *parts))


def enclosed(number: int, parts: list[bytes | memoryview]) -> list[bytes | memoryview]:
    """A bytes or message field made of parts that stay apart: a large one is copied once, however deep it lies."""
    return [_varint(number << 3 | _DELIMITED) + _varint(sum(map(len, parts))), *parts]


def text(number: int, value: str) -> bytes:
    """A string field; the default "" is left out."""
    return delimited(number, value.encode()) if value else b""


def packed(number: int, values: Iterable[int]) -> bytes:
    """A repeated integer field; an empty one is left out."""
    content = b"".join(map(_varint, values))
    return delimited(number, content) if content else b""


def map_entry(number: int, key: str, *value: bytes) -> bytes:
    """One entry of a map with string keys; `value` is its field 2, encoded."""
    return delimited(number, text(1, key), *value)


# -- reading ---------------------------------------------------------------------------------------


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        try:
            byte = data[at]
        except IndexError:
            raise ProtobufError("a number is cut short") from None
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ProtobufError("a number is longer than 64 bits")


def fields(data: bytes | memoryview) -> Iterator[tuple[int, Value]]:
    """The fields of a message, in order, as (number, value). Nothing is copied.

    Raises:
        ProtobufError: The bytes are not a message.
    """
    view = memoryview(data)
    at = 0
    while at < len(view):
        key, at = _read_varint(view, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _read_varint(view, at)
            yield number, value
            continue
        if kind == _DELIMITED:
            size, at = _read_varint(view, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ProtobufError(f"field {number} has the unknown kind {kind}")
        if at + size > len(view):
            raise ProtobufError(f"field {number} is cut short")
        yield number, view[at : at + size]
        at += size


def as_signed(value: Value) -> int:
    """An int32 or int64 of a varint."""
    if not isinstance(value, int):
        raise ProtobufError("a number was expected")
    value &= 0xFFFF_FFFF_FFFF_FFFF
    return value - (1 << 64) if value >> 63 else value


def as_bool(value: Value) -> bool:
    """A bool."""
    return bool(as_signed(value))


def as_bytes(value: Value) -> memoryview:
    """Bytes or a nested message."""
    if isinstance(value, int):
        raise ProtobufError("bytes were expected")
    return value


def as_text(value: Value) -> str:
    """A string."""
    try:
        return str(as_bytes(value), "utf-8")
    except UnicodeDecodeError as error:
        raise ProtobufError(f"a text is not UTF-8: {error}") from error


def as_double(value: Value) -> float:
    """A double."""
    try:
        return _DOUBLE.unpack(as_bytes(value))[0]
    except struct.error as error:
        raise ProtobufError(f"a double was expected: {error}") from error


def as_integers(value: Value) -> list[int]:
    """Some of a repeated integer field: packed, or a single one."""
    if isinstance(value, int):
        return [as_signed(value)]
    numbers: list[int] = []
    at = 0
    while at < len(value):
        number, at = _read_varint(value, at)
        numbers.append(as_signed(number))
    return numbers
