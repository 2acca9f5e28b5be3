"""The optimizer of the recipes: Adam with the betas that suit short runs, a linear warm-up, clipping."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fwasync.types import AdamParams, OptimStepResponse

__all__ = ("adam", "grad_norm", "warmed_up")

_NAMES = ("grad_norm", "unclipped_grad_l2:mean")


def adam(learning_rate: float, *, grad_clip_norm: float) -> AdamParams:
    """Adam for one step: betas 0.9 and 0.95, no weight decay; `grad_clip_norm` 0 does not clip."""
    from fwasync.types import AdamParams

    return AdamParams(
        learning_rate=learning_rate, beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.0, grad_clip_norm=grad_clip_norm
    )


def warmed_up(learning_rate: float, step: int, warmup_steps: int) -> float:
    """The learning rate of a step, from 1: it rises in equal parts, and is reached at step `warmup_steps`."""
    return learning_rate * min(1.0, step / max(warmup_steps, 1))


def grad_norm(response: OptimStepResponse) -> dict[str, float]:
    """The gradient's norm before clipping, as `train/grad_norm`, if the service tells it."""
    metrics = response.metrics or {}
    norms = [metrics[name] for name in _NAMES if name in metrics]
    return {"train/grad_norm": norms[0]} if norms else {}
