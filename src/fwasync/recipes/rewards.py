"""Rewards that come with the SDK, to be named in settings."""

from __future__ import annotations

import re

from fwasync.data.prompts import PromptRow

__all__ = ("answer_digits",)

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+")


def answer_digits(text: str, row: PromptRow) -> float:
    """1 if the whole number in an answer's `<answer>…</answer>` is that of the row's `ground_truth`, else 0.

    Of several blocks or numbers the first counts. The ground truth may have such a block too, or be the number alone.
    """
    truth = str(row.ground_truth)
    answered, right = _number(_block(text) or ""), _number(_block(truth) or truth)
    return float(answered is not None and answered == right)


def _block(text: str) -> str | None:
    found = _ANSWER.search(text)
    return found[1] if found else None


def _number(text: str) -> str | None:
    found = _NUMBER.search(text)
    return found[0] if found else None
