"""Rollouts on the real Ray, in an environment of its own: it is large, and nobody needs it for the rest."""

from __future__ import annotations

import os
import subprocess

import environments
import pytest

from conformance.conftest import ROOT

RAY = (
    "ray==2.60.0",
    "jsonschema==4.26.0",
    "jsonschema-specifications==2025.9.1",
    "msgpack==1.2.4",
    "referencing==0.37.0",
    "rpds-py==2026.9.1",
)
TESTS = "tests/unit/rollout/test_ray_executor.py"


@pytest.mark.timeout(1200)  # an installation from the network is among it
def test_rollouts_run_in_its_actors() -> None:
    python = environments.make(".venv-ray", *RAY)
    done = subprocess.run(
        [python, "-m", "pytest", "-p", "no:cacheprovider", "-q", TESTS],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout
