"""The order of operations: examples, and every arrival order that hypothesis thinks of."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fwasync.local.sequence import Accepted, Conflict, Repeated, SequenceGate


def offer(gate: SequenceGate[str, str], seq_id: int | None, name: str) -> tuple[str, ...]:
    answer = gate.offer(seq_id, name.encode(), f"receipt {name}", name)
    assert isinstance(answer, Accepted)
    return answer.ready


def test_in_order_each_runs_at_once():
    gate = SequenceGate[str, str]()
    assert [offer(gate, 1, "a"), offer(gate, 2, "b")] == [("a",), ("b",)]
    assert gate.waiting_for is None


def test_early_ones_wait_for_the_gap():
    gate = SequenceGate[str, str]()
    assert offer(gate, 3, "c") == ()
    assert offer(gate, 2, "b") == ()
    assert gate.waiting_for == 1
    assert offer(gate, 1, "a") == ("a", "b", "c")


def test_repetitions_and_conflicts_are_told_apart_for_ever():
    gate = SequenceGate[str, str]()
    offer(gate, 1, "a")
    offer(gate, 2, "b")
    assert gate.offer(1, b"a", "another", "again") == Repeated("receipt a")
    assert gate.offer(1, b"x", "another", "again") == Conflict(1)
    assert gate.find(2, b"b") == Repeated("receipt b")
    assert gate.find(3, b"c") is None
    assert gate.find(None, b"a") is None


def test_a_rejected_request_holds_nothing_back():
    gate = SequenceGate[str, str]()
    assert offer(gate, 2, "b") == ()
    assert gate.offer(1, b"a", "no", None) == Accepted(("b",))
    assert gate.offer(1, b"a", "yes", "a") == Repeated("no")


def test_without_a_number_it_comes_after_what_was_held():
    gate = SequenceGate[str, str]()
    assert offer(gate, None, "x") == ("x",)
    offer(gate, 3, "c")
    assert offer(gate, None, "y") == ()
    assert gate.waiting_for == 1
    offer(gate, 4, "d")
    assert offer(gate, 1, "a") == ("a",)
    assert offer(gate, 2, "b") == ("b", "c", "y", "d")


def test_what_is_dropped_comes_in_order():
    gate = SequenceGate[str, str]()
    offer(gate, 3, "c")
    offer(gate, None, "x")
    offer(gate, 2, "b")
    gate.offer(5, b"e", "no", None)
    assert gate.drop() == ("b", "c", "x")
    assert gate.waiting_for is None


@pytest.mark.parametrize("seq_id", [0, -1])
def test_numbers_start_at_one(seq_id):
    with pytest.raises(ValueError, match="start at 1"):
        SequenceGate[str, str]().offer(seq_id, b"", "", "")


# Each arrival: a number (repeated at will), or none; whether it is rejected; which of two contents it has.
arrivals = st.lists(st.tuples(st.none() | st.integers(1, 8), st.booleans(), st.booleans()), max_size=40)


@settings(deadline=None)
@given(arrivals)
def test_whatever_arrives_runs_in_order_and_once(calls):
    gate = SequenceGate[tuple[int | None, int], int]()
    first: dict[int, tuple[bool, bool, int]] = {}
    ran: list[tuple[int | None, int]] = []
    waiting: deque[tuple[int, tuple[int | None, int]]] = deque()
    for index, (seq_id, rejected, content) in enumerate(calls):
        item = (seq_id, index)
        # A model's requests without a number are never recorded as rejected.
        rejected = rejected and seq_id is not None
        held_before = _held(first)
        answer = gate.offer(seq_id, bytes([content]), index, None if rejected else item)
        if seq_id in first:
            assert answer == (Repeated(first[seq_id][2]) if first[seq_id][1] == content else Conflict(seq_id))
            continue
        assert isinstance(answer, Accepted)
        if seq_id is None:
            waiting.append((max(held_before, default=0), item))
        else:
            first[seq_id] = (rejected, content, index)
        ran += answer.ready

    numbers = [seq_id for seq_id, _ in ran if seq_id is not None]
    assert numbers == sorted(set(numbers))
    reached = 0
    while reached + 1 in first:
        reached += 1
    assert numbers == [n for n in range(1, reached + 1) if not first[n][0]]
    free = [item for item in ran if item[0] is None]
    # In the order of arrival, and exactly those whose predecessors have all come.
    assert free == [item for barrier, item in waiting if barrier <= reached]
    for barrier, item in waiting:
        if item in ran:
            before = {seq_id for seq_id, _ in ran[: ran.index(item)]}
            assert all(first[n][0] or n in before for n in range(1, barrier + 1))
    something_held = any(n > reached for n in first) or any(barrier > reached for barrier, _ in waiting)
    assert gate.waiting_for == (reached + 1 if something_held else None)


def _held(first: dict[int, tuple[bool, bool, int]]) -> set[int]:
    reached = 0
    while reached + 1 in first:
        reached += 1
    return {number for number in first if number > reached}


@settings(deadline=None)
@given(st.permutations(range(1, 9)))
def test_any_permutation_runs_as_if_in_order(order):
    gate = SequenceGate[int, str]()
    ran: list[int] = []
    for seq_id in order:
        answer = gate.offer(seq_id, b"", "", seq_id)
        assert isinstance(answer, Accepted)
        ran += answer.ready
    assert ran == list(range(1, 9))
