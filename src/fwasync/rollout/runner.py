"""Runs one rollout, and says how it ended.

A rollout ends in one of four ways: with a `Rollout`, with `None`, with an exception, or cancelled: by its deadline, by
whoever gave its group up, or by the end of the run. Only the last is passed on. A `SystemExit`, as a tool that
parses a command line raises it, is a fault of the rollout like any other: it does not end the program.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import anyio

from fwasync.data.seeds import derive_seed
from fwasync.errors import RolloutTimeoutError, UsageError
from fwasync.rollout.context import RolloutContext
from fwasync.rollout.samplers import Samplers, UsedSamplers
from fwasync.rollout.settings import RolloutSettings
from fwasync.rollout.tracing import Tracing
from fwasync.rollout.trajectory import Rollout

__all__ = ("Ending", "RolloutExecutor", "RolloutFunction", "RolloutRunner", "Running", "wants_to_exit")

RowT = TypeVar("RowT")

RolloutFunction = Callable[[RowT, RolloutContext], Awaitable[Rollout | None]]
"""The user's coroutine: one rollout of a row, or `None` for one that is not to count."""


class RolloutExecutor(Protocol):
    """Where rollouts run; the default is here, on this event loop."""

    async def run(self, rollout: RolloutFunction[Any], row: Any, context: RolloutContext) -> Rollout | None:
        """Run one rollout. **Cancellation:** ends it, wherever it runs."""
        ...


@dataclass(slots=True, eq=False)
class Running:
    """A rollout in flight: its number in the group, when it started, what it does since when, and how to cancel it."""

    number: int
    started: float
    doing: str
    doing_since: float
    scope: anyio.CancelScope
    task: asyncio.Task[Any] | None = None
    span: Any = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a rollout ended: with a `rollout`, or without one for a `cause` that has a name, perhaps by an `error`."""

    rollout: Rollout | None = None
    cause: str | None = None
    error: Exception | None = None


class RolloutRunner(Generic[RowT]):
    """Runs rollouts.

    Args:
        rollout: The user's coroutine.
        settings: For seeds and deadlines.
        samplers: What they sample from.
        tokenizer: For their contexts.
        executor: Where they run.
        tracing: For their spans.
        progress: Called whenever one says what it does.
    """

    def __init__(
        self,
        rollout: RolloutFunction[RowT],
        settings: RolloutSettings,
        *,
        samplers: Samplers,
        tokenizer: Any,
        executor: RolloutExecutor | None,
        tracing: Tracing,
        progress: Callable[[], None],
    ) -> None:
        self._rollout = rollout
        self._settings = settings
        self._samplers = samplers
        self._tokenizer = tokenizer
        self._executor = executor
        self._tracing = tracing
        self._progress = progress

    def ready(self, number: int) -> Running:
        """A rollout that is about to be run; its deadline begins now."""
        now = anyio.current_time()
        scope = anyio.CancelScope(deadline=now + self._settings.rollout_timeout)
        return Running(number, now, "starting", now, scope)

    async def run(self, index: int, row: RowT, attempt: int, running: Running) -> Ending:
        """Run it.

        **Cancellation:** passed on, if it did not come from its own scope.
        """
        used = self._samplers.use()
        running.task = asyncio.current_task()
        try:
            with running.scope:
                rollout = await self._call(index, row, attempt, running, used)
                return Ending(rollout, "None" if rollout is None else None)
        except Exception as error:
            return Ending(None, _name(error), error)
        except SystemExit as error:
            return _at_fault(wants_to_exit(error), error)
        except anyio.get_cancelled_exc_class() as error:
            if anyio.current_effective_deadline() == -math.inf:  # a scope of the run's, not the task itself
                raise
            return _at_fault(UsageError("a rollout raised a cancellation that nobody had asked for"), error)
        finally:
            used.release()
        late = RolloutTimeoutError(f"it had not ended after {self._settings.rollout_timeout} s; it was {running.doing}")
        return Ending(None, type(late).__name__, late)

    async def _call(self, index: int, row: RowT, attempt: int, running: Running, used: UsedSamplers) -> Rollout | None:
        def note(doing: str) -> None:
            running.doing, running.doing_since = doing, anyio.current_time()
            self._progress()

        note("running")
        context = RolloutContext(
            row_index=index,
            rollout_index=running.number,
            attempt=attempt,
            seed=derive_seed(self._settings.seed, "rollout", index, running.number, attempt),
            deadline=running.scope.deadline,
            tokenizer=self._tokenizer,
            policy=used.policy,
            note=note,
        )
        attributes = {
            "fwasync.row": index,
            "fwasync.rollout": running.number,
            "fwasync.attempt": attempt,
            "fwasync.policy_version": context.version,
        }
        with self._tracing.current("fwasync.rollout", attributes) as running.span:
            if self._executor is None:
                rollout = await self._rollout(row, context)
            else:
                rollout = await self._executor.run(self._rollout, row, context)
            if rollout is not None and not isinstance(rollout, Rollout):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"a rollout function returns a Rollout or None, not {type(rollout).__name__}")
            return rollout


def _name(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):  # of a task group in the rollout
        error = cast("BaseExceptionGroup[BaseException]", error).exceptions[0]
    return type(error).__name__


def wants_to_exit(error: SystemExit) -> UsageError:
    """What a rollout has failed with that raised it."""
    return UsageError(f"a rollout raised SystemExit({error.code!r}): what it calls wants to end the program")


def _at_fault(failure: UsageError, cause: BaseException) -> Ending:
    failure.__cause__ = cause
    return Ending(None, type(failure).__name__, failure)
