"""The rules of the house, as tests: who may import whom, what an import costs, what is public, how long a module is."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pickle
import pkgutil
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import fwasync
from fwasync import errors

ROOT = Path(__file__).parents[2]
PACKAGE = Path(fwasync.__file__).parent
MODULES = sorted(info.name for info in pkgutil.walk_packages([str(PACKAGE)], "fwasync.") if "__main__" not in info.name)


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_point_downwards() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout


HEAVY = (
    "aiohttp",
    "anyio",
    "httpx",
    "jinja2",
    "msgspec",
    "numpy",
    "pydantic",
    "rich",
    "starlette",
    "tinker",
    "tokenizers",
    "torch",
    "transformers",
    "typer",
    "uvicorn",
)


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import fwasync", set[str]()),
        ("import fwasync.errors, fwasync.types", set[str]()),
        ("import fwasync.cli", set[str]()),
        (
            "from fwasync import AsyncServiceClient, AsyncTrainingClient, AsyncSamplingClient",
            {"anyio", "httpx", "msgspec", "numpy", "rich"},  # httpx brings rich where it is installed,
        ),
        ("import fwasync.losses", {"anyio", "numpy", "pydantic"}),  # torch comes when a loss is computed
    ],
)
def test_what_an_import_loads(statement: str, allowed: set[str]) -> None:
    loaded = json.loads(python(f"{statement}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"))
    assert set(HEAVY) & set(loaded) <= allowed


def test_the_root_imports_in_no_time() -> None:
    code = "import time; t = time.process_time(); import fwasync; print(time.process_time() - t)"
    assert min(float(python(code)) for _ in range(3)) < 0.1


def test_importing_any_module_starts_nothing() -> None:
    code = (
        "import importlib, threading, logging, os\n"
        "before = dict(os.environ)\n"
        f"for name in {MODULES!r}: importlib.import_module(name)\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "assert dict(os.environ) == before\n"
        "assert not logging.getLogger('fwasync').handlers\n"
    )
    python(code)


@pytest.mark.parametrize("module", MODULES)
def test_public_names_exist_and_are_documented(module: str) -> None:
    loaded = importlib.import_module(module)
    assert loaded.__doc__
    assert loaded.__doc__.strip()
    names = getattr(loaded, "__all__", None)
    if names is None:
        assert module.count(".") == 1 or not module.rpartition(".")[2].startswith("_"), f"{module} needs __all__"
        public = [name for name, value in vars(loaded).items() if getattr(value, "__module__", "") == module]
        assert not [name for name in public if not name.startswith("_")], f"{module} has public names but no __all__"
        return
    for name in names:
        value = getattr(loaded, name)
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module:
            assert inspect.getdoc(value), f"{module}.{name} has no docstring"


def test_the_root_gives_what_it_names_and_nothing_else() -> None:
    for name in fwasync.__all__:
        getattr(fwasync, name)
    source = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    for name in set(fwasync.__all__) - {"__version__"}:
        assert f" as {name}\n" in source, f"{name} is missing for type checkers"
    with pytest.raises(AttributeError):
        fwasync.nonsense  # noqa: B018


def test_every_public_name_is_in_the_reference_once() -> None:
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")]
    entries = [entry for page in pages for entry in re.findall(r"^::: (\S+)$", page, re.M)]
    assert len(entries) == len(set(entries)), "two places to link to"
    documented = set(entries)
    for entry in entries:  # a module, with all that it names, or one name of a module
        home, _, name = entry.rpartition(".")
        if entry in MODULES:
            documented |= {f"{entry}.{each}" for each in importlib.import_module(entry).__all__}
        else:
            assert name in importlib.import_module(home).__all__, entry
    for name in set(fwasync.__all__) - {"__version__", "types"}:
        home = "fwasync" if name == "errors" else fwasync._HOMES[name]
        assert f"{home}.{name}" in documented, f"{name} is in no page of docs/reference"


def test_the_error_tree_is_drawn_as_it_is() -> None:
    assert errors.__doc__ is not None
    classes = [getattr(errors, name) for name in errors.__all__]
    for cls in classes:
        assert issubclass(cls, errors.FwasyncError)
        assert cls.__name__ in errors.__doc__, f"{cls.__name__} is missing in the drawing"


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_reach_other_processes(name: str) -> None:
    error = getattr(errors, name)("what happened")
    error.request_id = "r1"
    error.future = threading.Lock() if name == "OperationTimeoutError" else None  # which cannot be sent
    error.add_note("and where")
    received = pickle.loads(pickle.dumps(error))
    assert (type(received), str(received)) == (type(error), "what happened")
    assert received.__dict__ == {**error.__dict__, "future": None}


def test_no_module_is_a_cathedral() -> None:
    long = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert not long


def test_the_version_is_in_the_changelog() -> None:
    assert f"## {fwasync.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_help_needs_no_terminal() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fwasync.cli", "--help"],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, "TERM": "dumb", "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout
