"""The sampler: the same bits whatever else runs, the trainer's logprobs, and its settings."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from fwasync.local.engine import EngineError, Example, Lora, NumpyEngine, SampleRequest
from fwasync.local.engine.choosing import Choice, choose, uniform_stream
from fwasync.local.engine.decoder import Decoder
from fwasync.local.engine.sampler import NumpySampler
from fwasync.local.engine.trainer import NumpyTrainer
from fwasync.local.tokenizer import ASSISTANT_ID, END_ID, END_OF_TEXT_ID, USER_ID
from unit.local.engine_cases import TINY, train_to_sort


@pytest.fixture(scope="module")
def peaky():
    """A trainer whose model answers with confidence."""
    trainer = NumpyTrainer(TINY)
    assert train_to_sort(trainer, 70)[-1] < 2
    return trainer


@pytest.fixture(scope="module")
def snapshot(peaky, tmp_path_factory):
    directory = tmp_path_factory.mktemp("snapshot")
    peaky.export(directory)
    return directory


@pytest.fixture
def sampler(snapshot):
    return NumpyEngine().sampler(TINY.name, snapshot)


def weights_of(trainer):
    return trainer.parameters.model_layout.bind(trainer.parameters.model)


def question(text="315"):
    return np.array([USER_ID, *text.encode(), END_ID, ASSISTANT_ID])


def drain(sampler, *requests):
    for request in requests:
        sampler.submit(request)
    results = {}
    while sampler.busy:
        results.update((result.key, result) for result in sampler.step())
    return [results[request.key] for request in requests]


def ask(sampler, **changes):
    return drain(sampler, SampleRequest("only", question(), seed=1, **changes))[0]


# Independence of batch mates


def mixed_requests():
    """Prompts and answers of many lengths, crossing the steps of the attention width."""
    rng = np.random.default_rng(0)
    requests = []
    for index in range(36):
        length = int(rng.choice([1, 2, 5, 9, 9, 60, 63, 64, 65, 130]))
        greedy = index % 7 == 0
        requests.append(
            SampleRequest(
                key=f"request {index}",
                prompt=rng.integers(0, 256, length),
                num_samples=int(rng.integers(1, 4)),
                max_tokens=int(rng.integers(1, 80)),
                temperature=0.0 if greedy else float(rng.uniform(0.5, 1.5)),
                top_k=int(rng.choice([-1, 5, 40])),
                top_p=float(rng.choice([1.0, 0.9])),
                seed=index,
                prompt_logprobs=index % 3 == 0,
                topk_prompt_logprobs=2 * (index % 2),
            )
        )
    return requests


@pytest.fixture(scope="module")
def alone(snapshot):
    """What each of the mixed requests gives when nothing else runs."""
    return {request.key: drain(NumpyEngine().sampler(TINY.name, snapshot), request)[0] for request in mixed_requests()}


@pytest.mark.parametrize(("slots", "arrivals"), [(64, 0), (64, 1), (7, 2), (1, 3)])
def test_a_request_gives_the_same_bits_alone_and_in_any_company(peaky, alone, slots, arrivals):
    rng = np.random.default_rng(arrivals)
    sampler = NumpySampler(TINY, weights_of(peaky), slots=slots)
    queue = [mixed_requests()[index] for index in rng.permutation(36)]
    results = {}
    while queue or sampler.busy:
        for _ in range(int(rng.integers(0, 4)) if arrivals else len(queue)):
            if queue:
                sampler.submit(queue.pop())
        results.update((result.key, result) for result in sampler.step())
    assert results == alone
    sequences = [sequence for result in results.values() for sequence in result.sequences]
    assert sum(sequence.sampling_logprobs != sequence.logprobs for sequence in sequences) > len(sequences) / 2


def test_equal_prompts_share_one_reading_and_keep_their_bits(sampler, alone, monkeypatch):
    read = []
    original = Decoder.prefill
    monkeypatch.setattr(Decoder, "prefill", lambda self, prompts: read.extend(prompts) or original(self, prompts))
    first, *_ = mixed_requests()
    twin = dataclasses.replace(first, key="twin")
    many = dataclasses.replace(first, key="many", num_samples=90)
    results = drain(sampler, first, twin, many)
    assert len(read) == 1
    for result in results:
        assert result.sequences[: first.num_samples] == alone[first.key].sequences


def test_more_rows_than_slots_are_admitted_as_others_finish(peaky):
    sampler = NumpySampler(TINY, weights_of(peaky), slots=4)
    requests = [
        SampleRequest(str(index), question(f"{index:03}"), num_samples=3, max_tokens=1 + index % 5, seed=index)
        for index in range(10)
    ]
    results = drain(sampler, *requests)
    for request, result in zip(requests, results, strict=True):
        assert len(result.sequences) == 3
        assert all(1 <= len(sequence.tokens) <= request.max_tokens for sequence in result.sequences)
    assert not sampler.busy
    assert sampler.step() == []


# Logprobs


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_those_of_the_trainer(peaky, sampler, temperature):
    """Of the plain model: temperature and truncation do not enter."""
    requests = [
        SampleRequest(
            str(index), question(f"{7 * index:03}"), num_samples=4, max_tokens=100,
            temperature=temperature, top_p=0.95, seed=index, prompt_logprobs=True,
        )
        for index in range(8)
    ]  # fmt: skip
    peaks = []
    for request, result in zip(requests, drain(sampler, *requests), strict=True):
        for sequence in result.sequences:
            tokens = np.array([*request.prompt, *sequence.tokens])
            example = Example(
                tokens[:-1],
                {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1, np.float32)},
            )
            expected = peaky.forward([example], "cross_entropy").outputs[0]["logprobs"]
            assert result.prompt_logprobs[0] is None
            sampled = [*result.prompt_logprobs[1:], *sequence.logprobs]
            np.testing.assert_allclose(sampled, expected, atol=1e-4)
            peaks.append(max(sequence.logprobs))
    assert max(peaks) > math.log(0.5), "the model must be peaky for this to mean something"


def test_an_adapter_is_sampled_as_it_was_trained(tmp_path):
    trainer = NumpyTrainer(TINY, Lora(rank=4))
    train_to_sort(trainer, 10)
    trainer.export(tmp_path)
    sequence = ask(NumpyEngine().sampler(TINY.name, tmp_path), max_tokens=20).sequences[0]
    tokens = np.array([*question(), *sequence.tokens])
    inputs = {"target_tokens": tokens[1:], "weights": np.ones(len(tokens) - 1, np.float32)}
    expected = trainer.forward([Example(tokens[:-1], inputs)], "cross_entropy").outputs[0]["logprobs"]
    np.testing.assert_allclose(sequence.logprobs, expected[len(question()) - 1 :], atol=1e-4)


def test_prompt_logprobs_come_with_the_best_alternatives(sampler):
    result = ask(sampler, max_tokens=1, prompt_logprobs=True, topk_prompt_logprobs=264)
    assert result.topk_prompt_logprobs[0] is None
    pairs = zip(question()[1:], result.prompt_logprobs[1:], result.topk_prompt_logprobs[1:], strict=True)
    for token, logprob, best in pairs:
        scores = [score for _, score in best]
        assert scores == sorted(scores, reverse=True)
        assert dict(best)[int(token)] == logprob
        assert sum(map(math.exp, scores)) == pytest.approx(1, abs=1e-4)
    assert [len(row) for row in ask(sampler, topk_prompt_logprobs=3).topk_prompt_logprobs[1:]] == [3] * 5
    last = ask(sampler, max_tokens=1, prompt_logprobs=True, topk_prompt_logprobs=264, prompt_logprobs_last_n=2)
    assert last.prompt_logprobs == [None] * 4 + result.prompt_logprobs[4:]
    assert last.topk_prompt_logprobs == [None] * 4 + result.topk_prompt_logprobs[4:]
    plain = ask(sampler)
    assert plain.prompt_logprobs is None
    assert plain.topk_prompt_logprobs is None


# Randomness and settings


def test_a_seed_repeats_and_samples_differ(sampler):
    settings = {"num_samples": 6, "max_tokens": 8, "temperature": 1.5}
    first, again = ask(sampler, **settings), ask(sampler, **settings)
    assert first == again
    assert len({tuple(sequence.tokens) for sequence in first.sequences}) > 3
    fewer = ask(sampler, **(settings | {"num_samples": 2}))
    assert fewer.sequences == first.sequences[:2]
    unseeded = [drain(sampler, SampleRequest("x", question(), **settings))[0] for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_seeds_of_any_sign_and_size_are_streams_of_their_own():
    streams = [uniform_stream(seed, 0, 4).tolist() for seed in (0, 1, -1, 2**63, -(2**63) + 5)]
    streams.append(uniform_stream(0, 1, 4).tolist())
    assert len({tuple(stream) for stream in streams}) == 6
    assert uniform_stream(7, 3, 9)[:4].tolist() == uniform_stream(7, 3, 4).tolist()


def test_temperature_zero_takes_the_best_token_every_time(sampler):
    result = ask(sampler, num_samples=3, temperature=0.0, topk_prompt_logprobs=1)
    assert result.sequences[0] == result.sequences[1] == result.sequences[2]
    so_far = question()
    for token in result.sequences[0].tokens:
        best = ask_prompt(sampler, np.append(so_far, token)).topk_prompt_logprobs[-1]
        assert best[0][0] == token
        so_far = np.append(so_far, token)


def ask_prompt(sampler, prompt):
    return drain(sampler, SampleRequest("p", prompt, max_tokens=1, topk_prompt_logprobs=1))[0]


def first_token_support(sampler, **settings):
    """Tokens seen at the first position, and all tokens by falling probability."""
    result = ask(sampler, num_samples=400, max_tokens=1, **settings)
    prompt = np.append(question(), 0)
    best = drain(sampler, SampleRequest("p", prompt, max_tokens=1, topk_prompt_logprobs=264))[0]
    return {sequence.tokens[0] for sequence in result.sequences}, best.topk_prompt_logprobs[-1]


def test_top_k_and_top_p_cut_the_support(sampler):
    settings = {"temperature": 3.0}
    seen, best = first_token_support(sampler, **settings)
    assert len(seen) > 20
    seen, best = first_token_support(sampler, top_k=3, **settings)
    assert seen == {token for token, _ in best[:3]}
    weights = np.exp(np.array([score for _, score in best]) / 3.0)
    needed = int(np.searchsorted(np.cumsum(weights) / weights.sum(), 0.3)) + 1
    assert needed > 1
    seen, _ = first_token_support(sampler, top_p=0.3, **settings)
    assert seen == {token for token, _ in best[:needed]}
    seen, _ = first_token_support(sampler, top_p=1e-9, **settings)
    assert seen == {best[0][0]}


@pytest.mark.parametrize(("top_k", "top_p"), [(-1, 1.0), (4, 1.0), (-1, 0.8), (4, 0.8)])
def test_frequencies_follow_the_truncated_distribution(top_k, top_p):
    logits = np.array([0.3, -1.0, 2.0, 1.5, -0.2, 0.9], np.float32)
    count, temperature = 40_000, 0.8
    tokens = choose(
        np.tile(logits, (count, 1)),
        Choice(
            np.full(count, temperature, np.float32),
            np.full(count, top_k),
            np.full(count, top_p),
            (np.arange(count) + 0.5) / count,
        ),
    ).tokens
    expected = np.exp(logits / temperature)
    order = np.argsort(-expected)
    if top_k > 0:
        expected[order[top_k:]] = 0
    expected /= expected.sum()
    covered = np.cumsum(expected[order])
    expected[order[np.searchsorted(covered, top_p) + 1 :]] = 0
    expected /= expected.sum()
    np.testing.assert_allclose(np.bincount(tokens, minlength=6) / count, expected, atol=2e-4)


def drawn_from(logits, temperature, top_k, top_p):
    """The logprobs of what may be drawn, by the definitions, in double precision: `{token: logprob}`."""
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if temperature == 0:
        return {ranked[0]: 0.0}
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    kept = ranked[:top_k] if top_k > 0 else ranked
    shares = weights[kept] / weights[kept].sum()
    kept = [token for token, before in zip(kept, np.cumsum(shares) - shares, strict=True) if before < top_p]
    return dict(zip(kept, np.log(weights[kept] / weights[kept].sum()), strict=True))


@pytest.mark.parametrize("ties", [False, True])
def test_each_choice_has_the_logprob_of_the_distribution_that_it_was_drawn_from(ties):
    rng = np.random.default_rng(5)
    count, vocabulary = 3000, 40
    logits = rng.normal(0, 3, (count, vocabulary)).astype(np.float32)
    if ties:
        logits = np.round(logits / 2) * 2
    choice = Choice(
        rng.choice([0, 0.25, 1, 3], count).astype(np.float32),
        rng.choice([-1, 0, 1, 4, 25, 40, 1000], count),
        rng.choice([1, 0.95, 0.4, 1e-9], count),
        rng.random(count),
    )
    chosen = choose(logits, choice)
    for row in range(count):
        own = drawn_from(logits[row], 1, -1, 1)
        drawn = drawn_from(logits[row], float(choice.temperature[row]), choice.top_k[row], choice.top_p[row])
        token, logprob = chosen.tokens[row], chosen.sampling_logprobs[row]
        assert logprob == pytest.approx(drawn[token], abs=2e-6)
        assert chosen.logprobs[row] == pytest.approx(own[token], abs=5e-6)
        if len(drawn) == 1:
            assert logprob == 0.0
        if drawn == own:
            assert logprob == chosen.logprobs[row]
    assert len(set(chosen.sampling_logprobs - chosen.logprobs)) > count / 2


def test_equals_share_what_truncation_leaves():
    logits = np.zeros((4, 8), np.float32)
    choice = Choice(np.full(4, 0.7, np.float32), np.array([-1, 3, -1, 6]), np.array([1, 1, 0.5, 0.5]), np.full(4, 0.99))
    chosen = choose(logits, choice)
    assert chosen.tokens.tolist() == [7, 2, 3, 2]  # the last of those that are left
    assert chosen.sampling_logprobs.tolist() == [-math.log(8), -math.log(3), -math.log(4), -math.log(3)]


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = np.array([[0.0, 80.0, 79.0]], np.float32)
    settings = Choice(np.array([1e-38], np.float32), np.array([-1]), np.array([1.0]), np.array([0.999]))
    chosen = choose(logits, settings)
    assert (chosen.tokens.tolist(), chosen.sampling_logprobs.tolist()) == ([1], [0.0])


# Stopping


def test_the_models_own_stop_tokens_end_a_sequence(sampler):
    sequence = ask(sampler, temperature=0.0).sequences[0]
    assert sequence.stop_reason == "stop"
    assert sequence.tokens[-1] == END_ID
    assert not {END_ID, END_OF_TEXT_ID} & set(sequence.tokens[:-1])
    assert len(sequence.logprobs) == len(sequence.sampling_logprobs) == len(sequence.tokens)


def test_without_the_models_own_stops_only_the_requests_end_it(sampler):
    stopped = ask(sampler, temperature=0.0).sequences[0]
    free = ask(sampler, temperature=0.0, own_stops=False, max_tokens=40).sequences[0]
    assert (len(free.tokens), free.stop_reason) == (40, "length")
    assert free.tokens[: len(stopped.tokens)] == stopped.tokens
    first = free.tokens[0]
    cut = ask(sampler, temperature=0.0, own_stops=False, stop=((first,),)).sequences[0]
    assert (cut.tokens, cut.stop_reason) == ([first], "stop")


def test_the_requests_stop_sequences_end_it_too(sampler):
    free = ask(sampler, temperature=0.0).sequences[0]
    assert len(free.tokens) >= 4
    second, third = free.tokens[1], free.tokens[2]
    pair = ask(sampler, temperature=0.0, stop=((second, third), (third, second))).sequences[0]
    assert (pair.tokens, pair.stop_reason) == (free.tokens[:3], "stop")
    first = free.tokens[0]
    single = ask(sampler, temperature=0.0, stop=((first,),)).sequences[0]
    assert (single.tokens, single.stop_reason) == ([first], "stop")
    assert single.logprobs == free.logprobs[:1]


def test_length_ends_it_otherwise_and_is_cut_to_the_context(sampler):
    short = ask(sampler, temperature=0.0, max_tokens=2).sequences[0]
    assert (len(short.tokens), short.stop_reason) == (2, "length")
    prompt = np.zeros(510, np.int64)
    for max_tokens in (None, 100):
        request = SampleRequest("x", prompt, max_tokens=max_tokens, num_samples=8, temperature=2.0, seed=0)
        sequences = drain(sampler, request)[0].sequences
        assert max(len(sequence.tokens) for sequence in sequences) == 2


def test_the_whole_context_can_be_filled(snapshot, monkeypatch):
    never = dataclasses.replace(TINY.base_model, stop_token_ids=())
    sampler = NumpyEngine().sampler(TINY.name, snapshot)
    monkeypatch.setattr(sampler, "_model", never)
    sequence = drain(sampler, SampleRequest("x", np.zeros(1, np.int64), temperature=3.0, seed=0))[0].sequences[0]
    assert (len(sequence.tokens), sequence.stop_reason) == (511, "length")


# Cancelling and refusing


def test_cancelled_requests_vanish_and_the_others_keep_their_bits(peaky, alone):
    sampler = NumpySampler(TINY, weights_of(peaky), slots=8)
    requests = mixed_requests()
    for request in requests:
        sampler.submit(request)
    results = {}
    cancelled = set()
    for request in requests[::3]:
        results.update((result.key, result) for result in sampler.step())
        if request.key not in results:
            cancelled.add(request.key)
        sampler.cancel(request.key)
    sampler.cancel("never heard of")
    while sampler.busy:
        results.update((result.key, result) for result in sampler.step())
    assert len(cancelled) > 5
    assert results == {key: result for key, result in alone.items() if key not in cancelled}


def test_a_cancelled_sampler_is_idle_and_takes_the_key_again(sampler):
    request = SampleRequest("key", question(), num_samples=3, seed=1)
    expected = drain(sampler, request)
    sampler.submit(request)
    with pytest.raises(EngineError, match="key 'key' is already running"):
        sampler.submit(request)
    sampler.step()
    sampler.cancel("key")
    assert not sampler.busy
    assert drain(sampler, request) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": np.zeros(512, np.int64)}, "512 tokens leave no room to sample"),
        ({"prompt": np.zeros(600, np.int64)}, "prompt: 600 tokens exceed the context of fwasync/qwen3-tiny"),
        ({"prompt": np.zeros(0, np.int64)}, "prompt: needs at least one token"),
        ({"prompt": np.array([1, 264])}, "prompt: token id 264 at position 1"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, r"temperature must be from 0 to 1e.06"),
        ({"temperature": math.nan}, r"temperature must be from 0 to 1e.06"),
        ({"temperature": math.inf}, r"temperature must be from 0 to 1e.06"),
        ({"top_k": 2**63}, "top_k must be a 64-bit integer"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs must be from 0 to 264"),
        ({"prompt_logprobs_last_n": 0}, "prompt_logprobs_last_n must be from 1 to 5"),
        ({"prompt_logprobs_last_n": 6}, "prompt_logprobs_last_n must be from 1 to 5"),
        ({"stop": ((),)}, r"stop: \(\) is no sequence of token ids within 0..263"),
        ({"stop": ((5, 264),)}, r"stop: \(5, 264\) is no sequence"),
    ],
)
def test_an_impossible_request_is_refused(sampler, changes, message):
    with pytest.raises(EngineError, match=message):
        sampler.submit(dataclasses.replace(SampleRequest("x", question()), **changes))
    assert not sampler.busy


def test_a_snapshot_of_another_model_or_none_is_refused(snapshot, tmp_path):
    engine = NumpyEngine()
    with pytest.raises(EngineError, match="is of fwasync/qwen3-tiny, not of fwasync/qwen3-small"):
        engine.sampler("fwasync/qwen3-small", snapshot)
    with pytest.raises(EngineError, match="holds no checkpoint or snapshot"):
        engine.sampler(TINY.name, tmp_path)
    with pytest.raises(EngineError, match="unknown base model"):
        engine.sampler("gpt-7", None)


def test_a_diverged_model_is_refused_rather_than_sampled():
    trainer = NumpyTrainer(TINY)
    trainer.parameters.flat[:] = np.nan
    sampler = NumpySampler(TINY, weights_of(trainer))
    sampler.submit(SampleRequest("x", question()))
    with pytest.raises(EngineError, match="not finite: its training has diverged"):
        sampler.step()


def test_a_sampler_keeps_its_weights_while_the_trainer_goes_on(tmp_path):
    trainer = NumpyTrainer(TINY)
    trainer.export(tmp_path)
    sampler = NumpyEngine().sampler(TINY.name, tmp_path)
    before = ask(sampler, max_tokens=5)
    train_to_sort(trainer, 3)
    assert ask(sampler, max_tokens=5) == before
    assert ask(NumpyEngine().sampler(TINY.name, None), max_tokens=5) == before


def test_an_idle_sampler_holds_no_cache(sampler):
    ask(sampler, max_tokens=3)
    assert sampler._cache is None


# Tokens as they are chosen


def test_the_tokens_of_the_steps_gathered_are_the_results(sampler):
    requests = [*mixed_requests(), SampleRequest("scored", question(), num_samples=3, seed=5, prompt_logprobs=True)]
    for request in requests:
        sampler.submit(request)
    results, told = {}, {}
    while sampler.busy:
        results.update((result.key, result) for result in sampler.step())
        for token in sampler.newest:
            told.setdefault((token.key, token.sample), []).append(token)
    for key, result in results.items():
        for sample, sequence in enumerate(result.sequences):
            own = told.pop((key, sample))
            assert [token.token for token in own] == sequence.tokens
            assert [token.logprob for token in own] == sequence.logprobs
            assert [token.stop_reason for token in own] == [None] * (len(own) - 1) + [sequence.stop_reason]
            scored = [token.prompt_logprobs for token in own if token.prompt_logprobs is not None]
            assert scored == ([result.prompt_logprobs] if result.prompt_logprobs and sample == 0 else [])
    assert not told
    assert sampler.step() == []
    assert not sampler.newest
