"""Recipes in the cookbook's style: what they import, and that those on rows learn on trainer jobs."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path
from typing import Any

import pytest

from fwasync import TrainerJobConfig, TrainerJobManager
from fwasync.testing import ScriptedService, blocking_local_service

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
NAMES = ("legacy_sft", "legacy_dpo", "legacy_orpo", "legacy_grpo")
BASE, SHAPE = "accounts/fwasync/models/qwen3-tiny", "accounts/fwasync/trainingShapes/qwen3-tiny"
NUMBERS = [str(number) for number in range(10)]


def tokens(text: str) -> list[int]:
    return list(text.encode())


def run(local: ScriptedService, name: str, rows: list[Any], **settings: Any) -> list[Any]:
    """Train on trainer jobs of the local service."""
    example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    fields = example["Config"].__dataclass_fields__
    jobs = {key: f"{name.replace('_', '-')}-{key[:3]}" for key in ("job_id", "reference_job_id") if key in fields}
    with TrainerJobManager(api_key=local.api_key, base_url=local.base_url) as manager:
        for key, job_id in jobs.items():
            forward_only = key == "reference_job_id"
            manager.create(
                TrainerJobConfig(
                    base_model=BASE, training_shape_ref=SHAPE, forward_only=forward_only, requested_job_id=job_id
                )
            )
        given = {"base_model": BASE, "api_key": local.api_key, "learning_rate": 3e-3, **jobs}
        return example["main"](example["Config"](**given, **settings), manager, rows)


@pytest.mark.parametrize("name", NAMES)
def test_it_names_the_package_where_it_imports_and_nowhere_else(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes]
    ours = [module for module in modules if module and module.startswith("fwasync")]
    assert set(ours) <= {"fwasync", "fwasync.losses"}
    assert source.count("fwasync") == len(ours)
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


@pytest.mark.parametrize("name", ["legacy_dpo", "legacy_orpo"])
def test_preferences_are_learnt(name: str) -> None:
    rows = [(tokens(f"{number}>"), tokens("yes"), tokens("no")) for number in NUMBERS]
    with blocking_local_service() as local:
        first, *_, last = run(local, name, rows, epochs=5, batch_size=5)
    if name == "legacy_dpo":
        assert first["dpo_loss"] == pytest.approx(0.693, abs=1e-3)
        assert last["dpo_loss"] < 0.5
        assert last["margin"] > 3
    else:
        assert last["orpo_loss"] < 0.8 * first["orpo_loss"]
        assert last["log_odds_ratio"] > first["log_odds_ratio"] + 1
    assert last["accuracy"] == 1
