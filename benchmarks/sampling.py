"""Sampling from a deployment, with many completions in flight.

python benchmarks/sampling.py [--short] [--cell NAME] [--rounds 5]

A prompt of 64 tokens; token ids and logprobs come back. The Fireworks SDK always streams, whatever its caller wants; it
reads the stream to its end before it looks at it.
"""

from __future__ import annotations

from collections.abc import Iterator

import harness
from harness import CPU, MEMORY, RATE, SERVER_BUSY, STALL, STALL_CPU, Case, Cell, Client, Column, Measures, Settings

PROMPT = list(range(64))
KEY = "fw-bench"


def model(settings: Settings) -> str:
    return f"accounts/bench/deployments/16-events-{settings['server_ms']}-ms"


async def with_fwasync(url: str, settings: Settings) -> Measures:
    from fwasync import AsyncDeploymentSampler, FixedConcurrencyController

    in_flight, tokens = settings["in_flight"], settings["tokens"]

    async def whole() -> None:
        (completion,) = await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=tokens, logprobs=True)
        assert len(completion.inference_logprobs or ()) == tokens

    async def streamed() -> None:
        async with sampler.stream_with_prompt_tokens(PROMPT, max_tokens=tokens, logprobs=True) as stream:
            async for _ in stream:
                pass
        assert len(stream.completion.inference_logprobs or ()) == tokens

    controller = FixedConcurrencyController(in_flight)
    async with AsyncDeploymentSampler(url, model(settings), KEY, concurrency=controller) as sampler:
        return await harness.measure(streamed if settings["stream"] else whole, url, in_flight, settings["count"])


async def with_fireworks(url: str, settings: Settings) -> Measures:
    from fireworks.training.sdk import DeploymentSampler, FixedConcurrencyController

    in_flight, tokens = settings["in_flight"], settings["tokens"]
    controller = FixedConcurrencyController(in_flight)
    sampler = DeploymentSampler(url, model(settings), KEY, concurrency_controller=controller)

    async def one() -> None:
        (completion,) = await sampler.sample_with_prompt_tokens(PROMPT, max_tokens=tokens, logprobs=True)
        assert len(completion.inference_logprobs) == tokens

    return await harness.measure(one, url, in_flight, settings["count"])


async def with_floor(url: str, settings: Settings) -> Measures:
    from floor import Floor, complete, stream

    tokens, ask = settings["tokens"], stream if settings["stream"] else complete
    request = {
        "model": model(settings),
        "prompt": PROMPT,
        "max_tokens": tokens,
        "stream": settings["stream"],
        "logprobs": True,
        "raw_output": True,
    }

    async def one() -> None:
        _, logprobs = await ask(floor, request)
        assert len(logprobs) == tokens

    async with Floor(url) as floor:
        return await harness.measure(one, url, settings["in_flight"], settings["count"])


def cells() -> Iterator[Cell]:
    short = {(64, True, 64, 0), (1024, True, 64, 0), (1024, False, 64, 0), (1024, True, 512, 0), (4096, True, 64, 20)}
    counts = {1: 500, 64: 2000, 256: 2000, 1024: 4096, 4096: 8192}
    sizes = [(in_flight, stream, tokens, 0) for stream in (True, False) for tokens in (64, 512) for in_flight in counts]
    sizes += [(in_flight, stream, 64, 20) for stream in (True, False) for in_flight in (64, 256, 1024, 4096)]
    for in_flight, stream, tokens, server_ms in sizes:
        name = f"{in_flight:,} in flight, {tokens} tokens, {'streamed' if stream else 'whole'}"
        yield Cell(
            name + (f", {server_ms} ms an event" if server_ms else ""),
            {
                "in_flight": in_flight,
                "stream": stream,
                "tokens": tokens,
                "server_ms": server_ms,
                "count": counts[in_flight] // (2 if tokens > 64 or server_ms else 1),
            },
            is_short=(in_flight, stream, tokens, server_ms) in short,
            # It would take a minute of CPU time for each round.
            without=["Fireworks SDK"] if in_flight > 1024 else [],
        )


CASE = Case(
    name="sampling",
    title="Sampling from a deployment",
    clients={
        "fwasync": Client(with_fwasync, "fwasync"),
        "Fireworks SDK": Client(with_fireworks, "fireworks-ai", "fireworks", share=0.25, short_rounds=2),
        "floor": Client(with_floor),
    },
    cells=list(cells()),
    columns=(
        RATE,
        Column("per_s", "rate", against="Fireworks SDK"),
        CPU,
        Column("cpu_ms", "CPU", against="Fireworks SDK"),
        Column("cpu_ms", "CPU", against="floor"),
        STALL,
        STALL_CPU,
        MEMORY,
        SERVER_BUSY,
    ),
    tiny={"in_flight": 4, "count": 4},
)

if __name__ == "__main__":
    harness.main(CASE)
