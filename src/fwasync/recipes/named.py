"""The functions of the user's that settings name: imported and checked before anything is started.

Invariants
    * What such a function raises in a run is told as its own error, with its place. Bad luck, and what this SDK raised
      inside of it, pass as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import anyio.to_thread

from fwasync.config.named import load_named, raised_by
from fwasync.errors import FwasyncError, UsageError
from fwasync.recipes.groups import RewardFn, is_async
from fwasync.recipes.rollouts import PromptRollout
from fwasync.rollout.failures import is_recoverable

__all__ = ("describe_named", "load_reward", "load_rollout")


@dataclass(frozen=True)
class _Named:
    """A function under its name. It can be pickled if the function can."""

    what: str
    function: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        with _told(self.what):
            return self.function(*arguments)


@dataclass(frozen=True)
class _NamedAsync(_Named):
    async def __call__(self, *arguments: Any) -> Any:
        with _told(self.what):
            return await self.function(*arguments)


async def load_reward(name: str) -> RewardFn:
    """The reward function of that name.

    Args:
        name: `module:function` or `file.py:function`; see `fwasync.config.named`.

    Raises:
        UsageError: There is none, or it does not take a text and a row. Once it runs, what it raises is one too.

    **Cancellation:** the import goes on in its thread, unheard.
    """
    if not name:
        raise UsageError(
            "reward is empty; name a function as module:function or file.py:function, yours or "
            "fwasync.recipes.rewards:answer_digits"
        )
    return await anyio.to_thread.run_sync(_load, name, "reward", ("text", "row"), abandon_on_cancel=True)


async def load_rollout(name: str) -> PromptRollout:
    """The coroutine function of that name that makes a rollout.

    Args:
        name: `module:function` or `file.py:function`; see `fwasync.config.named`.

    Raises:
        UsageError: There is none, it is not async, or it does not take a prompt and a context. Once it runs, what it
            raises is one too.

    **Cancellation:** the import goes on in its thread, unheard.
    """
    rollout = await anyio.to_thread.run_sync(_load, name, "rollout", ("prompt", "ctx"), abandon_on_cancel=True)
    if not isinstance(rollout, _NamedAsync):
        raise UsageError(f"{rollout.what} must be an async function")
    return rollout


def describe_named(function: object) -> str:
    """Of a function that was loaded here, where it was found."""
    named = cast("_Named", function)
    module = inspect.getmodule(named.function)
    return f"{named.what} is found, in {getattr(module, '__file__', None) or module}"


def _load(name: str, what: str, parameters: tuple[str, ...]) -> _Named:
    function, what = load_named(name, what), f"{what} {name!r}"
    if not callable(function):
        raise UsageError(f"{what} is a {type(function).__name__}, and no function of ({', '.join(parameters)})")
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as error:
        raise UsageError(f"{what} must take ({', '.join(parameters)}): {error}") from None
    except ValueError:
        pass  # it does not say what it takes
    return (_NamedAsync if is_async(function) else _Named)(what, function)


@contextmanager
def _told(what: str) -> Generator[None]:
    try:
        yield
    except Exception as error:
        first: BaseException = error
        while isinstance(first, BaseExceptionGroup):
            first = cast("BaseExceptionGroup[BaseException]", first).exceptions[0]
        if isinstance(first, FwasyncError) or is_recoverable(error):
            raise
        raise raised_by(what, first) from error
