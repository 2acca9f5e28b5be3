"""The endpoints of accounts, models, shapes and trainer jobs: thin, each reads a message, asks a desk, answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fwasync._wire.control import (
    Account,
    AccountList,
    Deployment,
    DeploymentShapeVersion,
    DeploymentShapeVersionList,
    PromoteRequest,
    TrainerJob,
    TrainingShapeVersion,
    TrainingShapeVersionList,
)
from fwasync._wire.hot_load import (
    DEPLOYMENT_HEADER,
    MODEL_HEADER,
    PATH,
    HotLoadAccepted,
    HotLoadRequest,
    decode_strictly,
)
from fwasync.local.control.filters import matches
from fwasync.local.control.names import ACCOUNT, page_of, resource
from fwasync.local.control.plane import ControlPlane
from fwasync.local.refusal import Refused
from fwasync.local.web import json_response, read_body

__all__ = ("control_routes",)

T = TypeVar("T")
V = TypeVar("V", TrainingShapeVersion, DeploymentShapeVersion)
Table = list[tuple[str, str, Callable[[Request], Awaitable[Response]]]]


def control_routes(plane: ControlPlane) -> list[Route]:
    """All routes of the control plane."""
    table = [*_catalogue(plane), *_jobs(plane), *_deployments(plane), *_hot_load(plane), *_promotion(plane)]
    return [Route(path, endpoint, methods=[method]) for method, path, endpoint in table]


async def _read(request: Request, type_: type[T]) -> T:
    """The request's body as a message.

    Raises:
        Refused: It is not such a message.
    """
    try:
        return decode_strictly(await read_body(request) or b"{}", type_)
    except msgspec.MsgspecError as error:
        raise Refused(400, f"the body cannot be read: {error}") from None


def _catalogue(plane: ControlPlane) -> Table:
    """Accounts, models and shapes."""
    shapes = plane.shapes

    async def accounts(_request: Request) -> Response:
        return json_response(AccountList(accounts=[_account()], next_page_token="", total_size=1))

    async def account(_request: Request) -> Response:
        return json_response(_account())

    async def models(request: Request) -> Response:
        return json_response(plane.models.list(request.path_params["account"], request.query_params))

    async def model(request: Request) -> Response:
        return json_response(plane.models.get(_resource(request, "models")))

    async def training_shapes(request: Request) -> Response:
        page, token = _versions(request, "trainingShapes", shapes.training)
        return json_response(TrainingShapeVersionList(training_shape_versions=page, next_page_token=token))

    async def training_shape(request: Request) -> Response:
        return json_response(shapes.training_shape(_version(request, "trainingShapes")))

    async def deployment_shapes(request: Request) -> Response:
        page, token = _versions(request, "deploymentShapes", shapes.deployment)
        return json_response(DeploymentShapeVersionList(deployment_shape_versions=page, next_page_token=token))

    async def deployment_shape(request: Request) -> Response:
        return json_response(shapes.deployment_shape(_version(request, "deploymentShapes")))

    below = "/v1/accounts/{account}"
    return [
        ("GET", "/v1/accounts", accounts),
        ("GET", f"/v1/accounts/{ACCOUNT}", account),
        ("GET", f"{below}/models", models),
        ("GET", f"{below}/models/{{name}}", model),
        ("GET", f"{below}/trainingShapes/{{name}}/versions", training_shapes),
        ("GET", f"{below}/trainingShapes/{{name}}/versions/{{version}}", training_shape),
        ("GET", f"{below}/deploymentShapes/{{name}}/versions", deployment_shapes),
        ("GET", f"{below}/deploymentShapes/{{name}}/versions/{{version}}", deployment_shape),
    ]


def _jobs(plane: ControlPlane) -> Table:
    """Trainer jobs."""
    jobs = plane.jobs

    async def create(request: Request) -> Response:
        return json_response(jobs.create(await _read(request, TrainerJob), request.query_params))

    async def show(request: Request) -> Response:
        return json_response(jobs.get(request.path_params["job"]))

    async def listing(request: Request) -> Response:
        return json_response(jobs.list(request.query_params))

    async def delete(request: Request) -> Response:
        jobs.delete(request.path_params["job"])
        return json_response(b"{}")

    async def resume(request: Request) -> Response:
        return json_response(jobs.resume(request.path_params["job"]))

    async def cancel(request: Request) -> Response:
        return json_response(jobs.cancel(request.path_params["job"]))

    below = f"/v1/accounts/{ACCOUNT}/rlorTrainerJobs"
    return [
        ("POST", below, create),
        ("GET", below, listing),
        ("POST", f"{below}/{{job}}:resume", resume),
        ("POST", f"{below}/{{job}}:cancel", cancel),
        ("GET", f"{below}/{{job}}", show),
        ("DELETE", f"{below}/{{job}}", delete),
    ]


def _deployments(plane: ControlPlane) -> Table:
    """Deployments."""
    deployments = plane.deployments

    async def create(request: Request) -> Response:
        return json_response(deployments.create(await _read(request, Deployment), request.query_params))

    async def show(request: Request) -> Response:
        return json_response(deployments.get(request.path_params["name"]))

    async def listing(request: Request) -> Response:
        return json_response(deployments.list(request.query_params))

    async def change(request: Request) -> Response:
        message = await _read(request, Deployment)
        return json_response(deployments.change(request.path_params["name"], message, request.query_params))

    async def delete(request: Request) -> Response:
        deployments.delete(request.path_params["name"], hard=request.query_params.get("hard") == "true")
        return json_response(b"{}")

    below = f"/v1/accounts/{ACCOUNT}/deployments"
    return [
        ("POST", below, create),
        ("GET", below, listing),
        ("GET", f"{below}/{{name}}", show),
        ("PATCH", f"{below}/{{name}}", change),
        ("DELETE", f"{below}/{{name}}", delete),
    ]


def _hot_load(plane: ControlPlane) -> Table:
    desk = plane.hot_load

    def whose(request: Request) -> tuple[str | None, str | None]:
        return request.headers.get(DEPLOYMENT_HEADER), request.headers.get(MODEL_HEADER)

    async def status(request: Request) -> Response:
        return json_response(desk.status(*whose(request)))

    async def load(request: Request) -> Response:
        message = await _read(request, HotLoadRequest)
        await desk.load(*whose(request), message)
        return json_response(HotLoadAccepted(identity=message.identity))

    return [("GET", PATH, status), ("POST", PATH, load)]


def _promotion(plane: ControlPlane) -> Table:
    desk = plane.promotion

    async def checkpoints(request: Request) -> Response:
        return json_response(await desk.checkpoints(request.path_params["job"], request.query_params))

    async def promote(request: Request) -> Response:
        message = await _read(request, PromoteRequest)
        params = request.path_params
        return json_response(await desk.promote(params.get("job"), params["checkpoint"], message))

    async def operation(request: Request) -> Response:
        return json_response(desk.operation(request.path_params["operation"]))

    below = f"/v1/accounts/{ACCOUNT}"
    return [
        ("GET", f"{below}/rlorTrainerJobs/{{job}}/checkpoints", checkpoints),
        ("POST", f"{below}/rlorTrainerJobs/{{job}}/checkpoints/{{checkpoint}}:promote", promote),
        ("POST", f"{below}/checkpoints/{{checkpoint}}:promote", promote),
        ("GET", f"{below}/operations/{{operation}}", operation),
    ]


def _account() -> Account:
    return Account(name=f"accounts/{ACCOUNT}", display_name="The local service", state="READY")


def _resource(request: Request, kind: str) -> str:
    return resource(kind, request.path_params["name"], request.path_params["account"])


def _version(request: Request, kind: str) -> str:
    return f"{_resource(request, kind)}/versions/{request.path_params['version']}"


def _versions(request: Request, kind: str, versions: Sequence[V]) -> tuple[list[V], str]:
    """The versions of one shape, or of all whose account and name match where the path has `-`."""
    account, name = request.path_params["account"], request.path_params["name"]
    wanted = request.query_params.get("filter", "")
    found: list[V] = []
    for version in versions:
        _, its_account, its_kind, its_name, *_ = version.name.split("/")
        here = its_kind == kind and account in ("-", its_account) and name in ("-", its_name)
        if here and matches(wanted, msgspec.to_builtins(version)):
            found.append(version)
    return page_of(found, request.query_params)
