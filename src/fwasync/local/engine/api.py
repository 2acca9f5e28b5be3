"""What an engine is: the data that crosses its border and the three protocols behind it.

Nothing here computes. Any engine (numpy today, another framework tomorrow) that satisfies
`Engine`, `Trainer` and `Sampler` can sit below the service.

Invariants
    * Arrays that come in are never changed; arrays that go out are never changed afterwards.
    * `EngineError` means that the caller asked for something impossible. Whatever raises it
      leaves weights, accumulated gradients and optimizer state as they were.
    * Trainers and samplers are not thread-safe: one thread drives one object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = (
    "Adam",
    "BaseModel",
    "Engine",
    "EngineError",
    "Example",
    "Float32Array",
    "InputArray",
    "IntArray",
    "Lora",
    "LossResult",
    "Normalization",
    "SampleRequest",
    "SampleResult",
    "SampledSequence",
    "SampledToken",
    "Sampler",
    "SnapshotInfo",
    "Trainer",
)

Float32Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
InputArray = Float32Array | IntArray
Normalization = Literal["num_loss_tokens", "num_sequences", "none"]


class EngineError(ValueError):
    """The request cannot be served as it stands; the message tells its sender what to change."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A model that an engine can start from.

    `stop_token_ids` end a sampled sequence unless the request says otherwise. `parameters` is the
    number of weights.
    """

    name: str
    vocab_size: int
    max_context_length: int
    hidden_size: int
    parameters: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Lora:
    """A low-rank adapter: `W + (alpha / rank) * B @ A` on each chosen matrix `W`.

    `alpha=None` means 32. `train_attn` adapts the q, k, v and o projections, `train_mlp` the
    gate, up and down projections. `train_unembed` adapts the output head only: with tied
    embeddings the head then becomes `E + (alpha / rank) * B @ A` while the look-up stays `E`.
    `seed` fixes the initial `A` (`B` starts at zero); None leaves the choice to
    `Engine.trainer`.
    """

    rank: int
    alpha: float | None = None
    seed: int | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


@dataclass(frozen=True, slots=True)
class Adam:
    """AdamW: decoupled weight decay; gradients clipped to a global norm (`<= 0` turns it off)."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One datum: the input tokens `[N]` int64 and the loss's inputs by name.

    Inputs are float32 or int64, of shape `[N]` or `[N, K]`; position i belongs to the prediction
    made after reading token i.
    """

    tokens: IntArray
    inputs: Mapping[str, InputArray]


@dataclass(frozen=True, slots=True, eq=False)
class LossResult:
    """What a forward pass returns.

    `outputs` has one record for each example, in order: `logprobs` with the shape of its
    `target_tokens`, and for cross_entropy `elementwise_loss`. `metrics` has `loss:sum` and
    `tokens:sum` (targets whose weight is not zero; all targets where a loss has no weights).
    """

    outputs: list[dict[str, Float32Array]]
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class SampleRequest:
    """Ask for `num_samples` continuations of one prompt.

    `max_tokens=None` means as many as the context holds. `temperature=0` takes the most likely
    token. `top_k <= 0` and `top_p = 1` are off; top_k is applied first, top_p to what it leaves.
    `stop` is a tuple of token sequences; the model's own stop tokens count too, unless
    `own_stops` is false. With a `seed`, sample i depends on (weights, prompt, parameters, seed,
    i) and nothing else; without one, fresh entropy is used. `prompt_logprobs_last_n` restricts
    both kinds of prompt logprobs to the last so many tokens.
    """

    key: str
    prompt: IntArray
    num_samples: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop: tuple[tuple[int, ...], ...] = ()
    own_stops: bool = True
    seed: int | None = None
    prompt_logprobs: bool = False
    prompt_logprobs_last_n: int | None = None
    topk_prompt_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """One continuation, its stop token included.

    `logprobs` are the model's at temperature 1 without truncation, one for each token: what a
    trainer's forward computes for the same tokens (equal to about 1e-5 in float32).
    `sampling_logprobs` are those of the distribution that each token was drawn from, with the
    request's temperature, top_k and top_p: 0 at temperature 0.
    """

    tokens: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    stop_reason: Literal["stop", "length"]


class SampledToken(NamedTuple):
    """One token, as soon as it is chosen: the `sample`-th continuation of the request `key` has grown by it.

    `stop_reason` comes with the last token of a continuation. `prompt_logprobs` come with the very first token of a
    request that asks for them.
    """

    key: str
    sample: int
    token: int
    logprob: float
    sampling_logprob: float
    stop_reason: Literal["stop", "length"] | None = None
    prompt_logprobs: list[float | None] | None = None


@dataclass(frozen=True, slots=True)
class SampleResult:
    """A finished request: its sequences in sample order, and the prompt's logprobs if asked for.

    Position 0 of the prompt has no prediction: it is None in both lists, as is what was not asked
    for. `topk_prompt_logprobs` holds (token, logprob) pairs, best first.
    """

    key: str
    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """Where a saved directory comes from; `lora` is None for a full-parameter model."""

    kind: Literal["checkpoint", "snapshot"]
    base_model: str
    lora: Lora | None
    step: int


class Trainer(Protocol):
    """One trainable model with its gradients and optimizer."""

    @property
    def base_model(self) -> BaseModel:
        """The model that training started from."""
        ...

    @property
    def lora(self) -> Lora | None:
        """The adapter being trained, or None when every parameter is."""
        ...

    def forward(self, batch: Sequence[Example], loss_fn: str, config: Mapping[str, float] | None = None) -> LossResult:
        """Compute logprobs and the loss; no state changes.

        Inputs that `loss_fn` does not use are ignored here, since a loss computed by the client
        travels with inputs of its own. Raises EngineError for a bad batch or a loss that is not
        finite.
        """
        ...

    def forward_backward(
        self, batch: Sequence[Example], loss_fn: str, config: Mapping[str, float] | None = None
    ) -> LossResult:
        """Compute the loss and add its gradient to those gathered since the last `optim_step`.

        Raises EngineError for a bad batch (an input that the loss does not know included) or a
        loss or gradient that is not finite; the gathered gradients are then untouched.
        """
        ...

    def optim_step(self, adam: Adam, normalization: Normalization | None = None) -> dict[str, float]:
        """Apply and clear the gathered gradients; returns `{"grad_norm": ...}`.

        `normalization` divides them first by the number of tokens, or of sequences, whose
        gradient is not zero. The norm is that of the normalised gradient before clipping.
        Raises EngineError if nothing was gathered or a parameter is out of its range.
        """
        ...

    def save(self, directory: Path) -> None:
        """Write weights, Adam moments and step count into an existing, empty directory.

        Gathered gradients are not saved. Moving the directory into place atomically is the
        caller's work.
        """
        ...

    def load(self, directory: Path, *, optimizer: bool) -> None:
        """Continue from what `save` wrote: bit for bit, if `optimizer` is true.

        Otherwise only the weights are taken and the optimizer starts anew. Gathered gradients
        are dropped. Raises EngineError if the directory holds no checkpoint, or one of another
        base model or adapter.
        """
        ...

    def load_adapter(self, directory: Path) -> None:
        """Take the weights of the adapter in a snapshot that `export` wrote; the optimizer starts anew.

        Gathered gradients are dropped. Raises EngineError if the directory holds no snapshot of an adapter, or one of
        another base model or kind of adapter.
        """
        ...

    def export(self, directory: Path) -> None:
        """Write a snapshot for a sampler into an existing, empty directory: merged weights, and an adapter's own."""
        ...


