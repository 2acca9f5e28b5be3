"""The losses against the real service process: both paths of each policy loss, and a preference that is learnt."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio

from fwasync import AsyncServiceClient, AsyncTrainingClient, types
from fwasync.local import LocalService, launch
from fwasync.losses import (
    POLICY_LOSSES,
    PolicyInputs,
    PolicyLoss,
    check_normalization,
    make_batch_dpo_loss_fn,
    make_batch_sft_loss_fn,
    policy_loss,
)

MODEL = "fwasync/qwen3-tiny"
LINEAR = types.AdamParams(learning_rate=1e7, beta1=0.0, beta2=0.0, eps=1e8)
"""Adam whose step is in proportion to the gradient: beside such an eps, the gradient's own size is nothing."""
MOVE = 3e-4
TEXTS = ["what is 2+2? it is 4", "what is 1+1? it is 2", "sort 312: 123 <tool> ok"]
PROMPTS, ADVANTAGES = [13, 13, 10], [1.0, -1.0, 0.5]
SETTINGS = {"grpo": {"kl_beta": 0}, "dapo": {"eps_clip_c": 1.05}}


def datum(index: int) -> types.Datum:
    tokens = list(TEXTS[index].encode())
    mask = [0.0 if index == 2 and 12 < j < 20 else 1.0 for j in range(len(tokens) - 1)]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tokens[1:],
            "loss_mask": types.TensorData.from_numpy(np.array(mask, np.float32)),
        },
    )


def carried(data: list[types.Datum], weight: float = 0.0) -> list[types.Datum]:
    def one(each: types.Datum) -> types.Datum:
        targets = each.loss_fn_inputs["target_tokens"]
        weights = types.TensorData.from_numpy(np.full(len(targets.data), weight, np.float32))
        return types.Datum(model_input=each.model_input, loss_fn_inputs={"target_tokens": targets, "weights": weights})

    return [one(each) for each in data]


async def logprobs(client: AsyncTrainingClient, data: list[types.Datum]) -> list[np.ndarray]:
    output = await client.forward(carried(data), "cross_entropy")
    return [record["logprobs"].to_numpy() for record in output.loss_fn_outputs]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def local() -> AsyncIterator[LocalService]:
    async with launch() as service:
        yield service


pytestmark = pytest.mark.asyncio(loop_scope="module")
DATA = [datum(index) for index in range(3)]


async def one_step(local: LocalService, loss: PolicyLoss, *, builtin: bool) -> tuple[float, float, list[np.ndarray]]:
    """Value, norm, and by how much each logprob changes in a step of a model that has moved from its old policy."""
    async with AsyncServiceClient(local.base_url, local.api_key) as service:
        async with service.create_training_client(MODEL, lora_rank=0, seed=1) as client:
            old_policy = await logprobs(client, DATA)
            sampler = [row + 0.1 * np.sin(np.arange(len(row))) for row in old_policy]
            inputs = PolicyInputs(ADVANTAGES, None, PROMPTS, sampler, old_policy)
            await client.forward_backward(carried([DATA[0], DATA[2]], 1.0), "cross_entropy")
            await client.optim_step(types.AdamParams(learning_rate=MOVE))
            moved = await logprobs(client, DATA)
            if builtin:
                built = loss.builtin(inputs, DATA)
                assert built is not None
                output = await client.forward_backward(built.datums, built.loss_fn, built.loss_fn_config)
            else:
                output = await client.forward_backward_custom(DATA, loss.custom(inputs))
                assert output.metrics["active_tokens"] > 0
            update = await client.optim_step(LINEAR, check_normalization(loss.reduction, "num_loss_tokens"))
            changes = [after - before for after, before in zip(await logprobs(client, DATA), moved, strict=True)]
            return output.metrics["loss:sum"], update.metrics["grad_norm"], changes


@pytest.mark.parametrize("name", sorted(set(POLICY_LOSSES) - {"reinforce", "decoupled"}))
async def test_both_paths_move_the_model_alike(local: LocalService, name: str) -> None:
    loss = policy_loss(name, SETTINGS.get(name))
    value, norm, changes = await one_step(local, loss, builtin=True)
    custom_value, custom_norm, custom_changes = await one_step(local, loss, builtin=False)
    assert custom_norm == pytest.approx(norm, rel=1e-3)
    assert custom_value == pytest.approx(value, rel=1e-4, abs=1e-4)
    assert max(np.abs(change).max() for change in changes) > 1e-2
    for one, other in zip(changes, custom_changes, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


async def test_dpo_learns_a_preference(local: LocalService) -> None:
    pair = [DATA[0], DATA[1]]
    start = len("what is ")
    async with AsyncServiceClient(local.base_url, local.api_key) as service:
        async with service.create_training_client(MODEL, lora_rank=0, seed=1) as client:
            chosen, rejected = await logprobs(client, pair)
            loss_fn = make_batch_dpo_loss_fn([chosen], [rejected], [start])
            margins = []
            for _ in range(5):
                output = await client.forward_backward_custom(pair, loss_fn)
                margins.append(output.metrics["margin"])
                await client.optim_step(
                    types.AdamParams(learning_rate=1e-3), check_normalization(loss_fn.reduction, "none")
                )
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert margins[-1] > margins[1] > 0


async def test_the_mean_of_the_client_is_the_normalised_sum_of_the_service(local: LocalService) -> None:
    norms = []
    async with AsyncServiceClient(local.base_url, local.api_key) as service:
        for custom in (True, False):
            async with service.create_training_client(MODEL, lora_rank=0, seed=1) as client:
                if custom:
                    await client.forward_backward_custom(DATA, make_batch_sft_loss_fn([1, 1, 1]))
                else:
                    await client.forward_backward(carried(DATA, 1.0), "cross_entropy")
                update = await client.optim_step(LINEAR, "none" if custom else "num_loss_tokens")
                norms.append(update.metrics["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
