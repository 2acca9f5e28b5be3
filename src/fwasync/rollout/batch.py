"""`RolloutBatch`: the groups of one optimizer step, handed over in chunks as they become full."""

from __future__ import annotations

from collections import deque
from typing import Any, Generic, Protocol, TypeVar

from fwasync.rollout.trajectory import RolloutGroup

__all__ = ("BatchOwner", "RolloutBatch")

RowT = TypeVar("RowT")


class BatchOwner(Protocol):
    """What a batch asks of the scheduler."""

    async def wait_for_chunk(self, batch: RolloutBatch[Any]) -> None:
        """Return when the batch is ready; raise if it cannot become so."""
        ...

    def taken(self, chunk: tuple[RolloutGroup[Any], ...]) -> None:
        """A chunk was taken."""
        ...


class RolloutBatch(Generic[RowT]):
    """A batch. Iterate over it once, and publish when its weights are out.

    ```python
    async for chunk in batch:
        await client.forward_backward(rollout_datums(chunk), "importance_sampling")
    ```

    Attributes:
        version: The version of the weights that it is trained with.
        groups: Those that were handed over so far.
    """

    def __init__(self, version: int, owner: BatchOwner) -> None:
        self.version = version
        self.groups: list[RolloutGroup[RowT]] = []
        self.chunks_taken = 0
        self._owner = owner
        self._chunks: deque[tuple[RolloutGroup[RowT], ...]] = deque()
        self._is_whole = False

    def __repr__(self) -> str:
        return f"<RolloutBatch {self.version}: {len(self.groups)} groups in {self.chunks_taken} chunks handed over>"

    def __aiter__(self) -> RolloutBatch[RowT]:
        return self

    async def __anext__(self) -> tuple[RolloutGroup[RowT], ...]:
        """The next chunk, when it is full.

        Raises:
            Exception: What made the run fail, if the batch cannot become whole any more.

        **Cancellation:** no chunk is lost; ask again.
        """
        if not self.is_ready:
            await self._owner.wait_for_chunk(self)
        if not self._chunks:
            raise StopAsyncIteration
        chunk = self._chunks.popleft()
        self.groups += chunk
        self.chunks_taken += 1
        self._owner.taken(chunk)
        return chunk

    @property
    def is_whole(self) -> bool:
        """Whether all of its chunks are full."""
        return self._is_whole

    @property
    def is_ready(self) -> bool:
        """Whether a chunk can be taken, or all were."""
        return bool(self._chunks) or self._is_whole

    @property
    def is_consumed(self) -> bool:
        """Whether all of its chunks were taken."""
        return self._is_whole and not self._chunks

    async def collect(self) -> list[RolloutGroup[RowT]]:
        """Take all chunks that are left, and return all groups of the batch.

        Errors and cancellation are those of taking a chunk.
        """
        async for _ in self:
            pass
        return self.groups

    def add(self, chunk: tuple[RolloutGroup[RowT], ...], *, completes: bool) -> None:
        """A chunk is full; called by the scheduler."""
        assert not self._is_whole, f"batch {self.version} is whole already"
        if chunk:
            self._chunks.append(chunk)
        self._is_whole = completes
