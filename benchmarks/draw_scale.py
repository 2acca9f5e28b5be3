"""Draw the curves of docs/scale.md.

python benchmarks/draw_scale.py [--measure]

They are of what `sampling.py`, `rollout_scale.py`, `batches.py` and `long_run.py` measured last; `--measure` runs these
before.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import charts
import harness
import trainers
from charts import Panel, Points

DOCS = harness.HERE.parent / "docs" / "scale"
RESULTS = harness.HERE / "results" / "scale"
"""Not those of the page of benchmarks: other cells are measured."""

Rows = Sequence[dict[str, Any]]


def rows_of(name: str) -> Rows | None:
    """What a script measured, if it has."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else None


def medians(rows: Rows, client: str, key: str, size: Callable[[str], float | None]) -> Points:
    """A client's median of each size."""
    sizes = {cell: size(cell) for cell in dict.fromkeys(row["cell"] for row in rows)}
    points: list[tuple[float, float]] = []
    for cell, x in sizes.items():
        found = [row for row in rows if row["cell"] == cell and row["client"] == client and key in row]
        if x is not None and found:
            points.append((x, harness.median(found, key)))
    return sorted(points)


def curves(rows: Rows, clients: Sequence[str], key: str, size: Callable[[str], float | None]) -> dict[str, Points]:
    found = {client: medians(rows, client, key, size) for client in clients}
    return {client: points for client, points in found.items() if points}


def at_once(cell: str) -> float | None:
    """How many are in flight, where the server answers at once."""
    return in_flight(cell, "")


def paced(cell: str) -> float | None:
    """How many are in flight, where the server takes 20 ms for each event."""
    return in_flight(cell, ", 20 ms an event")


def in_flight(cell: str, pace: str) -> float | None:
    found = re.fullmatch(rf"([\d,]+) in flight, 64 tokens, streamed{pace}", cell)
    return float(found[1].replace(",", "")) if found else None


def datums(cell: str) -> float | None:
    return float(cell.partition(" ")[0].replace(",", ""))


def sampling(rows: Rows) -> list[Panel]:
    clients = ("fwasync", "Fireworks SDK", "floor")
    x_label = "completions in flight"
    return [
        Panel("CPU ms a completion, answered at once", x_label, curves(rows, clients, "cpu_ms", at_once)),
        Panel("Peak memory of the process, MB", x_label, curves(rows, clients, "rss_mb", at_once)),
        Panel("CPU ms a completion, 20 ms an event", x_label, curves(rows, clients, "cpu_ms", paced)),
        Panel("Completions a second, 20 ms an event", x_label, curves(rows, clients, "per_s", paced)),
    ]


def rollouts(rows: Rows) -> list[Panel]:
    def points(key: str) -> dict[str, Points]:
        return {"fwasync": [(row["in_flight"], row[key]) for row in rows]}

    return [
        Panel("Memory of the rollouts, MB", "rollouts in flight", points("mb")),
        Panel("CPU ms a rollout of two turns", "rollouts in flight", points("cpu_ms_per_rollout")),
    ]


def batches(rows: Rows) -> list[Panel]:
    clients = (
        trainers.FWASYNC_JSON,
        trainers.FIRETITAN,
        trainers.FWASYNC_PROTOBUF,
        trainers.TINKER,
        trainers.FLOOR_PROTOBUF,
    )
    titles = {
        "cpu_ms": "CPU ms a batch",
        "stall_cpu_ms": "Longest stall of its own making, CPU ms",
        "grown_mb": "Memory beyond the batch itself, MB",
        "wire_mb": "MB sent",
    }
    return [Panel(title, "datums of 4,096 tokens", curves(rows, clients, key, datums)) for key, title in titles.items()]


def long_run(rows: Rows) -> list[Panel]:
    windows = {f"fwasync, {row['cell']}": row["windows"] for row in rows if row["round"] == 0}

    def points(key: str) -> dict[str, Points]:
        return {name: [(window["step"], window[key]) for window in found] for name, found in windows.items()}

    return [
        Panel("Resident memory, MB", "steps", points("rss_mb"), is_log_x=False, is_log_y=False),
        Panel("CPU ms a step", "steps", points("cpu_ms"), is_log_x=False, is_log_y=False),
        Panel("Latency of a step, ms: median", "steps", points("p50_ms"), is_log_x=False, is_log_y=False),
        Panel("Latency of a step, ms: 99th percentile", "steps", points("p99_ms"), is_log_x=False, is_log_y=False),
    ]


ONLY = {"sampling": ("--cell", "64 tokens, streamed", "--rounds", "1"), "batches": ("--rounds", "1")}
"""What is enough for the curves."""
SHEETS = {"sampling": sampling, "rollout_scale": rollouts, "batches": batches, "long_run": long_run}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", action="store_true")
    if parser.parse_args().measure:
        environment = {**os.environ, "FWASYNC_BENCHMARK_RESULTS": str(RESULTS)}
        for name in SHEETS:
            command = [sys.executable, str(harness.HERE / f"{name}.py"), *ONLY.get(name, ())]
            subprocess.run(command, check=True, env=environment)
    DOCS.mkdir(exist_ok=True)
    for name, panels in SHEETS.items():
        if (rows := rows_of(name)) is None:
            print(f"{name}: not measured")
            continue
        path = DOCS / f"{name}.svg"
        path.write_text(charts.sheet([panel for panel in panels(rows) if panel.curves]), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
