"""One run at a time uses a directory, whatever becomes of its process."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fwasync.errors import RunDirectoryError
from fwasync.tracking import lock as lock_module
from fwasync.tracking.lock import LOCK_FILE, DirectoryLock

HOLD = """
import sys
from pathlib import Path
from fwasync.tracking.lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_names_its_holder_and_ends_with_its_process(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunDirectoryError, match=rf"in use by process {holder.pid} on \S+, since 20\S+; let"):
            DirectoryLock(tmp_path).acquire()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    lock.release()


def test_a_holder_that_has_not_said_its_name_yet(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    (tmp_path / LOCK_FILE).write_text("")
    with pytest.raises(RunDirectoryError, match="in use by another run"):
        DirectoryLock(tmp_path).acquire()
    lock.release()
    DirectoryLock(tmp_path).acquire()


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(lock_module, "_lock", refuse)
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    lock.release()
    assert "see to it that no other run uses it" in caplog.text


def test_looking_takes_and_changes_nothing(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path / "new" / "run")
    lock.check()
    assert list(tmp_path.iterdir()) == []
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    said = (tmp_path / LOCK_FILE).read_text()
    with pytest.raises(RunDirectoryError, match=rf"in use by process {os.getpid()}"):
        DirectoryLock(tmp_path).check()
    assert (tmp_path / LOCK_FILE).read_text() == said
    lock.release()
    DirectoryLock(tmp_path).check()
    lock.acquire()
    lock.release()


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_looking_finds_that_there_can_be_no_directory(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"cannot make a run in .*: .*file is no directory"):
        DirectoryLock(tmp_path / name).check()
    (tmp_path / LOCK_FILE).mkdir()
    with pytest.raises(RunDirectoryError, match="Is a directory"):
        DirectoryLock(tmp_path).check()
