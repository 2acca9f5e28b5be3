"""Drives a real Fireworks training SDK, 1.0.0a53 or newer, from jobs to promoted models; prints what it saw as JSON.

Run as `python drive_fireworks.py <base_url> <api_key>`, with the SDK to be tried as the `fireworks` that is imported.
Each scenario has jobs and deployments of its own: one that breaks is reported as its traceback, and the others go on.
They run at once, since what they do most is wait: much of the SDK polls every five seconds.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import httpx
from driving import Complaints, attempt
from fireworks.training.sdk import (
    AdaptiveConcurrencyController,
    DeploymentConfig,
    DeploymentManager,
    DeploymentSampler,
    FiretitanServiceClient,
    FixedConcurrencyController,
    GradAccNormalization,
    TrainerJobConfig,
    TrainerJobManager,
)
from fireworks.training.sdk.weight_syncer import WeightSyncer

NEWEST = version("fireworks-ai") != "1.0.0a53"
"""Whether this is the generation that has types of its own, ids chosen by the client, and managed provisioning."""

if NEWEST:
    from fireworks import Fireworks
    from fireworks.training.sdk import types

    from fwasync import ReconnectableClient
else:
    from tinker import types

BASE = "accounts/fwasync/models/qwen3-tiny"
SHAPE = "accounts/fwasync/trainingShapes/qwen3-tiny"
DEPLOYMENT_SHAPE = "accounts/fwasync/deploymentShapes/qwen3-tiny"
TEXT = list(b"Hello world!")
PROMPT = TEXT[:6]
ADAM = types.AdamParams(learning_rate=1e-2)
SOON = {"poll_interval_s": 0.05}


class Bytes:
    """The tokenizer of the local service's models, as far as the SDK asks for one: each byte is a token."""

    def apply_chat_template(self, messages: list[dict[str, str]], **_options: Any) -> list[int]:
        return list("".join(message["content"] for message in messages).encode())

    def decode(self, tokens: list[int], **_options: Any) -> str:
        return bytes(tokens).decode()


def datum(tokens: list[int]) -> Any:
    """Predict each next token."""
    targets = types.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1])
    weights = types.TensorData(data=[1.0] * (len(tokens) - 1), dtype="float32", shape=[len(tokens) - 1])
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": targets, "weights": weights},
    )


def score(client: Any, tokens: list[int]) -> list[float]:
    """The logprobs of all tokens but the first, as the trainer has them."""
    out = client.forward([datum(tokens)], "cross_entropy").result()
    return out.loss_fn_outputs[0]["logprobs"].to_torch().flatten().tolist()


def step(client: Any, **options: Any) -> float:
    """Learn the text a little; the loss before."""
    loss = client.forward_backward([datum(TEXT)], "cross_entropy").result().metrics["loss:sum"]
    client.optim_step(ADAM, **options).result()
    return loss


def refusal(call: Callable[[], Any]) -> list[str]:
    """The kind and the text of what it raises."""
    try:
        value = call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", repr(value)]


def far(theirs: list[float], ours: list[float]) -> float:
    """The largest difference."""
    return max(abs(one - other) for one, other in zip(theirs, ours, strict=True))


