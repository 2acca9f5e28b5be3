"""The shell of a command: exit status, messages, signals. In processes of their own, because they end them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

START = """
import sys, anyio
from fwasync.cli.running import execute
from fwasync.errors import UsageError, TransportError
from fwasync.recipes.stopping import StopRequest

async def good(): print("done")
async def usage(): raise UsageError("no such thing")
async def several():
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(fail, "one"); tasks.start_soon(fail, "two")
async def fail(text): raise TransportError(text)
async def bug(): raise LookupError("oh")
async def wait():
    try:
        print("ready", flush=True)
        await anyio.sleep_forever()
    finally:
        print("tidied up", flush=True)
async def stubborn():
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(asked)
        with anyio.CancelScope(shield=True):
            try: await anyio.sleep_forever()
            finally: print("never said")
async def asked():
    try:
        print("ready", flush=True)
        await anyio.sleep_forever()
    finally:
        print("asked to end", flush=True)
async def computing():
    import time
    def compute():
        print("ready", flush=True)
        time.sleep(60)
    await anyio.to_thread.run_sync(compute, abandon_on_cancel=True)
stop = StopRequest()
async def orderly():
    print("ready", flush=True)
    while not stop.requested: await anyio.sleep(0.01)
    print(f"saved, {stop.reason}", flush=True)
    if "long" in sys.argv:
        try: await anyio.sleep_forever()
        finally: print("tidied up", flush=True)
execute(globals()[sys.argv[1]], debug="debug" in sys.argv, stop=stop if sys.argv[1] == "orderly" else None)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", START, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def test_success() -> None:
    assert finish(start("good")) == (0, "done\n", "")


def test_expected_errors() -> None:
    assert finish(start("usage")) == (2, "", "error: no such thing\n")
    status, _, err = finish(start("several"))
    assert status == 1
    assert set(err.splitlines()) <= {"error: one", "error: two"}
    assert err


def test_a_bug_shows_its_traceback_on_demand() -> None:
    status, _, err = finish(start("bug"))
    assert status == 70
    assert "bug in fwasync: LookupError: oh" in err
    assert "Traceback" not in err
    status, _, err = finish(start("bug", "debug"))
    assert status == 70
    assert "Traceback" in err
    assert "in bug" in err


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_lets_the_command_tidy_up(number: signal.Signals, word: str) -> None:
    process = start("wait")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert finish(process) == (128 + number, "tidied up\n", f"{word}\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_thread_that_computes_does_not_hold_the_process() -> None:
    process = start("computing")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, "", "interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_second_signal_ends_at_once_what_the_first_could_not() -> None:
    process = start("stubborn")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked to end\n"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, "", "")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_command_that_can_stop_at_a_good_place_is_asked_to(number: signal.Signals, word: str) -> None:
    process = start("orderly")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    status, out, err = finish(process)
    assert (status, out) == (128 + number, f"saved, {word}\n")
    assert err == f"stopping after the steps in hand; once more to stop now\n{word}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_asked_once_more_it_is_cancelled() -> None:
    process = start("orderly", "long")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saved, interrupted\n"
    process.send_signal(signal.SIGTERM)
    status, out, err = finish(process)
    assert (status, out) == (128 + signal.SIGTERM, "tidied up\n")
    assert err.endswith("terminated\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_stop_is_heard_where_nobody_hears_of_it() -> None:
    """As of `fwasync train … 2>&1 | tee log`: Ctrl-C ends the reader too."""
    process = start("orderly")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saved, interrupted\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 130


OUTPUT = """
import sys
from fwasync.cli.streams import prepare_streams
prepare_streams()
print("ready", flush=True)
sys.stdin.readline()
for stream in (sys.stdout, sys.stderr):
    stream.write("lost" * 100_000)
    stream.flush()
open(sys.argv[1], "w").write("done")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors are closed before a process begins")
@pytest.mark.parametrize("streams", ["left", "absent"])
def test_output_that_nobody_reads_ends_nothing(tmp_path: Path, streams: str) -> None:
    close = ">&- 2>&-" if streams == "absent" else ""
    command = ["sh", "-c", f'exec "$0" -c "$1" "$2" {close}', sys.executable, OUTPUT, str(tmp_path / "told")]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == ("ready\n" if streams == "left" else "")
    process.stdout.close()
    process.stderr.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "told").read_text() == "done"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")
def test_a_full_disk_is_told_once() -> None:
    code = (
        "import sys\nfrom fwasync.cli.streams import prepare_streams\nprepare_streams()\n"
        "for _ in range(3):\n"
        "    try: print('x', flush=True)\n"
        "    except OSError as error: sys.stderr.write(f'{error.strerror}\\n')\n"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert (done.returncode, done.stderr) == (0, "No space left on device\n")
