"""pass@k against its definition: the part of all k-subsets that hold a right answer."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwasync.rollout.pass_at_k import compute_pass_at_k


@given(st.lists(st.sampled_from([0.0, 0.5, 0.51, 1.0]), min_size=1, max_size=8), st.integers(1, 8))
def test_it_is_the_part_of_subsets_that_pass(rewards: list[float], k: int) -> None:
    subsets = list(combinations(rewards, k))
    wanted = {f"rollout/pass@{k}": pytest.approx(sum(max(s) > 0.5 for s in subsets) / len(subsets))} if subsets else {}
    assert compute_pass_at_k([rewards], [k]) == wanted


def test_prompts_count_alike_and_small_groups_are_left_out() -> None:
    groups = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0], [0.0]]
    assert compute_pass_at_k(groups, ks=(1, 2, 4, 5)) == {
        "rollout/pass@1": pytest.approx((0.25 + 1 + 0) / 3),
        "rollout/pass@2": pytest.approx((0.5 + 1) / 2),
        "rollout/pass@4": 1.0,
    }
    assert compute_pass_at_k([]) == {}


def test_no_answer_at_all_is_no_k() -> None:
    with pytest.raises(ValueError, match="at least one"):
        compute_pass_at_k([[1.0]], [0])
