"""Every scripted fault, and what the real client makes of it: success all the same, or one clear error; never twice."""

from __future__ import annotations

import contextlib
import http.client
import math
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, get_args
from unittest.mock import MagicMock
from urllib.parse import urlsplit

import anyio
import anyio.lowlevel
import pytest

from fwasync import AsyncServiceClient, AsyncTrainingClient, RetryPolicy, errors, types
from fwasync._wire.completions import PATH as COMPLETIONS
from fwasync._wire.faults import Route
from fwasync.local import launch
from fwasync.local.app import build_app
from fwasync.local.control.routes import control_routes
from fwasync.local.faults import control_route_of, route_of
from fwasync.testing import (
    AsyncScriptedService,
    Delay,
    Drop,
    EvictSession,
    FailOperation,
    Fault,
    FaultPlan,
    Kill,
    LoseFuture,
    Nan,
    NotReady,
    Reject,
    Reset,
    SlowFuture,
    Status,
    Truncate,
    local_service,
)
from service import scripted

MODEL = "fwasync/qwen3-tiny"
ADAM = types.AdamParams(learning_rate=3e-3, beta1=0.9, beta2=0.95, eps=1e-12)
QUICK = RetryPolicy(base_s=0.01, cap_s=0.05)


def datum(text: str) -> types.Datum:
    tokens = list(text.encode())
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )


BATCHES = [[datum(f"{i} of many")] for i in range(32)]
BATCH = BATCHES[0]


running, service = scripted.running, scripted.service
pytestmark = pytest.mark.asyncio(loop_scope="module")
Wire = Literal["json", "protobuf"]


@asynccontextmanager
async def training(
    service: AsyncScriptedService, retry: RetryPolicy = QUICK, wire: Wire = "json"
) -> AsyncIterator[tuple[AsyncServiceClient, AsyncTrainingClient]]:
    async with AsyncServiceClient(service.base_url, service.api_key, retry=retry, wire=wire) as client:
        async with client.create_training_client(MODEL, lora_rank=0) as model:
            yield client, model


async def applied(service: AsyncScriptedService, model: AsyncTrainingClient) -> list[tuple[str, int | None]]:
    return [(one.kind, one.seq_id) for one in (await service.effects()).get(model.model_id, [])]


def weights(root: Path, path: str) -> dict[str, bytes]:
    """The files of a checkpoint, to the bit."""
    run, kind, name = path.removeprefix("tinker://").split("/")
    (folder,) = root.glob(f"{kind}/{run.replace(':', '?')}/{name}")
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def ask(service: Any, method: str, path: str, key: str | None = None) -> int:
    address = urlsplit(service.base_url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=100)
    connection.request(method, path, headers={} if key is None else {"X-API-Key": key})
    status = connection.getresponse().status
    connection.close()
    return status


# -- the whole ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", get_args(Wire))
async def test_a_storm_of_faults_leaves_the_weights_of_a_calm_run(service: AsyncScriptedService, wire: Wire) -> None:
    plan = FaultPlan([Fault(Drop(after=True), probability=0.1), Fault(Status(503), probability=0.1)], seed=5)
    results: list[tuple[list[float], dict[str, bytes]]] = []
    for faults in (FaultPlan(), plan):
        await service.set_faults(faults)
        async with training(service, wire=wire) as (_, model):
            pairs = [(model.forward_backward(batch), model.optim_step(ADAM)) for batch in BATCHES]
            losses = [(await forward).metrics["loss:sum"] for forward, _ in pairs]
            for _, update in pairs:
                await update
            saved = await model.save_state("end")
            results.append((losses, weights(service.data_dir, saved.path)))
            operations = await applied(service, model)
        kinds = ["forward_backward", "optim_step"] * len(BATCHES) + ["save_weights"]
        assert operations == list(zip(kinds, range(1, len(kinds) + 1), strict=True))
    calm, stormy = results
    assert stormy == calm
    assert calm[1]
    report = await service.fired()
    assert min(report.fired) >= 10
    struck = {event.route for event in report.log}
    assert struck >= {"forward_backward", "optim_step", "retrieve_future"}


# -- the exchange is disturbed -----------------------------------------------------------------------

DISTURBANCES = [
    Drop(),
    Drop(after=True),
    Reset(),
    Reset(after=True),
    Truncate(),
    Status(503),
    Status(500, after=True),
    Status(502),
    Status(429, retry_after_s=0.01),
    Status(408),
    Delay(0.01),
    Delay(0.01, after=True),
]


