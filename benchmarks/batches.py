"""A large batch next to other work on the caller's event loop.

python benchmarks/batches.py [--short] [--cell NAME] [--rounds 5]

forward_backward of 8 to 512 datums of 4,096 tokens, each with int64 targets and three float32 inputs; logprobs come
back. The longest stall is how long the loop was kept from anything else; memory is what the process grew by at its
peak, the batch itself not counted.
"""

from __future__ import annotations

import harness
import trainers
from harness import STALL, STALL_CPU, Case, Cell, Column, Measures, Settings
from trainers import Trainer

SIZES = (8, 32, 128, 512)


async def run(trainer: Trainer, url: str, settings: Settings) -> Measures:
    datums, tokens = settings["datums"], settings["tokens"]
    data = trainers.policy_data(trainer, datums, tokens)
    calls = 0

    async def one() -> None:
        nonlocal calls
        calls += 1
        outputs = await (await trainer.forward_backward(data))
        assert len(outputs) == datums

    before, received = harness.restart_peak_rss_mb(), harness.server_counts(url)["received"]
    measures = await harness.measure(one, url, 1, settings["count"], limit_s=120)
    received = harness.server_counts(url)["received"] - received
    return measures | {"wire_mb": received / calls / 1e6, "grown_mb": harness.peak_rss_mb() - before}


CASE = Case(
    name="batches",
    title="forward_backward of large batches",
    clients=trainers.clients(run, share=0.5),
    cells=[
        Cell(
            f"{datums} datums of 4,096 tokens",
            {"datums": datums, "tokens": 4096, "count": max(1024 // datums, 4)},
            is_short=datums == 128,
            without=trainers.SLOW if datums > 128 else (),
        )
        for datums in SIZES
    ],
    columns=(
        Column("cpu_ms", "CPU ms each"),
        Column("cpu_ms", "CPU", against=trainers.FIRETITAN),
        Column("cpu_ms", "CPU", against=trainers.TINKER),
        STALL,
        STALL_CPU,
        Column("wire_mb", "MB sent"),
        Column("grown_mb", "memory MB", 0),
    ),
    tiny={"datums": 2, "tokens": 16, "count": 2},
)

if __name__ == "__main__":
    harness.main(CASE)
