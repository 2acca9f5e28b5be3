"""Groups: what is asked of the sampler, how answers are rewarded, and what is refused."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from fwasync import SampledCompletion
from fwasync.data.chat import ChatTokenizer
from fwasync.data.prompts import PromptRow
from fwasync.errors import ProtocolError, UsageError
from fwasync.local.tokenizer import save_tokenizer
from fwasync.recipes.groups import GroupSampler, PromptGroup, TakenRow, rewards_differ
from unit.recipes.groups import group, row


class Served:
    """Says abc, abcd, abcde …"""

    version = 3

    def __init__(self, *, count: int | None = None, logprobs: bool = True) -> None:
        self.asked: list[Any] = []
        self.count, self.logprobs = count, logprobs

    async def sample_with_prompt_tokens(self, prompt: Sequence[int], n: int, **options: Any) -> list[SampledCompletion]:
        self.asked.append((list(prompt), n, options))
        tokens = [list(b"abcdefgh"[: 3 + index]) for index in range(self.count or n)]
        return [
            SampledCompletion("", [*prompt, *each], len(prompt), "length", len(each), self.given(each))
            for each in tokens
        ]

    def given(self, tokens: list[int]) -> list[float] | None:
        return [-0.25] * len(tokens) if self.logprobs else None


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    directory: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return ChatTokenizer.load(directory)


def sampler(tokenizer: ChatTokenizer, reward: Any, served: Any = None, **more: Any) -> GroupSampler:
    settings = {"size": 3, "max_tokens": 10, "max_seq_len": 64, "temperature": 0.7, "seed": 5}
    return GroupSampler(served or Served(), tokenizer, reward, **{**settings, **more})


TAKEN = TakenRow(row(line=9, truth="abcd"), (1, 2, 3), 17)


def matches(text: str, row: PromptRow) -> float:
    assert threading.current_thread() is not threading.main_thread()
    return float(text == row.ground_truth)


async def test_a_group_is_sampled_and_rewarded(tokenizer: ChatTokenizer) -> None:
    served = Served()
    made = await sampler(tokenizer, matches, served).sample(TAKEN)
    assert [answer.text for answer in made.answers] == ["abc", "abcd", "abcde"]
    assert made.rewards == [0, 1, 0]
    assert made.advantages.tolist() == pytest.approx([-(3**-0.5), 2 * 3**-0.5, -(3**-0.5)])
    assert (made.version, made.row, made.prompt_tokens) == (3, TAKEN.row, (1, 2, 3))
    assert made.answers[0].tokens.tolist() == list(b"abc")
    assert made.answers[0].logprobs.dtype == np.float32
    assert made.answers[0].truncated
    ((prompt, n, options),) = served.asked
    assert (prompt, n, options["max_tokens"], options["temperature"]) == ([1, 2, 3], 3, 10, 0.7)


async def test_seeds_are_of_rows_and_answers_fit(tokenizer: ChatTokenizer) -> None:
    served = Served()
    for taken, seed, longest in [(TAKEN, 5, 64), (TAKEN, 5, 8), (TakenRow(row(), (1,), 18), 5, 64), (TAKEN, 6, 64)]:
        await sampler(tokenizer, matches, served, seed=seed, max_seq_len=longest).sample(taken)
    first, again, other_row, other_seed = [options["seed"] for _, _, options in served.asked]
    assert first == again
    assert len({first, other_row, other_seed}) == 3
    assert [options["max_tokens"] for _, _, options in served.asked] == [10, 5, 10, 10]


async def test_async_rewards_run_side_by_side_on_the_loop(tokenizer: ChatTokenizer) -> None:
    together = anyio.Event()
    waiting: list[str] = []

    async def judge(scale: float, text: str, row: PromptRow) -> float:
        waiting.append(text)
        if len(waiting) == 3:
            together.set()
        await together.wait()
        return scale * len(text)

    assert (await sampler(tokenizer, functools.partial(judge, 2)).sample(TAKEN)).rewards == [6, 8, 10]

    class Judge:
        async def __call__(self, text: str, row: PromptRow) -> float:
            return float(len(text))

    assert (await sampler(tokenizer, Judge()).sample(TAKEN)).rewards == [3, 4, 5]


async def test_a_reward_that_fails_is_told_with_its_row(tokenizer: ChatTokenizer) -> None:
    def fails(text: str, row: PromptRow) -> float:
        raise KeyError("answer")

    async def fails_later(text: str, row: PromptRow) -> float:
        raise KeyError("answer")

    for reward in (fails, fails_later):
        with pytest.raises(KeyError) as caught:
            await sampler(tokenizer, reward).sample(TAKEN)
        assert caught.value.__notes__ == ["the reward function was asked for the row of line 9"]
    for value in (float("nan"), None, "good"):
        with pytest.raises(UsageError, match=f"a reward is {value!r}; it must be a finite number"):
            await sampler(tokenizer, lambda text, row, value=value: value).sample(TAKEN)


async def test_what_was_not_asked_for_is_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(ProtocolError, match="3 completions were asked for, and 2 came"):
        await sampler(tokenizer, matches, Served(count=2)).sample(TAKEN)
    with pytest.raises(ProtocolError, match="no logprobs"):
        await sampler(tokenizer, matches, Served(logprobs=False)).sample(TAKEN)


@pytest.mark.parametrize(
    ("made", "differ"), [(group([0, 0, 0]), False), (group([0, 0, 1e-9]), True), (group([1, 1]), False)]
)
def test_rewards_differ(made: PromptGroup, differ: bool) -> None:
    assert rewards_differ(made) is differ