@pytest.mark.parametrize("route", ["forward_backward", "retrieve_future", "create_model", "create_session"])
@pytest.mark.parametrize("action", DISTURBANCES, ids=repr)
async def test_a_disturbed_exchange_is_not_noticed(service: AsyncScriptedService, action: Any, route: Any) -> None:
    await service.set_faults(FaultPlan([Fault(action, route, first=2)]))
    async with training(service) as (_, model):
        output = await model.forward_backward(BATCH)
        assert output.metrics["loss:sum"] > 0
        await model.optim_step(ADAM)
        assert await applied(service, model) == [("forward_backward", 1), ("optim_step", 2)]
    report = await service.fired()
    assert 1 <= report.fired[0] <= 2  # what was only delayed is not sent again
    assert {(event.action, event.route) for event in report.log} == {(type(action).__name__.lower(), route)}
    if route == "forward_backward":
        assert {event.seq_id for event in report.log} == {1}


@pytest.mark.parametrize("action", [Drop(after=True), Status(503), Truncate()], ids=repr)
async def test_sampling_is_not_disturbed_either(service: AsyncScriptedService, action: Any) -> None:
    params = types.SamplingParams(max_tokens=4, seed=1)
    async with AsyncServiceClient(service.base_url, service.api_key, retry=QUICK) as client:
        async with client.create_sampling_client(base_model=MODEL) as sampler:
            calm = await sampler.sample(types.ModelInput.from_ints([1, 2]), 2, params)
            await service.set_faults(FaultPlan([Fault(action, "asample", nth=1), Fault(action, nth=3)]))
            rough = await sampler.sample(types.ModelInput.from_ints([1, 2]), 2, params)
    assert [list(s.tokens) for s in rough.sequences] == [list(s.tokens) for s in calm.sequences]
    assert (await service.fired()).fired == [1, 1]


async def test_what_never_works_is_given_up(service: AsyncScriptedService) -> None:
    await service.set_faults(FaultPlan([Fault(Drop(after=True), "optim_step")]))
    async with training(service, RetryPolicy(base_s=0.01, cap_s=0.02, budget_s=0.1)) as (_, model):
        await model.forward_backward(BATCH)
        with pytest.raises(errors.RetryBudgetExhaustedError):
            await model.optim_step(ADAM)
        with pytest.raises(errors.SequenceBrokenError, match="load the last checkpoint"):
            await model.forward_backward(BATCH)
        assert await applied(service, model) == [("forward_backward", 1), ("optim_step", 2)]


# -- futures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 200])
async def test_a_storm_of_not_ready_does_not_spin(service: AsyncScriptedService, status: Any) -> None:
    busy = NotReady(status=status, queue_state="paused_capacity", reason="all is full")
    async with training(service) as (_, model):
        await service.set_faults(FaultPlan([Fault(busy)]))
        future, started = model.forward_backward(BATCH), anyio.current_time()
        async with anyio.create_task_group() as polling:
            polling.start_soon(future.result)
            while (await service.fired()).fired[0] < 20:
                await anyio.lowlevel.checkpoint()
            polling.cancel_scope.cancel()
        with pytest.raises(errors.OperationTimeoutError, match="paused_capacity all is full"):
            await future.result(timeout=0.05)
        polls = (await service.fired()).fired[0]
        # Fifty a second at the most; each of the two waits begins with one.
        assert polls <= 2 + 50 * (anyio.current_time() - started)
        await service.set_faults(FaultPlan([Fault(NotReady(0.05, status=status), first=3)]))
        assert (await future).metrics["loss:sum"] > 0
        assert (await service.fired()).fired == [3]


async def test_results_come_in_another_order(service: AsyncScriptedService) -> None:
    async with training(service) as (_, model):
        await service.set_faults(FaultPlan([Fault(SlowFuture(), "forward_backward", nth=1)]))
        forward, update = model.forward_backward(BATCH), model.optim_step(ADAM)
        await update
        assert forward.state == "admitted"
        assert await applied(service, model) == [("forward_backward", 1), ("optim_step", 2)]
        with pytest.raises(errors.OperationTimeoutError):
            await forward.result(timeout=0.05)
        assert await service.release("req-other") == 0
        async with anyio.create_task_group() as group:
            group.start_soon(forward.result)
            assert await service.release(forward.request_id) == 1
        assert forward.state == "done"
        assert await service.release() == 0


