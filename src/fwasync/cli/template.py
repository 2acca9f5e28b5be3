"""A recipe's settings as a TOML file to start from: every name, what it means, and its default as a comment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import PurePath

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fwasync.cli.settings import members

__all__ = ("template",)


def template(name: str, model: type[BaseModel]) -> str:
    """The file, as text. What must be set stands there to be filled in."""
    lines = [
        f"# Settings of `fwasync train {name}`. Lines that are commented out show the defaults.",
        *_section(model, None, ""),
    ]
    return "\n".join(lines) + "\n"


def _section(model: type[BaseModel], default: object, prefix: str) -> Iterator[str]:
    sections: list[tuple[str, FieldInfo, type[BaseModel]]] = []
    for name, info in model.model_fields.items():
        inner = next(
            (kind for kind in members(info.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)), None
        )
        if inner is not None:
            sections.append((name, info, inner))
            continue
        if (info.json_schema_extra or {}) == {"internal": True}:
            continue
        yield ""
        if info.description:
            yield f"# {info.description}"
        if name == "log_path":
            yield '# log_path = "…"  # else the next free one of runs/'
        elif info.is_required():
            yield f'{name} = ""  # must be set'
        else:
            yield f"# {name} = {_literal(_default(info, name, default))}"
    for name, info, inner in sections:
        yield ""
        if info.description:
            yield f"# {info.description}"
        yield f"[{prefix}{name}]"
        yield from _section(inner, _default(info, name, default), f"{prefix}{name}.")


def _default(info: FieldInfo, name: str, section: object) -> object:
    """The default of a field: that of the section's own default, which a recipe may have changed, else the model's."""
    return getattr(section, name) if hasattr(section, name) else info.get_default(call_default_factory=True)


def _literal(value: object) -> str:
    if value is None:
        return "(unset)"
    return json.dumps(str(value) if isinstance(value, PurePath) else value, default=str)
