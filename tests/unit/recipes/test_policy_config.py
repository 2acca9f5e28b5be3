"""The configuration of policy recipes: the cookbook's defaults, and everything that is refused before the start."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from fwasync.errors import UsageError
from fwasync.losses import POLICY_LOSSES, check_normalization
from fwasync.recipes import rl

SHAPE = "accounts/fireworks/trainingShapes/s"


def config(**settings: Any) -> rl.Config:
    return rl.Config.model_validate({"log_path": "run", "dataset": "d", **settings})


def test_the_defaults_can_be_run() -> None:
    config().check()
    with pytest.raises(pydantic.ValidationError, match="did you mean 'completions_per_prompt'"):
        config(completion_per_prompt=3)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"policy_loss": "grppo"}, "there is no policy loss 'grppo'; did you mean 'grpo'?"),
        ({"infra": {"training_shape_id": SHAPE}}, "tokenizer_model is empty; name it"),
        ({"router_replay": True}, "trainers are sent no routing matrices, and choose"),
        ({"batch_size": 8}, "batch_size is set; a step's size is prompt_groups_per_step times"),
        ({"deployment": {"deployment_id": "d"}}, "only a trainer job's weights are synced: set infra too"),
        ({"dcp_save_interval": 2, "weight_sync": {"dcp_save_interval": 3}}, "differ; set one of them"),
        ({"policy_loss": "dapo", "kl_beta": 0.1}, "kl_beta is 0.1: dapo has no term for it. Set it to 0."),
        ({"infra": {"training_shape_id": SHAPE}, "kl_beta": 0.1}, "infra.ref_training_shape_id is not set. Set it to"),
        (
            {"infra": {"training_shape_id": SHAPE, "ref_training_shape_id": SHAPE}, "kl_beta": 0},
            "nothing asks a reference",
        ),
        ({"grad_accumulation_normalization": "tokens"}, "must be one of num_loss_tokens, num_sequences, none"),
        ({"policy_loss": "reinforce", "tis": {"cap": 2}}, "takes no TIS weights"),
        ({"loss_path": "builtin"}, "loss_path is 'builtin': kl_beta is 0.001, and kernels know of no reference"),
        ({"loss_path": "builtin", "policy_loss": "decoupled"}, "services have no kernel of decoupled"),
        (
            {"loss_path": "builtin", "policy_loss": "dro", "tis": {"icepop_threshold": 2.0}},
            "tis can give tokens the weight 0",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        config(**settings).check()
    assert told in str(caught.value)


def test_a_default_that_has_no_place_is_left_out_and_told() -> None:
    assert config(policy_loss="dapo").beta == 0
    assert config(policy_loss="dapo").notes() == ["no KL penalty: dapo has no term for it"]
    launched = {"infra": {"training_shape_id": SHAPE}, "deployment": {"tokenizer_model": "t"}}
    config(**launched).check()
    told = ["no KL penalty: there is no reference, as infra.ref_training_shape_id is not set"]
    assert (config(**launched).beta, config(**launched).notes()) == (0, told)
    assert config(**launched, lora_rank=8).beta == 0.001
    assert config().notes() == [
        "the loss is computed here, which takes a forward pass more: kl_beta is 0.001, and kernels know of no reference"
    ]
    assert config(kl_beta=0).notes() == config(loss_path="custom").notes() == []


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_settings_reach_their_loss(name: str) -> None:
    loss = config(policy_loss=name, kl_beta=0).loss()
    assert loss.name == name
    assert config(policy_loss=name, kl_beta=0).is_builtin(loss) == (name not in ("reinforce", "decoupled"))
    assert not config(policy_loss=name, kl_beta=0, loss_path="custom").is_builtin(loss)
    assert config(policy_loss=name).asks_old_policy == (name not in ("reinforce", "decoupled"))
    assert not config(policy_loss=name, anchor_logp="rollout").asks_old_policy
    check_normalization(loss.reduction, config().grad_accumulation_normalization)


def test_a_clip_of_zero_is_a_clip_of_zero() -> None:
    kernel = config(kl_beta=0, eps_clip=0.1, eps_clip_high=0.0).loss().kernel
    assert kernel is not None
    assert (kernel.loss_fn, dict(kernel.config)) == ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.0})
    kernel = config(policy_loss="importance_sampling", ratio_log_cap=3.0).loss().kernel
    assert kernel is not None
    assert dict(kernel.config) == {"ratio_log_cap": 3.0}


def test_the_interval_of_checkpoints_may_be_set_in_either_place() -> None:
    assert config(dcp_save_interval=3).checkpoint_interval == 3
    assert config(weight_sync={"dcp_save_interval": 4}).checkpoint_interval == 4
    assert config(dcp_save_interval=3, weight_sync={"dcp_save_interval": 3}).checkpoint_interval == 3
    config(dcp_save_interval=3, weight_sync={"dcp_save_interval": 3}).check()


RECIPES = {"sft": None, "dpo": None, "orpo": None, "rl": "num_loss_tokens", "async_rl": "num_loss_tokens"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_each_recipe_divides_by(recipe: str) -> None:
    """The table of recipe defaults in the cookbook's reference."""
    try:
        module = __import__(f"fwasync.recipes.{recipe}", fromlist=["Config"])
    except ModuleNotFoundError:
        pytest.skip("there is no such recipe yet")
    field = module.Config.model_fields.get("grad_accumulation_normalization")
    assert (None if field is None else field.default) == RECIPES[recipe]
