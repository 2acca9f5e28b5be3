"""`AsyncDeploymentManager`: the life of deployments, from their creation to their removal."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace

import msgspec

from fwasync._http.client import Unanswered
from fwasync._http.reading import read
from fwasync._wire.control import Deployment, DeploymentList
from fwasync.config.launch import OnProgress
from fwasync.config.resources import DeploymentConfig
from fwasync.control.client import AsyncFireworksClient
from fwasync.control.names import check_id
from fwasync.control.requests import deployment_request
from fwasync.control.resources import CreatedDeployment, DeploymentInfo
from fwasync.control.states import Verdict, judge_deployment
from fwasync.control.waiting import Look, wait_for
from fwasync.errors import DeploymentFailedError, NotFoundError, UsageError

__all__ = ("AsyncDeploymentManager",)

_KIND = "deployments"
_READY_S = 5400.0
_LONGEST_PAUSE_S = 10.0
_PROBE_S = 10.0


class AsyncDeploymentManager:
    """Deployments of an account.

    Every method raises `ServiceError` (`NotFoundError`, `AuthenticationError` …) for a refusal and `TransportError` if
    no answer was received, after the client's retries.

    Args:
        client: An open client.
    """

    def __init__(self, client: AsyncFireworksClient) -> None:
        self._plane = client.plane

    @property
    def inference_url(self) -> str:
        """The origin of completions, for an `AsyncDeploymentSampler`."""
        return self._plane.http.base_url

    async def create(self, config: DeploymentConfig) -> CreatedDeployment:
        """Ask for a deployment, once, however often the request has to be repeated.

        An id that is taken is not an error; `created` tells. What exists is not compared with the configuration.

        **Cancellation:** whether it was created is unknown; `get` tells.
        """
        query, request = deployment_request(config)
        path = await self._plane.collection(_KIND)
        what = f"creating deployment {config.deployment_id}"
        body, created = await self._plane.create(what, path, query, request)
        if body is None:
            name = (await self.get(config.deployment_id)).name
        else:
            name = read(what, body, Deployment).name or f"{path.removeprefix('v1/')}/{config.deployment_id}"
        return CreatedDeployment(name, config.deployment_id, created)

    async def create_or_get(self, config: DeploymentConfig) -> DeploymentInfo:
        """`create`, and say how the deployment of that id is now, whether it existed before or not."""
        return await self.get((await self.create(config)).deployment_id)

    async def get(self, deployment_id: str) -> DeploymentInfo:
        """The deployment as it is now."""
        path = await self._path(deployment_id)
        return DeploymentInfo.read(await self._plane.get(f"reading deployment {deployment_id}", path, Deployment))

    async def base_model_of(self, deployment_id: str) -> str | None:
        """The base model of a deployment, empty if the service does not say; `None` if it does not exist."""
        try:
            info = await self.get(deployment_id)
        except NotFoundError:
            return None
        return None if info.state == "DELETED" else info.base_model

    async def list(self, *, filter: str | None = None, page_size: int = 50) -> AsyncGenerator[DeploymentInfo]:
        """All deployments, asked for page by page.

        Args:
            filter: A filter of the service's language.
            page_size: Rows of a request, 1 to 200.
        """
        path = await self._plane.collection(_KIND)
        async for row in self._plane.pages(
            "listing deployments",
            path,
            DeploymentList,
            lambda page: page.deployments,
            page_size=page_size,
            query=[("filter", filter)] if filter else [],
        ):
            yield DeploymentInfo.read(row)

    async def update(
        self,
        deployment_id: str,
        *,
        min_replica_count: int | None = None,
        max_replica_count: int | None = None,
        hot_load_trainer_job: str | None = None,
        hot_load_transition_type: str | None = None,
    ) -> DeploymentInfo:
        """Change what is given, and nothing else. Another trainer job restarts its pods.

        Raises:
            UsageError: Nothing is given.
        """
        given = {
            "min_replica_count": min_replica_count,
            "max_replica_count": max_replica_count,
            "hot_load_trainer_job": hot_load_trainer_job,
            "hot_load_transition_type": hot_load_transition_type,
        }
        mask = ",".join(name for name, value in given.items() if value is not None)
        if not mask:
            raise UsageError(f"updating deployment {deployment_id}: give at least one of {', '.join(given)}")
        what, path = f"updating deployment {deployment_id}", await self._path(deployment_id)
        change = Deployment(
            min_replica_count=min_replica_count,
            max_replica_count=max_replica_count,
            hot_load_trainer_job=hot_load_trainer_job,
            hot_load_transition_type=hot_load_transition_type,
        )
        body = await self._plane.call(what, "PATCH", path, [("updateMask", mask)], change)
        return DeploymentInfo.read(read(what, body, Deployment))

    async def scale_to_zero(self, deployment_id: str) -> DeploymentInfo:
        """Let it have no replicas, and never any, until `update` says otherwise. It costs nothing, and stays."""
        return await self.update(deployment_id, min_replica_count=0, max_replica_count=0)

    async def delete(self, deployment_id: str) -> None:
        """Delete a deployment for good; one that is gone is not an error."""
        path = await self._path(deployment_id)
        query = [("ignoreChecks", "true"), ("hard", "true")]
        try:
            await self._plane.call(f"deleting deployment {deployment_id}", "DELETE", path, query)
        except NotFoundError:
            return

    async def wait_for_ready(
        self,
        deployment_id: str,
        *,
        timeout_s: float = _READY_S,
        poll_interval_s: float = _LONGEST_PAUSE_S,
        on_progress: OnProgress | None = None,
    ) -> DeploymentInfo:
        """Wait until the deployment serves.

        Args:
            deployment_id: The deployment.
            timeout_s: Seconds it may take.
            poll_interval_s: The longest pause between looks.
            on_progress: Called each time that it was looked at.

        Returns:
            The deployment, `READY` also where the service still says `CREATING` but completions are answered.

        Raises:
            DeploymentFailedError: It failed, is being deleted, or is scaled to zero.
            ProvisioningTimeoutError: It takes longer.

        **Cancellation:** at once; the deployment is untouched.
        """

        async def look() -> Look[DeploymentInfo]:
            info = await self.get(deployment_id)
            verdict = judge_deployment(info.state, most_replicas=info.max_replica_count)
            if verdict.action != "check":
                return Look(info, verdict, info.state, info.message)
            answers, message = await self._answers(info.inference_model)
            if answers:
                return Look(replace(info, state="READY"), Verdict("ready"), "READY", info.message)
            return Look(info, Verdict("wait"), info.state, info.message or message)

        return await wait_for(
            look,
            resource=f"deployment {deployment_id}",
            failed=DeploymentFailedError,
            timeout=timeout_s,
            pending_timeout=timeout_s,
            cap_s=poll_interval_s,
            on_progress=on_progress,
        )

    async def _answers(self, model: str) -> tuple[bool, str]:
        """Whether it gives completions, and what is waited for if it does not."""
        probe = msgspec.json.encode({"model": model, "prompt": [1, 2], "max_tokens": 4, "temperature": 0.0})
        try:
            answer = await self._plane.http.attempt("POST", "inference/v1/completions", [probe], timeout=_PROBE_S)
        except Unanswered as error:
            return False, f"its completions are not answered ({error})"
        return answer.status == 200, f"its completions answer {answer.status}"

    async def _path(self, deployment_id: str) -> str:
        return f"{await self._plane.collection(_KIND)}/{check_id('deployment_id', deployment_id)}"
