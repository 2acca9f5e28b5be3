"""A reward function that never returns for one of the rows; in a module of its own, as other processes import it."""

from __future__ import annotations

import os
from pathlib import Path

from fwasync.data.prompts import PromptRow
from service.test_recipe_rl import reward

__all__ = ("endless",)


def endless(text: str, row: PromptRow) -> float:
    with Path(os.environ["PIDS"]).open("a") as file:
        file.write(f"{os.getpid()}\n")
    while row.ground_truth == 3:
        pass
    return reward(text, row)
