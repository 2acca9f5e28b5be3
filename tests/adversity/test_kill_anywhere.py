"""Kill the client, the trainer service, or both, at any moment and again: the run ends as if nothing had been.

Moments are counted, not timed: by requests, by lines and syncs of files, by operations that took effect.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fwasync.testing import Fault, FaultPlan, Kill, ScriptedService, blocking_local_service

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kill -9 and fork")

STEPS = 8
MORTAL = Path(__file__).parents[1] / "support" / "mortal_run.py"
# Two passes of 23 rows, of which one is too long: four batches of six, and a cursor that counts it. With rewards it is
# one pass of 23 prompts, three of them a step, as none has answers of the same reward.
ROWS = [("x" * 90 if row == 7 else str(row), str(row * 7 % 10)) for row in range(23)]
PASSES = {"sft": 2, "dpo": 2, "orpo": 2, "rl": 1}
BATCHES = {"batch_size": 6, "epochs": 2, "pipeline_depth": 3, "lr_scheduler": {"type": "cosine", "warmup_steps": 2}}
GROUPS = {"prompt_groups_per_step": 3, "completions_per_prompt": 2, "max_completion_tokens": 6, "kl_beta": 0}
OWN = {"sft": BATCHES, "dpo": {**BATCHES, "ref_cache_batch_size": 4}, "orpo": BATCHES, "rl": GROUPS}


def line(recipe: str, asked: str, answer: str) -> str:
    question = {"role": "user", "content": asked}
    rows: dict[str, Any] = {
        "sft": {"messages": [question, {"role": "assistant", "content": answer}]},
        "rl": {"messages": [question]},
    }
    rows["dpo"] = rows["orpo"] = {"input": asked, "preferred_output": answer, "non_preferred_output": "no"}
    return json.dumps(rows[recipe]) + "\n"


class Runs:
    """One service and one process that forks runs of a recipe on it."""

    def __init__(self, service: ScriptedService, directory: Path, recipe: str) -> None:
        self.recipe = recipe
        self.service = service
        self.directory = directory
        self.data = directory / "data.jsonl"
        self.data.write_text("".join(line(recipe, *row) for row in ROWS))
        self.process = subprocess.Popen(
            [sys.executable, str(MORTAL), recipe],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.count = 0

    def new(self) -> Path:
        self.count += 1
        return self.directory / f"run-{self.count}"

    def train(self, log_path: Path, dies: tuple[str, int] | None = None, rank: int = 0) -> int:
        config = {
            "log_path": str(log_path),
            "dataset": str(self.data),
            "base_model": "fwasync/qwen3-tiny",
            "lora_rank": rank,
            "learning_rate": 3e-3,
            "grad_clip_norm": 1.0,
            "max_seq_len": 64,
            "dcp_save_interval": 2,
            **OWN[self.recipe],
        }
        order = {"base_url": self.service.base_url, "api_key": self.service.api_key, "config": config, "dies": dies}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()

    def outcome(self, log_path: Path) -> Any:
        """What counts: the last weights with their optimizer, every step's numbers, and the cursor."""
        entries = [json.loads(line) for line in (log_path / "checkpoints.jsonl").read_text().splitlines()]
        model_id, _, name = entries[-1]["state_path"].removeprefix("tinker://").partition("/weights/")
        directory = self.service.data_dir / "weights" / model_id.replace(":", "~") / name
        weights: dict[str, Any] = {file.name: file.read_bytes() for file in directory.glob("*.safetensors")}
        weights["optimizer step"] = json.loads((directory / "meta.json").read_text())["step"]
        times = ("time_s", "train/step_time_sec", "train/tokens_per_sec")
        steps = [
            {key: value for key, value in json.loads(line).items() if key not in times and key[:5] != "perf/"}
            for line in (log_path / "metrics.jsonl").read_text().splitlines()
        ]
        return weights, steps, (entries[-1]["step"], entries[-1]["data_consumed"])


@pytest.fixture(scope="module", params=list(OWN))
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with blocking_local_service(data_dir=tmp_path_factory.mktemp("service")) as service:
        running = Runs(service, tmp_path_factory.mktemp("runs"), request.param)
        yield running
        running.close()


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> dict[int, Any]:
    """By rank of the adapter; 0 trains all parameters."""
    found: dict[int, Any] = {}
    for rank in (0, 4):
        log_path = runs.new()
        assert runs.train(log_path, rank=rank) == 0
        weights, steps, end = found[rank] = runs.outcome(log_path)
        assert end == (STEPS, PASSES[runs.recipe] * len(ROWS))
        assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
        assert weights.keys() > {"weights.safetensors", "first_moment.safetensors", "second_moment.safetensors"}
    return found


CLIENT = st.tuples(
    st.just("client"), st.sampled_from(("before", "after")), st.integers(1, 24) | st.integers(25, 60)
) | st.tuples(st.just("client"), st.sampled_from(("torn", "unsynced")), st.integers(1, 5))
SERVICE = (
    st.tuples(st.just("service"), st.sampled_from(("forward_backward", "optim_step")), st.integers(1, STEPS))
    | st.tuples(st.just("service"), st.just("save_weights"), st.integers(1, 4))
    | st.tuples(st.just("service"), st.sampled_from(("forward", "asample")), st.integers(1, STEPS))
    | st.tuples(st.just("service"), st.sampled_from(("create_model", "save_weights_for_sampler")), st.just(1))
)
DEATHS = st.lists(CLIENT | SERVICE | st.tuples(CLIENT, SERVICE), min_size=1, max_size=3)


@given(deaths=DEATHS, rank=st.sampled_from((0, 4)))
@example(deaths=[("client", "after", 8), ("service", "load_weights", 1), ("client", "torn", 1)], rank=0)
@example(deaths=[(("client", "before", 14), ("service", "save_weights", 2)), ("client", "unsynced", 4)], rank=4)
@example(deaths=[("service", "save_weights_for_sampler", 1)], rank=0)
@settings(max_examples=5, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(
    deaths: list[Any], rank: int, runs: Runs, undisturbed: dict[int, Any]
) -> None:
    log_path = runs.new()
    for death in deaths:
        parts = [death] if isinstance(death[0], str) else death
        dies = next(((when, number) for who, when, number in parts if who == "client"), None)
        faults = [Fault(Kill(), route, nth=number) for who, route, number in parts if who == "service"]
        runs.service.set_faults(FaultPlan(faults))
        assert runs.train(log_path, dies, rank) in (0, 1, -signal.SIGKILL)
        if faults:
            runs.service.kill()
            runs.service.restart()
    assert runs.train(log_path, rank=rank) == 0
    assert runs.outcome(log_path) == undisturbed[rank]


def test_the_moments_come(runs: Runs) -> None:
    """Otherwise the test above would prove nothing."""
    for when, most in (("before", 24), ("after", 24), ("torn", 4), ("unsynced", 4)):
        assert runs.train(runs.new(), (when, most)) == -signal.SIGKILL, when
    for route, nth in (("optim_step", STEPS), ("save_weights", 4), ("save_weights_for_sampler", 1)):
        runs.service.set_faults(FaultPlan([Fault(Kill(), route, nth=nth)]))
        assert runs.train(runs.new()) == 1
        runs.service.restart()
