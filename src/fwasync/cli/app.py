"""The commands and their options. What they do is in modules of their own, imported when it is needed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fwasync._version import __version__

__all__ = ("app",)

app = typer.Typer(
    help="Train language models through a remote trainer service, or on this machine.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train = typer.Typer(help="Train a model on data of your own.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(train, name="train")

_BASE_URL = "FWASYNC_BASE_URL"


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


@app.command()
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


@train.command()
def sft(
    context: typer.Context,
    data: Annotated[Path, typer.Option(help='JSONL file of chats: {"messages": [{"role": …, "content": …}, …]}')],
    base_url: Annotated[
        str | None,
        typer.Option(envvar=_BASE_URL, help="The trainer service.", show_default="one started for this run"),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Its key. Better: set FWASYNC_API_KEY, which no process list shows.")
    ] = None,
    base_model: Annotated[str, typer.Option(help="The model to start from.")] = "fwasync/qwen3-tiny",
    steps: Annotated[int | None, typer.Option(help="End after so many steps.", show_default="no limit")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the rows.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Rows of a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="After the warm-up.")] = 1e-3,
    warmup_steps: Annotated[int, typer.Option(help="Steps in which the learning rate rises.")] = 0,
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapter; 0 trains all parameters.")] = 32,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Longer rows are left out.", show_default="the model's context length")
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: only at the end.")] = 0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 0,
    log_path: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the run; one that was interrupted goes on.", show_default="the next free runs/sft-…"
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, start and spend nothing.")] = False,
) -> None:
    """Fine-tune on chats, on this machine or on a trainer service."""
    from fwasync.cli.running import execute
    from fwasync.cli.train_sft import run_sft
    from fwasync.recipes.stopping import StopRequest

    settings: dict[str, Any] = {
        "dataset": str(data),
        "base_model": base_model,
        "max_steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler": {"warmup_steps": warmup_steps},
        "lora_rank": lora_rank,
        "max_seq_len": max_seq_len,
        "dcp_save_interval": save_every,
        "seed": seed,
    }
    stop = StopRequest()
    command = partial(
        run_sft, settings, base_url=base_url, api_key=api_key, log_path=log_path, dry_run=dry_run, stop=stop
    )
    execute(command, debug=context.obj, stop=None if dry_run else stop)
