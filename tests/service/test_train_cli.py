"""`fwasync train sft`, whole: a run, a dry run, and one clear line for everything that can be wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Self

import anyio
import pytest
from pydantic import BaseModel, ConfigDict

from fwasync import AsyncServiceClient, InfraConfig, WandBConfig, flush_timing, timer
from fwasync.checkpoints.ledger import CheckpointEntry, CheckpointLedger
from fwasync.cli import dry_run
from fwasync.errors import ServiceUnreachableError
from fwasync.recipes.stopping import StopRequest
from fwasync.recipes.trainers import Where
from fwasync.tracking.lock import DirectoryLock
from fwasync.tracking.run import Run
from service.conftest import CHAT

TINY = ("--base-model", "fwasync/qwen3-tiny")


Train = Callable[..., tuple[int, str, str]]


def test_a_run_on_a_local_service(train: Train, data: Path, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 600}, {"role": "assistant", "content": "y"}]}
    data.write_text(data.read_text() + json.dumps(long) + "\n")
    options = ("--steps", 6, "--batch-size", 4, "--lora-rank", 4, "--learning-rate", "1e-2", "--save-every", 3)
    status, out, err = train("--data", data, *options)
    assert (status, err) == (0, "")
    run = tmp_path / "runs" / "sft-001"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["train/ce_loss"] < records[0]["train/ce_loss"]
    first, last = [json.loads(line) for line in (run / "checkpoints.jsonl").read_text().splitlines()]
    assert (first["step"], last["step"], last["data_consumed"]) == (3, 6, 27)
    assert last["state_path"] in out
    assert last["sampler_path"] in out
    assert re.search(r"1 of 9 rows are left out: line 9: 6\d\d tokens are more than 512", out)
    assert "fwasync serve --data-dir runs/sft-001/service" in out
    assert "</html>" in (run / "report.html").read_text()


def test_a_run_on_a_service_of_ones_own(train: Train, service, data: Path, tmp_path: Path) -> None:
    url = service.ready["base_url"]
    options = ("--data", data, "--steps", 2, "--batch-size", 2, "--lora-rank", 0, "--log-path", "run", *TINY)
    status, out, err = train(*options, FWASYNC_BASE_URL=url, FWASYNC_API_KEY=service.key)
    assert (status, err) == (0, "")
    assert not (tmp_path / "run" / "service").exists()
    assert service.key not in (tmp_path / "run" / "config.json").read_text()
    assert "Cross-entropy loss" in out
    status, again, err = train(*options, "--steps", 3, "--base-url", url, "--api-key", service.key)
    assert (status, err) == (0, "")
    assert "begun with another configuration: max_steps 2 → 3" in again
    assert "2 steps and 4 rows are done" in again
    assert "in 3 steps" in again


GROUPS = ("reward=rewards.py:grade", "prompt_groups_per_step=4", "max_completion_tokens=4", "kl_beta=0")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("recipe", "options", "shown"),
    [("sft", ("--batch-size=4",), "ce loss"), ("rl", GROUPS, "reward"), ("async_rl", GROUPS, "reward")],
)
def test_a_run_that_is_interrupted_saves_and_goes_on(
    recipe: str, options: tuple[str, ...], shown: str, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "rewards.py").write_text("import random\n\ndef grade(text, row):\n    return random.random()\n")

    def command(epochs: int) -> subprocess.Popen[str]:
        settings = (f"dataset={data}", f"epochs={epochs}", "lora_rank=4", "log_path=run", *options)
        code = "import sys; sys.modules.update(torch=None, transformers=None); from fwasync.cli import main; main()"
        return subprocess.Popen(
            [sys.executable, "-c", code, "train", recipe, *settings],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "FWASYNC_BASE_URL": ""},
        )

    process = command(100_000)
    try:
        assert process.stdout is not None
        while not re.match(rf"{recipe} +\d.*{shown}", process.stdout.readline()):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert err == "stopping after the steps in hand; once more to stop now\ninterrupted\n"
    told = re.search(r"interrupted: step (\d+) of 200000 is done\. The same log_path goes on from there\.", out)
    assert told
    done = int(told[1])
    out, err = command((done + 4) // 2).communicate(timeout=200)
    assert err == ""
    assert f"{done} steps and {done * 4} rows are done" in out
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, (done + 4) // 2 * 2 + 1))


def test_a_dry_run_starts_and_leaves_nothing(train: Train, data: Path, tmp_path: Path) -> None:
    options = ("--data", data, "--dry-run", "--epochs", 2, "--batch-size", 3, "--save-every", 2)
    status, out, err = train(*options)
    assert (status, err) == (0, "")
    assert re.search(r"lora_rank +0\n", out)
    assert "8 rows" in out
    assert "tokens: 96, of which 40 are trained on" in out
    assert "6 steps of 3 rows: 2.00 passes" in out
    assert "3 checkpoint(s)" in out
    assert list(tmp_path.iterdir()) == [data]


def test_a_dry_run_says_what_its_directory_holds(train: Train, data: Path, tmp_path: Path) -> None:
    options = ("--data", data, "--dry-run", "--log-path", "run")
    entry = CheckpointEntry("step-2", 2, 6, state_path="tinker://m/weights/step-2")
    anyio.run(CheckpointLedger(tmp_path / "run").append, entry)
    status, out, err = train(*options)
    assert (status, err) == (0, "")
    assert "going on from tinker://m/weights/step-2: 2 steps and 6 rows are done" in out
    lock = DirectoryLock(tmp_path / "run")
    lock.acquire()
    status, out, err = train(*options)
    lock.release()
    assert (status, out) == (1, "")
    assert err.startswith(f"error: run is in use by process {os.getpid()} on ")


def test_a_dry_run_asks_a_service_what_it_has(train: Train, service, data: Path, tmp_path: Path) -> None:
    where = ("--base-url", service.ready["base_url"], "--api-key", service.key)
    status, out, err = train("--data", data, "--dry-run", *TINY, *where)
    assert (status, err) == (0, "")
    assert "tokens: not known without the model's tokenizer" in out
    status, _, err = train("--data", data, "--dry-run", "--base-model", "nope", *where)
    assert status == 1
    assert "unknown base_model 'nope'; the service at" in err
    status, _, err = train("--data", data, "--dry-run", *TINY, *where[:3], "wrong")
    assert status == 1
    assert "401" in err
    assert list(tmp_path.iterdir()) == [data]


def test_a_dry_run_says_when_it_could_not_ask(train: Train, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable(AsyncServiceClient):
        async def __aenter__(self) -> Self:
            raise ServiceUnreachableError("nothing answers")

    monkeypatch.setattr(dry_run, "AsyncServiceClient", Unreachable)
    where = ("--base-url", "http://127.0.0.1:9", "--api-key", "k")
    status, out, err = train("--data", data, "--dry-run", *where)
    assert (status, err) == (0, "")
    assert "the service was not asked: nothing answers" in out
    assert "3 steps of 32 rows: 3.00 passes" in out


# -- any recipe, from a file ---------------------------------------------------------------------------------


class Toy(BaseModel):
    """Settings of a recipe that this test has made up."""

    model_config = ConfigDict(extra="forbid")

    log_path: Path
    base_model: str = "accounts/fireworks/models/qwen3-8b"
    beta: float = 0.1
    wandb: WandBConfig = WandBConfig(project="toys")
    infra: InfraConfig = InfraConfig()


async def train_toy(config: Toy, *, where: Where, run: Run, stop: StopRequest) -> None:
    service = where.service
    assert service is not None
    assert stop.reason is None
    run.begin("toy", 2)
    for step in (1, 2):
        with timer("ask"):
            await service.get_server_capabilities()
        run.log("toy", step, {"train/dpo_loss": config.beta / step, "train/margin": 3.0 * step, **flush_timing()})
    await CheckpointLedger(run.log_path).append(CheckpointEntry("step-2", 2, state_path="state", sampler_path="snap"))


async def dry_run_toy(config: Toy, *, tokenizer: object, max_seq_len: int | None) -> list[str]:
    return [f"7 pairs, {'with' if tokenizer else 'without'} a tokenizer, of at most {max_seq_len} tokens"]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, train: Train) -> Train:
    module = ModuleType("fwasync.recipes.dpo")
    module.__spec__ = ModuleSpec("fwasync.recipes.dpo", None)
    vars(module).update(Config=Toy, train=train_toy, dry_run=dry_run_toy)
    monkeypatch.setitem(sys.modules, "fwasync.recipes.dpo", module)

    def run(*arguments: object, **environment: str) -> tuple[int, str, str]:
        return train(*arguments, recipe="dpo", **environment)

    return run


def test_a_recipe_that_nobody_knows_gets_its_output_from_its_metrics(toy: Train, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('log_path = "a run"\nbeta = 0.5\n[infra]\nregion = "EU"\n')
    status, out, err = toy("--config", "run.toml", "beta=0.25", "--infra.trainer-timeout-s", 7)
    assert (status, err) == (0, "")
    assert "dpo a run: toy, 2 steps" in out
    assert "DPO loss 0.250 → 0.125 in 2 steps (toy)." in out
    assert "Margin of the chosen answer 3 → 6" in out
    assert "Checkpoint, to go on from: state" in out
    assert "Snapshot, to sample from:  snap" in out
    config = json.loads((tmp_path / "a run" / "config.json").read_text())
    assert (config["base_model"], config["beta"]) == ("fwasync/qwen3-tiny", 0.25)  # a local service has that one
    assert (config["infra"]["region"], config["infra"]["trainer_timeout_s"]) == ("EU", 7)
    lines = [json.loads(line) for line in (tmp_path / "a run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["perf/ask_time"] >= 0 for line in lines] == [True, True]
    page = (tmp_path / "a run" / "report.html").read_text()
    assert "infra.region" in page
    assert "perf/ask_time" in page


def test_its_dry_run_says_what_would_be_there(toy: Train, tmp_path: Path) -> None:
    status, out, err = toy("--dry-run", "wandb.entity=team")
    assert (status, err) == (0, "")
    assert "wandb.project" in out
    assert "7 pairs, with a tokenizer, of at most 512 tokens" in out
    assert "a run at W&B: team/toys" in out
    assert "runs/dpo-… with config.json" in out
    shape = "accounts/fireworks/trainingShapes/x"
    status, out, err = toy("--dry-run", f"infra.training_shape_id={shape}", "base_model=accounts/a/models/b")
    assert (status, err) == (0, "")
    assert f"a trainer job on {shape}, removed in the end" in out
    assert "7 pairs, without a tokenizer" in out
    assert list(tmp_path.iterdir()) == []


def test_its_run_is_at_wandb_if_an_entity_is_set(toy: Train, tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text("raise ImportError")
    status, out, _ = toy("wandb.entity=team", PYTHONPATH=str(tmp_path))
    assert status == 0
    assert out.count("wandb is not installed, so nothing is logged to W&B: pip install 'fwasync[wandb]'") == 1
    assert (tmp_path / "runs" / "dpo-001" / "wandb.json").exists()


def test_a_template_of_its_settings(toy: Train) -> None:
    status, out, _ = toy("--template")
    assert status == 0
    assert "# beta = 0.1\n" in out


def test_a_wrong_name_or_file_is_one_line(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("data = 'x'\n\nbatch_sise = 3\n")
    refused("--config", "run.toml", status=2, told=r"run\.toml:3: there is no setting 'batch_sise'; .*'batch_size'")
    (tmp_path / "run.toml").write_text("batch_size = 3,\n")
    refused("--config", "run.toml", status=2, told=r"run\.toml, line 1, column 15: ")
    refused("--config", "nope.toml", status=2, told=r"nope\.toml: there is no such file")


def test_what_is_no_recipe(train: Train) -> None:
    status, _, err = train(recipe="stf")
    assert status == 2
    assert "there is no recipe 'stf'; did you mean 'sft'?" in err


# -- one clear line ------------------------------------------------------------------------------------------


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield int(listener.getsockname()[1])  # held, so that nobody else takes it


class Shop(BaseHTTPRequestHandler):
    """A web server that is no trainer."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        body = b"<html><body>Welcome to our shop</body></html>"
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def shop() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Shop) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


