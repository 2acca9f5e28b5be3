"""`fwasync train` with each recipe: rows are accounted for, what cannot be is one line, and a run can be stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from fwasync.tracking.run import open_run
from service.conftest import SHOUTING

RECIPES = ("sft", "dpo", "orpo", "rl")
SHAPE = "accounts/fwasync/trainingShapes/qwen3-tiny"
JUDGE = """
import time

def letters(text, row):
    return sum("a" <= letter <= "z" for letter in text)

def asleep(text, row):
    print("judging", flush=True)
    time.sleep(600)

def broken(text, row):
    raise KeyError("truth")

async def patient(text, row):
    return letters(text, row)

NOTHING = None
"""
LONG = "x" * 90
Train = Callable[..., tuple[int, str, str]]
Refused = Callable[..., None]


def row(recipe: str, question: str, answer: str = "yes", other: str = "no") -> dict[str, Any]:
    asked = {"role": "user", "content": question}
    if recipe == "rl":
        return {"messages": [asked], "ground_truth": answer}
    if recipe == "sft":
        return {"messages": [asked, {"role": "assistant", "content": answer}]}
    return {"input": question, "preferred_output": answer, "non_preferred_output": other}


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in rows))


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A recipe; its rows are in rows.jsonl: some are too long, without a difference, there twice, or blank."""
    name: str = request.param
    rows: list[Any] = [row(name, str(number)) for number in range(6)]
    rows += ["", row(name, LONG), row(name, "0"), "   "]
    if name in ("dpo", "orpo"):
        rows.append(row(name, "same", "no", "no"))
    write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "judge.py").write_text(JUDGE)
    return name


def settings(recipe: str, **more: object) -> list[str]:
    own: dict[str, object] = {"batch_size": 4, "epochs": 2}
    if recipe == "rl":
        own = {"reward": "judge:letters", "kl_beta": 0, "max_completion_tokens": 6, "prompt_groups_per_step": 2}
    given = {"dataset": "rows.jsonl", "log_path": "run", "max_seq_len": 60, "lora_rank": 4, **own, **more}
    return [f"{name}={value}" for name, value in given.items() if value is not None]


@pytest.fixture
def there(service) -> dict[str, str]:
    return {"FWASYNC_BASE_URL": service.ready["base_url"], "FWASYNC_API_KEY": service.key}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


LEFT_OUT = {
    "sft": (8, r"1 of 8 rows are left out: line 8: 9\d tokens are more than 60"),
    "dpo": (9, r"2 of 9 rows are left out: line 11: without a difference.*; line 8: 9\d tokens are more than 60"),
    "orpo": (9, r"2 of 9 rows are left out: line 11: without a difference.*; line 8: 9\d tokens are more than 60"),
    "rl": (8, r"1 of 8 rows are left out: line 8: a prompt of 9\d tokens leaves no room for an answer in 60"),
}


def test_no_row_is_lost_silently(train: Train, recipe: str, there: dict[str, str], tmp_path: Path) -> None:
    status, out, err = train(*settings(recipe, base_model="fwasync/qwen3-tiny"), recipe=recipe, **there)
    assert (status, err) == (0, "")
    rows, told = LEFT_OUT[recipe]
    assert re.search(told, out)
    last = lines(tmp_path / "run" / "checkpoints.jsonl")[-1]
    steps = lines(tmp_path / "run" / "metrics.jsonl")
    passes = 1 if recipe == "rl" else 2
    # Those that are left out are behind the cursor, and counted by it: whole passes.
    assert last["data_consumed"] in (rows * passes, rows * passes - 1)
    if recipe == "rl":
        assert sum(last["rows"].values()) == rows - 1
        assert f"rows: {rows - 1} sampled, {last['rows']['kept']} kept, {last['rows']['filtered']} filtered" in out
        assert sum(step["rollout/valid_prompt_groups"] for step in steps) == last["rows"]["kept"]
    elif recipe != "sft":
        assert [step["train/batch_pairs"] for step in steps] == [4, 3] * 2
    else:  # 4 tokens of "yes" and its end, in 7 rows
        assert sum(step["train/active_tokens"] for step in steps) == 2 * 7 * 4


