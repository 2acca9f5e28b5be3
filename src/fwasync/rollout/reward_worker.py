"""The process that reward functions run in: reads calls, runs them one at a time, and answers. Standard library only.

It is started by `AsyncRewardPool`. A message is its length in 8 bytes and a pickle. For each call there are two
answers: that it begins, and how it ended. What a reward function prints goes to standard error, because the pipe of the
answers is taken off the places where it would look for one. A process that it forks has neither pipe, and ends where it
comes back from the function.
"""

from __future__ import annotations

import faulthandler
import io
import os
import pickle
import runpy
import sys
import traceback
import types
from typing import Any, BinaryIO

__all__ = ("BEGUN", "HEADER_BYTES", "PROGRAM", "Program", "frame", "main")

HEADER_BYTES = 8
BEGUN = "begun"
PROGRAM = "__mp_main__"
"""What the main module of the program is called in the process."""

Program = tuple[bool, str]
"""The program: whether it was run as a module, and the module or the file."""

_GRACE_S = 2.0


def frame(message: Any) -> bytes:
    """A message as it goes through the pipe."""
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return len(body).to_bytes(HEADER_BYTES, "big") + body


class _Unpickler(pickle.Unpickler):
    """Finds what the program itself defines, by running its main module once, under another name than `__main__`."""

    def __init__(self, body: bytes, program: Program | None) -> None:
        super().__init__(io.BytesIO(body))
        self._program = program

    def find_class(self, module: str, name: str, /) -> Any:
        if module == "__main__" and self._program and PROGRAM not in sys.modules:
            is_module, where = self._program
            run = runpy.run_module if is_module else runpy.run_path
            found = types.ModuleType(PROGRAM)
            found.__dict__.update(run(where, run_name=PROGRAM))
            sys.modules["__main__"] = sys.modules[PROGRAM] = found
        return super().find_class(module, name)


def main() -> None:
    """Work until the pipe of the calls ends."""
    calls, answers = _take_pipes()
    devnull, own = os.open(os.devnull, os.O_WRONLY), os.getpid()
    while header := calls.read(HEADER_BYTES):
        program, limit, body = pickle.loads(calls.read(int.from_bytes(header, "big")))
        try:
            function, arguments = _Unpickler(body, program).load()
            _send(answers, BEGUN)
            # Should the parent die without having killed us, a call that never returns must not outlive it for long.
            # This clock ends the process from outside of the interpreter, whatever it is doing.
            faulthandler.dump_traceback_later(limit + _GRACE_S, exit=True, file=devnull)
            answer: tuple[bool, Any] = True, function(*arguments)
        except BaseException as error:
            answer = False, _portable(error)
        if os.getpid() != own:
            os._exit(0)
        faulthandler.cancel_dump_traceback_later()
        try:
            _send(answers, answer)
        except BrokenPipeError:
            return
        except Exception as error:  # the result cannot be pickled
            _send(answers, (False, _portable(error)))


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The two pipes, moved away from where the program's code, and processes that it starts, would use them."""
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    if sys.platform != "win32":  # else a process that outlives this one would hide that it is gone
        os.register_at_fork(after_in_child=lambda: [os.close(pipe.fileno()) for pipe in (calls, answers)])
    return calls, answers


def _send(answers: BinaryIO, message: Any) -> None:
    answers.write(frame(message))
    answers.flush()


def _portable(error: BaseException) -> Exception:
    """The error, if it survives the way back, with its traceback as a note; else its text."""
    text = "in the process of reward functions:\n" + "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    if not isinstance(copy, Exception):
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(text)
    return copy
