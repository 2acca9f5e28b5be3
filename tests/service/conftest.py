"""The real service process, driven over loopback by a plain HTTP client."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fwasync.cli import main

MODEL = "fwasync/qwen3-tiny"
KEY = "tml-test-key"
CHAT = {"messages": [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]}
SHOUTING = """\
from dataclasses import replace

class Shouting:
    def __init__(self, tokenizer):
        self.tokenizer, self.supervised = tokenizer, tokenizer.supervised

    def render(self, messages, **options):
        loud = [replace(message, content=f"{message.content}!") for message in messages]
        return self.tokenizer.render(loud, **options)
"""
"""A renderer that writes prompts differently than the chat template."""


def datum(tokens: list[int], *, weight: float = 1.0) -> dict[str, Any]:
    """Predict each next token, then 0."""
    targets = [*tokens[1:], 0]
    return {
        "model_input": {"chunks": [{"tokens": tokens}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": targets, "dtype": "int64", "shape": [len(targets)]},
            "weights": {"data": [weight] * len(targets), "dtype": "float32"},
        },
    }


class Service:
    """A service process and a client of it."""

    model_name = MODEL
    key = KEY
    datum = staticmethod(datum)

    def __init__(self, data_dir: Path, *options: str, long_poll_s: float = 0.3) -> None:
        command = [sys.executable, "-m", "fwasync.local", "--exit-with-parent", "--data-dir", str(data_dir)]
        self.process = subprocess.Popen(
            [*command, "--long-poll-s", str(long_poll_s), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "FWASYNC_LOCAL_API_KEY": KEY},
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        self.ready: dict[str, Any] = json.loads(self.said) if self.said else {}
        self.data_dir = data_dir
        self.http = httpx.Client(
            base_url=self.ready.get("base_url", "http://unused") + "/api/v1",
            headers={"X-API-Key": KEY},
            timeout=100,
            trust_env=False,
        )

    def post(self, path: str, body: object) -> httpx.Response:
        return self.http.post(path, json=body)

    def submit(self, path: str, body: object) -> str:
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()["request_id"]

    def result(self, request_id: str) -> dict[str, Any]:
        while True:
            response = self.post("/retrieve_future", {"request_id": request_id})
            if response.status_code != 408:
                assert response.status_code == 200, response.text
                return response.json()

    def run(self, path: str, body: object) -> dict[str, Any]:
        return self.result(self.submit(path, body))

    def session(self) -> str:
        response = self.post("/create_session", {"tags": [], "sdk_version": "0"})
        return response.json()["session_id"]

    def model(self, **fields: Any) -> Model:
        body = {"session_id": self.session(), "model_seq_id": 0, "base_model": MODEL, **fields}
        body.setdefault("lora_config", {"rank": 4, "seed": 1})
        return Model(self, self.run("/create_model", body)["model_id"])

    def words(self) -> str:
        """What it said on stderr, once it has ended."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def close(self) -> int:
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return self.process.wait()


class Model:
    """The bodies of one model's operations."""

    def __init__(self, service: Service, model_id: str) -> None:
        self.service = service
        self.id = model_id
        self.session_id = model_id.partition(":")[0]

    def batch(self, seq_id: int | None, tokens: list[int], *, backward: bool = True, **fields: Any) -> dict[str, Any]:
        key = "forward_backward_input" if backward else "forward_input"
        batch = {"data": [datum(tokens)], "loss_fn": "cross_entropy", **fields}
        return self.body(seq_id, **{key: batch})

    def body(self, seq_id: int | None = None, **fields: Any) -> dict[str, Any]:
        number = {} if seq_id is None else {"seq_id": seq_id}
        return {"model_id": self.id, **number, **fields}

    def logprobs(self, tokens: list[int]) -> list[float]:
        out = self.service.run("/forward", self.batch(None, tokens, backward=False))
        return out["loss_fn_outputs"][0]["logprobs"]["data"]

    def step(self, seq_id: int, tokens: list[int]) -> float:
        """Two operations: forward_backward and optim_step. Returns the norm of the gradient."""
        self.service.run("/forward_backward", self.batch(seq_id, tokens))
        out = self.service.run("/optim_step", self.body(seq_id + 1, adam_params={"learning_rate": 1e-2}))
        return out["metrics"]["grad_norm"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory):
    """One process for all tests of a module."""
    running = Service(tmp_path_factory.mktemp("service"))
    yield running
    running.close()


@pytest.fixture
def start():
    """Start processes of one's own: `start(data_dir, *options)`."""
    started: list[Service] = []

    def start(data_dir: Path, *options: str, **more: Any) -> Service:
        started.append(Service(data_dir, *options, **more))
        return started[-1]

    yield start
    for running in started:
        running.close()


@pytest.fixture
def deadline():
    """An iterator that fails the test when something takes far too long to happen."""

    def rounds():
        end = time.monotonic() + 100
        while time.monotonic() < end:
            yield
        pytest.fail("it did not happen")

    return rounds


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory):
    """A running control plane."""
    from service.control_client import start_control  # which needs this module

    running = start_control(tmp_path_factory.mktemp("control"))
    yield running
    running.close()
    running.service.close()


@pytest.fixture
def begin(tmp_path):
    """Start control planes on one data directory, one after another: `begin(startup_s=..)`."""
    from service.control_client import start_control

    started = []

    def begin(**times):
        started.append(start_control(tmp_path, **times))
        return started[-1]

    yield begin
    for running in started:
        running.close()
        running.service.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of eight chats."""
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(CHAT)}\n" * 8)
    return path


@pytest.fixture
def train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """`fwasync train`, called in this process: exit status, output, errors."""
    for name in [name for name in os.environ if name.startswith(("FWASYNC_", "TINKER_", "FIREWORKS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    # Settings may name code in this directory: it leaves nothing there, and is forgotten again.
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def train(*arguments: object, recipe: str = "sft", **environment: str) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["fwasync", "train", recipe, *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    yield train
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def refused(train: Callable[..., tuple[int, str, str]], tmp_path: Path) -> Callable[..., None]:
    """A command that must fail with one clear line, and leave nothing."""

    def refused(*arguments: object, status: int, told: str, **more: str) -> None:
        before = set(tmp_path.iterdir())
        found, out, err = train(*arguments, **more)
        assert found == status, err
        assert re.search(told, err), err
        assert err.startswith("error: ")
        assert err.count("error: ") == 1
        assert "Traceback" not in err
        assert out == ""
        assert {path for path in tmp_path.rglob("*") if path.is_file()} <= before

    return refused