class Drive:
    def __init__(self, base_url: str, api_key: str) -> None:
        self.where = {"base_url": base_url, "api_key": api_key}
        self.jobs = TrainerJobManager(**self.where)
        self.deployments = DeploymentManager(**self.where)

    def job(self, suffix: str = "", **fields: Any) -> Any:
        """A running trainer job of the shape with that suffix."""
        config = TrainerJobConfig(base_model=BASE, training_shape_ref=SHAPE + suffix, **fields)
        return self.jobs.create_and_wait(config, **SOON)

    def service(self, endpoint: Any) -> Any:
        return FiretitanServiceClient(base_url=endpoint.base_url, api_key=self.where["api_key"])

    def deployed(self, name: str, **fields: Any) -> Any:
        """A deployment that is ready."""
        shape = self.jobs.resolve_training_profile(SHAPE).deployment_shape
        config = DeploymentConfig(
            **{"deployment_id": name, "base_model": BASE, "deployment_shape": shape, "min_replica_count": 1, **fields}
        )
        self.deployments.create_or_get(config)
        return self.deployments.wait_for_ready(name, **SOON)

    def sampler(self, name: str, controller: Any = None) -> Any:
        model = f"accounts/{self.jobs.account_id}/deployments/{name}"
        return DeploymentSampler(
            self.where["base_url"], model, self.where["api_key"], Bytes(), concurrency_controller=controller
        )

    def syncer(self, client: Any, deployment: str, **fields: Any) -> WeightSyncer:
        return WeightSyncer(client, self.deployments, deployment, base_model=BASE, **fields)

    def sample(self, name: str, **options: Any) -> list[Any]:
        messages = [{"role": "user", "content": bytes(PROMPT).decode()}]
        options = {"max_tokens": 8, "logprobs": True, **options}
        return asyncio.run(self.sampler(name).sample_with_tokens(messages, **options))

    # -- the control plane -------------------------------------------------------------------------

    def account(self) -> dict[str, Any]:
        profile = self.jobs.resolve_training_profile(SHAPE)
        wrong = TrainerJobManager(base_url=self.where["base_url"], api_key="fw-wrong")
        seen = {
            "id": self.jobs.account_id,
            "shape": profile.training_shape_version,
            "deployment_shape": profile.deployment_shape,
            "context": profile.max_supported_context_length,
            "wrong_key": refusal(lambda: wrong.account_id),
            "no_shape": refusal(lambda: self.jobs.resolve_training_profile(SHAPE + "-none")),
        }
        if NEWEST:
            again = self.jobs.resolve_training_profile(profile.training_shape_version)
            seen["again"] = again.training_shape_version
            seen["modes"] = [self.jobs.resolve_training_profile(SHAPE + s).trainer_mode for s in ("-lora", "-forward")]
            seen["moe"] = self.jobs.model_is_moe(BASE)
        return seen

    def our_client_of_their_manager(self) -> dict[str, Any]:
        """A recipe whose imports of the cookbook's client alone are changed."""
        endpoint = self.job(requested_job_id="shared")
        with ReconnectableClient(self.jobs, "shared", BASE, fw_api_key=self.where["api_key"]) as client:
            losses = []
            for _ in range(2):
                losses.append(client.forward_backward([datum(TEXT)]).metrics["loss:sum"])
                client.optim_step(ADAM)
            return {"same": client.endpoint == endpoint, "losses": losses}

    def cancel(self, job_id: str) -> None:
        if NEWEST:
            steps = Fireworks(**self.where, account_id=self.jobs.account_id).reinforcement_fine_tuning_steps
            steps.cancel(job_id, body={})
        else:  # which has no word for it
            path = f"/v1/accounts/{self.jobs.account_id}/rlorTrainerJobs/{job_id}:cancel"
            httpx.post(
                self.where["base_url"] + path, json={}, headers={"X-Api-Key": self.where["api_key"]}
            ).raise_for_status()

    def job_lives(self) -> dict[str, Any]:
        jobs = self.jobs
        seen: dict[str, Any] = {}
        config = TrainerJobConfig(base_model=BASE, training_shape_ref=SHAPE, display_name="lives")
        if NEWEST:
            config.requested_job_id = "lives"
        job = jobs.create(config)
        if NEWEST:
            seen["again"] = jobs.create(config) == job
            seen["unknown"] = jobs.try_get("unknown")
        endpoint = jobs.wait_for_ready(job.job_id, job.job_name, **SOON)
        seen["same_url"] = jobs.wait_for_existing(job.job_id, **SOON).base_url == endpoint.base_url
        seen["named"] = [job.job_name.endswith(f"/rlorTrainerJobs/{job.job_id}"), jobs.get(job.job_id)["displayName"]]
        client = self.service(endpoint).create_training_client(BASE, lora_rank=0)
        step(client)
        client.save_state("half-way").result()
        expected = score(client, TEXT)

        self.cancel(job.job_id)
        seen["cancelled"] = jobs.get(job.job_id)["state"]
        resumed = self.service(jobs.resume_and_wait(job.job_id, **SOON)).create_training_client(BASE, lora_rank=0)
        seen["fresh"] = score(resumed, TEXT) != expected
        seen["listed"] = resumed.list_checkpoints()
        resumed.load_state_with_optimizer(resumed.resolve_checkpoint_path("half-way")).result()
        seen["resumed"] = score(resumed, TEXT) == expected
        self.cancel(job.job_id)
        seen["reconnected"] = jobs.reconnect_and_wait(job.job_id, **SOON).base_url == endpoint.base_url

        failing = jobs.create(TrainerJobConfig(base_model="accounts/acme/models/unknown"))
        seen["failed"] = refusal(lambda: jobs.wait_for_existing(failing.job_id, **SOON))
        jobs.delete(job.job_id)
        seen["deleted"] = jobs.get(job.job_id)["state"]
        if NEWEST:
            seen["not_again"] = refusal(lambda: jobs.create(config))
            seen["gone"] = refusal(lambda: jobs.wait_for_existing(job.job_id, **SOON))
            steps = Fireworks(**self.where, account_id=jobs.account_id).reinforcement_fine_tuning_steps
            names = [entry.name for entry in steps.list()]
            seen["hidden"] = [job.job_name in names, failing.job_name in names]
        return seen

    def deployment_lives(self) -> dict[str, Any]:
        deployments, name = self.deployments, "lives"
        first, second = self.job(), self.job()
        made = self.deployed(name, hot_load_trainer_job=first.job_name)
        seen: dict[str, Any] = {
            "state": deployments.get(name).state,
            "again": self.deployed(name).name == made.name,
            "bucket": bool(made.hot_load_bucket_url),
            "model": made.inference_model,
            "none": deployments.get("unknown"),
            "warm": deployments.warmup(made.inference_model, max_retries=1),
            "no_model": refusal(lambda: self.deployed("bad", base_model="accounts/acme/models/unknown"))[0],
        }
        if NEWEST:
            clients = [self.service(endpoint).create_training_client(BASE, lora_rank=0) for endpoint in (first, second)]
            seen["of_first"] = self.syncer(clients[0], name).save_and_hotload("one").partition("-")[0]
            moved = deployments.reattach_trainer(
                name, base_model=BASE, trainer_job_name=second.job_name, timeout_s=60, **SOON
            )
            seen["moved"] = moved.hot_load_trainer_job == second.job_name
            syncer = self.syncer(clients[1], name)
            seen["clean"] = syncer.check_deployment_state()
            seen["of_second"] = syncer.save_and_hotload("two").partition("-")[0]
            seen["updated"] = deployments.update(
                name, {"hotLoadTransitionType": "SYNC"}, "hot_load_transition_type"
            ).hot_load_transition_type
        deployments.scale_to_zero(name)
        seen["replicas"] = deployments.hotload_check_status(name, BASE)["replicas"]
        deployments.delete(name)
        seen["deleted"] = deployments.get(name)
        self.deployed(name)
        recreated = DeploymentConfig(deployment_id=name, base_model=BASE, deployment_shape=DEPLOYMENT_SHAPE)
        seen["recreated"] = deployments.create_or_get(recreated, force_recreate=True).state
        return seen

    # -- training, syncing, sampling, promoting ----------------------------------------------------

    def full_parameters(self) -> dict[str, Any]:
        endpoint = self.job()
        client = self.service(endpoint).create_training_client(BASE, lora_rank=0)
        normalization = GradAccNormalization.NUM_LOSS_TOKENS
        seen: dict[str, Any] = {"losses": [step(client, grad_accumulation_normalization=normalization)]}
        self.deployed("full", hot_load_trainer_job=endpoint.job_name, max_replica_count=2)
        syncer = self.syncer(client, "full")
        base = syncer.save_and_hotload("step-1")
        seen["base"] = [base.startswith("step-1-"), syncer.base_identity == base, self.against(client, "full")]
        seen["losses"].append(step(client))
        delta = syncer.save_and_hotload("step-2")
        seen["delta"] = [*self.served("full", delta), self.against(client, "full")]
        return {**seen, "sampling": self.sampling(client), "promotion": self.promotion(endpoint, base, delta)}

    def served(self, name: str, identity: str) -> list[Any]:
        [replica] = self.deployments.hotload_check_status(name, BASE)["replicas"]
        return [replica["current_snapshot_identity"] == identity, replica["readiness"]]

    def against(self, client: Any, name: str) -> float:
        """How far the logprobs of a sample are from the trainer's."""
        [completion] = self.sample(name)
        ours = score(client, completion.full_tokens)[completion.prompt_len - 1 :]
        return far(completion.inference_logprobs, ours)

    def sampling(self, client: Any) -> dict[str, Any]:
        many = self.sample("full", n=5)
        [echoed] = self.sample("full", echo=True)
        [first, second] = (self.sample("full", seed=3)[0].full_tokens for _ in range(2))
        greedy = [each.full_tokens for each in self.sample("full", n=3, temperature=0.0)]
        stop = greedy[0][-1]
        [stopped] = self.sample("full", temperature=0.0, stop=[bytes([stop]).decode()])
        sampler = self.sampler("full", AdaptiveConcurrencyController(initial_window=4))

        async def throttled() -> Any:
            messages = [{"role": "user", "content": "Hello "}]
            await sampler.sample_with_tokens(messages, n=6, max_tokens=4)
            return sampler.concurrency_controller.step_completed() if NEWEST else None

        summary = asyncio.run(throttled())
        metrics = sampler.drain_metrics() if NEWEST else []
        return {
            "count": [len(many), len({tuple(each.full_tokens) for each in many})],
            "lengths": [[len(each.full_tokens), each.completion_len, len(each.inference_logprobs)] for each in many],
            "reasons": sorted({each.finish_reason for each in many}),
            "prompted": all(each.full_tokens[: each.prompt_len] == PROMPT for each in many),
            "echo": [echoed.logprobs_echoed, far(echoed.inference_logprobs, score(client, echoed.full_tokens))],
            "repeats": first == second,
            "greedy": [greedy, stop, stopped.full_tokens, stopped.finish_reason],
            "too_long": [len(self.sample("full", temperature=0.0, max_seq_len=len(PROMPT) + more)) for more in (0, 2)],
            "window": summary and [summary["window"], summary["avg_pq"]],
            "metrics": [len(metrics), sorted({each.prompt_tokens for each in metrics})],
            "queued": [each.prefill_queue_duration for each in metrics],
        }

    def promotion(self, endpoint: Any, base: str, delta: str) -> dict[str, Any]:
        jobs, job_id, job_name = self.jobs, endpoint.job_id, endpoint.job_name
        [before] = self.sample("full", temperature=0.0)

        def promote(snapshot: str, model: str) -> Any:
            if NEWEST:
                name = f"{job_name}/checkpoints/{snapshot}"
                return jobs.promote_checkpoint(name=name, output_model_id=model, base_model=BASE)
            return jobs.promote_checkpoint(job_id, snapshot, model)

        seen: dict[str, Any] = {"delta": refusal(lambda: promote(delta, "of-a-delta"))}
        if NEWEST:
            rows = jobs.list_checkpoints(job_id, page_size=1)
            seen["rows"] = [[row["name"].rpartition("/")[2], row["checkpointType"], row["promotable"]] for row in rows]
        jobs.delete(job_id)
        model = promote(base, "promoted")
        seen["model"] = [model["name"], model["state"], model["kind"]]
        seen["taken"] = refusal(lambda: promote(base, "promoted"))
        seen["names"] = [base, delta]
        self.deployed("promoted", base_model=model["name"])
        [after] = self.sample("promoted", temperature=0.0)
        # The promoted snapshot is older by one step than what was served before.
        seen["differs"] = after.inference_logprobs != before.inference_logprobs
        return seen

    def lora(self) -> dict[str, Any]:
        endpoint = self.job("-lora", lora_rank=8)
        service = self.service(endpoint)
        client = service.create_training_client(BASE, lora_rank=8)
        self.deployed("lora", hot_load_trainer_job=endpoint.job_name)
        syncer = self.syncer(client, "lora", **({"lora_rank": 8} if NEWEST else {}))
        kind = {} if NEWEST else {"checkpoint_type": "base"}
        seen: dict[str, Any] = {"losses": [], "far": []}
        for number in range(2):
            seen["losses"].append(step(client))
            served = self.served("lora", syncer.save_and_hotload(f"step-{number}", **kind))
            seen["far"].append([*served, self.against(client, "lora")])
        seen["wider"] = refusal(lambda: service.create_training_client(BASE, lora_rank=16))
        seen["full"] = refusal(lambda: service.create_training_client(BASE, lora_rank=0))
        if NEWEST:
            reference = service.create_base_training_client(BASE)
            untrained = self.service(self.job()).create_training_client(BASE, lora_rank=0)
            seen["reference"] = far(score(reference, TEXT), score(untrained, TEXT))
            seen["frozen"] = refusal(lambda: step(reference))
            seen["types"] = [row["checkpointType"] for row in self.jobs.list_checkpoints(endpoint.job_id)]
        return seen

    def full_is_not_lora(self) -> dict[str, Any]:
        service = self.service(self.job())
        return {"refused": refusal(lambda: service.create_training_client(BASE, lora_rank=8))}

    def forward_only(self) -> dict[str, Any]:
        endpoint = self.job("-forward", forward_only=True)
        # One for each: the newest takes nothing more after a refusal.
        one, other = (self.service(endpoint).create_training_client(BASE, lora_rank=0) for _ in range(2))
        return {
            "scores": score(one, TEXT) == score(other, TEXT),
            "backward": refusal(lambda: one.forward_backward([datum(TEXT)], "cross_entropy").result()),
            "optim_step": refusal(lambda: other.optim_step(ADAM).result()),
        }

    def deployment_first(self) -> dict[str, Any]:
        self.deployed("first")
        endpoint = self.job(hot_load_deployment_id="first")
        client = self.service(endpoint).create_training_client(BASE, lora_rank=0)
        step(client)
        syncer = self.syncer(client, "first")
        name = syncer.save_only("apart")
        loaded = syncer.hotload(name, "base")
        return {"loaded": loaded, "far": self.against(client, "first"), "timed": sorted(syncer.last_timing)}

    def checkpoints(self) -> dict[str, Any]:
        source, target = self.job(), self.job()
        client, other = (self.service(e).create_training_client(BASE, lora_rank=0) for e in (source, target))
        step(client)
        path = client.save_state("kept").result().path
        expected = score(client, TEXT)
        after = [step(client) for _ in range(2)]
        client.load_state_with_optimizer(path).result()
        at_load = score(client, TEXT)
        other.load_state_with_optimizer(other.resolve_checkpoint_path("kept", source.job_id)).result()
        return {
            "path": path,
            "at_load": at_load == expected,
            "elsewhere": score(other, TEXT) == expected,
            "goes_on": [[step(each) for _ in range(2)] == after for each in (client, other)],
            "listed": [client.list_checkpoints(), other.list_checkpoints()],
            "unknown": refusal(other.load_state_with_optimizer("kept").result),
        }

    # -- what the newest alone has -----------------------------------------------------------------

    def managed(self, rank: int = 0) -> dict[str, Any]:
        service = FiretitanServiceClient.from_firetitan_config(
            **self.where,
            base_model=BASE,
            deployment_id=f"managed-{rank}",
            training_shape_id=SHAPE + ("-lora" if rank else ""),
            lora_rank=rank,
            reference_required=True,
            cleanup_trainer_on_close=True,
            cleanup_deployment_on_close="delete",
        )
        client = service.create_training_client()
        reference = service.create_reference_client()
        seen: dict[str, Any] = {
            "ids": [service.deployment_id, service.deployment_shape, service.max_context_length],
            "apart": [service.reference_job_id is not None, score(reference, TEXT) == score(client, TEXT)],
            "frozen": refusal(lambda: step(reference)),
            "far": [],
        }
        for number in range(2):
            step(client)
            snapshot = client.save_weights_for_sampler(f"step-{number}").result().path
            seen["far"].append(self.tinker_shaped(client, client.create_sampling_client(snapshot)))
        step(client)
        seen["synced"] = client.weight_sync().result().version.rpartition("/")[2].startswith("weight-sync-")
        seen["far"].append(self.tinker_shaped(client, service.create_sampling_client()))
        seen["drawn"] = self.drawn(client, service.create_sampling_client())
        state, expected = client.save_state("state").result().path, score(client, TEXT)
        resumed = service.create_training_client_from_state_with_optimizer(state)
        seen["resumed"] = score(resumed, TEXT) == expected
        job_id, reference_id = service.trainer_job_id, service.reference_job_id
        seen["rows"] = sorted({row["checkpointType"] for row in service.list_checkpoints(job_id)})
        service.close()
        seen["after"] = [self.jobs.get(job)["state"] for job in (job_id, reference_id) if job]
        seen["deployment"] = self.deployments.get(f"managed-{rank}")
        return seen

    def managed_lora(self) -> dict[str, Any]:
        return self.managed(rank=4)

    def tinker_shaped(self, client: Any, sampler: Any) -> list[float]:
        """How far the logprobs of a sampling client are from the trainer's: sampled, of a prompt, and scored."""
        prompt = types.ModelInput.from_ints(PROMPT)
        with sampler:
            params = types.SamplingParams(max_tokens=6, temperature=1.0)
            response = sampler.sample(prompt, 2, params, include_prompt_logprobs=True).result()
            scored = sampler.compute_logprobs(types.ModelInput.from_ints(TEXT)).result()
        sampled = [
            far(each.logprobs, score(client, PROMPT + list(each.tokens))[len(PROMPT) - 1 :])
            for each in response.sequences
        ]
        return [
            *sampled,
            far(response.prompt_logprobs[1:], score(client, PROMPT)),
            far(scored[1:], score(client, TEXT)),
        ]

    def drawn(self, client: Any, sampler: Any) -> dict[str, Any]:
        """Logprobs of samples from other distributions than the model's own.

        Of the first tokens after one prompt, the differences are those of the model's own logprobs by the temperature.
        """
        prompt = types.ModelInput.from_ints(PROMPT)

        def ask(count: int, max_tokens: int, **params: Any) -> list[Any]:
            response = sampler.sample(prompt, count, types.SamplingParams(max_tokens=max_tokens, **params)).result()
            return response.sequences

        def first_tokens(temperature: float, **params: Any) -> dict[str, Any]:
            sequences = ask(12, 1, temperature=temperature, **params)
            told = [each.logprobs[0] for each in sequences]
            own = [score(client, PROMPT + list(each.tokens))[-1] for each in sequences]
            return {
                "kinds": len({tuple(each.tokens) for each in sequences}),
                "far": far([one - told[0] for one in told], [(one - own[0]) / temperature for one in own]),
                "own": far(told, own),
            }

        with sampler:
            return {
                "greedy": [list(each.logprobs) for each in ask(1, 4, temperature=0.0)],
                "only": [list(each.logprobs) for each in ask(2, 4, temperature=1.0, top_k=1)],
                "warm": first_tokens(1.5),
                "few": first_tokens(0.8, top_k=4),
                "nucleus": first_tokens(1.0, top_p=0.5),
            }

    def shared_trainer(self) -> dict[str, Any]:
        """Several adapters in one managed trainer."""
        service = FiretitanServiceClient.from_firetitan_config(
            **self.where,
            base_model=BASE,
            training_shape_id=SHAPE + "-lora",
            max_lora_rank=16,
            create_deployment=False,
            cleanup_trainer_on_close=True,
        )
        clients = [service.create_lora_training_client(BASE, rank=rank) for rank in (4, 8)]
        losses = [[step(client) for _ in range(2)] for client in clients]
        state = self.jobs.get(service.trainer_job_id)["trainingConfig"]["loraRank"]
        service.close()
        return {"losses": losses, "job_rank": state}

    def token_prompts(self) -> dict[str, Any]:
        self.deployed("tokens")
        sampler = self.sampler("tokens", FixedConcurrencyController(2))

        async def both() -> Any:
            result = await sampler.sample_with_prompt_tokens_result(PROMPT, max_tokens=3, logprobs=True)
            plain = await sampler.sample_with_prompt_tokens(PROMPT, n=4, max_tokens=3)
            return result, plain

        result, plain = asyncio.run(both())
        return {
            "attempts": result.attempts,
            "unasked": [each.inference_logprobs for each in plain],
            "prompt_tokens": result.server_metrics.prompt_tokens,
        }


SCENARIOS = (
    "account",
    "job_lives",
    "deployment_lives",
    "full_parameters",
    "lora",
    "full_is_not_lora",
    "forward_only",
    "deployment_first",
    "checkpoints",
    *(("managed", "managed_lora", "shared_trainer", "token_prompts", "our_client_of_their_manager") if NEWEST else ()),
)


def main(base_url: str, api_key: str) -> None:
    complaints = Complaints("fireworks")
    with ThreadPoolExecutor(len(SCENARIOS)) as threads:
        running = {name: threads.submit(attempt, getattr(Drive(base_url, api_key), name)) for name in SCENARIOS}
        seen = {name: future.result() for name, future in running.items()}
    print(json.dumps({"version": version("fireworks-ai"), **seen, "complaints": complaints.said}))


if __name__ == "__main__":
    main(*sys.argv[1:])
