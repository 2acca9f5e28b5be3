"""The reference's logprobs of pairs: asked for beside training, each once, in the order of need.

Invariants
    * What is computed are the requests that the steps which are left need, and no others.
    * Pairs that go into one request are always the same ones, neighbours in a batch of the first pass. So the numbers
      of a run that goes on are those that it would have had.
    * Whoever waits for logprobs gets them, or the failure that kept them from being computed.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import takewhile
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import numpy as np
import numpy.typing as npt

from fwasync import APIFuture, AsyncTrainingClient
from fwasync.data.pairs import Pair, preference_batch
from fwasync.recipes.batches import Batch, Batches
from fwasync.recipes.meanwhile import meanwhile
from fwasync.recipes.plan import Plan
from fwasync.recipes.rows import TrainingRows

if TYPE_CHECKING:
    from fwasync.types import ForwardBackwardOutput

__all__ = ("ReferenceLogprobs", "plan_requests")

Logprobs = npt.NDArray[np.float32]
Open = Callable[[], AbstractAsyncContextManager[AsyncTrainingClient]]


def plan_requests(order: Batches, left: Iterable[Batch], size: int) -> list[tuple[int, ...]]:
    """Which rows go into one request, in the order in which batches need them. Pure.

    Args:
        order: All batches of the run; those of the first pass are cut into requests.
        left: The batches that are left.
        size: Rows of a request; the last one of a batch may have fewer.
    """
    request_of: dict[int, tuple[int, ...]] = {}
    for batch in takewhile(lambda batch: batch.epoch == 0, order.after()):
        for start in range(0, len(batch.rows), size):
            request = batch.rows[start : start + size]
            request_of.update(dict.fromkeys(request, request))
    return list(dict.fromkeys(request_of[row] for batch in left for row in batch.rows))


class ReferenceLogprobs:
    """The logprobs that a run needs, as they become known.

    Args:
        rows: The pairs.
        plan: The steps that are left.
        together: Pairs of a request.
        concurrency: Requests at a time.
        timeout: Seconds that one may take.
    """

    def __init__(
        self, rows: TrainingRows[Pair], plan: Plan, *, together: int, concurrency: int, timeout: float
    ) -> None:
        self._rows = rows
        self._needed = plan_requests(plan.order, plan.batches(), together)
        self._concurrency = concurrency
        self._timeout = timeout
        self._known: dict[int, tuple[Logprobs, Logprobs]] = {}
        self._ready = {row: ready for request in self._needed for ready in [anyio.Event()] for row in request}
        self._failure: Exception | None = None

    @property
    def needed(self) -> int:
        """How many pairs are to be computed in all."""
        return len(self._ready)

    async def of(self, rows: Sequence[int]) -> tuple[list[Logprobs], list[Logprobs]]:
        """The logprobs of pairs: of the chosen sides and of the rejected ones. Waits until they are known.

        Raises:
            FwasyncError: The reference failed.

        **Cancellation:** nothing changes.
        """
        for row in rows:
            await self._ready[row].wait()
        if self._failure is not None:
            raise self._failure
        known = [self._known[row] for row in rows]
        return [chosen for chosen, _ in known], [rejected for _, rejected in known]

    @asynccontextmanager
    async def computed(self, open_reference: Open, on_released: Callable[[], None]) -> AsyncGenerator[None]:
        """Compute them beside the block, which may end before.

        Args:
            open_reference: The reference; it is closed as soon as all logprobs are known.
            on_released: Called then.
        """
        if not self._needed:
            yield
            return
        async with meanwhile(self._compute, open_reference, on_released):
            yield

    async def _compute(self, open_reference: Open, on_released: Callable[[], None]) -> None:
        free = anyio.Semaphore(self._concurrency)
        try:
            async with open_reference() as reference, anyio.create_task_group() as group:
                for request in self._needed:
                    await free.acquire()
                    datums = await anyio.to_thread.run_sync(preference_batch, self._rows.chosen(request))
                    future = reference.forward(datums, "cross_entropy", timeout=self._timeout)
                    group.start_soon(self._take, request, future, free)
        except ExceptionGroup as errors:
            self._fail(errors.exceptions[0])
        except Exception as error:
            self._fail(error)
        else:
            on_released()

    async def _take(
        self, request: Sequence[int], future: APIFuture[ForwardBackwardOutput], free: anyio.Semaphore
    ) -> None:
        found = [record["logprobs"].to_numpy() for record in (await future).loss_fn_outputs]
        for row, chosen, rejected in zip(request, found[0::2], found[1::2], strict=True):
            self._known[row] = chosen, rejected
        self._ready[request[0]].set()
        free.release()

    def _fail(self, error: Exception) -> None:
        self._failure = error
        for ready in self._ready.values():
            ready.set()
