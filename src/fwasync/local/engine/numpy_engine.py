"""The engine that needs nothing but numpy: the built-in base models, trained and sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fwasync.local.engine.api import EngineError
from fwasync.local.engine.architecture import ARCHITECTURES, find_architecture
from fwasync.local.engine.sampler import NumpySampler
from fwasync.local.engine.storage import read_flat, read_info
from fwasync.local.engine.trainer import NumpyTrainer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fwasync.local.engine.api import BaseModel, Lora, SnapshotInfo

__all__ = ("NumpyEngine",)


class NumpyEngine:
    """`Engine` of the built-in models; it has no state of its own."""

    def __init__(self) -> None:
        _keep_freed_memory()

    @property
    def models(self) -> Mapping[str, BaseModel]:
        """The known base models by name."""
        return {name: found.base_model for name, found in ARCHITECTURES.items()}

    def trainer(self, base_model: str, lora: Lora | None, *, seed: int | None = None) -> NumpyTrainer:
        """Start training a base model; see `Engine.trainer`."""
        return NumpyTrainer(find_architecture(base_model), lora, seed=seed or 0)

    def sampler(self, base_model: str, snapshot: Path | None) -> NumpySampler:
        """Serve a snapshot, or the base model itself; see `Engine.sampler`."""
        architecture = find_architecture(base_model)
        if snapshot is None:
            layout, flat = architecture.layout(tied=True), architecture.initial_weights()
        else:
            info = read_info(snapshot)
            if info.kind != "snapshot":
                raise EngineError(f"{snapshot} is a training checkpoint: export a snapshot of it")
            if info.base_model != base_model:
                raise EngineError(f"{snapshot} is of {info.base_model}, not of {base_model}")
            layout = architecture.layout(tied=info.lora is None or not info.lora.train_unembed)
            empty = np.empty(0, np.float32)
            flat = read_flat(snapshot / "model.safetensors", layout, empty)
        flat.flags.writeable = False
        return NumpySampler(architecture, layout.bind(flat))

    def snapshot_info(self, path: Path) -> SnapshotInfo:
        """Tell what a saved directory holds; see `Engine.snapshot_info`."""
        return read_info(path)


def _keep_freed_memory() -> None:
    """Let the C allocator reuse the memory of activations instead of returning it each time.

    glibc maps every block above a threshold anew, which cost a third of a training step in page
    faults. Freeing one mapped block raises the threshold to its size; 32 MiB is the most that
    glibc accepts. The block is never touched, and elsewhere this does nothing.
    """
    np.empty(31 * 2**20, np.uint8)
