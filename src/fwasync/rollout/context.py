"""What a rollout is given: `RolloutContext`, and `RolloutSession` for a conversation with the policy.

Invariants
    * The sampler that a rollout has seen stays open until the rollout ends, whatever is published meanwhile.
    * A session never tokenizes what was sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio

from fwasync.data.seeds import derive_seed
from fwasync.errors import RecoverableRolloutError
from fwasync.rollout.trajectory import Rollout
from fwasync.rollout.transcript import TokenTranscript
from fwasync.rollout.turns import sample_tokens

__all__ = ("Policy", "RolloutContext", "RolloutSession", "Turn")


@dataclass(frozen=True, slots=True)
class Policy:
    """A sampler, and the version of the weights that it samples from.

    Where a deployment's weights are swapped while a request runs, the version is the oldest that a token can be of.
    """

    sampler: Any
    version: int


@dataclass(frozen=True, slots=True)
class Turn:
    """What the policy said: its token ids, their text, and whether it ended by itself."""

    tokens: tuple[int, ...]
    text: str
    finished: bool


class RolloutContext:
    """The surroundings of one rollout.

    Attributes:
        row_index: The row's place in the source.
        rollout_index: Which of its group, from 0.
        attempt: How often the group was tried before.
        seed: This rollout's own; the same in a run that is repeated or resumed.
        deadline: When it will be cancelled, on the clock of `anyio.current_time()`.
        tokenizer: The one that the scheduler was given.
    """

    def __init__(
        self,
        *,
        row_index: int,
        rollout_index: int,
        attempt: int,
        seed: int,
        deadline: float,
        tokenizer: Any,
        policy: Callable[[], Policy],
        note: Callable[[str], None],
    ) -> None:
        self.row_index = row_index
        self.rollout_index = rollout_index
        self.attempt = attempt
        self.seed = seed
        self.deadline = deadline
        self.tokenizer = tokenizer
        self._policy = policy
        self._note = note

    def __repr__(self) -> str:
        return f"<RolloutContext row {self.row_index}, rollout {self.rollout_index}>"

    @property
    def policy(self) -> Policy:
        """The newest sampler and its version, as a pair that belongs together."""
        return self._policy()

    @property
    def sampler(self) -> Any:
        """The newest sampler; the one that you get stays open until this rollout ends."""
        return self.policy.sampler

    @property
    def version(self) -> int:
        """The newest policy version; it may grow while the rollout runs."""
        return self.policy.version

    @property
    def time_left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - anyio.current_time()

    def note(self, doing: str) -> None:
        """Say what this rollout is doing, for the watchdog. It counts as progress."""
        self._note(doing)

    def session(self) -> RolloutSession:
        """A new conversation with the policy."""
        return RolloutSession(self)


class RolloutSession(TokenTranscript):
    """A conversation: append what the surroundings say, sample what the policy says, and make a rollout of it."""

    def __init__(self, context: RolloutContext) -> None:
        super().__init__()
        self._context = context
        self._turns = 0
        self._last = Turn((), "", finished=False)
        self._truncated = False

    async def sample(
        self, *, max_tokens: int, temperature: float = 1.0, stop: Sequence[int] | str | None = None
    ) -> Turn:
        """Let the policy go on from all tokens so far, and append what it says.

        Args:
            max_tokens: The most tokens of this turn.
            temperature: Of the sampling; logprobs are those of temperature 1.
            stop: Token ids, or a string, that end the turn. Unset: the tokenizer's `stop_tokens`, where it has any.

        Raises:
            ProtocolError: The sampler returned no logprobs.
            FwasyncError: What the sampler raises.

        **Cancellation:** nothing is appended.
        """
        policy, tokenizer = self._context.policy, self._context.tokenizer
        if stop is None:
            stop = getattr(tokenizer, "stop_tokens", None)
        self._turns += 1
        self._context.note(f"sampling turn {self._turns}")
        sampled = await sample_tokens(
            policy.sampler,
            self.tokens,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=derive_seed(self._context.seed, "turn", self._turns),
            stop=stop,
        )
        self.append_sampled(sampled.tokens, sampled.logprobs, policy.version)
        text = "" if tokenizer is None else str(tokenizer.decode(list(sampled.tokens)))
        self._last = Turn(tuple(sampled.tokens), text, sampled.finished)
        self._truncated |= not sampled.finished
        self._context.note(f"has turn {self._turns}")
        return self._last

    def rollout(self, reward: float, *, metrics: Mapping[str, float] | None = None) -> Rollout:
        """The conversation as a rollout of one segment.

        Raises:
            UsageError: Nothing was asked for, or the reward is not a finite number.
            RecoverableRolloutError: The policy has ended every turn without a token, so that there is nothing to learn.
        """
        if self._turns and not self.sampled_tokens:
            raise RecoverableRolloutError("the policy has ended every turn without a token")
        return Rollout((self.segment(),), float(reward), self._last.text, self._truncated, metrics or {})
