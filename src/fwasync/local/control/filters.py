"""The `filter` of lists: clauses such as `snapshot.base_model="x" AND latest_validated=true`. Pure."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

from fwasync.local.refusal import Refused

__all__ = ("matches",)

_CLAUSE = re.compile(r'\s*([A-Za-z_][\w.]*)\s*(>=|<=|!=|=|>|<)\s*("[^"]*"|[^\s"]+)\s*')
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


def matches(expression: str, document: Mapping[str, Any]) -> bool:
    """Whether a resource, as its JSON document, satisfies all clauses; an empty expression is satisfied.

    Fields are named in snake_case or camelCase, with dots. Numbers are compared as numbers, also where they are written
    as text.

    Raises:
        Refused: The expression cannot be read.
    """
    clauses = re.split(r"\s+AND\s+", expression.strip()) if expression.strip() else []
    return all(_holds(clause, document) for clause in clauses)


def _holds(clause: str, document: Mapping[str, Any]) -> bool:
    match = _CLAUSE.fullmatch(clause)
    if match is None:
        raise Refused(400, f'filter: {clause!r} is not understood; use field="text", field>=number, joined by AND')
    found, wanted = _value(match[1], document), match[3].strip('"')
    if match[2] in ("=", "!="):
        text = str(found).lower() if isinstance(found, bool) else "" if found is None else str(found)
        return _COMPARE[match[2]](text, wanted)
    try:
        return _COMPARE[match[2]](float(found), float(wanted))
    except (TypeError, ValueError):
        return False


def _value(path: str, document: Mapping[str, Any]) -> Any:
    value: Any = document
    for part in path.split("."):
        head, *rest = part.split("_")
        name = head + "".join(word.capitalize() for word in rest)
        value = cast("Mapping[str, Any]", value).get(name) if isinstance(value, Mapping) else None
    return value
