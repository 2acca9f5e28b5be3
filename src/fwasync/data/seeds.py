"""Randomness that depends on what it is for, and not on what happened before."""

from __future__ import annotations

import hashlib

__all__ = ("derive_seed",)


def derive_seed(*parts: int | str) -> int:
    """A seed below 2**31 that is a function of its parts, the same on every machine."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1
