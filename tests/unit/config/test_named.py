"""What settings name: found where one expects it, and one clear line where it is not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fwasync.config.named import load_named
from fwasync.errors import UsageError


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory; what is imported from it is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_module_is_found_in_the_current_directory(directory: Path) -> None:
    (directory / "my_things.py").write_text("one = 1\n")
    assert load_named("my_things:one", "thing") == 1
    assert load_named("json:loads", "thing")("[2]") == [2]


def test_a_file_is_imported_with_its_neighbours(directory: Path) -> None:
    (directory / "deeper").mkdir()
    (directory / "deeper" / "my_things.py").write_text("import my_neighbour\ntwo = my_neighbour.two\n")
    (directory / "deeper" / "my_neighbour.py").write_text("two = 2\n")
    assert load_named("deeper/my_things.py:two", "thing") == 2
    assert load_named(f"{directory}/deeper/../deeper/my_things.py:two", "thing") == 2
    (directory / "my_things.py").write_text("")
    with pytest.raises(UsageError, match=r"another module has its name, .*deeper/my_things\.py; rename the file$"):
        load_named("my_things.py:two", "thing")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "module 'my_things' has no attribute 'grade'"),
        ("\nimport no_such_thing", r"No module named 'no_such_thing' \(my_things\.py, line 2\)"),
        ("def grade(:", r"invalid syntax \(my_things\.py, line 1\)"),
        ("import json\njson.loads('{')", r"JSONDecodeError: .* \(my_things\.py, line 2\)"),
    ],
)
def test_what_is_wrong_with_a_file(directory: Path, text: str, told: str) -> None:
    (directory / "my_things.py").write_text(text)
    for name in ("my_things:grade", "my_things.py:grade"):
        with pytest.raises(UsageError, match=f"^thing '{name}' cannot be imported: {told}$"):
            load_named(name, "thing")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("grade", "must look like 'module:attribute' or 'file.py:attribute', or else"),
        (":grade", "must look like"),
        ("my_things:", "must look like"),
        ("no_such_module:grade", "cannot be imported: No module named 'no_such_module'"),
        ("no/such/file.py:grade", "cannot be imported: there is no file no/such/file.py"),
    ],
)
def test_what_is_wrong_with_a_name(name: str, told: str) -> None:
    with pytest.raises(UsageError, match=f"^thing '{name}' {told}"):
        load_named(name, "thing", otherwise=", or else")
