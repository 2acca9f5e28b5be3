"""Small models and batches that the engine's tests share."""

from __future__ import annotations

import numpy as np

from fwasync.local.engine import Adam, Example, Lora
from fwasync.local.engine.architecture import ARCHITECTURES, Architecture
from fwasync.local.engine.trainer import NumpyTrainer
from fwasync.local.tokenizer import ASSISTANT_ID, END_ID, USER_ID

TINY = ARCHITECTURES["fwasync/qwen3-tiny"]
MICRO = Architecture(
    name="test/micro",
    hidden_size=8,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    ffn_size=12,
    context=16,
    vocab_size=24,
)


def micro_trainer(lora: Lora | None = None) -> NumpyTrainer:
    """A float64 model whose weights are far from their small initial values."""
    trainer = NumpyTrainer(MICRO, lora, dtype=np.float64)
    flat = trainer.parameters.flat
    flat += np.random.default_rng(1).normal(0, 0.3, flat.shape)
    trainer.parameters.refresh()
    return trainer


def ragged_batch(
    loss_fn: str, lengths: tuple[int, ...] = (5, 9, 2, 9), vocab: int = 24, seed: int = 0
) -> list[Example]:
    rng = np.random.default_rng(seed)

    def example(length: int) -> Example:
        inputs = {"target_tokens": rng.integers(0, vocab, length)}
        if loss_fn == "cross_entropy":
            inputs["weights"] = rng.normal(size=length).astype(np.float32)
        else:
            inputs["logprobs"] = rng.normal(-3, 0.3, length).astype(np.float32)
            inputs["advantages"] = rng.normal(size=length).astype(np.float32)
        return Example(rng.integers(0, vocab, length), inputs)

    return [example(length) for length in lengths]


def chat_example(question: str, answer: str) -> Example:
    """Loss on the answer and its end token only."""
    prompt = [USER_ID, *question.encode(), END_ID, ASSISTANT_ID]
    tokens = np.array([*prompt, *answer.encode(), END_ID])
    weights = np.zeros(len(tokens) - 1, np.float32)
    weights[len(prompt) - 1 :] = 1
    return Example(tokens[:-1], {"target_tokens": tokens[1:], "weights": weights})


def sort_batch(rng: np.random.Generator, size: int) -> list[Example]:
    questions = ["".join(map(str, rng.integers(0, 10, 3))) for _ in range(size)]
    return [chat_example(question, "".join(sorted(question))) for question in questions]


def train_to_sort(trainer: NumpyTrainer, steps: int, seed: int = 0) -> list[float]:
    """Teach sorting three digits; returns the mean loss of each step."""
    rng = np.random.default_rng(seed)
    losses: list[float] = []
    for step in range(steps):
        metrics = trainer.forward_backward(sort_batch(rng, 32), "cross_entropy").metrics
        losses.append(metrics["loss:sum"] / metrics["tokens:sum"])
        adam = Adam(learning_rate=3e-3 * min(1, (step + 1) / 10), grad_clip_norm=1.0)
        trainer.optim_step(adam, "num_loss_tokens")
    return losses
