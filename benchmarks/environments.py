"""Environments of their own for what fwasync is compared with: `python benchmarks/environments.py [NAME …]`.

Each is made once, in a folder of the checkout, and made anew when what belongs in it has changed.
"""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make(folder_name: str, *what: str) -> str:
    """The interpreter of an environment of its own, made once of what `pip install` is told, by whoever comes first.

    Beside that it sees what this interpreter has, through a path file: what it needs and is there is not installed
    again. It lies in a folder of the checkout that git ignores by the folder's own word.
    """
    folder = ROOT / folder_name
    packages = str(Path(sysconfig.get_path("purelib")).resolve())
    stamp, wanted = folder / "made-of", "\n".join([*what, sys.version, packages])
    python = folder / "bin" / "python"
    with _alone_in(folder):
        if not stamp.is_file() or stamp.read_text() != wanted:
            subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)], check=True)
            (folder / ".gitignore").write_text("*\n")
            (own,) = folder.glob("lib/python*/site-packages")
            (own / "beside.pth").write_text(packages + "\n")
            pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install"]
            subprocess.run([*pip, "--quiet", *what], check=True, timeout=500)
            stamp.write_text(wanted)
    return str(python)


@contextmanager
def _alone_in(folder: Path) -> Generator[None]:
    """Keep other processes that make environments out of a folder; they wait."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def tinker() -> str:
    """The newest tinker that this project is tested with."""
    (pinned,) = re.findall(r"^tinker==.*$", (ROOT / "constraints.txt").read_text(), re.M)
    return make(".venv-bench-tinker", "--ignore-installed", "--no-deps", pinned)


def older() -> str:
    """The last tinker that speaks JSON only; it needs what is here, or does not use it for this."""
    return make(".venv-older", "--no-deps", "tinker==0.15.0", "fireworks-ai==1.0.0a53")


def fireworks() -> str:
    """The newest Fireworks SDK that this project is tested with, and what it needs in other versions than ours."""
    return make(".venv-fireworks", *(ROOT / "tests/conformance/fireworks.txt").read_text().split())


ENVIRONMENTS = {"tinker": tinker, "older": older, "fireworks": fireworks}


if __name__ == "__main__":
    for name in sys.argv[1:] or ENVIRONMENTS:
        print(ENVIRONMENTS[name]())
