"""Names of the control plane's resources: made, taken apart and checked. Pure."""

from __future__ import annotations

import re
from urllib.parse import quote

from fwasync.errors import UsageError

__all__ = ("check_id", "last_part", "output_model_problems", "parent_shape", "path_of")

_LONGEST_ID = 63


def last_part(name: str) -> str:
    """`accounts/a/models/m` → `m`."""
    return name.rpartition("/")[2]


def parent_shape(version_name: str) -> str:
    """A shape's name without its version."""
    return version_name.partition("/versions/")[0]


def path_of(name: str) -> str:
    """A resource name as a part of a path, with what a path cannot hold escaped.

    Raises:
        UsageError: It is not a full resource name.
    """
    parts = name.split("/")
    if len(parts) < 2 or len(parts) % 2 or parts[0] != "accounts" or "" in parts or ".." in parts:
        raise UsageError(f"{name!r} is not a full resource name such as accounts/<account>/models/<model>")
    return quote(name, safe="/")


def check_id(what: str, value: str) -> str:
    """An id that goes into a path.

    Raises:
        UsageError: It is empty, or a name of several parts.
    """
    if not re.fullmatch(r"[A-Za-z0-9._~-]+", value) or value in (".", ".."):
        raise UsageError(f"{what} {value!r} is not an id; pass the last part of the resource's name")
    return value


def output_model_problems(model_id: str) -> list[str]:
    """What is wrong with the id of a model to be made, as sentences; none if it is good."""
    if not model_id:
        return ["The id of the output model is required."]
    problems: list[str] = []
    if not re.fullmatch(r"[a-z0-9-]+", model_id):
        problems.append(f"The id {model_id!r} may hold lower-case letters, digits and hyphens only.")
    if len(model_id) > _LONGEST_ID:
        problems.append(f"The id {model_id!r} has {len(model_id)} characters; at most {_LONGEST_ID} are allowed.")
    if model_id.startswith("-") or model_id.endswith("-"):
        problems.append(f"The id {model_id!r} must not begin or end with a hyphen.")
    return problems
