"""The real Fireworks training SDKs run on the local service, unchanged: the newest, and that of the first cookbooks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

# One installation from the network may be among it.
pytestmark = pytest.mark.timeout(1200)

SHAPE = "accounts/fwasync/trainingShapes/qwen3-tiny/versions/v1"
DEPLOYMENT_SHAPE = "accounts/fwasync/deploymentShapes/qwen3-tiny/versions/v1"
CLOSE = 1e-4
"""How far the logprobs of a sampler may be from the trainer's."""


Drive = Callable[[str], dict[str, Any]]
Of = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def newest_facts(fireworks_python: str, drive_fireworks: Drive) -> dict[str, Any]:
    """What one process saw in all its scenarios."""
    return drive_fireworks(fireworks_python)


@pytest.fixture(scope="module")
def older_facts(older_python: str, drive_fireworks: Drive) -> dict[str, Any]:
    return drive_fireworks(older_python)


@pytest.fixture(params=["newest", "older"])
def facts(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.getfixturevalue(f"{request.param}_facts")


@pytest.fixture
def newest(facts: dict[str, Any]) -> bool:
    return "managed" in facts


def seen_in(facts: dict[str, Any], scenario: str) -> dict[str, Any]:
    seen = facts[scenario]
    assert "broken" not in seen, seen["broken"]
    return seen


@pytest.fixture
def of(facts: dict[str, Any]) -> Of:
    """What was seen in a scenario."""
    return partial(seen_in, facts)


@pytest.fixture
def of_newest(newest_facts: dict[str, Any]) -> Of:
    """What was seen in a scenario of what the newest alone can do."""
    return partial(seen_in, newest_facts)


def test_the_sdk_is_the_one_that_was_meant(facts, newest):
    assert facts["version"] == ("1.2.30" if newest else "1.0.0a53")


# -- the control plane -----------------------------------------------------------------------------


def test_it_finds_its_account_and_the_shapes(of, newest):
    seen = of("account")
    assert seen["id"] == "local"
    assert (seen["shape"], seen["deployment_shape"], seen["context"]) == (SHAPE, DEPLOYMENT_SHAPE, 512)
    assert "401" in seen["wrong_key"][1]
    assert seen["no_shape"][0] == "RuntimeError"
    if newest:
        assert (seen["again"], seen["modes"]) == (SHAPE, ["LORA_TRAINER", "FORWARD_ONLY"])
        assert seen["moe"] is False


def test_a_job_is_created_once_waited_for_and_found(of, newest):
    seen = of("job_lives")
    assert seen["named"] == [True, "lives"]
    assert seen["same_url"]
    if newest:
        assert seen["again"]  # the second request was answered by 409
        assert seen["unknown"] is None


def test_a_cancelled_job_is_resumed_and_goes_on_from_its_checkpoint(of):
    seen = of("job_lives")
    assert seen["cancelled"] == "JOB_STATE_CANCELLED"
    assert seen["fresh"]
    assert seen["listed"] == ["half-way"]
    assert seen["resumed"]
    assert seen["reconnected"]


def test_a_job_that_fails_says_why(of):
    kind, text = of("job_lives")["failed"]
    assert kind == "RuntimeError"
    assert "base model 'accounts/acme/models/unknown' is unknown" in text


def test_a_deleted_job_stays_to_be_read_and_its_id_is_not_given_again(of, newest):
    seen = of("job_lives")
    assert seen["deleted"] == "JOB_STATE_DELETED"
    if newest:
        assert seen["hidden"] == [False, True]
        for name in ("not_again", "gone"):
            kind, text = seen[name]
            assert kind == "RuntimeError"
            assert "archived" in text


def test_a_deployment_is_created_warmed_scaled_and_deleted(of):
    seen = of("deployment_lives")
    assert (seen["state"], seen["model"]) == ("READY", "accounts/local/deployments/lives")
    assert seen["again"] and seen["bucket"] and seen["warm"]
    assert seen["none"] is seen["deleted"] is None
    assert seen["no_model"] == "HTTPStatusError"
    assert seen["replicas"] == []
    assert seen["recreated"] == "CREATING"


def test_a_deployment_follows_another_job(of_newest):
    seen = of_newest("deployment_lives")
    assert (seen["of_first"], seen["of_second"]) == ("one", "two")
    assert seen["moved"]
    assert seen["clean"] is None
    assert seen["updated"] == "SYNC"


# -- training, syncing, sampling, promoting --------------------------------------------------------


def test_a_base_and_a_delta_are_hot_loaded_and_sampled_from(of):
    seen = of("full_parameters")
    assert seen["losses"][1] < seen["losses"][0]
    *loaded, distance = seen["base"]
    assert loaded == [True, True]
    assert distance < CLOSE
    *served, distance = seen["delta"]
    assert served == [True, True]
    assert distance < CLOSE


def test_samples_are_as_they_were_asked_for(of):
    seen = of("full_parameters")["sampling"]
    count, different = seen["count"]
    assert count == 5
    assert different > 1  # two of them may well be the same: nothing fixes what is drawn
    for whole, completion, logprobs in seen["lengths"]:
        assert whole == 6 + completion
        assert logprobs == completion <= 8
    assert set(seen["reasons"]) <= {"length", "stop"}
    assert seen["prompted"] and seen["repeats"]
    greedy, stop, stopped, reason = seen["greedy"]
    assert greedy == greedy[:1] * 3
    assert stopped == greedy[0][: greedy[0].index(stop, 6) + 1]
    assert reason == "stop"
    assert seen["too_long"] == [0, 0]


def test_an_echo_has_the_logprobs_of_the_trainer(of):
    echoed, distance = of("full_parameters")["sampling"]["echo"]
    assert echoed
    assert distance < CLOSE


def test_samplers_are_throttled_and_measured(of, newest):
    seen = of("full_parameters")["sampling"]
    if newest:
        assert seen["metrics"] == [6, [6]]
        window, average = seen["window"]
        assert window == 4
        assert average == pytest.approx(sum(seen["queued"]) / 6)
        assert min(seen["queued"]) >= 0


def test_prompts_are_given_as_tokens(of_newest):
    seen = of_newest("token_prompts")
    assert seen["attempts"] == 1
    assert seen["unasked"] == [None] * 4
    assert seen["prompt_tokens"] == 6


def test_a_snapshot_is_promoted_after_its_job_was_deleted(of, newest):
    seen = of("full_parameters")["promotion"]
    assert seen["model"] == ["accounts/local/models/promoted", "READY", "HF_BASE_MODEL"]
    assert "saved as a delta" in seen["delta"][1]
    assert "exists already" in seen["taken"][1]
    assert seen["differs"]
    if newest:
        base, delta = seen["names"]
        assert seen["rows"] == [
            [base, "CHECKPOINT_TYPE_INFERENCE_BASE", True],
            [delta, "CHECKPOINT_TYPE_INFERENCE_ARC_V2", False],
        ]


def test_an_adapter_is_synced_in_full_each_time(of, newest):
    seen = of("lora")
    assert seen["losses"][1] < seen["losses"][0]
    for *served, distance in seen["far"]:
        assert served == [True, True]
        assert distance < CLOSE
    if newest:
        assert seen["types"] == ["CHECKPOINT_TYPE_INFERENCE_BASE"] * 2


def test_the_rank_of_a_model_fits_its_job(of):
    seen = of("lora")
    for refused in (seen["wider"], seen["full"]):
        assert refused[0] == "BadRequestError"
        assert "trains LoRA adapters of a rank up to 8" in refused[1]
    assert "trains all parameters" in of("full_is_not_lora")["refused"][1]


def test_a_base_model_is_the_reference_of_its_adapters(of_newest):
    seen = of_newest("lora")
    assert seen["reference"] == 0.0
    assert "base-only reference" in seen["frozen"][1]


def test_a_reference_job_is_not_trained(of):
    seen = of("forward_only")
    assert seen["scores"]
    for name in ("backward", "optim_step"):
        kind, text = seen[name]
        assert kind == "BadRequestError"
        assert "is forwardOnly" in text


def test_a_deployment_comes_first(of):
    seen = of("deployment_first")
    assert seen["loaded"]
    assert seen["far"] < CLOSE
    assert seen["timed"] == ["hotload_time_s", "warmup_time_s"]


def test_checkpoints_go_on_bit_for_bit_also_in_another_job(of):
    seen = of("checkpoints")
    assert seen["path"] == "kept"
    assert seen["at_load"] and seen["elsewhere"]
    assert seen["goes_on"] == [True, True]
    assert seen["listed"] == [["kept"], []]
    assert "has saved no checkpoint 'kept'" in seen["unknown"][1]


# -- managed provisioning --------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
def test_a_managed_service_trains_syncs_samples_and_cleans_up(of_newest, rank):
    seen = of_newest("managed_lora" if rank else "managed")
    assert seen["ids"] == [f"managed-{rank}", DEPLOYMENT_SHAPE, 512]
    # Without an adapter that could be left out, the reference is a job of its own.
    assert seen["apart"] == [rank == 0, True]
    assert ("base-only" if rank else "forwardOnly") in seen["frozen"][1]
    assert len(seen["far"]) == 3
    assert max(map(max, seen["far"])) < CLOSE
    drawn = seen["drawn"]
    assert (drawn["greedy"], drawn["only"]) == ([[0.0] * 4], [[0.0] * 4] * 2)
    for name in ("warm", "few", "nucleus"):
        assert drawn[name]["kinds"] > 1
        assert drawn[name]["far"] < CLOSE < drawn[name]["own"]
    assert seen["synced"] and seen["resumed"]
    kinds = {"INFERENCE_BASE", "TRAINING_LORA"} if rank else {"INFERENCE_BASE", "INFERENCE_ARC_V2", "TRAINING"}
    assert set(seen["rows"]) == {f"CHECKPOINT_TYPE_{kind}" for kind in kinds}
    assert seen["after"] == ["JOB_STATE_DELETED"] * (1 if rank else 2)
    assert seen["deployment"] is None


def test_adapters_of_several_ranks_share_a_trainer(of_newest):
    seen = of_newest("shared_trainer")
    assert seen["job_rank"] == 16
    for losses in seen["losses"]:
        assert losses[1] < losses[0]


# -- side by side ----------------------------------------------------------------------------------


def test_our_client_of_recipes_takes_their_manager(of_newest):
    seen = of_newest("our_client_of_their_manager")
    assert seen["same"]
    assert seen["losses"][1] < seen["losses"][0]


# -- complaints ------------------------------------------------------------------------------------

EXPECTED = (
    "gradient_accumulation_steps=1 is deprecated",  # which its own managed service sends
    "hot_load_deployment_id is deprecated",
    "Deployment creation failed (HTTP 400)",  # as it was meant to
    "'WeightSyncer' object has no attribute '_get_model'",  # a fault of the older one
)


def test_the_sdk_has_nothing_else_to_complain_about(facts):
    assert [text for text in facts["complaints"] if not any(known in text for known in EXPECTED)] == []
