"""The losses: supervised, preference and policy, for `forward_backward_custom` and for the service's own kernels.

torch is imported when a loss is computed, not before: settings, reductions and the built-in path do without it.
"""

from __future__ import annotations

from fwasync.losses.alignment import PolicyInputs
from fwasync.losses.cispo import CISPOConfig
from fwasync.losses.dapo import DAPOConfig
from fwasync.losses.decoupled import DecoupledConfig
from fwasync.losses.dpo import make_batch_dpo_loss_fn
from fwasync.losses.dro import DROConfig
from fwasync.losses.factories import (
    make_cispo_loss_fn,
    make_dapo_loss_fn,
    make_decoupled_loss_fn,
    make_dro_loss_fn,
    make_grpo_loss_fn,
    make_gspo_loss_fn,
    make_importance_sampling_loss_fn,
    make_reinforce_loss_fn,
)
from fwasync.losses.grpo import GRPOConfig
from fwasync.losses.gspo import GSPOConfig
from fwasync.losses.importance_sampling import ImportanceSamplingConfig
from fwasync.losses.orpo import make_batch_orpo_loss_fn
from fwasync.losses.policy import BuiltinLoss, Kernel, PolicyLoss, Response, Terms
from fwasync.losses.reduction import LossFn, Reduction, check_normalization
from fwasync.losses.registry import POLICY_LOSSES, policy_loss
from fwasync.losses.reinforce import ReinforceConfig
from fwasync.losses.sft import make_batch_sft_loss_fn, make_batch_weighted_sft_loss_fn, make_sft_loss_fn
from fwasync.losses.tis import TISConfig, tis_weights

__all__ = (
    "POLICY_LOSSES",
    "BuiltinLoss",
    "CISPOConfig",
    "DAPOConfig",
    "DROConfig",
    "DecoupledConfig",
    "GRPOConfig",
    "GSPOConfig",
    "ImportanceSamplingConfig",
    "Kernel",
    "LossFn",
    "PolicyInputs",
    "PolicyLoss",
    "Reduction",
    "ReinforceConfig",
    "Response",
    "TISConfig",
    "Terms",
    "check_normalization",
    "make_batch_dpo_loss_fn",
    "make_batch_orpo_loss_fn",
    "make_batch_sft_loss_fn",
    "make_batch_weighted_sft_loss_fn",
    "make_cispo_loss_fn",
    "make_dapo_loss_fn",
    "make_decoupled_loss_fn",
    "make_dro_loss_fn",
    "make_grpo_loss_fn",
    "make_gspo_loss_fn",
    "make_importance_sampling_loss_fn",
    "make_reinforce_loss_fn",
    "make_sft_loss_fn",
    "policy_loss",
    "tis_weights",
)
