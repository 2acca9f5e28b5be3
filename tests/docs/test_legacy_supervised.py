"""Recipes on rows in the cookbook's style: they know the package by its names alone, and learn on the local service."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fwasync.testing import ScriptedService, blocking_local_service

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
NAMES = ("legacy_sft", "legacy_dpo", "legacy_orpo")
NUMBERS = [str(number) for number in range(10)]


def tokens(text: str) -> list[int]:
    return list(text.encode())


def run(local: ScriptedService, name: str, rows: list[Any], **settings: Any) -> list[Any]:
    example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    endpoint = SimpleNamespace(base_url=local.base_url, job_id="job", job_name="job")
    manager = SimpleNamespace(wait_for_existing=lambda job_id: endpoint)
    given = {"base_model": "fwasync/qwen3-tiny", "job_id": "job", "api_key": local.api_key, "learning_rate": 3e-3}
    return example["main"](example["Config"](**given, **settings), manager, rows)


@pytest.mark.parametrize("name", NAMES)
def test_what_it_imports(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    assert modules <= {"logging", "dataclasses", "tinker", "fwasync", "fwasync.losses"}
    assert "async" not in source.replace("fwasync", "")


def test_sft_learns() -> None:
    rows = [(tokens(f"{number}>"), tokens(f"{int(number) * 7 % 10}.")) for number in NUMBERS]
    with blocking_local_service() as local:
        losses = run(local, "legacy_sft", rows, epochs=30, batch_size=5, dcp_save_interval=30)
        [kinds] = [[operation.kind for operation in operations] for operations in local.effects().values()]
    assert len(losses) == 60
    assert losses[-1] < 1 < 4 < losses[0]
    assert kinds.count("save_weights") == 2
    assert kinds[-1] == "save_weights_for_sampler"


@pytest.mark.parametrize(("name", "more"), [("legacy_dpo", {"reference_job_id": "reference"}), ("legacy_orpo", {})])
def test_preferences_are_learnt(name: str, more: dict[str, str]) -> None:
    rows = [(tokens(f"{number}>"), tokens("yes"), tokens("no")) for number in NUMBERS]
    with blocking_local_service() as local:
        first, *_, last = run(local, name, rows, epochs=5, batch_size=5, **more)
    if name == "legacy_dpo":
        assert first["dpo_loss"] == pytest.approx(0.693, abs=1e-3)
        assert last["dpo_loss"] < 0.5
        assert last["margin"] > 3
    else:
        assert last["orpo_loss"] < 0.8 * first["orpo_loss"]
        assert last["log_odds_ratio"] > first["log_odds_ratio"] + 1
    assert last["accuracy"] == 1
