"""What a setting names: a function or class of the user's, as `module:attribute` or `file.py:attribute`.

A module is found as `python -m` finds it: in the current directory first. A file is imported as if Python ran it: its
directory comes first. These directories stay on `sys.path`, so that what is named can import its neighbours whenever it
wants, and other processes can import it.
"""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from fwasync.errors import UsageError

__all__ = ("load_named", "place_of", "raised_by")


def load_named(name: str, what: str, *, otherwise: str = "") -> Any:
    """Import what is named. This runs the user's code and may take its time: on an event loop, call it in a thread.

    Args:
        name: `module:attribute` or `file.py:attribute`.
        what: What it is to be, for errors.
        otherwise: What else may be done than name it so, for errors.

    Raises:
        UsageError: It cannot be had; the text says why, and where in the user's code.
    """
    named = f"{what} {name!r}"
    where, _, attribute = name.rpartition(":")
    if not (where and attribute):
        raise UsageError(f"{named} must look like 'module:attribute' or 'file.py:attribute'{otherwise}")
    try:
        return getattr(_from_file(Path(where)) if where.endswith(".py") else _module(where, Path.cwd()), attribute)
    except UsageError as error:
        raise UsageError(f"{named} cannot be imported: {error}") from error
    except Exception as error:
        kind = "" if isinstance(error, ImportError | AttributeError | SyntaxError) else f"{type(error).__name__}: "
        raise UsageError(f"{named} cannot be imported: {kind}{error}{place_of(error)}") from error


def raised_by(what: str, error: BaseException) -> UsageError:
    """What a user's function raised, as an error that says so: whose it is, what it was, and where.

    Args:
        what: The function, such as `reward 'mine.py:grade'`.
        error: What it raised; the error that is to be raised from it.
    """
    return UsageError(f"{what} raised {type(error).__name__}: {error}{place_of(error)}")


def place_of(error: BaseException) -> str:
    """Where in the user's code an exception was raised, as ` (file.py, line 3)`; empty if it was nowhere there."""
    libraries = (Path(__file__).parents[1], sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    others = ("<", *(f"{path}{os.sep}" for path in libraries))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(others):
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""


def _from_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise UsageError(f"there is no file {file}")
    file = file.resolve()
    module = _module(file.stem, file.parent)
    other = getattr(module, "__file__", None)
    if other is None or Path(other).resolve() != file:
        raise UsageError(f"another module has its name, {other or file.stem}; rename the file")
    return module


def _module(name: str, directory: Path) -> ModuleType:
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    return importlib.import_module(name)
