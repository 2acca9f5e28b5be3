"""Runs the clients of a case in turn, each in a process of its own, and tells medians, spread and ratios.

A script names its case and ends with `harness.main(CASE)`. What a client does is a coroutine function of the server's
URL and a cell's settings, in the script too: `main` runs it in a new process of the script, with the interpreter of the
client's environment. So this module and the scripts import what is not of every environment inside functions only.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

import anyio

HERE = Path(__file__).resolve().parent
RESULTS = Path(os.environ.get("FWASYNC_BENCHMARK_RESULTS", HERE / "results"))
SERVER, CLIENT = 0, -1
"""Which of the cores a process is held to: the first, or the last."""

Settings = dict[str, Any]
Measures = dict[str, Any]
"""Numbers that columns show, and what else is to be kept of a round."""


@dataclass(frozen=True)
class Client:
    """Who takes part.

    Attributes:
        run: Does what a cell asks for, and measures it.
        package: Whose version is told; `None` has none.
        environment: Name of the environment (see `environments`) it runs in; `None` is this one.
        share: What part of a cell's `count` it does: less than all where it is slow.
        short_rounds: How many rounds it takes part in of the short form's.
    """

    run: Callable[[str, Settings], Coroutine[Any, Any, Measures]]
    package: str | None = None
    environment: str | None = None
    share: float = 1.0
    short_rounds: int = 3


@dataclass(frozen=True)
class Cell:
    """What is measured at a time.

    Attributes:
        name: What a reader calls it.
        settings: What the clients' functions are given, JSON.
        is_short: Whether it is of the short form too.
        without: Clients that do not take part, since they would take minutes.
    """

    name: str
    settings: Settings
    is_short: bool = False
    without: Sequence[str] = ()


@dataclass(frozen=True)
class Column:
    """A measure in the table: its median and range, or the ratio of its median to that of another client."""

    key: str
    title: str
    digits: int = 1
    against: str | None = None


RATE = Column("per_s", "per second", 0)
CPU = Column("cpu_ms", "CPU ms each", 3)
STALL = Column("stall_ms", "longest stall ms")
STALL_CPU = Column("stall_cpu_ms", "of its own CPU")
SERVER_BUSY = Column("server_busy", "server busy", 2)
MEMORY = Column("rss_mb", "peak RSS MB", 0)


@dataclass(frozen=True)
class Case:
    """A script's case.

    Attributes:
        name: The script's.
        title: What a reader calls it.
        clients: Who takes part, in this order.
        cells: What is measured.
        columns: What is shown of it.
        plot: The measure that is plotted.
        tiny: Settings that make every cell quick, for a test that it still runs.
        rounds: How often each client has its turn, but in the short form.
    """

    name: str
    title: str
    clients: Mapping[str, Client]
    cells: Sequence[Cell]
    columns: Sequence[Column] = (RATE, CPU, STALL, MEMORY)
    plot: str = "cpu_ms"
    tiny: Settings = field(default_factory=dict[str, Any])
    rounds: int = 5


# -- in a client's process -------------------------------------------------------------------------


async def load(one: Callable[[], Awaitable[object]], in_flight: int, count: int, ended: list[float]) -> None:
    """Keep so many calls under way until `count` have ended; each notes when."""
    left = count

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            await one()
            ended.append(time.perf_counter())

    async with anyio.create_task_group() as workers:
        for _ in range(min(in_flight, count)):
            workers.start_soon(worker)


class Stall:
    """How long the loop is kept from calling what is due, at most; in ms. It looks every millisecond.

    `cpu_ms` is the CPU time of this process between two looks, at most: what it kept its loop from, whatever the
    neighbours on the machine did.
    """

    def __init__(self) -> None:
        self.ms = self.cpu_ms = 0.0

    def __enter__(self) -> Stall:
        self._loop = asyncio.get_running_loop()
        self._cpu = time.process_time()
        self._tick_at(self._loop.time())
        return self

    def measures(self) -> Measures:
        return {"stall_ms": self.ms, "stall_cpu_ms": self.cpu_ms}

    def _tick_at(self, due: float) -> None:
        now, cpu = self._loop.time(), time.process_time()
        self.ms = max(self.ms, (now - due) * 1e3)
        self.cpu_ms, self._cpu = max(self.cpu_ms, (cpu - self._cpu) * 1e3), cpu
        self._timer = self._loop.call_at(now + 1e-3, self._tick_at, now + 1e-3)

    def __exit__(self, *_: object) -> None:
        self._tick_at(self._timer.when())
        self._timer.cancel()


async def measure(
    one: Callable[[], Awaitable[object]], url: str, in_flight: int, count: int, limit_s: float = 15.0
) -> Measures:
    """What calls cost, of which so many are under way at a time.

    The loop's stalls are measured in a first pass, which warms up what is to be warm; all else in a second one, which
    nothing that looks disturbs. A pass that takes more than `limit_s` of CPU time is cut off: what has ended until then
    counts, and the process ends with it, since a client that is so slow may be slow to cancel too.
    """
    await load(one, 1, 3, [])  # as below, so that the first pass imports nothing any more
    gc.collect()
    gc.freeze()  # a full collection walks through what is imported, which stops the loop of whomever it happens to
    stall = Stall()
    await passed(one, url, in_flight, max(in_flight, count // 4), limit_s, stall.measures, stall)
    return await passed(one, url, in_flight, count, limit_s, stall.measures)


async def passed(
    one: Callable[[], Awaitable[object]],
    url: str,
    in_flight: int,
    count: int,
    limit_s: float,
    more: Callable[[], Measures],
    stall: Stall | None = None,
) -> Measures:
    """One pass, and what was measured beside."""
    ended: list[float] = []
    served, cpu, started = server_counts(url)["cpu_s"], time.process_time(), time.perf_counter()
    task = asyncio.ensure_future(load(one, in_flight, count, ended))
    with stall or nullcontext():  # asking the server blocks
        while not task.done() and time.process_time() - cpu < limit_s:
            await asyncio.wait({task}, timeout=0.5)
    wall, cpu, done = time.perf_counter() - started, time.process_time() - cpu, max(len(ended), 1)
    measures = {
        "per_s": done / wall,
        "cpu_ms": cpu / done * 1e3,
        "server_busy": (server_counts(url)["cpu_s"] - served) / wall,
        "done": len(ended),
        **more(),
    }
    if not task.done():
        report(measures | {"cut_off": 1})
    await task
    return measures


def server_counts(url: str) -> dict[str, float]:
    """What the neutral server says of itself."""
    with urllib.request.urlopen(f"{url}/bench") as answer:
        return json.load(answer)


def peak_rss_mb() -> float:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        scale = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**10


def restart_peak_rss_mb() -> float:
    """Let the peak begin anew, where that can be done (on Linux); what is resident now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_rss_mb()


