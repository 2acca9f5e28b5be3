"""A trainer service that does nothing, fast: it reads each batch and answers with a result made beforehand.

`python benchmarks/neutral_server.py DATUMS TOKENS` prints its URL, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import sys

import numpy as np
from aiohttp import web

from fwasync._wire import tensors
from fwasync._wire.protobuf import CONTENT_TYPE, results
from fwasync._wire.protobuf.batches import decode_request


@functools.cache
def prebuilt(datums: int, tokens: int) -> dict[str, bytes]:
    logprobs = np.random.default_rng(0).normal(-2, 1, (datums, tokens)).astype(np.float32)
    outputs = [{"logprobs": row} for row in logprobs]
    result = tensors.ForwardBackwardResult(outputs, {"loss:sum": 1.0}, "benchmark")  # type: ignore[arg-type]
    return {
        "application/json": b"".join(tensors.encode_outputs(result)),
        CONTENT_TYPE: b"".join(results.encode_outputs(result)),
    }


def count_datums(body: bytes, content_type: str) -> int:
    return len(decode_request(body).data) if content_type == CONTENT_TYPE else body.count(b'"model_input"')


def build(datums: int, tokens: int) -> web.Application:
    prebuilt(datums, tokens)
    numbers = itertools.count()

    async def submit(request: web.Request) -> web.Response:
        count = count_datums(await request.read(), request.content_type)
        return web.json_response({"request_id": f"req-{next(numbers)}-{count}"})

    async def create_model(_: web.Request) -> web.Response:
        return web.json_response({"request_id": "create", "model_id": "s:train:0"})

    async def retrieve(request: web.Request) -> web.Response:
        wanted = (await request.json())["request_id"]
        if wanted == "create":
            return web.json_response({"type": "create_model", "model_id": "s:train:0"})
        kind = CONTENT_TYPE if CONTENT_TYPE in request.headers.get("Accept", "") else "application/json"
        count = int(wanted.rpartition("-")[2])
        return web.Response(body=prebuilt(count, tokens)[kind], content_type=kind)

    async def said(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response(
            {
                "session_id": "s",
                "model_id": "s:train:0",
                "model_data": {"model_name": "base"},
                "status": "accepted",
            }
        )

    application = web.Application(client_max_size=2**30)
    routes = {
        "forward_backward": submit,
        "forward": submit,
        "optim_step": submit,
        "create_model": create_model,
        "retrieve_future": retrieve,
    }
    for name, handler in routes.items():
        application.router.add_post(f"/api/v1/{name}", handler)
    application.router.add_route("*", "/api/v1/{anything:.*}", said)
    return application


async def main() -> None:
    runner = web.AppRunner(build(int(sys.argv[1]), int(sys.argv[2])))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    print(f"http://127.0.0.1:{port}", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main())
