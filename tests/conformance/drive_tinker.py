"""Drives a real tinker client, 0.15 or newer, through everything that it does in public; prints what it saw as JSON.

Run as `python drive_tinker.py <base_url> <api_key>`, with the client to be tried as the `tinker` that is imported. Each
scenario is on its own: one that breaks is reported as its traceback, and the others go on.
"""

from __future__ import annotations

import asyncio
import json
import sys
from importlib.metadata import version
from typing import Any

import numpy as np
import tinker
import torch
from driving import Complaints, attempt
from tinker import types

MODEL = "fwasync/qwen3-tiny"
TEXT = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100, 33]
ADAM = types.AdamParams(learning_rate=1e-2)
NEWEST = version("tinker") != "0.15.0"
"""Whether this is the generation that speaks protobuf and creates models from checkpoints in one request."""


def settled(thing: Any) -> Any:
    """The client itself: newer generations answer with a future of it."""
    return thing.result() if hasattr(thing, "result") else thing


def tensor(values: Any, dtype: Any) -> Any:
    return types.TensorData.from_torch(torch.as_tensor(np.asarray(values), dtype=dtype))


def datum(tokens: list[int], **inputs: Any) -> types.Datum:
    """Predict each next token; `inputs` beside the targets."""
    given = inputs or {"weights": [1.0] * (len(tokens) - 1)}
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tensor(tokens[1:], torch.int64),
            **{name: tensor(values, torch.float32) for name, values in given.items()},
        },
    )


def logprobs_of(output: Any, index: int = 0) -> list[float]:
    return output.loss_fn_outputs[index]["logprobs"].to_torch().flatten().tolist()


