"""What it costs to import a client, in fresh processes.

python benchmarks/imports.py [--short] [--rounds 5]

Each import runs in new interpreters that have done nothing else; the first of a round, which may have to compile, does
not count. "heavy modules" is how many of a list are loaded after it (see `HEAVY`). `import fwasync` looks names up only
when they are asked for; so what the first use of a name costs has rows of its own.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Awaitable, Callable

import anyio
import harness
from harness import Case, Cell, Client, Column, Measures, Settings

HEAVY = ("torch", "transformers", "tinker", "httpx", "aiohttp", "pydantic", "numpy", "anyio")
TINKER = "import tinker"

SCRIPT = """
import sys, time
wall, cpu = time.perf_counter(), time.process_time()
{statement}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
modules, heavy = len(sys.modules), [name for name in {heavy} if name in sys.modules]
try:  # what getrusage says is not less than the parent's
    with open("/proc/self/status") as status:
        rss = int(status.read().partition("VmHWM:")[2].split()[0]) / 2**10
except OSError:
    import resource
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
import json
found = {{"wall_ms": wall * 1e3, "cpu_ms": cpu * 1e3, "rss_mb": rss, "modules": modules, "heavy": heavy}}
print(json.dumps(found))
"""


def importing(statement: str) -> Callable[[str, Settings], Awaitable[Measures]]:
    async def run(_url: str, settings: Settings) -> Measures:
        script = SCRIPT.format(statement=statement, heavy=HEAVY)
        command = [sys.executable, "-W", "ignore", "-c", script]
        found = [json.loads((await anyio.run_process(command)).stdout) for _ in range(settings["count"] + 1)][1:]
        measures = {key: statistics.median(row[key] for row in found) for key in found[0] if key != "heavy"}
        return measures | {"heavy": len(found[0]["heavy"]), "heavy_names": found[0]["heavy"]}

    return run


def client(statement: str, package: str | None = None, environment: str | None = None) -> Client:
    return Client(importing(statement), package, environment)


OURS = (
    "import fwasync",
    "from fwasync import AsyncServiceClient",
    "from fwasync import AsyncDeploymentSampler",
    "from fwasync.types import Datum",
)
LIBRARIES = ("asyncio", "anyio", "httpx", "aiohttp", "pydantic", "msgspec", "numpy")

CASE = Case(
    name="imports",
    title="Imports, in fresh processes",
    clients={
        "nothing": client("pass"),
        **{statement: client(statement, "fwasync") for statement in OURS},
        TINKER: client(TINKER, "tinker", "tinker"),
        "import fireworks.training.sdk.client": client(
            "import fireworks.training.sdk.client", "fireworks-ai", "fireworks"
        ),
        "from fireworks.training.sdk import DeploymentSampler": client(
            "from fireworks.training.sdk import DeploymentSampler", "fireworks-ai", "fireworks"
        ),
        **{f"import {name}": client(f"import {name}", name) for name in LIBRARIES if name != "asyncio"},
        "import asyncio": client("import asyncio"),
    },
    cells=[Cell("imports", {"count": 5}, is_short=True)],
    columns=(
        Column("cpu_ms", "CPU ms"),
        Column("cpu_ms", "CPU", against=TINKER),
        Column("wall_ms", "wall ms"),
        Column("rss_mb", "peak RSS MB", 0),
        Column("modules", "modules", 0),
        Column("heavy", "heavy modules", 0),
    ),
    tiny={"count": 1},
)

if __name__ == "__main__":
    harness.main(CASE)
