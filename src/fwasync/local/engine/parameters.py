"""What is being trained: every weight of the model, or a low-rank adapter on some of them.

Both kinds look alike to the trainer: a flat vector of trainable numbers, a model to run, and the
way from a gradient of the model's weights to one of the trainable numbers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fwasync.local.engine.api import EngineError
from fwasync.local.engine.architecture import Layout

if TYPE_CHECKING:
    import numpy.typing as npt

    from fwasync.local.engine.api import Lora
    from fwasync.local.engine.architecture import Architecture, FloatArray

__all__ = ("DEFAULT_ALPHA", "FullParameters", "LoraParameters", "Parameters", "check_lora")

_MAX_RANK = 64
DEFAULT_ALPHA = 32.0
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


class Parameters(Protocol):
    """The trainable numbers and the model that they make."""

    @property
    def layout(self) -> Layout:
        """Places of the trainable numbers."""
        ...

    @property
    def flat(self) -> FloatArray:
        """The trainable numbers; whoever changes them calls `refresh` afterwards."""
        ...

    @property
    def model_layout(self) -> Layout:
        """Places of the model's weights."""
        ...

    @property
    def model(self) -> FloatArray:
        """The model's weights, adapter merged in."""
        ...

    def refresh(self) -> None:
        """Bring `model` up to date with `flat`."""
        ...

    def project(self, model_gradient: FloatArray) -> FloatArray:
        """Turn a gradient of `model` into the gradient of `flat`."""
        ...


class FullParameters:
    """Every weight is trained."""

    def __init__(self, architecture: Architecture, dtype: npt.DTypeLike) -> None:
        self.layout = self.model_layout = architecture.layout(tied=True)
        self.flat = self.model = architecture.initial_weights().astype(dtype)

    def refresh(self) -> None:
        """Nothing to do: the trained numbers are the model."""

    def project(self, model_gradient: FloatArray) -> FloatArray:
        """Hand the gradient through."""
        return model_gradient


class LoraParameters:
    """Frozen base weights W and trained A `[rank, in]`, B `[out, rank]`: W + scale B A.

    Hu et al., "LoRA", 2021; scale = alpha / rank. The product is merged before each pass and
    dW is projected afterwards (dB = scale dW A^T, dA = scale B^T dW): at this size one merged
    matrix is cheaper than two thin ones.
    """

    def __init__(self, architecture: Architecture, lora: Lora, seed: int, dtype: npt.DTypeLike) -> None:
        # An adapter on the head must leave the look-up alone, so the model gets a head of its own.
        self.model_layout = architecture.layout(tied=not lora.train_unembed)
        base = architecture.initial_weights()
        if lora.train_unembed:
            embedding = architecture.vocab_size * architecture.hidden_size
            base = np.concatenate((base, base[:embedding]))
        self._base = base.astype(dtype)
        self.model = self._base.copy()
        alpha = DEFAULT_ALPHA if lora.alpha is None else lora.alpha
        self._scale = alpha / lora.rank

        self._targets = _adapted_weights(self.model_layout, lora)
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self._targets:
            rows, columns = self.model_layout.shapes[name]
            down, up = _adapter_names(name)
            shapes[down], shapes[up] = (lora.rank, columns), (rows, lora.rank)
        self.layout = Layout(shapes, 0)
        self.flat = np.zeros(self.layout.size, dtype)
        rng = np.random.default_rng(seed % 2**64)
        for name in self._targets:
            down = self.layout.view(self.flat, _adapter_names(name)[0])
            bound = 1 / math.sqrt(down.shape[1])
            down[...] = rng.uniform(-bound, bound, down.shape)

    def refresh(self) -> None:
        """Merge the adapter into the base weights."""
        for name in self._targets:
            down, up = (self.layout.view(self.flat, part) for part in _adapter_names(name))
            merged = self.model_layout.view(self.model, name)
            np.matmul(up, down, out=merged)
            merged *= self._scale
            merged += self.model_layout.view(self._base, name)

    def project(self, model_gradient: FloatArray) -> FloatArray:
        """Project dW of every adapted matrix to dA and dB."""
        gradient = np.empty_like(self.flat)
        for name in self._targets:
            names = _adapter_names(name)
            down, up = (self.layout.view(self.flat, part) for part in names)
            down_gradient, up_gradient = (self.layout.view(gradient, part) for part in names)
            weight_gradient = self.model_layout.view(model_gradient, name) * self._scale
            np.matmul(up.T, weight_gradient, out=down_gradient)
            np.matmul(weight_gradient, down.T, out=up_gradient)
        return gradient


def check_lora(lora: Lora, architecture: Architecture) -> None:
    """Raise EngineError for an adapter that cannot be."""
    limit = min(_MAX_RANK, architecture.hidden_size)
    if not 1 <= lora.rank <= limit:
        raise EngineError(f"lora rank must be from 1 to {limit} for {architecture.name}, got {lora.rank}")
    if lora.alpha is not None and not (math.isfinite(lora.alpha) and lora.alpha > 0):
        raise EngineError(f"lora alpha must be a finite number above 0, got {lora.alpha}")
    if not (lora.train_attn or lora.train_mlp or lora.train_unembed):
        raise EngineError("lora trains nothing: set one of train_attn, train_mlp or train_unembed")


def _adapted_weights(layout: Layout, lora: Lora) -> list[str]:
    parts = (*(_ATTENTION if lora.train_attn else ()), *(_MLP if lora.train_mlp else ()))
    modules = (*parts, *(("lm_head",) if lora.train_unembed else ()))
    return [name for name in layout.shapes if name.removesuffix(".weight").endswith(modules)]


def _adapter_names(weight: str) -> tuple[str, str]:
    module = f"base_model.model.{weight.removesuffix('.weight')}"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"
