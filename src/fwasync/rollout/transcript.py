"""Token-in, token-out: a conversation that is kept as tokens, so that what is trained on is what was sampled.

Text that is decoded and tokenized anew need not give the same tokens, and a policy loss over other tokens than those
that were sampled learns from noise. So sampled tokens are appended as they came, with their logprobs and the version of
the weights that they came from, and only what the surroundings say is tokenized.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from fwasync.errors import ProtocolError, UsageError
from fwasync.rollout.trajectory import Segment

__all__ = ("TokenTranscript",)

_GIVEN = -1


class TokenTranscript:
    """The tokens of one conversation, of which the sampled ones are known. It grows at its end only."""

    def __init__(self) -> None:
        # Arrays rather than lists: with thousands of conversations the garbage collector would walk through them all.
        self._tokens = array("q")
        self._logprobs = array("f")
        self._versions = array("i")

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> list[int]:
        """All tokens so far: what is sampled from next."""
        return list(self._tokens)

    @property
    def sampled_tokens(self) -> int:
        """How many of them were sampled."""
        return len(self._versions) - self._versions.count(_GIVEN)

    def append(self, tokens: Sequence[int] | npt.NDArray[Any]) -> None:
        """Add tokens that were not sampled: the prompt, the answer of a tool."""
        self._add(tokens, [0.0] * len(tokens), _GIVEN)

    def append_sampled(
        self, tokens: Sequence[int] | npt.NDArray[Any], logprobs: Sequence[float] | npt.NDArray[Any], version: int
    ) -> None:
        """Add tokens that were sampled.

        Args:
            tokens: `[C]`, as the sampler returned them.
            logprobs: `[C]`, the sampler's, in nats.
            version: The policy version that sampled them.

        Raises:
            ProtocolError: There are not as many logprobs as tokens.
            UsageError: Nothing precedes them, or the version is negative.
        """
        if len(tokens) != len(logprobs):
            raise ProtocolError(
                f"the sampler returned {len(tokens)} tokens and {len(logprobs)} logprobs; each token needs one"
            )
        if not self._tokens:
            raise UsageError("append a prompt first: nothing predicts the first token of a sequence")
        if version < 0:
            raise UsageError(f"the version of sampled tokens is {version}; versions count from 0")
        self._add(tokens, logprobs, version)

    def segment(self) -> Segment:
        """The conversation so far, for training.

        Raises:
            UsageError: Nothing was sampled yet.
        """
        versions = np.array(self._versions, np.int32)
        return Segment(
            np.array(self._tokens, np.int64), np.array(self._logprobs, np.float32), versions != _GIVEN, versions
        )

    def _add(
        self,
        tokens: Sequence[int] | npt.NDArray[Any],
        logprobs: Sequence[float] | npt.NDArray[Any],
        version: int,
    ) -> None:
        self._tokens.extend(int(token) for token in tokens)
        self._logprobs.extend(float(logprob) for logprob in logprobs)
        self._versions.extend(repeat(version, len(tokens)))
