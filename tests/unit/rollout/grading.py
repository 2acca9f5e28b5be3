"""Reward functions, good and bad, as a process imports them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import fwasync.errors


def length(text: str) -> float:
    return float(len(text))


def process_id(_: int = 0) -> int:
    return os.getpid()


def for_ever() -> NoReturn:
    while True:
        pass


def writes_and_hangs(path: str) -> NoReturn:
    """Tells its process, and that of a child which hangs too."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    draft = Path(path + ".new")
    draft.write_text(f"{os.getpid()} {child.pid}")
    draft.rename(path)
    while True:
        time.sleep(1000)


def dies() -> NoReturn:
    os._exit(3)


def killed() -> NoReturn:
    os.kill(os.getpid(), 9)
    raise AssertionError


def fails(text: str) -> NoReturn:
    raise ValueError(f"cannot grade {text}")


class Stubborn(Exception):
    """Cannot be made from its arguments."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fails_stubbornly() -> NoReturn:
    raise Stubborn(1, 2)


def gives_up() -> NoReturn:
    sys.exit("enough")


def lost() -> NoReturn:
    raise fwasync.errors.RecoverableRolloutError("the judge is away")


def unsendable() -> object:
    return threading.Lock()


def shouts() -> float:
    """Prints to every place that could be taken for a pipe of answers."""
    print("hello")
    os.write(1, b"raw bytes")
    subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
    return 1.0 if sys.stdin.read() == "" else 0.0


def forks_and_returns(path: str) -> float:
    """Comes back twice, in a child too, which tells its number and is waited for."""
    child = os.fork()
    if child == 0:
        return 666.0
    Path(path).write_text(str(child))
    os.waitpid(child, 0)
    return 1.0


def forks_and_dies(path: str) -> NoReturn:
    """Leaves a child behind."""
    child = os.fork()
    if child:
        Path(path).write_text(str(child))
        os._exit(3)
    while True:
        time.sleep(1000)


def big(size: int) -> bytes:
    return b"x" * size
