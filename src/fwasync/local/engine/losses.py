"""The losses: each maps the logprobs of the targets to a loss and dL/dlogprobs for every token.

All reductions are sums. Notation: lp are the trainer's logprobs of the targets, q the `logprobs`
input (the policy that sampled), A the `advantages`, w the `weights`, r = exp(lp - q).
Everything is elementwise, so one padded block holds many sequences.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from fwasync.local.engine.api import EngineError
from fwasync.local.engine.architecture import FloatArray

__all__ = ("LOSSES", "Loss", "resolve_loss")

LossTerms = tuple[FloatArray, FloatArray]
"""Loss of each token, and its derivative with respect to that token's logprob."""

Formula = Callable[[FloatArray, Mapping[str, FloatArray], Mapping[str, float]], LossTerms]


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss function: its float inputs beside `target_tokens`, its settings, its formula.

    `several_targets` allows `[N, K]` targets. `weights` among the inputs says which targets
    count.
    """

    name: str
    inputs: tuple[str, ...]
    formula: Formula
    defaults: Mapping[str, float] = field(default_factory=dict[str, float])
    several_targets: bool = False

    @property
    def is_weighted(self) -> bool:
        """Whether the loss says by weights which targets count."""
        return "weights" in self.inputs


def cross_entropy(lp: FloatArray, inputs: Mapping[str, FloatArray], config: Mapping[str, float]) -> LossTerms:
    """-w lp. Linear in lp, hence also the carrier of every loss computed by the client."""
    del config
    weights = inputs["weights"]
    return -weights * lp, -weights


def importance_sampling(lp: FloatArray, inputs: Mapping[str, FloatArray], config: Mapping[str, float]) -> LossTerms:
    """-r A: the policy gradient, corrected for samples of an older policy."""
    del config
    loss = -np.exp(lp - inputs["logprobs"]) * inputs["advantages"]
    return loss, loss.copy()


def ppo(lp: FloatArray, inputs: Mapping[str, FloatArray], config: Mapping[str, float]) -> LossTerms:
    """-min(r A, clip(r) A), the clip bounds being absolute ratios.

    Schulman et al., "Proximal Policy Optimization Algorithms", 2017, equation 7.
    """
    advantages = inputs["advantages"]
    ratio = np.exp(lp - inputs["logprobs"])
    free = ratio * advantages
    clipped = _clip(ratio, config) * advantages
    return -np.minimum(free, clipped), np.where(free <= clipped, -free, 0)


def cispo(lp: FloatArray, inputs: Mapping[str, FloatArray], config: Mapping[str, float]) -> LossTerms:
    """-stopgrad(clip(r)) A lp: clipped tokens keep a gradient.

    MiniMax, "MiniMax-M1", 2025, equation 4.
    """
    slope = -_clip(np.exp(lp - inputs["logprobs"]), config) * inputs["advantages"]
    return slope * lp, slope


def dro(lp: FloatArray, inputs: Mapping[str, FloatArray], config: Mapping[str, float]) -> LossTerms:
    """-(A lp - beta/2 (lp - q)^2): a squared distance holds the policy near its sampler.

    Richemond et al., "Offline Regularised Reinforcement Learning", 2024.
    """
    advantages, beta = inputs["advantages"], config["beta"]
    distance = lp - inputs["logprobs"]
    return beta / 2 * distance**2 - advantages * lp, beta * distance - advantages


def _clip(ratio: FloatArray, config: Mapping[str, float]) -> FloatArray:
    return np.clip(ratio, config["clip_low_threshold"], config["clip_high_threshold"])


_POLICY_INPUTS = ("logprobs", "advantages")
LOSSES = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", ("weights",), cross_entropy, several_targets=True),
        Loss("importance_sampling", _POLICY_INPUTS, importance_sampling),
        Loss(
            "ppo",
            _POLICY_INPUTS,
            ppo,
            {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
        ),
        Loss(
            "cispo",
            _POLICY_INPUTS,
            cispo,
            {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
        ),
        Loss("dro", _POLICY_INPUTS, dro, {"beta": 0.1}),
    )
}
"""The known losses by name."""


def resolve_loss(name: str, config: Mapping[str, float] | None) -> tuple[Loss, dict[str, float]]:
    """Find a loss and complete its settings.

    Raises EngineError for an unknown name or setting, a setting that is no finite number, or
    clip bounds that exclude each other.
    """
    loss = LOSSES.get(name)
    if loss is None:
        raise EngineError(f"unknown loss_fn {name!r}; this engine has: {', '.join(LOSSES)}")
    settings = dict(loss.defaults)
    for key, value in (config or {}).items():
        if key not in settings:
            allowed = ", ".join(settings) or "none"
            raise EngineError(f"loss_fn_config: {name} has no setting {key!r}; allowed: {allowed}")
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise EngineError(f"loss_fn_config: {key} must be a finite number, got {value!r}")
        settings[key] = float(value)
    low, high = settings.get("clip_low_threshold", 0.0), settings.get("clip_high_threshold", 0.0)
    if low > high:
        raise EngineError(f"loss_fn_config: clip_low_threshold {low} is above clip_high_threshold {high}")
    return loss, settings
