"""`AsyncTrainerJobManager`: the life of trainer jobs, from their creation to their removal."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TypedDict, Unpack

import anyio

from fwasync._http.client import Unanswered
from fwasync._http.reading import read
from fwasync._wire.control import TrainerJob, TrainerJobList
from fwasync.config.launch import OnProgress, new_job_id
from fwasync.config.resources import TrainerJobConfig
from fwasync.control.client import AsyncFireworksClient
from fwasync.control.names import check_id
from fwasync.control.requests import trainer_job_request
from fwasync.control.resources import CreatedTrainerJob, TrainerJobInfo, TrainerServiceEndpoint
from fwasync.control.states import GONE, RESUMABLE, Verdict, is_under_way, judge_job
from fwasync.control.waiting import Look, wait_for
from fwasync.errors import BadRequestError, ConflictError, NotFoundError, ServiceError, TrainerJobFailedError

__all__ = ("AsyncTrainerJobManager", "WaitLimits", "WaitOptions")

_KIND = "rlorTrainerJobs"
_HEALTH_S = 5.0
_SETTLE_S = 30.0
_RESUMABLE_WITHIN_S = 120.0


class WaitOptions(TypedDict, total=False):
    """The keyword arguments of waits for a trainer job; `WaitLimits` tells their meanings and defaults."""

    poll_interval_s: float
    timeout_s: float
    pending_timeout_s: float
    on_progress: OnProgress | None


@dataclass(frozen=True, slots=True)
class WaitLimits:
    """How long a wait for a trainer job may take; each is a keyword argument of the manager's waits.

    Attributes:
        poll_interval_s: The longest pause between looks.
        timeout_s: Seconds it may take, not counting those in which it waits for machines.
        pending_timeout_s: Seconds it may wait for machines.
        on_progress: Called each time that the job was looked at.
    """

    poll_interval_s: float = 5.0
    timeout_s: float = 3600.0
    pending_timeout_s: float = 172_800.0
    on_progress: OnProgress | None = None


class AsyncTrainerJobManager:
    """Trainer jobs of an account.

    ```python
    async with AsyncFireworksClient() as fireworks:
        jobs = AsyncTrainerJobManager(fireworks)
        created = await jobs.create(TrainerJobConfig(base_model=model, training_shape_ref=shape))
        endpoint = await jobs.wait_for_ready(created.job_id)
    ```

    Every method raises `ServiceError` (`NotFoundError`, `AuthenticationError` …) for a refusal and `TransportError` if
    no answer was received, after the client's retries.

    Args:
        client: An open client.
    """

    def __init__(self, client: AsyncFireworksClient) -> None:
        self.client = client
        self._plane = client.plane

    async def create(self, config: TrainerJobConfig) -> CreatedTrainerJob:
        """Ask for a trainer job.

        It is created once, however often the request has to be repeated: its id is chosen here, unless the
        configuration names one. An id that is taken is not an error; `created` tells.

        Raises:
            ConflictError: The id was that of a job that has been deleted.

        **Cancellation:** whether the job was created is unknown; name its id in the configuration to be able to ask, or
        use `InfraConfig.launch`, which removes it.
        """
        job_id = config.requested_job_id or new_job_id()
        query, request = trainer_job_request(config, job_id)
        path = await self._plane.collection(_KIND)
        what = f"creating trainer job {job_id}"
        body, created = await self._plane.create(what, path, query, request)
        if body is None:
            job = await self.get(job_id)
            if job.state in GONE:
                raise ConflictError(
                    f"{what}: it was deleted, and its id is not given again; choose another", status=409
                )
            name = job.job_name
        else:
            name = read(what, body, TrainerJob).name or f"{path.removeprefix('v1/')}/{job_id}"
        info = TrainerJobInfo.read(TrainerJob(name=name))
        return CreatedTrainerJob(info.job_name, info.job_id, created)

    async def get(self, job_id: str) -> TrainerJobInfo:
        """The job as it is now. A deleted one can still be read for a while, as `DELETED`."""
        job = await self._plane.get(f"reading trainer job {job_id}", await self._path(job_id), TrainerJob)
        return TrainerJobInfo.read(job)

    async def name_of(self, job_id: str) -> str:
        """The full name of a job, whether there is one or not."""
        return f"accounts/{await self._plane.account()}/{_KIND}/{check_id('job_id', job_id)}"

    async def exists(self, job_id: str) -> bool:
        """Whether there is such a job, and it is not deleted."""
        try:
            return (await self.get(job_id)).state not in GONE
        except NotFoundError:
            return False

    async def list(
        self, *, filter: str | None = None, order_by: str | None = None, page_size: int = 50
    ) -> AsyncGenerator[TrainerJobInfo]:
        """All jobs that are not deleted, asked for page by page.

        Args:
            filter: A filter of the service's language, such as `state="JOB_STATE_RUNNING"`.
            order_by: Such as `create_time desc`.
            page_size: Rows of a request, 1 to 200.
        """
        query = [(name, value) for name, value in (("filter", filter), ("orderBy", order_by)) if value]
        path = await self._plane.collection(_KIND)
        async for job in self._plane.pages(
            "listing trainer jobs",
            path,
            TrainerJobList,
            lambda page: page.rlor_trainer_jobs,
            page_size=page_size,
            query=query,
        ):
            yield TrainerJobInfo.read(job)

    async def delete(self, job_id: str) -> None:
        """Delete a job; one that is gone is not an error. Its checkpoints can be promoted for 30 days."""
        path = await self._path(job_id)
        try:
            await self._plane.call(f"deleting trainer job {job_id}", "DELETE", path, timeout=30.0)
        except NotFoundError:
            return

    async def resume(self, job_id: str) -> TrainerJobInfo:
        """Start a job again that failed, was paused, cancelled or completed. `resume_and_wait` also waits for it.

        **Cancellation:** whether it was resumed is unknown; `get` tells.
        """
        what, attempts = f"resuming trainer job {job_id}", list[int | None]()
        try:
            body = await self._plane.call(
                what,
                "POST",
                f"{await self._path(job_id)}:resume",
                on_failure=lambda status, _: attempts.append(status),
            )
        except (BadRequestError, ConflictError):
            # Of an earlier attempt only the answer may have been lost: then there is nothing left to resume.
            if not attempts or not is_under_way((job := await self.get(job_id)).state):
                raise
            return job
        return TrainerJobInfo.read(read(what, body, TrainerJob))

    async def create_and_wait(self, config: TrainerJobConfig, **options: Unpack[WaitOptions]) -> TrainerServiceEndpoint:
        """`create`, then `wait_for_ready`, whose arguments, errors and cancellation are its own.

        Whatever happens, the job stays: `delete` it, or use `InfraConfig.launch`, which does.
        """
        created = await self.create(config)
        return await self.wait_for_ready(created.job_id, **options)

    async def wait_for_ready(
        self, job_id: str, job_name: str | None = None, **options: Unpack[WaitOptions]
    ) -> TrainerServiceEndpoint:
        """Wait until the trainer answers.

        Args:
            job_id: The job.
            job_name: What progress and errors call it.
            **options: See `WaitLimits`.

        Raises:
            TrainerJobFailedError: It is in a state that it does not leave by itself.
            ProvisioningTimeoutError: It takes longer.

        **Cancellation:** at once; the job is untouched.
        """
        return await self._wait(job_id, WaitLimits(**options), resource=job_name)

    async def wait_for_existing(self, job_id: str, **options: Unpack[WaitOptions]) -> TrainerServiceEndpoint:
        """As `wait_for_ready`, for a job of another run; it is not resumed."""
        return await self._wait(job_id, WaitLimits(**options))

    async def resume_and_wait(self, job_id: str, **options: Unpack[WaitOptions]) -> TrainerServiceEndpoint:
        """`resume`, then wait as `wait_for_ready` does."""
        await self.resume(job_id)
        return await self._wait(job_id, WaitLimits(**options), settles_s=_SETTLE_S)

    async def reconnect_and_wait(
        self, job_id: str, *, max_wait_for_resumable_s: float = _RESUMABLE_WITHIN_S, **options: Unpack[WaitOptions]
    ) -> TrainerServiceEndpoint:
        """Wait until a job answers again, after a pre-emption for example; it is resumed, once, if it stopped.

        What the trainer held in memory is gone: load its last checkpoint.

        Args:
            job_id: The job.
            max_wait_for_resumable_s: Seconds that a job on its way down has to become one that can be resumed.
            **options: See `WaitLimits`.

        Errors and cancellation are those of `wait_for_ready`.
        """
        return await self._wait(job_id, WaitLimits(**options), settles_s=max_wait_for_resumable_s, may_resume=True)

    async def _wait(
        self,
        job_id: str,
        limits: WaitLimits,
        *,
        resource: str | None = None,
        settles_s: float = 0.0,
        may_resume: bool = False,
    ) -> TrainerServiceEndpoint:
        check_id("job_id", job_id)
        account = await self._plane.account()
        # A job on its way down is not resumable yet; one that was resumed may not show it yet.
        settles_at = anyio.current_time() + settles_s

        async def look() -> Look[TrainerServiceEndpoint]:
            nonlocal settles_at, may_resume
            job = await self.get(job_id)
            endpoint = TrainerServiceEndpoint(
                job.job_name,
                job_id,
                f"{self._plane.http.base_url}/{_gateway(account, job_id)}",
                job.max_context_length,
            )
            message = job.message
            if may_resume and job.state in RESUMABLE:
                may_resume = False
                message = await self._resumed(job_id)
                settles_at = anyio.current_time() + _SETTLE_S
            verdict = judge_job(job.state, settling=anyio.current_time() < settles_at)
            if verdict.action == "check":
                answers, message = await self._answers(account, job_id)
                verdict = Verdict("ready" if answers else "wait")
            return Look(endpoint, verdict, job.state, message)

        return await wait_for(
            look,
            resource=resource or f"trainer job {job_id}",
            failed=TrainerJobFailedError,
            timeout=limits.timeout_s,
            pending_timeout=limits.pending_timeout_s,
            cap_s=limits.poll_interval_s,
            on_progress=limits.on_progress,
        )

    async def _resumed(self, job_id: str) -> str:
        try:
            await self.resume(job_id)
        except (BadRequestError, ConflictError) as error:
            return f"not resumed, its state may have changed: {error}"  # the next look tells
        return "resumed"

    async def _answers(self, account: str, job_id: str) -> tuple[bool, str]:
        """Whether the trainer itself answers, and what is waited for if it does not."""
        try:
            answer = await self._plane.http.attempt(
                "GET", f"{_gateway(account, job_id)}/api/v1/healthz", timeout=_HEALTH_S
            )
        except Unanswered as error:
            return False, f"its healthz does not answer ({error})"
        if answer.status in (401, 403):
            error = self._plane.http.refusal(answer, f"the trainer of job {job_id}")
            assert isinstance(error, ServiceError)
            raise error
        return answer.status == 200, "" if answer.status == 200 else f"its healthz answers {answer.status}"

    async def _path(self, job_id: str) -> str:
        return f"{await self._plane.collection(_KIND)}/{check_id('job_id', job_id)}"


def _gateway(account: str, job_id: str) -> str:
    return f"training/v1/rlorTrainerJobs/{account}/{job_id}"
