"""The real tinker clients train, sample, save and list on the local service, unchanged: the newest, and the last that
speaks JSON only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

# One installation from the network may be among it.
pytestmark = pytest.mark.timeout(1200)

MODEL = "fwasync/qwen3-tiny"


@pytest.fixture(scope="module", params=["newest", "older"])
def python(request: pytest.FixtureRequest) -> str:
    """The interpreter that has the client."""
    return sys.executable if request.param == "newest" else request.getfixturevalue("older_python")


@pytest.fixture(scope="module")
def facts(python: str, drive: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What one process saw in all its scenarios."""
    return drive(python)


@pytest.fixture
def newest(python: str) -> bool:
    return python == sys.executable


def of(facts: dict[str, Any], scenario: str) -> dict[str, Any]:
    seen = facts[scenario]
    assert "broken" not in seen, seen["broken"]
    return seen


def test_the_client_is_the_one_that_was_meant(facts, newest):
    assert (facts["version"] == "0.15.0") is not newest


def test_it_learns_one_sentence(facts):
    seen = of(facts, "learning")
    assert len(seen["losses"]) == 10
    assert seen["losses"][-1] < seen["losses"][0] / 2
    assert all(norm > 0 for norm in seen["norms"])
    assert (seen["base_model"], seen["lora_rank"]) == (MODEL, 8)


def test_it_finds_the_tokenizer(facts):
    seen = of(facts, "learning")
    assert (seen["bytes"], seen["text"]) == (list("hé".encode()), "Hello world!")


def test_policy_losses_agree_with_their_formulas_at_ratio_one(facts):
    seen = of(facts, "policy_losses")
    for loss_fn in ("importance_sampling", "ppo"):
        assert seen[loss_fn]["loss"] == pytest.approx(seen["expected"], abs=1e-4)
    for loss_fn in ("importance_sampling", "ppo", "cispo", "dro"):
        assert seen[loss_fn]["logprobs"] == pytest.approx(seen["expected_logprobs"], abs=1e-5)
    assert seen["grad_norm"] > 0


def test_a_loss_of_its_own(facts, newest):
    seen = of(facts, "custom_loss")
    surrogate = seen["metrics"]["surrogate_loss:sum" if newest else "loss:sum"]
    assert surrogate == pytest.approx(seen["surrogate"], rel=1e-4)
    if newest:
        assert seen["metrics"]["loss:sum"] == pytest.approx(seen["expected"], rel=1e-4)
    assert seen["metrics"]["squares:mean"] == pytest.approx(seen["expected"], rel=1e-4)
    assert seen["improved"]


def test_several_targets_for_a_token_and_most_of_them_zero(facts, newest):
    seen = of(facts, "soft_targets")
    assert seen["sparse"] is newest
    assert seen["shape"] == [11, 8]
    assert seen["column"] == pytest.approx(seen["expected"], abs=1e-5)
    assert seen["loss"] == pytest.approx(-1.5 * sum(seen["expected"]), rel=1e-4)


def test_more_datums_than_one_request_takes(facts):
    seen = of(facts, "many_datums")
    assert seen["lengths_fit"]
    first, last = seen["first_and_last"]
    assert first == pytest.approx(last, abs=1e-5)
    assert seen["tokens"] == 515 + 2 * 515


def test_failed_operations_are_told_and_the_next_one_works(facts, newest):
    seen = of(facts, "failures")
    expected = {
        "failed": "token id 100000 at position 1 is outside the vocabulary",
        "option": "has no setting 'nonsense'",
        "load": "weights for a sampler",
    }
    for name, text in expected.items():
        category, message = seen[name]
        assert "user" in category.lower()
        assert text in message
    if newest:
        assert "unknown loss_fn 'nonsense'" in seen["refused"]
    assert seen["goes_on"] == 11


def test_state_is_saved_and_goes_on_bit_for_bit(facts):
    seen = of(facts, "checkpoints")
    assert seen["path"].startswith("tinker://")
    assert seen["resumed"] == seen["expected"]
    assert seen["at_load"] == seen["weights_only"] == seen["at_save"]
    assert seen["elsewhere"] == seen["expected"]
    assert seen["weights_only_differs_later"]
    assert seen["rank"] == 8
    model_id, path = seen["saved_by_new"]
    assert path == f"tinker://{model_id}/weights/second"


def test_samples_have_the_logprobs_of_the_trainer(facts):
    seen = of(facts, "sampling")
    assert (seen["count"], seen["different"]) == (4, 4)
    assert seen["worst"] < 1e-4
    assert set(seen["reasons"]) <= {"length", "stop"}


def test_seeds_stops_and_temperature(facts):
    seen = of(facts, "sampling")
    assert seen["repeats"]
    assert seen["greedy"] == 1
    cut, free, stop = seen["stopped"]
    assert cut == free[: free.index(stop) + 1]
    assert seen["stop_text"]
    assert set(seen["without_stops"]) == {"length"}


def test_prompts_are_scored(facts, newest):
    seen = of(facts, "sampling")
    for scored in (seen["scored"], *([seen["cloned"], seen["after_abandoning"]] if newest else [])):
        assert scored[0] is None
        assert scored[1:] == pytest.approx(seen["expected"], abs=1e-4)
    assert seen["prompt_logprobs"][0] is None
    assert seen["prompt_logprobs"][1:] == pytest.approx(seen["expected"][:5], abs=1e-4)
    assert [len(entry or ()) for entry in seen["topk"]] == [0, 3, 3, 3, 3, 3]
    assert all(entry == sorted(entry, key=lambda pair: -pair[1]) for entry in seen["topk"][1:])
    if newest:
        assert seen["last_n"][:10] == [None] * 10
        assert seen["last_n"][10:] == pytest.approx(seen["expected"][-2:], abs=1e-4)


def test_snapshots_are_sampled_by_their_path(facts):
    seen = of(facts, "sampling")
    assert seen["named"].endswith("/sampler_weights/snap")
    by_path, expected = seen["same_weights"]
    assert by_path == [expected, expected]
    assert seen["base_differs"]
    assert seen["base_model"] == MODEL


def test_a_hundred_samples_at_once(facts, newest):
    seen = of(facts, "sampling")
    assert seen["concurrent"] == 100
    if newest:
        assert seen["names"] == 4
        assert seen["abandoned"] == "given up"


def test_runs_and_checkpoints_are_listed_and_deleted(facts):
    seen = of(facts, "listings")
    assert seen["kinds"] == ["sampler sampler_weights/shown", "training weights/kept"]
    assert seen["after_delete"] == [seen["kept"]]
    assert (seen["run"], seen["info"]) == ([MODEL, True, 8], [MODEL, 8, True])
    assert seen["runs"] == [3, True]
    for name in (
        "newest",
        "by_path",
        "last",
        "sized",
        "expire",
        "listed",
        "deleted_is_gone",
        "session_has",
        "sessions",
    ):
        assert seen[name] is True, name
    assert seen["sampler"] == MODEL
    assert MODEL in seen["models"]


def test_the_client_has_nothing_to_complain_about(facts):
    deprecated = [text for text in facts["complaints"] if "DEPRECATED: TrainingClient.load_state" in text]
    assert facts["complaints"] == deprecated


def test_the_session_is_finished(facts, newest):
    assert facts.get("closed") == ({"result": None} if newest else None)


def test_telemetry_is_accepted(python, drive):
    assert drive(python, "drive_telemetry.py", TINKER_TELEMETRY="1") == {"logged": True, "complaints": []}
