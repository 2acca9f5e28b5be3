"""The base of all configurations: immutable, and a mistyped name is answered with the nearest right one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

__all__ = ("Config", "DeploymentShapeName", "NonEmpty", "ResourceId", "Seconds", "TrainingShapeName", "WholeSeconds")


class Config(BaseModel):
    """A configuration. Change one with `model_copy(update=…)`, which checks as little as pydantic's does."""

    # Errors name the field and not what was given: a key in the wrong place must not be shown.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    not_taken: ClassVar[Mapping[str, str]] = {}
    """Names that such configurations have elsewhere: why they are not taken, and what is to be done instead."""

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, given: object) -> object:
        if isinstance(given, Mapping):
            known = list(cls.model_fields)
            problems: list[str] = []
            for name in map(str, cast("Mapping[object, object]", given)):
                if name in cls.not_taken:
                    problems.append(f"{cls.__name__} does not take {name!r}: {cls.not_taken[name]}")
                elif name not in known:
                    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                    hint = f"did you mean {nearest[0]!r}?" if nearest else f"it has: {', '.join(known)}"
                    problems.append(f"{cls.__name__} has no field {name!r}; {hint}")
            if problems:
                raise ValueError("\n".join(problems))
        return cast("object", given)


def _shape_name(kind: str, called: str) -> AfterValidator:
    pattern = re.compile(rf"accounts/[^/\s]+/{kind}/[^/\s]+(/versions/[^/\s]+)?")

    def check(name: str) -> str:
        if not pattern.fullmatch(name):
            example = f"accounts/fireworks/{kind}/{name if re.fullmatch(r'[A-Za-z0-9._-]+', name) else '<shape>'}"
            raise ValueError(f"{name!r} is not the full name of a {called}; pass one like {example!r}")
        return name

    return AfterValidator(check)


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty; leave it unset or give a value")
    return text


def _resource_id(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", value):
        raise ValueError(
            f"{value!r} is not an id: 1 to 63 lower-case letters, digits and hyphens, with no hyphen at either end"
        )
    return value


NonEmpty = Annotated[str, AfterValidator(_not_empty)]
"""Text of which something is there."""

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A positive, finite time."""

WholeSeconds = Annotated[int, Field(gt=0)]
"""A positive time in whole seconds."""


TrainingShapeName = Annotated[str, _shape_name("trainingShapes", "training shape")]
"""The full name of a training shape, with or without `/versions/…`."""

DeploymentShapeName = Annotated[str, _shape_name("deploymentShapes", "deployment shape")]
"""The full name of a deployment shape, with or without `/versions/…`."""

ResourceId = Annotated[str, AfterValidator(_resource_id)]
"""The id of a trainer job or deployment, the last part of its name."""
