"""What a refusal means: status and body become one typed error with a way out, and never a secret."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import msgspec

from fwasync._wire import messages
from fwasync.errors import (
    AuthenticationError,
    BadRequestError,
    ConflictError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitError,
    ServiceError,
    ServiceUnavailableError,
)

__all__ = ("fault_text", "refusal", "request_id_of")

_LONGEST_TEXT = 600
_ID_HEADERS = ("x-request-id", "x-fireworks-request-id", "cf-ray")

_BY_STATUS: dict[int, tuple[type[ServiceError], str]] = {
    401: (AuthenticationError, "check the API key"),
    403: (PermissionDeniedError, "this API key may not do that"),
    404: (NotFoundError, ""),
    409: (ConflictError, ""),
    429: (RateLimitError, "send fewer requests at a time, or try later"),
}


def fault_text(body: bytes, *, secret: str) -> str:
    """What an error body says, cut to a readable length, with the API key masked should it be echoed."""
    try:
        fault = messages.decode(body, messages.ServiceFault)
        parts: tuple[object, ...] = (fault.detail, fault.error, fault.message)
        said = next((part for part in parts if part not in (None, "", [], {})), None)
        if isinstance(said, dict):  # Google's way: {"error": {"code": 5, "message": "…"}}
            said = cast("dict[str, object]", said).get("message", cast("object", said))
        text = said if isinstance(said, str) else "" if said is None else msgspec.json.encode(said).decode()
    except msgspec.MsgspecError:
        text = body.decode("utf-8", errors="replace")
        if "<html" in text.lower():
            text = "an HTML page"
    if secret:
        text = text.replace(secret, "***")  # before it is cut, or a piece of the key could remain
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " …"


def request_id_of(headers: Mapping[str, str]) -> str | None:
    """The service's id of a request, by which its operators find it, in the headers (lower-case) of its answer."""
    for name in _ID_HEADERS:
        if found := headers.get(name):
            return found
    return None


def refusal(status: int, text: str, *, what: str, url: str, request_id: str | None = None) -> ServiceError:
    """The error for an answer that is not a success.

    Args:
        status: HTTP status, not 2xx.
        text: What the body says (see `fault_text`).
        what: The request, as its caller would name it.
        url: Where it went.
        request_id: The service's id of it.
    """
    if status < 400:
        text = f"{what}: {url} answered {status}, which no trainer service does; check base_url"
        return ProtocolError(text, status=status, request_id=request_id)
    default = ServiceUnavailableError if status >= 500 or status in (408, 425) else BadRequestError
    kind, hint = _BY_STATUS.get(status, (default, ""))
    parts = [f"{what} was refused by {url} with status {status}", text, hint]
    error = kind(": ".join(part for part in parts if part), status=status, request_id=request_id)
    if request_id is not None:
        error.add_note(f"request id: {request_id}")
    return error
