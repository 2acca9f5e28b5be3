"""`Run`: the directory of one training run, and the numbers that go there.

Logging puts a line in memory; one task, owned by the run, writes lines in a worker thread. Writing may fail at
any time (full disk, directory removed). Then nothing that was logged is forgotten: it waits in memory for the
next attempt, and `log`, `flush` or leaving the run says what is wrong.

A directory is used by one run at a time. One that was interrupted can go on in its directory: what it had logged is
`records` again, and its recipe forgets what lies behind the checkpoint that it resumes from (`rewind`). Until that
recipe begins (`begin`, `log`), what the directory holds is left as it is: the recipe may find that it cannot go on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import operator
import os
import time
from collections.abc import Callable, Mapping
from contextvars import Token
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.to_thread

from fwasync._background import Background
from fwasync.errors import ClosedError, RunDirectoryError, UsageError
from fwasync.tracking.files import LineFile, write_atomically
from fwasync.tracking.history import changes, read_config, read_metrics
from fwasync.tracking.lock import DirectoryLock
from fwasync.tracking.records import Record, is_after, line_of, metric
from fwasync.tracking.settings import config_json
from fwasync.tracking.timers import Timings, current_timings
from fwasync.tracking.wandb import WANDB_FILE, WandB, WandBSettings
from fwasync.tracking.watching import Ticking, View

__all__ = ("Record", "Run", "Ticking", "View", "open_run")

logger = logging.getLogger(__name__)

_METRICS = "metrics.jsonl"
_CONFIG = "config.json"
_OWN_FILES = (_METRICS, _CONFIG, WANDB_FILE)
_END_S = 30.0
_LEAVE_S = 2.0
_TICK_S = 0.25


class Run:
    """One training run and its directory. Made by `open_run`, entered with `async with`.

    All methods are to be called on the event loop. Leaving the block, in whatever way, writes what was logged
    (for at most two seconds), lets W&B take it too (for at most 20 s, or 5 s after a failure) and closes the view. If
    the disk fails, a block that ended normally raises `RunDirectoryError`; an exception of the block passes through
    unchanged, with the failure as a note. That W&B fails is told, and never raised.

    Attributes:
        log_path: The directory.
        records: Everything that was logged, in order; in a run that goes on, also what was logged before.
        timings: The times of this run's timers; see `fwasync.tracking.timers`.
    """

    def __init__(
        self,
        log_path: str | Path,
        *,
        config: Mapping[str, Any],
        view: View | None = None,
        wandb: WandBSettings | None = None,
        resume: bool = False,
    ) -> None:
        self.log_path = Path(log_path)
        self.records: list[Record] = []
        self.timings = Timings()
        self._timings_token: Token[Timings | None] | None = None
        self._wandb = WandB(wandb, self._notify) if wandb is not None and wandb.entity else None
        self._config = config
        self._view = view
        self._resume = resume
        self._lock = DirectoryLock(self.log_path)
        self._lines = LineFile(self.log_path / _METRICS)
        self._background = Background()
        # A limiter of its own: the last lines of a run must not wait for a free thread behind user's work.
        self._limiter = anyio.CapacityLimiter(1)
        self._wake = anyio.Event()
        self._failure: OSError | None = None
        self._began = 0.0
        self._open = False
        self._has_begun = False
        self._new_config: str | None = None
        self._is_settled = anyio.Event()
        """The directory has this run's configuration, and not that of the run which it held."""

    def __repr__(self) -> str:
        return f"<Run {self.log_path} {'open' if self._open else 'not open'}: {len(self.records)} records>"

    @property
    def wandb_place(self) -> str:
        """Where the run is at W&B, as a sentence; empty if it is not there, or not yet."""
        return "" if self._wandb is None else self._wandb.place

    @property
    def has_begun(self) -> bool:
        """Whether a phase was begun, or something logged, since the run was opened."""
        return self._has_begun

    # -- what happens in the run -----------------------------------------------------------------

    def begin(self, phase: str, total_steps: int) -> None:
        """Tell the view that a phase of `total_steps` steps begins."""
        self._check_open()
        self._go_on()
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
        values = {name: metric(name, value) for name, value in metrics.items()}
        record = Record(phase, operator.index(step), time.monotonic() - self._began, values)
        self.records.append(record)
        self._lines.add(line_of(record))
        if self._wandb is not None:
            self._wandb.add(record)
        self._go_on()
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

    async def rewind(self, phase: str, step: int) -> int:
        """Forget what was logged of a phase after a step, in `records` and on the disk.

        A run that resumes from a checkpoint of that step logs those steps again.

        Returns:
            How many records were forgotten.

        Raises:
            RunDirectoryError: The file cannot be written; it is as it was.

        **Cancellation:** they are forgotten, or not, as a whole.
        """
        self._check_open()
        kept = [record for record in self.records if record.phase != phase or record.step <= step]
        forgotten = len(self.records) - len(kept)
        if forgotten:

            def keep() -> None:
                self._lines.keep(lambda line: not is_after(line, phase, step))

            try:
                await anyio.to_thread.run_sync(keep, limiter=self._limiter)
            except OSError as error:
                raise self._cannot_write(error) from error
            self.records[:] = kept
        return forgotten

    # -- entering and leaving --------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        config = config_json(self._config)
        try:
            await self._enter(config)
        except OSError as error:
            self._lock.release()
            raise RunDirectoryError(f"cannot make a run in {self.log_path}: {_reason(error)}") from error
        except BaseException:
            self._lock.release()
            raise
        self._background.start(self._write_on)
        self._background.start(self._tick_on)
        if self._wandb is not None:
            self._background.start(self._serve_wandb, self._wandb, json.loads(config))
        self._timings_token = current_timings.set(self.timings)
        self._open = True
        return self

    async def _enter(self, config: str) -> None:
        changed = await anyio.to_thread.run_sync(self._claim, config, limiter=self._limiter)
        before_s = max((record.time_s for record in self.records), default=0.0)
        self._began = time.monotonic() - before_s
        if self._new_config is None:
            self._is_settled.set()
        if changed:
            self._notify(f"the run in {self.log_path} was begun with another configuration: {', '.join(changed)}")
        await self._background.open()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        if self._timings_token is not None:
            with contextlib.suppress(ValueError):  # left in another context than it was entered in
                current_timings.reset(self._timings_token)
        try:
            failure = await self._write_the_rest(_END_S if error is None else _LEAVE_S)
        finally:
            if self._wandb is not None and self._is_settled.is_set():
                await self._wandb.finish(ok=error is None)
            self._tell(lambda view: view.close())
            self._lock.release()
            await self._background.aclose()
        if failure is None:
            return
        if error is None:
            raise failure
        if not isinstance(error, RunDirectoryError):
            logger.error("%s", failure)
            error.add_note(str(failure))

    def _claim(self, config: str) -> list[str]:
        """Make the directory this run's own; what has changed since it was begun. Of two runs at once, one gets it."""
        self.log_path.mkdir(parents=True, exist_ok=True)
        if not self._resume:
            self._refuse_used()
        self._lock.acquire()
        if not self._resume:
            self._refuse_used()
        before = read_config(self.log_path / _CONFIG)
        changed = list(changes(before or json.loads(config), json.loads(config)))
        new = not os.path.lexists(self._lines.path)
        if new:
            with self._lines.path.open("xb"):
                pass
        try:
            self.records += read_metrics(self._lines.path)
            self._new_config = config
            if before is None:
                self._settle()
        except OSError:
            if new:
                self._lines.path.unlink(missing_ok=True)
            raise
        return changed

    def _settle(self) -> None:
        """Write this run's configuration, if that is still to be done."""
        if self._new_config is not None:
            write_atomically(self.log_path / _CONFIG, self._new_config)
            if self._wandb is not None:
                self._wandb.claim(self.log_path)
            self._new_config = None

    def _refuse_used(self) -> None:
        for name in (_METRICS, _CONFIG):
            if os.path.lexists(self.log_path / name):
                raise RunDirectoryError(
                    f"{self.log_path} already holds a run (it has a {name}); "
                    "choose another log_path, or move or remove that directory first"
                )

    # -- writing ---------------------------------------------------------------------------------

    def _go_on(self) -> None:
        self._has_begun = True
        self._wake.set()

    async def _serve_wandb(self, wandb: WandB, config: Mapping[str, Any]) -> None:
        await self._is_settled.wait()
        await wandb.serve(config)

    def _write_out(self, sync: bool) -> None:
        if self._has_begun:
            self._settle()
        self._lines.drain(sync)

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
            await anyio.to_thread.run_sync(self._write_out, sync, abandon_on_cancel=True, limiter=self._limiter)
        except OSError as error:
            self._failure = error
            raise self._cannot_write(error) from error
        self._failure = None
        if self._new_config is None:
            self._is_settled.set()
        if self._wandb is not None:
            self._wandb.release(count)

    async def _write_the_rest(self, limit_s: float) -> RunDirectoryError | None:
        with anyio.move_on_after(limit_s, shield=True):
            try:
                await self._drain(sync=True)
            except RunDirectoryError as error:
                return error
            return None
        return RunDirectoryError(f"{self._lines.path} did not take the last lines within {limit_s:g} s")

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
    log_path: str | Path,
    *,
    config: Mapping[str, Any],
    view: View | None = None,
    wandb: WandBSettings | None = None,
    resume: bool = False,
) -> Run:
    """Make a run, to be entered with `async with`.

    Entering creates the directory with its parents, locks it, and writes `config.json`, with secrets masked. Where it
    goes on with a run, that is written as soon as a phase begins: until then it can be refused, and nothing is changed.

    Args:
        log_path: A directory that does not hold a run yet; with `resume` it may.
        config: Everything that determines the run.
        view: Who watches it; see `fwasync.tracking.views.make_view`. It is closed with the run.
        wandb: Log to Weights & Biases too, if its `entity` is set; a `fwasync.WandBConfig`.
        resume: Go on with the run that the directory holds, if it holds one. What differs in the configuration is told
            to the view, or logged without one.

    Raises:
        RunDirectoryError: On entering: the directory holds a run, is in use by another one, or cannot be written.
        UsageError: On entering: `config` contains itself.
    """
    return Run(log_path, config=config, view=view, wandb=wandb, resume=resume)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
