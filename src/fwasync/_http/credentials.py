"""Where a service is, and with which key: what was given, else the environment, read when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from fwasync.errors import UsageError

__all__ = ("find_key", "find_url")

_OWN_KEY = "FWASYNC_API_KEY"
# A vendor's key goes to that vendor's hosts only.
_KEYS_BY_DOMAIN = {".fireworks.ai": "FIREWORKS_API_KEY", ".thinkingmachines.dev": "TINKER_API_KEY"}


def find_url(given: str | None, environment: Mapping[str, str], *names: str) -> str | None:
    """The URL: as given, else of `FWASYNC_BASE_URL`, else of the first of the other variables that is set."""
    return given or next((environment[name] for name in ("FWASYNC_BASE_URL", *names) if environment.get(name)), None)


def find_key(url: str, given: str | None, environment: Mapping[str, str]) -> str:
    """The key: as given, else `FWASYNC_API_KEY`, else the vendor's own variable for a vendor's host.

    Raises:
        UsageError: There is none, or it cannot be one. The text names the variables, and never the key.
    """
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:  # no URL: whoever uses it tells
        host = ""
    names = [_OWN_KEY, *(name for domain, name in _KEYS_BY_DOMAIN.items() if f".{host}".endswith(domain))]
    key = given or next((environment[name] for name in names if environment.get(name)), None)
    if not key:
        raise UsageError(f"no API key for {host or 'the service'}: pass api_key, or set {' or '.join(names)}")
    if not key.isascii() or any(character.isspace() for character in key):
        raise UsageError("the API key contains a space, a line break or a character that no key has; was it cut?")
    return key
