"""A task that a tiny model learns in seconds: sort five digits.

The demonstrations are mixed on purpose: 30 % are sorted upwards, 70 % downwards. Supervised training therefore makes
a model that knows both ways and mostly takes the wrong one; rewards then teach it which one is wanted.

Invariants
    * Rows and held-out prompts depend on nothing; no held-out prompt is in the rows.
"""

from __future__ import annotations

import json
import random
from functools import cache
from importlib.resources import files

from fwasync.data.messages import Message
from fwasync.data.prompts import PromptRow

__all__ = (
    "DATA_FILE",
    "MAX_TOKENS",
    "ROWS",
    "data_text",
    "held_out_rows",
    "make_pairs",
    "make_rows",
    "reward",
)

DATA_FILE = "sort_digits.jsonl"
MAX_TOKENS = 8

_DIGITS = 5
ROWS = 4096
_UPWARDS = 0.3
_HELD_OUT = 128


def data_text() -> str:
    """The demonstrations: a JSONL file of 4,096 chats, which ships with the package."""
    return files("fwasync.recipes").joinpath(DATA_FILE).read_text(encoding="utf-8")


def make_rows() -> str:
    """The contents of that file, made anew: `python -m fwasync.recipes.sort_digits > sort_digits.jsonl`."""
    rng = random.Random("sort-digits/rows")
    upwards = [index < _UPWARDS * ROWS for index in range(ROWS)]
    rng.shuffle(upwards)
    rows: list[str] = []
    for up in upwards:
        digits = _fresh_digits(rng)
        answer = "".join(sorted(digits, reverse=not up))
        messages = [{"role": "user", "content": digits}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": messages}, separators=(",", ":")))
    return "\n".join(rows) + "\n"


def make_pairs(count: int) -> str:
    """Preferences: of each five digits, those that are sorted upwards are chosen, those downwards rejected."""
    rng = random.Random("sort-digits/pairs")
    rows: list[str] = []
    while len(rows) < count:
        digits = _fresh_digits(rng)
        chosen, rejected = "".join(sorted(digits)), "".join(sorted(digits, reverse=True))
        if chosen != rejected:
            row = {"input": digits, "preferred_output": chosen, "non_preferred_output": rejected}
            rows.append(json.dumps(row, separators=(",", ":")))
    return "\n".join(rows) + "\n"


def held_out_rows() -> list[PromptRow]:
    """128 prompts to judge a model by, which it never sees in training."""
    return [
        PromptRow((Message("user", digits),), "".join(sorted(digits)), {}, line)
        for line, digits in enumerate(_held_out(), start=1)
    ]


def reward(text: str, row: PromptRow) -> float:
    """Half for the part of the positions that are right, if the length is; the other half for being right."""
    answer, truth = text.strip(), "".join(sorted(row.messages[-1].content))
    if len(answer) != len(truth):
        return 0.0
    right = sum(a == b for a, b in zip(answer, truth, strict=True))
    return 0.5 * right / len(truth) + 0.5 * (answer == truth)


def _digits(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789", k=_DIGITS))


def _fresh_digits(rng: random.Random) -> str:
    while (digits := _digits(rng)) in _held_out():
        pass
    return digits


@cache
def _held_out() -> dict[str, None]:
    """In a fixed order, with quick membership."""
    rng = random.Random("sort-digits/held-out")
    found: dict[str, None] = {}
    while len(found) < _HELD_OUT:
        digits = _digits(rng)
        if len(set(digits)) > 1:
            found[digits] = None
    return found


if __name__ == "__main__":
    import sys

    sys.stdout.write(make_rows())
