"""Undoing the compression of an answer, piece by piece. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, Final

__all__ = ("ACCEPTED", "Inflater", "inflater")

ACCEPTED: Final = "gzip, deflate"
"""What a request may say of us in `Accept-Encoding`."""

_MOST = 1024 * 1024  # bytes in one go: a small piece may become a thousand times as large
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_BARE = -zlib.MAX_WBITS
_GZIP_MAGIC = b"\x1f\x8b"


class Inflater:
    """Inflates one body. What is called deflate is either with the frame of zlib, as it should be, or without."""

    def __init__(self) -> None:
        self._inflating: Any = None  # of zlib, which keeps the type's name to itself
        self._begun: bytes = b""

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What the next bytes of the body become, in pieces of at most 1 MiB.

        Raises:
            ValueError: They are not compressed so.
        """
        more = False
        try:
            while data or more:
                if self._inflating is None or self._inflating.eof:
                    data = self._begun + data
                    if len(data) < 2:
                        self._begun = data
                        return
                    if self._inflating is not None and not data.startswith(_GZIP_MAGIC):
                        return  # what follows the last member means nothing
                    self._begun = b""
                    self._inflating = zlib.decompressobj(_GZIP_OR_ZLIB if _is_framed(data) else _BARE)
                piece = self._inflating.decompress(data, _MOST)
                data = self._inflating.unused_data if self._inflating.eof else self._inflating.unconsumed_tail
                more = len(piece) == _MOST
                if piece:
                    yield piece
        except zlib.error as error:
            raise ValueError(f"it cannot be decompressed ({error})") from None

    def end(self) -> None:
        """Told that the body has ended.

        Raises:
            ValueError: What was compressed has not.
        """
        if self._begun if self._inflating is None else not self._inflating.eof:
            raise ValueError("what was compressed breaks off")


def inflater(content_encoding: str) -> Inflater | None:
    """What undoes a `Content-Encoding`; `None` if there is nothing to undo.

    Raises:
        ValueError: It is another one than we accept.
    """
    match content_encoding.strip().lower():
        case "" | "identity":
            return None
        case "gzip" | "x-gzip" | "deflate":
            return Inflater()
        case other:
            raise ValueError(f"its content-encoding is {other[:40]!r}, which was not asked for")


def _is_framed(data: bytes) -> bool:
    return data.startswith(_GZIP_MAGIC) or (data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0)
