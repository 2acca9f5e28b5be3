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
    ttft_s=st.none() | st.floats(0, 100),
    latency_s=st.none() | st.floats(0, 100),
    tokens=st.integers(0, 9),
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


@given(
    st.lists(st.tuples(observations, st.floats(0, 2), st.booleans())),
    st.integers(1, 9),
    st.integers(0, 90),
    st.none() | st.floats(1.5, 9),
)
def test_it_stays_within_its_limits_and_shrinks_by_refusals_only_outside_the_cooldown(
    steps: list[tuple[Observation, float, bool]], least: int, span: int, tolerance: float | None
) -> None:
    settings = AimdSettings(
        min_window=least, max_window=least + span, adjustment_interval=5, latency_tolerance=tolerance
    )
    window = AdaptiveWindow(settings)
    now, shrunk_at = 0.0, None
    for observation, pause, ends_step in steps:
        now += pause
        before = window.window
        window.observe(observation, now=now)
        if ends_step:
            window.adjust()
        assert least <= window.size <= window.window <= least + span
        if window.window < before and window.ema_prefill_queue is None and tolerance is None:
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


# -- latency ---------------------------------------------------------------------------------------


def told(latency_s: float, *, stream: bool = False) -> Observation:
    if stream:
        return Observation(200, ttft_s=latency_s)
    return Observation(200, latency_s=latency_s * 50, tokens=50)


def pass_intervals(window: AdaptiveWindow, latencies: list[float], *, stream: bool = False) -> list[float]:
    """The window after each interval, in which every request took so long per token, or to its first one."""
    trace: list[float] = []
    for latency in latencies:
        for _ in range(2):
            window.observe(told(latency, stream=stream), now=0.0)
        window.adjust()
        trace.append(window.window)
    return trace


def adaptive(**settings: float | None) -> AdaptiveWindow:
    return AdaptiveWindow(AimdSettings(**{"adjustment_interval": 0, **settings}))  # pyright: ignore[reportArgumentType]


def test_the_window_follows_the_latency() -> None:
    window = adaptive(initial_window=16)
    trace = pass_intervals(window, [0.1, 0.2, 0.1, 0.5, 0.3, 0.1])
    # 0.3 · 0.5 + 0.7 · 0.121 is 2.3 times the least; then the average begins anew, with 0.3, and again.
    assert trace == [17, 18, 19, 9.5, 4.75, 5.75]
    assert window.slowdown == pytest.approx(1)


units = st.sampled_from([0.01, 0.1, 1.0, 10.0])


@given(units, st.lists(st.floats(1, 2), min_size=1), st.booleans())
def test_latency_within_the_tolerance_never_shrinks_it(unit: float, noise: list[float], stream: bool) -> None:
    window = adaptive(latency_tolerance=2.000001)
    trace = pass_intervals(window, [unit * each for each in noise], stream=stream)
    assert trace == sorted(trace)


@given(units, st.integers(1, 10), st.floats(1.3, 3), st.integers(100, 256), st.booleans())
def test_rising_latency_shrinks_it_to_its_minimum_and_it_recovers(
    unit: float, calm: int, growth: float, size: int, stream: bool
) -> None:
    window = adaptive(initial_window=size, min_window=2, max_window=256)
    pass_intervals(window, [unit] * calm, stream=stream)
    peak = window.window
    rising = pass_intervals(window, [unit * growth**n for n in range(1, 22 - calm)], stream=stream)
    assert min(rising) <= peak / 8
    assert rising[-1] == 2 or rising[-1] < rising[-3]
    recovered = pass_intervals(window, [unit] * 300, stream=stream)
    assert recovered[-1] == 256


@given(units, st.floats(2.5, 50), st.booleans())
def test_a_service_that_is_slower_for_good_is_not_taken_for_a_queue_for_ever(
    unit: float, factor: float, stream: bool
) -> None:
    window = adaptive(initial_window=64, latency_horizon=8)
    pass_intervals(window, [unit] * 8, stream=stream)
    trace = pass_intervals(window, [unit * factor] * 300, stream=stream)
    assert min(trace) < 64
    assert trace[-1] == 256


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=40), st.sampled_from([0.25, 2.0, 16.0]))
def test_only_the_ratio_of_latencies_counts(latencies: list[float], scale: float) -> None:
    assert pass_intervals(adaptive(), latencies) == pytest.approx(
        pass_intervals(adaptive(), [each * scale for each in latencies])
    )


@given(st.lists(st.floats(0.01, 10), min_size=1))
def test_latency_does_not_count_where_a_prefill_queue_is_told_or_it_is_turned_off(latencies: list[float]) -> None:
    off, queue, plain = adaptive(latency_tolerance=None), adaptive(), adaptive()
    for latency in latencies:
        for window, prefill in ((off, None), (queue, 0.5), (plain, 0.5)):
            latency_s = None if window is plain else latency
            window.observe(Observation(200, prefill, latency_s=latency_s, tokens=1), now=0.0)
            window.adjust()
    assert queue.window == plain.window
    assert off.window == min(8 + len(latencies), 256)


def test_what_was_sent_before_the_window_shrank_tells_nothing_of_the_new_one() -> None:
    window = adaptive(initial_window=64, adjustment_interval=1)
    window.observe(told(0.1), now=1.0, began=0.0)
    window.observe(told(1.0), now=2.0, began=0.0)
    assert window.window == 32.5
    for now in (2.5, 3.0):
        window.observe(told(1.0), now=now, began=1.9)
        assert window.window == 32.5  # neither shrunk nor grown
    window.observe(told(0.15), now=3.5, began=2.0)
    assert window.window == 33.5
    window.observe(Observation(429), now=4.0)
    window.observe(told(9.0), now=4.5, began=3.9)
    assert window.window == 16.75


def test_short_answers_weigh_no_more_than_they_are() -> None:
    window = adaptive(initial_window=16)
    pass_intervals(window, [0.1])
    for latency_s, tokens in ((0.3, 1), (10.0, 100)):  # the prefill is most of what one token takes
        window.observe(Observation(200, latency_s=latency_s, tokens=tokens), now=0.0)
    window.adjust()
    assert window.slowdown == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_window": 0},
        {"min_window": 9, "max_window": 8},
        {"initial_window": 0},
        {"multiplicative_decrease": 1.0},
        {"ema_alpha": float("nan")},
        {"adjustment_interval": -1},
        {"latency_tolerance": 1.0},
        {"latency_horizon": 0},
    ],
)
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        AimdSettings(**wrong)
