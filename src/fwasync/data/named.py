"""Functions and classes that settings name, as `module:attribute`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

from fwasync.errors import UsageError

__all__ = ("import_named",)


def import_named(kind: str, name: str) -> Callable[..., Any]:
    """What a setting names; its module is imported now.

    Args:
        kind: What it is to be, for errors.
        name: `module:attribute`.

    Raises:
        UsageError: It cannot be had, or cannot be called.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise UsageError(f"{kind} {name!r} must look like 'module:attribute'")
    try:
        found = cast("object", getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{kind} {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise UsageError(f"{kind} {name!r} is a {type(found).__name__}; it must be a function or class")
    return found
