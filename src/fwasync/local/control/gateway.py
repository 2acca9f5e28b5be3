"""The gateway: each trainer job's own path to the trainer API, `/training/v1/rlorTrainerJobs/{account}/{job}/...`.

Invariants
    * What lies behind sees the path of the trainer API, so that everything (scripted faults too) is the same there.
    * While a request is served, `sessions.OWNER` names the job through which it came.
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from fwasync.local.control.jobs import JobDesk
from fwasync.local.refusal import Refused
from fwasync.local.sessions import OWNER
from fwasync.local.web import refusal_response

__all__ = ("Gateway",)

_PATH = re.compile(r"/training/v1/rlorTrainerJobs/([^/]+)/([^/]+)(/.*)")


class Gateway:
    """ASGI middleware that strips the prefix of a job's trainer."""

    def __init__(self, app: ASGIApp, jobs: JobDesk) -> None:
        self._app = app
        self._jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        match = _PATH.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if match is None:
            await self._app(scope, receive, send)
            return
        account, job_id, path = match.groups()
        try:
            self._jobs.admit(account, job_id)
        except Refused as error:
            refusal = error.refusal
            await refusal_response(refusal.status, refusal.detail, scope["path"])(scope, receive, send)
            return
        token = OWNER.set(job_id)
        try:
            await self._app({**scope, "path": path, "raw_path": path.encode()}, receive, send)
        finally:
            OWNER.reset(token)
