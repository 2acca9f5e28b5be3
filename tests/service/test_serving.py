"""The seam between recipes and samplers on the local service, in both ways: what is published is what is sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fwasync import DeployConfig, InfraConfig, types
from fwasync.local import launch
from fwasync.recipes.config import RecipeConfig
from fwasync.recipes.serving import serve_policy
from fwasync.recipes.trainers import Where
from service.control_client import BASE, SHAPE

PROMPT = list(b"ab")
DATUM = types.Datum(
    model_input=types.ModelInput.from_ints(list(b"abccccccc")),
    loss_fn_inputs={"target_tokens": list(b"bcccccccc"), "weights": [0.0] + [1.0] * 8},
)


@pytest.mark.parametrize("way", ["a service", "a deployment"])
async def test_what_is_published_is_sampled(tmp_path: Path, way: str) -> None:
    deployed = way == "a deployment"
    config = RecipeConfig(
        log_path=tmp_path / "run",
        base_model=BASE if deployed else "fwasync/qwen3-tiny",
        infra=InfraConfig(training_shape_id=SHAPE) if deployed else InfraConfig(),
    )
    deploy = DeployConfig(replica_count=2) if deployed else None
    async with (
        launch(tmp_path / "service") as local,
        Where(local.base_url, local.api_key).open(config, deploy=deploy) as trainers,
        serve_policy(trainers, deploy=deploy) as served,
    ):
        assert local.api_key not in repr(trainers)
        assert served.version == (0 if deployed else None)
        if not deployed:
            await served.publish(0)

        async def sample() -> list[Any]:
            return await served.sample_with_prompt_tokens(PROMPT, 3, max_tokens=8, seed=11)

        first, again = await sample(), await sample()
        assert [each.full_tokens for each in first] == [each.full_tokens for each in again]
        assert len({tuple(each.completion_tokens) for each in first}) == 3
        for _ in range(30):
            trainers.policy.forward_backward([DATUM])
            await trainers.policy.optim_step(types.AdamParams(learning_rate=1e-2))
        await served.publish(30)
        assert served.version == 30
        learnt = await sample()
        assert all(bytes(each.completion_tokens[:4]) == b"cccc" for each in learnt)
        # The sampler's logprobs are the trainer's.
        tokens = learnt[0].full_tokens
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]),
            loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
        )
        told = (await trainers.policy.forward([datum])).loss_fn_outputs[0]["logprobs"].to_numpy()
        assert learnt[0].inference_logprobs == pytest.approx(told[len(PROMPT) - 1 :].tolist(), abs=1e-4)
