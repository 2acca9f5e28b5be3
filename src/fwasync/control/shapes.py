"""Shapes: from a name to the version that is meant."""

from __future__ import annotations

from fwasync._wire.control import (
    DeploymentShapeVersion,
    DeploymentShapeVersionList,
    TrainingShapeVersion,
    TrainingShapeVersionList,
)
from fwasync.control.names import path_of
from fwasync.control.plane import Plane
from fwasync.control.resources import DeploymentShapeProfile, TrainingShapeProfile
from fwasync.errors import NotFoundError, UsageError

__all__ = ("resolve_deployment_profile", "resolve_training_profile")

_LATEST = [("filter", "latest_validated=true"), ("pageSize", "1")]


async def resolve_training_profile(plane: Plane, name: str) -> TrainingShapeProfile:
    """The latest validated version of a training shape, or the version that is named."""
    what, path, versioned = _asked(name, "trainingShapes")
    if versioned:
        return TrainingShapeProfile.read(await plane.get(what, path, TrainingShapeVersion))
    rows = (await plane.get(what, f"{path}/versions", TrainingShapeVersionList, _LATEST)).training_shape_versions
    if not rows:
        raise _no_version(what)
    return TrainingShapeProfile.read(rows[0])


async def resolve_deployment_profile(plane: Plane, name: str) -> DeploymentShapeProfile:
    """The latest validated version of a deployment shape, or the version that is named."""
    what, path, versioned = _asked(name, "deploymentShapes")
    if versioned:
        return DeploymentShapeProfile.read(await plane.get(what, path, DeploymentShapeVersion))
    rows = (await plane.get(what, f"{path}/versions", DeploymentShapeVersionList, _LATEST)).deployment_shape_versions
    if not rows:
        raise _no_version(what)
    return DeploymentShapeProfile.read(rows[0])


def _asked(name: str, kind: str) -> tuple[str, str, bool]:
    parts = name.split("/")
    if len(parts) not in (4, 6) or parts[2] != kind or parts[4:5] not in ([], ["versions"]):
        raise UsageError(f"{name!r} is not a shape's full name; pass one like accounts/fireworks/{kind}/<shape>")
    return f"resolving shape {name}", f"v1/{path_of(name)}", len(parts) == 6


def _no_version(what: str) -> NotFoundError:
    return NotFoundError(
        f"{what}: it has no latest validated version; name a version (…/versions/<version>), or choose another shape",
        status=404,
    )
