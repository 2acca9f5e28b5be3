"""A service that does nothing, fast, and speaks both APIs: a deployment's completions, and the trainer API.

python benchmarks/neutral_server.py [--core 1]

It prints its URL, and ends with its standard input. What it answers was made beforehand; requests are read whole,
and decoded as far as the answer needs it. The size of an answer is in the request (`max_tokens`, `stream`, the datums);
what else a benchmark chooses is in the name of the model: `16-events-20-ms` are completions in 16 events, each after
20 ms; a sampling session on `320-ms` has each sample after 320 ms; of a trainer's `4096-tokens` each datum has so many
logprobs. An answer that takes time is given up when its connection is closed, a sample when `cancel_future` says so.
`GET /bench` tells what is going on.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, cast

import httptools
import msgspec
import numpy as np

from fwasync._wire import messages, tensors
from fwasync._wire.protobuf import CONTENT_TYPE, results
from fwasync._wire.protobuf.fields import as_bytes, fields
from fwasync._wire.protobuf.samples import encode_sample

PROTOBUF = CONTENT_TYPE.encode()
JSON = b"application/json"

# -- answers, made once ----------------------------------------------------------------------------


def response(body: bytes, kind: bytes = JSON, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (status, kind, len(body), body)


def json_response(value: object) -> bytes:
    return response(msgspec.json.encode(value))


NOT_FOUND = response(b'{"detail": "unknown path"}', status=b"404 Not Found")
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@cache
def tokens_and_logprobs(count: int) -> tuple[list[int], list[float]]:
    random = np.random.default_rng(0)
    return random.integers(0, 150_000, count).tolist(), random.normal(-2, 1, count).astype(np.float32).tolist()


def choice(start: int, end: int, count: int) -> dict[str, Any]:
    """Tokens of a completion, with their logprobs; the last have all ids beside them."""
    ids, logprobs = tokens_and_logprobs(count)
    rows = [
        {"token": "word ", "logprob": p, "sampling_logprob": p, "text_offset": 5 * (start + i), "token_id": t}
        for i, (t, p) in enumerate(zip(ids[start:end], logprobs[start:end], strict=True))
    ]
    part: dict[str, Any] = {"index": 0, "text": "word " * len(rows), "logprobs": {"content": rows}}
    if end == count:
        raw_output = {"completion": "word " * count, "completion_token_ids": ids}
        return part | {"finish_reason": "length", "raw_output": raw_output}
    return part | {"finish_reason": None}


ENVELOPE = {"id": "cmpl-bench", "object": "text_completion", "created": 1, "model": "bench"}
PERF = {"server-time-to-first-token": "0.010", "prefill-queue-duration": "0.001", "num-concurrent-requests": "1"}


def ending(count: int) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}, "perf_metrics": PERF}


@cache
def whole_completion(count: int) -> bytes:
    return json_response(ENVELOPE | {"choices": [choice(0, count, count)]} | ending(count))


@cache
def streamed_completion(count: int, events: int) -> list[bytes]:
    """A completion in chunks, the first with the head and the last with the end."""
    pieces: list[bytes] = []
    for number in range(events):
        start, end = count * number // events, count * (number + 1) // events
        last = number == events - 1
        event = ENVELOPE | {"choices": [choice(start, end, count)]} | (ending(count) if last else {})
        data = b"data: " + msgspec.json.encode(event) + b"\n\n" + (b"data: [DONE]\n\n" if last else b"")
        pieces.append(b"%x\r\n%b\r\n" % (len(data), data))
    pieces[0] = STREAM_HEAD + pieces[0]
    pieces[-1] += b"0\r\n\r\n"
    return pieces


@cache
def together(count: int, events: int) -> bytes:
    return b"".join(streamed_completion(count, events))


@cache
def sample_result(count: int, samples: int, kind: bytes) -> bytes:
    ids, logprobs = tokens_and_logprobs(count)
    sequence = messages.SampledSequenceMessage(stop_reason="length", tokens=ids, logprobs=logprobs)
    result = messages.SampleResult(sequences=[sequence] * samples)
    return response(encode_sample(result) if kind == PROTOBUF else messages.encode(result), kind)


@cache
def outputs_result(datums: int, tokens: int, kind: bytes) -> bytes:
    logprobs = np.random.default_rng(0).normal(-2, 1, (datums, tokens)).astype(np.float32)
    outputs = [{"logprobs": cast(tensors.Array, row)} for row in logprobs]
    result = tensors.ForwardBackwardResult(outputs, {"loss:sum": 1.0}, "benchmark")
    encode = results.encode_outputs if kind == PROTOBUF else tensors.encode_outputs
    return response(b"".join(encode(result)), kind)


STEPPED = json_response({"metrics": {"grad_norm": 1.0}, "type": "optim_step"})
SAID = {
    "client/config": json_response({}),
    "client/dynamic_config": json_response({}),
    "session_heartbeat": json_response({"type": "session_heartbeat"}),
    "telemetry": json_response({"status": "accepted"}),
    "healthz": json_response({"status": "ok"}),
    "get_server_capabilities": json_response({"supported_models": [{"model_name": "bench"}]}),
    "list_checkpoints": json_response({"checkpoints": []}),
}

# -- requests, as far as an answer depends on them -------------------------------------------------


class CompletionRequest(msgspec.Struct):
    model: str
    max_tokens: int = 16
    stream: bool = False


class SamplingParams(msgspec.Struct):
    max_tokens: int | None = None


class SampleRequest(msgspec.Struct):
    sampling_session_id: str
    num_samples: int = 1
    sampling_params: SamplingParams = msgspec.field(default_factory=SamplingParams)


class FutureRequest(msgspec.Struct):
    request_id: str


class Creation(msgspec.Struct):
    """A model, or a sampling session."""

    session_id: str = ""
    model_seq_id: int = 0
    base_model: str | None = None


class OfModel(msgspec.Struct):
    model_id: str = ""


read_completion = msgspec.json.Decoder(CompletionRequest).decode
read_sample = msgspec.json.Decoder(SampleRequest).decode
read_future = msgspec.json.Decoder(FutureRequest).decode
read_creation = msgspec.json.Decoder(Creation).decode
read_of_model = msgspec.json.Decoder(OfModel).decode


@cache
def chosen(name: str, what: str, default: int) -> int:
    """The number before a word in the name of a model."""
    found = re.search(rf"(\d+)-{what}", name)
    return int(found[1]) if found else default


def batch(body: bytes) -> tuple[str, int, bytes]:
    """The model that a batch is for, how many datums it has, and how it is encoded."""
    if body[:1] == b"{":
        start = body.rindex(b'"model_id"')
        found = re.compile(rb'"model_id"\s*:\s*"([^"]*)"').match(body, start)
        assert found is not None
        return found[1].decode(), body.count(b'"model_input"'), JSON
    model, datums = "", 0
    for number, value in fields(body):
        if number == 1:
            model = bytes(as_bytes(value)).decode()
        datums += number == 3
    return model, datums, PROTOBUF


# -- the service -----------------------------------------------------------------------------------


class Clock:
    """Calls after a delay, with one timer for all of the same delay: those come due in the order of their beginning."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[float, deque[tuple[float, Callable[[], None]]]] = {}

    def call_later(self, delay: float, call: Callable[[], None]) -> None:
        waiting = self._waiting.setdefault(delay, deque())
        due = self._loop.time() + delay
        if not waiting:
            self._loop.call_at(due, self._call, delay)
        waiting.append((due, call))

    def _call(self, delay: float) -> None:
        waiting, now = self._waiting[delay], self._loop.time()
        due: list[Callable[[], None]] = []
        while waiting and waiting[0][0] <= now:
            due.append(waiting.popleft()[1])
        if waiting:
            self._loop.call_at(waiting[0][0], self._call, delay)
        for call in due:
            call()


