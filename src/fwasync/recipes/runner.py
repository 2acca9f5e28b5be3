"""Files by which a program that started a run watches it: status, account of tokens, metrics, and the model in the end.

Invariants
    * Each file is whole at every moment: the last three replace themselves, metrics are appended line by line.
    * They are a courtesy: what cannot be written is logged, and the run goes on.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.to_thread
from pydantic import Field

from fwasync.config.base import Config
from fwasync.tracking.files import write_atomically

__all__ = ("Runner", "RunnerConfig")

logger = logging.getLogger(__name__)

_FIELDS = ("status_file", "metadata_file", "metrics_file", "output_model_path")
_FAREWELL_S = 2.0


class RunnerConfig(Config):
    """Where those files go; each field that is unset is taken from the environment, when the run begins."""

    status_file: Path | None = Field(default=None, description="How far the run is. Else COOKBOOK_STATUS_FILE.")
    metadata_file: Path | None = Field(default=None, description="Tokens so far. Else COOKBOOK_METADATA_FILE.")
    metrics_file: Path | None = Field(default=None, description="A line a step. Else COOKBOOK_METRICS_FILE.")
    output_model_path: Path | None = Field(
        default=None, description="The promoted model. Else COOKBOOK_OUTPUT_MODEL_PATH."
    )

    def resolve(self, environment: Mapping[str, str] | None = None) -> RunnerConfig:
        """A copy with what the environment says of the fields that are unset."""
        known = os.environ if environment is None else environment
        told = {name: known.get(f"COOKBOOK_{name.upper()}") for name in _FIELDS}
        return RunnerConfig.model_validate({name: getattr(self, name) or told[name] or None for name in _FIELDS})

    @property
    def enabled(self) -> bool:
        """Whether any of the files is wanted."""
        return any(getattr(self, name) is not None for name in _FIELDS)


class Runner:
    """Writes the files of one run. An async context manager: if its block fails, the status says so.

    Args:
        config: Where to; the environment is asked for what is unset.
        accelerators: How many work for the run, where that is known.
    """

    def __init__(self, config: RunnerConfig, *, accelerators: int | None = None) -> None:
        self._files = config.resolve()
        self._accelerators = accelerators
        self._step = self._total = self._tokens = 0
        self._began: float | None = None

    async def pending(self) -> None:
        """The run waits for its trainer."""
        await self._status("pending")

    def begin(self, step: int, total_steps: int) -> None:
        """Training begins, after so many steps of an earlier process."""
        self._step, self._total = step, total_steps
        self._began = anyio.current_time()

    async def step(self, step: int, metrics: Mapping[str, float], *, tokens: int) -> None:
        """A step is done, on so many tokens."""
        self._step = step
        self._tokens += tokens
        if not self._files.enabled:
            return
        await self._status("running")
        await self._metadata()
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        await self._write(self._files.metrics_file, _append, json.dumps({"step": step, **finite}) + "\n")

    async def completed(self) -> None:
        """The run has come to its end."""
        await self._status("completed")
        await self._metadata()

    async def stopped(self, reason: str) -> None:
        """The run was stopped before its end; whoever watches it may start it again."""
        await self._status("failed", error=f"stopped: {reason}")
        await self._metadata()

    async def output_model(self, model_id: str, *, checkpoint: str, job_id: str | None, **extra: Any) -> None:
        """A model was made."""
        content = {"model_id": model_id, "checkpoint": checkpoint, "job_id": job_id, **extra}
        await self._write(self._files.output_model_path, _replace, json.dumps(content) + "\n")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if exc is not None:
            with anyio.move_on_after(_FAREWELL_S, shield=True):
                what = "interrupted" if isinstance(exc, anyio.get_cancelled_exc_class()) else f"{exc}"
                await self._status("failed", error=what or type(exc).__name__)
                await self._metadata()

    async def _status(self, status: str, **more: str) -> None:
        progress = round(self._step / self._total, 6) if self._total else 0
        content = {"status": status, "step": self._step, "total_steps": self._total, "progress": progress}
        told = {name: text for name, text in more.items() if text}
        await self._write(self._files.status_file, _replace, json.dumps({**content, **told}) + "\n")

    async def _metadata(self) -> None:
        content: dict[str, float] = {"tokens_processed": self._tokens}
        if self._accelerators is not None and self._began is not None:
            content["accelerator_seconds"] = round((anyio.current_time() - self._began) * self._accelerators, 3)
            content["accelerator_count"] = self._accelerators
        await self._write(self._files.metadata_file, _replace, json.dumps(content) + "\n")

    async def _write(self, path: Path | None, write: Callable[[Path, str], None], text: str) -> None:
        if path is None:
            return
        try:
            await anyio.to_thread.run_sync(write, path, text)
        except OSError as error:
            logger.warning("cannot write %s: %s", path, error.strerror or error)


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def _append(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(text.encode())
