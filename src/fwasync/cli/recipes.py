"""The recipes that can be run by name: the modules of `fwasync.recipes` that are one."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from pydantic import BaseModel

from fwasync.cli.settings import nearest
from fwasync.errors import UsageError

if TYPE_CHECKING:
    from fwasync.data.chat import ChatTokenizer
    from fwasync.recipes.stopping import StopRequest
    from fwasync.recipes.trainers import Where
    from fwasync.tracking.run import Run

__all__ = ("Recipe", "find_recipe")

_NAMES = ("sft", "dpo", "orpo", "rl", "async_rl")


class Recipe(Protocol):
    """What a module has that is a recipe."""

    @property
    def Config(self) -> type[BaseModel]:  # noqa: N802
        """The model of its settings. It has a `log_path`, and may have `base_model`, `wandb`, `infra` …"""
        ...

    def train(self, config: Any, *, where: Where, run: Run, stop: StopRequest) -> Awaitable[object]:
        """Train; go on where the run in `config.log_path` was interrupted, if it was."""
        ...

    def dry_run(
        self, config: Any, *, tokenizer: ChatTokenizer | None, max_seq_len: int | None
    ) -> Awaitable[Sequence[str]]:
        """Check the data without starting anything; what was found, in lines.

        Args:
            config: What would be done.
            tokenizer: The model's, if it can be had.
            max_seq_len: The model's context length, if it is known.

        Raises:
            FwasyncError: What is certain to fail.
        """
        ...


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; it is imported now.

    Raises:
        UsageError: There is none.
    """
    known = [recipe for recipe in _NAMES if importlib.util.find_spec(f"fwasync.recipes.{recipe}")]
    name = name.replace("-", "_")
    if name not in known:
        raise UsageError(f"there is no recipe {name!r}; {nearest(name, known)}")
    return cast("Recipe", importlib.import_module(f"fwasync.recipes.{name}"))
