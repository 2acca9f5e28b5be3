"""Where the control plane is, and with which key."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from fwasync.errors import UsageError

__all__ = ("find_base_url", "find_key")

_FIREWORKS = "https://api.fireworks.ai"
_FIREWORKS_DOMAIN = ".fireworks.ai"


def find_base_url(given: str | None, environment: Mapping[str, str]) -> str:
    """The URL: as given, else of the environment's `FWASYNC_BASE_URL` or `FIREWORKS_BASE_URL`, else Fireworks'."""
    return given or environment.get("FWASYNC_BASE_URL") or environment.get("FIREWORKS_BASE_URL") or _FIREWORKS


def find_key(url: str, given: str | None, environment: Mapping[str, str]) -> str:
    """The key: as given, else `FWASYNC_API_KEY`, else for hosts of fireworks.ai only `FIREWORKS_API_KEY`.

    Raises:
        UsageError: There is none, or it cannot be one.
    """
    vendors = f".{urlsplit(url).hostname or ''}".endswith(_FIREWORKS_DOMAIN)
    names = ["FWASYNC_API_KEY", *(["FIREWORKS_API_KEY"] if vendors else [])]
    key = given or next((environment[name] for name in names if environment.get(name)), None)
    if not key:
        raise UsageError(f"no API key for {url}: pass api_key, or set {' or '.join(names)}")
    if not key.isascii() or any(character.isspace() for character in key):
        raise UsageError("the API key contains a space, a line break or a character that no key has; was it cut?")
    return key
