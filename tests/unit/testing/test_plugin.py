"""The pytest plugin in a pytest of its own, with tests of every colour."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

PLUGIN = "fwasync.testing.plugin"
TESTS = """
import http.client
from urllib.parse import urlsplit

import anyio
import pytest

from fwasync.testing import Fault, FaultPlan, ScriptedService, Status

SEEN = []


def status(service: ScriptedService) -> int:
    connection = http.client.HTTPConnection(urlsplit(service.base_url).netloc, timeout=100)
    headers = {"X-API-Key": service.api_key}
    connection.request("GET", "/api/v1/get_server_capabilities", headers=headers)
    answer = connection.getresponse().status
    connection.close()
    return answer


def use(service: ScriptedService) -> None:
    service.set_faults(FaultPlan([Fault(Status(503), nth=2)]))
    assert [status(service) for _ in range(3)] == [200, 503, 200]
    assert service.fired().fired == [1]
    assert service.effects() == {}
    assert service.release() == 0
    SEEN.append(str(service.data_dir))


def test_sync(fwasync_service):
    use(fwasync_service)
    assert fwasync_service.base_url in repr(fwasync_service)
    assert fwasync_service.api_key not in repr(fwasync_service)


@pytest.mark.asyncio
async def test_asyncio(fwasync_service):
    use(fwasync_service)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_anyio(fwasync_service):
    use(fwasync_service)
    url = fwasync_service.base_url
    fwasync_service.kill()
    fwasync_service.restart()
    assert fwasync_service.base_url == url
    assert fwasync_service.fired().fired == []


def test_each_had_its_own_directory():
    assert len(SEEN) == len(set(SEEN)) == 3
"""


def test_the_fixture_serves_tests_of_every_colour(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    # A plugin that pytest finds by itself cannot be named as well.
    found = any(entry.value == PLUGIN for entry in entry_points(group="pytest11"))
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", str(tmp_path)]
    command += ["-o", "asyncio_default_fixture_loop_scope=function"]
    command += [] if found else ["-p", PLUGIN]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


def test_the_plugin_loads_nothing_heavy() -> None:
    code = (
        "import sys, pytest; before = set(sys.modules); import fwasync.testing.plugin;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; print(sorted(new))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    heavy = {"aiohttp", "anyio", "asyncio", "httpx", "msgspec", "numpy", "tinker", "torch", "uvicorn"}
    assert done.stdout.strip()
    assert not heavy & set(eval(done.stdout))
