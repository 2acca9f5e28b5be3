"""`fwasync checkpoints`: what a run has saved, and making a model of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fwasync import AsyncFireworksClient
from fwasync.checkpoints.ledger import CheckpointEntry, CheckpointLedger
from fwasync.checkpoints.promotion import promote
from fwasync.cli.output import print_table
from fwasync.cli.settings import nearest
from fwasync.control.names import output_model_problems
from fwasync.errors import UsageError

__all__ = ("run_list", "run_promote", "run_show")


async def run_list(run: Path) -> None:
    """Print the checkpoints of a run, the oldest first."""
    entries = await _entries(run)
    rows = [(entry.name, f"{entry.step:,}", f"{entry.data_consumed:,}", _kind(entry)) for entry in entries]
    print_table(("checkpoint", "step", "data consumed", "saved"), rows)


async def run_show(run: Path, name: str | None) -> None:
    """Print all that is known of a checkpoint: the one of that name, or the last."""
    entry = _chosen(await _entries(run), name)
    known = {
        "name": entry.name,
        "step": entry.step,
        "data_consumed": entry.data_consumed,
        "source_job_id": entry.source_job_id,
        "state_path": entry.state_path,
        "sampler_path": entry.sampler_path,
        **entry.extra,
    }
    width = max(map(len, known))
    for key, value in known.items():
        if value is not None:
            print(f"{key:<{width}}  {value}")


async def run_promote(
    run: Path,
    output_model_id: str,
    *,
    name: str | None,
    job_id: str | None,
    base_model: str | None,
    base_url: str | None,
    api_key: str | None,
) -> None:
    """Make a model of a snapshot, and wait for it.

    **Cancellation:** a promotion that was begun goes on at the service.
    """
    problems = output_model_problems(output_model_id)
    if problems:
        raise UsageError(" ".join(problems))
    entries = await _entries(run)
    entry = _chosen([entry for entry in entries if entry.sampler_path or entry.name == name], name)
    if not entry.sampler_path:
        raise UsageError(f"checkpoint {entry.name!r} has no snapshot for samplers, and only those become models")
    job = job_id or entry.source_job_id
    if not job:
        raise UsageError(f"checkpoint {entry.name!r} does not say which trainer job saved it; pass --job-id")
    if job_id is None and entry.sampler_path.startswith(f"tinker://{job}/"):
        raise UsageError(
            f"checkpoint {entry.name!r} was saved on a service without trainer jobs, where nothing is promoted: "
            f"sample from {entry.sampler_path}"
        )
    async with AsyncFireworksClient(base_url, api_key) as fireworks:
        print(f"Promoting {entry.name} of trainer job {job} …", flush=True)
        model = await promote(fireworks, replace(entry, source_job_id=job), output_model_id, base_model=base_model)
    print(f"{model.name} is made, of step {entry.step:,}.")


async def _entries(run: Path) -> list[CheckpointEntry]:
    entries = await CheckpointLedger(run).entries()
    if not entries:
        raise UsageError(f"{run} has no checkpoints: there is nothing in {run / 'checkpoints.jsonl'}")
    return entries


def _chosen(entries: Sequence[CheckpointEntry], name: str | None) -> CheckpointEntry:
    if not entries:
        raise UsageError("no checkpoint of this run has a snapshot for samplers, and only those become models")
    if name is None:
        return entries[-1]
    found = [entry for entry in entries if entry.name == name]
    if not found:
        raise UsageError(f"there is no checkpoint {name!r}; {nearest(name, [entry.name for entry in entries])}")
    return found[-1]


def _kind(entry: CheckpointEntry) -> str:
    kinds = [kind for kind, path in (("state", entry.state_path), ("snapshot", entry.sampler_path)) if path]
    return " and ".join(kinds) or "nothing"
