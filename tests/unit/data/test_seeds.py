"""Randomness that depends on what it is for."""

from __future__ import annotations

from fwasync.data.seeds import derive_seed


def test_seeds_depend_on_every_part_and_fit_31_bits() -> None:
    assert derive_seed(0, "sample", 1, 2) == 1611577189
    seeds = {derive_seed(a, b, c) for a in range(20) for b in ("x", "y") for c in range(20)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**31 for seed in seeds)
