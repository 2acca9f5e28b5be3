"""The losses: each maps the logprobs of the targets to a loss and dL/dlogprobs for every token.

All reductions are sums. Notation: lp are the trainer's logprobs of the targets, q the `logprobs`
input (the policy that sampled), A the `advantages`, w the `weights`, r = exp(lp - q).
Arrays are `[B, N, K]`: one padded block of B sequences of N positions with K targets each. Only `gspo` looks beyond a
single element, along a sequence; padding has the inputs 0.
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
    ratio, slope = _ratio(lp, inputs, config)
    return -ratio * inputs["advantages"], -slope * inputs["advantages"]


def ppo(lp: FloatArray, inputs: Mapping[str, FloatArray], config: Mapping[str, float]) -> LossTerms:
    """-min(r A, clip(r) A), the clip bounds being absolute ratios.

    Schulman et al., "Proximal Policy Optimization Algorithms", 2017, equation 7.
    """
    ratio, slope = _ratio(lp, inputs, config)
    return _clipped_surrogate(ratio, slope, inputs["advantages"], config)


def dapo(lp: FloatArray, inputs: Mapping[str, FloatArray], config: Mapping[str, float]) -> LossTerms:
    """`ppo`, and where A < 0 the loss is held below -c A ("dual clip").

    Ye et al., "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning", 2020.
    """
    loss, slopes = ppo(lp, inputs, config)
    punished = inputs["advantages"] < 0
    bound = config["eps_clip_c"] * np.where(punished, -inputs["advantages"], 1)
    bounded = punished & (loss > bound)
    return np.where(bounded, bound, loss), np.where(bounded, 0, slopes)


def gspo(lp: FloatArray, inputs: Mapping[str, FloatArray], config: Mapping[str, float]) -> LossTerms:
    """-min(s A, clip(s) A), s being the exponential of the mean of lp - q over the sequence.

    The mean is over the positions whose advantage is not zero, so prompts, masked tokens and padding are not in it.
    Every token has the derivative of s by its own logprob in s_t = s exp(lp - stopgrad(lp)): that is the sequence's
    gradient where its advantages are equal.

    Zheng et al., "Group Sequence Policy Optimization", 2025, equations 7 and 14.
    """
    advantages = inputs["advantages"]
    counted = advantages != 0
    distance = np.where(counted, lp - inputs["logprobs"], 0).sum(axis=1, keepdims=True)
    mean = distance / np.maximum(counted.sum(axis=1, keepdims=True), 1)
    cap = config["seq_ratio_log_cap"]
    ratio = np.exp(np.minimum(mean, cap))
    return _clipped_surrogate(ratio, np.where(mean <= cap, ratio, 0), advantages, config)


def cispo(lp: FloatArray, inputs: Mapping[str, FloatArray], config: Mapping[str, float]) -> LossTerms:
    """-stopgrad(clip(r)) A lp: clipped tokens keep a gradient.

    MiniMax, "MiniMax-M1", 2025, equation 4.
    """
    ratio, _ = _ratio(lp, inputs, config)
    slope = -_clip(ratio, config) * inputs["advantages"]
    return slope * lp, slope


def dro(lp: FloatArray, inputs: Mapping[str, FloatArray], config: Mapping[str, float]) -> LossTerms:
    """-(A lp - beta/2 (lp - q)^2) where A is not zero: a squared distance holds the policy near its sampler.

    Richemond et al., "Offline Regularised Reinforcement Learning", 2024.
    """
    advantages = inputs["advantages"]
    beta = np.where(advantages != 0, config["beta"], 0)
    distance = lp - inputs["logprobs"]
    return beta / 2 * distance**2 - advantages * lp, beta * distance - advantages


def _ratio(lp: FloatArray, inputs: Mapping[str, FloatArray], config: Mapping[str, float]) -> LossTerms:
    """r with its logarithm held within ±ratio_log_cap, and its derivative, which is zero where it is held."""
    distance, cap = lp - inputs["logprobs"], config["ratio_log_cap"]
    ratio = np.exp(np.clip(distance, -cap, cap))
    return ratio, np.where(np.abs(distance) <= cap, ratio, 0)


def _clipped_surrogate(
    ratio: FloatArray, slope: FloatArray, advantages: FloatArray, config: Mapping[str, float]
) -> LossTerms:
    """-min(ratio A, clip(ratio) A), and its derivative given that of the ratio."""
    free, clipped = -ratio * advantages, -_clip(ratio, config) * advantages
    return np.maximum(free, clipped), np.where(free >= clipped, -slope * advantages, 0)


def _clip(ratio: FloatArray, config: Mapping[str, float]) -> FloatArray:
    return np.clip(ratio, config["clip_low_threshold"], config["clip_high_threshold"])


_POLICY_INPUTS = ("logprobs", "advantages")
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
_UNCAPPED = {"ratio_log_cap": math.inf}
LOSSES = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", ("weights",), cross_entropy, several_targets=True),
        Loss("importance_sampling", _POLICY_INPUTS, importance_sampling, _UNCAPPED),
        Loss("ppo", _POLICY_INPUTS, ppo, _CLIP | _UNCAPPED),
        Loss("dapo", _POLICY_INPUTS, dapo, _CLIP | _UNCAPPED | {"eps_clip_c": math.inf}),
        Loss("gspo", _POLICY_INPUTS, gspo, _CLIP | {"seq_ratio_log_cap": math.inf}),
        Loss("cispo", _POLICY_INPUTS, cispo, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0} | _UNCAPPED),
        Loss("dro", _POLICY_INPUTS, dro, {"beta": 0.1}),
    )
}
"""The known losses by name. Caps are off unless a request sets them."""


def resolve_loss(name: str, config: Mapping[str, float] | None) -> tuple[Loss, dict[str, float]]:
    """Find a loss and complete its settings.

    Raises EngineError for an unknown name or setting, a setting that is no finite number or out of
    its range, or clip bounds that exclude each other.
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
    for key in ("ratio_log_cap", "seq_ratio_log_cap"):
        if settings.get(key, 0.0) < 0:
            raise EngineError(f"loss_fn_config: {key} must not be negative, got {settings[key]}")
    if settings.get("eps_clip_c", math.inf) <= 1:
        raise EngineError(f"loss_fn_config: eps_clip_c must be above 1, got {settings['eps_clip_c']}")
    return loss, settings
