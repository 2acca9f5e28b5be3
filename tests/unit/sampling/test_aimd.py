"""The adaptive window: worked numbers, and what holds for every sequence of observations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwasync.errors import UsageError
from fwasync.sampling.aimd import AdaptiveWindow, AimdSettings, Observation

observations = st.builds(
    Observation,
    status=st.sampled_from([None, 200, 404, 429, 500, 503]),
    prefill_queue_s=st.none() | st.floats(0, 100),
    retry=st.integers(0, 6),
)


def test_the_window_follows_the_prefill_queue() -> None:
    window = AdaptiveWindow(AimdSettings(initial_window=16))
    trace = []
    for queued in (0.0, 0.5, 2.0, 0.01):
        window.observe(Observation(200, prefill_queue_s=queued), now=0.0)
        window.adjust()
        trace.append((round(window.window, 2), round(window.ema_prefill_queue or 0.0, 4)))
    assert trace == [(20.0, 0.0), (23.33, 0.15), (11.67, 0.705), (12.67, 0.4965)]
    assert window.size == 12


def test_it_is_adjusted_after_each_interval_by_the_mean() -> None:
    window = AdaptiveWindow(AimdSettings(initial_window=16, adjustment_interval=4))
    for queued in (0.0, 1.0, 1.0):
        window.observe(Observation(200, prefill_queue_s=queued), now=0.0)
    assert window.window == 16
    window.observe(Observation(200, prefill_queue_s=0.0), now=0.0)
    assert window.window == 17  # a mean of 0.5 s is just the target
    window.adjust()
    assert window.window == 17  # nothing was observed since


def test_refusals_shrink_it_at_once_and_once_in_a_second() -> None:
    window = AdaptiveWindow(AimdSettings(initial_window=64))
    for now, status, size in ((0.0, 429, 32), (0.5, 503, 32), (1.0, None, 16), (1.9, 429, 16), (2.0, 500, 16)):
        window.observe(Observation(status), now=now)
        assert window.size == size
    window.observe(Observation(429, retry=3), now=3.0)
    assert window.size == 4


def test_without_a_queue_an_interval_without_refusals_adds_one() -> None:
    window = AdaptiveWindow(AimdSettings(adjustment_interval=2))
    for status in (200, 200, 200, 404, 404, 500):
        window.observe(Observation(status), now=0.0)
    assert window.window == 10  # the third interval says nothing
    window.observe(Observation(429), now=0.0)
    window.observe(Observation(200), now=0.0)
    assert window.window == 5


@given(st.lists(st.tuples(observations, st.floats(0, 2), st.booleans())), st.integers(1, 9), st.integers(0, 90))
def test_it_stays_within_its_limits_and_shrinks_by_refusals_only_outside_the_cooldown(
    steps: list[tuple[Observation, float, bool]], least: int, span: int
) -> None:
    settings = AimdSettings(min_window=least, max_window=least + span, adjustment_interval=5)
    window = AdaptiveWindow(settings)
    now, shrunk_at = 0.0, None
    for observation, pause, ends_step in steps:
        now += pause
        before = window.window
        window.observe(observation, now=now)
        if ends_step:
            window.adjust()
        assert least <= window.size <= window.window <= least + span
        if window.window < before and window.ema_prefill_queue is None:
            assert observation.congested
            assert shrunk_at is None or now - shrunk_at >= settings.shrink_cooldown_s
            shrunk_at = now


@given(st.lists(st.floats(0, 0.5), min_size=1), st.floats(0.6, 100))
def test_a_short_queue_never_shrinks_it_and_a_long_one_never_grows_it(short: list[float], long: float) -> None:
    window = AdaptiveWindow(AimdSettings(initial_window=100))
    for queued in short:
        before = window.window
        window.observe(Observation(200, prefill_queue_s=queued), now=0.0)
        window.adjust()
        assert window.window >= before
    window = AdaptiveWindow(AimdSettings(initial_window=100))
    window.observe(Observation(200, prefill_queue_s=long), now=0.0)
    window.adjust()
    assert window.window == 50


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_window": 0},
        {"min_window": 9, "max_window": 8},
        {"initial_window": 0},
        {"multiplicative_decrease": 1.0},
        {"ema_alpha": float("nan")},
        {"adjustment_interval": -1},
    ],
)
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        AimdSettings(**wrong)