async def test_a_slow_result_comes_by_itself(service: AsyncScriptedService) -> None:
    async with training(service) as (_, model):
        await service.set_faults(FaultPlan([Fault(SlowFuture(0.05))]))
        assert (await model.forward_backward(BATCH)).metrics["loss:sum"] > 0
        assert (await service.fired()).log[0].request_id is not None


async def test_a_lost_result_is_told_and_the_next_operations_work(service: AsyncScriptedService) -> None:
    async with training(service) as (_, model):
        await service.set_faults(FaultPlan([Fault(LoseFuture(), "forward_backward", nth=1)]))
        with pytest.raises(errors.ResultLostError, match="may have taken effect"):
            await model.forward_backward(BATCH)
        await model.forward_backward(BATCH)
        await model.optim_step(ADAM)
        assert await applied(service, model) == [("forward_backward", 1), ("forward_backward", 2), ("optim_step", 3)]


async def test_a_lost_sample_is_drawn_again(service: AsyncScriptedService) -> None:
    async with AsyncServiceClient(service.base_url, service.api_key, retry=QUICK) as client:
        async with client.create_sampling_client(base_model=MODEL) as sampler:
            await service.set_faults(FaultPlan([Fault(LoseFuture(), "asample", first=2)]))
            params = types.SamplingParams(max_tokens=2)
            response = await sampler.sample(types.ModelInput.from_ints([1]), 1, params)
            assert len(response.sequences) == 1
            assert (await service.fired()).fired == [2]


# -- operations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", ["user", "server", "unknown"])
async def test_a_failed_operation_has_no_effect(service: AsyncScriptedService, category: Any) -> None:
    async with training(service) as (_, model):
        await service.set_faults(FaultPlan([Fault(FailOperation(category, "out of memory"), "optim_step", nth=1)]))
        await model.forward_backward(BATCH)
        with pytest.raises(errors.OperationFailedError, match="out of memory") as caught:
            await model.optim_step(ADAM)
        assert caught.value.category == category
        await model.optim_step(ADAM)
        assert await applied(service, model) == [("forward_backward", 1), ("optim_step", 3)]


async def test_samples_and_models_can_fail_too(service: AsyncScriptedService) -> None:
    plan = [Fault(FailOperation(message="no room"), route) for route in ("asample", "create_model")]
    await service.set_faults(FaultPlan(plan))
    async with AsyncServiceClient(service.base_url, service.api_key, retry=QUICK) as client:
        async with client.create_sampling_client(base_model=MODEL) as sampler:
            with pytest.raises(errors.OperationFailedError, match="no room"):
                await sampler.sample(types.ModelInput.from_ints([1]))
        with pytest.raises(errors.OperationFailedError, match="no room"):
            async with client.create_training_client(MODEL, lora_rank=0):
                pass


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("counted", [True, False])
async def test_a_rejected_operation_leaves_no_hole(service: AsyncScriptedService, counted: bool, status: Any) -> None:
    async with training(service) as (_, model):
        await service.set_faults(FaultPlan([Fault(Reject(counted, status, "not today"), "forward_backward", nth=2)]))
        futures = [model.forward_backward(BATCH), model.forward_backward(BATCH), model.optim_step(ADAM)]
        await futures[0]
        with pytest.raises(errors.BadRequestError, match="not today") as caught:
            await futures[1]
        assert caught.value.status == status
        await futures[2]
        await model.forward_backward(BATCH)
        numbers = [1, 3, 4] if counted else [1, 2, 3]
        kinds = ["forward_backward", "optim_step", "forward_backward"]
        assert await applied(service, model) == list(zip(kinds, numbers, strict=True))


async def test_nan_fails_the_operation_without_an_effect(service: AsyncScriptedService) -> None:
    async with training(service) as (_, model):
        await service.set_faults(FaultPlan([Fault(Nan(), nth=2)]))
        await model.forward_backward(BATCH)
        with pytest.raises(errors.OperationFailedError, match="not finite") as caught:
            await model.forward_backward(BATCH)
        assert caught.value.category == "user"
        await model.optim_step(ADAM)
        assert await applied(service, model) == [("forward_backward", 1), ("optim_step", 3)]


