"""The hot-load endpoints of deployments: begin a load, ask every replica, and one request to warm up.

What the answers mean is decided by pure functions. All replicas count, not the first one alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import anyio
import msgspec

from fwasync._http.client import Http, Unanswered
from fwasync._http.reading import read
from fwasync._wire import hot_load as wire
from fwasync._wire.messages import Message
from fwasync.errors import BadRequestError, HotLoadFailedError, HotLoadTimeoutError, UsageError
from fwasync.weights.chain import same_snapshot

__all__ = ("AsyncHotLoadManager", "ReplicaState", "Verdict", "judge_load", "poll_delay", "timed_out", "until_served")

_PATH = wire.PATH.removeprefix("/")
_CHECKSUM = "alder32"
_STATUS_S = 30.0
_WARM_UP_S = 60.0
_LOAD_S = 400.0
_POLL_S = 5.0
_FIRST_PAUSE_S = 0.25
_GROWTH = 1.5


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """One replica of a deployment.

    Attributes:
        name: Its own name.
        snapshot: What it serves; `None` for the weights of its base model.
        ready: Whether it answers.
        stage: What it is about, in the service's words; `error` after a load that failed.
        target: The snapshot that `stage` is about.
        message: What it says of a failure.
        adapters: Adapters that it has loaded beside each other.
    """

    name: str
    snapshot: str | None
    ready: bool
    stage: str = ""
    target: str | None = None
    message: str = ""
    adapters: tuple[str, ...] = ()

    @classmethod
    def read(cls, status: wire.ReplicaStatus) -> ReplicaState:
        """From the wire."""
        loading = status.loading_state or wire.LoadingState()
        return cls(
            status.identity or "",
            status.current_snapshot_identity or None,
            bool(status.readiness),
            loading.stage or "",
            loading.target_snapshot_identity,
            loading.error_message or "",
            tuple(entry.identity for entry in status.loaded_adapters or [] if entry.status == "loaded"),
        )

    def serves(self, identity: str) -> bool:
        """Whether it answers with that snapshot."""
        return self.ready and any(same_snapshot(entry, identity) for entry in (self.snapshot, *self.adapters))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a look at the replicas means for a load.

    Attributes:
        action: `ready` once every replica serves it, `failed` once one has given up, else `wait`.
        ready: How many serve it.
        reason: What the replicas say.
    """

    action: Literal["ready", "failed", "wait"]
    ready: int
    reason: str = ""


def judge_load(replicas: Collection[ReplicaState], identity: str) -> Verdict:
    """What to make of the replicas after a load was asked for.

    An error counts only if it is told of this snapshot, as an earlier one may still be shown, and not of a replica that
    serves it nevertheless.
    """
    ready = sum(replica.serves(identity) for replica in replicas)
    if replicas and ready == len(replicas):
        return Verdict("ready", ready)
    rest = [replica for replica in replicas if not replica.serves(identity)]
    failed = [replica for replica in rest if replica.stage == "error" and same_snapshot(replica.target, identity)]
    if failed:
        said = "; ".join(sorted({replica.message or "it does not say why" for replica in failed}))
        return Verdict("failed", ready, f"{len(failed)} of {len(replicas)} replicas failed: {said}")
    told = sorted({f"{replica.stage or 'silent'}, serving {replica.snapshot or 'its base model'}" for replica in rest})
    reason = f"{ready} of {len(replicas)} replicas ready; the others: {'; '.join(told)}" if rest else "no replicas yet"
    return Verdict("wait", ready, reason)


def poll_delay(looks: int, *, cap_s: float) -> float:
    """Seconds until the next look: rising from a quarter of a second to `cap_s`.

    Args:
        looks: How many there have been, at least 1.
        cap_s: The longest.
    """
    return min(_FIRST_PAUSE_S * _GROWTH ** min(looks - 1, 60), cap_s)


