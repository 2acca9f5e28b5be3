"""Every field of the cookbook's recipes, with its default; what is different is on the recipe's page."""

from __future__ import annotations

import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from fwasync.cli.settings import Settings
from fwasync.errors import UsageError

COOKBOOK: dict[str, Any] = tomllib.loads(Path(__file__).with_name("cookbook.toml").read_text(encoding="utf-8"))
DOCS = Path(__file__).parents[3] / "docs" / "recipes"
DIFFERENT: dict[str, list[str]] = COOKBOOK.pop("different")
FIELDS = [
    pytest.param(recipe, name, default, id=f"{recipe}-{name}")
    for recipe, table in COOKBOOK.items()
    for name, default in table.items()
]


def config(recipe: str) -> type[BaseModel]:
    return import_module(f"fwasync.recipes.{recipe}").Config


def plain(value: object) -> object:
    if isinstance(value, BaseModel):
        defaults = {name: field.default for name, field in type(value).model_fields.items()}
        return {name: plain(each) for name, each in value.model_dump().items() if each != defaults[name]}
    return "unset" if value is None else value


@pytest.mark.parametrize(("recipe", "name", "default"), FIELDS)
def test_a_field_of_the_cookbook(recipe: str, name: str, default: object) -> None:
    found = config(recipe).model_fields[name].default
    if isinstance(default, dict):
        # Of a section: what is told is so, and all else is as that section's own default has it.
        assert {key: value for key, value in found.model_dump().items() if key in default} == default
        assert plain(found).keys() <= default.keys()
    else:
        assert plain(found) == default


@pytest.mark.parametrize("recipe", COOKBOOK)
def test_the_page_of_a_recipe_names_what_is_different(recipe: str) -> None:
    page = (DOCS / f"{recipe}.md").read_text(encoding="utf-8")
    _, _, told = page.partition("\n## Coming from the cookbook\n")
    missing = [name for name in DIFFERENT[recipe] if f"`{name}`" not in told]
    assert told
    assert not missing
    assert not [name for name in DIFFERENT[recipe] if name in COOKBOOK[recipe]]


@pytest.mark.parametrize(
    ("recipe", "name"), [(recipe, name) for recipe in COOKBOOK for name in DIFFERENT[recipe] if name != "dataset"]
)
def test_what_is_not_taken_is_refused_with_what_to_do_instead(recipe: str, name: str) -> None:
    instead = {"grad_accum": "batch_size", "policy_base_url": "--base-url", "reference_base_url": "reference_job_id"}
    with pytest.raises(ValueError, match=rf"Config does not take '{name}': .*{instead[name]}"):
        config(recipe)(log_path="run", **{name: 2})
    settings = Settings()
    settings.override([f"{name}=2", "log_path=run"], config(recipe))
    with pytest.raises(UsageError, match=rf"^{name}: '{name}' is not taken: .*{instead[name]}"):
        settings.build(config(recipe))


def test_log_path_is_the_only_one_that_must_be_given() -> None:
    for recipe in COOKBOOK:
        required = [name for name, field in config(recipe).model_fields.items() if field.is_required()]
        assert required == ["log_path"]