class Sampler(Protocol):
    """One immutable set of weights that continues prompts, many at a time."""

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or running."""
        ...

    @property
    def newest(self) -> Sequence[SampledToken]:
        """The tokens of the last step, those of one continuation in order; gathered, they are the results."""
        ...

    def submit(self, request: SampleRequest) -> None:
        """Queue a request. Raises EngineError if it is invalid, too long, or its key is in use."""
        ...

    def cancel(self, key: str) -> None:
        """Forget a request, waiting or running; an unknown key is ignored."""
        ...

    def step(self) -> list[SampleResult]:
        """Fill free slots from the queue, reading their prompts; decode one token in each; returns what finished."""
        ...


class Engine(Protocol):
    """Makes trainers and samplers."""

    @property
    def models(self) -> Mapping[str, BaseModel]:
        """The known base models by name."""
        ...

    def trainer(self, base_model: str, lora: Lora | None, *, seed: int | None = None) -> Trainer:
        """Start training a base model: every parameter, or an adapter on it.

        `seed` serves an adapter that names none (0 if neither does). Raises EngineError for an
        unknown model or an impossible adapter.
        """
        ...

    def sampler(self, base_model: str, snapshot: Path | None) -> Sampler:
        """Serve a snapshot, or the base model itself.

        Raises EngineError for an unknown model, or a snapshot that is none or of another model.
        """
        ...

    def snapshot_info(self, path: Path) -> SnapshotInfo:
        """Tell what a directory written by `save` or `export` holds; EngineError if neither."""
        ...
