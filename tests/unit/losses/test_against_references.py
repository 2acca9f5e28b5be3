"""Every loss against its formula written out a second time, token by token in Python, over random shapes and masks.

Logprobs are multiples of 0.1, where no clip and no cap has its kink, so that differences measure derivatives. The
second writing takes the policy twice, once as what is varied and once as the constant that stop-gradients see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from fwasync.losses import (
    PolicyInputs,
    TISConfig,
    make_batch_dpo_loss_fn,
    make_batch_orpo_loss_fn,
    make_batch_sft_loss_fn,
    make_batch_weighted_sft_loss_fn,
    policy_loss,
)
from unit.losses.cases import apply, datum

LOGPROB = st.integers(-40, -1).map(lambda tenths: tenths / 10)


def row(length: int) -> st.SearchStrategy[list[float]]:
    return st.lists(LOGPROB, min_size=length, max_size=length)


@dataclass(frozen=True)
class Sample:
    policy: list[float]
    old_policy: list[float]
    sampler: list[float]
    reference: list[float]
    mask: list[int] | None
    prompt_len: int
    advantage: float
    staleness: int

    @property
    def active(self) -> list[int]:
        start = max(0, self.prompt_len - 1)
        return [j for j in range(start, len(self.policy)) if self.mask is None or self.mask[j]]


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    length = draw(st.integers(1, 7))
    near = st.lists(st.integers(-8, 8).map(lambda tenths: tenths / 10), min_size=length, max_size=length)
    policy = draw(row(length))

    def beside() -> list[float]:
        return [round(value + change, 1) for value, change in zip(policy, draw(near), strict=True)]

    return Sample(
        policy=policy,
        old_policy=beside(),
        sampler=beside(),
        reference=beside(),
        mask=draw(st.none() | st.lists(st.integers(0, 1), min_size=length, max_size=length)),
        prompt_len=draw(st.integers(0, length + 2)),
        advantage=draw(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0])),
        staleness=draw(st.integers(-1, 4)),
    )


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def tis(sample: Sample, config: TISConfig) -> dict[int, float]:
    logs = {j: sample.old_policy[j] - sample.sampler[j] for j in sample.active}
    if config.level == "sequence":
        mean = sum(logs.values()) / len(logs)
        logs = dict.fromkeys(logs, mean)
    weights = {j: min(math.exp(value), config.cap) for j, value in logs.items()}
    if config.icepop_threshold is not None:
        edge = math.log(config.icepop_threshold)
        weights = {j: weights[j] if abs(logs[j]) <= edge else 0.0 for j in logs}
    return weights


def policy_reference(
    name: str, settings: dict[str, Any], config: TISConfig, sample: Sample, pi: list[float], frozen: list[float]
) -> float:
    """The loss of one sample: its formula, token by token."""
    active, advantage = sample.active, sample.advantage
    if not active:
        return 0.0
    w = tis(sample, config)
    total = 0.0
    for j in active:
        prox, inf, ref = sample.old_policy[j], sample.sampler[j], sample.reference[j]
        cap = settings.get("ratio_log_cap", 20.0)
        rho = math.exp(clip(pi[j] - prox, -cap, cap))
        still = math.exp(clip(frozen[j] - prox, -cap, cap))
        if name in ("grpo", "reinforce"):
            beta = settings.get("kl_beta", 0.0)
            distance = ref - pi[j]
            kl = math.exp(distance) - distance - 1 if settings.get("kl", "k3") == "k3" else frozen[j] - ref
        if name == "grpo":
            low = 1 - settings.get("eps_clip", 0.2)
            high = 1 + settings.get("eps_clip_high", settings.get("eps_clip", 0.2))
            total += w[j] * max(-rho * advantage, -clip(rho, low, high) * advantage) + beta * kl
        elif name == "reinforce":
            total += -advantage * math.exp(pi[j] - inf) + beta * kl
        elif name == "importance_sampling":
            total += -w[j] * advantage * rho
        elif name == "dapo":
            loss = max(-rho * advantage, -clip(rho, 0.8, 1.28) * advantage)
            if "eps_clip_c" in settings and advantage < 0:
                loss = min(-settings["eps_clip_c"] * advantage, loss)
            total += w[j] * loss
        elif name == "dro":
            gate = 1 if advantage != 0 else 0
            total -= pi[j] * advantage * w[j] - 0.5 * settings.get("beta", 0.05) * (pi[j] - prox) ** 2 * gate
        elif name == "cispo":
            total += -w[j] * advantage * clip(still, 0.8, 1.28) * pi[j]
        elif name == "gspo":
            mean = sum(frozen[k] - sample.old_policy[k] for k in active) / len(active)
            s = math.exp(min(pi[j] - frozen[j] + mean, settings.get("seq_ratio_log_cap", 10.0)))
            total += w[j] * max(-s * advantage, -clip(s, 0.8, 1.2) * advantage)
        elif name == "decoupled":
            alpha = 0.0 if sample.staleness <= 0 else clip((sample.staleness - 1) / sample.staleness, 0, 1)
            proximal = (1 - alpha) * inf + alpha * frozen[j]
            ratio, behave = math.exp(pi[j] - proximal), math.exp(proximal - inf)
            top = settings.get("behave_cap", 5.0)
            masks = settings.get("behave_mode") == "token_mask"
            weight = behave if behave <= top else 0.0 if masks else top
            total += weight * max(-ratio * advantage, -clip(ratio, 0.8, 1.2) * advantage)
    return total


def slopes(function, at: list[float], step: float = 1e-6) -> list[float]:
    """Central differences."""

    def shifted(j: int, by: float) -> float:
        return function([value + by * (k == j) for k, value in enumerate(at)])

    return [(shifted(j, step) - shifted(j, -step)) / (2 * step) for j in range(len(at))]


def close(expected):
    return pytest.approx(expected, rel=1e-6, abs=1e-7)


CASES = [
    ("grpo", {}),
    ("grpo", {"kl_beta": 0.0, "eps_clip": 0.3, "eps_clip_high": 0.05}),
    ("grpo", {"kl_beta": 0.1, "kl": "value"}),
    ("importance_sampling", {}),
    ("importance_sampling", {"ratio_log_cap": 0.35}),
    ("dapo", {}),
    ("dapo", {"eps_clip_c": 1.3, "ratio_log_cap": 0.55}),
    ("dro", {"beta": 0.4}),
    ("gspo", {}),
    ("gspo", {"seq_ratio_log_cap": 0.317}),
    ("cispo", {"ratio_log_cap": 0.15}),
    ("reinforce", {"kl_beta": 0.2}),
    ("reinforce", {"kl_beta": 0.2, "kl": "value"}),
    ("decoupled", {}),
    ("decoupled", {"behave_cap": 1.15, "behave_mode": "token_mask"}),
]
WEIGHTS = st.sampled_from(
    [TISConfig(), TISConfig(cap=1.15), TISConfig(level="sequence"), TISConfig(cap=3, icepop_threshold=1.45)]
)


@pytest.mark.parametrize(("name", "settings"), CASES)
@bounded(max_examples=40)
@given(batch=st.lists(samples(), min_size=1, max_size=3), weighting=WEIGHTS)
def test_policy_losses(name, settings, batch: list[Sample], weighting: TISConfig) -> None:
    settings = {"kl_beta": 0.001, **settings} if name == "grpo" else settings
    inputs = PolicyInputs(
        [sample.advantage for sample in batch],
        [sample.reference for sample in batch],
        [sample.prompt_len for sample in batch],
        [sample.sampler for sample in batch],
        [sample.old_policy for sample in batch],
        [sample.staleness for sample in batch],
    )
    own = name in ("reinforce", "decoupled")
    loss_fn = policy_loss(name, settings, None if own else weighting).custom(inputs)
    data = [datum(len(sample.policy), sample.mask) for sample in batch]
    done = apply(loss_fn, [sample.policy for sample in batch], data)

    def loss_of(sample: Sample, pi: list[float]) -> float:
        return policy_reference(name, settings, weighting, sample, pi, sample.policy)

    assert done.loss == close(sum(loss_of(sample, sample.policy) for sample in batch))
    for sample, gradient in zip(batch, done.gradients, strict=True):
        assert gradient == close(slopes(lambda pi, sample=sample: loss_of(sample, pi), sample.policy))
        assert not any(value for j, value in enumerate(gradient) if j not in sample.active)
    check_common_metrics(done.metrics, batch)


def check_common_metrics(metrics: dict[str, float], batch: list[Sample]) -> None:
    lively = [sample for sample in batch if sample.active]
    tokens = [(sample, j) for sample in lively for j in sample.active]
    assert metrics["active_tokens"] == len(tokens)
    response = sum(max(0, len(sample.policy) - max(0, sample.prompt_len - 1)) for sample in batch)
    assert metrics["total_resp_tokens"] == response
    if not tokens:
        assert set(metrics) == {"active_tokens", "total_resp_tokens"}
        return
    assert metrics["mask_ratio"] == close(len(tokens) / response)
    assert metrics["mean_kl"] == close(np.mean([s.policy[j] - s.reference[j] for s, j in tokens]))
    gaps = [np.array([s.policy[j] - s.sampler[j] for j in s.active]) for s in lively]
    assert metrics["inference_diff"] == close(np.mean([np.abs(gap).mean() for gap in gaps]))
    assert metrics["inference_kld"] == close(np.mean([(np.exp(gap) - gap - 1).mean() for gap in gaps]))


@st.composite
def sequences(draw: st.DrawFn, count: int) -> tuple[list[list[float]], list[int]]:
    """Rows of logprobs and where each one's response starts, with something left of it."""
    lengths = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    starts = [draw(st.integers(0, length)) for length in lengths]
    return [draw(row(length)) for length in lengths], starts


