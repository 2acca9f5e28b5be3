"""A trainer and a deployment in memory, which know of all weights what they are and what a delta was made from."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from fwasync import errors
from fwasync.weights.hot_load import ReplicaState

ONCE = "-0a1b2c3d"


@dataclass(frozen=True)
class Saved:
    snapshot_name: str
    kind: str
    made_from: str | None


class Trainer:
    """Saves snapshots; a save that was sent takes effect, also if the wait for it is cancelled."""

    def __init__(self, latency: float = 0.0, *, lora_rank: int | None = 0) -> None:
        self.latency = latency
        self.lora_rank = lora_rank
        self.snapshot_epoch = 0
        self.saved: dict[str, Saved] = {}
        self.last: str | None = None
        self.fails = False

    async def save_weights_for_sampler_ext(self, name: str, checkpoint_type: str = "base") -> Saved:
        await asyncio.sleep(self.latency)
        if self.fails:
            raise errors.OperationFailedError("disk full")
        full = name + ONCE
        assert full not in self.saved, "a name was used twice"
        made_from = self.last if checkpoint_type == "delta" else None
        self.saved[full] = saved = Saved(full, checkpoint_type, made_from)
        self.last = full
        await asyncio.sleep(self.latency)
        return saved

    @property
    def kinds(self) -> list[str]:
        return [saved.kind for saved in self.saved.values()]


class Deployment:
    """Two replicas that take whatever they are told to: a wrong delta is not refused here, it fails the test."""

    def __init__(self, trainer: Trainer, *, latency: float = 0.0, looks: int = 2) -> None:
        self.trainer = trainer
        self.latency = latency
        self.looks = looks
        self.serving: list[str | None] = [None, None]
        self.target: str | None = None
        self.pending: list[int] = []
        self.stage = "idle"
        self.loads: list[tuple[str, str | None]] = []
        self.warm = 0
        self.cold = 0
        self.breaks: str | None = None
        self.absent = 0

    async def hotload(
        self,
        deployment_id: str,
        base_model: str,
        snapshot_identity: str,
        *,
        previous_snapshot_identity: str | None,
        compression_format: str,
        reset_prompt_cache: bool,
    ) -> None:
        await asyncio.sleep(self.latency)
        if self.breaks == "refused":
            raise errors.BadRequestError("no", status=400)
        saved = self.trainer.saved.get(snapshot_identity, Saved(snapshot_identity, "base", None))
        assert previous_snapshot_identity == saved.made_from
        if saved.kind == "delta":
            assert self.serving == [saved.made_from] * 2, "a delta was loaded onto what it was not made from"
        self.loads.append((snapshot_identity, previous_snapshot_identity))
        self.target = snapshot_identity
        self.stage = "error" if self.breaks == "error" else "loading"
        self.pending = [self.looks * (index + 1) for index in range(2)]
        await asyncio.sleep(self.latency)
        if self.breaks == "answer lost":
            raise errors.RetryBudgetExhaustedError("no answer")

    async def hotload_check_status(self, deployment_id: str, base_model: str) -> list[ReplicaState]:
        await asyncio.sleep(self.latency)
        if self.absent:
            self.absent -= 1
            return []
        if self.breaks == "status":
            raise errors.ServiceUnavailableError("down", status=503)
        if self.stage == "loading" and self.breaks != "stuck":
            self.pending = [looks - 1 for looks in self.pending]
            self.serving = [
                self.target if left <= 0 else served for served, left in zip(self.serving, self.pending, strict=True)
            ]
            self.stage = "idle" if self.pending[-1] <= 0 else "loading"
        return [
            ReplicaState(f"pod-{index}", served, True, self.stage, self.target, "broken" * (self.stage == "error"))
            for index, served in enumerate(self.serving)
        ]

    async def warm_up(self, deployment_id: str) -> bool:
        await asyncio.sleep(self.latency)
        self.warm += 1
        return self.warm > self.cold
