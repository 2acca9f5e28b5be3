"""Group-normalised advantages."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from fwasync.rollout.advantages import group_advantages


def test_worked_examples() -> None:
    assert group_advantages([1, 0, 0, 1]) == pytest.approx([0.8660254, -0.8660254, -0.8660254, 0.8660254])
    assert group_advantages([1, 0]) == pytest.approx([0.7071068, -0.7071068])


@pytest.mark.parametrize("rewards", [[], [3.0], [0.1, 0.1, 0.1], [0.3, 0.3 + 1e-12]])
def test_groups_that_say_nothing_get_zeros(rewards: list[float]) -> None:
    assert group_advantages(rewards).tolist() == [0.0] * len(rewards)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=16), st.floats(0.5, 5), st.floats(-5, 5))
def test_scale_and_shift_of_rewards_do_not_matter(rewards: list[float], scale: float, shift: float) -> None:
    advantages = group_advantages(rewards)
    assert np.isfinite(advantages).all()
    assert advantages.mean() == pytest.approx(0, abs=1e-9)
    if np.std(rewards) > 1e-3:
        assert advantages.std(ddof=1) == pytest.approx(1)
        assert group_advantages(np.array(rewards) * scale + shift) == pytest.approx(advantages, abs=1e-6)
