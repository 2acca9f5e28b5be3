"""The configuration of a run as JSON that may be shown to anyone.

Secrets are masked by the name of their key, and in URLs: the user's name and password, and the query, which signs some
of them. A value that JSON cannot express never stops a run: it is named
by its type, and not by its `repr`, which could hold a secret.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
from collections.abc import Mapping, Set
from datetime import date
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any, cast

from fwasync.errors import UsageError

__all__ = ("config_json", "is_secret")

_SECRETS = ("api_key", "apikey", "token", "secret", "password", "authorization")
_MASK = "***"
_URL = re.compile(r"(https?://)([^/?#\s@]*@)?([^?#\s]*)(\?[^#\s]*)?")


def is_secret(key: str) -> bool:
    """Whether a key names a secret: `token`, `hf_token`, `X-Api-Key`; but not `max_tokens`."""
    name = key.lower().replace("-", "_")
    return any(name == secret or name.endswith(f"_{secret}") for secret in _SECRETS)


def config_json(config: Mapping[str, Any]) -> str:
    """Render a configuration as indented JSON, secrets masked.

    Dataclasses and models with `model_dump()` become objects, paths, enums and dates strings, functions and
    types their qualified names, numbers that are not finite `null`.

    Raises:
        UsageError: The configuration contains itself.
    """
    return json.dumps(_plain(config, ()), indent=2) + "\n"


def _plain(value: object, ancestors: tuple[int, ...]) -> object:
    if isinstance(value, enum.Enum):
        return _plain(value.value, ancestors)
    if isinstance(value, str):
        return _URL.sub(_shown_url, value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (PurePath, date)):
        return str(value)
    return _plain_container(value, ancestors)


def _shown_url(found: re.Match[str]) -> str:
    scheme, user, place, query = found.groups()
    return f"{scheme}{f'{_MASK}@' if user else ''}{place}{f'?{_MASK}' if query else ''}"


def _plain_container(value: object, ancestors: tuple[int, ...]) -> object:
    if id(value) in ancestors:
        raise UsageError(f"the config contains itself, in a {type(value).__name__}; it cannot be written as JSON")
    inside = (*ancestors, id(value))
    fields = _fields(value)
    if fields is not None:
        return {key: _masked(key, item, inside) for key, item in fields.items()}
    if isinstance(value, (list, tuple, Set)):
        return [_plain(item, inside) for item in cast("list[object]", value)]
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else f"<{type(value).__qualname__}>"


def _masked(key: str, value: object, ancestors: tuple[int, ...]) -> object:
    # An absent secret is worth telling, and tells nothing.
    absent = value is None or (isinstance(value, str) and not value)
    return _MASK if is_secret(key) and not absent else _plain(value, ancestors)


def _fields(value: object) -> dict[str, object] | None:
    """The named parts of a mapping, dataclass or model; `None` if it has none."""
    if isinstance(value, type):
        return None
    dump = getattr(value, "model_dump", None)
    parts: object = dump() if callable(dump) else value
    if isinstance(parts, Mapping):
        return {str(key): item for key, item in cast("Mapping[object, object]", parts).items()}
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None
