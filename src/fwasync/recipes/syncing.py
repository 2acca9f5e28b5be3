"""The policy's weights into a deployment, while a recipe trains that does not sample itself."""

from __future__ import annotations

import anyio

from fwasync import AsyncWeightSyncer, WeightSyncConfig
from fwasync.errors import UsageError
from fwasync.recipes.config import RecipeConfig
from fwasync.recipes.trainers import Trainers

__all__ = ("WeightSync",)


class WeightSync:
    """Syncs at each interval and after the last step. Nothing is submitted meanwhile: what is saved are the weights of
    the step.

    Args:
        config: The recipe's configuration.
        settings: When to sync.
        trainers: With a deployment.

    Raises:
        UsageError: There is no deployment.
    """

    def __init__(self, config: RecipeConfig, settings: WeightSyncConfig, trainers: Trainers) -> None:
        if trainers.deployment is None or trainers.hot_loads is None:
            raise UsageError("weights are synced into a deployment, and there is none: set infra.training_shape_id")
        self._settings = settings
        self._syncer = AsyncWeightSyncer(
            trainers.policy,
            trainers.hot_loads,
            trainers.deployment.deployment_id,
            base_model=config.base_model,
            hotload_timeout=settings.weight_sync_timeout,
            first_checkpoint_type=settings.first_checkpoint_type,
            lora_rank=config.lora_rank,
        )

    async def begin(self, step: int) -> None:
        """Before the first step of this process.

        **Cancellation:** as of `AsyncWeightSyncer.save_and_hotload`.
        """
        if self._settings.weight_sync_before_training:
            await self._syncer.save_and_hotload(f"resume-{step}-base" if step else "step-0-base", "base")

    def is_due(self, step: int, *, last: bool) -> bool:
        """Whether the deployment gets the weights of a step."""
        interval = self._settings.weight_sync_interval
        return interval > 0 and (last or step % interval == 0)

    async def sync(self, step: int, *, last: bool) -> dict[str, float]:
        """Bring the weights of a step there; how long it took, as a metric.

        Raises:
            HotLoadFailedError, HotLoadTimeoutError: The deployment did not take them.

        **Cancellation:** as of `AsyncWeightSyncer.save_and_hotload`.
        """
        began = anyio.current_time()
        if last:  # the final checkpoint has a snapshot of its own, which a delta would be the difference to
            self._syncer.reset_delta_chain()
        await self._syncer.save_and_hotload(f"final-step-{step}" if last else f"step-{step}")
        return {"perf/weight_sync_time": anyio.current_time() - began}
