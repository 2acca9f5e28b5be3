"""The report is one well-formed page that loads nothing and shows any text as it is."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwasync.errors import UsageError
from fwasync.tracking.curves import curve, smoothed, ticks
from fwasync.tracking.report import Table, render_report
from fwasync.tracking.run import Record

_VOID = {"meta", "link"}
_EMPTY_SVG = {"line", "circle", "polyline"}


class Page(HTMLParser):
    """Checks that tags are balanced, and collects what was found."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _EMPTY_SVG
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def records() -> list[Record]:
    sft = [Record("sft", i, i / 10, {"train/loss": 3 / i, "perf/tokens_per_s": 1e4 + i}) for i in range(1, 101)]
    return [*sft, *(Record("rl", i, 10.0 + i, {"rollout/reward": i / 20, "odd": 1.0}) for i in range(1, 21))]


def page(text: str = "plain") -> Page:
    return Page(
        render_report(
            title=f"title {text}",
            summary=[(f"label {text}", f"value {text}")],
            records=[*records(), Record(f"phase {text}", 1, 0.0, {"train/loss": 1.0})],
            tables=[Table(f"table {text}", [f"column {text}"], [[f"cell {text}"], [text]])],
        )
    )


def test_a_curve_for_each_metric_of_each_phase_the_known_ones_first() -> None:
    built = page()
    assert [svg["aria-label"] for svg in built.all("svg")] == [
        "Loss in phase sft: from 3 to 0.030 over 100 steps",
        "Tokens per second in phase sft: from 10,001 to 10,100 over 100 steps",
        "Reward in phase rl: from 0.050 to 1 over 20 steps",
        "odd in phase rl: from 1 to 1 over 20 steps",
        "Loss in phase phase plain: from 1 to 1 over 1 steps",
    ]
    assert len(built.all("figcaption")) == len(built.all("svg"))
    assert len(built.all("details")) == 1  # of "odd", which nobody looks at first
    assert built.all("html") == [{"lang": "en"}]
    assert "title plain" in built.texts
    assert {"value plain", "column plain", "cell plain"} <= set(built.texts)


def test_it_loads_nothing_and_runs_nothing() -> None:
    hostile = "<script src=https://evil.example/x.js></script><img src=//evil.example onerror=x> http://evil.example"
    built = page(hostile)
    assert {name for name, _ in built.tags} <= {
        "html", "head", "meta", "link", "title", "style", "body", "main", "header", "section", "footer", "div",
        "h1", "h2", "details", "summary", "dl", "dt", "dd", "figure", "figcaption", "strong", "span", "small", "b",
        "svg", "text", "line", "polyline", "circle", "table", "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip
    loaded = [value for _, attributes in built.tags for name, value in attributes.items() if name in ("src", "href")]
    assert loaded == ["data:,"]
    style = built.texts[next(i for i, text in enumerate(built.texts) if "color-scheme" in text)]
    assert "url(" not in style
    assert "@import" not in style
    assert hostile in built.texts


@given(st.text() | st.text(alphabet="<>&\"'/!-\x00\x1b\ud800\ufffe]"))
def test_any_text_is_shown_and_stays_text(text: str) -> None:
    built = page(text)
    assert len(built.tags) == len(page().tags)
    built_text = "".join(built.texts)
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff\ufffe\uffff]", built_text)
    shown = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]", "\ufffd", text)
    assert f"cell {shown}" in built_text


def test_an_empty_run_is_a_page_too() -> None:
    built = Page(render_report(title="nothing", summary=[], records=[], tables=[]))
    assert built.all("svg") == []
    assert built.all("h1") == [{}]


def test_a_metric_that_was_never_finite_has_no_curve() -> None:
    built = Page(
        render_report(title="t", summary=[], records=[Record("sft", 1, 0.0, {"train/loss": math.nan})], tables=[])
    )
    assert built.all("figure") == []


def test_a_step_that_was_logged_again_counts_once() -> None:
    logged = [Record("sft", step, 0.0, {"train/loss": loss}) for step, loss in ((1, 3.0), (2, 9.0), (2, 2.0), (3, 1.0))]
    built = Page(render_report(title="t", summary=[], records=logged, tables=[]))
    assert [svg["aria-label"] for svg in built.all("svg")] == ["Loss in phase sft: from 3 to 1 over 3 steps"]


def test_metrics_that_nobody_knows_are_open_to_view_where_there_are_no_others() -> None:
    built = Page(render_report(title="t", summary=[], records=[Record("x", 1, 0.0, {"mine/a": 1.0})], tables=[]))
    assert len(built.all("svg")) == 1
    assert built.all("details") == []


def test_a_ragged_table_is_refused() -> None:
    with pytest.raises(UsageError, match=r"table 'after': the row \['a'\] has 1 cells for 2 columns"):
        render_report(title="t", summary=[], records=[], tables=[Table("after", ["x", "y"], [["a", "b"], ["a"]])])


def test_columns_of_numbers_are_aligned() -> None:
    table = Table("t", ["name", "before", "after"], [["a", "1.5", "6.2 %"], ["b", "-2", "12,000"]])
    built = Page(render_report(title="t", summary=[], records=[], tables=[table]))
    assert [cell["class"] for cell in built.all("th")] == ["short", "number", "number"]


# -- curves ------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 10**9), st.floats()), max_size=80))
def test_a_curve_can_be_drawn_of_anything(points: list[tuple[int, float]]) -> None:
    drawing = curve(sorted((float(x), y) for x, y in points), name="x")
    assert (drawing == "") == (not any(abs(y) < 1e100 for _, y in points))
    for places in re.findall(r'points="([^"]*)"', drawing):
        for place in places.split():
            x, y = map(float, place.split(","))
            assert 0 <= x <= 380
            assert -40 <= y <= 270  # the trend may leave the range of the values a little


def test_a_long_curve_stays_small_and_keeps_its_ends() -> None:
    drawing = curve([(float(i), float(i)) for i in range(100_000)], name="x")
    assert len(drawing) < 40_000
    assert "from 83" in drawing  # the mean of the first hundred and sixty-seven


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_round_and_within_the_ends(low: float, span: float) -> None:
    high = low + span
    if high - low < 1e-7 * max(abs(low), abs(high)):
        return
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 6
    assert low - span * 1e-6 <= marks[0]
    assert marks[-1] <= high + span * 1e-6
    steps = [b - a for a, b in pairwise(marks)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-6)
    assert f"{steps[0]:.0e}"[0] in "125"


def test_the_trend_follows_a_line_exactly_and_evens_out_noise() -> None:
    line = [(float(i), 2.0 * i - 5) for i in range(40)]
    assert smoothed(line) == [(x, pytest.approx(y)) for x, y in line]
    noisy = [(float(i), (-1.0) ** i) for i in range(100)]
    assert max(abs(y) for _, y in smoothed(noisy)[10:-10]) < 0.1
