"""The optimizer of the recipes: Adam, and what the trainer tells of a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from fwasync.config.base import Config

if TYPE_CHECKING:
    from fwasync.types import AdamParams, ForwardBackwardOutput, OptimStepResponse

__all__ = ("ADAM_PRESETS", "DEFAULT_ADAM", "AdamConfig", "adam_params", "grad_norm", "remote_metrics")

_NAMES = ("grad_norm", "unclipped_grad_l2:mean")


class AdamConfig(Config):
    """Adam with decoupled weight decay, but for its learning rate."""

    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the mean of gradients.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of the mean of their squares.")
    eps: float = Field(default=1e-8, ge=0, allow_inf_nan=False, description="Added to the denominator.")
    weight_decay: float = Field(default=0.01, ge=0, allow_inf_nan=False, description="Of the weights, in each step.")


DEFAULT_ADAM = AdamConfig()
"""That of the cookbook's recipes."""

ADAM_PRESETS: Mapping[str, AdamConfig] = {
    "default": DEFAULT_ADAM,
    "fast": AdamConfig(beta2=0.95, eps=1e-12),
}
"""Settings by name. `fast` forgets sooner and suits short runs; later versions of the cookbook have it as default."""


def adam_params(adam: AdamConfig, learning_rate: float, *, grad_clip_norm: float) -> AdamParams:
    """The parameters of one step; `grad_clip_norm` 0 does not clip."""
    from fwasync.types import AdamParams

    return AdamParams(learning_rate=learning_rate, grad_clip_norm=grad_clip_norm, **adam.model_dump())


def grad_norm(response: OptimStepResponse) -> dict[str, float]:
    """The gradient's norm before clipping, as `train/grad_norm`, if the service tells it."""
    metrics = response.metrics or {}
    norms = [metrics[name] for name in _NAMES if name in metrics]
    return {"train/grad_norm": norms[0]} if norms else {}


def remote_metrics(output: ForwardBackwardOutput, response: OptimStepResponse) -> dict[str, float]:
    """Everything that the trainer tells of a step, as `train/<its name>`; and `train/grad_norm`, if it is told."""
    told = {**output.metrics, **(response.metrics or {})}
    own = {f"train/{name}": value for name, value in told.items() if name not in ("step", "step_id")}
    return {**own, **grad_norm(response)}
