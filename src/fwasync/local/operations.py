"""What each training operation does: from the body of its request to the body of its result.

Nothing here runs on the event loop. `Operations.read` runs where large bodies may be decoded, and the
`work` that it returns runs on the training thread.

Invariants
    * `read` changes nothing; `work` is called at most once.
    * `work` raises EngineError or OSError for what the sender should know about, and anything else
      only for a fault of ours.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from fwasync._wire.messages import (
    LoadWeightsRequest,
    Message,
    OptimStepRequest,
    OptimStepResult,
    SamplerWeightsSaved,
    SaveWeightsForSamplerRequest,
    SaveWeightsRequest,
    UnloadModelRequest,
    WeightsLoaded,
    WeightsSaved,
    decode,
    encode,
)
from fwasync._wire.tensors import (
    BatchMessage,
    ForwardBackwardRequest,
    ForwardBackwardResult,
    decode_batch,
    encode_outputs,
)
from fwasync.local.engine.api import Adam, EngineError, Example, Trainer
from fwasync.local.refusal import Refusal, Refused
from fwasync.local.weights import NameTaken, WeightsPath, WeightStore, check_name

__all__ = ("Kind", "Operations", "Submission", "Target", "digest_of")

Kind = Literal[
    "forward",
    "forward_backward",
    "optim_step",
    "save_weights",
    "load_weights",
    "save_weights_for_sampler",
    "unload_model",
]


@dataclass(slots=True, eq=False)
class Target:
    """What `work` works on: a model as the training thread sees it."""

    model_id: str
    session_id: str
    trainer: Trainer | None = None
    gone: str = "the model is not there yet"

    def need(self) -> Trainer:
        """The trainer.

        Raises:
            EngineError: There is none, and why.
        """
        if self.trainer is None:
            raise EngineError(self.gone)
        return self.trainer


Work = Callable[[Target], bytes]


@dataclass(frozen=True, slots=True)
class Submission:
    """A request that names its model. One that is refused has no `work`.

    `unnamed` is set where the operation makes a sampling session out of an unnamed snapshot: the
    session's number and the snapshot's place.
    """

    model_id: str
    seq_id: int | None
    digest: bytes
    work: Work | None
    refusal: Refusal | None = None
    unnamed: tuple[int, Path] | None = None


def digest_of(body: bytes) -> bytes:
    """What stands for a request's content."""
    return hashlib.blake2b(body, digest_size=16).digest()


class _Identity(Message):
    model_id: str
    seq_id: int | None = None


class _Unacceptable(Exception):
    """The content of a request is at fault."""


