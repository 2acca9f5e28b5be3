"""`fwasync train rl` and `async_rl`: rewards and rollouts by name, dry runs, one clear line for what is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from service.test_train_cli import Refused, Train

REWARDS = """\
def letters(text, row):
    return sum("a" <= letter <= "z" for letter in text) / 4

async def fails(text, row):
    return row.ground_truth["wanted"]

def says_nothing(text, row): ...

def only_text(text): ...

async def rollout(prompt, ctx):
    session = ctx.session()
    session.append(prompt.prompt_tokens)
    turn = await session.sample(max_tokens=4)
    return session.rollout(letters(turn.text, prompt.row))
"""
SETTINGS = """\
dataset = "data.jsonl"
log_path = "run"
max_completion_tokens = 4
prompt_groups_per_step = 2
completions_per_prompt = 8
kl_beta = 0
"""


@pytest.fixture(autouse=True)
def files(data: Path, tmp_path: Path) -> None:
    """A file of rewards and one of settings."""
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "run.toml").write_text(SETTINGS)


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ("rl", "reward=my_rewards:letters"),
        ("async_rl", "reward=my_rewards.py:letters"),
        ("async_rl", "rollout=my_rewards:rollout"),
    ],
)
def test_a_run_and_its_dry_run(train: Train, recipe: str, named: str, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    row = {"messages": [{"role": "user", "content": "x" * 600}]}
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(row)}\n" + (tmp_path / "data.jsonl").read_text())
    command = ("--config", "run.toml", named, "max_steps=3", "epochs=2", "dcp_save_interval=1")
    status, dry, err = train(*command, "--dry-run", recipe=recipe)
    assert (status, err) == (0, "")
    what, _, name = named.partition("=")
    assert f"{what} '{name}' is found, in {tmp_path / 'my_rewards.py'}\ndata.jsonl: 9 rows\n" in dry
    assert re.search(r"\n1 of 9 rows are left out: line 1: a prompt of 6\d\d tokens leaves no room for an answer", dry)
    assert "\n3 steps of 2 prompts with 8 answers each" in dry
    assert "\ncompletions to be sampled: 48 to 128, the more prompts are dropped; of 4 tokens at most\n" in dry
    assert "\n3 checkpoint(s)\n" in dry
    assert dry.endswith("Nothing was started or spent.\n")
    assert set(tmp_path.rglob("*")) == before
    status, out, err = train(*command, recipe=recipe)
    assert (status, err) == (0, "")
    assert re.search(rf"Reward .* in 3 steps \({recipe}\)\.", out)
    assert len((tmp_path / "run" / "checkpoints.jsonl").read_text().splitlines()) == 3


def test_a_dry_run_without_a_tokenizer_counts_rows(train: Train, service) -> None:
    where = ("--base-url", service.ready["base_url"], "--api-key", service.key, "base_model=fwasync/qwen3-tiny")
    command = ("--config", "run.toml", "reward=my_rewards:letters", "--dry-run")
    status, out, err = train(*command, *where, recipe="rl")
    assert (status, err) == (0, "")
    assert "\ntokens: not known without the model's tokenizer\n4 steps of 2 prompts" in out
    assert "\ncompletions to be sampled: 64; of 4 tokens at most\n" in out


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("recipe", "options", "told"),
    [
        ("rl", (), "reward is empty; name a function as module:function or file.py:function, yours or "),
        ("rl", ("reward=my_rewords:letters",), "reward 'my_rewords:letters' cannot be imported: No module named"),
        ("rl", ("reward=my_rewards:only_text",), r"must take \(text, row\): too many positional arguments"),
        ("async_rl", ("rollout=my_rewards:letters",), "rollout 'my_rewards:letters' must be an async function"),
        ("async_rl", ("reward=a:b", "rollout=a:b"), "reward and rollout are set; .*: set one of them"),
    ],
)
def test_what_cannot_be_named(
    refused: Refused, recipe: str, options: tuple[str, ...], told: str, dry: tuple[str, ...]
) -> None:
    refused("--config", "run.toml", *options, *dry, recipe=recipe, status=2, told=told)


@pytest.mark.parametrize("recipe", ["rl", "async_rl"])
def test_a_reward_that_goes_wrong_in_a_run(train: Train, recipe: str, tmp_path: Path) -> None:
    command = ("--config", "run.toml", "shuffle=false")
    status, _, err = train(*command, "reward=my_rewards:fails", recipe=recipe)
    assert status == 2
    told = r"error: reward 'my_rewards:fails' raised TypeError: .* \(my_rewards\.py, line 5\)\n  note: .* of line \d\n"
    assert re.match(told, err), err
    assert err.count("error: ") == 1
    assert "bug" not in err
    status, _, err = train(*command, "reward=my_rewards:says_nothing", recipe=recipe)
    assert status == 2
    assert err.startswith("error: a reward is None; it must be a finite number\n")


def test_a_reward_in_processes_is_a_plain_function(train: Train) -> None:
    command = ("--config", "run.toml", "reward_processes=1")
    status, _, err = train(*command, "reward=my_rewards:letters", recipe="async_rl")
    assert (status, err) == (0, "")
    status, _, err = train(*command, "reward=my_rewards:fails", "log_path=other", recipe="async_rl")
    assert status == 2
    assert "reward_processes is for rewards that are plain functions" in err
