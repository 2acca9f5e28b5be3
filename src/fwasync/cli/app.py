"""The commands and their options. What they do is in modules of their own, imported when it is needed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fwasync._version import __version__

__all__ = ("app",)

_EPILOG = """Exit status: 0 done; 1 it failed (network, service, disk); 2 it was asked for wrongly (options, settings,
data, keys); 70 a bug of fwasync; 130 Ctrl-C; 143 terminated."""

app = typer.Typer(
    help="Train language models through a remote trainer service, or on this machine.",
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
checkpoints = typer.Typer(
    help="What a run has saved, and making a model of it.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(checkpoints, name="checkpoints")

_BASE_URL = "FWASYNC_BASE_URL"
_KEY_HELP = "Its key. Better: set FWASYNC_API_KEY, which no process list shows."


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fwasync {__version__}")
        raise typer.Exit


@app.callback()
def _options(  # pyright: ignore[reportUnusedFunction]  # typer uses it
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and exit.")] = (
        False
    ),
) -> None:
    del version
    context.obj = debug


@app.command(short_help="Train a tiny model on this machine, in a minute.")
def demo(
    context: typer.Context,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same run.")] = 0,
    log_path: Annotated[
        Path | None, typer.Option(help="Directory of the run.", show_default="the next free runs/demo-…")
    ] = None,
    sft_steps: Annotated[int, typer.Option(min=1, help="Steps of supervised training.")] = 300,
    grpo_steps: Annotated[int, typer.Option(min=1, help="Steps of reinforcement learning.")] = 40,
) -> None:
    """Train a tiny model on this machine: SFT, then GRPO, in less than a minute."""
    from fwasync.cli.demo import run_demo
    from fwasync.cli.running import execute

    execute(
        partial(run_demo, seed=seed, log_path=log_path, sft_steps=sft_steps, grpo_steps=grpo_steps),
        debug=context.obj,
    )


@app.command()
def serve(
    context: typer.Context,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Where the service keeps everything.", show_default="a temporary directory"),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free port.")] = 0,
) -> None:
    """Run the local trainer service until Ctrl-C."""
    from fwasync.cli.running import execute
    from fwasync.cli.serve import run_serve

    execute(partial(run_serve, data_dir=data_dir, port=port), debug=context.obj)


def _recipes(incomplete: str) -> list[str]:
    return [name for name in ("sft", "dpo", "orpo", "rl", "async_rl") if name.startswith(incomplete)]


@app.command(no_args_is_help=True, epilog=_EPILOG, context_settings={"ignore_unknown_options": True})
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="sft, dpo, orpo, rl or async_rl.", autocompletion=_recipes)],
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="Settings of the recipe: name=value, section.name=value, or --name value."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Settings in a TOML file; the command line goes before it.")
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(envvar=_BASE_URL, help="The service.", show_default="a local one, started for this run"),
    ] = None,
    api_key: Annotated[str | None, typer.Option(help=_KEY_HELP)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, start and spend nothing.")] = False,
    template: Annotated[
        bool, typer.Option("--template", help="Print all settings of the recipe as a TOML file, and exit.")
    ] = False,
) -> None:
    """Train a model with a recipe, on this machine or on a service.

    fwasync train sft --config run.toml learning_rate=1e-4 infra.region=EU

    All settings of a recipe, with their meanings: fwasync train sft --template
    """
    from fwasync.cli.running import execute
    from fwasync.cli.train import run_train, tell_template
    from fwasync.cli.where import Place
    from fwasync.recipes.stopping import StopRequest

    if template:
        tell_template(recipe)
        return
    stop = StopRequest()
    place = Place(base_url, api_key)
    command = partial(run_train, recipe, settings or [], config_file=config, place=place, dry_run=dry_run, stop=stop)
    execute(command, debug=context.obj, stop=None if dry_run else stop)


_RunDirectory = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of the run.")]


@checkpoints.command("list")
def list_checkpoints(context: typer.Context, run: _RunDirectory) -> None:
    """List the checkpoints of a run, the oldest first."""
    from fwasync.cli.checkpoints import run_list
    from fwasync.cli.running import execute

    execute(partial(run_list, run), debug=context.obj)


@checkpoints.command("show")
def show_checkpoint(
    context: typer.Context,
    run: _RunDirectory,
    name: Annotated[str | None, typer.Argument(help="The checkpoint.", show_default="the last one")] = None,
) -> None:
    """Show all that is known of a checkpoint."""
    from fwasync.cli.checkpoints import run_show
    from fwasync.cli.running import execute

    execute(partial(run_show, run, name), debug=context.obj)


@checkpoints.command("promote")
def promote_checkpoint(
    context: typer.Context,
    run: _RunDirectory,
    output_model_id: Annotated[str, typer.Argument(help="Id of the model: lower-case letters, digits and hyphens.")],
    name: Annotated[
        str | None, typer.Option("--checkpoint", help="Which one.", show_default="the last that has a snapshot")
    ] = None,
    job_id: Annotated[
        str | None, typer.Option(help="The trainer job that saved it.", show_default="as the run knows it")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Full name of its base model.", show_default="the trainer job is asked")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(envvar=_BASE_URL, help="The control plane.", show_default="https://api.fireworks.ai")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help=_KEY_HELP)] = None,
) -> None:
    """Make a model of the account of a snapshot, and wait for it."""
    from fwasync.cli.checkpoints import run_promote
    from fwasync.cli.running import execute

    command = partial(
        run_promote,
        run,
        output_model_id,
        name=name,
        job_id=job_id,
        base_model=base_model,
        base_url=base_url,
        api_key=api_key,
    )
    execute(command, debug=context.obj)


@app.command(epilog=_EPILOG, short_help="Look at everything that a run needs.")
def doctor(
    context: typer.Context,
    base_url: Annotated[
        str | None, typer.Option(envvar=_BASE_URL, help="The service.", show_default="one on this machine")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help=_KEY_HELP)] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Must be there, and is asked for one token.", show_default=False)
    ] = None,
    deployment: Annotated[
        str | None, typer.Option(help="Is asked for one token: its id or full name.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Must be on this machine: a directory, or a name on the hub.", show_default=False)
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="A JSONL file whose rows must get the chat template's tokens.", show_default=False),
    ] = None,
    renderer_name: Annotated[
        str | None,
        typer.Option(help="What renders them, as in the recipes.", show_default="the tokenizer's chat template"),
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that each look may take.")] = 20.0,
) -> None:
    """Look at everything that a run needs: key, service, wire, account, tokenizer, rows, disk."""
    from fwasync.cli.doctor import Patient, run_doctor
    from fwasync.cli.running import execute

    if (dataset or renderer_name) and not tokenizer:
        raise typer.BadParameter("rows are compared with the chat template of a tokenizer: name it with --tokenizer")
    if renderer_name and not dataset:
        raise typer.BadParameter("a renderer is looked at on rows: name them with --dataset")
    patient = Patient(base_url, api_key, base_model, deployment, tokenizer, dataset, renderer_name, timeout)
    execute(partial(run_doctor, patient), debug=context.obj)