class Operations:
    """Reads requests.

    Args:
        store: Where checkpoints and snapshots are.
        losses: The names of the losses that the engine has.
    """

    def __init__(self, store: WeightStore, losses: Collection[str]) -> None:
        self._store = store
        self._losses = losses
        self._readers: dict[Kind, Callable[[bytes], tuple[Work, tuple[int, Path] | None]]] = {
            "forward": self._forward,
            "forward_backward": self._forward_backward,
            "optim_step": self._optim_step,
            "save_weights": self._save_weights,
            "load_weights": self._load_weights,
            "save_weights_for_sampler": self._save_weights_for_sampler,
            "unload_model": self._unload_model,
        }

    def read(self, kind: Kind, body: bytes) -> Submission:
        """Decode and check a request.

        Raises:
            Refused: Not even its model and number can be read.
        """
        digest = digest_of(body)
        try:
            work, unnamed = self._readers[kind](body)
            refusal = None
        except msgspec.MsgspecError as error:
            work, unnamed, refusal = None, None, Refusal(422, f"{kind}: {error}")
        except _Unacceptable as error:
            work, unnamed, refusal = None, None, Refusal(400, f"{kind}: {error}")
        try:
            identity = decode(body, _Identity)
        except msgspec.MsgspecError as error:
            raise Refused(422, refusal.detail if refusal else f"{kind}: {error}") from None
        if identity.seq_id is not None and identity.seq_id < 1:
            raise Refused(400, f"{kind}: seq_id is {identity.seq_id}; the numbers of a model start at 1")
        if unnamed is not None:
            # Older clients repeat a lost request under a new session number: it is still the same one.
            again = decode(body, SaveWeightsForSamplerRequest)
            again.sampling_session_seq_id = None
            digest = digest_of(encode(again))
        return Submission(identity.model_id, identity.seq_id, digest, work, refusal, unnamed)

    # -- forward and backward ----------------------------------------------------------------------

    def _forward(self, body: bytes) -> tuple[Work, None]:
        message = decode(body, ForwardBackwardRequest)
        batch = self._batch(message.forward_input, "forward_input")
        examples, config = _examples(batch), _config(batch.loss_fn_config)
        return lambda target: _losses(target.need().forward, examples, batch.loss_fn, config), None

    def _forward_backward(self, body: bytes) -> tuple[Work, None]:
        message = decode(body, ForwardBackwardRequest)
        batch = self._batch(message.forward_backward_input, "forward_backward_input")
        examples, config = _examples(batch), _config(batch.loss_fn_config)
        return lambda target: _losses(target.need().forward_backward, examples, batch.loss_fn, config), None

    def _batch(self, batch: BatchMessage | None, name: str) -> BatchMessage:
        if batch is None:
            raise msgspec.ValidationError(f"Object missing required field `{name}` - at `$`")
        if not batch.data:
            raise _Unacceptable("the batch is empty: send at least one datum")
        if batch.loss_fn not in self._losses:
            raise _Unacceptable(f"unknown loss_fn {batch.loss_fn!r}; this service has: {', '.join(self._losses)}")
        return batch

    def _optim_step(self, body: bytes) -> tuple[Work, None]:
        message = decode(body, OptimStepRequest)
        given = msgspec.structs.asdict(message.adam_params)
        adam = Adam(**{name: value for name, value in given.items() if value is not None})
        normalization = message.grad_accumulation_normalization
        if normalization not in (None, "num_loss_tokens", "num_sequences", "none"):
            raise _Unacceptable(
                f"grad_accumulation_normalization {normalization!r} is unknown: "
                "use num_loss_tokens, num_sequences or none"
            )

        def work(target: Target) -> bytes:
            metrics = target.need().optim_step(adam, normalization)
            _check_finite(metrics)
            return encode(OptimStepResult(metrics=dict(metrics)))

        return work, None

    # -- weights -----------------------------------------------------------------------------------

    def _save_weights(self, body: bytes) -> tuple[Work, None]:
        message = decode(body, SaveWeightsRequest)
        name = _name(message.path)

        def work(target: Target) -> bytes:
            path = WeightsPath(target.model_id, "weights", name)
            self._write(path, target.need().save, {}, overwrite=bool(message.overwrite))
            return encode(WeightsSaved(path=str(path)))

        return work, None

    def _load_weights(self, body: bytes) -> tuple[Work, None]:
        message = decode(body, LoadWeightsRequest)
        optimizer = message.optimizer is True

        def work(target: Target) -> bytes:
            path = _checkpoint_path(message.path, target.model_id)
            directory = self._store.directory(path)
            if not directory.is_dir():
                raise EngineError(f"there is no checkpoint {path} in this data directory")
            target.need().load(directory, optimizer=optimizer)
            return encode(WeightsLoaded(path=str(path), model_id=target.model_id))

        return work, None

    def _save_weights_for_sampler(self, body: bytes) -> tuple[Work, tuple[int, Path] | None]:
        message = decode(body, SaveWeightsForSamplerRequest)
        notes = {"checkpoint_type": message.checkpoint_type}
        if message.path is not None:
            name = _name(message.path)

            def named(target: Target) -> bytes:
                path = WeightsPath(target.model_id, "sampler_weights", name)
                self._write(path, target.need().export, notes)
                return encode(SamplerWeightsSaved(path=str(path)))

            return named, None
        number = message.sampling_session_seq_id
        if number is None:
            raise _Unacceptable("it needs a path (a name) or a sampling_session_seq_id")
        directory = self._store.unnamed()

        def unnamed(target: Target) -> bytes:
            self._store.write(directory, target.need().export, notes)
            return encode(SamplerWeightsSaved(sampling_session_id=f"{target.session_id}:sample:{number}"))

        return unnamed, (number, directory)

    def _write(
        self,
        path: WeightsPath,
        fill: Callable[[Path], None],
        notes: Mapping[str, object],
        *,
        overwrite: bool = False,
    ) -> None:
        try:
            self._store.write(self._store.directory(path), fill, notes, overwrite=overwrite)
        except NameTaken:
            way_out = "choose another name" + (" or pass overwrite" if path.kind == "weights" else "")
            raise EngineError(f"{path} exists already: {way_out}") from None

    def _unload_model(self, body: bytes) -> tuple[Work, None]:
        decode(body, UnloadModelRequest)

        def work(target: Target) -> bytes:
            target.trainer, target.gone = None, f"model {target.model_id} was unloaded"
            return b'{"type":"unload_model","model_id":' + msgspec.json.encode(target.model_id) + b"}"

        return work, None


# -- helpers -----------------------------------------------------------------------------------------


def _examples(batch: BatchMessage) -> list[Example]:
    try:
        return [Example(tokens, inputs) for tokens, inputs in decode_batch(batch.data)]
    except ValueError as error:
        raise _Unacceptable(str(error)) from None


def _config(config: Mapping[str, Any] | None) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, value in (config or {}).items():
        if value is None:
            continue
        if not isinstance(value, (int, float)):
            raise _Unacceptable(f"loss_fn_config[{name!r}] is {value!r}; this service takes numbers only")
        numbers[name] = float(value)
    return numbers


def _losses(
    compute: Callable[[list[Example], str, Mapping[str, float]], Any],
    examples: list[Example],
    loss_fn: str,
    config: Mapping[str, float],
) -> bytes:
    result = compute(examples, loss_fn, config)
    _check_finite(result.metrics)
    for index, record in enumerate(result.outputs):
        for name, array in record.items():
            if not np.isfinite(array).all():
                raise EngineError(f"{name} of datum {index} is not finite")
    return b"".join(
        encode_outputs(
            ForwardBackwardResult(
                outputs=[dict(record) for record in result.outputs],
                metrics=dict(result.metrics),
                output_type=loss_fn,
            )
        )
    )


def _check_finite(metrics: Mapping[str, float]) -> None:
    # JSON has no word for NaN, and clients stumble over what encoders write instead.
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise EngineError(f"metric {name} is {value}")


def _name(name: str | None) -> str:
    if name is None:
        raise _Unacceptable("it needs a path: the name to save under")
    try:
        return check_name(name)
    except ValueError as error:
        raise _Unacceptable(str(error)) from None


def _checkpoint_path(text: str, model_id: str) -> WeightsPath:
    try:
        path = WeightsPath.parse(text) if "://" in text else WeightsPath(model_id, "weights", check_name(text))
    except ValueError as error:
        raise EngineError(str(error)) from None
    if path.kind != "weights":
        raise EngineError(f"{path} holds weights for a sampler; training goes on from …/weights/<name>")
    return path
