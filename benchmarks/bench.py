"""The short form of all cases, and the page of documentation that it is written into: `make bench`.

python benchmarks/bench.py [--only-page] [NAME …]

Named cases alone are measured; the page is written of what was measured last of each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import bars
import harness
from harness import Column, Machine

CASES = ("sampling", "tinker_sampling", "training", "batches", "custom_loss", "cancelling", "imports")
DOCS = harness.HERE.parent / "docs"
INTRODUCTION = """# Benchmarks

What fwasync costs beside the other SDKs, and beside a client for one purpose that was written by hand (the floor): all
against one server that does nothing, fast, each in a process of its own and in turn, in the same run. `make bench`
measures all of it in some ten minutes and writes this page; `benchmarks/README.md` says how.

Ratios are what to look at: absolute figures move with the machine and its neighbours. Each figure is the median of the
rounds, with the least and the largest in brackets; an asterisk marks a client that was cut off after a while. CPU is
that of the client's whole process for each finished operation; the longest stall is how late a timer of the caller's
loop was called.
"""

Result = dict[str, Any]


def results() -> list[Result]:
    """What was measured last, of each case that was."""
    paths = [harness.RESULTS / f"{name}.json" for name in CASES]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def cells(result: Result) -> dict[str, list[Result]]:
    """The rows of each cell."""
    found: dict[str, list[Result]] = {}
    for row in result["rows"]:
        found.setdefault(row["cell"], []).append(row)
    return found


def markdown(lines: list[list[str]]) -> str:
    first, *rest = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([first, "|---" + "|---:" * (len(lines[0]) - 1) + "|", *rest]) + "\n"


def ratios(result: Result) -> Iterator[list[str]]:
    """A line for each cell: fwasync's ratios to others."""
    columns = [Column(**column) for column in result["columns"] if column["against"]]
    for cell, rows in cells(result).items():
        for name, *values in harness.table(columns, rows)[1:]:
            if bars.OURS in name:
                told = [
                    f"{value.replace('x', '')} x {column.title} of {column.against}"
                    for value, column in zip(values, columns, strict=True)
                    if value != "–"
                ]
                if told:
                    yield [f"{result['title']}: {cell}", name, ", ".join(told)]


def section(result: Result) -> str:
    """A case: what it is, its plot and its tables."""
    _, _, *about = result["about"].strip().split("\n\n")
    machine = Machine(**result["machine"])
    columns = [Column(**column) for column in result["columns"]]
    parts = [
        f"## {result['title']}\n",
        *(f"{paragraph}\n" for paragraph in about),
        f"![{result['title']}: {plotted(result).title}](benchmarks/{result['name']}.svg)\n",
        *(f"**{cell}**\n\n{markdown(harness.table(columns, rows))}" for cell, rows in cells(result).items()),
        f"`{result['command']}`, {machine.line()} and {result['load_after']:.1f} after; "
        f"{', '.join(result['versions'])}\n",
    ]
    return "\n".join(parts)


def plotted(result: Result) -> Column:
    return next(
        Column(**column) for column in result["columns"] if column["key"] == result["plot"] and not column["against"]
    )


def plot(result: Result) -> str:
    column = plotted(result)
    values = {
        cell: {
            name: harness.median([row for row in rows if row["client"] == name], column.key)
            for name in dict.fromkeys(row["client"] for row in rows if column.key in row)
        }
        for cell, rows in cells(result).items()
    }
    return bars.bars(column.title, values)


def write_page() -> None:
    """Write docs/benchmarks.md, and the plots beside it."""
    found = results()
    summary = [["", "client", "compared"], *(line for result in found for line in ratios(result))]
    sections = [section(result) for result in found]
    page = "\n".join([INTRODUCTION, markdown(summary).replace("---:", "---"), *sections])
    (DOCS / "benchmarks.md").write_text(page, encoding="utf-8")
    (DOCS / "benchmarks").mkdir(exist_ok=True)
    for result in found:
        (DOCS / "benchmarks" / f"{result['name']}.svg").write_text(plot(result), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=CASES, metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--only-page", action="store_true", help="measure nothing")
    options = parser.parse_args()
    for name in () if options.only_page else options.names:
        subprocess.run([sys.executable, str(harness.HERE / f"{name}.py"), "--short"], check=True)
    write_page()


if __name__ == "__main__":
    main()
