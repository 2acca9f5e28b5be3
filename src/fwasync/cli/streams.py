"""Where commands print: a reader that goes away (`| head`, a `tee` that got the same Ctrl-C) never ends their work."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from typing_extensions import Buffer  # of collections.abc since Python 3.12

__all__ = ("prepare_streams", "write_now")


def prepare_streams() -> None:
    """Make the standard output and the standard error of this process ones that can be written to whatever happens.

    What nobody reads any more is dropped, and a character that a terminal cannot show becomes a question mark.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the process was started without
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # until the process ends
        elif stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _unbreakable(cast("io.TextIOWrapper[Any]", stream)))


def write_now(stream: TextIO, text: bytes) -> None:
    """Write behind the back of a stream, as a signal handler has to; what cannot be written is dropped."""
    try:
        os.write(stream.fileno(), text)
    except (OSError, ValueError):
        return


def _unbreakable(stream: io.TextIOWrapper[Any]) -> TextIO:
    stream.reconfigure(errors="replace")
    if stream.isatty():  # it has no reader that goes away
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_Unbreakable(stream.fileno(), "wb", closefd=False)),
        encoding=stream.encoding,
        errors="replace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Unbreakable(io.FileIO):
    """A file that fails once where it cannot be written, and not at all where nobody reads it."""

    has_failed = False

    def write(self, b: Buffer, /) -> int | None:
        try:
            return super().write(b)
        except OSError as error:
            if not isinstance(error, BrokenPipeError) and not self.has_failed:
                self.has_failed = True
                raise
            return memoryview(b).nbytes
