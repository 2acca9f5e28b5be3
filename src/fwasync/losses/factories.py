"""The policy losses under the cookbook's names: functions for `forward_backward_custom`, of one batch each.

Their arguments, one entry for each datum, N being its positions:

* `advantages`: of each sample.
* `ref_logprobs`: of the reference model, `[N]` each; `None` or empty without one. Where a loss has no KL term they
  serve the metric `mean_kl` only.
* `prompt_len`: prompt tokens of each sample, or one number for all.
* `inf_logprobs`: of the deployment that sampled, `[N]` or more each, 0 for the prompt.
* `prox_logprobs`: of a forward pass just before the update, `[N]` each; `None` takes `inf_logprobs` for it.
* `…_config` and `tis_config`: settings; `None` is their defaults.

All results are **sums** over active tokens. Numbers of entries that differ are a `DatumError`, a setting out of its
range is pydantic's `ValidationError`, and a KL term without a reference a `UsageError`, before anything is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from fwasync.losses.alignment import Logprobs, PolicyInputs
from fwasync.losses.cispo import CISPOConfig, cispo_loss
from fwasync.losses.dapo import DAPOConfig, dapo_loss
from fwasync.losses.decoupled import DecoupledConfig, decoupled_loss
from fwasync.losses.dro import DROConfig, dro_loss
from fwasync.losses.grpo import GRPOConfig, grpo_loss
from fwasync.losses.gspo import GSPOConfig, gspo_loss
from fwasync.losses.importance_sampling import ImportanceSamplingConfig, importance_sampling_loss
from fwasync.losses.kl import KLForm
from fwasync.losses.reduction import LossFn
from fwasync.losses.reinforce import ReinforceConfig, reinforce_loss
from fwasync.losses.tis import TISConfig

__all__ = (
    "make_cispo_loss_fn",
    "make_dapo_loss_fn",
    "make_decoupled_loss_fn",
    "make_dro_loss_fn",
    "make_grpo_loss_fn",
    "make_gspo_loss_fn",
    "make_importance_sampling_loss_fn",
    "make_reinforce_loss_fn",
)


def make_grpo_loss_fn(
    advantages: Sequence[float],
    ref_logprobs: Logprobs | None,
    prompt_len: int | Sequence[int],
    inf_logprobs: Logprobs,
    prox_logprobs: Logprobs | None,
    *,
    kl_beta: float = 0.001,
    eps_clip: float = 0.2,
    eps_clip_high: float | None = None,
    kl: KLForm = "k3",
    tis_config: TISConfig | None = None,
) -> LossFn:
    """GRPO, see `GRPOConfig`. `kl="value"` is the older KL term, which has no gradient."""
    config = GRPOConfig(kl_beta=kl_beta, eps_clip=eps_clip, eps_clip_high=eps_clip_high, kl=kl)
    inputs = PolicyInputs(advantages, ref_logprobs, prompt_len, inf_logprobs, prox_logprobs)
    return grpo_loss(config, tis_config).custom(inputs)


def make_importance_sampling_loss_fn(
    advantages: Sequence[float],
    ref_logprobs: Logprobs | None,
    prompt_len: int | Sequence[int],
    inf_logprobs: Logprobs,
    prox_logprobs: Logprobs | None,
    *,
    ratio_log_cap: float = 20.0,
    tis_config: TISConfig | None = None,
) -> LossFn:
    """Importance sampling, see `ImportanceSamplingConfig`."""
    inputs = PolicyInputs(advantages, ref_logprobs, prompt_len, inf_logprobs, prox_logprobs)
    return importance_sampling_loss(ImportanceSamplingConfig(ratio_log_cap=ratio_log_cap), tis_config).custom(inputs)


def make_dapo_loss_fn(
    advantages: Sequence[float],
    ref_logprobs: Logprobs | None,
    prompt_len: int | Sequence[int],
    inf_logprobs: Logprobs,
    prox_logprobs: Logprobs | None,
    *,
    dapo_config: DAPOConfig | None = None,
    tis_config: TISConfig | None = None,
) -> LossFn:
    """DAPO, see `DAPOConfig`."""
    inputs = PolicyInputs(advantages, ref_logprobs, prompt_len, inf_logprobs, prox_logprobs)
    return dapo_loss(dapo_config, tis_config).custom(inputs)


def make_dro_loss_fn(
    advantages: Sequence[float],
    ref_logprobs: Logprobs | None,
    prompt_len: int | Sequence[int],
    inf_logprobs: Logprobs,
    prox_logprobs: Logprobs | None,
    *,
    dro_config: DROConfig | None = None,
    tis_config: TISConfig | None = None,
) -> LossFn:
    """DRO, see `DROConfig`."""
    inputs = PolicyInputs(advantages, ref_logprobs, prompt_len, inf_logprobs, prox_logprobs)
    return dro_loss(dro_config, tis_config).custom(inputs)


def make_gspo_loss_fn(
    advantages: Sequence[float],
    ref_logprobs: Logprobs | None,
    prompt_len: int | Sequence[int],
    inf_logprobs: Logprobs,
    prox_logprobs: Logprobs | None,
    *,
    gspo_config: GSPOConfig | None = None,
    tis_config: TISConfig | None = None,
) -> LossFn:
    """GSPO, see `GSPOConfig`."""
    inputs = PolicyInputs(advantages, ref_logprobs, prompt_len, inf_logprobs, prox_logprobs)
    return gspo_loss(gspo_config, tis_config).custom(inputs)


def make_cispo_loss_fn(
    advantages: Sequence[float],
    ref_logprobs: Logprobs | None,
    prompt_len: int | Sequence[int],
    inf_logprobs: Logprobs,
    prox_logprobs: Logprobs | None,
    *,
    cispo_config: CISPOConfig | None = None,
    tis_config: TISConfig | None = None,
) -> LossFn:
    """CISPO, see `CISPOConfig`."""
    inputs = PolicyInputs(advantages, ref_logprobs, prompt_len, inf_logprobs, prox_logprobs)
    return cispo_loss(cispo_config, tis_config).custom(inputs)


def make_reinforce_loss_fn(
    advantages: Sequence[float],
    ref_logprobs: Logprobs | None,
    prompt_len: int | Sequence[int],
    inf_logprobs: Logprobs,
    *,
    kl_beta: float = 0.0,
    kl: KLForm = "k3",
) -> LossFn:
    """REINFORCE, see `ReinforceConfig`; it needs no `prox_logprobs`."""
    inputs = PolicyInputs(advantages, ref_logprobs, prompt_len, inf_logprobs)
    return reinforce_loss(ReinforceConfig(kl_beta=kl_beta, kl=kl)).custom(inputs)


def make_decoupled_loss_fn(
    advantages: Sequence[float],
    ref_logprobs: Logprobs | None,
    prompt_len: int | Sequence[int],
    inf_logprobs: Logprobs,
    staleness: Sequence[int],
    *,
    decoupled_config: DecoupledConfig | None = None,
) -> LossFn:
    """Decoupled PPO, see `DecoupledConfig`.

    `staleness` counts the optimizer steps between the weights that sampled each sample and those that learn from it; it
    takes the place of `prox_logprobs`.
    """
    inputs = PolicyInputs(advantages, ref_logprobs, prompt_len, inf_logprobs, staleness=staleness)
    return decoupled_loss(decoupled_config).custom(inputs)
