"""Bodies packed with zstd, where the package zstandard is installed: it is not required."""

from __future__ import annotations

from fwasync.local.refusal import Refused

__all__ = ("unpacked",)

# A small body can claim to be an enormous one.
_MOST_BYTES = 2**30


def unpacked(body: bytes) -> bytes:
    """What a zstd frame holds.

    Raises:
        Refused: It is none, does not tell its size, or is too large; or the package zstandard is missing.
    """
    try:
        import zstandard
    except ImportError:
        raise Refused(
            415, "reading zstd needs the package zstandard: pip install zstandard, or send the body as it is"
        ) from None
    try:
        size = zstandard.frame_content_size(body)
        if size < 0:
            raise Refused(415, "a zstd body must tell its size in its frame")
        if size > _MOST_BYTES:
            raise Refused(413, f"the body unpacks to {size} bytes; this service takes at most {_MOST_BYTES}")
        return zstandard.ZstdDecompressor().decompress(body)
    except zstandard.ZstdError as error:
        raise Refused(400, f"the body is not zstd, as its Content-Encoding says: {error}") from None
