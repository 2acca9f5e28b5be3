"""Where a recipe trains, on services that have less than a trainer job has."""

from __future__ import annotations

from pathlib import Path

import pytest

from fwasync import AsyncServiceClient
from fwasync.errors import BadRequestError
from fwasync.recipes import dpo
from fwasync.recipes.trainers import Where
from support.fake_trainer import KEY, FakeTrainer, answer


def settings(tmp_path: Path, lora_rank: int) -> dpo.Config:
    return dpo.Config(log_path=tmp_path / "run", dataset="d", base_model="base", lora_rank=lora_rank)


class AdaptersOnly(FakeTrainer):
    """A service that makes no model without an adapter."""

    def _plain(self, path, body):
        if path == "create_model" and "lora_config" not in body:
            return answer(422, {"detail": "lora_config is missing"})
        return super()._plain(path, body)


async def test_the_reference_is_the_base_model(tmp_path: Path) -> None:
    trainer = FakeTrainer()
    async with AsyncServiceClient("http://trainer.test", KEY, transport=trainer) as service:
        async with Where(service=service).open(settings(tmp_path, 8), reference=True) as trainers:
            assert trainers.reference is not None
    policy, reference = (sent.body for sent in trainer.sent if sent.path == "create_model")
    assert (policy["lora_config"]["rank"], reference["base_only"]) == (8, True)


async def test_where_there_are_adapters_only_the_reference_is_one_that_nothing_trains(tmp_path: Path) -> None:
    trainer = AdaptersOnly()
    async with AsyncServiceClient("http://trainer.test", KEY, transport=trainer) as service:
        async with Where(service=service).open(settings(tmp_path, 8), reference=True) as trainers:
            assert trainers.reference is not None
            assert trainers.reference is not trainers.policy
    policy, refused, reference = (sent.body for sent in trainer.sent if sent.path == "create_model")
    assert refused["base_only"] is True
    assert (reference["lora_config"]["rank"], reference.get("base_only")) == (8, None)
    assert policy["model_seq_id"] != reference["model_seq_id"]


async def test_a_full_policy_has_no_such_reference(tmp_path: Path) -> None:
    async with AsyncServiceClient("http://trainer.test", KEY, transport=AdaptersOnly()) as service:
        with pytest.raises(BadRequestError, match="lora_config is missing"):
            async with Where(service=service).open(settings(tmp_path, 0), reference=True):
                raise AssertionError
