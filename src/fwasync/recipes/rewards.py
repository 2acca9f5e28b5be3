"""Reward functions by name, for runs that are started by settings alone."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import cast

from fwasync.data.named import import_named
from fwasync.data.prompts import PromptRow
from fwasync.errors import FwasyncError, UsageError
from fwasync.recipes.groups import RewardFn
from fwasync.rollout.failures import is_recoverable

__all__ = ("load_reward",)


def load_reward(name: str) -> RewardFn:
    """The reward function that a setting names. What it raises, unless it may pass, is told as its own fault.

    Raises:
        UsageError: It names none.
    """
    if not name:
        raise UsageError("reward is empty; name a function of yours as module:function, called as reward(text, row)")
    found = import_named(name, "reward")
    if not callable(found) or isinstance(found, type):
        raise UsageError(f"reward {name!r} must be a function that is called as reward(text, row)")
    if inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(type(found).__call__):
        return _Async(name, cast("Callable[[str, PromptRow], Awaitable[float]]", found))
    return _Plain(name, cast("Callable[[str, PromptRow], float]", found))


@dataclass(frozen=True, slots=True)
class _Plain:
    """Can be sent to another process, as long as the function can."""

    name: str
    function: Callable[[str, PromptRow], float]

    def __call__(self, text: str, row: PromptRow) -> float:
        try:
            return self.function(text, row)
        except Exception as error:
            raise _blamed(self.name, error) from error


@dataclass(frozen=True, slots=True)
class _Async:
    name: str
    function: Callable[[str, PromptRow], Awaitable[float]]

    async def __call__(self, text: str, row: PromptRow) -> float:
        try:
            return await self.function(text, row)
        except Exception as error:
            raise _blamed(self.name, error) from error


def _blamed(name: str, error: Exception) -> Exception:
    if isinstance(error, FwasyncError) or is_recoverable(error):
        return error
    return UsageError(f"the reward function {name} raised {type(error).__name__}: {error}")