def check(loss_fn, rows: list[list[float]], reference, data=None) -> None:
    done = apply(loss_fn, rows, data)
    assert done.loss == close(reference(rows))
    for i, gradient in enumerate(done.gradients):

        def alone(values: list[float], i: int = i) -> float:
            return reference([*rows[:i], values, *rows[i + 1 :]])

        assert gradient == close(slopes(alone, rows[i]))


@given(st.data())
def test_batch_sft(data: st.DataObject) -> None:
    rows, starts = data.draw(sequences(data.draw(st.integers(1, 4))))

    def reference(rows: list[list[float]]) -> float:
        responses = [values[max(0, start - 1) :] for values, start in zip(rows, starts, strict=True)]
        return -sum(map(sum, responses)) / sum(map(len, responses))

    check(make_batch_sft_loss_fn(starts), rows, reference)


@given(st.data())
def test_batch_weighted_sft(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 2), min_size=1, max_size=3))
    rows, _ = data.draw(sequences(sum(sizes)))
    weights = [
        [data.draw(st.integers(0, 3)) / 2 for _ in values[1:]] + [1.0] for values in rows
    ]  # the last counts always, so that every microbatch has a mean

    def reference(rows: list[list[float]]) -> float:
        total, start = 0.0, 0
        for size in sizes:
            part = list(zip(rows, weights, strict=True))[start : start + size]
            total -= sum(np.dot(values, w) for values, w in part) / sum(sum(w) for _, w in part)
            start += size
        return total

    data_ = [datum(len(w), weights=w) for w in weights]
    check(make_batch_weighted_sft_loss_fn(sizes), rows, reference, data_)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[list[list[float]], list[list[float]], list[int]]:
    """Interleaved rows, reference rows, and a start for each pair that leaves something of both."""
    count = draw(st.integers(1, 3))
    rows, starts = draw(sequences(2 * count))
    reference = [draw(row(len(values))) for values in rows]
    return rows, reference, [min(starts[2 * i : 2 * i + 2]) for i in range(count)]


