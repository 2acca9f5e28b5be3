"""What a person sees of a run on a terminal and in a log."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fwasync.tracking.headlines import duration, full_name, number
from fwasync.tracking.live import LiveView
from fwasync.tracking.progress import Progress
from fwasync.tracking.run import Record, Ticking
from fwasync.tracking.views import PlainView, make_view, sparkline


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# -- sparklines and numbers --------------------------------------------------------------------------


def test_a_sparkline_rises_and_falls() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([3, 2, 1], 8) == "█▅▁"
    assert sparkline([5, 5], 8) == "▅▅"
    assert sparkline([1, math.nan, 2, math.inf], 8) == "▁ █ "
    assert sparkline([math.nan], 8) == " "


@given(st.lists(st.floats()), st.integers(-3, 50))
def test_a_sparkline_fits_any_values_into_its_width(values: list[float], width: int) -> None:
    line = sparkline(values, width)
    assert len(line) == max(min(len(values), width), 0)
    assert set(line) <= set(" ▁▂▃▄▅▆▇█")


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=40, unique=True))
def test_bars_have_the_order_of_their_values(values: Sequence[int]) -> None:
    line = sparkline(values, len(values))
    ordered = [bar for _, bar in sorted(zip(values, line, strict=True))]
    assert ordered == sorted(ordered)
    assert (ordered[0], ordered[-1]) == ("▁", "█")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.integers(1, 30))
def test_a_long_history_uses_the_whole_width(values: list[float], width: int) -> None:
    assert len(sparkline(values * width, width)) == width


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.3123, "0.312"),
        (10240.4, "10,240"),
        (0.000015, "1.50e-05"),
        (64.0, "64"),
        (12.345, "12.35"),
        (123.45, "123.5"),
        (0, "0"),
        (-0.5, "-0.500"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (5e12, "5.00e+12"),
    ],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text


def test_a_gauge_may_use_the_short_name() -> None:
    assert full_name("in_flight") == full_name("rollout/in_flight") == "rollout/in_flight"
    assert full_name("light") == "light"


# -- plain lines -------------------------------------------------------------------------------------


def test_lines_at_most_every_second_and_the_ends_always() -> None:
    clock, out = Clock(), io.StringIO()
    view = PlainView(title="demo", stream=out, clock=clock)
    view.begin("sft", 120)
    for step in range(1, 121):
        view.show(Record("sft", step, 0.0, {"train/loss": 3.12 / step, "perf/tokens_per_s": 10240.0, "odd": 1.0}))
        clock.now += 0.03125
    view.close()
    assert out.getvalue().splitlines() == [
        "demo: sft, 120 steps",
        "sft     1/120  train/loss 3.120  tokens/s 10,240",
        "sft    33/120  train/loss 0.095  tokens/s 10,240  0:02 left",
        "sft    65/120  train/loss 0.048  tokens/s 10,240  0:01 left",
        "sft    97/120  train/loss 0.032  tokens/s 10,240  0:00 left",
        "sft   120/120  train/loss 0.026  tokens/s 10,240",
    ]


def test_a_phase_that_ends_early_still_shows_its_last_step() -> None:
    clock, out = Clock(), io.StringIO()
    view = PlainView(title="demo", stream=out, clock=clock)
    view.begin("sft", 10)
    view.show(Record("sft", 1, 0.0, {"train/loss": 12.5}))
    view.show(Record("sft", 2, 0.0, {"train/loss": 9.5}))
    view.gauge("in_flight", 7)
    view.show(Record("eval", 2, 0.0, {"eval/accuracy": 0.75}))
    view.show(Record("sft", 3, 0.0, {"train/loss": 8.5}))
    view.show(Record("sft", 4, 0.0, {"train/loss": 7.5}))
    view.message("done")
    view.close()
    view.close()
    assert out.getvalue().splitlines() == [
        "demo: sft, 10 steps",
        "sft    1/10  train/loss 12.50",
        "sft    2/10  train/loss 9.500  in flight 7",
        "eval  2  eval/accuracy 0.750",
        "sft    3/10  train/loss 8.500  in flight 7",
        "sft    4/10  train/loss 7.500  in flight 7",
        "done",
    ]


def test_unknown_metrics_are_shown_where_there_is_nothing_else() -> None:
    out = io.StringIO()
    view = PlainView(title="demo", stream=out, clock=Clock())
    view.show(Record("eval", 3, 0.0, {"eval/accuracy": 0.75}))
    assert out.getvalue() == "eval  3  eval/accuracy 0.750\n"


@pytest.mark.parametrize(
    ("metrics", "line"),
    [
        ({"train/ce_loss": 1.5, "train/ppl": 4.48, "train/tokens_per_sec": 2048}, "ce loss 1.500  tokens/s 2,048"),
        ({"train/dpo_loss": 0.5, "train/margin": 1.25, "train/accuracy": 0.75}, "dpo loss 0.500  margin 1.250  "),
        ({"train/orpo_loss": 0.5, "train/log_odds_ratio": -0.25, "train/epoch": 1}, "orpo loss 0.500  log odds -0.250"),
        ({"rollout/reward": 0.5, "rollout/accuracy": 0.5, "train/mean_kl": 0.125}, "reward 0.500  right 0.500  kl 0.1"),
    ],
    ids=["sft", "dpo", "orpo", "rl"],
)
def test_each_recipe_of_the_cookbook_shows_what_matters(metrics: dict[str, float], line: str) -> None:
    out = io.StringIO()
    view = PlainView(title="demo", stream=out, clock=Clock())
    view.show(Record("x", 1, 0.0, {"perf/fwd_bwd_time": 0.5, **metrics}))
    assert line in out.getvalue()
    assert "perf/fwd_bwd_time" not in out.getvalue()


# -- how far it is -----------------------------------------------------------------------------------


def test_the_rest_takes_as_long_as_the_steps_so_far() -> None:
    progress = Progress("sft", 100, began=50.0, now=50.0)
    assert (progress.remaining_s, progress.fraction, progress.done) == (None, 0.0, False)
    progress.reach(1, 52.0)
    progress.reach(25, 100.0)
    assert (progress.remaining_s, progress.fraction) == (150.0, 0.25)
    progress.reach(100, 250.0)
    assert (progress.remaining_s, progress.done) == (None, True)


def test_a_run_that_goes_on_counts_its_own_steps_only() -> None:
    progress = Progress("sft", 100, began=0.0, now=0.0)
    progress.reach(91, 2.0)
    assert (progress.remaining_s, progress.fraction) == (18.0, 0.91)


def test_without_a_total_nothing_is_foretold() -> None:
    progress = Progress("eval", None, began=0.0, now=0.0)
    progress.reach(3, 1.0)
    assert (progress.remaining_s, progress.fraction, progress.done) == (None, 0.0, False)


@pytest.mark.parametrize(("seconds", "text"), [(7.9, "0:07"), (750, "12:30"), (3723, "1:02:03")])
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# -- the live view -----------------------------------------------------------------------------------


def played(width: int, clock: Clock) -> tuple[LiveView, Console]:
    """A view after 200 steps of sft and 30 of 60 steps of rl, on a terminal of that width."""
    console = Console(file=Terminal(), width=width, height=40, force_terminal=True, _environ={"TERM": "xterm"})
    view = LiveView(title="demo", console=console, clock=clock)
    view.begin("sft", 200)
    for step in range(1, 201):
        clock.now += 0.0625
        view.show(Record("sft", step, 0.0, {"train/loss": 3.0 / step}))
    view.begin("rl", 60)
    for step in range(1, 31):
        clock.now += 0.25
        view.gauge("in_flight", 64)
        view.show(Record("rl", step, 0.0, {"rollout/reward": step / 60, "perf/tokens_per_s": 10240.0, "odd/one": 1.0}))
    view.message("weights of step 30\nare served")
    return view, console


def drawn(view: LiveView, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(view.picture())
    return console.export_text()


def test_the_picture_tells_the_state_of_the_run() -> None:
    view, _ = played(100, Clock())
    text = drawn(view, 100)
    view.close()
    lines = text.splitlines()
    assert lines[0] == "demo"
    assert lines[1].startswith("✓ sft")
    assert "200/200" in lines[1]
    assert "0:12" in lines[1]
    assert lines[2].startswith("● rl")
    assert "30/60  0:07 · 0:07 left" in lines[2]
    reward = next(line for line in lines if "reward" in line)
    assert "0.500" in reward
    assert sparkline(range(30), 30) in reward
    assert any("tokens/s" in line and "10,240" in line for line in lines)
    assert any("in flight" in line and "64" in line for line in lines)
    assert lines[-1] == "› weights of step 30 are served"
    assert "odd/one" not in text
    assert "train/loss" not in text  # that of sft, which is over


@pytest.mark.parametrize("width", [20, 30, 45, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    view, _ = played(width, Clock())
    lines = drawn(view, width).splitlines()
    view.close()
    assert len(lines) == 7
    assert max(map(len, lines)) <= width


def test_it_draws_at_most_eight_times_a_second() -> None:
    clock = Clock()
    view, console = played(80, clock)
    out = console.file
    assert isinstance(out, io.StringIO)
    out.truncate(0)
    before = clock.now
    for _ in range(1000):
        clock.now += 0.01
        view.gauge("in_flight", 1)
    pictures = out.getvalue().count("demo")
    view.close()
    assert 60 <= pictures <= 8 * (clock.now - before) + 1


def test_closing_gives_the_terminal_back() -> None:
    stdout, stderr = sys.stdout, sys.stderr
    view, console = played(80, Clock())
    out = console.file
    assert isinstance(out, io.StringIO)
    assert out.getvalue().rfind("\x1b[?25l") > out.getvalue().rfind("\x1b[?25h")
    view.close()
    view.close()
    assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l")
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    assert "weights of step 30 are served" in out.getvalue()  # the last picture, whatever the refresh limit


def test_a_long_history_stays_small() -> None:
    view = LiveView(title="demo", console=Console(file=io.StringIO(), width=80), clock=Clock())
    view.begin("sft", 5000)
    for step in range(1, 5001):
        view.show(Record("sft", step, 0.0, {"train/loss": float(step)}))
    text = drawn(view, 80)
    view.close()
    line = next(line for line in text.splitlines() if "train/loss" in line)
    bars = line.split()[-1]
    assert list(bars) == sorted(bars)
    assert (bars[0], bars[-1]) == ("▁", "█")


def test_records_of_a_phase_that_was_not_announced() -> None:
    view = LiveView(title="demo", console=Console(file=io.StringIO(), width=80), clock=Clock())
    view.gauge("in_flight", 3)
    view.show(Record("eval", 7, 0.0, {"train/loss": math.nan}))
    text = drawn(view, 80)
    view.close()
    assert "● eval" in text
    assert "7" in text
    assert "nan" in text


# -- which view --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "environment", "kind"),
    [
        (Terminal(), {"TERM": "xterm"}, LiveView),
        (Terminal(), {"TERM": "dumb"}, PlainView),
        (Terminal(), {"TERM": "xterm", "CI": "true"}, PlainView),
        (io.StringIO(), {"TERM": "xterm"}, PlainView),
        (None, {"TERM": "xterm"}, PlainView),
    ],
)
def test_the_view_suits_the_stream(
    stream: io.StringIO | None, environment: dict[str, str], kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    view = make_view(title="demo", stream=stream)
    assert type(view) is kind
    assert isinstance(view, Ticking) == (kind is LiveView)


def test_a_plain_view_does_not_load_rich() -> None:
    import subprocess

    script = (
        "import io, sys; from fwasync.tracking.views import make_view; import fwasync.tracking.report; "
        "make_view(title='t', stream=io.StringIO()); sys.exit('rich' in sys.modules or 'httpx' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
