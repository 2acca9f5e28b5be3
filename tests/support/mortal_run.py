"""Runs of a recipe that die where a test wants: a process that has everything imported, and forks one for each run.

The recipe is its argument. It reads one JSON object a line: `base_url`, `api_key`, `config`, and `dies`, which is
`null` or one of

* `["before", n]`, `["after", n]`: killed before the n-th request is sent, or before its answer is seen;
* `["torn", n]`: killed in the middle of the n-th line of `checkpoints.jsonl`;
* `["unsynced", n]`: killed before the n-th time that something is to be synced to the disk;

and answers each with the exit status of that run, negative for a signal.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from typing import Any

RECIPE = sys.argv[1]
if RECIPE in ("sft", "rl"):  # which take long to import, and are not needed
    sys.modules.update(torch=None, transformers=None)  # pyright: ignore[reportCallIssue, reportArgumentType]

import anyio  # noqa: E402
import httpx  # noqa: E402
import tinker.types  # noqa: E402, F401

from fwasync import AsyncServiceClient, RetryPolicy  # noqa: E402
from fwasync._http.transport import default_transport  # noqa: E402
from fwasync.checkpoints import ledger  # noqa: E402
from fwasync.errors import FwasyncError  # noqa: E402
from fwasync.recipes.trainers import Where  # noqa: E402

recipe = importlib.import_module(f"fwasync.recipes.{RECIPE}")
FOLLOWED = ("retrieve_future", "session_heartbeat")  # how often these are sent depends on time


def reward(text: str, row: object) -> float:
    """One that differs from answer to answer."""
    return sum(map(ord, text)) % 101 / 100


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Mortal(httpx.AsyncBaseTransport):
    def __init__(self, base_url: str, when: str, number: int) -> None:
        self.inner = default_transport(base_url)
        self.when, self.number = when, number

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        counted = not request.url.path.endswith(FOLLOWED)
        self.number -= counted
        is_due = counted and self.number == 0  # others may be under way by the time of the answer
        if is_due and self.when == "before":
            die()
        response = await self.inner.handle_async_request(request)
        if is_due and self.when == "after":
            die()
        return response

    async def aclose(self) -> None:
        await self.inner.aclose()


def arm(when: str, number: int) -> None:
    """See to it that this process dies at the n-th line, or the n-th sync."""
    count = 0

    def is_due() -> bool:
        nonlocal count
        count += 1
        return count == number

    write, sync = ledger._write_all, os.fsync

    def torn(file: Any, content: bytes) -> None:
        if is_due():
            write(file, content[: len(content) // 2])
            die()
        write(file, content)

    def unsynced(descriptor: int) -> None:
        if is_due():
            die()
        sync(descriptor)

    if when == "torn":
        ledger._write_all = torn
    elif when == "unsynced":
        os.fsync = unsynced


async def run(order: dict[str, Any]) -> None:
    when, number = order["dies"] or ("never", 0)
    arm(when, number)
    url, impatient = order["base_url"], RetryPolicy(base_s=0.01, cap_s=0.02, budget_s=0.1)
    transport = Mortal(url, when, number)
    async with AsyncServiceClient(url, order["api_key"], retry=impatient, transport=transport) as service:
        more = {"reward": reward} if RECIPE == "rl" else {}
        await recipe.train(recipe.Config.model_validate(order["config"]), where=Where(service=service), **more)


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if not child:
            status = 1
            try:
                anyio.run(run, json.loads(line))
                status = 0
            except FwasyncError as error:
                sys.stderr.write(f"{error}\n")
            finally:
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(ended), flush=True)


if __name__ == "__main__":
    main()
