"""Reading an answer that was a success: as the message it must be, or a clear error."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from fwasync._wire.messages import decode
from fwasync.errors import ProtocolError

__all__ = ("read",)

T = TypeVar("T")


def read(what: str, body: bytes, type_: type[T]) -> T:
    """Decode a message of the service.

    Raises:
        ProtocolError: It is something else; the text names the request and the field.
    """
    try:
        return decode(body, type_)
    except msgspec.MsgspecError as error:
        raise ProtocolError(
            f"{what}: the answer is not one of the trainer API ({error}); check base_url and the service's version"
        ) from error