@given(pairs(), st.sampled_from([0.05, 0.1, 0.5, 2.0]), st.booleans())
def test_dpo(drawn, beta: float, apart: bool) -> None:
    rows, reference_rows, starts = drawn

    def reference(rows: list[list[float]]) -> float:
        total = 0.0
        for i, start in enumerate(starts):
            chosen, rejected = (
                sum(p - r for p, r in list(zip(rows[k], reference_rows[k], strict=True))[max(0, start - 1) :])
                for k in (2 * i, 2 * i + 1)
            )
            total += math.log1p(math.exp(-beta * (chosen - rejected)))
        return total if apart else total / len(starts)

    sizes = [1] * len(starts) if apart else None
    loss_fn = make_batch_dpo_loss_fn(reference_rows[0::2], reference_rows[1::2], starts, beta, microbatch_sizes=sizes)
    check(loss_fn, rows, reference)


@given(pairs(), st.sampled_from([0.0, 0.3, 1.0]))
def test_orpo(drawn, orpo_lambda: float) -> None:
    rows, _, starts = drawn

    def odds(mean: float) -> float:
        return math.log(math.exp(mean) / (1 - math.exp(mean)))

    def reference(rows: list[list[float]]) -> float:
        total = 0.0
        for i, start in enumerate(starts):
            chosen, rejected = (
                float(np.mean(values[max(0, start - 1) :])) for values in (rows[2 * i], rows[2 * i + 1])
            )
            total += -chosen + orpo_lambda * math.log1p(math.exp(-(odds(chosen) - odds(rejected))))
        return total

    check(make_batch_orpo_loss_fn(starts, orpo_lambda), rows, reference)
