"""`render_report`: a run as one HTML page that needs nothing but itself.

Style and curves are inline; there is no script, and the page's own policy forbids loading anything. All text
is escaped: completions of a model may contain anything. Pure: text in, text out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from fwasync.errors import UsageError
from fwasync.tracking.curves import curve
from fwasync.tracking.headlines import Headline, headlines_of, number
from fwasync.tracking.run import Record
from fwasync.tracking.style import STYLE

__all__ = ("Table", "render_report")

# What HTML forbids even when escaped (controls, lone surrogates, noncharacters); newline and tab stay.
_INVALID = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_NUMBER = re.compile(r"\s*[-+−]?[\d.,]+\s*(%|[A-Za-z/]{1,10})?\s*|\s*[-—–]?\s*")
_LONG = 48
_WIDE = 12


@dataclass(frozen=True)
class Table:
    """A table of a report. Cells are plain text; each row has one for each column."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def render_report(
    *, title: str, summary: Sequence[tuple[str, str]], records: Sequence[Record], tables: Sequence[Table]
) -> str:
    """Render a run as an HTML page.

    Args:
        title: The heading of the page.
        summary: Pairs of label and value, shown as cards.
        records: What was logged. Each metric of each phase becomes a curve: those that everyone looks at first (see
            `fwasync.tracking.headlines`) are open to view, the others behind a click.
        tables: Shown below the curves.

    Returns:
        The page, as text for a UTF-8 file.

    Raises:
        UsageError: A row of a table has more or fewer cells than the table has columns.
    """
    body = [
        f"<header><h1>{_text(title)}</h1></header>",
        *_summary(summary),
        *_curves(records),
        *(_table(table) for table in tables),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n<link rel="icon" href="data:,">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    return escape(_INVALID.sub("\ufffd", text))


def _summary(summary: Sequence[tuple[str, str]]) -> Iterator[str]:
    if summary:
        yield f'<dl class="cards">{"".join(_card(label, value) for label, value in summary)}</dl>'


def _card(label: str, value: str) -> str:
    width = ' class="wide"' if len(value) > _WIDE else ""
    return f"<div{width}><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>"


def _curves(records: Sequence[Record]) -> Iterator[str]:
    sections = [_phase(phase, records) for phase in dict.fromkeys(record.phase for record in records)]
    drawn = [section for section in sections if section]
    for index, section in enumerate(drawn):
        yield f'<section class="phase hue{index % 4}">{section}</section>'
    if drawn:
        yield "<footer>Thin lines are the logged values, bold lines their local trend.</footer>"


def _phase(phase: str, records: Sequence[Record]) -> str:
    """The curves of one phase; empty if there is nothing to draw."""
    own = [record for record in records if record.phase == phase]
    names = dict.fromkeys(name for record in own for name in record.metrics)
    headlines = headlines_of(names)
    others = [Headline(name, name, name) for name in sorted(set(names) - {headline.key for headline in headlines})]
    first, rest = ("".join(_figure(headline, phase, own) for headline in group) for group in (headlines, others))
    if not first:
        first, rest = rest, ""
    more = f'<details><summary>Other metrics</summary><div class="curves">{rest}</div></details>' if rest else ""
    return f'<h2>{_text(phase)}</h2><div class="curves">{first}</div>{more}' if first else ""


def _figure(headline: Headline, phase: str, records: Sequence[Record]) -> str:
    # A step that was logged again, by a run that went back to a checkpoint, counts as it was the last time.
    points = {float(r.step): float(r.metrics[headline.key]) for r in records if headline.key in r.metrics}
    where = _INVALID.sub("\ufffd", f"{headline.title} in phase {phase}")
    drawing = curve(sorted(points.items()), name=where)
    if not drawing:
        return ""
    last = f"<span><small>last</small> <b>{_text(number(points[max(points)]))}</b></span>"
    return f"<figure><figcaption><strong>{_text(headline.title)}</strong>{last}</figcaption>{drawing}</figure>"


def _table(table: Table) -> str:
    kinds = [_kind(table, column) for column in range(len(table.columns))]
    head = "".join(
        f'<th scope="col" class="{kind}">{_text(name)}</th>' for name, kind in zip(table.columns, kinds, strict=True)
    )
    rows = "".join(f"<tr>{_cells(table, row, kinds)}</tr>" for row in table.rows)
    return (
        f'<section><h2>{_text(table.title)}</h2><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{_text(table.title)}"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        "</div></section>"
    )


def _cells(table: Table, row: Sequence[str], kinds: Sequence[str]) -> str:
    if len(row) != len(kinds):
        raise UsageError(
            f"table {table.title!r}: the row {list(row)!r:.200} has {len(row)} cells for {len(kinds)} columns"
        )
    return "".join(f'<td class="{kind}" dir="auto">{_text(cell)}</td>' for cell, kind in zip(row, kinds, strict=True))


def _kind(table: Table, column: int) -> str:
    cells = [row[column] for row in table.rows if column < len(row)]
    if cells and all(_NUMBER.fullmatch(cell) for cell in cells):
        return "number"
    return "long" if any(len(cell) > _LONG or "\n" in cell for cell in cells) else "short"
