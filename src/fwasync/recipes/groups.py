"""Groups: the answers to one prompt, sampled and rewarded."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import anyio
import anyio.to_thread
import numpy as np
import numpy.typing as npt

from fwasync import SampledCompletion
from fwasync.data.chat import ChatTokenizer
from fwasync.data.prompts import PromptRow
from fwasync.data.seeds import derive_seed
from fwasync.errors import ProtocolError, UsageError
from fwasync.recipes.callbacks import called
from fwasync.recipes.serving import ServedPolicy
from fwasync.rollout.advantages import group_advantages

__all__ = (
    "Answer",
    "GroupFilter",
    "GroupSampler",
    "PromptGroup",
    "RewardFn",
    "TakenRow",
    "is_async",
    "rewards_differ",
    "rewards_of",
)

RewardFn = Callable[[str, PromptRow], float | Awaitable[float]]
"""`reward(text, row) -> float`: how good an answer is, given as text. An async function is awaited on the event loop,
for all answers to a prompt at a time; any other runs in a worker thread, so it may take its time."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """A completion that was rewarded.

    Attributes:
        tokens: int64 `[C]`; C may be 0.
        logprobs: The sampler's, float32 `[C]` in nats.
        text: The same for people and reward functions, without special tokens.
        reward: A finite number.
        truncated: Whether the longest length cut it off.
    """

    tokens: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    text: str
    reward: float
    truncated: bool


@dataclass(frozen=True, slots=True, eq=False)
class PromptGroup:
    """The answers to one prompt.

    Attributes:
        row: The row of the file.
        prompt_tokens: The prompt.
        answers: All of them, in the order of their seeds.
        advantages: Of each answer, float64.
        version: Of the policy that was sampled.
    """

    row: PromptRow
    prompt_tokens: tuple[int, ...]
    answers: tuple[Answer, ...]
    advantages: npt.NDArray[np.float64]
    version: int

    @property
    def rewards(self) -> list[float]:
        """Of each answer."""
        return [answer.reward for answer in self.answers]


GroupFilter = Callable[[PromptGroup], bool]
"""Whether a group is trained on. Called on the event loop."""


def rewards_differ(group: PromptGroup) -> bool:
    """Whether there is something to learn: else all advantages are 0."""
    return len(set(group.rewards)) > 1


@dataclass(frozen=True, slots=True)
class TakenRow:
    """A row that is to be sampled.

    Attributes:
        row: The row of the file.
        prompt_tokens: Its prompt.
        cursor: Rows that are consumed once it is; no two rows of a run have the same.
    """

    row: PromptRow
    prompt_tokens: tuple[int, ...]
    cursor: int


@dataclass(frozen=True, slots=True)
class GroupSampler:
    """Samples and rewards groups.

    Attributes:
        served: What is sampled.
        tokenizer: For the texts.
        reward: The reward function.
        size: Answers to each prompt.
        max_tokens: The longest answer.
        max_seq_len: The longest prompt with its answer.
        temperature: Of the sampling.
        seed: Each row has seeds of its own that depend on this and its cursor.
    """

    served: ServedPolicy
    tokenizer: ChatTokenizer
    reward: RewardFn
    size: int
    max_tokens: int
    max_seq_len: int
    temperature: float
    seed: int

    async def sample(self, taken: TakenRow) -> PromptGroup:
        """A group.

        Raises:
            ProtocolError: There are not as many answers as were asked for, or no logprobs.
            UsageError: A reward is not a finite number.
            Exception: What the sampler or the reward function raises.

        **Cancellation:** the requests end; a reward function that runs in a thread goes on, unheard.
        """
        version = self.served.version
        sampled = await self.served.sample_with_prompt_tokens(
            taken.prompt_tokens,
            self.size,
            max_tokens=min(self.max_tokens, self.max_seq_len - len(taken.prompt_tokens)),
            temperature=self.temperature,
            seed=derive_seed(self.seed, "sample", taken.cursor),
        )
        if len(sampled) != self.size:
            raise ProtocolError(f"{self.size} completions were asked for, and {len(sampled)} came")
        texts = await anyio.to_thread.run_sync(
            lambda: [self.tokenizer.decode(completion.completion_tokens) for completion in sampled],
            abandon_on_cancel=True,
        )
        rewards = await rewards_of(self.reward, texts, taken.row)
        answers = tuple(_answer(*each) for each in zip(sampled, texts, rewards, strict=True))
        assert version is not None, "what is sampled is of a version"
        return PromptGroup(taken.row, taken.prompt_tokens, answers, group_advantages(rewards), version)


def is_async(function: Callable[..., object]) -> bool:
    """Whether a function is awaited: it is a coroutine function, or an object that is called like one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


async def rewards_of(reward: RewardFn, texts: Sequence[str], row: PromptRow) -> list[float]:
    """The rewards of answers to one prompt.

    Raises:
        UsageError: One is not a finite number.
        Exception: What the reward function raises, with a note of the row.

    **Cancellation:** async reward functions end; one that runs in a thread goes on, unheard.
    """
    rewards: list[float] = [math.nan] * len(texts)

    async def one(index: int) -> None:
        rewards[index] = await called(reward(texts[index], row))

    with _noted(row):
        if is_async(reward):
            async with anyio.create_task_group() as tasks:
                for index in range(len(texts)):
                    tasks.start_soon(one, index)
        else:
            plain = cast("Callable[[str, PromptRow], float]", reward)
            rewards = await anyio.to_thread.run_sync(
                lambda: [plain(text, row) for text in texts], abandon_on_cancel=True
            )
        return [_finite(value) for value in rewards]


def _finite(value: object) -> float:
    try:
        number = float(cast("float", value))
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"a reward is {value!r}; it must be a finite number")
    return number


@contextmanager
def _noted(row: PromptRow) -> Generator[None]:
    """Say of what is raised for which row it was; of several at a time, raise the first."""
    try:
        yield
    except Exception as error:
        first = error
        if isinstance(error, ExceptionGroup):
            first = cast("ExceptionGroup[Exception]", error).exceptions[0]
        first.add_note(f"the reward function was asked for the row of line {row.line}")
        raise first from first.__cause__


def _answer(completion: SampledCompletion, text: str, reward: float) -> Answer:
    tokens, logprobs = completion.completion_tokens, completion.inference_logprobs
    if logprobs is None and tokens:
        raise ProtocolError("the sampler returned no logprobs; policy losses need those of each completion token")
    return Answer(
        np.asarray(tokens, np.int64), np.asarray(logprobs or (), np.float32), text, reward, completion.truncated
    )
