"""The process: start, stop, crash and what is left on disk."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

TOKENS = [5, 6, 7, 8]
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and permissions of POSIX")


def test_the_ready_line_is_all_it_says(start, tmp_path):
    service = start(tmp_path)
    assert service.ready["base_url"].startswith("http://127.0.0.1:")
    assert service.ready["data_dir"] == str(tmp_path)
    assert service.ready["pid"] == service.process.pid
    service.model()
    service.process.stdin.close()
    service.process.wait(60)
    assert service.process.stdout.read() == ""
    assert service.words() == ""


def test_it_ends_when_its_parent_closes_stdin(start, tmp_path):
    service = start(tmp_path)
    service.process.stdin.close()
    assert service.process.wait(60) == 0


@POSIX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_answers_who_waits(start, tmp_path, number):
    service = start(tmp_path, long_poll_s=60)
    model = service.model()
    held = service.submit("/optim_step", model.body(2, adam_params={}))
    with ThreadPoolExecutor(1) as pool:
        poll = pool.submit(service.post, "/retrieve_future", {"request_id": held})
        # Answered after the poll was sent; at worst it finds the service closing, which is an answer too.
        service.post("/session_heartbeat", {"session_id": model.session_id})
        service.process.send_signal(number)
        assert service.process.wait(60) == 0
        assert poll.exception() is not None or poll.result().status_code == 408
    assert service.words() == ""


@POSIX
def test_a_computation_does_not_hold_it_back(start, tmp_path):
    service = start(tmp_path)
    model = service.model()
    data = [service.datum([1, 2, 3] * 100)] * 200
    for seq_id in range(1, 6):
        service.submit("/forward_backward", model.batch(seq_id, TOKENS, data=data))
    service.process.terminate()
    assert service.process.wait(60) == 0


@POSIX
def test_what_was_saved_outlives_a_kill(start, tmp_path):
    service = start(tmp_path)
    model = service.model()
    model.step(1, TOKENS)
    saved = service.run("/save_weights", model.body(3, path="kept"))["path"]
    snapshot = service.run("/save_weights_for_sampler", model.body(4, path="shown"))["path"]
    service.run("/save_weights_for_sampler", model.body(5, sampling_session_seq_id=0))
    expected = model.step(6, [9, 8]), model.logprobs(TOKENS)
    service.process.kill()
    service.process.wait()

    after = start(tmp_path)
    assert after.post("/session_heartbeat", {"session_id": model.session_id}).status_code == 410
    gone = after.post("/optim_step", model.body(6, adam_params={}))
    assert gone.status_code == 404
    assert "restarted" in gone.json()["detail"]
    again = after.model()
    after.run("/load_weights", again.body(1, path=saved, optimizer=True))
    assert (again.step(2, [9, 8]), again.logprobs(TOKENS)) == expected
    body = {"session_id": after.session(), "sampling_session_seq_id": 0, "model_path": snapshot}
    assert after.post("/create_sampling_session", body).status_code == 200
    assert after.http.get("/list_checkpoints").json() == {"checkpoints": ["kept"]}
    assert not list((tmp_path / "unnamed").glob("*"))


def test_leftovers_of_a_crash_are_cleared_away(start, tmp_path):
    (tmp_path / "weights" / "m" / ".new-half").mkdir(parents=True)
    (tmp_path / "weights" / "m" / ".old-whole").mkdir()
    (tmp_path / "unnamed" / "x").mkdir(parents=True)
    service = start(tmp_path)
    assert service.http.get("/list_checkpoints").json() == {"checkpoints": ["whole"]}
    assert [entry.name for entry in (tmp_path / "weights" / "m").iterdir()] == ["whole"]
    assert not (tmp_path / "unnamed").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit")
def test_a_write_error_fails_the_operation_and_leaves_nothing(start, tmp_path):
    import resource

    service = start(tmp_path)
    model = service.model()
    kinds = (("/save_weights", "weights"), ("/save_weights_for_sampler", "sampler_weights"))
    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    for seq_id, (path, kind) in enumerate(kinds, start=1):
        failed = service.run(path, model.body(seq_id, path="full"))
        assert failed["category"] == "server"
        assert "too large" in failed["error"]
        assert not any((tmp_path / kind).glob("*/*")), kind
    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "path" in service.run("/save_weights", model.body(3, path="full"))


def test_a_port_in_use_is_one_clear_line(start, tmp_path):
    service = start(tmp_path / "a")
    port = service.ready["base_url"].rpartition(":")[2]
    other = start(tmp_path / "b", "--port", port)
    assert other.process.wait(60) == 1
    words = other.words()
    assert words.count("\n") == 1
    assert port in words
    assert "another program uses it" in words


def test_a_data_directory_has_one_service(start, tmp_path):
    service = start(tmp_path)
    other = start(tmp_path)
    assert other.process.wait(60) == 1
    assert "in use by another service" in other.words()
    service.process.kill()
    service.process.wait()
    assert start(tmp_path).ready["data_dir"] == str(tmp_path)


def test_a_directory_that_cannot_be_written_is_told(start, tmp_path):
    (tmp_path / "file").write_text("")
    service = start(tmp_path / "file" / "below")
    assert service.process.wait(60) == 1
    assert "cannot be written" in service.words()


@pytest.mark.parametrize(("host", "why"), [("0.0.0.0", "not a loopback address"), ("example.org", "use 127.0.0.1")])
def test_only_this_machine_is_served(start, tmp_path, host, why):
    service = start(tmp_path, "--host", host)
    assert service.process.wait(60) == 1
    assert why in service.words()


def test_a_key_is_made_and_kept(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "FWASYNC_LOCAL_API_KEY"}
    command = [sys.executable, "-m", "fwasync.local", "--data-dir", str(tmp_path), "--exit-with-parent"]
    for _ in range(2):
        # Its standard input is empty: it starts, and ends at once.
        done = subprocess.run(command, env=environment, capture_output=True, stdin=subprocess.DEVNULL, check=False)
        assert done.returncode == 0
        key = (tmp_path / "api_key").read_text().strip()
        assert key not in (done.stdout + done.stderr).decode()
    assert key.startswith("tml-")
    assert len(key) > 20
    if os.name == "posix":
        assert stat.S_IMODE((tmp_path / "api_key").stat().st_mode) == 0o600


def test_without_a_directory_a_temporary_one_is_used(tmp_path):
    command = [sys.executable, "-m", "fwasync.local", "--exit-with-parent"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, stdin=subprocess.DEVNULL, check=True)
    assert str(tmp_path) in done.stdout.decode()
    assert not list(tmp_path.iterdir())


def test_a_silent_session_is_ended(start, tmp_path, deadline):
    service = start(tmp_path, "--session-timeout-s", "0.2")
    for _ in deadline():  # until there is a model in time: this test may be slower than the session is patient
        session_id = service.session()
        body = {"session_id": session_id, "model_seq_id": 0, "base_model": service.model_name}
        created = service.post("/create_model", body)
        if created.status_code == 200:
            break
    service.result(created.json()["request_id"])
    for _ in deadline():
        response = service.post("/get_info", {"model_id": created.json()["model_id"]})
        if response.status_code == 404:
            break
    assert service.post("/session_heartbeat", {"session_id": session_id}).status_code == 410
