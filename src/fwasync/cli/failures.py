"""How a command ends badly: one clear line for what can be expected, and an exit status to tell cases apart.

| status | meaning |
|---|---|
| 1 | it failed: the network, the service, the disk |
| 2 | it was asked for wrongly: options, data, keys |
| 70 | a bug of ours |
| 130, 143 | interrupted (Ctrl-C), terminated |
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator

from fwasync.errors import FwasyncError, UsageError

__all__ = ("BUG", "CommandError", "describe", "exit_status", "tell")

FAILED, USAGE, BUG = 1, 2, 70


class CommandError(FwasyncError):
    """A command cannot do what it was asked for."""


def exit_status(error: BaseException) -> int:
    """The exit status of a command that ended with an error; a bug outweighs everything else."""
    statuses = [_status(leaf) for leaf in _leaves(error)]
    return BUG if BUG in statuses else statuses[0]


def describe(error: BaseException) -> str:
    """What to tell the user: an `error:` for each thing that went wrong, with its notes."""
    lines: list[str] = []
    for leaf in _leaves(error):
        if _status(leaf) == BUG:
            what = f"{type(leaf).__name__}: {leaf}".rstrip(": ")
            lines.append(f"error: this is a bug in fwasync: {what}")
            lines.append("  run it again as `fwasync --debug …` to see where, and please report it")
        else:
            lines.append(f"error: {leaf}")
        lines += [f"  note: {note}" for note in getattr(leaf, "__notes__", ())]
    return "\n".join(dict.fromkeys(lines))


def tell(error: BaseException, *, debug: bool) -> int:
    """Tell the user on the standard error, with `debug` where it happened too; returns the exit status."""
    if debug:
        traceback.print_exception(error)
    sys.stderr.write(describe(error) + "\n")
    return exit_status(error)


def _status(error: BaseException) -> int:
    if isinstance(error, UsageError):
        return USAGE
    return FAILED if isinstance(error, FwasyncError | OSError) else BUG


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors inside an exception group, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
            yield from _leaves(inner)  # pyright: ignore[reportUnknownArgumentType]  # the group's type is open
    else:
        yield error
