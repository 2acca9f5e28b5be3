"""Compressed bodies: however they are cut, they are what they were."""

from __future__ import annotations

import gzip
import itertools
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwasync._http.inflate import Inflater, inflater


def bare(data: bytes) -> bytes:
    return zlib.compress(data, wbits=-15)


PACKED = {"gzip": gzip.compress, "deflate": zlib.compress, "bare deflate": bare}


def inflated(pieces: list[bytes]) -> bytes:
    inflating = Inflater()
    whole = b"".join(out for piece in pieces for out in inflating.pieces(piece))
    inflating.end()
    return whole


def cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted(each % (len(data) + 1) for each in at), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@pytest.mark.parametrize("packed", PACKED)
@given(data=st.binary(max_size=300), at=st.lists(st.integers(0, 1000), max_size=6))
def test_any_cutting_gives_the_same(packed: str, data: bytes, at: list[int]) -> None:
    assert inflated(cut(PACKED[packed](data), at)) == data


@given(at=st.lists(st.integers(0, 1000), max_size=6))
def test_members_of_gzip_follow_one_another(at: list[int]) -> None:
    assert inflated(cut(gzip.compress(b"one,") + gzip.compress(b"") + gzip.compress(b"two"), at)) == b"one,two"
    assert inflated(cut(gzip.compress(b"one") + b"\0\0\0", at)) == b"one"


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("size", [1 << 20, (1 << 20) + 1, 5_000_000])
def test_a_small_piece_never_becomes_a_huge_one(packed: str, size: int) -> None:
    inflating = Inflater()
    pieces = list(inflating.pieces(PACKED[packed](bytes(size))))
    inflating.end()
    assert sum(map(len, pieces)) == size
    assert max(map(len, pieces)) <= 1 << 20


@pytest.mark.parametrize("packed", PACKED)
def test_what_breaks_off_is_noticed(packed: str) -> None:
    data = PACKED[packed](b"0123456789" * 20)
    for end in range(1, len(data)):
        with pytest.raises(ValueError, match="breaks off"):
            inflated([data[:end]])
    assert inflated([]) == b""


def test_what_is_not_compressed_is_noticed() -> None:
    with pytest.raises(ValueError, match="cannot be decompressed"):
        inflated([gzip.compress(b"x" * 100)[:-8] + bytes(8)])


def test_which_codings() -> None:
    assert inflater("identity") is None and inflater("") is None
    assert isinstance(inflater("GZIP"), Inflater) and isinstance(inflater("deflate"), Inflater)
    for other in ("br", "gzip, gzip", "zstd"):
        with pytest.raises(ValueError, match="was not asked for"):
            inflater(other)
