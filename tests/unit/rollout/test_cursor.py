"""The cursor: rows settle in any order, it moves in theirs, and what it says can be gone on from."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwasync.errors import UsageError
from fwasync.rollout.cursor import RolloutState, RowCursor


def test_it_moves_in_order() -> None:
    cursor = RowCursor(RolloutState())
    positions = []
    for row in (1, 2, 0, 4, 3):
        cursor.settle(row, "kept")
        positions.append(cursor.position)
    assert positions == [0, 0, 3, 3, 5]


@given(st.permutations(range(8)), st.integers(0, 8), st.integers(0, 5))
def test_a_cursor_that_is_stopped_and_gone_on_from_ends_as_one_that_is_not(
    order: list[int], stop: int, version: int
) -> None:
    first = RowCursor(RolloutState())
    for row in order[:stop]:
        first.settle(row, "kept" if row % 3 else "filtered")
    text = json.dumps(first.state(version).as_dict())
    second = RowCursor(RolloutState.from_dict(json.loads(text)))
    assert [row for row in range(8) if second.is_settled(row)] == sorted(order[:stop])
    for row in order[stop:]:
        second.settle(row, "kept" if row % 3 else "filtered")
    assert second.state(version) == RolloutState(version, 8, (), kept=5, filtered=3)


@pytest.mark.parametrize(
    "values", [{}, {"ahead": [], "nonsense": 1}, {"ahead": None}, {"ahead": [3], "position": 1, "kept": 1}]
)
def test_what_is_no_state_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="state of a rollout scheduler"):
        RolloutState.from_dict(values)
