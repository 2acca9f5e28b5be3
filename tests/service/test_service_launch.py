"""`launch`: a child that ends with its `async with`, however that is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import httpx
import pytest

from fwasync.local import LocalService, LocalServiceError, launch


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie that waits for whoever adopted it."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat")
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


async def status_of(service: LocalService, key: str) -> int:
    async with httpx.AsyncClient(timeout=100, trust_env=False) as client:
        url = f"{service.base_url}/api/v1/get_server_capabilities"
        return (await client.get(url, headers={"X-API-Key": key})).status_code


async def test_it_serves_inside_and_is_gone_outside(monkeypatch):
    monkeypatch.delenv("FWASYNC_LOCAL_API_KEY", raising=False)
    async with launch() as service:
        assert await status_of(service, service.api_key) == 200
        assert await status_of(service, "tml-other") == 401
        assert service.api_key not in repr(service)
        assert service.data_dir.is_dir()
    assert not is_alive(service.pid)
    assert not service.data_dir.exists()


async def test_a_key_and_a_directory_may_be_given(tmp_path):
    async with launch(tmp_path / "d", api_key="tml-given") as service:
        assert service.api_key == "tml-given"
        assert await status_of(service, "tml-given") == 200
    assert (tmp_path / "d" / "tokenizer").is_dir()
    for file in (tmp_path / "d").rglob("*"):
        assert not file.is_file() or b"tml-given" not in file.read_bytes()


async def test_an_exception_inside_ends_the_child(tmp_path):
    with pytest.raises(KeyError):
        async with launch(tmp_path) as service:
            raise KeyError
    assert not is_alive(service.pid)


async def test_a_cancellation_inside_ends_the_child(tmp_path):
    pids: list[int] = []
    with anyio.CancelScope() as scope:
        async with launch(tmp_path) as service:
            pids.append(service.pid)
            scope.cancel()
            await anyio.sleep_forever()
    assert not is_alive(pids[0])


@pytest.mark.parametrize("steps", range(0, 12, 4))
async def test_a_cancellation_while_it_starts_leaves_no_child(tmp_path, steps):
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:

            async def cancel() -> None:
                for _ in range(steps):
                    await anyio.lowlevel.checkpoint()
                scope.cancel()

            tasks.start_soon(cancel)
            async with launch(tmp_path):
                await anyio.sleep_forever()
    assert scope.cancelled_caught
    # The directory's lock tells that nobody lives there.
    async with launch(tmp_path) as service:
        assert is_alive(service.pid)


async def test_a_failure_to_start_tells_what_it_said(tmp_path):
    async with launch(tmp_path):
        with pytest.raises(LocalServiceError, match=r"ended while it started(.|\n)*in use by another service"):
            async with launch(tmp_path):
                pass


async def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalServiceError, match="cannot be made"):
        async with launch(tmp_path / "file" / "below"):
            pass


async def test_patience_is_bounded(tmp_path):
    with pytest.raises(LocalServiceError, match="did not get ready within 0 s"):
        async with launch(tmp_path, startup_timeout=0):
            pass


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
async def test_a_child_that_does_not_listen_is_ended_all_the_same(tmp_path):
    async with launch(tmp_path) as service:
        os.kill(service.pid, signal.SIGSTOP)
    assert not is_alive(service.pid)


@pytest.mark.skipif(os.name != "posix", reason="sessions of POSIX")
async def test_the_child_has_a_session_of_its_own(tmp_path):
    async with launch(tmp_path) as service:
        assert os.getsid(service.pid) == service.pid


@pytest.mark.skipif(os.name != "posix", reason="kill")
def test_the_child_ends_with_a_parent_that_is_killed(tmp_path, deadline):
    code = (
        "import anyio, pathlib, sys\n"
        "from fwasync.local import launch\n"
        "async def main():\n"
        "    async with launch(pathlib.Path(sys.argv[1])) as service:\n"
        "        print(service.pid, flush=True)\n"
        "        await anyio.sleep_forever()\n"
        "anyio.run(main)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    for _ in deadline():
        if not is_alive(pid):
            break


def test_importing_the_package_is_light():
    code = "import sys, fwasync.local; print([m for m in ('numpy', 'uvicorn', 'starlette') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
