"""The numpy trainer: losses forward and backward, optimizer steps, checkpoints.

Invariants
    * A batch is checked as a whole before anything is computed, and its gradient joins the
      gathered one only when all of it is finite: a failed call leaves no trace.
    * Equal calls in equal order give equal bits; nothing is shared between trainers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from fwasync.local.engine.api import EngineError, LossResult, Normalization, SnapshotInfo
from fwasync.local.engine.batching import MicroBatch, PreparedExample, micro_batches, prepare
from fwasync.local.engine.losses import resolve_loss
from fwasync.local.engine.optimizer import AdamState, check_adam, clip_to_norm
from fwasync.local.engine.parameters import DEFAULT_ALPHA, FullParameters, LoraParameters, Parameters, check_lora
from fwasync.local.engine.storage import read_flat, read_info, write_flat, write_info, write_json
from fwasync.local.engine.transformer import Transformer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from fwasync.local.engine.api import Adam, BaseModel, Example, Float32Array, Lora
    from fwasync.local.engine.architecture import Architecture, FloatArray
    from fwasync.local.engine.losses import Loss

__all__ = ("NumpyTrainer",)

_WEIGHTS = "weights.safetensors"
_FIRST_MOMENT = "first_moment.safetensors"
_SECOND_MOMENT = "second_moment.safetensors"
_ADAPTER = "adapter.safetensors"


@dataclass(slots=True)
class _Gathered:
    """Gradients since the last step, and how many tokens and sequences had one."""

    gradient: FloatArray
    tokens: int = 0
    sequences: int = 0


class NumpyTrainer:
    """`Trainer` for one architecture; float32 in service, float64 to check gradients."""

    def __init__(
        self,
        architecture: Architecture,
        lora: Lora | None = None,
        *,
        seed: int = 0,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        self._architecture = architecture
        self._dtype = np.dtype(dtype)
        self._transformer = Transformer(architecture, dtype)
        self._lora = lora
        self._parameters: Parameters
        if lora is None:
            self._parameters = FullParameters(architecture, dtype)
        else:
            check_lora(lora, architecture)
            self._parameters = LoraParameters(architecture, lora, seed if lora.seed is None else lora.seed, dtype)
        self._weights = self._parameters.model_layout.bind(self._parameters.model)
        self._adam = AdamState.like(self._parameters.flat)
        self._gathered: _Gathered | None = None

    @property
    def base_model(self) -> BaseModel:
        """The model that training started from."""
        return self._architecture.base_model

    @property
    def lora(self) -> Lora | None:
        """The adapter being trained, or None when every parameter is."""
        return self._lora

    @property
    def parameters(self) -> Parameters:
        """The numbers being trained."""
        return self._parameters

    @property
    def gradient(self) -> FloatArray | None:
        """What was gathered since the last step, placed as `parameters.layout` says."""
        return None if self._gathered is None else self._gathered.gradient

    def forward(self, batch: Sequence[Example], loss_fn: str, config: Mapping[str, float] | None = None) -> LossResult:
        """Compute logprobs and the loss; see `Trainer.forward`."""
        loss, settings = resolve_loss(loss_fn, config)
        examples = prepare(batch, loss, self.base_model, self._dtype, allow_surplus=True)
        return self._run(examples, loss, settings, None)

    def forward_backward(
        self, batch: Sequence[Example], loss_fn: str, config: Mapping[str, float] | None = None
    ) -> LossResult:
        """Compute the loss and gather its gradient; see `Trainer.forward_backward`."""
        loss, settings = resolve_loss(loss_fn, config)
        examples = prepare(batch, loss, self.base_model, self._dtype, allow_surplus=False)
        gathered = _Gathered(np.zeros_like(self._parameters.model))
        result = self._run(examples, loss, settings, gathered)
        gathered.gradient = self._parameters.project(gathered.gradient)
        if not np.isfinite(gathered.gradient).all():
            raise EngineError(
                "the gradient of this batch is not finite: the batch was dropped; "
                "lower the learning rate, or clip the gradient"
            )
        if self._gathered is not None:
            gathered.gradient += self._gathered.gradient
            gathered.tokens += self._gathered.tokens
            gathered.sequences += self._gathered.sequences
        self._gathered = gathered
        return result

    def optim_step(self, adam: Adam, normalization: Normalization | None = None) -> dict[str, float]:
        """Apply and clear the gathered gradients; see `Trainer.optim_step`."""
        check_adam(adam)
        if normalization is not None and normalization not in get_args(Normalization):
            raise EngineError(f"unknown normalization {normalization!r}; allowed: {', '.join(get_args(Normalization))}")
        if self._gathered is None:
            raise EngineError("optim_step: no gradient yet; call forward_backward first")
        gathered, self._gathered = self._gathered, None
        counts = {"num_loss_tokens": gathered.tokens, "num_sequences": gathered.sequences}
        gradient = gathered.gradient
        if divisor := counts.get(normalization or "none"):
            gradient /= divisor
        norm = clip_to_norm(gradient, adam.grad_clip_norm)
        with np.errstate(over="ignore", invalid="ignore"):
            self._adam.update(self._parameters.flat, gradient, adam)
            self._parameters.refresh()
        return {"grad_norm": norm}

    def save(self, directory: Path) -> None:
        """Write a checkpoint; see `Trainer.save`."""
        layout = self._parameters.layout
        write_flat(directory / _WEIGHTS, layout, self._parameters.flat)
        write_flat(directory / _FIRST_MOMENT, layout, self._adam.first)
        write_flat(directory / _SECOND_MOMENT, layout, self._adam.second)
        write_info(directory, self._info("checkpoint"))

    def load(self, directory: Path, *, optimizer: bool) -> None:
        """Continue from a checkpoint; see `Trainer.load`."""
        info = read_info(directory)
        self._check_origin(info, directory)
        layout, flat = self._parameters.layout, self._parameters.flat
        weights = read_flat(directory / _WEIGHTS, layout, flat)
        if optimizer:
            self._adam = AdamState(
                read_flat(directory / _FIRST_MOMENT, layout, flat),
                read_flat(directory / _SECOND_MOMENT, layout, flat),
                info.step,
            )
        else:
            self._adam = AdamState.like(flat)
        flat[...] = weights
        self._parameters.refresh()
        self._gathered = None

    def load_adapter(self, directory: Path) -> None:
        """Take an adapter's weights from a snapshot; see `Trainer.load_adapter`."""
        info = read_info(directory)
        if self._lora is None:
            raise EngineError("this model trains all parameters; an adapter is for one that trains a LoRA adapter")
        if info.kind != "snapshot" or info.lora is None:
            raise EngineError(f"{directory.name} holds no LoRA adapter; export a snapshot of a model that trains one")
        self._check_fits(info, "adapter")
        flat = self._parameters.flat
        flat[...] = read_flat(directory / _ADAPTER, self._parameters.layout, flat)
        self._adam = AdamState.like(flat)
        self._parameters.refresh()
        self._gathered = None

    def export(self, directory: Path) -> None:
        """Write a sampler snapshot; see `Trainer.export`."""
        layout = self._parameters.model_layout
        write_flat(directory / "model.safetensors", layout, self._parameters.model)
        if self._lora is not None:
            write_flat(directory / _ADAPTER, self._parameters.layout, self._parameters.flat)
        tied = self._weights.unembedding is self._weights.embedding
        write_json(directory / "config.json", self._architecture.huggingface_config(tied=tied))
        write_info(directory, self._info("snapshot"))

    def _run(
        self,
        examples: list[PreparedExample],
        loss: Loss,
        settings: Mapping[str, float],
        gathered: _Gathered | None,
    ) -> LossResult:
        outputs: list[dict[str, Float32Array]] = [{} for _ in examples]
        gradients = None
        if gathered is not None:
            gradients = self._parameters.model_layout.bind(gathered.gradient)
        total = 0.0
        # What overflows is found by the checks below, which can say where.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for block in micro_batches(examples):
                tape = self._transformer.forward(self._weights, block.tokens)
                logprobs, head = self._transformer.target_logprobs(self._weights, tape, block.targets)
                rows = (*block.tokens.shape, -1)
                fields = {name: values.reshape(rows) for name, values in block.fields.items()}
                terms = loss.formula(logprobs.reshape(rows), fields, settings)
                losses, slopes = (term.reshape(logprobs.shape) * block.valid for term in terms)
                _check_finite(block, logprobs, losses, slopes)
                total += float(losses.sum(dtype=np.float64))
                _collect(outputs, examples, block, "logprobs", logprobs)
                if loss.name == "cross_entropy":
                    _collect(outputs, examples, block, "elementwise_loss", losses)
                if gathered is not None and gradients is not None:
                    active = np.any(slopes, axis=1).reshape(block.tokens.shape)
                    gathered.tokens += int(active.sum())
                    gathered.sequences += int(active.any(axis=1).sum())
                    self._transformer.backward(self._weights, gradients, tape, head, slopes)
        tokens = sum(
            np.count_nonzero(example.fields["weights"]) if loss.is_weighted else example.targets.size
            for example in examples
        )
        return LossResult(outputs, {"loss:sum": total, "tokens:sum": float(tokens)})

    def _info(self, kind: Literal["checkpoint", "snapshot"]) -> SnapshotInfo:
        return SnapshotInfo(
            kind=kind,
            base_model=self._architecture.name,
            lora=self._lora,
            step=self._adam.steps,
        )

    def _check_origin(self, info: SnapshotInfo, directory: Path) -> None:
        if info.kind != "checkpoint":
            raise EngineError(f"{directory} is a sampler snapshot: training cannot resume from it")
        self._check_fits(info, "checkpoint")

    def _check_fits(self, info: SnapshotInfo, what: str) -> None:
        if info.base_model != self._architecture.name:
            raise EngineError(f"the {what} is of {info.base_model}, this model of {self._architecture.name}")
        theirs, ours = _adapter_kind(info.lora), _adapter_kind(self._lora)
        if theirs != ours:
            raise EngineError(f"the {what} holds {theirs}, this model trains {ours}")


