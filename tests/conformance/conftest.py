"""The real clients, each in a process of its own, against one service process.

Telemetry is off, but for one process of each client that shows that it is accepted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
OLDER = "0.15.0"
"""The last generation that speaks JSON only, and the one that the Fireworks SDK builds on."""

_KEY = "tml-conformance"  # the older client takes keys with this beginning only
_HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def service_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = [sys.executable, "-m", "fwasync.local", "--exit-with-parent", "--data-dir"]
    with subprocess.Popen(
        [*command, str(tmp_path_factory.mktemp("service"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "FWASYNC_LOCAL_API_KEY": _KEY},
    ) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["base_url"]
        process.kill()


@pytest.fixture(scope="session")
def drive(service_url: str) -> Callable[..., dict[str, Any]]:
    """Run a script with an interpreter: `drive(python, script, **environment)` gives the facts that it prints."""

    def drive(python: str, script: str = "drive_tinker.py", **environment: str) -> dict[str, Any]:
        done = subprocess.run(
            # Of the warnings that the client gives, none is ours.
            [python, "-W", "ignore", str(_HERE / script), service_url, _KEY],
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
            env={**os.environ, "TINKER_TELEMETRY": "0", **environment},
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return drive


@pytest.fixture(scope="session")
def older_python() -> str:
    """An environment of its own for the older client, made once.

    What the client needs is what the newer one needs too, so only the client itself is installed; the rest is seen
    through a path file. It lies in a folder of the checkout that git ignores by the folder's own word.
    """
    folder = ROOT / ".venv-tinker015"
    packages = str(Path(pytest.__file__).parents[1])
    stamp, wanted = folder / "made-of", f"{OLDER} {sys.version} {packages}"
    python = folder / "bin" / "python"
    if not stamp.is_file() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)], check=True)
        (folder / ".gitignore").write_text("*\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install"]
        subprocess.run([*pip, "--quiet", "--no-deps", f"tinker=={OLDER}"], check=True, timeout=300)
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "beside.pth").write_text(packages + "\n")
        stamp.write_text(wanted)
    return str(python)
