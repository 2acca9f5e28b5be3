"""A trainer service as an httpx transport: strict about order, without a socket, and as awkward as a test wants.

It applies operations in the order of their numbers, answers a repeated number with the same request id, and can hold,
drop, refuse and fail. What it applied is in `applied`; what was sent, in `sent`; what waits for a number that is
missing, in `early`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx
import numpy as np

from fwasync._wire.protobuf import batches, results
from fwasync._wire.tensors import ForwardBackwardResult

KEY = "tml-secret-key"
SEQUENCED = {
    "forward",
    "forward_backward",
    "optim_step",
    "save_weights",
    "load_weights",
    "save_weights_for_sampler",
}


@dataclass
class Sent:
    path: str
    body: dict[str, Any]
    key: str | None
    seq_id: int | None = None


def answer(status: int, content: Any) -> httpx.Response:
    return httpx.Response(status, json=content)


@dataclass
class FakeTrainer(httpx.AsyncBaseTransport):
    counts_rejected: bool = True
    takes: str = "json"
    accepts: str = ""
    latency: float = 0.0
    travels: int = 0
    loses_at: int = 0
    lost: str | None = None
    sent: list[Sent] = field(default_factory=list)
    applied: list[str] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)
    reject: set[str] = field(default_factory=set)
    taken: set[str] = field(default_factory=set)
    reject_next: list[str] = field(default_factory=list)
    door: dict[str, list[httpx.Response]] = field(default_factory=lambda: defaultdict(list))
    script: dict[str, list[Callable[[], Any]]] = field(default_factory=lambda: defaultdict(list))
    gates: dict[str, anyio.Event] = field(default_factory=dict)
    polls: int = 0
    early: dict[int, tuple[str, dict[str, Any]] | None] = field(default_factory=dict)
    _expected: int = 1
    _numbers: dict[int, tuple[str, str | None]] = field(default_factory=dict)

    # -- scripting

    def hold(self, path: str) -> anyio.Event:
        """Requests of this path wait for the event, before they have an effect."""
        self.gates[path] = anyio.Event()
        return self.gates[path]

    def next_time(self, path: str, action: Callable[[], Any]) -> None:
        """The next request of this path is acted upon after its effect: the action raises or returns a response."""
        self.script[path].append(action)

    def at_the_door(self, path: str, *responses: httpx.Response) -> None:
        """The next requests of this path are answered so before they have an effect."""
        self.door[path] += responses

    def numbers(self) -> list[tuple[str, int | None]]:
        return [(s.path, s.seq_id) for s in self.sent if s.seq_id is not None]

    # -- the service

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/api/v1/")
        content = await request.aread()
        if path.startswith("forward") and not request.headers["content-type"].endswith(self.takes):
            return answer(415, {"detail": f"send it as {self.takes}"})
        body = _from_protobuf(content) if self.takes == "x-protobuf" and path.startswith("forward") else None
        if body is None:
            body = json.loads(content) if content else {}
        self.accepts = request.headers["accept"]
        if request.headers.get("x-api-key") != KEY:
            return answer(401, {"detail": f"bad key {request.headers.get('x-api-key')}"})
        if path == "retrieve_future":
            self.polls += 1
        else:
            self.sent.append(Sent(path, body, request.headers.get("x-idempotency-key"), body.get("seq_id")))
        if path in self.gates:
            await self.gates[path].wait()
        await self._travel("before")
        if self.door[path]:
            return self.door[path].pop(0)
        response = self._sequenced(path, body) if path in SEQUENCED else self._plain(path, body)
        if self.script[path]:
            action = self.script[path].pop(0)
            outcome = action()
            if outcome is not None:
                return outcome
        await self._travel("after")
        return response

    async def _travel(self, direction: str) -> None:
        """The way there and back, where a connection may be lost."""
        await anyio.sleep(self.latency)
        self.travels += 1
        if self.travels == self.loses_at:
            self.lost = direction
            raise httpx.ReadError("connection reset")

    def _plain(self, path: str, body: dict[str, Any]) -> httpx.Response:
        match path:
            case "create_session":
                return answer(200, {"session_id": "sess"})
            case "create_model":
                self.results["create"] = {"model_id": "sess:train:0"}
                return answer(200, {"request_id": "create"})
            case "retrieve_future":
                waiting = [f"req-{number}" for number in self.early]
                if body["request_id"] in waiting:
                    return answer(408, {"type": "try_again", "queue_state_reason": f"waiting for {self._expected}"})
                if body["request_id"] not in self.results:
                    return answer(410, {"detail": "unknown"})
                result = self.results[body["request_id"]]
                if "loss_fn_outputs" in result and self.takes == "x-protobuf" and "protobuf" in self.accepts:
                    return httpx.Response(
                        200, content=_to_protobuf(result), headers={"content-type": "application/x-protobuf"}
                    )
                return result if isinstance(result, httpx.Response) else answer(200, result)
            case "get_info":
                return answer(200, {"model_id": body["model_id"], "model_data": {"tokenizer_id": "t"}})
            case "list_checkpoints":
                return answer(200, {"checkpoints": ["a"]})
            case "session_heartbeat":
                return answer(200, {})
            case "create_sampling_session":
                return answer(200, {"sampling_session_id": "sampler"})
            case "asample":
                request_id = f"sample-{body['seq_id']}"
                one = {"tokens": [1, 2], "logprobs": [-0.5, -0.25], "stop_reason": "stop"}
                self.results.setdefault(
                    request_id, {"sequences": [one] * body["num_samples"], "prompt_logprobs": [None, -1.5]}
                )
                return answer(200, {"request_id": request_id})
            case "cancel_future":
                return answer(200, {})
        return answer(404, {"detail": f"no such path {path}"})

    def _sequenced(self, path: str, body: dict[str, Any]) -> httpx.Response:
        number = body["seq_id"]
        digest = json.dumps(body, sort_keys=True)
        if number in self._numbers:
            known, request_id = self._numbers[number]
            if known != digest:
                return answer(409, {"detail": f"seq_id {number} was used by another request"})
            if request_id is None:  # it was refused, and is again, in the same words
                return self._taken(body) if body.get("path") in self.taken else self._refused(path)
            return answer(200, {"request_id": request_id})
        if path in self.reject_next:
            self.reject_next.remove(path)
            rejected = True
        else:
            rejected = path in self.reject
        if rejected and not self.counts_rejected:
            return self._refused(path)
        if path == "save_weights" and body["path"] in self.taken:
            if self.counts_rejected:
                self._numbers[number] = (digest, None)
                self._expected += 1
            return self._taken(body)
        request_id = f"req-{number}"
        self._numbers[number] = (digest, None if rejected else request_id)
        self.early[number] = None if rejected else (path, body)
        while self._expected in self.early:
            operation = self.early.pop(self._expected)
            if operation is not None:
                self.applied.append(operation[0])
                self.results[f"req-{self._expected}"] = self._result(*operation)
            self._expected += 1
        return self._refused(path) if rejected else answer(200, {"request_id": request_id})

    def _taken(self, body: dict[str, Any]) -> httpx.Response:
        return answer(409, {"detail": f"there is a {body['path']} already"})

    def _refused(self, path: str) -> httpx.Response:
        return answer(400, {"detail": f"{path} is not to its liking"})

    def _result(self, path: str, body: dict[str, Any]) -> Any:
        if path.startswith("forward"):
            data = body.get("forward_input", body.get("forward_backward_input"))["data"]
            outputs = []
            for datum in data:
                shape = datum["loss_fn_inputs"]["target_tokens"]["shape"]
                outputs.append({"logprobs": {"data": [-0.5] * shape[0], "dtype": "float32", "shape": shape}})
            return {
                "loss_fn_output_type": "record",
                "loss_fn_outputs": outputs,
                "metrics": {"loss:sum": float(len(data))},
            }
        if path == "optim_step":
            return {"metrics": {"grad_norm": 1.0}}
        return {"path": f"tinker://{body.get('path')}"}


def _from_protobuf(content: bytes) -> dict[str, Any]:
    request = batches.decode_request(content)
    data = [
        {"loss_fn_inputs": {name: {"shape": list(array.shape)} for name, array in inputs.items()}}
        for _, inputs in request.datums()
    ]
    name = "forward_input" if request.forward_only else "forward_backward_input"
    return {"model_id": request.model_id, "seq_id": request.seq_id, name: {"data": data}}


def _to_protobuf(result: dict[str, Any]) -> bytes:
    outputs = [{"logprobs": np.asarray(o["logprobs"]["data"], np.float32)} for o in result["loss_fn_outputs"]]
    record = ForwardBackwardResult(outputs, result["metrics"], result["loss_fn_output_type"])  # type: ignore[arg-type]
    return b"".join(results.encode_outputs(record))
