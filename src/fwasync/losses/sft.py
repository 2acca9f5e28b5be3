"""Supervised fine-tuning: the mean negative log-likelihood of the responses.

With NLL = -π of each token, and w the weights of a datum:

* `make_sft_loss_fn`: Σ NLL / C, over the C response tokens of one sample;
* `make_batch_sft_loss_fn`: Σ NLL / Σ C, over the response tokens of the batch: long responses count for more;
* `make_batch_weighted_sft_loss_fn`: Σ w NLL / Σ w, over all tokens of the batch; with microbatches, the sum of their
  means, as if each had been a batch of its own before one optimizer step.

All are **means**: with `grad_accumulation_normalization` they would be divided twice. The service's `cross_entropy` is
the sum, Σ w NLL: it needs no torch and one pass less, and weights that sum to 1, or a normalization, make it a mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fwasync.errors import DatumError
from fwasync.losses.alignment import check_finite
from fwasync.losses.reduction import LossFn, Reduction
from fwasync.losses.supervised import check_count, check_sizes, microbatches, perplexity, response

if TYPE_CHECKING:
    import torch

    from fwasync.types import Datum

__all__ = ("make_batch_sft_loss_fn", "make_batch_weighted_sft_loss_fn", "make_sft_loss_fn")


def make_sft_loss_fn(response_start: int, target_tokens: Sequence[int] | None = None) -> LossFn:
    """The mean NLL of one sample's response.

    Args:
        response_start: Index of the response's first token in the sequence.
        target_tokens: The sample's targets; if given, the datum must have as many positions.

    Returns:
        The loss of a batch of one datum. Metrics: `ce_loss`, `ppl`, `response_tokens`.
    """

    def compute(_data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        check_count("SFT", "one response_start", 1, len(logprobs))
        if target_tokens is not None and len(target_tokens) != len(logprobs[0]):
            raise DatumError(f"SFT: there are {len(target_tokens)} target_tokens and {len(logprobs[0])} logprobs")
        chosen = response("SFT: sample 0", logprobs[0], response_start)
        loss = -chosen.mean()
        value = loss.item()
        return loss, {"ce_loss": value, "ppl": perplexity(value), "response_tokens": float(len(chosen))}

    return LossFn("sft", Reduction.MEAN_TOKENS, compute)


def make_batch_sft_loss_fn(response_starts: Sequence[int]) -> LossFn:
    """The mean NLL of the response tokens of a batch.

    Args:
        response_starts: Index of the response's first token, for each sequence.

    Returns:
        The loss. Metrics: `ce_loss`, `ce_loss_sum`, `ppl`, `response_tokens`, `batch_size`.
    """

    def compute(_data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        import torch

        check_count("SFT", f"{len(response_starts)} response_starts", len(response_starts), len(logprobs))
        chosen = [
            response(f"SFT: sample {index}", values, start)
            for index, (values, start) in enumerate(zip(logprobs, response_starts, strict=True))
        ]
        tokens = sum(len(values) for values in chosen)
        total = -torch.stack([values.sum() for values in chosen]).sum()
        loss = total / tokens
        return loss, {
            "ce_loss": loss.item(),
            "ce_loss_sum": total.item(),
            "ppl": perplexity(loss.item()),
            "response_tokens": float(tokens),
            "batch_size": float(len(chosen)),
        }

    return LossFn("sft", Reduction.MEAN_TOKENS, compute)


def make_batch_weighted_sft_loss_fn(microbatch_sizes: Sequence[int] | None = None) -> LossFn:
    """The weighted mean NLL of a batch, by the `weights` of its datums.

    Args:
        microbatch_sizes: Datums of each microbatch, in order; the loss is then the sum of their means.

    Returns:
        The loss. Metrics: `ce_loss` (the mean over the whole batch), `ce_loss_sum`, `ppl`, `response_tokens` (those
        with a weight), `batch_size`, `weighted_tokens` (Σ w), `microbatch_count`.

    Raises:
        UsageError: The list of sizes is empty, or one is not positive.
    """
    check_sizes(microbatch_sizes)

    def compute(data: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        import torch

        check_count("SFT", f"{len(data)} datums", len(data), len(logprobs))
        weights = [_weights(index, *pair) for index, pair in enumerate(zip(data, logprobs, strict=True))]
        totals = torch.stack(
            [_weighted(index, *pair) for index, pair in enumerate(zip(logprobs, weights, strict=True))]
        )
        masses = torch.stack([values.sum() for values in weights])
        means: list[torch.Tensor] = []
        for part in microbatches("SFT", microbatch_sizes, len(logprobs)):
            mass = masses[part].sum()
            if mass.item() <= 0:
                raise DatumError(
                    f"SFT: the weights of samples {part.start} to {part.stop - 1} sum to {mass.item():g}; "
                    "a mean needs a sum above 0"
                )
            means.append(totals[part].sum() / mass)
        total, mass = totals.sum().item(), masses.sum().item()
        return torch.stack(means).sum(), {
            "ce_loss": total / mass,
            "ce_loss_sum": total,
            "ppl": perplexity(total / mass),
            "response_tokens": float(sum(int((values != 0).sum()) for values in weights)),
            "batch_size": float(len(logprobs)),
            "weighted_tokens": mass,
            "microbatch_count": float(len(means)),
        }

    return LossFn("sft", Reduction.MEAN_TOKENS, compute)


def _weights(index: int, datum: Datum, logprobs: torch.Tensor) -> torch.Tensor:
    import torch

    where = f"SFT: sample {index}"
    weights = datum.loss_fn_inputs.get("weights")
    if weights is None:
        raise DatumError(f"{where} has no weights in its loss_fn_inputs")
    values = weights.to_numpy()
    if values.shape != tuple(logprobs.shape):
        raise DatumError(f"{where}: its weights have shape {values.shape}, its logprobs {tuple(logprobs.shape)}")
    check_finite(where, "weights", values)
    return torch.as_tensor(values, dtype=logprobs.dtype, device=logprobs.device)


def _weighted(index: int, logprobs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ w NLL of a sample; positions without a weight may hold anything."""
    positions = weights.nonzero(as_tuple=True)
    chosen = logprobs[positions]
    check_finite(f"SFT: sample {index}", "policy logprobs", chosen.detach().cpu().numpy(), positions[0].cpu().numpy())
    return -(weights[positions] * chosen).sum()
