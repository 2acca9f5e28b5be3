"""What settings name of the user's own code: `module:attribute`."""

from __future__ import annotations

import importlib

from fwasync.errors import UsageError

__all__ = ("import_named",)


def import_named(name: str, what: str) -> object:
    """Import what a setting names.

    Args:
        name: `module:attribute`.
        what: The setting, for errors.

    Raises:
        UsageError: It is no such name, or there is nothing of that name.
    """
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise UsageError(f"{what} {name!r} must look like 'module:attribute'")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{what} {name!r} cannot be imported: {error}") from error
