"""Groups: concurrent sampling whose result does not depend on who arrives first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import anyio
import numpy as np
import pytest

from fwasync.data.jsonl import Message
from fwasync.errors import OperationFailedError, ProtocolError
from fwasync.rollout.groups import Decoding, Group, Prompt, sample_groups
from fwasync.types import ModelInput, SampledSequence, SampleResponse, SamplingParams

PROMPTS = [Prompt((Message("user", text),), truth=text) for text in "abc"]


class Letters:
    """A tokenizer of one letter a token, which ends answers with 0."""

    stop_tokens = (0,)

    def render(self, messages: Any, *, add_generation_prompt: bool = False) -> list[int]:
        assert add_generation_prompt
        return [ord(letter) for message in messages for letter in message.content]

    def decode(self, tokens: Any) -> str:
        return "".join(chr(token) for token in tokens if token)


class Sampler:
    """Answers once all prompts have been asked, in an order of its own: the prompt, doubled."""

    def __init__(self, order: str, *, logprobs: bool = True) -> None:
        self.order = order
        self.logprobs = logprobs
        self.asked: dict[str, SamplingParams] = {}
        self.turn = {letter: anyio.Event() for letter in order}
        self.failing: str | None = None

    async def sample(self, prompt: ModelInput, num_samples: int = 1, sampling_params: Any = None) -> SampleResponse:
        letter = chr(prompt.to_ints()[0])
        self.asked[letter] = sampling_params
        if len(self.asked) == len(self.order):
            self.turn[self.order[0]].set()
        await self.turn[letter].wait()
        if letter == self.failing:
            raise OperationFailedError("no")
        following = self.order[self.order.index(letter) + 1 :][:1]
        if following:
            self.turn[following].set()
        tokens = np.array([ord(letter), ord(letter), 0], np.int32)
        sequence = SampledSequence(
            stop_reason="stop",
            sequence_id="s",
            tokens_np=tokens,
            logprobs_np=np.full(3, -0.5, np.float32) if self.logprobs else None,
        )
        return SampleResponse(sequences=[sequence] * num_samples)


async def sample(sampler: Sampler, **more: Any) -> list[Group]:
    reward: Callable[[Prompt, str], float] = more.pop("reward", lambda prompt, text: float(text == prompt.truth * 2))
    return await sample_groups(
        sampler,
        PROMPTS,
        seeds=[7, 8, 9],
        decoding=Decoding(num_samples=2, max_tokens=5, temperature=0.7),
        tokenizer=Letters(),  # pyright: ignore[reportArgumentType]
        reward=reward,
        **more,
    )


@pytest.mark.parametrize("order", ["abc", "cba", "bca"])
async def test_groups_come_in_the_order_of_the_prompts(order: str) -> None:
    sampler = Sampler(order)
    groups = await sample(sampler)
    assert [group.prompt for group in groups] == PROMPTS
    assert [[completion.text for completion in group.completions] for group in groups] == [
        ["aa"] * 2,
        ["bb"] * 2,
        ["cc"] * 2,
    ]
    assert all(completion.reward == 1 and completion.finished for group in groups for completion in group.completions)
    assert groups[0].prompt_tokens == (ord("a"),)
    assert {letter: params.seed for letter, params in sampler.asked.items()} == {"a": 7, "b": 8, "c": 9}
    params = sampler.asked["a"]
    assert (params.max_tokens, params.temperature, list(params.stop or ())) == (5, 0.7, [0])


async def test_all_are_in_flight_at_once_and_it_is_told() -> None:
    told: list[int] = []
    await sample(Sampler("abc"), on_in_flight=told.append)
    assert told == [1, 2, 3, 2, 1, 0]


async def test_rewards_are_computed_off_the_loop() -> None:
    threads: set[int] = set()

    def reward(prompt: Prompt, text: str) -> float:
        threads.add(threading.get_ident())
        return 0.0

    await sample(Sampler("abc"), reward=reward)
    assert threads
    assert threading.get_ident() not in threads


async def test_what_goes_wrong_comes_as_it_is() -> None:
    def reward(prompt: Prompt, text: str) -> float:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        await sample(Sampler("abc"), reward=reward)
    sampler = Sampler("abc")
    sampler.failing = "b"
    with pytest.raises(OperationFailedError):
        await sample(sampler)
    with pytest.raises(ProtocolError, match="no logprobs"):
        await sample(Sampler("abc", logprobs=False))
