"""Sampling through the trainer API: a submit and a long poll for each sample.

python benchmarks/tinker_sampling.py [--short] [--cell NAME] [--rounds 5]

A prompt of 64 tokens, 64 sampled; token ids and logprobs come back, as protobuf. The server is done at once.
"""

from __future__ import annotations

from typing import Any

import harness
from harness import CPU, MEMORY, RATE, SERVER_BUSY, STALL, STALL_CPU, Case, Cell, Client, Column, Measures, Settings

PROMPT = list(range(64))
TOKENS = 64
KEY = "tml-bench"


async def with_fwasync(url: str, settings: Settings) -> Measures:
    from fwasync import AsyncServiceClient, types

    prompt, params = types.ModelInput.from_ints(PROMPT), types.SamplingParams(max_tokens=TOKENS)

    async def one() -> None:
        answer = await sampler.sample(prompt, 1, params)
        assert len(answer.sequences[0].tokens) == TOKENS

    async with AsyncServiceClient(url, KEY) as service:
        async with service.create_sampling_client(base_model="bench") as sampler:
            return await harness.measure(one, url, settings["in_flight"], settings["count"])


async def with_tinker(url: str, settings: Settings) -> Measures:
    import tinker

    prompt, params = tinker.ModelInput.from_ints(PROMPT), tinker.SamplingParams(max_tokens=TOKENS)
    service = tinker.ServiceClient(base_url=url, api_key=KEY)
    sampler = await service.create_sampling_client(base_model="bench")

    async def one() -> None:
        answer = await sampler.sample(prompt, 1, params)
        assert len(answer.sequences[0].tokens) == TOKENS

    return await harness.measure(one, url, settings["in_flight"], settings["count"])


async def with_floor(url: str, settings: Settings) -> Measures:
    import floor
    import msgspec

    api = floor.Floor(url)
    created = await api.post("/api/v1/create_sampling_session", b'{"base_model": "bench"}')
    request: dict[str, Any] = {
        "sampling_session_id": msgspec.json.decode(created)["sampling_session_id"],
        "seq_id": 0,
        "num_samples": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]},
        "sampling_params": {"max_tokens": TOKENS},
    }

    async def one() -> None:
        request["seq_id"] += 1
        answer = await floor.future(api, "asample", msgspec.json.encode(request), accept=floor.PROTOBUF)
        tokens, _ = floor.read_sample(answer)
        assert len(tokens) == TOKENS

    async with api:
        return await harness.measure(one, url, settings["in_flight"], settings["count"])


CASE = Case(
    name="tinker_sampling",
    title="Sampling through the trainer API",
    clients={
        "fwasync": Client(with_fwasync, "fwasync"),
        "tinker": Client(with_tinker, "tinker", "tinker", share=0.25),
        "floor": Client(with_floor),
    },
    cells=[
        Cell(f"{in_flight} in flight", {"in_flight": in_flight, "count": count}, is_short=in_flight > 1)
        for in_flight, count in ((1, 500), (64, 2000), (512, 4096))
    ],
    columns=(
        RATE,
        Column("per_s", "rate", against="tinker"),
        CPU,
        Column("cpu_ms", "CPU", against="tinker"),
        Column("cpu_ms", "CPU", against="floor"),
        STALL,
        STALL_CPU,
        MEMORY,
        SERVER_BUSY,
    ),
    tiny={"in_flight": 4, "count": 8},
)

if __name__ == "__main__":
    harness.main(CASE)
