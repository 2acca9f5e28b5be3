"""Models: the base models, and those that were promoted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fwasync._wire.control import Model, ModelList
from fwasync.local.control.names import ACCOUNT, engine_name, model_name, page_of
from fwasync.local.control.records import ModelRecord
from fwasync.local.control.shapes import base_model_resource
from fwasync.local.control.shelf import Shelf
from fwasync.local.engine.api import BaseModel
from fwasync.local.refusal import Refused
from fwasync.local.sampling_thread import Weights

__all__ = ("Models",)


class Models:
    """Answers about models.

    Args:
        promoted: The records of promoted models.
        base_models: The engine's.
        root: Where the weights of promoted models are, in a directory each.
    """

    def __init__(self, promoted: Shelf[ModelRecord], base_models: Mapping[str, BaseModel], root: Path) -> None:
        self._promoted = promoted
        self._root = root
        self._base = {entry.name: entry for entry in map(base_model_resource, base_models.values())}

    def get(self, name: str) -> Model:
        """A model by its full name.

        Raises:
            Refused: There is none of that name.
        """
        record = self._record(name)
        found = self._base.get(name) or (record and record.resource)
        if found is None:
            raise Refused(404, f"there is no model {name!r}; this service brings along: {', '.join(self._base)}")
        return found

    def weights(self, name: str) -> Weights:
        """What a model samples from.

        Raises:
            Refused: There is none of that name.
        """
        record = self._record(name)
        if record is not None:
            return Weights(record.engine_model, self._root / record.id)
        return Weights(engine_name(self.get(name).name), None)

    def promoted(self, name: str) -> Path | None:
        """Where the snapshot is that a promoted model was made of; `None` if there is no such model."""
        record = self._record(name)
        return None if record is None else self._root / record.id

    def of_engine(self, name: str) -> Model:
        """A base model by the engine's name."""
        return self._base[model_name(name)]

    def _record(self, name: str) -> ModelRecord | None:
        prefix, _, model_id = name.rpartition("/")
        return self._promoted.find(model_id) if prefix == f"accounts/{ACCOUNT}/models" else None

    def list(self, account: str, query: Mapping[str, str]) -> ModelList:
        """The models of an account."""
        everything = [*self._base.values(), *(record.resource for record in self._promoted.all())]
        found = [model for model in everything if model.name.startswith(f"accounts/{account}/")]
        page, token = page_of(found, query)
        return ModelList(models=page, next_page_token=token, total_size=len(found))
