"""Names of resources, their ids, times, and pages of lists. Pure."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TypeVar

from fwasync.local.refusal import Refused

__all__ = (
    "ACCOUNT",
    "BUILT_IN",
    "engine_name",
    "id_of",
    "model_name",
    "new_id",
    "page_of",
    "resource",
    "timestamp",
)

T = TypeVar("T")

ACCOUNT = "local"
"""The account that every key opens."""

BUILT_IN = "fwasync"
"""The account of what the service brings along."""

_ID = re.compile(r"[a-z0-9-]{1,63}")
_MODEL = re.compile(r"accounts/([^/]+)/models/([^/]+)")
_PAGE, _LARGEST_PAGE = 50, 200


def resource(kind: str, name: str, account: str = ACCOUNT) -> str:
    """`accounts/{account}/{kind}/{name}`."""
    return f"accounts/{account}/{kind}/{name}"


def id_of(kind: str, text: str) -> str:
    """The id in the name of a resource of our account; a bare id is taken as it is.

    Raises:
        Refused: It names something else.
    """
    name = text.removeprefix(f"accounts/{ACCOUNT}/{kind}/")
    if _ID.fullmatch(name) is None:
        raise Refused(400, f"{text!r} is not the name of one of {resource(kind, '<id>')}")
    return name


def new_id(field: str, given: str | None) -> str:
    """The id that a client chose, or a fresh one.

    Raises:
        Refused: It cannot be an id.
    """
    if given is None:
        return secrets.token_hex(8)
    if _ID.fullmatch(given) is None:
        raise Refused(400, f"{field} is {given!r}: use at most 63 lower-case letters, digits and '-'")
    return given


def engine_name(model: str) -> str:
    """A base model as the engine calls it: `accounts/{a}/models/{m}` is its `{a}/{m}`."""
    match = _MODEL.fullmatch(model)
    return f"{match[1]}/{match[2]}" if match else model


def model_name(engine_model: str) -> str:
    """A base model of the engine as the control plane calls it; the inverse of `engine_name`."""
    account, _, name = engine_model.rpartition("/")
    return resource("models", name, account or BUILT_IN)


def timestamp(seconds: float) -> str:
    """A time since the epoch as the control plane writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def page_of(entries: list[T], query: Mapping[str, str]) -> tuple[list[T], str]:
    """The part of a list that `pageSize` and `pageToken` ask for, and the token of the next (empty: none).

    Raises:
        Refused: They cannot be read.
    """
    size, token = query.get("pageSize", str(_PAGE)), query.get("pageToken") or "0"
    if not (size.isascii() and size.isdigit() and token.isascii() and token.isdigit()):
        raise Refused(400, f"pageSize {size!r} has to be a number and pageToken {token!r} one that was given")
    start = int(token)
    end = start + min(int(size) or _PAGE, _LARGEST_PAGE)
    return entries[start:end], str(end) if end < len(entries) else ""