def report(measures: Measures) -> NoReturn:
    """End this process with its measures: whatever a client leaves running ends too."""
    print(json.dumps({"rss_mb": peak_rss_mb()} | measures), flush=True)
    os._exit(0)


def pin(which: int) -> int | None:
    """Hold this process to a core of its own, where that can be done."""
    if not hasattr(os, "sched_setaffinity") or len(cores := sorted(os.sched_getaffinity(0))) < 2:
        return None
    os.sched_setaffinity(0, {cores[which]})
    return cores[which]


# -- in the script's own ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Where and when, for the reader to judge by."""

    date: str
    python: str
    cores: int
    processor: str
    load: float

    def line(self) -> str:
        return (
            f"{self.date}, Python {self.python}, {self.cores} cores ({self.processor}), "
            f"load average {self.load:.1f} before"
        )


def machine() -> Machine:
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return Machine(str(date.today()), platform.python_version(), os.cpu_count() or 1, processor, os.getloadavg()[0])


def interpreter(client: Client) -> str:
    """Which a client runs with; its environment is made if need be."""
    import environments

    return environments.ENVIRONMENTS[client.environment]() if client.environment else sys.executable


def version_of(client: Client) -> str | None:
    """The version of its package, as its environment has it."""
    if client.package is None:
        return None
    program = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    done = subprocess.run(
        [interpreter(client), "-c", program, client.package], capture_output=True, text=True, check=True
    )
    return f"{client.package} {done.stdout.strip()}"