async def until_served(
    look: Callable[[], Awaitable[Sequence[ReplicaState]]],
    identity: str,
    deployment_id: str,
    *,
    cap_s: float,
    on_look: Callable[[Verdict, int], None],
) -> Sequence[ReplicaState]:
    """Look at the replicas until every one serves a snapshot.

    Args:
        look: One look.
        identity: The snapshot.
        deployment_id: The deployment.
        cap_s: The longest pause between looks.
        on_look: Called after each look, with what it means and how many replicas there are.

    Raises:
        HotLoadFailedError: One of them has given up.

    **Cancellation:** nothing remains.
    """
    for looks in itertools.count(1):
        replicas = await look()
        verdict = judge_load(replicas, identity)
        on_look(verdict, len(replicas))
        if verdict.action == "ready":
            return replicas
        if verdict.action == "failed":
            raise HotLoadFailedError(
                f"deployment {deployment_id} did not load snapshot {identity}: {verdict.reason}",
                snapshot=identity,
                deployment=deployment_id,
            )
        await anyio.sleep(poll_delay(looks, cap_s=cap_s))
    raise AssertionError("unreachable")


def timed_out(deployment_id: str, snapshot: str, timeout: float, reason: str) -> HotLoadTimeoutError:
    """The error for a deployment that took too long to serve a snapshot, or, for an empty one, whatever it serves."""
    return HotLoadTimeoutError(
        f"deployment {deployment_id} was not ready{f' with snapshot {snapshot}' if snapshot else ''} after "
        f"{timeout:g} s: {reason}",
        snapshot=snapshot,
        deployment=deployment_id,
    )


