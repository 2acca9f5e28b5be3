"""Token-in, token-out: what was sampled is what is trained on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwasync.errors import ProtocolError, RecoverableRolloutError, UsageError
from fwasync.rollout.context import Policy, RolloutContext
from fwasync.rollout.trajectory import Rollout, RolloutGroup, Segment, rewards_differ, rollout_datums
from fwasync.rollout.transcript import TokenTranscript
from fwasync.types import SampledSequence, SampleResponse

tokens = st.lists(st.integers(0, 999), max_size=4)


@given(st.lists(st.tuples(st.booleans(), tokens), max_size=6))
def test_the_mask_covers_exactly_what_was_sampled(parts: list[tuple[bool, list[int]]]) -> None:
    transcript = TokenTranscript()
    transcript.append([7])
    expected: list[tuple[int, float, bool, int]] = [(7, 0.0, False, -1)]
    for version, (sampled, part) in enumerate(parts):
        if sampled:
            transcript.append_sampled(part, [-1.0 - version] * len(part), version)
            expected += [(token, -1.0 - version, True, version) for token in part]
        else:
            transcript.append(part)
            expected += [(token, 0.0, False, -1) for token in part]
    assert transcript.tokens == [token for token, *_ in expected]
    if not any(mask for _, _, mask, _ in expected):
        with pytest.raises(UsageError, match="at least one that was sampled"):
            transcript.segment()
        return
    segment = transcript.segment()
    columns = (segment.tokens, segment.logprobs, segment.mask, segment.versions)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected


def test_what_cannot_be_trained_on_is_refused() -> None:
    transcript = TokenTranscript()
    with pytest.raises(UsageError, match="append a prompt first"):
        transcript.append_sampled([1], [-1.0], 0)
    transcript.append([1])
    with pytest.raises(ProtocolError, match="2 tokens and 1 logprobs"):
        transcript.append_sampled([1, 2], [-1.0], 0)
    with pytest.raises(UsageError, match="count from 0"):
        transcript.append_sampled([1], [-1.0], -1)
    transcript.append_sampled([2], [float("nan")], 0)
    with pytest.raises(UsageError, match="not a finite number"):
        transcript.segment()


def segment(*parts: tuple[list[int], list[float] | None]) -> Segment:
    transcript = TokenTranscript()
    for ids, logprobs in parts:
        if logprobs is None:
            transcript.append(ids)
        else:
            transcript.append_sampled(ids, logprobs, 0)
    return transcript.segment()


def test_datums_have_advantages_and_logprobs_where_the_target_was_sampled() -> None:
    turns = segment(([1, 2], None), ([3, 4], [-0.1, -0.2]), ([5], None), ([6], [-0.3]))
    group = RolloutGroup("row", 0, 0, (Rollout((turns, segment(([9], None), ([8], [-1.0]))), 1.0),), (0.5,))
    datums = rollout_datums([group], scale=2.0)
    assert [datum.model_input.to_ints() for datum in datums] == [[1, 2, 3, 4, 5], [9]]
    inputs = datums[0].loss_fn_inputs
    assert inputs["target_tokens"].to_numpy().tolist() == [2, 3, 4, 5, 6]
    np.testing.assert_allclose(inputs["logprobs"].to_numpy(), [0, -0.1, -0.2, 0, -0.3], rtol=1e-6)
    assert inputs["advantages"].to_numpy().tolist() == [0, 1, 1, 0, 1]
    assert datums[1].loss_fn_inputs["advantages"].to_numpy().tolist() == [1]
    assert "loss_mask" not in inputs
    (masked, _) = rollout_datums([group], include_loss_mask=True)
    assert masked.loss_fn_inputs["loss_mask"].to_numpy().tolist() == [0, 1, 1, 0, 1]


def test_rollouts_that_cannot_be_are_refused() -> None:
    good = segment(([1], None), ([2], [-1.0]))
    with pytest.raises(UsageError, match="at least one segment"):
        Rollout((), 0.0)
    with pytest.raises(UsageError, match="reward of a rollout is nan"):
        Rollout((good,), float("nan"))
    with pytest.raises(UsageError, match="lengths"):
        Segment(good.tokens, good.logprobs[:1], good.mask, good.versions)
    with pytest.raises(UsageError, match="array of bool"):
        numbers: Any = good.mask.astype(np.int64)  # which would be taken for places
        Segment(good.tokens, good.logprobs, numbers, good.versions)
    with pytest.raises(UsageError, match="without a version"):
        Segment(good.tokens, good.logprobs, good.mask, np.full(2, -1, np.int32))


def test_groups_whose_rewards_are_equal_have_nothing_to_teach() -> None:
    good = segment(([1], None), ([2], [-1.0]))
    rollouts = [Rollout((good,), reward) for reward in (1.0, 1.0, 0.0)]
    assert not rewards_differ(RolloutGroup("row", 0, 0, tuple(rollouts[:2]), (0.0, 0.0)))
    assert rewards_differ(RolloutGroup("row", 0, 0, tuple(rollouts), (0.0, 0.0, 0.0)))


class Client:
    """A sampling client: what it says depends on how often it was asked."""

    def __init__(self, *, logprobs: bool = True) -> None:
        self.asked: list[tuple[list[int], Any]] = []
        self.logprobs = logprobs

    async def sample(self, prompt: Any, num_samples: int = 1, sampling_params: Any = None) -> SampleResponse:
        self.asked.append((prompt.to_ints(), sampling_params))
        number = len(self.asked)
        sequence = SampledSequence(
            stop_reason="stop" if number == 1 else "length",
            sequence_id="s",
            tokens_np=np.array([100 + number, 0], np.int32),
            logprobs_np=np.array([-0.5, -0.25], np.float32) if self.logprobs else None,
        )
        return SampleResponse(sequences=[sequence])


class Deployment:
    def __init__(self, tokens: list[int] | None = None) -> None:
        self.tokens = [5, 6] if tokens is None else tokens
        self.asked: list[dict[str, Any]] = []

    async def sample_with_prompt_tokens(self, prompt_token_ids: Any, n: int = 1, **options: Any) -> list[Any]:
        self.asked.append({"prompt": list(prompt_token_ids), "n": n, **options})
        logprobs = [-1.0] * len(self.tokens) or None
        return [SimpleNamespace(completion_tokens=self.tokens, inference_logprobs=logprobs, finish_reason="length")]


def context(sampler: Any, versions: list[int]) -> RolloutContext:
    tokenizer = SimpleNamespace(stop_tokens=[0], decode=lambda ids: "-".join(map(str, ids)))
    return RolloutContext(
        row_index=0,
        rollout_index=0,
        attempt=0,
        seed=1,
        deadline=10.0,
        tokenizer=tokenizer,
        policy=lambda: Policy(sampler, versions.pop(0)),
        note=lambda doing: None,
    )


async def test_a_conversation_across_a_weight_sync_knows_the_version_of_every_token() -> None:
    client = Client()
    session = context(client, [3, 4]).session()
    session.append([1, 2])
    first = await session.sample(max_tokens=4)
    session.append([50])
    second = await session.sample(max_tokens=4, temperature=0.5, stop=[9])
    assert (first.text, first.finished, second.finished) == ("101-0", True, False)
    assert [prompt for prompt, _ in client.asked] == [[1, 2], [1, 2, 101, 0, 50]]
    params = [asked for _, asked in client.asked]
    assert params[0].stop == [0]
    assert (params[1].stop, params[1].temperature) == ([9], 0.5)
    assert params[0].seed != params[1].seed
    rollout = session.rollout(1.0, metrics={"calls": 1.0})
    assert rollout.segments[0].versions.tolist() == [-1, -1, 3, 3, -1, 4, 4]
    assert rollout.sampled_tokens == 4
    assert rollout.truncated
    assert rollout.text == "102-0"


async def test_a_deployment_is_sampled_from_in_the_same_way() -> None:
    deployment = Deployment()
    session = context(deployment, [0]).session()
    session.append([1])
    turn = await session.sample(max_tokens=2)
    assert turn.tokens == (5, 6)
    assert not turn.finished
    (asked,) = deployment.asked
    assert (asked["prompt"], asked["n"], asked["logprobs"], asked["stop"]) == ([1], 1, True, [0])


async def test_a_policy_that_says_nothing_loses_the_rollout_and_not_the_run() -> None:
    session = context(Deployment([]), [0, 0]).session()
    with pytest.raises(UsageError):
        session.rollout(1.0)
    session.append([1])
    assert (await session.sample(max_tokens=2)).tokens == ()
    with pytest.raises(RecoverableRolloutError, match="without a token"):
        session.rollout(1.0)


async def test_a_sampler_without_logprobs_is_found_out() -> None:
    session = context(Client(logprobs=False), [0]).session()
    with pytest.raises(UsageError, match="nothing to sample from"):
        await context(Client(), [0]).session().sample(max_tokens=1)
    session.append([1])
    with pytest.raises(ProtocolError, match="no logprobs"):
        await session.sample(max_tokens=1)
