"""The endpoints of the trainer API: thin, each reads a message, asks the service, writes a message."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fwasync._wire.messages import (
    CancelFutureRequest,
    Checkpoints,
    ClientDynamicConfig,
    CreateModelRequest,
    CreateSamplingSessionRequest,
    CreateSessionRequest,
    GetInfoRequest,
    Health,
    LoadWeightsRequest,
    RetrieveFutureRequest,
    SamplingSessionCreated,
    SessionCreated,
    SessionHeartbeat,
    Submitted,
    TryAgain,
    decode,
)
from fwasync.local.listings import listing_routes
from fwasync.local.operations import Kind
from fwasync.local.refusal import Refused
from fwasync.local.service import TrainerService
from fwasync.local.web import (
    Gatekeeper,
    is_protobuf,
    json_response,
    read_body,
    read_message,
    refusal_response,
    result_response,
    wait_or_gone,
)

__all__ = ("build_app",)

_PREFIX = "/api/v1"
_OPERATIONS: tuple[Kind, ...] = (
    "forward",
    "forward_backward",
    "optim_step",
    "save_weights",
    "load_adapter",
    "save_weights_for_sampler",
    "unload_model",
)
_BATCHES = ("forward", "forward_backward")


class _Api:
    def __init__(self, service: TrainerService) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        posts = {
            "client/config": self.client_config,
            "client/dynamic_config": self.client_dynamic_config,
            "telemetry": self.telemetry,
            "create_session": self.create_session,
            "session_heartbeat": self.session_heartbeat,
            "sessions/{session_id}/finish": self.finish_session,
            "create_model": self.create_model,
            "get_info": self.get_info,
            "create_sampling_session": self.create_sampling_session,
            "asample": self.asample,
            "retrieve_future": self.retrieve_future,
            "cancel_future": self.cancel_future,
            "load_weights": self.load_weights,
        }
        gets = {
            "healthz": self.healthz,
            "get_server_capabilities": self.capabilities,
            "samplers/{sampling_id}": self.sampler,
            "list_checkpoints": self.list_checkpoints,
        }
        routes = [Route(f"{_PREFIX}/{path}", endpoint, methods=["POST"]) for path, endpoint in posts.items()]
        routes += [Route(f"{_PREFIX}/{path}", endpoint, methods=["GET"]) for path, endpoint in gets.items()]
        routes += [Route(f"{_PREFIX}/{kind}", self.operation, methods=["POST"]) for kind in _OPERATIONS]
        return routes + listing_routes(self._service, _PREFIX)

    # -- probes and sessions -----------------------------------------------------------------------

    async def healthz(self, _request: Request) -> Response:
        return json_response(Health(status="ok"))

    async def capabilities(self, _request: Request) -> Response:
        return json_response(self._service.capabilities())

    async def client_config(self, _request: Request) -> Response:
        return json_response(b"{}")

    async def client_dynamic_config(self, _request: Request) -> Response:
        return json_response(ClientDynamicConfig(sample_cancel_enabled=True))

    async def telemetry(self, _request: Request) -> Response:
        return json_response(b'{"status":"accepted"}')

    async def create_session(self, request: Request) -> Response:
        message = await read_message(request, CreateSessionRequest)
        session_id = self._service.begin_session(message.user_metadata, message.display_name)
        return json_response(SessionCreated(session_id=session_id))

    async def session_heartbeat(self, request: Request) -> Response:
        message = await read_message(request, SessionHeartbeat)
        if message.session_id is None:
            raise Refused(422, "session_heartbeat: Object missing required field `session_id` - at `$`")
        self._service.sessions.touch(message.session_id, status=410)
        return json_response(SessionHeartbeat())

    async def finish_session(self, request: Request) -> Response:
        session_id = request.path_params["session_id"]
        self._service.end_session(session_id, f"session {session_id} was finished")
        return json_response(b"{}")

    # -- models and operations ---------------------------------------------------------------------

    async def create_model(self, request: Request) -> Response:
        message = await read_message(request, CreateModelRequest)
        message.base_model = self._service.base_model(message.base_model) or ""
        request_id, model_id = self._service.training.create(message, await request.body())
        return json_response(Submitted(request_id=request_id, model_id=model_id))

    async def get_info(self, request: Request) -> Response:
        message = await read_message(request, GetInfoRequest)
        return json_response(self._service.model_info(message.model_id))

    async def operation(self, request: Request) -> Response:
        kind: Kind = request.url.path.rpartition("/")[2]  # pyright: ignore[reportAssignmentType] -- routed
        body = await read_body(request, protobuf=kind in _BATCHES)
        request_id, model_id = await self._service.training.submit(kind, body, protobuf=is_protobuf(request))
        return json_response(Submitted(request_id=request_id, model_id=model_id))

    async def load_weights(self, request: Request) -> Response:
        body = await read_body(request)
        try:
            message = decode(body, LoadWeightsRequest)
        except msgspec.MsgspecError:
            return await self.operation(request)  # which refuses it, and counts its number
        if message.model_id is not None or message.session_id is None:
            return await self.operation(request)
        message.base_model = self._service.base_model(message.base_model)
        request_id, model_id = await self._service.training.create_from_checkpoint(message, body)
        return json_response(Submitted(request_id=request_id, model_id=model_id))

    async def list_checkpoints(self, _request: Request) -> Response:
        return json_response(Checkpoints(checkpoints=await self._service.checkpoint_names()))

    # -- sampling ----------------------------------------------------------------------------------

    async def create_sampling_session(self, request: Request) -> Response:
        message = await read_message(request, CreateSamplingSessionRequest)
        message.base_model = self._service.base_model(message.base_model)
        sampling_id = await self._service.samplers.create(message)
        return json_response(SamplingSessionCreated(sampling_session_id=sampling_id))

    async def sampler(self, request: Request) -> Response:
        return json_response(self._service.samplers.info(request.path_params["sampling_id"]))

    async def asample(self, request: Request) -> Response:
        try:
            request_id, count = await self._service.samplers.sample(await read_body(request))
        except msgspec.MsgspecError as error:
            raise Refused(422, f"asample: {error}") from None
        names = [f"{request_id}:{index}" for index in range(count)]
        return json_response(Submitted(request_id=request_id, sample_sequence_ids=names))

    # -- futures -----------------------------------------------------------------------------------

    async def retrieve_future(self, request: Request) -> Response:
        message = await read_message(request, RetrieveFutureRequest)
        request_id = str(message.request_id)
        futures = self._service.futures
        slot = futures.get(request_id)
        if slot is None:
            raise Refused(410, _unknown_future(request_id))
        if slot.result is None and not futures.closed:
            await wait_or_gone(request, slot.wait, self._service.options.long_poll_s)
        if slot.result is not None:
            return await result_response(request, slot.result)
        waiting = TryAgain(request_id=request_id, queue_state="active", queue_state_reason=slot.why())
        return json_response(waiting, 408)

    async def cancel_future(self, request: Request) -> Response:
        message = await read_message(request, CancelFutureRequest)
        request_id = str(message.request_id)
        slot = self._service.futures.get(request_id)
        if slot is None:
            raise Refused(410, _unknown_future(request_id))
        if slot.result is None and not self._service.samplers.cancel(request_id):
            raise Refused(400, f"{request_id} is a training operation: once accepted it takes effect")
        return json_response(b"{}")


def _unknown_future(request_id: str) -> str:
    return f"{request_id!r} is not here: its result is no longer kept, the service was restarted, or it never had it"


async def _refused(request: Request, error: Exception) -> Response:
    if not isinstance(error, Refused):
        raise error
    return refusal_response(error.refusal.status, error.refusal.detail, request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    if error.status_code == 404:
        detail = f"this is the fwasync local trainer service; it has nothing at {request.url.path}"
        return refusal_response(404, detail, request.url.path)
    return refusal_response(error.status_code, f"{request.method} {request.url.path}: {error.detail}", request.url.path)


def build_app(
    service: TrainerService, api_key: str, routes: Sequence[Route] = (), layers: Sequence[Middleware] = ()
) -> Starlette:
    """The ASGI application of a service, with more routes and layers inside the gatekeeper if need be."""
    gatekeeper = Middleware(Gatekeeper, api_key=api_key, open_paths=frozenset({f"{_PREFIX}/healthz"}))
    return Starlette(
        routes=[*_Api(service).routes(), *routes],
        middleware=[gatekeeper, *layers],
        exception_handlers={Refused: _refused, HTTPException: _http_error},
    )
