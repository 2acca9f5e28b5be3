"""The run of a command: its directory, what is logged there, and the report in the end.

Invariants
    * However a command ends, what was logged is on disk, with a report of it.
    * A command that fails before it has begun leaves everything as it was, so that it can be repeated.
    * Nothing is removed that this run did not make, except a directory that is empty.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.to_thread
from pydantic import BaseModel

from fwasync.config import WandBConfig
from fwasync.errors import RunDirectoryError
from fwasync.tracking.run import Record, Run, open_run
from fwasync.tracking.views import make_view

__all__ = ("REPORT", "new_run_directory", "recorded")

REPORT = "report.html"
_REPORT_S = 1.0


@asynccontextmanager
async def recorded(
    directory: Path,
    config: BaseModel,
    *,
    title: str,
    report: Callable[[Sequence[Record]], str],
    wandb: WandBConfig | None = None,
    resume: bool = False,
) -> AsyncGenerator[Run, None]:
    """Record a run.

    Args:
        directory: Where; see `new_run_directory`.
        config: What determines the run.
        title: What the view calls it.
        report: Renders what was logged; written when the block is left, if anything was.
        wandb: Where to log at Weights & Biases, if its entity is set.
        resume: Go on with the run that the directory holds, if it holds one.

    Raises:
        RunDirectoryError: The directory holds a run already, is in use, or cannot be written.
    """
    before = _entries(directory)
    run = open_run(directory, config=config.model_dump(), view=make_view(title=title), wandb=wandb, resume=resume)
    entered = False
    try:
        async with run:
            entered = True
            try:
                yield run
            except BaseException as error:
                try:
                    await _write_report(run, report)
                except RunDirectoryError as late:
                    error.add_note(str(late))
                raise
            await _write_report(run, report)
    except BaseException:
        if run.has_begun and run.records:
            print(f"What was done so far is in {directory}.", flush=True)
        else:
            made = _entries(directory) - before if entered else frozenset[Path]()
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(_discard, directory, made)
        raise


def new_run_directory(kind: str) -> Path:
    """Make the first of `runs/<kind>-001`, `-002` … that does not exist.

    Raises:
        RunDirectoryError: It cannot be made.
    """
    for number in itertools.count(1):
        path = Path("runs") / f"{kind}-{number:03d}"
        try:
            path.mkdir(parents=True)
        except OSError as error:
            if isinstance(error, FileExistsError) and path.exists():
                continue
            raise RunDirectoryError(f"cannot make a run in {path}: {error.strerror or error}") from None
        return path
    raise AssertionError("unreachable: numbers do not end")


async def _write_report(run: Run, report: Callable[[Sequence[Record]], str]) -> None:
    if run.has_begun and run.records:
        with anyio.move_on_after(_REPORT_S, shield=True):
            await run.write_text(REPORT, report(run.records))


def _entries(directory: Path) -> frozenset[Path]:
    return frozenset(directory.iterdir()) if directory.is_dir() else frozenset()


def _discard(directory: Path, made: frozenset[Path]) -> None:
    for path in made:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        directory.rmdir()  # which it can be if it is empty
