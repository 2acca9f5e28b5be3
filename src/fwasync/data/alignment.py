"""What a sampler tells of each token, laid beside the targets of a datum.

For a prompt of P tokens and a completion of C, a datum has N = P + C - 1 positions, and position j speaks about token
j + 1 (see `fwasync.data.datums`). The first completion token is predicted at position P - 1, which is the response's
start. A sampler tells of the completion's C tokens, with a number of the prompt's last ones in front where it echoes
them; the first token of a prompt, which nothing predicts, is never among them.

Nothing is padded or cut to make it fit: what does not fit was not sampled from this prompt, and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from fwasync.errors import DatumError

__all__ = ("align_routing_matrices", "align_sample_logprobs", "response_start")


def response_start(prompt_len: int) -> int:
    """The position that predicts the first token of the response: `max(0, prompt_len - 1)`."""
    return max(0, prompt_len - 1)


def align_sample_logprobs(
    logprobs: Sequence[float | None] | npt.NDArray[np.floating],
    *,
    prompt_len: int,
    completion_len: int,
    echoed_prompt_logprobs: int = 0,
) -> npt.NDArray[np.float32]:
    """The sampler's logprobs beside the targets.

    Args:
        logprobs: In nats, `[echoed_prompt_logprobs + C]`. Of echoed prompt tokens they may be missing (`None`).
        prompt_len: P, at least 1.
        completion_len: C.
        echoed_prompt_logprobs: How many of them, in front, are of the prompt's last tokens: P - 1 when all of it
            is echoed (`SampledCompletion.echoed_prompt_logprob_count`).

    Returns:
        float32 `[P + C - 1]`: 0 for prompt tokens that were not told of. These must not count in a loss.

    Raises:
        DatumError: Not as many as there must be; or one of the completion's is missing or not finite.
    """
    padding = _padding("sampler logprobs", len(logprobs), prompt_len, completion_len, echoed_prompt_logprobs)
    completion = np.asarray(
        [np.nan if value is None else value for value in logprobs[echoed_prompt_logprobs:]], np.float32
    )
    bad = np.flatnonzero(~np.isfinite(completion))
    if len(bad):
        told = logprobs[echoed_prompt_logprobs + int(bad[0])]
        raise DatumError(
            f"the sampler's logprob of completion token {bad[0]} is {told}; each token needs a finite one "
            f"({len(bad)} of {completion_len} have none)"
        )
    aligned = np.zeros(prompt_len + completion_len - 1, np.float32)
    echoed = logprobs[:echoed_prompt_logprobs]
    aligned[padding : padding + echoed_prompt_logprobs] = [0.0 if value is None else value for value in echoed]
    aligned[padding + echoed_prompt_logprobs :] = completion
    return aligned


def align_routing_matrices(
    matrices: Sequence[str] | None,
    *,
    prompt_len: int,
    completion_len: int,
    echoed_prompt_matrices: int = 0,
    mode: Literal["completion_only", "full"] = "completion_only",
) -> list[str] | None:
    """Which experts each token was routed to, for each position of a datum's input: what router replay needs.

    Args:
        matrices: Opaque texts, `[echoed_prompt_matrices + C]`; or `None` if nothing was told.
        prompt_len: P, at least 1.
        completion_len: C.
        echoed_prompt_matrices: How many of them, in front, are of the prompt's last tokens.
        mode: `"full"` replays all that was told, `"completion_only"` what belongs to the completion.

    Returns:
        P + C - 1 texts, `""` where nothing is replayed; or `None` if nothing was told.

    Raises:
        DatumError: Not as many as there must be; or `"full"`, and the prompt was not echoed whole.
    """
    if matrices is None:
        return None
    padding = _padding("routing matrices", len(matrices), prompt_len, completion_len, echoed_prompt_matrices)
    if mode == "full" and padding:
        raise DatumError(
            f"routing matrices of {padding} prompt tokens are missing; sample with echo=True to replay all of them"
        )
    kept = matrices if mode == "full" else matrices[echoed_prompt_matrices:]
    return [""] * (prompt_len + completion_len - 1 - len(kept)) + list(kept)


def _padding(what: str, given: int, prompt_len: int, completion_len: int, echoed: int) -> int:
    """How many positions in front nothing was told of, if all lengths are as they must be."""
    if prompt_len < 1:
        raise DatumError(f"prompt_len is {prompt_len}; a completion needs a prompt of at least 1 token")
    if completion_len < 0 or not 0 <= echoed < prompt_len:
        raise DatumError(
            f"{what}: a prompt of {prompt_len} tokens cannot have {echoed} echoed ones before a completion of "
            f"{completion_len}; its first token has none"
        )
    if given != echoed + completion_len:
        more = f" and {echoed} echoed prompt tokens" if echoed else ""
        raise DatumError(
            f"there are {given} {what}; {completion_len} completion tokens{more} need {echoed + completion_len}"
        )
    return prompt_len - 1 - echoed