def allow_connections(wanted: int = 10_000) -> None:
    """Let this process and those that it starts have so many files open, where that is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def server() -> Generator[str]:
    """A neutral server in a process of its own, on a core of its own; its URL."""
    allow_connections()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    command = [sys.executable, str(HERE / "neutral_server.py")]
    if len(cores) > 1:
        command += ["--core", str(cores[SERVER])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate()


def run_client(script: str, name: str, client: Client, url: str, settings: Settings) -> Measures:
    """Run a client in a process of its own."""
    settings = dict(settings)
    if "count" in settings:
        settings["count"] = max(int(settings["count"] * client.share), settings.get("in_flight", 1))
    command = [
        interpreter(client),
        "-W",
        "ignore",
        script,
        "--client",
        name,
        "--url",
        url,
        "--settings",
        json.dumps(settings),
    ]
    environment = {**os.environ, "TINKER_TELEMETRY": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=3600)
    if done.returncode or not done.stdout:
        sys.exit(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(case: Case, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each client, cell and round; in turn, so that a busy minute of the machine hits all.

    Each has a server of its own: what one client has left there is nothing to the next.
    """
    script = str(Path(sys.argv[0]).resolve())
    cells = [cell for cell in case.cells if (cell.is_short or not options.short) and options.cell in cell.name]
    for cell in cells:
        settings = cell.settings | (case.tiny if options.tiny else {})
        for number in range(options.rounds):
            for name, client in case.clients.items():
                if name in cell.without or (options.tiny and client.environment):
                    continue
                if options.short and number >= client.short_rounds:
                    continue
                with server() as url:
                    measures = run_client(script, name, client, url, settings)
                yield {"cell": cell.name, "client": name, "round": number, **measures}


def median(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def formatted(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def told(column: Column, rows: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> str:
    """A measure in a table."""
    if not all(column.key in row for row in rows):
        return "–"
    middle = median(rows, column.key)
    if column.against is not None:
        return f"{middle / median(others, column.key):.2f}x" if others else "–"
    low, high = min(row[column.key] for row in rows), max(row[column.key] for row in rows)
    shown = formatted(middle, column.digits)
    if len(rows) > 1:
        shown += f" ({formatted(low, column.digits)}–{formatted(high, column.digits)})"
    return shown + ("*" if any("cut_off" in row for row in rows) else "")


def table(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The lines of a cell, after one of titles."""
    names = list(dict.fromkeys(row["client"] for row in rows))
    of = {name: [row for row in rows if row["client"] == name] for name in names}
    lines = [
        [name, *(told(column, of[name], of.get(column.against or "", ())) for column in columns)] for name in names
    ]
    titles = [f"{column.title} ÷ {column.against}" if column.against else column.title for column in columns]
    return [["", *titles], *lines]


def show(title: str, lines: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        first, *rest = (
            text.ljust(width) if not at else text.rjust(width)
            for at, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join([first, *rest]))


def main(case: Case) -> None:
    """The script's command: all clients, or (in their processes) one."""
    parser = argparse.ArgumentParser(description=case.title)
    parser.add_argument("--short", action="store_true", help="the cells that tell most, three rounds")
    parser.add_argument(
        "--tiny", action="store_true", help="only to see that it runs: fwasync and the floor, one round"
    )
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--cell", default="", help="only cells with this in their names")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        pin(CLIENT)
        report(asyncio.run(case.clients[options.client].run(options.url, options.settings)))
    options.rounds = options.rounds or (1 if options.tiny else 3 if options.short else case.rounds)
    where, rows = machine(), list[dict[str, Any]]()
    print(case.title, where.line(), sep="\n")
    for row in measured(case, options):
        rows.append(row)
        print(f"  {row['cell']}: {row['client']}", file=sys.stderr)
    for cell in dict.fromkeys(row["cell"] for row in rows):
        show(cell, table(case.columns, [row for row in rows if row["cell"] == cell]))
    print(f"\nload average {os.getloadavg()[0]:.1f} after")
    if not options.tiny:
        RESULTS.mkdir(exist_ok=True, parents=True)
        result = {
            "name": case.name,
            "title": case.title,
            "command": shlex.join(["python", f"benchmarks/{case.name}.py", *sys.argv[1:]]),
            "machine": asdict(where),
            "load_after": os.getloadavg()[0],
            "about": sys.modules["__main__"].__doc__,
            "versions": [version for client in case.clients.values() if (version := version_of(client))],
            "plot": case.plot,
            "columns": [asdict(column) for column in case.columns],
            "rows": rows,
        }
        (RESULTS / f"{case.name}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
