"""What holds of every recipe: no setting is there for show, and its file can be read and forked."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from pydantic import BaseModel

from fwasync.cli.settings import members
from fwasync.recipes.optimizer import AdamConfig

RECIPES = ("sft", "dpo", "orpo", "rl", "async_rl")
# Taken over as a whole: `adam_params` hands all of it on.
WHOLE = (AdamConfig,)
UNREAD = {
    ("dpo", "deployment.sample_timeout"): "it does not sample; the section is that of all recipes",
    ("rl", "batch_size"): "is refused where it is given, as a step is made of groups",
    ("rl", "router_replay_completion_only"): "belongs to router_replay, which is refused",
    ("async_rl", "batch_size"): "is refused where it is given, as a step is made of groups",
    ("async_rl", "router_replay_completion_only"): "belongs to router_replay, which is refused",
    ("async_rl", "weight_sync.weight_sync_before_training"): "the first weights are published in any case",
}


@cache
def tree(module: str) -> ast.Module:
    file = sys.modules[module].__file__
    assert file is not None
    return ast.parse(Path(file).read_text(encoding="utf-8"))


def imported(module: str) -> Iterator[str]:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fwasync."):
            yield node.module
            yield from (name for part in node.names if (name := f"{node.module}.{part.name}") in sys.modules)


def reads(recipe: str) -> set[str]:
    """The names of all attributes that are read in what a recipe imports, however deep."""
    found, left = set[str](), [f"fwasync.recipes.{recipe}"]
    import_module(left[0])
    while left:
        module = left.pop()
        if module not in found and module in sys.modules:
            found.add(module)
            left += imported(module)
    return {
        node.attr
        for module in found
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def settings(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        yield f"{above}{name}", name
        for kind in members(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in WHOLE:
                yield from settings(kind, f"{above}{name}.")


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_setting_is_read(recipe: str) -> None:
    read = reads(recipe)
    model: type[BaseModel] = import_module(f"fwasync.recipes.{recipe}").Config
    assert len(list(settings(model))) > 30
    unread = {(recipe, path) for path, name in settings(model) if name not in read}
    assert unread == {key for key in UNREAD if key[0] == recipe}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_can_be_read_and_forked(recipe: str) -> None:
    """It is short, and imports nothing that others must not import."""
    module = import_module(f"fwasync.recipes.{recipe}")
    assert module.__file__ is not None
    assert len(Path(module.__file__).read_text(encoding="utf-8").splitlines()) < 400
    assert not [name for name in imported(module.__name__) if "._" in name]