class Account(Protocol):
    """What is needed of the requests of an account."""

    @property
    def http(self) -> Http:
        """The connection, without a prefix."""
        ...

    def check_open(self) -> None:
        """Raise if it is not open."""
        ...

    async def collection(self, kind: str) -> str:
        """The path of all resources of a kind, below `v1/`."""
        ...

    async def call(
        self,
        what: str,
        method: str,
        path: str,
        *,
        body: Message | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> bytes:
        """A request that is repeated until it is answered for good; errors tell what it was for."""
        ...


class Connection(Protocol):
    """What is needed of a client of the control plane."""

    @property
    def plane(self) -> Account:
        """The requests of its account."""
        ...


class AsyncHotLoadManager:
    """Hot-loads of the deployments of an account.

    Every method raises `ServiceError` for a refusal and `TransportError` if no answer was received, after the client's
    retries.

    Args:
        client: An open `AsyncFireworksClient`.
    """

    def __init__(self, client: Connection) -> None:
        self._account = client.plane
        self._resets_prompt_cache = True

    async def hotload(
        self,
        deployment_id: str,
        base_model: str,
        snapshot_identity: str,
        *,
        previous_snapshot_identity: str | None = None,
        compression_format: str = "arc_v2",
        reset_prompt_cache: bool = True,
    ) -> None:
        """Begin to load a snapshot; `hotload_check_status` tells when it is served.

        Args:
            deployment_id: The deployment.
            base_model: Full name of its base model; empty leaves it out.
            snapshot_identity: Full name of the snapshot.
            previous_snapshot_identity: What a delta was made from; `None` loads in full.
            compression_format: How deltas are compressed.
            reset_prompt_cache: Forget what was cached for prompts. Left out for services that do not know it.

        **Cancellation:** whether the load begins is unknown.
        """
        increment = None
        if previous_snapshot_identity is not None:
            increment = wire.IncrementalSnapshot(
                previous_snapshot_identity=previous_snapshot_identity,
                compression_format=compression_format,
                checksum_format=_CHECKSUM,
            )
        request = wire.HotLoadRequest(identity=snapshot_identity, incremental_snapshot_metadata=increment)
        if self._resets_prompt_cache:
            request.reset_prompt_cache = reset_prompt_cache
        what = f"hot-loading snapshot {snapshot_identity} into deployment {deployment_id}"
        headers = await self._headers(deployment_id, base_model)
        try:
            await self._account.call(what, "POST", _PATH, body=request, headers=headers)
        except BadRequestError as error:
            if request.reset_prompt_cache is None or not _unknown_field(str(error), "reset_prompt_cache"):
                raise
            self._resets_prompt_cache = False
            request.reset_prompt_cache = None
            await self._account.call(what, "POST", _PATH, body=request, headers=headers)

    async def hotload_check_status(self, deployment_id: str, base_model: str) -> Sequence[ReplicaState]:
        """Every replica of the deployment as it is now; none while it starts."""
        headers = await self._headers(deployment_id, base_model)
        what = f"reading the hot-load status of deployment {deployment_id}"
        body = await self._account.call(what, "GET", _PATH, headers=headers, timeout=_STATUS_S)
        status = read(what, body, wire.HotLoadStatus)
        return tuple(map(ReplicaState.read, status.replicas))

    async def wait_for_hotload(
        self,
        deployment_id: str,
        base_model: str,
        expected_identity: str,
        *,
        timeout_seconds: float = _LOAD_S,
        poll_interval: float = _POLL_S,
    ) -> Sequence[ReplicaState]:
        """Wait until every replica serves a snapshot.

        Args:
            deployment_id: The deployment.
            base_model: As for `hotload`.
            expected_identity: Full name of the snapshot.
            timeout_seconds: Seconds it may take.
            poll_interval: The longest pause between looks.

        Returns:
            The replicas.

        Raises:
            HotLoadFailedError: A replica has given up.
            HotLoadTimeoutError: It takes longer.

        **Cancellation:** nothing remains; the load goes on.
        """
        seen = Verdict("wait", 0, "no look at its replicas yet")

        def note(verdict: Verdict, _: int) -> None:
            nonlocal seen
            seen = verdict

        with anyio.move_on_after(timeout_seconds):
            return await until_served(
                lambda: self.hotload_check_status(deployment_id, base_model),
                expected_identity,
                deployment_id,
                cap_s=poll_interval,
                on_look=note,
            )
        raise timed_out(deployment_id, expected_identity, timeout_seconds, seen.reason)

    async def hotload_and_wait(
        self,
        deployment_id: str,
        base_model: str,
        snapshot_identity: str,
        *,
        previous_snapshot_identity: str | None = None,
        compression_format: str = "arc_v2",
        reset_prompt_cache: bool = True,
        timeout_seconds: float = _LOAD_S,
    ) -> Sequence[ReplicaState]:
        """`hotload`, then `wait_for_hotload`. `AsyncWeightSyncer` also chooses between base and delta, and warms up."""
        await self.hotload(
            deployment_id,
            base_model,
            snapshot_identity,
            previous_snapshot_identity=previous_snapshot_identity,
            compression_format=compression_format,
            reset_prompt_cache=reset_prompt_cache,
        )
        return await self.wait_for_hotload(
            deployment_id, base_model, snapshot_identity, timeout_seconds=timeout_seconds
        )

    async def warm_up(self, deployment_id: str) -> bool:
        """Ask for a few tokens once; whether they came."""
        request = {"model": await self._name(deployment_id), "prompt": [1, 2], "max_tokens": 1, "temperature": 0.0}
        body = msgspec.json.encode(request)
        try:
            answer = await self._account.http.attempt("POST", "inference/v1/completions", [body], timeout=_WARM_UP_S)
        except Unanswered:
            return False
        return answer.status == 200

    async def _name(self, deployment_id: str) -> str:
        if not deployment_id or "/" in deployment_id:
            raise UsageError(f"deployment_id {deployment_id!r} is not an id; pass the last part of the resource's name")
        self._account.check_open()
        return f"{(await self._account.collection('deployments')).removeprefix('v1/')}/{deployment_id}"

    async def _headers(self, deployment_id: str, base_model: str) -> dict[str, str]:
        name = {wire.DEPLOYMENT_HEADER: await self._name(deployment_id)}
        return name | ({wire.MODEL_HEADER: base_model} if base_model else {})


def _unknown_field(text: str, field: str) -> bool:
    return field in text and "extra inputs are not permitted" in text.lower()
