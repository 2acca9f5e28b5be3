"""Groups: the completions of one prompt, sampled side by side with those of the other prompts, and rewarded.

Invariants
    * All prompts are sampled concurrently; groups come back in the order of the prompts, whichever arrives first.
    * A completion depends on the weights, its prompt and its seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import anyio
import anyio.to_thread
import numpy as np
import numpy.typing as npt

from fwasync.data.jsonl import Message
from fwasync.errors import ProtocolError

if TYPE_CHECKING:
    from fwasync.types import ModelInput, SampledSequence, SampleResponse, SamplingParams

__all__ = ("Completion", "Decoding", "Group", "Prompt", "Reward", "Sampler", "Tokenizer", "sample_groups")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that the model is to continue; `truth` is for the reward function, the model never sees it."""

    messages: tuple[Message, ...]
    truth: str = ""


Reward = Callable[[Prompt, str], float]
"""The reward of a completion, given as text. It runs in a worker thread, so it may take its time."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to sample: completions of each prompt, their longest length in tokens, and the temperature."""

    num_samples: int
    max_tokens: int
    temperature: float = 1.0


@dataclass(frozen=True, slots=True)
class Completion:
    """Tokens int64 `[C]`, the sampler's logprobs float32 `[C]` in nats, text, and whether it ended by itself."""

    tokens: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    text: str
    reward: float
    finished: bool


@dataclass(frozen=True, slots=True)
class Group:
    """The completions of one prompt."""

    prompt: Prompt
    prompt_tokens: tuple[int, ...]
    completions: tuple[Completion, ...]


class Sampler(Protocol):
    """What is asked of a sampling client."""

    async def sample(
        self, prompt: ModelInput, num_samples: int = 1, sampling_params: SamplingParams | None = None
    ) -> SampleResponse:
        """Completions of a prompt."""
        ...


class Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    @property
    def stop_tokens(self) -> list[int]:
        """The ids that end an answer."""
        ...

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> list[int]:
        """The tokens of a conversation."""
        ...

    def decode(self, tokens: Sequence[int] | npt.NDArray[np.int64]) -> str:
        """The text of tokens."""
        ...


async def sample_groups(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    *,
    seeds: Sequence[int],
    decoding: Decoding,
    tokenizer: Tokenizer,
    reward: Reward,
    on_in_flight: Callable[[int], None] | None = None,
) -> list[Group]:
    """Sample and reward a group of completions for each prompt, all at the same time.

    Args:
        sampler: Of one set of weights.
        prompts: What to complete.
        seeds: The seed of each prompt's request.
        decoding: How to sample.
        tokenizer: The model's.
        reward: The reward function; what it raises is passed on.
        on_in_flight: Told how many requests are waiting for their answer, whenever that changes.

    Returns:
        The groups, in the order of the prompts.

    **Cancellation:** all requests end; a reward function that is running goes on in its thread, unheard.
    """
    from fwasync.types import ModelInput, SamplingParams

    groups: list[Group | None] = [None] * len(prompts)
    waiting = 0

    def count(change: int) -> None:
        nonlocal waiting
        waiting += change
        if on_in_flight is not None:
            on_in_flight(waiting)

    async def sample_one(index: int) -> None:
        prompt = prompts[index]
        tokens = tokenizer.render(prompt.messages, add_generation_prompt=True)
        params = SamplingParams(
            max_tokens=decoding.max_tokens,
            temperature=decoding.temperature,
            seed=seeds[index],
            stop=tokenizer.stop_tokens or None,
        )
        count(1)
        try:
            response = await sampler.sample(ModelInput.from_ints(tokens), decoding.num_samples, params)
        finally:
            count(-1)

        def complete() -> Group:
            completions = [_completion(sequence, prompt, tokenizer, reward) for sequence in response.sequences]
            return Group(prompt, tuple(tokens), tuple(completions))

        groups[index] = await anyio.to_thread.run_sync(complete, abandon_on_cancel=True)

    try:
        async with anyio.create_task_group() as tasks:
            for index in range(len(prompts)):
                tasks.start_soon(sample_one, index)
    except ExceptionGroup as errors:
        first, *others = errors.exceptions
        if others:
            first.add_note(f"{len(others)} other prompts of {len(prompts)} failed too")
        raise first from None
    return [group for group in groups if group is not None]


def _completion(sequence: SampledSequence, prompt: Prompt, tokenizer: Tokenizer, reward: Reward) -> Completion:
    tokens = np.asarray(sequence.tokens, np.int64)
    if sequence.logprobs is None:
        raise ProtocolError("the sampler returned no logprobs; policy losses need those of each completion token")
    text = tokenizer.decode(tokens)
    logprobs = np.asarray(sequence.logprobs, np.float32)
    return Completion(tokens, logprobs, text, float(reward(prompt, text)), sequence.stop_reason == "stop")
