"""Every row of the reference page, by its name: classes, fields, types, defaults, properties, methods, promises."""

from __future__ import annotations

import ast
import importlib
import inspect
import tomllib
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pytest

import fwasync
from fwasync import ReconnectableClient, TrainerServiceEndpoint
from fwasync.training.normalization import normalization_name

ROOT = Path(__file__).parents[3]
PAGE: dict[str, Any] = tomllib.loads(Path(__file__).with_name("page.toml").read_text(encoding="utf-8"))
CONFIGS: dict[str, Any] = PAGE["config"]
CLIENT: dict[str, Any] = PAGE["client"]["ReconnectableClient"]
FIELDS = [
    pytest.param(config, *row, id=f"{config}-{row[0]}") for config, table in CONFIGS.items() for row in table["fields"]
]
ROWS_TESTED_ELSEWHERE = [
    pytest.param(*row["test"], id=row.get("name") or row["says"]) for row in (*CLIENT["properties"], *PAGE["promises"])
]
REQUIRED = inspect.Parameter.empty


def spelled(annotation: Any) -> str:
    """A type as the page writes it: without its checks."""
    if get_origin(annotation) is Annotated:
        return spelled(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return " | ".join(spelled(part) for part in get_args(annotation))
    if annotation is type(None):
        return "None"
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


def default(text: str) -> Any:
    return REQUIRED if text == "required" else ast.literal_eval(text)


def parameters(function: Any) -> dict[str, Any]:
    return {p.name: p.default for p in list(inspect.signature(function).parameters.values())[1:]}


def members(cls: type) -> dict[str, Any]:
    return {name: inspect.getattr_static(cls, name) for name in dir(cls) if not name.startswith("_")}


@pytest.mark.parametrize("name", PAGE["imports"]["names"])
def test_what_the_page_imports(name: str) -> None:
    assert name in fwasync.__all__
    assert getattr(fwasync, name).__name__ == name


@pytest.mark.parametrize(("config", "name", "kind", "value"), FIELDS)
def test_field(config: str, name: str, kind: str, value: str) -> None:
    field = getattr(fwasync, config).model_fields[name]
    assert (spelled(field.annotation), field.default) == (kind, default(value))
    assert type(getattr(getattr(fwasync, config)(), name)) is type(default(value)) or kind == "float"
    assert field.description


@pytest.mark.parametrize("config", CONFIGS)
def test_no_field_is_missing_and_none_is_added(config: str) -> None:
    fields = getattr(fwasync, config).model_fields
    internal = {
        name
        for name, field in fields.items()
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("internal")
    }
    assert internal == set(CONFIGS[config]["internal"])
    assert list(fields.keys() - internal) != []
    assert fields.keys() - internal == {row[0] for row in CONFIGS[config]["fields"]}


@pytest.mark.parametrize("config", CONFIGS)
def test_the_example_of_a_configuration(config: str) -> None:
    example = CONFIGS[config]["example"]
    assert getattr(fwasync, config)(**example).model_dump(exclude_unset=True) == example


@pytest.mark.parametrize("row", CLIENT["parameters"], ids=lambda row: row[0])
def test_parameter_of_the_client(row: list[str]) -> None:
    name, kind, value = row
    parameter = inspect.signature(ReconnectableClient).parameters[name]
    assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert parameter.default == default(value)
    ours = {"TrainerJobManager": "TrainerManager", "TrainerServiceEndpoint | None": "TrainerEndpoint | None"}
    # Ours take what the page says, and more: a protocol for a class, a float for an int, None for "none needed".
    assert ours.get(kind, kind).replace("int", "float") in parameter.annotation.replace("int", "float")


def test_the_client_has_these_parameters_in_this_order() -> None:
    assert list(inspect.signature(ReconnectableClient).parameters) == [row[0] for row in CLIENT["parameters"]]


@pytest.mark.parametrize("row", CLIENT["properties"], ids=lambda row: row["name"])
def test_property_of_the_client(row: dict[str, Any]) -> None:
    assert isinstance(members(ReconnectableClient)[row["name"]], property)
    for attribute in row.get("attributes", ()):
        assert attribute in inspect.signature(TrainerServiceEndpoint).parameters


@pytest.mark.parametrize("name", CLIENT["methods"])
def test_method_of_the_client(name: str) -> None:
    expected = {row.partition("=")[0]: default(row.partition("=")[2] or "required") for row in CLIENT["methods"][name]}
    assert parameters(members(ReconnectableClient)[name]) == expected
    assert list(parameters(members(ReconnectableClient)[name])) == list(expected)


def test_the_client_has_nothing_else_but_its_end() -> None:
    named = {row["name"] for row in CLIENT["properties"]} | set(CLIENT["methods"])
    assert set(members(ReconnectableClient)) == named | {"close"}


@pytest.mark.parametrize(("file", "function"), ROWS_TESTED_ELSEWHERE)
def test_a_row_that_is_tested_elsewhere_is(file: str, function: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("row", PAGE["recipe_defaults"], ids=lambda row: row["recipe"])
def test_the_default_of_a_recipe(row: dict[str, str]) -> None:
    field = importlib.import_module(row["module"]).Config.model_fields["grad_accumulation_normalization"]
    assert field.default == normalization_name(field.default) == default(row["default"])


def test_no_row_is_there_twice() -> None:
    rows = [(param.values[0], param.values[1]) for param in FIELDS]
    assert len(rows) == len(set(rows)) == 5 + 11 + 6 + 3
    assert len(CLIENT["parameters"]) == 7
    assert len(CLIENT["properties"]) == 3
    assert len(CLIENT["methods"]) == 9
    assert len(PAGE["recipe_defaults"]) == 4