class Service:
    """What all connections share. A handler returns the whole answer, or `None` if it comes later."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.connections: set[Connection] = set()
        self.models: dict[str, int] = {}
        self.pending: dict[str, Sample] = {}
        self.counts = {"requests": 0, "completions": 0, "samples": 0, "events": 0, "generating": 0, "received": 0}
        self._number = 0

    def handle(self, connection: Connection, path: str, body: bytes) -> bytes | None:
        self.counts["requests"] += 1
        if path == "/inference/v1/completions":
            return self._completion(connection, body)
        if path == "/bench":
            cpu = {"connections": len(self.connections), "cpu_s": time.process_time()}
            return json_response(self.counts | cpu)
        name = path.partition("/api/v1/")[2]
        if said := SAID.get(name):
            return said
        handler = self._HANDLERS.get(name)
        if handler is not None:
            return handler(self, connection, body)
        return json_response({}) if name.startswith("sessions/") else NOT_FOUND

    def _new(self) -> str:
        self._number += 1
        return f"{self._number:08d}"

    # completions

    def _completion(self, connection: Connection, body: bytes) -> bytes | None:
        asked = read_completion(body)
        self.counts["completions"] += 1
        events, delay = chosen(asked.model, "events", 16), chosen(asked.model, "ms", 0) / 1e3
        if not delay:
            return together(asked.max_tokens, events) if asked.stream else whole_completion(asked.max_tokens)
        if asked.stream:
            Generation(self, connection, streamed_completion(asked.max_tokens, events), delay)
        else:
            Generation(self, connection, [whole_completion(asked.max_tokens)], delay * events)
        return None

    # the trainer API: a request id says all that the answer depends on

    def _create_session(self, _connection: Connection, _body: bytes) -> bytes:
        return json_response({"type": "create_session", "session_id": f"session-{self._new()}"})

    def _create_model(self, _connection: Connection, body: bytes) -> bytes:
        asked = read_creation(body)
        model_id = f"{asked.session_id}:train:{asked.model_seq_id}"
        self.models[model_id] = chosen(asked.base_model or "", "tokens", 16)
        return json_response({"request_id": f"create/{model_id}", "model_id": model_id})

    def _get_info(self, _connection: Connection, body: bytes) -> bytes:
        about = {"model_id": read_of_model(body).model_id, "is_lora": True, "lora_rank": 32, "model_name": "bench"}
        return json_response(
            {"type": "get_info", "model_data": {"arch": "none", "model_name": "bench", "tokenizer_id": "bench"}} | about
        )

    def _unload_model(self, _connection: Connection, body: bytes) -> bytes:
        return json_response({"request_id": f"unload/{read_of_model(body).model_id}"})

    def _forward_backward(self, _connection: Connection, body: bytes) -> bytes:
        model_id, datums, kind = batch(body)
        wire = "protobuf" if kind == PROTOBUF else "json"
        return json_response({"request_id": f"outputs/{datums}/{self.models[model_id]}/{wire}/{self._new()}"})

    def _optim_step(self, _connection: Connection, _body: bytes) -> bytes:
        return json_response({"request_id": f"step/{self._new()}"})

    def _create_sampling_session(self, _connection: Connection, body: bytes) -> bytes:
        delay = chosen(read_creation(body).base_model or "", "ms", 0)
        return json_response(
            {"type": "create_sampling_session", "sampling_session_id": f"sampler-{self._new()}-{delay}-ms"}
        )

    def _asample(self, _connection: Connection, body: bytes) -> bytes:
        asked = read_sample(body)
        self.counts["samples"] += 1
        number = self._new()
        request_id = f"sample/{asked.sampling_params.max_tokens or 16}/{asked.num_samples}/{number}"
        delay = chosen(asked.sampling_session_id, "ms", 0)
        if delay:
            self.pending[request_id] = Sample(self, request_id, delay / 1e3)
        sequences = ",".join(f'"{number}-{index}"' for index in range(asked.num_samples))
        return response(b'{"request_id":"%b","sample_sequence_ids":[%b]}' % (request_id.encode(), sequences.encode()))

    def _cancel_future(self, _connection: Connection, body: bytes) -> bytes:
        if sample := self.pending.pop(read_future(body).request_id, None):
            sample.cancel()
        return json_response({})

    def _retrieve_future(self, connection: Connection, body: bytes) -> bytes | None:
        request_id = read_future(body).request_id
        if sample := self.pending.get(request_id):
            sample.waiter = connection
            return None
        return self.result(request_id, connection.accept)

    def result(self, request_id: str, accept: bytes) -> bytes:
        match request_id.split("/"):
            case "sample", tokens, samples, _:
                # Of clients that take both, those that would rather have protobuf name it first.
                kind = PROTOBUF if accept.startswith(PROTOBUF) else JSON
                return sample_result(int(tokens), int(samples), kind)
            case "outputs", datums, tokens, wire, _:
                return outputs_result(int(datums), int(tokens), PROTOBUF if wire == "protobuf" else JSON)
            case "step", _:
                return STEPPED
            case "create", model_id:
                return json_response({"type": "create_model", "model_id": model_id})
            case "unload", model_id:
                return json_response({"type": "unload_model", "model_id": model_id})
            case _:
                return response(b'{"detail": "unknown future"}', status=b"410 Gone")

    _HANDLERS: ClassVar[dict[str, Callable[[Service, Connection, bytes], bytes | None]]] = {
        "create_session": _create_session,
        "create_model": _create_model,
        "get_info": _get_info,
        "unload_model": _unload_model,
        "forward": _forward_backward,
        "forward_backward": _forward_backward,
        "optim_step": _optim_step,
        "create_sampling_session": _create_sampling_session,
        "asample": _asample,
        "retrieve_future": _retrieve_future,
        "cancel_future": _cancel_future,
    }


class Generation:
    """An answer in pieces, each after a while, until its connection is closed."""

    def __init__(self, service: Service, connection: Connection, pieces: list[bytes], delay: float) -> None:
        self._service, self._connection, self._pieces, self._delay = service, connection, pieces, delay
        self._next = 0
        connection.generation = self
        service.counts["generating"] += 1
        service.clock.call_later(delay, self._generate)

    def _generate(self) -> None:
        if self._connection.generation is not self:
            return
        self._service.counts["events"] += 1
        piece = self._pieces[self._next]
        self._next += 1
        if self._next == len(self._pieces):
            self.end()
            self._connection.answer(piece)
        else:
            self._connection.transport.write(piece)
            self._service.clock.call_later(self._delay, self._generate)

    def end(self) -> None:
        self._connection.generation = None
        self._service.counts["generating"] -= 1


class Sample:
    """A sample that is done after a while, whether somebody waits for it or not."""

    def __init__(self, service: Service, request_id: str, delay: float) -> None:
        self._service, self._request_id = service, request_id
        self.waiter: Connection | None = None
        service.counts["generating"] += 1
        service.clock.call_later(delay, self._finish)

    def _finish(self) -> None:
        if self._service.pending.pop(self._request_id, None) is self:
            self.cancel()

    def cancel(self) -> None:
        self._service.counts["generating"] -= 1
        if self.waiter is not None and not self.waiter.transport.is_closing():
            self.waiter.answer(self._service.result(self._request_id, self.waiter.accept))


class Connection(asyncio.Protocol):
    """One connection: requests are answered in their order, also those that are sent before the last was answered."""

    transport: asyncio.Transport

    def __init__(self, service: Service) -> None:
        self._service = service
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[tuple[str, bytes, bytes]] = deque()
        self._is_busy = False
        self._written: list[bytes] = []
        self.generation: Generation | None = None
        self.accept = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._service.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._service.connections.discard(self)
        if self.generation is not None:
            self.generation.end()

    def data_received(self, data: bytes) -> None:
        self._service.counts["received"] += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()
            return
        self._work()

    def on_message_begin(self) -> None:
        self._url, self._accept, self._body = b"", b"", list[bytes]()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(name) == 6:
            if name.lower() == b"accept":
                self._accept = value
            elif name.lower() == b"expect":
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._queue.append((self._url.partition(b"?")[0].decode(), self._accept, body))

    def answer(self, answer: bytes) -> None:
        """The end of an answer that took time."""
        self._written.append(answer)
        self._is_busy = False
        self._work()

    def _work(self) -> None:
        """Answer what can be, in one write."""
        while self._queue and not self._is_busy:
            path, self.accept, body = self._queue.popleft()
            answer = self._service.handle(self, path, body)
            if answer is None:
                self._is_busy = True
            else:
                self._written.append(answer)
        if self._written:
            self.transport.write(b"".join(self._written) if len(self._written) > 1 else self._written[0])
            self._written.clear()


async def main(core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    gc.freeze()
    service = Service()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(service), "127.0.0.1", 0, backlog=8192)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--core", type=int, help="the core to run on")
    asyncio.run(main(parser.parse_args().core))