Refused = Callable[..., None]


def test_a_missing_key(refused: Refused, data: Path, closed_port: int) -> None:
    told = "no API key for .*FWASYNC_API_KEY"
    refused("--data", data, "--base-url", f"http://127.0.0.1:{closed_port}", status=2, told=told)


def test_a_key_without_a_service(refused: Refused, data: Path) -> None:
    refused("--data", data, "--api-key", "k", status=2, told="--base-url")


def test_a_wrong_key(refused: Refused, service, data: Path) -> None:
    where = ("--base-url", service.ready["base_url"], "--api-key", "wrong")
    refused("--data", data, *where, status=1, told="401")


def test_a_url_that_is_none(refused: Refused, data: Path) -> None:
    refused("--data", data, "--base-url", "nonsense", "--api-key", "k", status=2, told="base_url must look like")


def test_a_wrong_url(refused: Refused, data: Path, closed_port: int) -> None:
    url = f"http://127.0.0.1:{closed_port}"
    refused("--data", data, "--base-url", url, "--api-key", "k", status=1, told=f"nothing answers at {url}")


def test_a_server_that_is_not_a_trainer(refused: Refused, data: Path, shop: str) -> None:
    refused("--data", data, "--base-url", shop, "--api-key", "k", status=1, told="is not a trainer service")


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--base-model", "nope"), "unknown base_model 'nope'.*fwasync/qwen3-tiny"),
        (("--lora-rank", 65), "lora rank must be from 1 to 64 for fwasync/qwen3-tiny, got 65"),
    ],
    ids=["base model", "rank"],
)
def test_a_model_that_cannot_be(
    train: Train, options: tuple[object, ...], told: str, dry: tuple[str, ...], data: Path, tmp_path: Path
) -> None:
    found, _, err = train("--data", data, *options, *dry)
    assert found == 1
    assert re.search(told, err)
    assert err.count("error: ") == 1
    assert not list(tmp_path.rglob("config.json"))