def _adapter_kind(lora: Lora | None) -> str:
    """Describe what must agree for one adapter's weights to mean the same in another."""
    if lora is None:
        return "all parameters"
    flags = {"attn": lora.train_attn, "mlp": lora.train_mlp, "unembed": lora.train_unembed}
    parts = "+".join(name for name, trained in flags.items() if trained)
    alpha = DEFAULT_ALPHA if lora.alpha is None else lora.alpha
    return f"a LoRA adapter of rank {lora.rank}, alpha {alpha:g}, on {parts}"


def _check_finite(block: MicroBatch, logprobs: FloatArray, losses: FloatArray, slopes: FloatArray) -> None:
    bad = ~(np.isfinite(logprobs) & np.isfinite(losses) & np.isfinite(slopes))
    bad &= block.valid
    if bad.any():
        row, position = divmod(int(np.flatnonzero(bad.any(axis=1))[0]), block.tokens.shape[1])
        raise EngineError(
            f"datum {block.indices[row]}: the loss is not finite at position {position}; "
            "check its advantages and logprobs, or lower the learning rate if this is the model"
        )


def _collect(
    outputs: list[dict[str, Float32Array]],
    examples: list[PreparedExample],
    block: MicroBatch,
    name: str,
    values: FloatArray,
) -> None:
    """Cut a padded block `[B * N, K]` into its examples' own shapes."""
    rows = values.astype(np.float32).reshape(*block.tokens.shape, -1)
    for row, index in zip(rows, block.indices, strict=True):
        length, width = examples[index].targets.shape
        outputs[index][name] = row[:length, :width].reshape(examples[index].target_shape).copy()
