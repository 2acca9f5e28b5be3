"""The pages of the recipes: their tables are true, their settings train by their command and are what is drawn."""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "recipes"
NAMES = ("sft", "dpo", "orpo")


@pytest.mark.parametrize("name", [*NAMES, "rl", "async_rl"])
def test_defaults_are_as_told(name: str) -> None:
    fields = importlib.import_module(f"fwasync.recipes.{name}").Config.model_fields
    table = (DOCS / f"{name}.md").read_text(encoding="utf-8").partition("## Settings")[2]
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", table, re.M)
    assert len(rows) > 10
    for setting, told in rows:
        default = fields[setting].default
        if setting == "adam":
            assert (told, default.beta2) == ('"default"', 0.999)
        else:
            assert (None if told == "none" else json.loads(told)) == default, setting


@pytest.mark.parametrize("name", NAMES)
def test_the_command_trains(name: str, tmp_path: Path) -> None:
    script = runpy.run_path(str(DOCS / "draw_curves.py"))
    command = [*script["prepare"](name, tmp_path), "max_steps=3", "--batch-size", "8", "lr_scheduler.warmup_steps=1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "in 3 steps" in done.stdout
    records: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records] == [1, 2, 3]
    first, *_ = script["CURVES"][name]
    drawn = script["drawing"](name, tmp_path / "run")
    assert drawn.count("<polyline") == 2
    assert script["CURVES"][name][first] in drawn
    committed = (DOCS / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn.partition("</style>")[0] == committed.partition("</style>")[0]
    dry = subprocess.run(
        [*command, "--dry-run"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert dry.returncode == 0, dry.stderr
    assert "3 steps of 8 rows" in dry.stdout


def test_what_is_drawn_of_rl(tmp_path: Path) -> None:
    """Its page is a program, which is run with all others."""
    script = runpy.run_path(str(DOCS / "draw_curves.py"))
    metrics = script["CURVES"]["rl"]
    lines = [json.dumps({"step": step, **dict.fromkeys(metrics, step)}) for step in range(1, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    committed = (DOCS / "rl.svg").read_text(encoding="utf-8")
    assert script["drawing"]("rl", tmp_path).partition("</style>")[0] == committed.partition("</style>")[0]
    assert all(title in committed for title in metrics.values())
    (_, _, program) = script["prepare"]("rl", tmp_path)
    assert 'log_path=Path("run")' in program


@pytest.mark.skipif(sys.platform == "win32", reason="a shell")
@pytest.mark.parametrize("name", ["rl", "async_rl"])
def test_rl_trains_from_the_command_line(name: str, tmp_path: Path) -> None:
    section = (DOCS / "rl.md").read_text(encoding="utf-8").partition("## From the command line")[2]
    python, toml, console = (
        re.findall(rf"^```{language}\n(.*?)^```", section, re.M | re.S)[0] for language in ("python", "toml", "console")
    )
    (tmp_path / "rewards.py").write_text(python)
    (tmp_path / "rl.toml").write_text(toml)
    prompts, dry, train = console.replace(
        "$ fwasync train rl", f"$ {sys.executable} -m fwasync.cli train {name}"
    ).split("\n", 2)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for line, told in (
        (prompts, ""),
        (dry, "64 steps of 4 prompts with 8 answers each"),
        (train.strip() + " max_steps=3", "in 3 steps"),
    ):
        command = ["bash", "-c", line.removeprefix("$ ")]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=200
        )
        assert done.returncode == 0, done.stderr
        assert told in done.stdout