def test_settings_out_of_range(refused: Refused, data: Path) -> None:
    refused("--data", data, "--lora-rank", -1, status=2, told="--lora-rank is -1")
    refused("--data", data, "--warmup-steps", -1, status=2, told="--warmup-steps is -1")


def test_broken_rows(refused: Refused, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(CHAT) + '\n{"messages": [\n{"messages": [{"role": "bot", "content": "x"}]}\n')
    told = r"broken\.jsonl has 2 faulty rows:\n  line 2: not JSON.*\n  line 3, messages\[0\]\.role: 'bot'"
    refused("--data", broken, status=2, told=told)
    refused("--data", tmp_path / "none.jsonl", status=2, told="there is no such file")


def test_rows_that_are_all_too_long(refused: Refused, data: Path) -> None:
    refused("--data", data, "--max-seq-len", 5, status=2, told="all 8 rows are longer than 5 tokens")


def test_a_run_directory_that_cannot_be(refused: Refused, data: Path, tmp_path: Path) -> None:
    refused("--data", data, "--log-path", data / "run", status=1, told="cannot make a run in .*Not a directory")


@pytest.mark.skipif(sys.platform != "linux", reason="a file size limit of the process")
def test_a_disk_that_fills_up(service, data: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands for a full disk: the first kilobytes of metrics still fit."""
    code = (
        "import resource, signal, sys\nsys.modules.update(torch=None, transformers=None)\n"
        "from fwasync.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\nmain()"
    )
    options = ["train", "sft", "--data", str(data), "--log-path", "run", "--epochs", "500"]
    options += ["--lora-rank", "4", "--base-model", "fwasync/qwen3-tiny"]
    where = {"FWASYNC_BASE_URL": service.ready["base_url"], "FWASYNC_API_KEY": service.key}
    done = subprocess.run(
        [sys.executable, "-c", code, *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, **where},
    )
    assert done.returncode == 1, done.stderr
    assert re.search(r"error: cannot write run/metrics\.jsonl: File too large", done.stderr)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith("{")
