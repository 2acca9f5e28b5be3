"""What a run has brought up on the control plane, written down in its directory, so that a killed run's can be found.

A process that is killed outright removes nothing. The names of what it creates are in `resources.json` before it does;
the process that goes on with the run finds them there. What still fits is taken over, and the rest is removed.

Invariants
    * Only what a run of this directory has created itself is taken over or removed, and never that of another machine,
      or of a directory that was copied or moved: its run may be alive. That is told.
    * What is taken over is removed in the end, as if it had been created here.
"""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from fwasync.config import DeployConfig, InfraConfig
from fwasync.config.launch import new_job_id, removed_after
from fwasync.config.reference import derived_deployment_id
from fwasync.control.deployments import AsyncDeploymentManager
from fwasync.control.trainer_jobs import AsyncTrainerJobManager
from fwasync.errors import FwasyncError
from fwasync.recipes.config import RecipeConfig
from fwasync.tracking.files import write_atomically

__all__ = ("RESOURCES", "Claims", "claimed")

RESOURCES = "resources.json"
"""In the directory of a run that has trainer jobs or a deployment."""

_FAREWELL_S = 10.0
_ALIVE = frozenset({"RUNNING", "CREATING", "PENDING", "RE_QUEUEING", "PAUSED"})


@dataclass(frozen=True, slots=True)
class Claims:
    """The names of what a run creates; `None` where it creates nothing.

    Attributes:
        policy: The policy's trainer job.
        reference: The reference's.
        deployment: The deployment.
        taken: Those of them that an earlier process of the run has left.
    """

    policy: str | None = None
    reference: str | None = None
    deployment: str | None = None
    taken: frozenset[str] = field(default=frozenset())

    def names(self) -> dict[str, str]:
        """By role."""
        roles = {"policy": self.policy, "reference": self.reference, "deployment": self.deployment}
        return {role: name for role, name in roles.items() if name}


@dataclass(frozen=True, slots=True)
class _Record:
    """What the file holds."""

    host: str
    log_path: str
    made_for: str
    names: Mapping[str, str]


@asynccontextmanager
async def claimed(
    config: RecipeConfig,
    infra: InfraConfig,
    deploy: DeployConfig | None,
    jobs: AsyncTrainerJobManager,
    deployments: AsyncDeploymentManager,
    tell: Callable[[str], None] | None,
) -> AsyncGenerator[Claims]:
    """Names for what a run is to create, of an earlier process of the run where that has left what fits.

    What is taken over is removed behind the block; what is created under the other names is the block's to remove.

    Args:
        config: The recipe's configuration. Where its `log_path` is no directory, nothing is found or written.
        infra: The trainers that are to be there.
        deploy: The deployment that is to be there, if one is.
        jobs: Manager of the trainer jobs.
        deployments: Manager of the deployments.
        tell: Told what was found.

    Raises:
        ProvisioningError: On leaving: what was taken over could not be removed.
        ServiceError, TransportError: The control plane cannot be asked.

    **Cancellation:** what was taken over is removed first, within 40 s each.
    """
    policy, reference = config.jobs
    fresh = Claims(
        None if policy else new_job_id(),
        new_job_id() if infra.ref_training_shape_id is not None and reference is None else None,
        None if deploy is None or deploy.deployment_id else derived_deployment_id(config.base_model, new_job_id()[-8:]),
    )

    def say(text: str) -> None:
        if tell is not None:
            tell(text)

    if not await anyio.to_thread.run_sync(config.log_path.is_dir):
        yield fresh
        return
    path = config.log_path / RESOURCES
    here = _Record(
        socket.gethostname(), str(config.log_path.resolve()), _made_for(config, infra, deploy), fresh.names()
    )
    plane = _Plane(jobs, deployments)
    left = await anyio.to_thread.run_sync(_read, path)
    claims = fresh if left is None else await _taken_over(left, here, fresh, plane, say)
    names = claims.names()
    if not names:
        yield claims
        return
    await anyio.to_thread.run_sync(write_atomically, path, json.dumps(asdict(replace(here, names=names)), indent=2))
    try:
        async with AsyncExitStack() as stack:
            for role, name in names.items():
                if name in claims.taken:
                    await stack.enter_async_context(
                        removed_after(_there, plane.removal(role, name), what=f"{_kind(role)} {name}")
                    )
            yield claims
    finally:
        with anyio.move_on_after(_FAREWELL_S, shield=True), suppress(FwasyncError, OSError):
            if not any([await plane.exists(role, name) for role, name in names.items()]):
                await anyio.to_thread.run_sync(path.unlink)


async def _taken_over(left: _Record, here: _Record, fresh: Claims, plane: _Plane, say: Callable[[str], None]) -> Claims:
    """Fresh names, but for what is taken over; what does not fit is removed, and what is not ours is told."""
    taken: dict[str, str] = {}
    for role, name in left.names.items():
        if not await plane.exists(role, name):
            continue
        what = f"{_kind(role)} {name}, which an earlier process of this run has left"
        if (left.host, left.log_path) != (here.host, here.log_path):
            say(f"{what} in {left.log_path} on {left.host}, is still there: delete it, unless that run is alive")
        elif left.made_for == here.made_for and role in fresh.names() and await plane.is_alive(role, name):
            taken[role] = name
            say(f"{what}, is taken over")
        else:
            await plane.removal(role, name)()
            say(f"{what}, does not fit any more and was deleted")
    return replace(fresh, **taken, taken=frozenset(taken.values()))


class _Plane:
    """Asks after jobs and deployments by their roles."""

    def __init__(self, jobs: AsyncTrainerJobManager, deployments: AsyncDeploymentManager) -> None:
        self._jobs, self._deployments = jobs, deployments

    async def exists(self, role: str, name: str) -> bool:
        if role == "deployment":
            return await self._deployments.base_model_of(name) is not None
        return await self._jobs.exists(name)

    async def is_alive(self, role: str, name: str) -> bool:
        if role == "deployment":
            return (await self._deployments.get(name)).state in ("READY", "CREATING", "UPDATING")
        return (await self._jobs.get(name)).state in _ALIVE

    def removal(self, role: str, name: str) -> Callable[[], Awaitable[None]]:
        manager = self._deployments if role == "deployment" else self._jobs
        return lambda: manager.delete(name)


@dataclass(frozen=True, slots=True)
class _There:
    created: bool = True


async def _there() -> _There:
    return _There()


def _kind(role: str) -> str:
    return {"policy": "trainer job", "reference": "reference trainer job"}.get(role, role)


def _made_for(config: RecipeConfig, infra: InfraConfig, deploy: DeployConfig | None) -> str:
    """What must be the same for it to be of use again."""
    parts: list[Any] = [config.base_model, config.lora_rank, infra.model_dump(mode="json")]
    parts.append(None if deploy is None else deploy.model_dump(mode="json"))
    return json.dumps(parts, sort_keys=True)


def _read(path: Path) -> _Record | None:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
        return _Record(found["host"], found["log_path"], found["made_for"], dict(found["names"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # there is none, or it is of no use
