"""`fwasync doctor`, on a service that is well, and on everything that is not."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from fwasync.cli import doctor
from fwasync.cli.doctor import Patient, run_doctor
from fwasync.cli.failures import CommandError, exit_status
from service.conftest import SHOUTING

ROW = '{"messages": [{"role": "user", "content": "hey"}, {"role": "assistant", "content": "you"}]}\n'

Verdicts = dict[str, tuple[str, str]]


@pytest.fixture(autouse=True)
def nothing_is_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("FWASYNC_", "TINKER_", "FIREWORKS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def found(capsys: pytest.CaptureFixture[str]) -> Callable[[], Verdicts]:
    def found() -> Verdicts:
        lines = re.findall(r"^(ok|FAIL|skip) +(\w[\w ]*?)  +(.*)$", capsys.readouterr().out, re.M)
        return {what: (verdict, told) for verdict, what, told in lines}

    return found


async def test_all_is_well(service, found: Callable[[], Verdicts], tmp_path: Path) -> None:
    from fwasync.local.tokenizer import save_tokenizer

    save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text(ROW)
    (tmp_path / "mine.py").write_text(SHOUTING)
    here = Patient(
        service.ready["base_url"],
        service.key,
        service.model_name,
        tokenizer=str(tmp_path / "tokenizer"),
        dataset="rows.jsonl",
    )
    await run_doctor(here)
    verdicts = found()
    assert {verdict for verdict, _ in verdicts.values()} == {"ok"}
    assert list(verdicts) == [
        "installation",
        "disk",
        "key",
        "trainer API",
        "wire",
        "latency",
        "account",
        "tokenizer",
        "rendering",
        "sample",
    ]
    assert verdicts["rendering"][1] == "rows.jsonl: 1 compared, with the chat template's tokens"
    assert verdicts["wire"][1] == "batches are taken as json and protobuf"
    assert re.fullmatch(r"fwasync/qwen3-tiny gave token \[\d+\]", verdicts["sample"][1])
    assert service.key not in repr((verdicts, here))
    with pytest.raises(CommandError, match="1 of these"):
        await run_doctor(replace(here, renderer="mine.py:Shouting"))
    verdict, told = found()["rendering"]
    assert verdict == "FAIL"
    assert re.fullmatch(
        r"rows\.jsonl, line 1, the prompt of messages\[1\]: the renderer and the chat template differ; they part at "
        r"token \d+, after .* renderer \[.*\] '!.* template \[.*\] .*",
        told,
    )


async def test_without_a_service_one_on_this_machine_is_looked_at(found: Callable[[], Verdicts]) -> None:
    await run_doctor(Patient())
    verdicts = found()
    assert verdicts["sample"][0] == "ok"
    assert verdicts["tokenizer"][0] == "skip"


@pytest.mark.parametrize(
    ("patient", "what", "told"),
    [
        ({"api_key": "wrong"}, "trainer API", "401"),
        ({"api_key": None}, "key", "no API key for"),
        ({"base_model": "nope"}, "trainer API", "does not have nope; it has: fwasync/qwen3-tiny"),
        ({"tokenizer": "/nowhere/at/all"}, "tokenizer", "/nowhere/at/all"),
        ({"deployment": "none-such"}, "sample", "none-such"),
    ],
    ids=["key", "no key", "model", "tokenizer", "deployment"],
)
async def test_what_is_not_well(
    service, found: Callable[[], Verdicts], patient: dict[str, str | None], what: str, told: str
) -> None:
    given = {"base_url": service.ready["base_url"], "api_key": service.key, **patient}
    with pytest.raises(CommandError, match=r"of these (is|are) not well") as caught:
        await run_doctor(Patient(**given))  # type: ignore[arg-type]
    assert exit_status(caught.value) == 1
    verdict, said = found()[what]
    assert verdict == "FAIL"
    assert told in said


async def test_nothing_answers(found: Callable[[], Verdicts]) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"  # held, so that nobody else takes it
        with pytest.raises(CommandError):
            await run_doctor(Patient(url, "k"))
    verdict, told = found()["trainer API"]
    assert verdict == "FAIL"
    assert f"nothing answers at {url}" in told


class Silent(BaseHTTPRequestHandler):
    """A service that says nothing but 404."""

    def do_POST(self) -> None:
        self.send_response(404)
        self.send_header("content-length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None: ...


class JsonOnly(Silent):
    """A service that takes every batch for JSON, and fails over what is none."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if not self.path.endswith("/forward_backward"):
            super().do_POST()
            return
        try:
            body.decode()
        except UnicodeDecodeError:
            self.send_response(500)
        else:
            self.send_response(422)
        self.send_header("content-length", "0")
        self.end_headers()


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


async def test_a_service_that_reads_json_only() -> None:
    with serving(JsonOnly) as url:
        checkup = doctor._Checkup(Patient(url, "k"), url, "k")
        assert await checkup.wire() == "batches are taken as json"


async def test_a_server_that_is_something_else(found: Callable[[], Verdicts]) -> None:
    with serving(Silent) as silent, pytest.raises(CommandError, match="2 of these"):
        await run_doctor(Patient(silent, "k"))
    verdicts = found()
    assert "is not a trainer service" in verdicts["trainer API"][1]
    assert verdicts["account"][0] == "FAIL"


async def test_a_disk_that_is_nearly_full(
    found: Callable[[], Verdicts], monkeypatch: pytest.MonkeyPatch, service
) -> None:
    usage = shutil._ntuple_diskusage(10**12, 10**12, 5 * 10**6)  # type: ignore[attr-defined]
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CommandError, match="1 of these"):
        await run_doctor(Patient(service.ready["base_url"], service.key))
    assert "has 5 MB left" in found()["disk"][1]


def test_lines_fit_into_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "a session was opened and closed; models: fwasync/qwen3-tiny, fwasync/qwen3-small"
    assert doctor._fitted("ok    trainer API     ", told) == f"ok    trainer API     {told}"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    lines = doctor._fitted("ok    trainer API     ", told).splitlines()
    assert lines[0] == "ok    trainer API     a session was opened and closed; models:"
    assert lines[1] == "                      fwasync/qwen3-tiny, fwasync/qwen3-small"
