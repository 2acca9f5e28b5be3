"""`AsyncWeightSyncer`: the trainer's weights into a deployment: save, hot-load, every replica ready, warm-up.

Invariants
    * One save or load at a time, in the order of the calls.
    * A delta is loaded only if every replica was just seen to serve what it was made from.
    * Whatever fails or is cancelled, at any stage, the syncer can be used on, and its next snapshot is a base.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import anyio

from fwasync.errors import FwasyncError, UsageError
from fwasync.weights.chain import Snapshot, SnapshotChain
from fwasync.weights.hot_load import ReplicaState, Verdict, timed_out, until_served

__all__ = ("AsyncWeightSyncer", "HotLoads", "SavedWeights", "SavesSnapshots", "SyncProgress")

logger = logging.getLogger("fwasync.weights")

_READY_S = 300.0
_POLL_S = 5.0
_WARM_UP_PAUSE_S = 10.0
_NOT_YET = Verdict("wait", 0, "no look at its replicas yet")

Stage = Literal["saving", "loading", "warming up", "done"]


class SavedWeights(Protocol):
    """What a trainer says of a snapshot that it has saved."""

    @property
    def snapshot_name(self) -> str:
        """Its full name."""
        ...


class SavesSnapshots(Protocol):
    """A training client."""

    def save_weights_for_sampler_ext(self, name: str, checkpoint_type: str = "base") -> Awaitable[SavedWeights]:
        """Save a snapshot under a name that begins like this."""
        ...


class HotLoads(Protocol):
    """What hot-loads and tells of replicas: `AsyncHotLoadManager`."""

    async def hotload(
        self,
        deployment_id: str,
        base_model: str,
        snapshot_identity: str,
        *,
        previous_snapshot_identity: str | None,
        compression_format: str,
        reset_prompt_cache: bool,
    ) -> None:
        """Begin to load a snapshot."""
        ...

    async def hotload_check_status(self, deployment_id: str, base_model: str) -> Sequence[ReplicaState]:
        """Every replica."""
        ...

    async def warm_up(self, deployment_id: str) -> bool:
        """Ask for a few tokens once; whether they came."""
        ...


@dataclass(frozen=True, slots=True)
class SyncProgress:
    """Where a sync is.

    Attributes:
        stage: `saving`, `loading` (told after each look at the replicas), `warming up` or `done`.
        snapshot: The snapshot; while it is saved, the name that was asked for.
        ready: How many replicas serve it.
        replicas: How many there are.
        elapsed_s: Seconds since this save or load began.
    """

    stage: Stage
    snapshot: str
    ready: int
    replicas: int
    elapsed_s: float


class AsyncWeightSyncer:
    """Brings the weights of one training client into one deployment, and knows when a delta will do.

    ```python
    syncer = AsyncWeightSyncer(client, AsyncHotLoadManager(fireworks), "my-deployment", base_model=BASE)
    snapshot = await syncer.save_and_hotload("step-10")
    ```

    The first snapshot is a base, those after it are deltas as long as each was loaded, and a base follows what failed,
    was cancelled or was done by others: also snapshots that are saved, and checkpoints that are loaded, by the training
    client itself, which an `AsyncTrainingClient` tells by its `snapshot_epoch`; with a client that does not, call
    `reset_delta_chain` after them. Call it too after either side was replaced.

    Args:
        policy_client: An open training client.
        deploy_mgr: What hot-loads. Unset, or without `deployment_id`: snapshots are saved only.
        deployment_id: The deployment.
        base_model: Full name of its base model.
        hotload_timeout: Seconds of one hot-load, from the first request to the end of the warm-up. Saving has the
            time of the training client.
        first_checkpoint_type: Kept for recipes of old; a first `delta` could be loaded onto nothing, so the first
            snapshot is a base in any case.
        compression_format: How deltas are compressed.
        warmup_after_hotload: Ask for a few tokens before a sync is done.
        warmup_max_retries: How often, ten seconds apart, until they come; that they do not is no error.
        reset_prompt_cache: Let the deployment forget what it cached for prompts.
        lora_rank: Above 0, snapshots are adapters and always whole; so they are if the client says that it trains one.
        on_progress: Called at each stage, and after each look at the replicas.

    Raises:
        UsageError: An argument cannot be.
    """

    def __init__(
        self,
        policy_client: SavesSnapshots,
        deploy_mgr: HotLoads | None = None,
        deployment_id: str | None = None,
        *,
        base_model: str = "",
        hotload_timeout: float = 600.0,
        first_checkpoint_type: str = "base",
        compression_format: str = "arc_v2",
        warmup_after_hotload: bool = True,
        warmup_max_retries: int = 10,
        reset_prompt_cache: bool = True,
        lora_rank: int = 0,
        on_progress: Callable[[SyncProgress], None] | None = None,
    ) -> None:
        if not hotload_timeout > 0:
            raise UsageError(f"hotload_timeout is {hotload_timeout}; it must be above 0 seconds")
        if first_checkpoint_type not in ("base", "delta"):
            raise UsageError(f"first_checkpoint_type is {first_checkpoint_type!r}; it must be 'base' or 'delta'")
        if first_checkpoint_type == "delta":
            logger.warning("first_checkpoint_type is 'delta'; the first snapshot is a base all the same")
        self._policy = policy_client
        self._target = (deploy_mgr, deployment_id) if deploy_mgr is not None and deployment_id else None
        self._base_model = base_model
        self._timeout = hotload_timeout
        self._compression = compression_format
        self._warm_ups = warmup_max_retries if warmup_after_hotload else 0
        self._reset_prompt_cache = reset_prompt_cache
        self._on_progress = on_progress
        self._chain = SnapshotChain(lora=lora_rank > 0 or bool(getattr(policy_client, "lora_rank", None)))
        self._epoch = self._policy_epoch()
        self._lock = anyio.Lock()
        self.last_timing: dict[str, float] = {}

    @property
    def base_identity(self) -> str | None:
        """What every replica serves by a load of this object; `None` if that is not known."""
        return self._chain.served

    def reset_delta_chain(self) -> None:
        """Forget what was saved and loaded: the next snapshot is a base. What is under way goes on."""
        self._chain.reset()

    async def save_only(self, name: str, checkpoint_type: str | None = None) -> str:
        """Save a snapshot.

        Args:
            name: The beginning of its name; used again, it gets a number.
            checkpoint_type: `base`, `delta` or `merged_base`; unset, what is right.

        Returns:
            Its full name.

        Raises:
            UsageError: A delta is asked for, and could not be loaded.
            FwasyncError: What the training client raises.

        **Cancellation:** the snapshot may be saved nevertheless; the next one is a base.
        """
        async with self._lock:
            self.last_timing = {}
            return (await self._save(name, checkpoint_type)).identity

    async def hotload(self, snapshot_name: str, checkpoint_type: str | None = None) -> str:
        """Load a snapshot that was saved, and wait until every replica serves it.

        Args:
            snapshot_name: Its full name.
            checkpoint_type: What it was saved as; needed only for a base that was saved elsewhere.

        Returns:
            Its full name.

        Raises:
            UsageError: The snapshot is not known, or there is no deployment.
            HotLoadFailedError: It is a delta on something else than is served, or a replica failed to load it.
            HotLoadTimeoutError: It took longer than `hotload_timeout`.
            ServiceError, TransportError: The deployment refused, or did not answer.

        **Cancellation:** the deployment may load it nevertheless, in part or whole; the next snapshot is a base.
        """
        async with self._lock:
            self._deployment()
            self.last_timing = {}
            await self._load(self._chain.find(snapshot_name, checkpoint_type))
        return snapshot_name

    async def save_and_hotload(self, name: str, checkpoint_type: str | None = None) -> str:
        """Save a snapshot, load it, and wait until every replica serves it. Without a deployment, only save it.

        Arguments, result, errors and what a cancellation leaves are those of `save_only` and `hotload`.
        """
        async with self._lock:
            self.last_timing = {}
            self._heed_others()
            with self._timed("total_time_s"):
                if self._target is not None and self._chain.continues:
                    with self._limit(self._timeout, name):
                        self._chain.seen([replica.snapshot for replica in await self._replicas()])
                snapshot = await self._save(name, checkpoint_type)
                if self._target is not None:
                    await self._load(snapshot)
            return snapshot.identity

    async def check_deployment_state(self) -> str | None:
        """What all replicas serve; `None` for the base model, and where they differ.

        **Cancellation:** nothing remains.
        """
        serving = {replica.snapshot for replica in await self._replicas()}
        return serving.pop() if len(serving) == 1 else None

    async def wait_for_hotload_ready(
        self, timeout_s: float = _READY_S, poll_interval_s: float = _POLL_S
    ) -> tuple[ReplicaState, ...]:
        """Wait until the deployment has replicas and all of them answer.

        Args:
            timeout_s: Seconds it may take.
            poll_interval_s: The longest pause between looks.

        Raises:
            HotLoadTimeoutError: It takes longer.

        **Cancellation:** nothing remains.
        """
        replicas: tuple[ReplicaState, ...] = ()
        with self._limit(timeout_s, ""):
            replicas = await self._some_replicas(poll_interval_s)
            while not all(replica.ready for replica in replicas):
                await anyio.sleep(poll_interval_s)
                replicas = await self._some_replicas(poll_interval_s)
        return replicas

    # -- the stages --------------------------------------------------------------------------------

    async def _save(self, name: str, checkpoint_type: str | None) -> Snapshot:
        self._heed_others()
        kind = self._chain.choose(checkpoint_type)
        fresh = self._chain.fresh_name(name)
        self._tell("saving", fresh)
        with self._timed("save_time_s"):
            saving = self._chain.begin_save(kind)
            future = self._policy.save_weights_for_sampler_ext(fresh, kind)
            self._epoch = self._policy_epoch()
            return self._chain.saved(saving, (await future).snapshot_name)

    def _heed_others(self) -> None:
        if self._epoch != self._policy_epoch():
            self._chain.saved_elsewhere()

    def _policy_epoch(self) -> object:
        return getattr(self._policy, "snapshot_epoch", None)

    async def _load(self, snapshot: Snapshot) -> None:
        _, deployment_id = self._deployment()
        started = anyio.current_time()
        looked = _Looked()
        with self._timed("hotload_time_s"), self._limit(self._timeout, snapshot.identity, looked):
            await self._swap(snapshot, looked, started)
        self._tell("warming up", snapshot.identity, looked, started)
        with self._timed("warmup_time_s"), anyio.CancelScope(deadline=started + self._timeout):
            await self._warm_up(deployment_id)
        self._tell("done", snapshot.identity, looked, started)

    async def _swap(self, snapshot: Snapshot, looked: _Looked, started: float) -> None:
        manager, deployment_id = self._deployment()
        self._chain.seen([replica.snapshot for replica in await self._some_replicas(_POLL_S)])
        loading = self._chain.begin_load(snapshot)
        await manager.hotload(
            deployment_id,
            self._base_model,
            snapshot.identity,
            previous_snapshot_identity=loading.previous,
            compression_format=self._compression,
            reset_prompt_cache=self._reset_prompt_cache,
        )

        def note(verdict: Verdict, replicas: int) -> None:
            looked.verdict, looked.replicas = verdict, replicas
            if verdict.action == "ready":
                self._chain.loaded(loading)
            self._tell("loading", snapshot.identity, looked, started)

        await until_served(self._replicas, snapshot.identity, deployment_id, cap_s=_POLL_S, on_look=note)

    async def _warm_up(self, deployment_id: str) -> None:
        manager, _ = self._deployment()
        for attempt in range(self._warm_ups):
            if attempt:
                await anyio.sleep(_WARM_UP_PAUSE_S)
            try:
                if await manager.warm_up(deployment_id):
                    return
            except FwasyncError as error:
                logger.warning("deployment %s could not be warmed up: %s", deployment_id, error)
                return
        if self._warm_ups:
            logger.warning("deployment %s gave no tokens in %d warm-up requests", deployment_id, self._warm_ups)

    async def _some_replicas(self, pause: float) -> tuple[ReplicaState, ...]:
        while True:
            replicas = await self._replicas()
            if replicas:
                return replicas
            await anyio.sleep(pause)

    async def _replicas(self) -> tuple[ReplicaState, ...]:
        manager, deployment_id = self._deployment()
        return tuple(await manager.hotload_check_status(deployment_id, self._base_model))

    def _deployment(self) -> tuple[HotLoads, str]:
        if self._target is None:
            raise UsageError("this syncer has no deployment to load into; pass deploy_mgr and deployment_id")
        return self._target

    @contextmanager
    def _limit(self, timeout: float, snapshot: str, looked: _Looked | None = None) -> Generator[None]:
        with anyio.move_on_after(timeout) as scope:
            yield
        if scope.cancelled_caught:
            _, deployment_id = self._deployment()
            seen = looked.verdict.reason if looked is not None else "no replicas that answer"
            raise timed_out(deployment_id, snapshot, timeout, seen)

    @contextmanager
    def _timed(self, key: str) -> Generator[None]:
        started = anyio.current_time()
        try:
            yield
        finally:
            self.last_timing[key] = anyio.current_time() - started

    def _tell(self, stage: Stage, snapshot: str, looked: _Looked | None = None, started: float | None = None) -> None:
        if self._on_progress is not None:
            elapsed = 0.0 if started is None else anyio.current_time() - started
            ready, replicas = (looked.verdict.ready, looked.replicas) if looked is not None else (0, 0)
            self._on_progress(SyncProgress(stage, snapshot, ready, replicas, elapsed))


@dataclass(slots=True)
class _Looked:
    """The last look at the replicas during a load."""

    verdict: Verdict = _NOT_YET
    replicas: int = 0
