"""`fwasync train`: any recipe, with settings from a file and the command line.

Nothing here knows a recipe: settings are checked by its model, and what is told comes from the names of its metrics.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from fwasync.checkpoints.ledger import CheckpointLedger
from fwasync.cli.local_service import require_local
from fwasync.cli.output import print_files
from fwasync.cli.recipes import Recipe, find_recipe
from fwasync.cli.recorded import new_run_directory, recorded
from fwasync.cli.settings import Settings
from fwasync.cli.template import template
from fwasync.cli.where import LOCAL_MODEL, Place
from fwasync.tracking.run import Record
from fwasync.tracking.summary import courses, run_report

if TYPE_CHECKING:
    from fwasync.recipes.stopping import StopRequest
    from fwasync.tracking.run import Run

__all__ = ("run_train", "tell_template")


async def run_train(
    name: str,
    arguments: Sequence[str],
    *,
    config_file: Path | None,
    place: Place,
    dry_run: bool,
    stop: StopRequest,
) -> None:
    """Train, and print the outcome; or check what would be done.

    Args:
        name: The recipe.
        arguments: Settings as they were typed.
        config_file: Settings in TOML.
        place: Place to train.
        dry_run: Start and spend nothing.

    **Cancellation:** what was logged and saved is kept, with a report of it.
    """
    recipe = find_recipe(name)
    settings = Settings.read(config_file)
    settings.override(arguments, recipe.Config)
    named = "log_path" in settings.values
    config = _config(recipe, settings, place, log_path=Path(f"runs/{name}-…"))
    if dry_run:
        from fwasync.cli.dry_run import check

        await check(name, recipe, config, place)
        return
    if place.is_local(config):
        require_local()
    if not named:
        config = _config(recipe, settings, place, log_path=new_run_directory(name))
    await _train(name, recipe, config, place, stop)


def _config(recipe: Recipe, settings: Settings, place: Place, *, log_path: Path) -> BaseModel:
    """The configuration of a run; what a command can know better than the recipe's defaults is put in.

    Raises:
        UsageError: Settings cannot be.
    """
    settings.put_default("log_path", str(log_path))
    config = settings.build(recipe.Config)
    if place.is_local(config) and "base_model" in recipe.Config.model_fields:
        settings.put_default("base_model", LOCAL_MODEL)
    return settings.build(recipe.Config)


def tell_template(name: str) -> None:
    """Print all settings of a recipe."""
    print(template(name, find_recipe(name).Config), end="")


async def _train(name: str, recipe: Recipe, config: BaseModel, place: Place, stop: StopRequest) -> None:
    log_path: Path = getattr(config, "log_path")  # noqa: B009  # of the model of a recipe
    report = partial(_report, name, config)
    title, wandb = f"{name} {log_path}", getattr(config, "wandb", None)
    async with (
        recorded(log_path, config, title=title, report=report, wandb=wandb, resume=True) as run,
        place.open(config, log_path) as where,
    ):
        await recipe.train(config, where=where, run=run, stop=stop)
    await _print_outcome(run, is_local=place.is_local(config))


def _report(name: str, config: BaseModel, records: Sequence[Record]) -> str:
    return run_report(title=f"fwasync train {name}", config=config.model_dump(), records=records)


async def _print_outcome(run: Run, *, is_local: bool) -> None:
    print()
    for course in courses(run.records):
        print(f"{course.headline.title} {course} in {course.steps:,} steps ({course.phase}).")
    entries = await CheckpointLedger(run.log_path).entries()
    for kind, paths in (
        ("Checkpoint, to go on from:", [entry.state_path for entry in entries]),
        ("Snapshot, to sample from: ", [entry.sampler_path for entry in entries]),
    ):
        saved = [path for path in paths if path]
        if saved:
            print(f"{kind} {saved[-1]}")
    if run.wandb_place:
        print(run.wandb_place)
    print_files(run.log_path)
    if is_local:
        print("Serve its checkpoints and snapshots again with:")
        print(f"  fwasync serve --data-dir {shlex.quote(str(run.log_path / 'service'))}")
