"""The policy losses by name, as a recipe's configuration names them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fwasync.config.base import Config
from fwasync.errors import UsageError
from fwasync.losses.cispo import CISPOConfig, cispo_loss
from fwasync.losses.dapo import DAPOConfig, dapo_loss
from fwasync.losses.decoupled import DecoupledConfig, decoupled_loss
from fwasync.losses.dro import DROConfig, dro_loss
from fwasync.losses.grpo import GRPOConfig, grpo_loss
from fwasync.losses.gspo import GSPOConfig, gspo_loss
from fwasync.losses.importance_sampling import ImportanceSamplingConfig, importance_sampling_loss
from fwasync.losses.policy import PolicyLoss
from fwasync.losses.reinforce import ReinforceConfig, reinforce_loss
from fwasync.losses.tis import TISConfig

__all__ = ("POLICY_LOSSES", "policy_loss")


@dataclass(frozen=True, slots=True)
class _Entry:
    settings: type[Config]
    make: Callable[..., PolicyLoss]
    takes_tis: bool = True


_ENTRIES: Mapping[str, _Entry] = {
    "grpo": _Entry(GRPOConfig, grpo_loss),
    "importance_sampling": _Entry(ImportanceSamplingConfig, importance_sampling_loss),
    "dapo": _Entry(DAPOConfig, dapo_loss),
    "dro": _Entry(DROConfig, dro_loss),
    "gspo": _Entry(GSPOConfig, gspo_loss),
    "cispo": _Entry(CISPOConfig, cispo_loss),
    "reinforce": _Entry(ReinforceConfig, reinforce_loss, takes_tis=False),
    "decoupled": _Entry(DecoupledConfig, decoupled_loss, takes_tis=False),
}

POLICY_LOSSES: Mapping[str, type[Config]] = {name: entry.settings for name, entry in _ENTRIES.items()}
"""The settings of each policy loss, by its name."""


def policy_loss(
    name: str, settings: Config | Mapping[str, Any] | None = None, tis: TISConfig | None = None
) -> PolicyLoss:
    """A policy loss.

    ```python
    loss = policy_loss("dapo", DAPOConfig(eps_clip_c=3.0))
    await client.forward_backward_custom(datums, loss.custom(inputs))
    ```

    Args:
        name: One of `POLICY_LOSSES`.
        settings: An object of its settings, or the fields of one; `None` is the defaults.
        tis: How tokens are weighted; `None` is the default, a cap of 5 for each token.

    Raises:
        UsageError: There is no such loss, the settings are of another one, or it takes no TIS weights.
        ValidationError: A setting is out of its range.
    """
    entry = _ENTRIES.get(name)
    if entry is None:
        nearest = difflib.get_close_matches(name, _ENTRIES, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}? They" if nearest else "they"
        raise UsageError(f"there is no policy loss {name!r}; {hint} are: {', '.join(_ENTRIES)}")
    if isinstance(settings, Mapping):
        settings = entry.settings.model_validate(settings)
    if settings is not None and not isinstance(settings, entry.settings):
        raise UsageError(f"{name} takes {entry.settings.__name__}, got {type(settings).__name__}")
    if entry.takes_tis:
        return entry.make(settings, tis)
    if tis is not None:
        raise UsageError(f"{name} has a correction of its own and takes no TIS weights; leave tis unset")
    return entry.make(settings)
