"""Truncated importance sampling: a correction for a sampler that is not quite the policy.

The sampler runs other kernels than the trainer, often in another precision, so its logprobs of the same weights differ.
Each token is weighted by how likely the trainer finds it in proportion, with a cap:

    w = min(exp(old_policy - sampler), cap)

Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025. With `icepop_threshold` a
token on whose probability the two disagree by more than that factor is left out instead (IcePop; Ling Team, "Every
Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model", 2025).

The weights are constants: no gradient goes through them, and numpy is enough.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from fwasync.config.base import Config

__all__ = ("TISConfig", "tis_weights")

Floats = npt.NDArray[np.floating[Any]]

_LOG_CAP = 20.0


class TISConfig(Config):
    """How tokens are weighted by the ratio of trainer and sampler."""

    cap: float = Field(default=5.0, ge=0, description="The largest weight; 0 gives every token the weight 0.")
    level: Literal["token", "sequence"] = Field(
        default="token",
        description="A ratio for each token, or one for each sequence: the exponential of its mean log-ratio.",
    )
    icepop_threshold: float | None = Field(
        default=None,
        ge=1,
        description="Tokens whose ratio lies outside [1/threshold, threshold] get the weight 0; token level only.",
    )

    @model_validator(mode="after")
    def _icepop_is_per_token(self) -> Self:
        if self.icepop_threshold is not None and self.level == "sequence":
            raise ValueError("icepop_threshold is for level='token'; a sequence has one ratio for all of its tokens")
        return self

    @property
    def may_vanish(self) -> bool:
        """Whether an active token can get the weight 0."""
        return self.icepop_threshold is not None or self.cap == 0


def tis_weights(old_policy: Floats, sampler: Floats, config: TISConfig) -> tuple[Floats, dict[str, float]]:
    """The weights of one sample's active tokens.

    Args:
        old_policy: The trainer's logprobs before the update, `[T]`.
        sampler: The sampler's, `[T]`.
        config: Level, cap and threshold.

    Returns:
        Weights `[T]`, and the metrics `tis/weight_mean`, `tis/clip_frac` (the part above the cap), at sequence level
        `tis/seq_ratio`, and with a threshold `tis/icepop_clip_frac` (the part that was left out).
    """
    log_ratio = np.clip(old_policy - sampler, -_LOG_CAP, _LOG_CAP)
    if config.level == "sequence":
        log_ratio = np.full_like(log_ratio, log_ratio.mean())
    ratio = np.exp(log_ratio)
    weights = np.minimum(ratio, config.cap)
    metrics: dict[str, float] = {"tis/clip_frac": float((ratio > config.cap).mean())}
    if config.level == "sequence":
        metrics["tis/seq_ratio"] = float(ratio[0])
    if config.icepop_threshold is not None:
        outside = (ratio < 1 / config.icepop_threshold) | (ratio > config.icepop_threshold)
        weights = np.where(outside, 0, weights)
        metrics["tis/icepop_clip_frac"] = float(outside.mean())
    metrics["tis/weight_mean"] = float(weights.mean())
    return weights, metrics