def test_a_dry_run_finds_the_same_rows(train: Train, recipe: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    status, out, err = train(*settings(recipe), "--dry-run", recipe=recipe)
    assert (status, err) == (0, "")
    rows, told = LEFT_OUT[recipe]
    assert f"rows.jsonl: {rows} rows" in out
    assert re.search(told, out)
    assert re.search(r"^\d+ steps of ", out, re.M)
    assert re.search(r"^rendering: \d compared, with the chat template's tokens$", out, re.M)
    assert out.endswith("Nothing was started or spent.\n")
    assert sorted(tmp_path.iterdir()) == before


def test_a_dry_run_says_where_another_renderer_differs(train: Train, recipe: str, tmp_path: Path) -> None:
    (tmp_path / "shouting.py").write_text(SHOUTING)
    status, out, err = train(*settings(recipe, renderer_name="shouting.py:Shouting"), "--dry-run", recipe=recipe)
    assert (status, err) == (0, "")
    told = r"^WARNING: rendering: line \d, the .*: the renderer and the chat template differ; they part at token \d"
    assert re.search(told, out, re.M)


def test_a_dry_run_for_trainer_jobs_reads_the_rows_too(train: Train, recipe: str, tmp_path: Path) -> None:
    from fwasync.local.tokenizer import save_tokenizer

    save_tokenizer(tmp_path / "tokenizer")
    named = {"tokenizer_model": "tokenizer", "base_model": "accounts/a/models/b", "infra.training_shape_id": SHAPE}
    status, out, err = train(*settings(recipe, **named), "--dry-run", recipe=recipe)
    assert (status, err) == (0, "")
    assert re.search(LEFT_OUT[recipe][1], out)
    assert f"a trainer job on {SHAPE}, removed in the end" in out
    assert ("deployment named after the model" in out) == (recipe == "rl")


FAULTY = {
    "sft": [{"messages": []}, {"prompt": "x"}, "{"],
    "dpo": [{"input": "x", "preferred_output": "y"}, {"samples": [{"text": "a", "score": 0.5}]}, "{"],
    "orpo": [{"input": "x", "preferred_output": "y"}, {"chosen": {"text": "a"}, "rejected": 3}, "{"],
    "rl": [{"messages": [{"role": "assistant", "content": "a"}]}, {"messages": "x"}, "{"],
}


@pytest.mark.parametrize("options", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_faulty_rows(refused: Refused, recipe: str, options: tuple[str, ...], tmp_path: Path) -> None:
    write(tmp_path / "faulty.jsonl", [row(recipe, "1"), *FAULTY[recipe]])
    told = r"faulty\.jsonl has 3 faulty rows:\n  line 2, [\w.]+: .*\n  line 3, [\w.\[\]]+: .*\n  line 4: not JSON"
    refused(*settings(recipe, dataset="faulty.jsonl"), *options, status=2, told=told, recipe=recipe)


BROKEN = """\
class Broken:
    def __init__(self, tokenizer): ...

    def render(self, messages, *, add_generation_prompt=False, tools=()):
        raise KeyError(messages[0].role)

    def supervised(self, messages, trained, *, tools=()):
        self.render(messages)
"""


@pytest.mark.parametrize("options", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_a_renderer_that_raises_is_not_a_bug_of_ours(
    refused: Refused, recipe: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "broken_mine.py").write_text(BROKEN)
    given = settings(recipe, renderer_name="broken_mine.py:Broken")
    told = (
        r"error: renderer 'broken_mine\.py:Broken' raised KeyError: 'user' \(broken_mine\.py, line 5\)\n"
        r"  note: the renderer was asked for line 1 of rows\.jsonl\n"
    )
    refused(*given, *options, status=2, told=told, recipe=recipe)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"dataset": "nope.jsonl"}, "nope.jsonl: there is no such file"),
        ({"dataset": None}, "dataset is empty"),
        ({"tokenizer_model": "Nobody/none"}, "'Nobody/none' is neither a directory .* nor in the Hugging Face cache"),
        ({"max_seq_len": 2}, "rows.jsonl: all [78] (rows are longer than|prompts fill) 2 tokens"),
        ({"lerning_rate": 1}, "there is no setting 'lerning_rate'; did you mean 'learning_rate'"),
        ({"lr_scheduler.type": "cosin"}, "lr_scheduler.type is cosin: .*did you mean 'cosine'"),
        ({"grad_accumulation_normalization": "mean"}, "must be one of num_loss_tokens, num_sequences, none"),
        ({"infra.ref_training_shape_id": SHAPE}, "infra.ref_training_shape_id is set"),
        ({"output_model_id": "My_Model"}, "output_model_id is My_Model: .*lower-case letters, digits and hyphens"),
        ({"output_model_id": "mine"}, "only a trainer job's snapshot becomes a model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_one_line(refused: Refused, recipe: str, more: dict[str, Any], told: str) -> None:
    refused(*settings(recipe, **more), status=2, told=told, recipe=recipe)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"policy_loss": "grop"}, "there is no policy loss 'grop'; did you mean 'grpo'"),
        ({"reward": None}, "reward is empty"),
        ({"reward": "judge"}, "reward 'judge' must look like 'module:attribute'"),
        ({"reward": "judge:leters"}, "reward 'judge:leters' cannot be imported: .*leters"),
        ({"reward": "jugde:letters"}, "reward 'jugde:letters' cannot be imported: No module named 'jugde'"),
        ({"reward": "judge:NOTHING"}, "is a NoneType, and no function of"),
        ({"batch_size": 4}, "batch_size is set"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
@pytest.mark.parametrize("recipe", ["rl"], indirect=True)
def test_what_rl_cannot_do_is_one_line(refused: Refused, recipe: str, more: dict[str, Any], told: str) -> None:
    for options in ((), ("--dry-run",)):
        refused(*settings(recipe, **more), *options, status=2, told=told, recipe=recipe)


@pytest.mark.parametrize("recipe", ["rl"], indirect=True)
def test_a_reward_function_that_fails_is_told_with_its_row(
    train: Train, recipe: str, there: dict[str, str], tmp_path: Path
) -> None:
    tiny = {"base_model": "fwasync/qwen3-tiny"}
    status, _, err = train(*settings(recipe, reward="judge:broken", **tiny), recipe=recipe, **there)
    assert status == 2
    told = r"error: reward 'judge:broken' raised KeyError: 'truth' \(judge\.py, line \d+\)\n  note: .* of line \d+\n"
    assert re.match(told, err)
    status, _, err = train(*settings(recipe, reward="judge:patient", **tiny), recipe=recipe, **there)
    assert (status, err) == (0, "")


def test_a_run_directory_in_use_or_of_another_recipe(
    train: Train, recipe: str, there: dict[str, str], tmp_path: Path
) -> None:
    status, _, err = anyio.run(_in_use, tmp_path / "run", recipe)
    assert status == 1
    assert re.search(r"error: run is in use by process \d+ on .*; let that run end, or choose another log_path", err)
    tiny = {"base_model": "fwasync/qwen3-tiny", "max_steps": 1}
    assert train(*settings(recipe, **tiny), recipe=recipe, **there)[0] == 0
    other = {"sft": "dpo", "dpo": "orpo", "orpo": "dpo", "rl": "sft"}[recipe]
    held = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    write(tmp_path / "rows.jsonl", [row(other, str(number)) for number in range(6)])
    status, out, err = train(*settings(other, **tiny), recipe=other, **there)
    assert status == 2
    assert re.search(f"the run in run is one of {recipe}, with which {other} cannot go on", err)
    assert "What was done so far" not in out
    write(tmp_path / "rows.jsonl", [row(recipe, f"{number}") for number in range(4, 10)])
    status, out, err = train(*settings(recipe, **{**tiny, "max_steps": 2, "seed": 1}), recipe=recipe, **there)
    assert status == 2
    assert "rows.jsonl is not what it was when run was begun" in err
    del held[".lock"]
    assert {name: (tmp_path / "run" / name).read_bytes() for name in held} == held


async def _in_use(directory: Path, recipe: str) -> tuple[int, str, str]:
    async with open_run(directory, config={}):
        command = [sys.executable, "-m", "fwasync.cli", "train", recipe, *settings(recipe)]
        environment = {**os.environ, "FWASYNC_BASE_URL": "", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = await anyio.run_process(command, cwd=directory.parent, env=environment, check=False)
        return done.returncode, done.stdout.decode(), done.stderr.decode()


# -- signals -------------------------------------------------------------------------------------------------


@pytest.fixture
def command(recipe: str, there: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def command(**more: object) -> subprocess.Popen[str]:
        arguments = settings(recipe, base_model="fwasync/qwen3-tiny", **more)
        environment = {**os.environ, **there, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "fwasync.cli", "train", recipe, *arguments],
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
        )
        return started[-1]

    yield command
    for process in started:
        process.kill()
        process.communicate()


def until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    while text not in (line := process.stdout.readline()):
        assert line, process.communicate()[1]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("recipe", ["dpo", "orpo", "rl"], indirect=True)
def test_the_first_signal_finishes_the_step_and_saves(
    recipe: str, command: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    number, status, word = {
        "dpo": (signal.SIGTERM, 143, "terminated"),
        "orpo": (signal.SIGINT, 130, "interrupted"),
        "rl": (signal.SIGTERM, 143, "terminated"),
    }[recipe]
    process = command(epochs=100_000)
    until(process, {"dpo": "dpo loss", "orpo": "orpo loss", "rl": "reward"}[recipe])
    process.send_signal(number)
    out, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (status, f"stopping after the steps in hand; once more to stop now\n{word}\n")
    told = re.search(rf"{word}: step (\d+) of \d+ is done\. The same log_path goes on from there\.", out)
    assert told
    done = int(told[1])
    last = lines(tmp_path / "run" / "checkpoints.jsonl")[-1]
    assert (last["step"], "state_path" in last) == (done, True)
    again = command(epochs=100_000, max_steps=done + 2)
    out, err = again.communicate(timeout=200)
    assert (again.returncode, err) == (0, "")
    assert f"{done} steps and {last['data_consumed']} rows are done" in out
    assert [step["step"] for step in lines(tmp_path / "run" / "metrics.jsonl")] == list(range(1, done + 3))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("recipe", ["rl"], indirect=True)
def test_the_second_signal_ends_what_the_first_cannot(
    recipe: str, command: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = command(reward="judge:asleep")
    until(process, "judging")
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "stopping after the steps in hand; once more to stop now\n"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (130, "interrupted\n")
