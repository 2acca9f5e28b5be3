"""The head of a request, as it goes over the wire. Pure.

Invariants
    * No value that a caller passes can end a line: what goes out is the request that was meant.
    * No error shows a value: it may be a key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote

from fwasync.errors import UsageError

__all__ = ("Heads", "header_lines")

_NAME = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_VALUE = r"[\t -~\x80-\xff]*"
_LINES: Final = re.compile(rf"(?:{_NAME}: {_VALUE}\r\n)*").fullmatch
_PATH: Final = re.compile(r"[!-~]*").fullmatch
# They say where the request ends, or what becomes of the connection.
_NOT_THE_CALLERS: Final = frozenset(
    {"connection", "content-length", "expect", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
)
_WITH_BODY: Final = frozenset({"PATCH", "POST", "PUT"})


def header_lines(headers: Mapping[str, str]) -> str:
    """Headers as lines of a head.

    Raises:
        UsageError: One cannot be sent. The text has its name, not its value.
    """
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if (
        _LINES(lines) is None
        or lines.count("\n") != len(headers)
        or ":" in "".join(headers)
        or not _NOT_THE_CALLERS.isdisjoint(headers)
    ):
        raise _refused(headers)
    return lines


def _refused(headers: Mapping[str, str]) -> UsageError:
    for name, value in headers.items():
        if re.fullmatch(_NAME, name) is None:
            return UsageError(f"{name[:60]!r} is no name of a header")
        if re.fullmatch(_VALUE, value) is None:
            return UsageError(f"the value of header {name!r} has a line break or another character that none may have")
        if name in _NOT_THE_CALLERS:
            return UsageError(f"header {name!r} cannot be given: it belongs to the connection")
    raise AssertionError("nothing to refuse")


class Heads:
    """Makes the heads of requests to one service. What they have in common is made once.

    Args:
        host: For the header of this name, with the port if that is not the scheme's own.
        root: What all paths begin with, without a slash at its end.
        headers: Those of every request, with lower-case names. A request's own of the same name replace them.

    Raises:
        UsageError: A header cannot be sent.
    """

    def __init__(self, host: str, root: str, headers: Mapping[str, str]) -> None:
        self._root = quote(root, safe="/%:@!$&'()*+,;=~")
        self._headers = {"host": host} | dict(headers)
        self._names = frozenset(self._headers)
        self._lines = header_lines(self._headers)

    def head(self, method: str, path: str, headers: Mapping[str, str], size: int) -> bytes:
        """The head of one request.

        Args:
            method: HTTP method.
            path: Below the root, without a leading slash, with its query.
            headers: With lower-case names.
            size: Bytes of its body.

        Raises:
            UsageError: A header cannot be sent.
        """
        if self._names.isdisjoint(headers):
            lines = self._lines + header_lines(headers)
        else:
            lines = header_lines(self._headers | dict(headers))
        if _PATH(path) is None or "#" in path:
            path = quote(path, safe="/%?:@!$&'()*+,;=~[]")
        length = f"content-length: {size}\r\n" if size or method in _WITH_BODY else ""
        return f"{method} {self._root}/{path} HTTP/1.1\r\n{lines}{length}\r\n".encode("latin-1")
