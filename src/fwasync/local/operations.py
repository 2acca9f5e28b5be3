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
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import msgspec

from fwasync._wire.messages import (
    AdapterLoaded,
    LoadAdapterRequest,
    LoadWeightsRequest,
    Message,
    ModelUnloaded,
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
from fwasync._wire.paths import split_cross_job
from fwasync._wire.protobuf.batches import decode_request
from fwasync._wire.protobuf.fields import ProtobufError
from fwasync._wire.tensors import ForwardBackwardRequest
from fwasync.local import batches
from fwasync.local.engine.api import Adam, EngineError, Trainer
from fwasync.local.refusal import Refusal, Refused, Unacceptable
from fwasync.local.results import Result, json_result
from fwasync.local.weights import NameTaken, WeightsPath, WeightStore, check_name

__all__ = ("Kind", "Operations", "Submission", "Target", "Work", "digest_of", "expiry")

Kind = Literal[
    "forward",
    "forward_backward",
    "optim_step",
    "save_weights",
    "load_weights",
    "load_adapter",
    "save_weights_for_sampler",
    "unload_model",
]


@dataclass(slots=True, eq=False)
class Target:
    """What `work` works on: a model as the training thread sees it, and the trainer job that it belongs to, if any."""

    model_id: str
    session_id: str
    job: str | None = None
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


Work = Callable[[Target], Result]


@dataclass(frozen=True, slots=True)
class Submission:
    """A request that names its model. One that is refused has no `work`.

    `kind` is what it asks for, which need not be what the path of its request says.
    `unnamed` is set where the operation makes a sampling session out of an unnamed snapshot: the
    session's number and the snapshot's place.
    """

    kind: Kind
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


class Operations:
    """Reads requests.

    Args:
        store: Where checkpoints and snapshots are.
        losses: The names of the losses that the engine has.
        of_job: Finds the checkpoint that a trainer job has saved under a name.
        of_model: Finds the snapshot that a promoted model is, by its full name.
    """

    def __init__(
        self,
        store: WeightStore,
        losses: Collection[str],
        of_job: Callable[[str, str], WeightsPath | None],
        of_model: Callable[[str], Path | None],
    ) -> None:
        self._store = store
        self._losses = losses
        self._of_job = of_job
        self._of_model = of_model
        self._readers: dict[Kind, Callable[[bytes], tuple[Work, tuple[int, Path] | None]]] = {
            "forward": self._forward,
            "forward_backward": self._forward_backward,
            "optim_step": self._optim_step,
            "save_weights": self._save_weights,
            "load_weights": self._load_weights,
            "load_adapter": self._load_adapter,
            "save_weights_for_sampler": self._save_weights_for_sampler,
            "unload_model": self._unload_model,
        }

    def read(self, kind: Kind, body: bytes, *, protobuf: bool = False) -> Submission:
        """Decode and check a request; only batches come as protobuf.

        Raises:
            Refused: Not even its model and number can be read.
        """
        if protobuf:
            return self._protobuf_batch(kind, body)
        digest = digest_of(body)
        try:
            work, unnamed = self._readers[kind](body)
            refusal = None
        except msgspec.MsgspecError as error:
            work, unnamed, refusal = None, None, Refusal(422, f"{kind}: {error}")
        except Unacceptable as error:
            work, unnamed, refusal = None, None, Refusal(400, f"{kind}: {error}")
        try:
            identity = decode(body, _Identity)
        except msgspec.MsgspecError as error:
            raise Refused(422, refusal.detail if refusal else f"{kind}: {error}") from None
        _check_number(kind, identity.seq_id)
        if unnamed is not None:
            # Older clients repeat a lost request under a new session number: it is still the same one.
            again = decode(body, SaveWeightsForSamplerRequest)
            again.sampling_session_seq_id = None
            digest = digest_of(encode(again))
        return Submission(kind, identity.model_id, identity.seq_id, digest, work, refusal, unnamed)

    # -- forward and backward ----------------------------------------------------------------------

    def _forward(self, body: bytes) -> tuple[Work, None]:
        message = decode(body, ForwardBackwardRequest).forward_input
        if message is None:
            raise msgspec.ValidationError("Object missing required field `forward_input` - at `$`")
        return _run("forward", batches.from_json(message, self._losses)), None

    def _forward_backward(self, body: bytes) -> tuple[Work, None]:
        message = decode(body, ForwardBackwardRequest).forward_backward_input
        if message is None:
            raise msgspec.ValidationError("Object missing required field `forward_backward_input` - at `$`")
        return _run("forward_backward", batches.from_json(message, self._losses)), None

    def _protobuf_batch(self, kind: Kind, body: bytes) -> Submission:
        try:
            head = decode_request(body)
        except ProtobufError as error:
            raise Refused(422, f"{kind}: {error}") from None
        _check_number(kind, head.seq_id)
        if head.forward_only:
            kind = "forward"
        try:
            work, refusal = _run(kind, batches.from_protobuf(head, self._losses)), None
        except Unacceptable as error:
            work, refusal = None, Refusal(400, f"{kind}: {error}")
        return Submission(kind, head.model_id, head.seq_id, digest_of(body), work, refusal)

    def _optim_step(self, body: bytes) -> tuple[Work, None]:
        message = decode(body, OptimStepRequest)
        given = msgspec.structs.asdict(message.adam_params)
        adam = Adam(**{name: value for name, value in given.items() if value is not None})
        normalization = message.grad_accumulation_normalization
        if normalization not in (None, "num_loss_tokens", "num_sequences", "none"):
            raise Unacceptable(
                f"grad_accumulation_normalization {normalization!r} is unknown: "
                "use num_loss_tokens, num_sequences or none"
            )

        def work(target: Target) -> Result:
            metrics = target.need().optim_step(adam, normalization)
            batches.check_finite(metrics)
            return json_result(OptimStepResult(metrics=dict(metrics)))

        return work, None

    # -- weights -----------------------------------------------------------------------------------

    def _save_weights(self, body: bytes) -> tuple[Work, None]:
        message = decode(body, SaveWeightsRequest)
        name = _name(message.path)
        notes = {"user_metadata": message.user_metadata, "expires_at": expiry(message.ttl_seconds)}

        def work(target: Target) -> Result:
            path = WeightsPath(target.model_id, "weights", name)
            self._write(path, target.need().save, notes, overwrite=bool(message.overwrite))
            # Trainer jobs call their checkpoints by their names alone.
            return json_result(WeightsSaved(path=str(path) if target.job is None else name))

        return work, None

    def _load_weights(self, body: bytes) -> tuple[Work, None]:
        message = decode(body, LoadWeightsRequest)
        optimizer = message.optimizer is True

        def work(target: Target) -> Result:
            path, directory = self.checkpoint(message.path, target.model_id, target.job)
            target.need().load(directory, optimizer=optimizer)
            return json_result(WeightsLoaded(path=str(path), model_id=target.model_id))

        return work, None

    def _load_adapter(self, body: bytes) -> tuple[Work, None]:
        message = decode(body, LoadAdapterRequest)

        def work(target: Target) -> Result:
            target.need().load_adapter(self._adapter(message.adapter_path))
            return json_result(AdapterLoaded(model_id=target.model_id, adapter_path=message.adapter_path))

        return work, None

    def _adapter(self, text: str) -> Path:
        if text.startswith("accounts/"):
            directory = self._of_model(text)
            if directory is None:
                raise EngineError(f"there is no model {text} that was promoted here")
            return directory
        try:
            path = WeightsPath.parse(text)
        except ValueError:
            raise EngineError(
                f"{text!r} is no adapter of this service: give a promoted model as accounts/<account>/models/<model>, "
                "or a snapshot as tinker://<model_id>/sampler_weights/<name>"
            ) from None
        directory = self._store.directory(path)
        if path.kind != "sampler_weights" or not directory.is_dir():
            raise EngineError(f"there is no snapshot {path} in this data directory")
        return directory

    def checkpoint(self, text: str, model_id: str | None, job: str | None) -> tuple[WeightsPath, Path]:
        """Find a checkpoint.

        Args:
            text: Its path, `cross_job://<job>/<name>`, or a bare name.
            model_id: Whose the bare name is in the first place.
            job: Whose else it may be: the newest of that name of this trainer job.

        Raises:
            EngineError: There is none.
        """
        try:
            path = self._checkpoint_path(text, model_id, job)
        except ValueError as error:
            raise EngineError(str(error)) from None
        if path.kind != "weights":
            raise EngineError(f"{path} holds weights for a sampler; training goes on from …/weights/<name>")
        directory = self._store.directory(path)
        if not directory.is_dir():
            raise EngineError(f"there is no checkpoint {path} in this data directory")
        return path, directory

    def _checkpoint_path(self, text: str, model_id: str | None, job: str | None) -> WeightsPath:
        name, cross_job = text, split_cross_job(text)
        if cross_job is not None:
            job, name = cross_job
        elif "://" in text or (model_id is None and job is None):
            return WeightsPath.parse(text)
        elif model_id is not None:
            own = WeightsPath(model_id, "weights", check_name(text))
            if job is None or self._store.directory(own).is_dir():
                return own
        found = self._of_job(job or "", name)
        if found is None:
            raise EngineError(f"trainer job {job!r} has saved no checkpoint {name!r}")
        return found

    def _save_weights_for_sampler(self, body: bytes) -> tuple[Work, tuple[int, Path] | None]:
        message = decode(body, SaveWeightsForSamplerRequest)
        if message.kind not in (None, "snapshot"):
            raise Unacceptable(
                f"there is no kind {message.kind!r}: the weights of a sampler never change; use snapshot"
            )
        notes = {
            "checkpoint_type": message.checkpoint_type,
            "user_metadata": message.user_metadata,
            "expires_at": expiry(message.ttl_seconds),
        }
        if message.path is not None:
            name = _name(message.path)

            def named(target: Target) -> Result:
                path = WeightsPath(target.model_id, "sampler_weights", name)
                self._write(path, target.need().export, notes)
                return json_result(SamplerWeightsSaved(path=str(path)))

            return named, None
        number = message.sampling_session_seq_id
        if number is None:
            raise Unacceptable("it needs a path (a name) or a sampling_session_seq_id")
        directory = self._store.unnamed()

        def unnamed(target: Target) -> Result:
            self._store.write(directory, target.need().export, notes)
            return json_result(SamplerWeightsSaved(sampling_session_id=f"{target.session_id}:sample:{number}"))

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

        def work(target: Target) -> Result:
            target.trainer, target.gone = None, f"model {target.model_id} was unloaded"
            return json_result(ModelUnloaded(model_id=target.model_id))

        return work, None


# -- helpers -----------------------------------------------------------------------------------------


def _run(kind: Kind, batch: batches.Batch) -> Work:
    if kind == "forward":
        return lambda target: batch.run(target.need().forward)
    return lambda target: batch.run(target.need().forward_backward)


def _check_number(kind: Kind, seq_id: int | None) -> None:
    if seq_id is not None and seq_id < 1:
        raise Refused(400, f"{kind}: seq_id is {seq_id}; the numbers of a model start at 1")


# What the API documents: from an hour to ten years.
_LIVES = range(3600, 10 * 366 * 86400)


def expiry(ttl_seconds: int | None) -> str | None:
    """When that time from now is over; `None` is never.

    Raises:
        Unacceptable: The API has no such time to live.
    """
    if ttl_seconds is None:
        return None
    if ttl_seconds not in _LIVES:
        raise Unacceptable(f"ttl_seconds is {ttl_seconds}: give 3600 (an hour) to ten years, or null for ever")
    return (datetime.now(UTC) + timedelta(seconds=ttl_seconds)).isoformat()


def _name(name: str | None) -> str:
    if name is None:
        raise Unacceptable("it needs a path: the name to save under")
    try:
        return check_name(name)
    except ValueError as error:
        raise Unacceptable(str(error)) from None
