"""Functions that settings name: checked before they are needed, and told as their own errors when they raise."""

from __future__ import annotations

import pickle
import sys
from types import ModuleType
from typing import Any

import anyio
import pytest

from fwasync.data.messages import Message
from fwasync.data.prompts import PromptRow
from fwasync.errors import RecoverableRolloutError, UsageError
from fwasync.recipes.groups import rewards_of
from fwasync.recipes.named import load_reward, load_rollout
from fwasync.recipes.rewards import answer_digits

ROW = PromptRow((Message("user", "1 + 1 = ?"),), "2", {}, 7)


def good(text: str, row: PromptRow) -> float:
    return float(text == row.ground_truth)


async def good_later(text: str, row: PromptRow) -> float:
    await anyio.lowlevel.checkpoint()
    return good(text, row)


def fails(text: str, row: PromptRow) -> float:
    return row.metadata["weight"]


async def fails_among_others(text: str, row: PromptRow) -> float:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, fails, text, row)
    return 0.0


def has_bad_luck(text: str, row: PromptRow) -> float:
    raise ConnectionResetError("the judge is gone")


async def is_lost(prompt: object, ctx: object) -> None:
    raise RecoverableRolloutError("the game crashed")


class Judge:
    def __call__(self, text: str, row: PromptRow) -> float:
        return 0.5


@pytest.fixture(autouse=True)
def module(monkeypatch: pytest.MonkeyPatch) -> None:
    """This module, by a short name."""
    module = ModuleType("mine")
    vars(module).update(globals(), judge=Judge(), number=3)
    monkeypatch.setitem(sys.modules, "mine", module)


async def test_rewards_of_each_kind() -> None:
    for name in ("good", "good_later"):
        assert await rewards_of(await load_reward(f"mine:{name}"), ["2", "3"], ROW) == [1, 0]
    assert await rewards_of(await load_reward("mine:judge"), ["2"], ROW) == [0.5]
    sent: Any = pickle.loads(pickle.dumps(await load_reward("mine:good")))  # to a process, by a pool
    assert sent("2", ROW) == 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "reward is empty; name a function as .*fwasync.recipes.rewards:answer_digits"),
        ("mine:number", "reward 'mine:number' is a int, and no function of"),
        ("mine:Judge", r"reward 'mine:Judge' must take \(text, row\): too many positional arguments"),
    ],
)
async def test_what_is_no_reward(name: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        await load_reward(name)


async def test_what_is_no_rollout() -> None:
    with pytest.raises(UsageError, match="rollout 'mine:good' must be an async function"):
        await load_rollout("mine:good")


async def test_what_it_raises_is_told_with_its_place() -> None:
    for name in ("fails", "fails_among_others"):
        with pytest.raises(UsageError, match=r"raised KeyError: 'weight' \(test_named\.py, line \d+\)") as caught:
            await rewards_of(await load_reward(f"mine:{name}"), ["2"], ROW)
        assert caught.value.__notes__ == ["the reward function was asked for the row of line 7"]


async def test_bad_luck_stays_bad_luck() -> None:
    with pytest.raises(ConnectionResetError):
        await rewards_of(await load_reward("mine:has_bad_luck"), ["2"], ROW)
    rollout: Any = await load_rollout("mine:is_lost")
    with pytest.raises(RecoverableRolloutError):
        await rollout(None, None)


@pytest.mark.parametrize(
    ("text", "truth", "reward"),
    [
        ("so <answer>It is 72.</answer>", "48 + 24 = 72 <answer>72</answer>", 1),
        ("<ANSWER>\n72\n</ANSWER> or <answer>73</answer>", 72, 1),
        ("<answer>-72</answer>", "<answer>72</answer>", 0),
        ("<answer>72</answer>", "<answer>720</answer>", 0),
        ("72", "<answer>72</answer>", 0),
        ("<answer>many</answer>", "<answer>many</answer>", 0),
        ("<answer>72</answer>", None, 0),
    ],
)
def test_the_reward_that_compares_numbers(text: str, truth: object, reward: float) -> None:
    assert answer_digits(text, PromptRow((), truth, {}, 1)) == reward
