"""The endpoints that list and tidy: training runs, checkpoints, sessions. Thin, like those of `app`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fwasync._wire.runs import SessionDetails, SessionList, TimeToLive, WeightsInfoRequest
from fwasync.local.catalogue import Page
from fwasync.local.refusal import Refused
from fwasync.local.service import TrainerService
from fwasync.local.web import json_response, read_message

__all__ = ("listing_routes",)

_MOST = 1000


def listing_routes(service: TrainerService, prefix: str) -> list[Route]:
    """The routes below `prefix`."""
    lists = _Lists(service)
    checkpoint = "training_runs/{run_id}/checkpoints/{checkpoint_id:path}"
    table: list[tuple[str, str, Callable[[Request], Any]]] = [
        ("GET", "training_runs", lists.runs),
        ("GET", "training_runs/{run_id}", lists.run),
        ("GET", "training_runs/{run_id}/checkpoints", lists.checkpoints_of),
        ("PUT", f"{checkpoint}/ttl", lists.set_time_to_live),
        ("DELETE", checkpoint, lists.delete),
        ("GET", "checkpoints", lists.checkpoints),
        ("POST", "weights_info", lists.weights_info),
        ("GET", "sessions", lists.sessions),
        ("GET", "sessions/{session_id}", lists.session),
    ]
    return [Route(f"{prefix}/{path}", endpoint, methods=[method]) for method, path, endpoint in table]


class _Lists:
    def __init__(self, service: TrainerService) -> None:
        self._service = service
        self._catalogue = service.catalogue

    async def runs(self, request: Request) -> Response:
        ask = partial(self._catalogue.runs, self._service.live_runs(), _page(request, 20))
        return json_response(await anyio.to_thread.run_sync(ask))

    async def run(self, request: Request) -> Response:
        ask = partial(self._catalogue.run, self._service.live_runs(), request.path_params["run_id"])
        return json_response(await anyio.to_thread.run_sync(ask))

    async def checkpoints(self, request: Request) -> Response:
        return json_response(await anyio.to_thread.run_sync(self._catalogue.checkpoints, _page(request, 100)))

    async def checkpoints_of(self, request: Request) -> Response:
        ask = partial(self._catalogue.checkpoints_of, self._service.live_runs(), request.path_params["run_id"])
        return json_response(await anyio.to_thread.run_sync(ask))

    async def delete(self, request: Request) -> Response:
        await anyio.to_thread.run_sync(self._catalogue.delete, _path(request.path_params))
        return json_response(b"{}")

    async def set_time_to_live(self, request: Request) -> Response:
        message = await read_message(request, TimeToLive)
        ask = partial(self._catalogue.set_time_to_live, _path(request.path_params), message.ttl_seconds)
        await anyio.to_thread.run_sync(ask)
        return json_response(b"{}")

    async def weights_info(self, request: Request) -> Response:
        message = await read_message(request, WeightsInfoRequest)
        return json_response(await anyio.to_thread.run_sync(self._catalogue.weights_info, message.tinker_path))

    async def sessions(self, request: Request) -> Response:
        # Newest first, as with runs and checkpoints.
        found, _ = _page(request, 20).of(self._service.sessions.ids()[::-1])
        return json_response(SessionList(sessions=found))

    async def session(self, request: Request) -> Response:
        session_id = request.path_params["session_id"]
        session = self._service.sessions.find(session_id)
        runs = [model.target.model_id for model in self._service.training.models()]
        return json_response(
            SessionDetails(
                training_run_ids=[name for name in runs if name.startswith(f"{session_id}:")],
                sampler_ids=self._service.samplers.ids(session_id),
                user_metadata=dict(session.user_metadata) if session.user_metadata else None,
                display_name=session.display_name,
            )
        )


def _path(params: Mapping[str, str]) -> str:
    return f"tinker://{params['run_id']}/{params['checkpoint_id']}"


def _page(request: Request, limit: int) -> Page:
    try:
        page = Page(int(request.query_params.get("limit", limit)), int(request.query_params.get("offset", 0)))
    except ValueError as error:
        raise Refused(422, f"limit and offset are whole numbers: {error}") from None
    if not (1 <= page.limit <= _MOST and page.offset >= 0):
        raise Refused(422, f"limit is {page.limit} (1 to {_MOST}) and offset {page.offset} (0 or more)")
    return page
