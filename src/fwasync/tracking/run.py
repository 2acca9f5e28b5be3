"""`Run`: the directory of one training run, and the numbers that go there.

Logging puts a line in memory; one task, owned by the run, writes lines in a worker thread. Writing may fail at
any time (full disk, directory removed). Then nothing that was logged is forgotten: it waits in memory for the
next attempt, and `log`, `flush` or leaving the run says what is wrong.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import operator
import os
import time
from collections.abc import Callable, Mapping
from contextvars import Token
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import anyio
import anyio.to_thread

from fwasync._background import Background
from fwasync.errors import ClosedError, RunDirectoryError, UsageError
from fwasync.tracking.files import LineFile, write_atomically
from fwasync.tracking.settings import config_json
from fwasync.tracking.timers import Timings, current_timings
from fwasync.tracking.wandb import WANDB_FILE, WandB, WandBSettings

__all__ = ("Record", "Run", "Ticking", "View", "open_run")

logger = logging.getLogger(__name__)

_METRICS = "metrics.jsonl"
_CONFIG = "config.json"
_OWN_FILES = (_METRICS, _CONFIG, WANDB_FILE)
_OWN_KEYS = frozenset({"time_s", "phase", "step"})
_LEAVE_S = 2.0
_TICK_S = 0.25


@dataclass(frozen=True, slots=True)
class Record:
    """What was logged at one step.

    Attributes:
        phase: The part of the run, such as `"sft"` or `"rl"`.
        step: The step within the phase.
        time_s: Seconds since the run began.
        metrics: Values by name; they may be NaN or infinite.
    """

    phase: str
    step: int
    time_s: float
    metrics: Mapping[str, float]


class View(Protocol):
    """Somebody who watches a run. Called on the event loop, so every method returns at once."""

    def begin(self, phase: str, total_steps: int) -> None:
        """A phase of so many steps begins."""
        ...

    def show(self, record: Record) -> None:
        """A step was logged."""
        ...

    def gauge(self, name: str, value: float) -> None:
        """A live number changed, between steps."""
        ...

    def message(self, text: str) -> None:
        """Something worth a sentence happened."""
        ...

    def close(self) -> None:
        """The run has ended. May be called again."""
        ...


@runtime_checkable
class Ticking(Protocol):
    """A view with something that moves while nothing happens, such as a clock."""

    def tick(self) -> None:
        """Time has passed."""
        ...


class Run:
    """One training run and its directory. Made by `open_run`, entered with `async with`.

    All methods are to be called on the event loop. Leaving the block, in whatever way, writes what was logged
    (for at most two seconds), lets W&B take it too (for at most 20 s, or 5 s after a failure) and closes the view. If
    the disk fails, a block that ended normally raises `RunDirectoryError`; an exception of the block passes through
    unchanged, with the failure as a note. That W&B fails is told, and never raised.

    Attributes:
        log_path: The directory.
        records: Everything that was logged, in order.
        timings: The times of this run's timers; see `fwasync.tracking.timers`.
    """

    def __init__(
        self,
        log_path: str | Path,
        *,
        config: Mapping[str, Any],
        view: View | None = None,
        wandb: WandBSettings | None = None,
    ) -> None:
        self.log_path = Path(log_path)
        self.records: list[Record] = []
        self.timings = Timings()
        self._timings_token: Token[Timings | None] | None = None
        self._wandb = WandB(wandb, self._notify) if wandb is not None and wandb.entity else None
        self._config = config
        self._view = view
        self._lines = LineFile(self.log_path / _METRICS)
        self._background = Background()
        # A limiter of its own: the last lines of a run must not wait for a free thread behind user's work.
        self._limiter = anyio.CapacityLimiter(1)
        self._wake = anyio.Event()
        self._failure: OSError | None = None
        self._began = 0.0
        self._open = False

    def __repr__(self) -> str:
        return f"<Run {self.log_path} {'open' if self._open else 'not open'}: {len(self.records)} records>"

    @property
    def wandb_place(self) -> str:
        """Where the run is at W&B, as a sentence; empty if it is not there, or not yet."""
        return "" if self._wandb is None else self._wandb.place

    # -- what happens in the run -----------------------------------------------------------------

    def begin(self, phase: str, total_steps: int) -> None:
        """Tell the view that a phase of `total_steps` steps begins."""
        self._check_open()
        self._tell(lambda view: view.begin(phase, total_steps))

    def log(self, phase: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of one step: to `records`, to the view, and soon to `metrics.jsonl`.

        Values are anything that `float()` takes; those that are not finite become `null` in the file.

        Raises:
            RunDirectoryError: Earlier lines could not be written. This record is kept all the same.
            UsageError: A value is no number, or a name is one of `time_s`, `phase` and `step`.
            ClosedError: The run is not open.
        """
        self._check_open()
        values = {name: _number(name, value) for name, value in metrics.items()}
        record = Record(phase, operator.index(step), time.monotonic() - self._began, values)
        self.records.append(record)
        self._lines.add(_line(record))
        if self._wandb is not None:
            self._wandb.add(record)
        self._wake.set()
        self._tell(lambda view: view.show(record))
        if self._failure is not None:
            raise self._cannot_write(self._failure)

    def gauge(self, name: str, value: float) -> None:
        """Show a live number between steps, such as `"rollout/in_flight"`; it is not written to a file."""
        self._check_open()
        self._tell(lambda view: view.gauge(name, value))

    def message(self, text: str) -> None:
        """Show a sentence; it is not written to a file."""
        self._check_open()
        self._tell(lambda view: view.message(text))

    async def flush(self) -> None:
        """Wait until everything that was logged is on the disk.

        Raises:
            RunDirectoryError: It cannot be written; it is kept, and the next `flush` tries again.

        **Cancellation:** what was logged is still written.
        """
        self._check_open()
        await self._drain(sync=True)

    async def write_text(self, name: str, text: str) -> Path:
        """Write a file of the run, such as a report, atomically; an older one is replaced.

        Args:
            name: A plain file name, without a directory.
            text: What to write, as UTF-8; characters that UTF-8 cannot express are written as escapes.

        Returns:
            The path of the file.

        Raises:
            RunDirectoryError: It cannot be written. An older file of that name is untouched.
            UsageError: `name` is not a plain file name, or is that of a file which the run writes itself.

        **Cancellation:** the file is the old or the new one, as a whole.
        """
        self._check_open()
        path = self.log_path / name
        if Path(name).name != name or name in ("", "..", *_OWN_FILES):
            raise UsageError(f"{name!r} cannot be written: give a plain file name, none of {', '.join(_OWN_FILES)}")
        try:
            await anyio.to_thread.run_sync(write_atomically, path, text, limiter=self._limiter)
        except OSError as error:
            raise RunDirectoryError(f"cannot write {path}: {_reason(error)}") from error
        return path

    # -- entering and leaving --------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        config = config_json(self._config)
        try:
            await anyio.to_thread.run_sync(self._claim, config, limiter=self._limiter)
        except OSError as error:
            raise RunDirectoryError(f"cannot make a run in {self.log_path}: {_reason(error)}") from error
        self._began = time.monotonic()
        await self._background.open()
        self._background.start(self._write_on)
        self._background.start(self._tick_on)
        if self._wandb is not None:
            self._background.start(self._wandb.serve, json.loads(config))
        self._timings_token = current_timings.set(self.timings)
        self._open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        if self._timings_token is not None:
            with contextlib.suppress(ValueError):  # left in another context than it was entered in
                current_timings.reset(self._timings_token)
        try:
            failure = await self._write_the_rest()
        finally:
            if self._wandb is not None:
                await self._wandb.finish(ok=error is None)
            self._tell(lambda view: view.close())
            await self._background.aclose()
        if failure is None:
            return
        if error is None:
            raise failure
        if not isinstance(error, RunDirectoryError):
            logger.error("%s", failure)
            error.add_note(str(failure))

    def _claim(self, config: str) -> None:
        """Make the directory this run's own. Of two runs at once, one gets it."""
        self.log_path.mkdir(parents=True, exist_ok=True)
        for name in (_METRICS, _CONFIG):
            if os.path.lexists(self.log_path / name):
                raise self._taken(name)
        try:
            with self._lines.path.open("xb"):
                pass
        except FileExistsError:
            raise self._taken(_METRICS) from None
        try:
            write_atomically(self.log_path / _CONFIG, config)
            if self._wandb is not None:
                self._wandb.claim(self.log_path)
        except OSError:
            self._lines.path.unlink(missing_ok=True)
            raise

    def _taken(self, name: str) -> RunDirectoryError:
        return RunDirectoryError(
            f"{self.log_path} already holds a run (it has a {name}); "
            "choose another log_path, or move or remove that directory first"
        )

    # -- writing ---------------------------------------------------------------------------------

    async def _write_on(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            with contextlib.suppress(RunDirectoryError):  # it is kept in _failure, for the next call of the user
                await self._drain(sync=False)

    async def _drain(self, *, sync: bool) -> None:
        count = 0 if self._wandb is None else self._wandb.added
        try:
            # A thread that is left behind by a cancellation finishes its lines; the next one waits for it.
            await anyio.to_thread.run_sync(self._lines.drain, sync, abandon_on_cancel=True, limiter=self._limiter)
        except OSError as error:
            self._failure = error
            raise self._cannot_write(error) from error
        self._failure = None
        if self._wandb is not None:
            self._wandb.release(count)

    async def _write_the_rest(self) -> RunDirectoryError | None:
        with anyio.move_on_after(_LEAVE_S, shield=True):
            try:
                await self._drain(sync=True)
            except RunDirectoryError as error:
                return error
            return None
        return RunDirectoryError(f"{self._lines.path} did not take the last lines within {_LEAVE_S:g} s")

    def _cannot_write(self, error: OSError) -> RunDirectoryError:
        return RunDirectoryError(
            f"cannot write {self._lines.path}: {_reason(error)}; what was logged is kept in memory, "
            "and is written as soon as that is mended"
        )

    # -- the view --------------------------------------------------------------------------------

    async def _tick_on(self) -> None:
        while isinstance(self._view, Ticking):
            await anyio.sleep(_TICK_S)
            self._tell(lambda view: view.tick() if isinstance(view, Ticking) else None)

    def _tell(self, what: Callable[[View], None]) -> None:
        """A view that fails (its pipe was closed, say) is dropped: training is worth more than watching it."""
        view = self._view
        if view is None:
            return
        try:
            what(view)
        except Exception:
            self._view = None
            logger.warning("the view of the run failed and is switched off", exc_info=True)
            with contextlib.suppress(Exception):
                view.close()

    def _notify(self, text: str) -> None:
        if self._view is None:
            logger.warning("%s", text)
        else:
            self._tell(lambda view: view.message(text))

    def _check_open(self) -> None:
        if not self._open:
            raise ClosedError(f"the run in {self.log_path} is not open; use it inside `async with open_run(...)`")


def open_run(
    log_path: str | Path, *, config: Mapping[str, Any], view: View | None = None, wandb: WandBSettings | None = None
) -> Run:
    """Make a run, to be entered with `async with`.

    Entering creates the directory with its parents, and writes `config.json`, with secrets masked.

    Args:
        log_path: A directory that does not hold a run yet.
        config: Everything that determines the run.
        view: Who watches it; see `fwasync.tracking.views.make_view`. It is closed with the run.
        wandb: Log to Weights & Biases too, if its `entity` is set; a `fwasync.WandBConfig`.

    Raises:
        RunDirectoryError: On entering: the directory holds a run, or cannot be written.
        UsageError: On entering: `config` contains itself.
    """
    return Run(log_path, config=config, view=view, wandb=wandb)


def _number(name: str, value: Any) -> float:
    if name in _OWN_KEYS:
        raise UsageError(f"a metric cannot be named {name!r}: every line has that key already; try 'train/{name}'")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"metric {name!r} is {value!r}, which is no number") from error
    return int(value) if isinstance(value, Integral) else number


def _line(record: Record) -> bytes:
    metrics = {name: value if math.isfinite(value) else None for name, value in record.metrics.items()}
    head = {"time_s": round(record.time_s, 6), "phase": record.phase, "step": record.step}
    return json.dumps({**head, **metrics}, allow_nan=False).encode() + b"\n"


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
