"""`WandB`: what a run logs, at Weights & Biases too, in a process of its own.

Invariants
    * Nothing of wandb runs in the process of the run: it has threads, handlers at exit and time-outs of its own. It can
      neither block, slow, print into nor end the run; what it cannot do in time it is ended in.
    * W&B gets what `metrics.jsonl` has already, and nothing else; so it may miss records, and never has more.
    * The child process ends before the run is left, and by itself if the run dies.
    * What goes wrong is told once, in a sentence.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import anyio
from anyio.abc import ByteSendStream, Process
from anyio.streams.buffered import BufferedByteReceiveStream

from fwasync.tracking.files import write_atomically

if TYPE_CHECKING:
    from fwasync.tracking.run import Record

__all__ = ("WANDB_FILE", "WandB", "WandBSettings")

logger = logging.getLogger(__name__)

WANDB_FILE = "wandb.json"
"""Holds the run's id at W&B."""

_CHILD = Path(__file__).with_name("wandb_child.py")
_INIT_S = 30.0
_FINISH_S = 20.0
_FAIL_S = 5.0
_BATCH = 256
_LONGEST_ANSWER = 1 << 20


class WandBSettings(Protocol):
    """Where to log; `fwasync.WandBConfig` is one."""

    @property
    def entity(self) -> str | None:
        """Team or user; unset: W&B is not used."""
        ...

    @property
    def project(self) -> str | None:
        """Project."""
        ...

    @property
    def run_name(self) -> str | None:
        """Name of the run."""
        ...


class WandB:
    """The run at W&B.

    Args:
        settings: Where.
        tell: Called with each sentence for the user.

    Attributes:
        place: Where the run is, as a sentence, once that is known.
        added: How many records were added.
    """

    def __init__(self, settings: WandBSettings, tell: Callable[[str], None]) -> None:
        self.place = ""
        self.added = 0
        self._settings = settings
        self._tell = tell
        self._directory = Path()
        self._run_id = ""
        self._records: deque[Record] = deque()
        self._released = 0
        self._exit_code: int | None = None
        self._wake = anyio.Event()
        self._over = anyio.Event()
        self._scope = anyio.CancelScope(shield=True)

    def claim(self, directory: Path) -> None:
        """Find the run's id at W&B, the same whenever the run in this directory goes on in the same project. Blocks.

        Raises:
            OSError: The file of the id cannot be read or written.
        """
        self._directory = directory
        where = {"entity": self._settings.entity, "project": self._settings.project}
        path = directory / WANDB_FILE
        try:
            kept: dict[str, Any] = json.loads(path.read_bytes())
            if {name: kept[name] for name in where} == where:
                self._run_id = str(kept["id"])
                return
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            pass  # there is none yet, or it is of no use
        self._run_id = secrets.token_hex(6)
        write_atomically(path, json.dumps({**where, "id": self._run_id}, indent=2) + "\n")

    def add(self, record: Record) -> None:
        """Pass a record on as soon as it is released; it waits in memory, where the run has it anyway."""
        self._records.append(record)
        self.added += 1

    def release(self, count: int) -> None:
        """The first so many of the records that were ever added are in `metrics.jsonl`."""
        self._released = max(self._released, count)
        self._wake.set()

    async def serve(self, config: Mapping[str, Any]) -> None:
        """Pass on what is released, until `finish`, which ends it. Raises nothing.

        Args:
            config: What determines the run, without secrets.

        **Cancellation:** none: also what a cancelled run has logged is passed on.
        """
        try:
            with self._scope:
                await self._serve(config)
        except Exception as error:
            self._tell(f"nothing more is logged to W&B: {error}")
            logger.warning("logging to W&B failed", exc_info=True)
        finally:
            self._over.set()

    async def _serve(self, config: Mapping[str, Any]) -> None:
        try:
            process = await anyio.open_process(
                [sys.executable, "-P", str(_CHILD)],
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the run
            )
        except OSError as error:
            self._tell(f"nothing is logged to W&B: its process does not start: {error.strerror or error}")
            return
        assert process.stdin is not None
        async with process, anyio.create_task_group() as tasks:
            try:
                tasks.start_soon(self._listen, process)
                with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                    await self._pass_on(process.stdin, config)  # a process that is gone is told of by _listen
                await self._over.wait()
            finally:
                _end(process)

    async def finish(self, *, ok: bool) -> None:
        """Let it take the rest, for a bounded time: 20 s, or 5 s after a failure; then end it.

        **Cancellation:** none, within that time.
        """
        self._exit_code = 0 if ok else 1
        self._wake.set()
        limit = _FINISH_S if ok else _FAIL_S
        try:
            with anyio.move_on_after(limit, shield=True) as patience:
                await self._over.wait()
            if patience.cancelled_caught:
                where = f" ({self.place})" if self.place else ""
                self._tell(f"W&B did not take the last records within {limit:g} s; they are in metrics.jsonl{where}")
        finally:
            self._scope.cancel()

    async def _pass_on(self, stream: ByteSendStream, config: Mapping[str, Any]) -> None:
        await _send(stream, {"init": self._init(config)})
        sent = 0
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            while sent < self._released:
                batch = [self._records.popleft() for _ in range(min(self._released - sent, _BATCH))]
                await _send(stream, {"log": [_row(record) for record in batch]})
                sent += len(batch)
            if self._exit_code is not None:
                await _send(stream, {"finish": self._exit_code})
                return

    async def _listen(self, process: Process) -> None:
        assert process.stdout is not None
        answers = BufferedByteReceiveStream(process.stdout)
        done = False
        with contextlib.suppress(anyio.IncompleteRead, anyio.ClosedResourceError, anyio.BrokenResourceError):
            while not done:
                line = await answers.receive_until(b"\n", _LONGEST_ANSWER)
                done = self._hear(json.loads(line))
        if not done:
            self._tell("the process that logs to W&B has ended; nothing more is logged there")
        self._over.set()

    def _init(self, config: Mapping[str, Any]) -> dict[str, Any]:
        arguments = {
            "entity": self._settings.entity,
            "project": self._settings.project,
            "name": self._settings.run_name,
            "id": self._run_id,
            "dir": str(self._directory),
            "config": config,
        }
        program = sys.argv[0] if sys.argv and sys.argv[0] else "python"
        return {"arguments": arguments, "timeout": _INIT_S, "pid": os.getpid(), "program": program}

    def _hear(self, answer: dict[str, Any]) -> bool:
        if "problem" in answer:
            self._tell(str(answer["problem"]))
        if "ready" in answer:
            ready = cast("dict[str, Any]", answer["ready"])
            self.place = _place(ready)
            self._tell(self.place)
        return "done" in answer


def _place(ready: Mapping[str, Any]) -> str:
    if ready["off"]:
        return "W&B is switched off by WANDB_MODE"
    if ready["offline"]:
        return f"W&B is logged to offline; upload it with: wandb sync {ready['dir']}"
    return f"W&B: {ready['url']}"


def _row(record: Record) -> dict[str, Any]:
    """What W&B gets of a record; the step is an axis of its own there."""
    return {"train/step": record.step, "phase": record.phase, **record.metrics}


async def _send(stream: ByteSendStream, message: Mapping[str, Any]) -> None:
    await stream.send(json.dumps(message).encode() + b"\n")


def _end(process: Process) -> None:
    """End the process and those that wandb has started, if they have not ended yet."""
    with contextlib.suppress(ProcessLookupError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
