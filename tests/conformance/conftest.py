"""The real clients, each in a process of its own, against service processes.

Telemetry is off, but for one process of each client that shows that it is accepted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import environments
import pytest

ROOT = Path(__file__).parents[2]

_KEY = "tml-conformance"  # the older client takes keys with this beginning only
_FIREWORKS_KEY = "fw-conformance"  # and managed provisioning takes keys with any other
_HERE = Path(__file__).parent


@contextmanager
def serving(data_dir: Path, key: str, *options: str) -> Iterator[str]:
    """A service process; its URL."""
    command = [sys.executable, "-m", "fwasync.local", "--exit-with-parent", "--data-dir", str(data_dir)]
    with subprocess.Popen(
        [*command, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "FWASYNC_LOCAL_API_KEY": key},
    ) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["base_url"]
        process.kill()


def run_script(url: str, key: str, python: str, script: str, **environment: str) -> dict[str, Any]:
    """Run a script with an interpreter; the facts that it prints."""
    done = subprocess.run(
        # Of the warnings that the clients give, none is ours.
        [python, "-W", "ignore", str(_HERE / script), url, key],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "TINKER_TELEMETRY": "0", **environment},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., dict[str, Any]]]:
    """Drive a tinker client: `drive(python, script, **environment)`."""
    with serving(tmp_path_factory.mktemp("service"), _KEY) as url:

        def drive(python: str, script: str = "drive_tinker.py", **environment: str) -> dict[str, Any]:
            return run_script(url, _KEY, python, script, **environment)

        yield drive


@pytest.fixture(scope="session")
def drive_fireworks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Drive a Fireworks SDK: `drive_fireworks(python)`. Each has a service of its own, as it names jobs and models."""

    def drive(python: str) -> dict[str, Any]:
        # It looks every five seconds only whether weights are loaded: let that be done at once.
        with serving(tmp_path_factory.mktemp("fireworks"), _FIREWORKS_KEY, "--hot-load-s", "0") as url:
            return run_script(url, _FIREWORKS_KEY, python, "drive_fireworks.py")

    return drive


@pytest.fixture(scope="session")
def older_python() -> str:
    """For the last tinker client that speaks JSON only, and the Fireworks SDK that builds on it."""
    return environments.older()


@pytest.fixture(scope="session")
def fireworks_python() -> str:
    """For the newest Fireworks SDK."""
    return environments.fireworks()
