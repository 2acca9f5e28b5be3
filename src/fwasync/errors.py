"""Every error that fwasync raises, in one tree.

```
FwasyncError                          what happened · cause · what to do; never holds a secret
├─ UsageError (ValueError)            our caller's side: nothing was sent
│  ├─ DatumError                      a datum or batch that cannot be sent
│  ├─ DatasetError                    a file of data that cannot be read
│  └─ ClosedError                     used outside its `async with`
├─ RunDirectoryError                  the directory of a run: taken, or the disk refuses
├─ CheckpointLedgerError              the ledger of checkpoints: corrupt, or the disk refuses
├─ TransportError                     the network: no answer was received
│  ├─ ServiceUnreachableError         nothing answers at that address
│  ├─ RetryBudgetExhaustedError       it stayed broken for the whole retry budget
│  └─ StreamBrokenError               an answer that came in pieces broke off
├─ ServiceError                       the service answered no; has `status`
│  ├─ BadRequestError                 400, 422 and other refusals of the content
│  ├─ AuthenticationError             401
│  ├─ PermissionDeniedError           403
│  ├─ NotFoundError                   404
│  ├─ ConflictError                   409
│  ├─ RateLimitError                  429
│  ├─ ServiceUnavailableError         5xx, 408, 425
│  └─ ProtocolError                   an answer that is not the trainer API's
├─ ProvisioningError                  a trainer job or deployment did not come up or go; has `resource`
│  ├─ TrainerJobFailedError           the job is in a state that it does not leave by itself
│  ├─ DeploymentFailedError           the deployment is in such a state
│  └─ ProvisioningTimeoutError (TimeoutError)   not within the time it had
├─ WeightSyncError                    new weights did not get to the deployment; has `snapshot`, `deployment`
│  ├─ HotLoadFailedError              the deployment cannot load the snapshot, or says that it failed
│  └─ HotLoadTimeoutError (TimeoutError)   not loaded by every replica within the time it had
├─ RolloutError                       a rollout, or the scheduling of rollouts, failed
│  ├─ RecoverableRolloutError         this rollout is lost and the run goes on; rollouts may raise it
│  │  ├─ RolloutTimeoutError (TimeoutError)   a rollout had not ended by its deadline
│  │  ├─ RewardTimeoutError (TimeoutError)    a reward function was killed at its time limit
│  │  └─ RewardCrashedError           the process of a reward function ended in the middle of a call
│  ├─ CircuitBreakerTrippedError      so many rollouts failed that going on would waste the run
│  └─ RolloutStalledError             nothing moved for too long; the text names what is stuck
└─ OperationError                     an operation was accepted or queued and did not succeed
   ├─ OperationFailedError            the service ran it and it failed; has `category`
   ├─ OperationTimeoutError (TimeoutError)   our deadline; carries the future, which stays good
   ├─ OperationWithdrawnError         it was withdrawn before it was sent
   ├─ ResultLostError                 the service no longer knows its result
   ├─ SequenceBrokenError             nothing more can be sent on this client
   └─ SessionLostError                the service ended the session
```

The large branches answer an operator's first question: was it my input, the network, a refusal, or a failed
operation? Errors carry `request_id` where one is known and pickle like any exception with one message.
To add one: subclass the branch, mix in the stdlib class that callers would catch, draw it above, export it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fwasync.data.jsonl import Problem
    from fwasync.training.future import APIFuture

__all__ = (
    "AuthenticationError",
    "BadRequestError",
    "CheckpointLedgerError",
    "CircuitBreakerTrippedError",
    "ClosedError",
    "ConflictError",
    "DatasetError",
    "DatumError",
    "DeploymentFailedError",
    "FwasyncError",
    "HotLoadFailedError",
    "HotLoadTimeoutError",
    "NotFoundError",
    "OperationError",
    "OperationFailedError",
    "OperationTimeoutError",
    "OperationWithdrawnError",
    "PermissionDeniedError",
    "ProtocolError",
    "ProvisioningError",
    "ProvisioningTimeoutError",
    "RateLimitError",
    "RecoverableRolloutError",
    "ResultLostError",
    "RetryBudgetExhaustedError",
    "RewardCrashedError",
    "RewardTimeoutError",
    "RolloutError",
    "RolloutStalledError",
    "RolloutTimeoutError",
    "RunDirectoryError",
    "SequenceBrokenError",
    "ServiceError",
    "ServiceUnavailableError",
    "ServiceUnreachableError",
    "SessionLostError",
    "StreamBrokenError",
    "TrainerJobFailedError",
    "TransportError",
    "UsageError",
    "WeightSyncError",
)


class FwasyncError(Exception):
    """Base of every error that fwasync raises on purpose."""


class UsageError(FwasyncError, ValueError):
    """The call cannot be carried out as it was made; nothing was sent."""


class DatumError(UsageError):
    """A datum or batch that no trainer could take: empty, of disagreeing lengths, NaN …"""


class DatasetError(UsageError):
    """A file of training data cannot be used; the text names file, lines, fields and reasons.

    Attributes:
        problems: The first ten of them, in the order of the file.
    """

    def __init__(self, message: str, *, problems: tuple[Problem, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems


class ClosedError(UsageError):
    """The object is used before its `async with` was entered or after it was left."""


class RunDirectoryError(FwasyncError):
    """The directory of a run cannot be used: it holds another run, or the system refuses to write there."""


class CheckpointLedgerError(FwasyncError):
    """The ledger of checkpoints cannot be read or written."""


class TransportError(FwasyncError):
    """No answer was received; whether the request had an effect is unknown."""


class ServiceUnreachableError(TransportError):
    """Nothing accepts connections at the address: wrong URL, or the service is not running."""


class RetryBudgetExhaustedError(TransportError):
    """The request kept failing for the whole retry budget."""


class StreamBrokenError(TransportError):
    """An answer that came in pieces broke off before its end; what had come was given out, and is all there is."""


class ServiceError(FwasyncError):
    """The service answered, and the answer is no.

    Attributes:
        status: The HTTP status.
        request_id: The service's id of the operation or request, where it tells one: by it its operators find it.
    """

    def __init__(self, message: str, *, status: int = 0, request_id: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.request_id = request_id


class BadRequestError(ServiceError):
    """The service refuses the content of the request."""


class AuthenticationError(ServiceError):
    """The API key is missing, wrong or expired."""


class PermissionDeniedError(ServiceError):
    """The API key is good and does not allow this."""


class NotFoundError(ServiceError):
    """The service does not know the model, checkpoint, session or path."""


class ConflictError(ServiceError):
    """The request contradicts what the service already has."""


class RateLimitError(ServiceError):
    """Too many requests, for longer than the retry budget."""


class ServiceUnavailableError(ServiceError):
    """The service failed (5xx), or could not tell yet (408, 425), for longer than the retry budget."""


class ProtocolError(ServiceError):
    """The answer is not one of the trainer API: is the URL that of a trainer service?"""


class ProvisioningError(FwasyncError):
    """A trainer job or deployment did not come up, or could not be removed.

    Attributes:
        resource: The full name of the trainer job or deployment, or what is known of it.
        state: The state that it was last seen in, in the service's words.
    """

    def __init__(self, message: str, *, resource: str = "", state: str = "") -> None:
        super().__init__(message)
        self.resource = resource
        self.state = state


class TrainerJobFailedError(ProvisioningError):
    """The trainer job failed, was cancelled, paused or deleted: waiting longer would not help."""


class DeploymentFailedError(ProvisioningError):
    """The deployment failed, is being deleted or is scaled to zero: waiting longer would not help."""


class ProvisioningTimeoutError(ProvisioningError, TimeoutError):
    """The trainer job or deployment was not ready, or not removed, within the time it had."""


class WeightSyncError(FwasyncError):
    """New weights did not get to the deployment. The next sync sends all weights, not a delta.

    Attributes:
        snapshot: The snapshot that was to be loaded; empty while none was.
        deployment: The deployment's id.
    """

    def __init__(self, message: str, *, snapshot: str = "", deployment: str = "") -> None:
        super().__init__(message)
        self.snapshot = snapshot
        self.deployment = deployment


class HotLoadFailedError(WeightSyncError):
    """The deployment cannot load this snapshot, or tried and failed; replicas may differ in what they serve."""


class HotLoadTimeoutError(WeightSyncError, TimeoutError):
    """Not every replica was ready with the snapshot within the time it had; it may still get there."""


class RolloutError(FwasyncError):
    """A rollout failed, or rollouts cannot be scheduled any further."""


class RecoverableRolloutError(RolloutError):
    """This rollout is lost, by no fault of the program: it is counted, and the run goes on.

    Rollouts raise it for what happens in their own surroundings: a sandbox that went away, a tool that is down.

    Attributes:
        repeated: Whether one event has ended several rollouts, and this is not the first of them: the circuit breaker
            counts events.
    """

    def __init__(self, message: str = "", *, repeated: bool = False) -> None:
        super().__init__(message)
        self.repeated = repeated


class RolloutTimeoutError(RecoverableRolloutError, TimeoutError):
    """A rollout had not ended by its deadline and was cancelled."""


class RewardTimeoutError(RecoverableRolloutError, TimeoutError):
    """A reward function had not returned within its time and was killed, with every process that it had started."""


class RewardCrashedError(RecoverableRolloutError):
    """The process of a reward function ended in the middle of a call: out of memory, or a crash of native code."""


class CircuitBreakerTrippedError(RolloutError):
    """So many rollouts failed that something they all depend on must be broken."""


class RolloutStalledError(RolloutError):
    """Nothing moved for too long.

    Attributes:
        tasks: The stacks of all tasks of the event loop at that moment; empty where none were taken.
    """

    def __init__(self, message: str, *, tasks: str = "") -> None:
        super().__init__(message)
        self.tasks = tasks


class OperationError(FwasyncError):
    """An operation was queued or accepted, and did not succeed.

    Attributes:
        request_id: The service's id of the operation, if it had been accepted.
    """

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(message)
        self.request_id = request_id


class OperationFailedError(OperationError):
    """The service accepted the operation, ran it, and it failed.

    Attributes:
        category: `"user"` (the input is at fault, a retry fails again), `"server"` or `"unknown"`.
    """

    def __init__(self, message: str, *, category: str = "unknown", request_id: str | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.category = category


class OperationTimeoutError(OperationError, TimeoutError):
    """The caller's `timeout` ran out; the operation itself is untouched by that.

    Attributes:
        future: The operation's future: its `state` says whether it will take effect, and awaiting it
            again goes on waiting. `None` where there is no future to go back to, as in another process.
    """

    def __init__(self, message: str, *, future: APIFuture[Any] | None = None, request_id: str | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.future = future

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args, {**self.__dict__, "future": None}


class OperationWithdrawnError(OperationError):
    """The operation was withdrawn while it was queued; the service never saw it."""


class ResultLostError(OperationError):
    """The service no longer knows the operation's result; the operation may have taken effect."""


class SequenceBrokenError(OperationError):
    """Nothing more can be sent on this training client without risking order or a doubled effect.

    The way out: leave the client, create a new one, and load the last checkpoint.
    """


class SessionLostError(OperationError):
    """The service ended the session, and with it the models that were not saved."""