class Drive:
    def __init__(self, base_url: str, api_key: str) -> None:
        self.service = tinker.ServiceClient(
            base_url=base_url, api_key=api_key, user_metadata={"who": "conformance", "count": "1"}
        )
        self.api_key = api_key
        self.rest = tinker.RestClient(base_url=base_url, api_key=api_key) if NEWEST else None

    def model(self) -> Any:
        return settled(self.service.create_lora_training_client(base_model=MODEL, rank=8, seed=1))

    def score(self, model: Any, tokens: list[int]) -> list[float]:
        return logprobs_of(model.forward([datum(tokens)], "cross_entropy").result())

    # -- training ----------------------------------------------------------------------------------

    def learning(self) -> dict[str, Any]:
        model = self.model()
        futures = [(model.forward_backward([datum(TEXT)], "cross_entropy"), model.optim_step(ADAM)) for _ in range(10)]
        losses = [backward.result().metrics["loss:sum"] for backward, _ in futures]
        norms = [(step.result().metrics or {}).get("grad_norm") for _, step in futures]
        info = model.get_info()
        tokenizer = model.get_tokenizer()
        return {
            "losses": losses,
            "norms": norms,
            "lora_rank": info.lora_rank,
            "base_model": info.model_data.model_name,
            "bytes": tokenizer.encode("hé"),
            "text": tokenizer.decode(TEXT),
        }

    def policy_losses(self) -> dict[str, Any]:
        model = self.model()
        before = self.score(model, TEXT)
        advantages = [float(i % 3 - 1) for i in range(len(before))]
        batch = [datum(TEXT, logprobs=before, advantages=advantages)]
        seen: dict[str, Any] = {"expected": -sum(advantages), "expected_logprobs": before}
        for loss_fn, config in (
            ("importance_sampling", None),
            ("ppo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}),
            ("cispo", None),
            ("dro", {"beta": 0.05}),
        ):
            out = model.forward_backward(batch, loss_fn, config).result()
            seen[loss_fn] = {"loss": out.metrics["loss:sum"], "logprobs": logprobs_of(out)}
        seen["grad_norm"] = model.optim_step(ADAM).result().metrics["grad_norm"]
        return seen

    def custom_loss(self) -> dict[str, Any]:
        model = self.model()
        before = self.score(model, TEXT)
        batch = [datum(TEXT), datum(TEXT[:6])]

        def squares(_data: Any, logprobs: list[torch.Tensor]) -> Any:
            loss = sum((each**2).sum() for each in logprobs)
            return loss, {"squares:mean": float(loss)}

        out = model.forward_backward_custom(batch, squares).result()
        model.optim_step(ADAM).result()
        after = self.score(model, TEXT)
        return {
            "metrics": dict(out.metrics),
            "expected": sum(lp**2 for lp in before) + sum(lp**2 for lp in before[:5]),
            # The gradient of the surrogate is -2 lp, which is what the server was given as weights.
            "surrogate": sum(2 * lp**2 for lp in before) + sum(2 * lp**2 for lp in before[:5]),
            "improved": sum(lp**2 for lp in after) < sum(lp**2 for lp in before),
        }

    def soft_targets(self) -> dict[str, Any]:
        model = self.model()
        rows, columns = len(TEXT) - 1, 8
        targets, weights = np.zeros((rows, columns), np.int64), np.zeros((rows, columns), np.float32)
        targets[:, 3], weights[:, 3] = TEXT[1:], 0.5
        wide = types.Datum(
            model_input=types.ModelInput.from_ints(TEXT[:-1]),
            loss_fn_inputs={"target_tokens": torch.as_tensor(targets), "weights": torch.as_tensor(weights)},
        )
        out = model.forward_backward([wide, datum(TEXT)], "cross_entropy").result()
        wide_out = out.loss_fn_outputs[0]["logprobs"].to_torch().reshape(rows, columns)
        return {
            "sparse": getattr(wide.loss_fn_inputs["target_tokens"], "sparse_crow_indices", None) is not None,
            "shape": list(out.loss_fn_outputs[0]["logprobs"].shape),
            "column": wide_out[:, 3].tolist(),
            "expected": logprobs_of(out, 1),
            "loss": out.metrics["loss:sum"],
        }

    def many_datums(self) -> dict[str, Any]:
        model = self.model()
        batch = [datum([i % 256, 1, 2][: 2 + i % 2]) for i in range(1030)]
        out = model.forward(batch, "cross_entropy").result()
        model.forward_backward(batch, "cross_entropy").result()
        return {
            "lengths_fit": [len(logprobs_of(out, i)) for i in range(1030)] == [1 + i % 2 for i in range(1030)],
            # One datum of the first chunk, and its like in the second.
            "first_and_last": [logprobs_of(out, 0), logprobs_of(out, 1024)],
            "tokens": out.metrics.get("tokens:sum"),
        }

    def failures(self) -> dict[str, Any]:
        model = self.model()
        seen: dict[str, Any] = {}
        try:
            model.forward_backward([datum([1, 2, 100_000])], "cross_entropy").result()
        except tinker.RequestFailedError as error:
            seen["failed"] = [str(error.category), str(error)]
        try:
            model.forward_backward([datum(TEXT)], "ppo", {"nonsense": 1.0}).result()
        except tinker.RequestFailedError as error:
            seen["option"] = [str(error.category), str(error)]
        try:
            model.load_state("tinker://x/sampler_weights/y").result()
        except tinker.RequestFailedError as error:
            seen["load"] = [str(error.category), str(error)]
        if NEWEST:  # the older client refuses this by itself, and loses count of its operations
            try:
                model.forward_backward([datum(TEXT)], "nonsense").result()
            except tinker.BadRequestError as error:
                seen["refused"] = str(error)
        seen["goes_on"] = len(self.score(model, TEXT))
        return seen

    # -- weights -----------------------------------------------------------------------------------

    def checkpoints(self) -> dict[str, Any]:
        model = self.model()

        def step(of: Any) -> list[float]:
            of.forward_backward([datum(TEXT)], "cross_entropy").result()
            of.optim_step(ADAM).result()
            return self.score(of, TEXT)

        step(model)
        path = model.save_state("half-way").result().path
        at_save = self.score(model, TEXT)
        expected = step(model)
        model.load_state_with_optimizer(path).result()
        resumed = step(model)
        whole = settled(self.service.create_training_client_from_state_with_optimizer(path))
        at_load = self.score(whole, TEXT)
        elsewhere = step(whole)
        weights_only = settled(self.service.create_training_client_from_state(path))
        return {
            "path": path,
            "at_save": at_save,
            "at_load": at_load,
            "weights_only": self.score(weights_only, TEXT),
            "weights_only_differs_later": step(weights_only) != expected,
            "expected": expected,
            "resumed": resumed,
            "elsewhere": elsewhere,
            "rank": whole.get_info().lora_rank,
            "saved_by_new": [whole.model_id, whole.save_state("second").result().path],
        }

    # -- sampling ----------------------------------------------------------------------------------

    def sampling(self) -> dict[str, Any]:
        model = self.model()
        model.forward_backward([datum(TEXT)], "cross_entropy").result()
        model.optim_step(ADAM).result()
        sampler = settled(model.save_weights_and_get_sampling_client())
        prompt = types.ModelInput.from_ints(TEXT[:6])

        def sample(of: Any = sampler, count: int = 4, **params: Any) -> Any:
            return of.sample(prompt, count, types.SamplingParams(**{"max_tokens": 12, "seed": 7, **params})).result()

        first = sample()
        worst = max(
            abs(theirs - ours)
            for sequence in first.sequences
            for theirs, ours in zip(
                sequence.logprobs, self.score(model, TEXT[:6] + list(sequence.tokens))[5:], strict=True
            )
        )
        prompted = sampler.sample(
            prompt, 1, types.SamplingParams(max_tokens=1), include_prompt_logprobs=True, topk_prompt_logprobs=3
        ).result()
        named = settled(model.save_weights_for_sampler("snap")).path
        by_path = settled(self.service.create_sampling_client(model_path=named))
        by_model = settled(model.create_sampling_client(named))
        base = settled(self.service.create_sampling_client(base_model=MODEL))
        free = sample(count=1).sequences[0]
        stop = next(token for token in free.tokens[1:] if token != free.tokens[0])
        return {
            "count": len(first.sequences),
            "different": len({tuple(sequence.tokens) for sequence in first.sequences}),
            "reasons": sorted({str(sequence.stop_reason) for sequence in first.sequences}),
            "worst": worst,
            "repeats": [sequence.tokens for sequence in sample().sequences]
            == [sequence.tokens for sequence in first.sequences],
            "greedy": len({tuple(s.tokens) for s in sample(temperature=0.0, seed=None).sequences}),
            "stopped": [list(sample(count=1, stop=[stop]).sequences[0].tokens), list(free.tokens), stop],
            "stop_text": sample(count=1, stop=["\x00\x01"]).sequences[0].tokens == free.tokens,
            "without_stops": [s.stop_reason for s in sample(stop=[]).sequences],
            "scored": sampler.compute_logprobs(types.ModelInput.from_ints(TEXT)).result(),
            "expected": self.score(model, TEXT),
            "prompt_logprobs": prompted.prompt_logprobs,
            "topk": prompted.topk_prompt_logprobs,
            "same_weights": [
                [list(sample(each, 1).sequences[0].tokens) for each in (by_path, by_model)],
                list(free.tokens),
            ],
            "base_differs": base.compute_logprobs(types.ModelInput.from_ints(TEXT)).result()[1:]
            != self.score(model, TEXT),
            "base_model": by_path.get_base_model(),
            "named": named,
            "concurrent": self.concurrent(sampler, prompt),
            **(self.newer_sampling(sampler, first) if NEWEST else {}),
        }

    def concurrent(self, sampler: Any, prompt: types.ModelInput) -> int:
        params = [types.SamplingParams(max_tokens=4, seed=seed) for seed in range(100)]
        futures = [sampler.sample(prompt, 1, each) for each in params]
        return sum(len(future.result().sequences) for future in futures)

    def newer_sampling(self, sampler: Any, first: Any) -> dict[str, Any]:
        prompt = types.ModelInput.from_ints(TEXT)
        last = sampler.compute_logprobs(prompt, prompt_logprobs_last_n=2).result()
        clone = tinker.SamplingClient.from_sampler_handle(sampler.get_sampler_handle(), api_key=self.api_key)
        cloned = clone.compute_logprobs(prompt).result()

        async def give_up() -> str:
            long = sampler.sample(prompt, 200, types.SamplingParams(max_tokens=400, stop=[]))
            try:
                await asyncio.wait_for(long, 0.05)
            except TimeoutError:
                return "given up"
            return "too quick"

        return {
            "names": len({sequence.sequence_id for sequence in first.sequences}),
            "last_n": last,
            "cloned": cloned,
            "abandoned": asyncio.run(give_up()),
            "after_abandoning": sampler.compute_logprobs(prompt).result(),
        }

    # -- listings ----------------------------------------------------------------------------------

    def listings(self) -> dict[str, Any]:
        model = self.model()
        state = model.save_state("kept").result().path
        snapshot = settled(model.save_weights_for_sampler("shown", 7200)).path
        rest = self.rest or self.service.create_rest_client()
        run_id = model.model_id
        runs = rest.list_training_runs(limit=3).result()
        run = rest.get_training_run(run_id).result()
        rest.set_checkpoint_ttl_from_tinker_path(state, 3600).result()
        before = rest.list_checkpoints(run_id).result().checkpoints
        info = rest.get_weights_info_by_tinker_path(state).result()
        rest.delete_checkpoint_from_tinker_path(snapshot).result()
        settled(self.service.create_sampling_client(base_model=MODEL))
        session = rest.get_session(run_id.partition(":")[0]).result()
        everything = rest.list_user_checkpoints(limit=1000).result()
        models = (rest if NEWEST else self.service).get_server_capabilities()
        return {
            "runs": [len(runs.training_runs), runs.cursor.total_count >= len(runs.training_runs)],
            "newest": runs.training_runs[0].training_run_id == run_id,
            "run": [run.base_model, run.is_lora, run.lora_rank],
            "by_path": rest.get_training_run_by_tinker_path(state).result().training_run_id == run_id,
            "last": run.last_checkpoint.tinker_path == state,
            "kinds": sorted(f"{entry.checkpoint_type} {entry.checkpoint_id}" for entry in before),
            "sized": all(entry.size_bytes > 1000 for entry in before),
            "expire": all(entry.expires_at is not None for entry in before),
            "info": [info.base_model, info.lora_rank, info.train_mlp],
            "after_delete": [entry.tinker_path for entry in rest.list_checkpoints(run_id).result().checkpoints],
            "kept": state,
            "listed": state in [entry.tinker_path for entry in everything.checkpoints],
            "deleted_is_gone": snapshot not in [entry.tinker_path for entry in everything.checkpoints],
            "session_has": run_id in session.training_run_ids,
            "sessions": run_id.partition(":")[0] in rest.list_sessions(limit=100).result().sessions,
            "sampler": settled(rest.get_sampler(session.sampler_ids[-1])).base_model,
            "models": [model.model_name for model in settled(models).supported_models],
        }


SCENARIOS = (
    "learning",
    "policy_losses",
    "custom_loss",
    "soft_targets",
    "many_datums",
    "failures",
    "checkpoints",
    "sampling",
    "listings",
)


def main(base_url: str, api_key: str) -> None:
    complaints = Complaints("tinker")
    drive = Drive(base_url, api_key)
    seen: dict[str, Any] = {"version": version("tinker")}
    seen.update({name: attempt(getattr(drive, name)) for name in SCENARIOS})
    if hasattr(drive.service, "close"):
        seen["closed"] = attempt(lambda: {"result": drive.service.close("success").result()})
    print(json.dumps({**seen, "complaints": complaints.said}))


if __name__ == "__main__":
    main(*sys.argv[1:])
