"""Randomness that depends on what it is for, and not on what happened before."""

from __future__ import annotations

from fwasync.data.seeds import derive_seed

__all__ = ("derive_seed",)
