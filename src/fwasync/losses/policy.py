"""What all policy losses share: a formula for the active tokens of one sample, summed over tokens and samples.

A loss is its formula. `PolicyLoss` runs it on either of two paths:

* `custom` makes a function for `forward_backward_custom`: any formula, one forward pass more.
* `builtin` makes datums and settings for the service's own kernel, where it has one that computes the same gradient.

Invariants
    * The loss is a **sum**, never a mean: divide at `optim_step`, by `grad_accumulation_normalization`.
    * Only active tokens enter (see `alignment`); a sample without any contributes nothing, and a zero gradient.
    * NaN or infinity in any logprob of an active token is an error that names sample and position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fwasync.errors import DatumError, UsageError
from fwasync.losses.alignment import ActiveTokens, PolicyInputs, active_tokens, check_finite
from fwasync.losses.reduction import LossFn, Reduction
from fwasync.losses.tis import TISConfig, tis_weights

if TYPE_CHECKING:
    import torch

    from fwasync.types import Datum

__all__ = ("BuiltinLoss", "Kernel", "PolicyLoss", "Response", "Terms")


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """The active tokens of one sample; every tensor is `[T]`, of the dtype of the policy's logprobs.

    Attributes:
        policy: π, the policy's logprobs; the only tensor with a gradient.
        old_policy: prox, those of a forward pass just before the update.
        sampler: inf, those that the deployment reported.
        reference: ref, those of the reference model.
        weight: w, the TIS weights; 1 for a loss that takes none.
        advantage: A.
        staleness: Optimizer steps between the weights that sampled and those that learn.
    """

    policy: torch.Tensor
    old_policy: torch.Tensor
    sampler: torch.Tensor
    reference: torch.Tensor | None
    weight: torch.Tensor
    advantage: float
    staleness: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """What a formula gives for one sample.

    Attributes:
        loss: Of each token, `[T]`.
        metrics: Numbers of each token, `[T]`, which are averaged over all active tokens of the batch.
    """

    loss: torch.Tensor
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict["str", "torch.Tensor"])


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loss of the service, and its settings."""

    loss_fn: str
    config: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class BuiltinLoss:
    """The arguments of `forward_backward` for a loss of the service."""

    datums: list[Datum]
    loss_fn: str
    loss_fn_config: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """A policy loss with its settings.

    Attributes:
        name: As in the registry.
        formula: Loss and metrics of a sample's active tokens.
        kernel: The service's kernel of the same gradient, if it has one.
        tis: How tokens are weighted; `None` for a loss that takes no weights.
        kl_beta: The weight of the penalty for leaving the reference; above 0 a reference is needed.
        every_token_counts: Tokens of the weight 0 have a part in the formula, which a kernel could not know.
        needs_staleness: It is in the formula.
        reduction: Always a sum.
    """

    name: str
    formula: Callable[[Response], Terms]
    kernel: Kernel | None = None
    tis: TISConfig | None = None
    kl_beta: float = 0.0
    every_token_counts: bool = False
    needs_staleness: bool = False
    reduction: Reduction = field(default=Reduction.SUM, init=False)

    @property
    def label(self) -> str:
        """The name as errors have it."""
        return self.name if "_" in self.name else self.name.upper()

    @property
    def obstacle(self) -> str | None:
        """Why no kernel of the service computes this gradient; `None` if one does."""
        if self.kernel is None:
            return f"services have no kernel of {self.name}"
        if self.kl_beta > 0:
            return f"kl_beta is {self.kl_beta:g}, and kernels know of no reference"
        if self.every_token_counts and self.tis is not None and self.tis.may_vanish:
            return f"tis can give tokens the weight 0, which count in {self.name} all the same, and kernels leave out"
        return None

    def custom(self, inputs: PolicyInputs) -> LossFn:
        """The loss of a batch for `forward_backward_custom`.

        Args:
            inputs: One entry for each datum of the batch.

        Returns:
            A function of the datums and the policy's logprobs, float `[N]` each. Its metrics are means over active
            tokens, except `inference_diff`, `inference_kld` and `tis/*`, which are means over samples of the means over
            their tokens, and the counts `active_tokens` and `total_resp_tokens`.

        Raises:
            UsageError: `kl_beta` is above 0 and there is no reference, or staleness is needed and not given.
            DatumError: When called: logprobs do not fit a datum, or are not finite.
        """
        if self.kl_beta > 0 and not inputs.has_reference:
            raise UsageError(
                f"{self.label}: kl_beta is {self.kl_beta}, and there are no reference logprobs; "
                "give those of the reference model, or set kl_beta=0"
            )
        if self.needs_staleness and inputs.staleness is None:
            raise UsageError(f"{self.label} needs the staleness of each sample, in optimizer steps")

        def compute(data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
            samples = active_tokens(self.label, inputs, data, [len(values) for values in logprobs])
            total = _zero(logprobs)
            tally = _Tally()
            for index, (sample, values) in enumerate(zip(samples, logprobs, strict=True)):
                tally.response_tokens += sample.response
                if not len(sample.positions):
                    continue
                response, tis_metrics = self._response(inputs, index, sample, values)
                terms = self.formula(response)
                total = total + terms.loss.sum()
                tally.add(response, terms, tis_metrics)
            return total, tally.metrics()

        return LossFn(self.name, self.reduction, compute)

    def builtin(self, inputs: PolicyInputs, data: Sequence[Datum]) -> BuiltinLoss | None:
        """The loss of a batch for `forward_backward`: datums for the service's kernel.

        Each has `target_tokens` and `model_input` as they were, `logprobs` float32 `[N]` of the old policy, and
        `advantages` float32 `[N]`: A·w at active positions and 0 elsewhere. The service's kernels want a trainer
        without pipeline parallelism.

        Args:
            inputs: One entry for each datum.
            data: The batch.

        Returns:
            The arguments, or `None` if no kernel computes this gradient; `obstacle` says why.

        Raises:
            DatumError: As for `custom`.
        """
        if self.obstacle is not None:
            return None
        assert self.kernel is not None
        lengths = [len(datum.loss_fn_inputs["target_tokens"].to_numpy()) for datum in data]
        samples = active_tokens(self.label, inputs, data, lengths)
        datums = [
            self._kernel_datum(inputs, index, datum, sample, length)
            for index, (datum, sample, length) in enumerate(zip(data, samples, lengths, strict=True))
        ]
        return BuiltinLoss(datums, self.kernel.loss_fn, dict(self.kernel.config))

    def _response(
        self, inputs: PolicyInputs, index: int, sample: ActiveTokens, logprobs: torch.Tensor
    ) -> tuple[Response, dict[str, float]]:
        import torch

        def tensor(values: npt.NDArray[Any]) -> torch.Tensor:
            return torch.as_tensor(values, dtype=logprobs.dtype, device=logprobs.device)

        if logprobs.ndim != 1:
            raise DatumError(f"{self.label}: sample {index}: a policy loss takes one target for each position")
        policy = logprobs[torch.as_tensor(sample.positions, device=logprobs.device)]
        seen = policy.detach().cpu().numpy()
        check_finite(f"{self.label}: sample {index}", "policy logprobs", seen, sample.positions)
        weights, metrics = np.ones(len(sample.positions)), dict[str, float]()
        if self.tis is not None:
            weights, metrics = tis_weights(sample.old_policy, sample.sampler, self.tis)
        response = Response(
            policy=policy,
            old_policy=tensor(sample.old_policy),
            sampler=tensor(sample.sampler),
            reference=None if sample.reference is None else tensor(sample.reference),
            weight=tensor(weights),
            advantage=float(inputs.advantages[index]),
            staleness=0 if inputs.staleness is None else inputs.staleness[index],
        )
        return response, metrics

    def _kernel_datum(self, inputs: PolicyInputs, index: int, datum: Datum, sample: ActiveTokens, length: int) -> Datum:
        from fwasync.types import Datum, TensorData

        old_policy, advantages = np.zeros(length, np.float32), np.zeros(length, np.float32)
        if len(sample.positions):
            old_policy[:] = inputs.anchor(index)[:length]
            weights = 1.0 if self.tis is None else tis_weights(sample.old_policy, sample.sampler, self.tis)[0]
            advantages[sample.positions] = inputs.advantages[index] * weights
        return Datum(
            model_input=datum.model_input,
            loss_fn_inputs={
                "target_tokens": datum.loss_fn_inputs["target_tokens"],
                "logprobs": TensorData.from_numpy(old_policy),
                "advantages": TensorData.from_numpy(advantages),
            },
        )


def _zero(logprobs: Iterable[torch.Tensor]) -> torch.Tensor:
    """Nothing, of which every tensor has the gradient 0, whatever it holds."""
    import torch

    return torch.stack([values[:0].sum() for values in logprobs]).sum()


@dataclass(slots=True)
class _Tally:
    """Sums for the metrics of a batch."""

    response_tokens: int = 0
    tokens: int = 0
    samples: int = 0
    over_tokens: dict[str, float] = field(default_factory=dict[str, float])
    over_samples: dict[str, float] = field(default_factory=dict[str, float])

    def add(self, response: Response, terms: Terms, tis_metrics: Mapping[str, float]) -> None:
        policy = response.policy.detach()
        self.samples += 1
        self.tokens += len(policy)
        per_token = dict(terms.metrics)
        if response.reference is not None:
            per_token["mean_kl"] = policy - response.reference
        for name, values in per_token.items():
            self.over_tokens[name] = self.over_tokens.get(name, 0.0) + float(values.detach().double().sum())
        distance = (policy - response.sampler).double()
        inference = {
            "inference_diff": float(distance.abs().mean()),
            "inference_kld": float((distance.exp() - distance - 1).mean()),
        }
        for name, value in (inference | dict(tis_metrics)).items():
            self.over_samples[name] = self.over_samples.get(name, 0.0) + value

    def metrics(self) -> dict[str, float]:
        counts = {"active_tokens": float(self.tokens), "total_resp_tokens": float(self.response_tokens)}
        if not self.tokens:
            return counts
        return {
            **counts,
            "mask_ratio": self.tokens / self.response_tokens,
            **{name: total / self.tokens for name, total in self.over_tokens.items()},
            **{name: total / self.samples for name, total in self.over_samples.items()},
        }
