"""The trainer: validation, gathering of gradients, the optimizer, checkpoints, tenants."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from fwasync.local.engine import Adam, EngineError, Example, Lora, NumpyEngine
from fwasync.local.engine.optimizer import AdamState, clip_to_norm
from fwasync.local.engine.trainer import NumpyTrainer
from unit.local.engine_cases import MICRO, TINY, micro_trainer, ragged_batch, train_to_sort

ADAM = Adam(learning_rate=1e-2)
KINDS = pytest.mark.parametrize("lora", [None, Lora(rank=4, seed=3)], ids=["full", "lora"])


def step(trainer, seed, loss_fn="cross_entropy", adam=ADAM):
    trainer.forward_backward(ragged_batch(loss_fn, vocab=trainer.base_model.vocab_size, seed=seed), loss_fn)
    return trainer.optim_step(adam)


def weights(trainer):
    return trainer.parameters.flat.copy()


# Learning


@KINDS
def test_training_lowers_the_loss(lora):
    losses = train_to_sort(NumpyTrainer(TINY, lora), 40)
    assert losses[0] == pytest.approx(np.log(264), rel=0.02)
    assert losses[-1] < (2.6 if lora is None else 3.5)


@KINDS
def test_equal_calls_give_equal_bits_and_tenants_do_not_meet(lora):
    def run(trainer, seeds):
        for seed in seeds:
            step(trainer, seed)
        return weights(trainer)

    expected = run(NumpyTrainer(TINY, lora), range(6)), run(NumpyTrainer(TINY, lora), range(6, 12))
    first, second = NumpyTrainer(TINY, lora), NumpyTrainer(TINY, lora)
    for seed in range(6):
        step(first, seed)
        second.forward(ragged_batch("ppo", vocab=264), "ppo")
        step(second, seed + 6)
    assert (weights(first) == expected[0]).all()
    assert (weights(second) == expected[1]).all()
    assert (expected[0] != expected[1]).any()


def test_an_adapter_starts_as_the_base_model_and_its_seed_is_obeyed():
    base, adapted = NumpyTrainer(TINY), NumpyTrainer(TINY, Lora(rank=4, seed=1))
    batch = ragged_batch("dro", vocab=264)
    for one, other in zip(base.forward(batch, "dro").outputs, adapted.forward(batch, "dro").outputs, strict=True):
        assert (one["logprobs"] == other["logprobs"]).all()
    engine = NumpyEngine()
    by_argument = engine.trainer(TINY.name, Lora(rank=4), seed=1)
    assert (by_argument.parameters.flat == adapted.parameters.flat).all()
    assert (engine.trainer(TINY.name, Lora(rank=4)).parameters.flat != adapted.parameters.flat).any()


@pytest.mark.parametrize(
    ("flags", "moved"),
    [
        ({"train_attn": True}, ("q_proj", "k_proj", "v_proj", "o_proj")),
        ({"train_mlp": True}, ("gate_proj", "up_proj", "down_proj")),
        ({"train_unembed": True}, ("lm_head",)),
    ],
)
def test_an_adapter_moves_only_what_it_was_put_on(flags, moved):
    off = {"train_attn": False, "train_mlp": False, "train_unembed": False}
    trainer = NumpyTrainer(TINY, Lora(rank=2, **(off | flags)))
    layout = trainer.parameters.model_layout
    before = {name: value.copy() for name, value in layout.named(trainer.parameters.model).items()}
    for seed in range(2):  # B starts at zero, so A moves from the second step on
        step(trainer, seed)
    after = layout.named(trainer.parameters.model)
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed == {name for name in before if name.removesuffix(".weight").endswith(moved)}


# Validation


def with_inputs(**changes):
    example = ragged_batch("cross_entropy", (5,))[0]
    return Example(example.tokens, {**example.inputs, **changes})


def with_tokens(tokens):
    example = ragged_batch("cross_entropy", (5,))[0]
    return Example(np.asarray(tokens), example.inputs)


LONG = Example(np.zeros(17, np.int64), {"target_tokens": np.zeros(17, np.int64), "weights": np.ones(17, np.float32)})
BAD_EXAMPLES = {
    "an id above": (with_tokens([0, 1, 24, 2, 3]), "datum 1: model_input: token id 24 at position 2"),
    "an id below": (with_tokens([0, 1, 2, -1, 3]), "datum 1: model_input: token id -1 at position 3"),
    "no tokens": (with_tokens(np.zeros(0, np.int64)), "datum 1: model_input: needs at least one token"),
    "two dimensions": (with_tokens(np.zeros((5, 1), np.int64)), "datum 1: model_input: needs"),
    "float tokens": (with_tokens(np.zeros(5)), "datum 1: model_input: token ids must be int64, got float64"),
    "too long": (LONG, "datum 1: model_input: 17 tokens exceed the context of test/micro, which is 16"),
    "a target above": (
        with_inputs(target_tokens=np.array([0, 99, 0, 0, 0])),
        "datum 1: target_tokens: token id 99 at position 1",
    ),
    "short targets": (
        with_inputs(target_tokens=np.zeros(4, np.int64)),
        r"datum 1: target_tokens: has shape \(4,\), but there are 5 tokens",
    ),
    "no target columns": (with_inputs(target_tokens=np.zeros((5, 0), np.int64)), "datum 1: target_tokens"),
    "three dimensions": (with_inputs(target_tokens=np.zeros((5, 1, 1), np.int64)), r"takes the shape \[N\] or"),
    "float targets": (with_inputs(target_tokens=np.zeros(5, np.float32)), "target_tokens: token ids must be int64"),
    "short weights": (
        with_inputs(weights=np.ones(6, np.float32)),
        r"datum 1: weights has shape \(6,\), but target_tokens has \(5,\)",
    ),
    "nan": (
        with_inputs(weights=np.array([1, 1, np.nan, 1, 1], np.float32)),
        "datum 1: weights is not finite at position 2",
    ),
    "infinity": (with_inputs(weights=np.full(5, np.inf, np.float32)), "weights is not finite at position 0"),
    "a missing input": (
        Example(np.zeros(5, np.int64), {"target_tokens": np.zeros(5, np.int64)}),
        "datum 1: loss_fn_inputs lacks weights; cross_entropy needs target_tokens, weights",
    ),
    "an unknown input": (
        with_inputs(mask=np.ones(5, np.float32)),
        "datum 1: loss_fn_inputs has mask, unknown to cross_entropy",
    ),
}


@pytest.mark.parametrize("case", BAD_EXAMPLES)
def test_a_bad_datum_is_named_and_leaves_no_trace(case):
    example, message = BAD_EXAMPLES[case]
    trainer, good = micro_trainer(), ragged_batch("cross_entropy")
    trainer.forward_backward(good, "cross_entropy")
    before = trainer.gradient.copy()
    with pytest.raises(EngineError, match=message):
        trainer.forward_backward([good[0], example, good[1]], "cross_entropy")
    assert (trainer.gradient == before).all()


def test_an_empty_batch_is_refused():
    with pytest.raises(EngineError, match="the batch is empty"):
        micro_trainer().forward_backward([], "cross_entropy")


def test_forward_ignores_inputs_of_a_loss_computed_elsewhere():
    trainer = micro_trainer()
    extra = with_inputs(mask=np.ones(5, np.float32))
    plain = with_inputs()
    results = [trainer.forward([example], "cross_entropy") for example in (extra, plain)]
    assert results[0].metrics == results[1].metrics
    assert trainer.gradient is None


def test_policy_losses_take_one_target_a_position():
    two = np.zeros((3, 2), np.int64)
    floats = np.zeros((3, 2), np.float32)
    example = Example(np.zeros(3, np.int64), {"target_tokens": two, "logprobs": floats, "advantages": floats})
    with pytest.raises(EngineError, match=r"ppo takes the shape \[N\], got \(3, 2\)"):
        micro_trainer().forward([example], "ppo")


@pytest.mark.parametrize(
    ("loss_fn", "config", "message"),
    [
        ("grpo", None, "unknown loss_fn 'grpo'; this engine has: cross_entropy, importance_sampling"),
        ("ppo", {"clip": 1}, "ppo has no setting 'clip'; allowed: clip_low_threshold, clip_high_threshold"),
        ("cross_entropy", {"beta": 1}, "cross_entropy has no setting 'beta'; allowed: none"),
        ("dro", {"beta": float("nan")}, "beta must be a finite number, got nan"),
        ("dro", {"beta": "0.1"}, "beta must be a finite number, got '0.1'"),
        ("ppo", {"clip_low_threshold": 2}, "clip_low_threshold 2.0 is above clip_high_threshold 1.2"),
        ("gspo", {"seq_ratio_log_cap": -1}, "seq_ratio_log_cap must not be negative, got -1.0"),
        ("dapo", {"eps_clip_c": 1}, "eps_clip_c must be above 1, got 1.0"),
    ],
)
def test_a_bad_loss_or_setting_is_refused(loss_fn, config, message):
    with pytest.raises(EngineError, match=message):
        micro_trainer().forward(ragged_batch("ppo"), loss_fn, config)


def test_a_loss_that_overflows_is_refused_and_dropped():
    trainer = NumpyTrainer(MICRO)
    batch = ragged_batch("importance_sampling")
    trainer.forward_backward(batch, "importance_sampling")
    before = trainer.gradient.copy()
    far = {**batch[2].inputs, "logprobs": np.array([-3.0, -1000.0], np.float32)}
    with pytest.raises(EngineError, match="datum 2: the loss is not finite at position 1"):
        trainer.forward_backward([*batch[:2], Example(batch[2].tokens, far), batch[3]], "importance_sampling")
    assert (trainer.gradient == before).all()


def test_a_gradient_that_overflows_is_refused_and_dropped():
    trainer = NumpyTrainer(MICRO)
    example = ragged_batch("cross_entropy", (5,))[0]
    heavy = Example(example.tokens, {**example.inputs, "weights": np.full(5, 3e37, np.float32)})
    with pytest.raises(EngineError, match="gradient of this batch is not finite"):
        trainer.forward_backward([heavy] * 4, "cross_entropy")
    assert trainer.gradient is None


def test_a_diverged_model_says_so():
    trainer = NumpyTrainer(MICRO)
    step(trainer, 0, adam=Adam(learning_rate=1e38))
    with pytest.raises(EngineError, match="lower the learning rate"):
        trainer.forward(ragged_batch("cross_entropy"), "cross_entropy")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (Lora(rank=0), "lora rank must be from 1 to 64 for fwasync/qwen3-tiny, got 0"),
        (Lora(rank=65), "from 1 to 64"),
        (Lora(rank=8, alpha=0.0), "alpha must be a finite number above 0"),
        (Lora(rank=8, alpha=float("nan")), "alpha must be a finite number above 0"),
        (Lora(8, train_attn=False, train_mlp=False, train_unembed=False), "lora trains nothing"),
    ],
)
def test_an_impossible_adapter_is_refused(lora, message):
    with pytest.raises(EngineError, match=message):
        NumpyEngine().trainer("fwasync/qwen3-tiny", lora)


def test_the_rank_may_not_exceed_the_hidden_size():
    with pytest.raises(EngineError, match="from 1 to 8"):
        NumpyTrainer(MICRO, Lora(rank=9))


def test_an_unknown_base_model_is_refused_with_the_known_names():
    with pytest.raises(EngineError, match="'gpt-7'; this engine has: fwasync/qwen3-tiny, fwasync/qwen3-small"):
        NumpyEngine().trainer("gpt-7", None)


# Optimizer


def test_adam_equals_that_of_torch():
    import torch

    rng = np.random.default_rng(0)
    flat = rng.normal(size=50)
    settings = Adam(learning_rate=3e-2, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.2)
    state = AdamState.like(flat)
    theirs = torch.tensor(flat, requires_grad=True)
    optimizer = torch.optim.AdamW([theirs], lr=3e-2, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    for _ in range(20):
        gradient = rng.normal(size=50)
        state.update(flat, gradient, settings)
        theirs.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    np.testing.assert_allclose(flat, theirs.detach().numpy(), rtol=1e-12)


def test_clipping_scales_to_the_limit_and_returns_the_norm_before():
    gradient = np.array([3.0, 4.0])
    assert clip_to_norm(gradient, 0.0) == 5.0
    assert clip_to_norm(gradient, -1.0) == 5.0
    assert clip_to_norm(gradient, 6.0) == 5.0
    assert gradient.tolist() == [3.0, 4.0]
    assert clip_to_norm(gradient, 1.0) == 5.0
    np.testing.assert_allclose(gradient, [0.6, 0.8])


def test_gradients_add_up_until_the_step():
    twice, once = micro_trainer(), micro_trainer()
    batches = [ragged_batch("cross_entropy", seed=seed) for seed in range(2)]
    for batch in batches:
        twice.forward_backward(batch, "cross_entropy")
    once.forward_backward([*batches[0], *batches[1]], "cross_entropy")
    np.testing.assert_allclose(twice.gradient, once.gradient, rtol=1e-9, atol=1e-12)
    twice.optim_step(ADAM)
    assert twice.gradient is None
    with pytest.raises(EngineError, match="call forward_backward first"):
        twice.optim_step(ADAM)


@pytest.mark.parametrize(
    ("normalization", "divisor"),
    [(None, 1), ("none", 1), ("num_loss_tokens", 7), ("num_sequences", 2)],
)
def test_normalization_divides_by_what_had_a_gradient(normalization, divisor):
    trainer = micro_trainer()
    counts = {5: 3, 9: 4, 2: 0}  # tokens with a weight, by sequence length
    batch = [
        Example(e.tokens, {**e.inputs, "weights": np.float32(np.arange(len(e.tokens)) < counts[len(e.tokens)])})
        for e in ragged_batch("cross_entropy", (5, 9, 2))
    ]
    metrics = [trainer.forward_backward(part, "cross_entropy").metrics for part in (batch[:1], batch[1:])]
    assert sum(m["tokens:sum"] for m in metrics) == 7
    expected = np.linalg.norm(trainer.gradient) / divisor
    result = trainer.optim_step(Adam(grad_clip_norm=1e-3), normalization)
    assert result == {"grad_norm": pytest.approx(expected, rel=1e-9)}


def test_a_step_without_any_gradient_divides_by_nothing():
    trainer = micro_trainer()
    before = weights(trainer)
    zero = with_inputs(weights=np.zeros(5, np.float32))
    trainer.forward_backward([zero], "cross_entropy")
    assert trainer.optim_step(ADAM, "num_loss_tokens") == {"grad_norm": 0.0}
    assert (weights(trainer) == before).all()


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"eps": 0.0},
        {"weight_decay": -0.1},
        {"grad_clip_norm": float("inf")},
    ],
)
def test_a_bad_adam_parameter_is_named_and_keeps_the_gradient(change):
    trainer = micro_trainer()
    trainer.forward_backward(ragged_batch("ppo"), "ppo")
    with pytest.raises(EngineError, match=f"adam_params: {next(iter(change))} must be"):
        trainer.optim_step(dataclasses.replace(Adam(), **change))
    with pytest.raises(EngineError, match="unknown normalization 'tokens'"):
        trainer.optim_step(ADAM, "tokens")
    assert trainer.gradient is not None


# Results


def test_results_keep_the_order_of_the_batch_and_have_the_metrics():
    trainer = micro_trainer()
    batch = ragged_batch("cross_entropy", (3, 1, 8, 2))
    result = trainer.forward(batch, "cross_entropy")
    assert [len(output["logprobs"]) for output in result.outputs] == [3, 1, 8, 2]
    for example, output in zip(batch, result.outputs, strict=True):
        assert output["logprobs"].dtype == output["elementwise_loss"].dtype == np.float32
        np.testing.assert_allclose(
            output["elementwise_loss"], -example.inputs["weights"] * output["logprobs"], rtol=1e-6
        )
    total = sum(output["elementwise_loss"].sum() for output in result.outputs)
    assert result.metrics == {"loss:sum": pytest.approx(total, rel=1e-5), "tokens:sum": 14.0}
    policy = trainer.forward(ragged_batch("ppo", (3, 4)), "ppo")
    assert policy.outputs[0].keys() == {"logprobs"}
    assert policy.metrics["tokens:sum"] == 7


# Checkpoints


@KINDS
def test_a_checkpoint_continues_bit_for_bit(tmp_path, lora):
    original = NumpyTrainer(TINY, lora)
    for seed in range(5):
        step(original, seed)
    original.save(tmp_path)
    resumed = NumpyTrainer(TINY, lora, seed=99)
    step(resumed, 77)
    resumed.forward_backward(ragged_batch("ppo"), "ppo")  # a gradient that load must drop
    resumed.load(tmp_path, optimizer=True)
    assert resumed.gradient is None
    reset = NumpyTrainer(TINY, lora)
    reset.load(tmp_path, optimizer=False)
    assert (weights(reset) == weights(original)).all()
    for trainer in (original, resumed, reset):
        for seed in range(5, 10):
            step(trainer, seed)
    assert (weights(resumed) == weights(original)).all()
    assert (resumed.parameters.model == original.parameters.model).all()
    assert np.abs(weights(reset) - weights(original)).max() > 1e-3


def test_weights_alone_start_the_optimizer_anew(tmp_path):
    original = NumpyTrainer(MICRO)
    for seed in range(4):
        step(original, seed)
    original.save(tmp_path)
    fresh = NumpyTrainer(MICRO)
    fresh.parameters.flat[...] = original.parameters.flat
    loaded = NumpyTrainer(MICRO)
    step(loaded, 9)
    loaded.load(tmp_path, optimizer=False)
    for trainer in (fresh, loaded):
        step(trainer, 20)
    assert (weights(loaded) == weights(fresh)).all()


@pytest.mark.parametrize(
    ("saved", "loading", "message"),
    [
        ((TINY, None), (MICRO, None), "the checkpoint is of fwasync/qwen3-tiny, this model of test/micro"),
        ((MICRO, None), (MICRO, Lora(2)), "holds all parameters, this model trains a LoRA adapter of rank 2"),
        ((MICRO, Lora(2)), (MICRO, Lora(4)), "of rank 2, alpha 32, on attn.* of rank 4"),
        ((MICRO, Lora(2, alpha=8)), (MICRO, Lora(2)), "alpha 8, on .* alpha 32"),
        ((MICRO, Lora(2)), (MICRO, Lora(2, train_mlp=False)), r"on attn\+mlp\+unembed, .* on attn\+unembed"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, saved, loading, message):
    NumpyTrainer(*saved).save(tmp_path)
    trainer = NumpyTrainer(*loading)
    before = weights(trainer)
    with pytest.raises(EngineError, match=message):
        trainer.load(tmp_path, optimizer=True)
    assert (weights(trainer) == before).all()


def test_a_damaged_checkpoint_is_refused_and_changes_nothing(tmp_path):
    trainer = NumpyTrainer(MICRO)
    step(trainer, 0)
    with pytest.raises(EngineError, match="holds no checkpoint or snapshot"):
        trainer.load(tmp_path, optimizer=True)
    trainer.save(tmp_path)
    step(trainer, 1)
    before = weights(trainer)

    second_moment = tmp_path / "second_moment.safetensors"
    whole = second_moment.read_bytes()
    second_moment.write_bytes(whole[:100])
    with pytest.raises(EngineError, match=r"cannot read .*second_moment"):
        trainer.load(tmp_path, optimizer=True)
    second_moment.unlink()
    with pytest.raises(EngineError, match=r"cannot read .*second_moment"):
        trainer.load(tmp_path, optimizer=True)

    meta = json.loads((tmp_path / "meta.json").read_text())
    for text, message in (
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({**meta, "format": 2}), "has format 2; this engine reads 1"),
        (json.dumps({**meta, "kind": "photo"}), "unknown kind 'photo'"),
        (json.dumps({**meta, "lora": {"depth": 3}}), "is damaged"),
    ):
        (tmp_path / "meta.json").write_text(text)
        with pytest.raises(EngineError, match=message):
            trainer.load(tmp_path, optimizer=True)
    assert (weights(trainer) == before).all()


def test_weights_of_another_shape_are_refused(tmp_path):
    wide = dataclasses.replace(MICRO, ffn_size=20)
    NumpyTrainer(wide).save(tmp_path)
    with pytest.raises(EngineError, match=r"does not fit this model; it differs in .*down_proj"):
        NumpyTrainer(MICRO).load(tmp_path, optimizer=False)


def test_a_saved_directory_tells_what_it_holds(tmp_path):
    lora = Lora(rank=2, alpha=4.0, seed=5, train_mlp=False)
    trainer = NumpyTrainer(TINY, lora)
    for seed in range(3):
        step(trainer, seed)
    (checkpoint := tmp_path / "checkpoint").mkdir()
    (snapshot := tmp_path / "snapshot").mkdir()
    trainer.save(checkpoint)
    trainer.export(snapshot)
    infos = [NumpyEngine().snapshot_info(path) for path in (checkpoint, snapshot)]
    assert [(i.kind, i.base_model, i.lora, i.step) for i in infos] == [
        ("checkpoint", TINY.name, lora, 3),
        ("snapshot", TINY.name, lora, 3),
    ]
    with pytest.raises(EngineError, match="training cannot resume from it"):
        trainer.load(snapshot, optimizer=True)
    with pytest.raises(EngineError, match="export a snapshot of it"):
        NumpyEngine().sampler(TINY.name, checkpoint)


def test_the_built_in_models_are_described():
    models = NumpyEngine().models
    tiny, small = models["fwasync/qwen3-tiny"], models["fwasync/qwen3-small"]
    assert (tiny.vocab_size, tiny.max_context_length, tiny.hidden_size) == (264, 512, 64)
    assert (small.vocab_size, small.max_context_length, small.hidden_size) == (264, 1024, 128)
    assert tiny.parameters == NumpyTrainer(TINY).parameters.flat.size == 115_584


def test_a_base_model_is_the_same_everywhere():
    embedding, norm = (
        TINY.layout(tied=True).view(TINY.initial_weights(), name)
        for name in ("model.embed_tokens.weight", "model.norm.weight")
    )
    np.testing.assert_allclose(
        embedding[0, :3], [-0.03129452466964722, 0.022438524290919304, -0.03868722915649414], rtol=1e-5
    )
    assert embedding.std() == pytest.approx(0.02, rel=0.02)
    assert (norm == 1).all()