@pytest.mark.parametrize("wire", get_args(Wire))
async def test_nan_that_is_let_pass_is_seen(service: AsyncScriptedService, wire: Wire) -> None:
    await service.set_faults(FaultPlan([Fault(Nan("null"), "forward_backward")]))
    with pytest.raises(errors.ProtocolError, match="null") if wire == "json" else contextlib.nullcontext():
        async with training(service, wire=wire) as (_, model):
            output = await model.forward_backward(BATCH)
            assert math.isnan(output.metrics["loss:sum"])
            assert math.isnan(output.loss_fn_outputs[0]["logprobs"].to_numpy()[0])
    assert await applied(service, model) == [("forward_backward", 1)]


@pytest.mark.parametrize("wire", get_args(Wire))
async def test_numbers_may_be_missing(service: AsyncScriptedService, wire: Wire) -> None:
    await service.set_faults(FaultPlan([Fault(Nan("missing"))]))
    async with training(service, wire=wire) as (_, model):
        forward, update = await model.forward_backward(BATCH), await model.optim_step(ADAM)
        assert forward.metrics == {}
        assert "logprobs" not in forward.loss_fn_outputs[0]
        assert not update.metrics
        assert await applied(service, model) == [("forward_backward", 1), ("optim_step", 2)]


@pytest.mark.parametrize("wire", get_args(Wire))
async def test_forward_has_its_name_in_both_encodings(service: AsyncScriptedService, wire: Wire) -> None:
    actions = [Drop(after=True), SlowFuture(0.0), Nan("missing")]
    await service.set_faults(FaultPlan([Fault(action, "forward", nth=1) for action in actions]))
    async with training(service, wire=wire) as (_, model):
        assert (await model.forward(BATCH)).metrics == {}
        assert (await model.forward_backward(BATCH)).metrics
    report = await service.fired()
    assert report.fired == [1, 1, 1]
    assert {(event.route, event.seq_id) for event in report.log} == {("forward", 1)}


# -- the session and the process ---------------------------------------------------------------------


