"""How much may be admitted: the worked examples of the formula, and the limits composed."""

from __future__ import annotations

import pytest

from fwasync.rollout.capacity import Capacity, ConcurrencyLimiter, StalenessLimiter


def test_strictly_on_policy_admits_one_batch_and_replaces_what_is_dropped() -> None:
    limiter = StalenessLimiter(8, 0, 0)  # 2 groups of 4
    seen = [limiter.capacity]
    for _ in range(2):
        limiter.admitted(4)
        seen.append(limiter.capacity)
    assert seen == [8, 4, 0]
    limiter.dropped_row(4)
    assert limiter.capacity == 4
    limiter.admitted(4)
    limiter.accepted_row(4)
    limiter.accepted_row(4)
    assert limiter.capacity == 0, "kept rows stay charged"
    limiter.published()
    assert limiter.capacity == 8


def test_one_version_ahead_admits_two_batches() -> None:
    limiter = StalenessLimiter(8, 1, 0)
    rows = 0
    while limiter.capacity >= 4:
        limiter.admitted(4)
        rows += 1
    assert rows == 4


def test_a_resumed_run_counts_the_batches_before_it_as_kept() -> None:
    assert StalenessLimiter(8, 1, 7).capacity == StalenessLimiter(8, 1, 0).capacity == 16


@pytest.mark.parametrize(
    ("capacity", "admission"), [(Capacity(8, None), 8), (Capacity(8, 3), 3), (Capacity(-4, 3), 0), (Capacity(8, -1), 0)]
)
def test_the_tighter_limit_counts(capacity: Capacity, admission: int) -> None:
    assert capacity.admission == admission


def test_a_window_follows_what_it_is_made_of_and_always_has_room_for_one_row() -> None:
    window = 8
    limiter = ConcurrencyLimiter(lambda: window, 4)
    limiter.in_flight = 4
    assert limiter.capacity == 4
    assert limiter.has_room(4)
    window = 1
    assert not limiter.has_room(1)
    limiter.in_flight = 0
    assert limiter.has_room(4)


def test_without_a_window_anything_goes() -> None:
    limiter = ConcurrencyLimiter(None, 4)
    limiter.in_flight = 10_000
    assert limiter.capacity is None
    assert limiter.has_room(10_000)
