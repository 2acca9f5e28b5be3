"""Checkpoints and snapshots on disk: safetensors files beside a meta.json.

A checkpoint has `weights`, `first_moment` and `second_moment` (of an adapter, A and B only). A
snapshot has `model`, adapter merged, and the `config.json` with which Hugging Face tools open it; of an
adapter also `adapter`, its A and B.
meta.json is written last; reading checks everything before it returns.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError

# The stubs of safetensors leave the parameter of PathLike open.
from safetensors.numpy import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from fwasync.local.engine.api import EngineError, Lora, SnapshotInfo

if TYPE_CHECKING:
    from fwasync.local.engine.architecture import FloatArray, Layout

__all__ = ("read_flat", "read_info", "write_flat", "write_info", "write_json")

_FORMAT = 1
_META = "meta.json"


def write_info(directory: Path, info: SnapshotInfo) -> None:
    """Write meta.json, which makes the directory complete."""
    write_json(directory / _META, {"format": _FORMAT, **asdict(info)})


def read_info(directory: Path) -> SnapshotInfo:
    """Read meta.json; EngineError if there is none or it is not one of ours."""
    path = directory / _META
    try:
        meta: dict[str, Any] = json.loads(path.read_bytes())
        if meta["format"] != _FORMAT:
            raise EngineError(f"{path} has format {meta['format']!r}; this engine reads {_FORMAT}")
        if meta["kind"] not in ("checkpoint", "snapshot"):
            raise EngineError(f"{path} is of the unknown kind {meta['kind']!r}")
        return SnapshotInfo(
            kind=meta["kind"],
            base_model=str(meta["base_model"]),
            lora=None if meta["lora"] is None else Lora(**meta["lora"]),
            step=int(meta["step"]),
        )
    except OSError as error:
        raise EngineError(f"{directory} holds no checkpoint or snapshot: {error}") from error
    except EngineError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{path} is damaged: {error!r}") from error


def write_json(path: Path, content: object) -> None:
    """Write indented JSON with a final line break."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_flat(path: Path, layout: Layout, flat: FloatArray) -> None:
    """Write a flat vector as named tensors."""
    # Readers of the Hugging Face family refuse a file that does not name its framework.
    save_file(dict(layout.named(flat)), path, metadata={"format": "pt"})


def read_flat(path: Path, layout: Layout, like: FloatArray) -> FloatArray:
    """Read the named tensors of `layout` into a new vector of the type of `like`.

    EngineError if the file is missing or damaged, or if its tensors are others.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise EngineError(f"cannot read {path}: {error}") from error
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != layout.shapes:
        differing = sorted(
            name for name in shapes.keys() | layout.shapes.keys() if shapes.get(name) != layout.shapes.get(name)
        )
        raise EngineError(f"{path} does not fit this model; it differs in {', '.join(differing)}")
    flat = np.empty(layout.size, like.dtype)
    for name, view in layout.named(flat).items():
        view[...] = tensors[name]
    return flat
