"""`fwasync train sft`: fine-tune on a file of chats."""

from __future__ import annotations

import shlex
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pydantic

from fwasync import AsyncServiceClient
from fwasync.cli.local_service import launch_local, require_local
from fwasync.cli.output import print_files
from fwasync.cli.recorded import new_run_directory, recorded
from fwasync.data.jsonl import Chat, read_chats
from fwasync.errors import UsageError
from fwasync.recipes import sft, trainers
from fwasync.recipes.stopping import StopRequest
from fwasync.tracking.report import render_report
from fwasync.tracking.run import Record

__all__ = ("Where", "make_config", "run_sft")

# Options that are called otherwise than what they set.
_OPTIONS = {"dataset": "data", "max_steps": "steps", "dcp_save_interval": "save-every", "warmup_steps": "warmup-steps"}


@dataclass(frozen=True, slots=True)
class Where:
    """The service to train on: one with this URL, or, without it, a local one for this run.

    Raises:
        UsageError: A key without a URL.
    """

    base_url: str | None
    api_key: str | None

    def __post_init__(self) -> None:
        if self.api_key and not self.base_url:
            raise UsageError("--api-key is for a service of yours: say which with --base-url")


async def run_sft(
    settings: Mapping[str, Any],
    *,
    base_url: str | None,
    api_key: str | None,
    log_path: Path | None,
    dry_run: bool,
    stop: StopRequest,
) -> None:
    """Train, and print the outcome; or check what would be done.

    **Cancellation:** what was logged and saved is kept, with a report of it.
    """
    where = Where(base_url, api_key)
    config = make_config(settings, log_path or Path("runs/sft-…"))
    chats = await anyio.to_thread.run_sync(read_chats, config.dataset, abandon_on_cancel=True)
    if dry_run:
        from fwasync.cli.dry_run import check

        await check(config, chats, where)
        return
    if where.base_url is None:
        require_local()
    directory = log_path or new_run_directory("sft")
    config = make_config(settings, directory)
    await _train(config, chats, where, stop)


def make_config(settings: Mapping[str, Any], log_path: Path) -> sft.Config:
    """The configuration of a run.

    Raises:
        UsageError: A setting is out of its range; the text names options as the user gave them.
    """
    try:
        return sft.Config(**settings, log_path=log_path)
    except pydantic.ValidationError as error:
        faults = [_fault(detail["loc"], detail["msg"], detail["input"]) for detail in error.errors()]
        raise UsageError("; ".join(faults)) from None


def _fault(location: Sequence[str | int], reason: str, given: object) -> str:
    reason = reason.removeprefix("Value error, ")
    if not location:
        return reason
    name = _OPTIONS.get(str(location[-1])) or str(location[0]).replace("_", "-")
    return f"--{name} is {given}: {reason[0].lower()}{reason[1:]}"


async def _train(config: sft.Config, chats: Sequence[Chat], where: Where, stop: StopRequest) -> None:
    title, report = f"sft {Path(config.dataset).name}", partial(_report, config)
    async with (
        recorded(config.log_path, config, title=title, report=report, resume=True) as run,
        _service(where, config.log_path) as service,
    ):
        result = await sft.train(config, where=trainers.Where(service=service), run=run, chats=chats, stop=stop)
    print()
    if result.rows.dropped:
        print(f"Note: {result.rows.describe_dropped()}.")
    losses = _losses(run.records)
    if losses:
        print(f"Loss {losses[0]:.3f} → {losses[-1]:.3f} nats per trained token, in {len(losses)} steps.")
    saved = result.checkpoint
    if saved is not None and saved.state_path:
        print(f"Checkpoint, to go on from: {saved.state_path}")
    if saved is not None and saved.sampler_path:
        print(f"Snapshot, to sample from:  {saved.sampler_path}")
    print_files(config.log_path)
    if where.base_url is None:
        print("Serve its checkpoint and snapshot again with:")
        print(f"  fwasync serve --data-dir {shlex.quote(str(config.log_path / 'service'))}")


@asynccontextmanager
async def _service(where: Where, log_path: Path) -> AsyncGenerator[AsyncServiceClient, None]:
    if where.base_url is not None:
        async with AsyncServiceClient(where.base_url, where.api_key) as service:
            yield service
        return
    async with (
        launch_local(log_path / "service") as local,
        AsyncServiceClient(local.base_url, local.api_key) as service,
    ):
        yield service


def _report(config: sft.Config, records: Sequence[Record]) -> str:
    name, losses = Path(config.dataset).name, _losses(records)
    summary = [("data", name), ("base model", config.base_model), ("loss", f"{losses[0]:.3f} → {losses[-1]:.3f}")]
    return render_report(title=f"SFT on {name}", summary=summary, records=records, tables=())


def _losses(records: Sequence[Record]) -> list[float]:
    return [record.metrics["train/ce_loss"] for record in records if record.phase == sft.PHASE]