async def test_an_evicted_session_is_told(service: AsyncScriptedService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fwasync._http.session._HEARTBEAT_S", 0.1)
    async with training(service) as (_, model):
        await model.forward_backward(BATCH)
        await service.set_faults(FaultPlan([Fault(EvictSession(), "session_heartbeat", nth=1)]))
        with pytest.raises(errors.SessionLostError, match="load its last checkpoint"):
            while True:
                try:
                    await model.forward_backward(BATCH)
                except errors.NotFoundError:  # the session is gone, and no heartbeat has told us yet
                    await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("status", [404, 410])
async def test_operations_of_an_evicted_session_are_refused(service: AsyncScriptedService, status: Any) -> None:
    async with training(service) as (_, model):
        await service.set_faults(FaultPlan([Fault(EvictSession(status), "optim_step", nth=1)]))
        await model.forward_backward(BATCH)
        for _ in range(2):
            with pytest.raises(errors.FwasyncError) as caught:
                await model.optim_step(ADAM)
            assert f"status {status}" in str(caught.value) or isinstance(caught.value, errors.SessionLostError)
        assert await applied(service, model) == [("forward_backward", 1)]


async def test_killed_after_a_checkpoint_and_resumed_as_if_nothing_had_been(tmp_path: Path) -> None:
    async with local_service(data_dir=tmp_path) as service:
        async with training(service) as (_, model):
            for batch in BATCHES[:6]:
                await model.forward_backward(batch)
                await model.optim_step(ADAM)
            whole = weights(tmp_path, (await model.save_state("whole")).path)

        url = service.base_url
        await service.set_faults(FaultPlan([Fault(Kill(), "save_weights", nth=1)]))
        with pytest.raises(errors.TransportError):
            async with training(service, RetryPolicy(base_s=0.01, cap_s=0.02, budget_s=0.1)) as (_, model):
                for batch in BATCHES[:3]:
                    await model.forward_backward(batch)
                    await model.optim_step(ADAM)
                await model.save_state("middle")
        with pytest.raises(errors.ServiceUnreachableError, match="restart"):
            await service.fired()
        await service.restart()
        assert service.base_url == url
        assert (await service.fired()).fired == []

        async with training(service) as (_, again):
            await again.load_state_with_optimizer(f"tinker://{model.model_id}/weights/middle")
            for batch in BATCHES[3:6]:
                await again.forward_backward(batch)
                await again.optim_step(ADAM)
            resumed = weights(tmp_path, (await again.save_state("resumed")).path)
        assert resumed == whole
        assert whole

        await service.kill()
        await service.kill()
        with pytest.raises(errors.ServiceUnreachableError, match="does not answer"):
            await service.release()
        if sys.platform == "linux":  # its place is kept, for `restart`
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", urlsplit(url).port or 0))
    with pytest.raises(errors.ServiceUnreachableError):
        await service.effects()


# -- what is seen on the wire ------------------------------------------------------------------------


def exchange(service: AsyncScriptedService) -> tuple[int, dict[str, str], bytes]:
    """One request on a bare socket, read until the connection ends: status, headers and body; 0 for no answer."""
    address = urlsplit(service.base_url)
    with socket.create_connection((address.hostname, address.port or 0), timeout=100) as connection:
        head = f"GET /api/v1/get_server_capabilities HTTP/1.1\r\nHost: x\r\nX-API-Key: {service.api_key}\r\n"
        connection.sendall(f"{head}Connection: close\r\n\r\n".encode())
        received = b""
        while piece := connection.recv(65536):
            received += piece
    if not received:
        return 0, {}, b""
    start, _, body = received.partition(b"\r\n\r\n")
    first, *lines = start.decode().split("\r\n")
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body


async def test_what_is_seen_on_the_wire(service: AsyncScriptedService) -> None:
    async def see(action: Any) -> tuple[int, dict[str, str], bytes]:
        await service.set_faults(FaultPlan([Fault(action)]))
        return await anyio.to_thread.run_sync(exchange, service)

    status, headers, whole = await see(Delay(0))
    assert (status, int(headers["content-length"])) == (200, len(whole))
    for after in (False, True):
        assert await see(Drop(after)) == (0, {}, b"")
        with pytest.raises(ConnectionResetError):
            await see(Reset(after))
        status, headers, body = await see(Status(429, 1.25, after))
        assert (status, headers["retry-after"], headers["retry-after-ms"]) == (429, "2", "1250.0")
        assert b"a scripted fault" in body
        status, headers, body = await see(Status(503, after=after))
        assert (status, "retry-after" in headers) == (503, False)
    status, headers, body = await see(Truncate())
    assert (status, int(headers["content-length"]), body) == (200, len(whole), whole[: len(whole) // 2])


# -- the admin API -----------------------------------------------------------------------------------


async def test_the_admin_api_asks_for_the_key(service: AsyncScriptedService) -> None:
    for method, path in [("GET", "faults"), ("DELETE", "faults"), ("GET", "effects"), ("POST", "kill")]:
        assert await anyio.to_thread.run_sync(ask, service, method, f"/admin/{path}") == 401
    assert await anyio.to_thread.run_sync(ask, service, "DELETE", "/admin/faults", service.api_key) == 200
    assert await anyio.to_thread.run_sync(ask, service, "PUT", "/admin/effects", service.api_key) == 405


async def test_there_is_no_admin_api_unless_it_was_asked_for() -> None:
    async with launch() as local:
        for path in ("faults", "effects"):
            assert await anyio.to_thread.run_sync(ask, local, "GET", f"/admin/{path}", local.api_key) == 404


async def test_a_plan_that_cannot_be_is_refused(service: AsyncScriptedService) -> None:
    from fwasync.testing import service as module

    body = b'{"faults":[{"action":{"type":"drop"},"route":"forwrd"}]}'
    with pytest.raises(errors.BadRequestError, match="forwrd"):
        await anyio.to_thread.run_sync(module._request, service._running, "PUT", "faults", body)


async def test_who_has_no_key_meets_no_fault(service: AsyncScriptedService) -> None:
    await service.set_faults(FaultPlan([Fault(Drop(), "get_server_capabilities")]))
    path = "/api/v1/get_server_capabilities"
    assert await anyio.to_thread.run_sync(ask, service, "GET", path) == 401
    with pytest.raises(ConnectionError):
        await anyio.to_thread.run_sync(ask, service, "GET", path, service.api_key)
    assert (await service.fired()).fired == [1]


async def test_every_route_of_the_service_has_a_name() -> None:
    paths = [getattr(route, "path", "") for route in build_app(MagicMock(), "key").routes]
    names = {route_of(path.removeprefix("/api/v1/")) for path in paths}
    names |= {control_route_of("POST", COMPLETIONS)[0]}
    for route in control_routes(MagicMock()):
        names |= {control_route_of(method, route.path)[0] for method in (route.methods or set()) - {"HEAD"}}
    assert names == set(get_args(Route)) - {"*"}
