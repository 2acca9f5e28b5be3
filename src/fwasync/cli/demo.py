"""`fwasync demo`: start the local service, run the demonstration, show what came of it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import anyio

from fwasync import AsyncServiceClient
from fwasync.cli.local_service import launch_local, require_local
from fwasync.cli.output import print_files, print_table, shown
from fwasync.cli.recorded import new_run_directory, recorded
from fwasync.recipes import demo, rl, sort_digits
from fwasync.tracking.report import Table, render_report
from fwasync.tracking.run import Record

__all__ = ("run_demo",)

_EXAMPLES = 5
_EXAMPLES_REPORTED = 20
_EDGE = 5


async def run_demo(*, seed: int, log_path: Path | None, sft_steps: int, grpo_steps: int) -> None:
    """Run it, and print the outcome.

    **Cancellation:** what was logged and saved is kept, with a report of it.
    """
    started = anyio.current_time()
    require_local()
    directory = log_path or new_run_directory("demo")
    config = demo.Config(log_path=directory, seed=seed, sft_steps=sft_steps, grpo_steps=grpo_steps)
    stages: list[demo.Stage] = []
    print(f"A tiny model learns to sort five digits, on this machine. Seed {seed}; the run is in {directory}.")
    print("The demonstrations are mixed on purpose: 30 % are sorted upwards, 70 % downwards. SFT teaches both ways,")
    print("mostly the wrong one. GRPO then rewards upwards: it chooses between what the model already does; it does")
    print("not teach it a new trick.\n", flush=True)
    report = partial(_report, config, stages)
    async with (
        recorded(directory, config, title="demo", report=report) as run,
        launch_local(directory / "service") as local,
        AsyncServiceClient(local.base_url, local.api_key) as service,
    ):
        await demo.train(config, service=service, run=run, on_stage=stages.append)
    _print_outcome(directory, stages, run.records, anyio.current_time() - started)


def _report(config: demo.Config, stages: Sequence[demo.Stage], records: Sequence[Record]) -> str:
    summary = [
        ("seed", str(config.seed)),
        ("base model", config.base_model),
        ("seconds", f"{records[-1].time_s:.0f}"),
    ]
    rewards = _rewards(records)
    if rewards:
        first, last = _ends(rewards)
        summary.append(("GRPO reward", f"{first:.2f} → {last:.2f}"))
    tables = [
        Table("Held-out prompts, greedy answers", ("model", "exact", "mean reward"), _stage_rows(stages)),
        Table("Some of them", _example_columns(stages), _example_rows(stages, _EXAMPLES_REPORTED)),
    ]
    return render_report(title="fwasync demo: sort five digits", summary=summary, records=records, tables=tables)


def _print_outcome(directory: Path, stages: Sequence[demo.Stage], records: Sequence[Record], seconds: float) -> None:
    print(f"\nHeld-out prompts ({len(stages[0].evaluation.answers)}, never trained on), greedy answers:")
    print_table(("", "exact", "mean reward"), _stage_rows(stages))
    print("\nSome of them:")
    print_table(_example_columns(stages), _example_rows(stages, _EXAMPLES))
    first, last = _ends(_rewards(records))
    print(
        f"\nGRPO's mean reward went from {first:.2f} (first steps) to {last:.2f} (last steps); {seconds:.0f} s in all."
    )
    print()
    print_files(directory)
    data = shlex.quote(str(directory / sort_digits.DATA_FILE))
    print("\nNext, train on a file of your own. This one will do for a start:")
    print(f"  fwasync train sft --data {data} --steps 100 --lora-rank 0 --learning-rate 3e-3")


def _rewards(records: Sequence[Record]) -> list[float]:
    return [record.metrics["rollout/reward"] for record in records if record.phase == rl.PHASE]


def _ends(rewards: Sequence[float]) -> tuple[float, float]:
    """Means of the first and of the last five."""
    first, last = rewards[:_EDGE], rewards[-_EDGE:]
    return sum(first) / len(first), sum(last) / len(last)


def _stage_rows(stages: Sequence[demo.Stage]) -> list[tuple[str, str, str]]:
    return [(stage.name, f"{stage.evaluation.exact:.1%}", f"{stage.evaluation.mean_reward:.3f}") for stage in stages]


def _example_columns(stages: Sequence[demo.Stage]) -> tuple[str, ...]:
    return ("prompt", "wanted", *(stage.name for stage in stages))


def _example_rows(stages: Sequence[demo.Stage], count: int) -> list[tuple[str, ...]]:
    if not stages:
        return []
    answers = zip(*(stage.evaluation.answers[:count] for stage in stages), strict=True)
    return [
        (row[0].row.messages[-1].content, str(row[0].row.ground_truth), *(shown(answer.text) for answer in row))
        for row in answers
    ]
