"""Start the service as a child process, and make sure that it ends.

Invariants
    * The child ends with the `async with`, however that is left, and with this process, however that dies.
    * Nothing here blocks the event loop.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

import anyio
import anyio.to_thread
import msgspec
from anyio.abc import Process

from fwasync.local.data_dir import KEY_VARIABLE, read_key

__all__ = ("LocalService", "LocalServiceError", "launch")

# How long each of the three ways to end a child may take.
_PATIENCE_S = 0.6
_LAST_LINES = 15


class LocalServiceError(RuntimeError):
    """The local service did not start; the message holds what it said last."""


@dataclass(frozen=True, slots=True)
class LocalService:
    """A running local service.

    Attributes:
        base_url: What to give to a client as `base_url`.
        api_key: What to give to a client as `api_key`; not shown in the repr.
        data_dir: Where its checkpoints, snapshots, tokenizer and log are.
        pid: Its process.
    """

    base_url: str
    api_key: str = field(repr=False)
    data_dir: Path
    pid: int


class _Ready(msgspec.Struct):
    base_url: str


@asynccontextmanager
async def launch(
    data_dir: Path | None = None,
    *,
    api_key: str | None = None,
    port: int = 0,
    faults: bool = False,
    startup_timeout: float = 60.0,
) -> AsyncGenerator[LocalService, None]:
    """Run the local service as a child process for as long as the `async with` lasts.

    ```python
    async with fwasync.local.launch() as service:
        print(service.base_url)
    ```

    Args:
        data_dir: Where the service keeps everything; what was saved there before can be loaded again. By
            default a temporary directory, removed at the end.
        api_key: The key that clients must show; by default the environment's `FWASYNC_LOCAL_API_KEY`, else the
            data directory's, else a new one.
        port: 0 is any free port.
        faults: Serve the admin API that scripts faults, see `fwasync.testing`.
        startup_timeout: Seconds that it may take to start.

    Raises:
        LocalServiceError: It did not start.

    **Cancellation:** the child is ended and reaped, in two seconds at most, wherever it strikes.
    """
    root = await anyio.to_thread.run_sync(_make_root, data_dir)
    try:
        async with _child(root, api_key, port, faults=faults) as (process, log_start):
            ready = await _wait_until_ready(process, root, log_start, startup_timeout)
            key = api_key or os.environ.get(KEY_VARIABLE)
            key = key or await anyio.to_thread.run_sync(read_key, root)
            if not key:
                raise LocalServiceError(f"the local service left no API key in {root}")
            yield LocalService(ready.base_url, key, root, process.pid)
    finally:
        if data_dir is None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(partial(shutil.rmtree, root, ignore_errors=True))


@asynccontextmanager
async def _child(
    root: Path, api_key: str | None, port: int, *, faults: bool
) -> AsyncGenerator[tuple[Process, int], None]:
    """A started child, and where in the log its words begin."""
    log = await anyio.to_thread.run_sync(_open_log, root)
    try:
        log_start = log.tell()
        process = await _start(root, log, api_key, port, faults=faults)
    finally:
        log.close()
    try:
        yield process, log_start
    finally:
        with anyio.CancelScope(shield=True):
            await _end(process)


async def _start(root: Path, log: IO[bytes], api_key: str | None, port: int, *, faults: bool) -> Process:
    # -P: the directory where the user happens to be is no place to import from.
    command = [sys.executable, "-P", "-m", "fwasync.local", "--exit-with-parent"]
    command += ["--data-dir", str(root), "--port", str(port), *(["--faults"] if faults else [])]
    # Shielded: whoever starts a child must also hold it. A session of its own: Ctrl-C in the terminal is for
    # the parent, which then ends the child in order.
    with anyio.CancelScope(shield=True):
        return await anyio.open_process(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, KEY_VARIABLE: api_key} if api_key else None,
            start_new_session=True,
            creationflags=subprocess.CREATE_NEW_PROCESS_GROUP if sys.platform == "win32" else 0,
        )
    raise AssertionError  # the scope swallows nothing: it is never cancelled itself


async def _end(process: Process) -> None:
    """Ask the child to end, tell it to, make it; and reap it."""

    async def close_stdin() -> None:
        if process.stdin is not None:
            with contextlib.suppress(OSError, anyio.BrokenResourceError):
                await process.stdin.aclose()

    for way in (close_stdin, process.terminate, process.kill):
        with anyio.move_on_after(_PATIENCE_S):
            with contextlib.suppress(ProcessLookupError):
                outcome = way()
                if outcome is not None:
                    await outcome
            await process.wait()
            break
    await process.aclose()


async def _wait_until_ready(process: Process, root: Path, log_start: int, timeout: float) -> _Ready:
    line = b""
    with anyio.move_on_after(timeout) as scope:
        line = await _first_line(process)
    try:
        return msgspec.json.decode(line, type=_Ready)
    except msgspec.MsgspecError:
        what = f"did not get ready within {timeout:g} s" if scope.cancelled_caught else "ended while it started"
        said = await anyio.to_thread.run_sync(_last_words, root, log_start)
        raise LocalServiceError(f"the local service {what}; it said:\n{said or '(nothing)'}") from None


async def _first_line(process: Process) -> bytes:
    line = b""
    if process.stdout is None:
        raise AssertionError  # it was started with a pipe
    while not line.endswith(b"\n"):
        try:
            line += await process.stdout.receive()
        except anyio.EndOfStream:
            break
    return line


def _make_root(data_dir: Path | None) -> Path:
    if data_dir is None:
        return Path(tempfile.mkdtemp(prefix="fwasync-"))
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LocalServiceError(f"the data directory {data_dir} cannot be made: {error.strerror}") from None
    return data_dir.resolve()


def _open_log(root: Path) -> IO[bytes]:
    try:
        return (root / "service.log").open("ab")
    except OSError as error:
        raise LocalServiceError(f"the data directory {root} cannot be written: {error.strerror}") from None


def _last_words(root: Path, start: int) -> str:
    with (root / "service.log").open("rb") as log:
        log.seek(start)
        return b"\n".join(log.read().splitlines()[-_LAST_LINES:]).decode(errors="replace")
