"""GRPO as recipes of the Fireworks cookbook are written: blocking, one thing after another."""

import logging
from dataclasses import dataclass, field

import tinker
import torch
from transformers import AutoTokenizer

from fwasync import (
    DeployConfig,
    DeploymentConfig,
    DeploymentManager,
    DeploymentSampler,
    InfraConfig,
    ReconnectableClient,
    TrainerJobConfig,
    TrainerJobManager,
    WeightSyncConfig,
    WeightSyncer,
)

logger = logging.getLogger(__name__)


@dataclass
class Config:
    base_model: str
    api_key: str
    base_url: str = "https://api.fireworks.ai"
    lora_rank: int = 0
    learning_rate: float = 1e-5
    steps: int = 10
    completions_per_prompt: int = 8
    max_completion_tokens: int = 64
    seed: int = 0
    grad_accumulation_normalization: str | None = "num_loss_tokens"
    infra: InfraConfig = field(default_factory=InfraConfig)
    deployment: DeployConfig = field(default_factory=DeployConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)


def make_grpo_loss(advantages, prompt_lens, inference_logprobs):
    """A policy gradient with importance weights: -sum of exp(log p - log q) * A over completion tokens."""

    def loss_fn(data, logprobs_list):
        loss = torch.zeros(())
        for logprobs, advantage, prompt_len, sampled in zip(
            logprobs_list, advantages, prompt_lens, inference_logprobs, strict=True
        ):
            policy = logprobs[prompt_len - 1 :]
            loss = loss - (torch.exp(policy - torch.tensor(sampled)) * advantage).sum()
        return loss, {"datums": float(len(data))}

    return loss_fn


def group_advantages(rewards):
    values = torch.tensor(rewards)
    spread = values.std()
    return ((values - values.mean()) / (spread if spread > 1e-8 else 1.0)).tolist()


def train_step(cfg, step, prompts, reward_fn, client, sampler):
    datums, advantages, prompt_lens, inference_logprobs, rewards = [], [], [], [], []
    for index, prompt in enumerate(prompts):
        completions = sampler.sample_with_tokens(
            messages=[{"role": "user", "content": prompt}],
            n=cfg.completions_per_prompt,
            max_tokens=cfg.max_completion_tokens,
            temperature=1.0,
            logprobs=True,
            seed=cfg.seed + 1000 * (step * len(prompts) + index),
            http_timeout=cfg.deployment.sample_timeout,
        )
        group = [reward_fn(completion.text) for completion in completions]
        rewards += group
        for completion, advantage in zip(completions, group_advantages(group), strict=True):
            tokens = completion.full_tokens
            datums.append(
                tinker.Datum(
                    model_input=tinker.ModelInput.from_ints(tokens[:-1]),
                    loss_fn_inputs={
                        "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1])
                    },
                )
            )
            advantages.append(advantage)
            prompt_lens.append(completion.prompt_len)
            inference_logprobs.append(completion.inference_logprobs)
    output = client.forward_backward_custom(datums, make_grpo_loss(advantages, prompt_lens, inference_logprobs))
    client.optim_step(
        tinker.AdamParams(learning_rate=cfg.learning_rate, beta1=0.9, beta2=0.95, eps=1e-8),
        grad_accumulation_normalization=cfg.grad_accumulation_normalization,
    )
    return sum(rewards) / len(rewards), output.metrics


def main(cfg, prompts, reward_fn):
    """Train, and return the mean reward of each step."""
    rlor_mgr = TrainerJobManager(api_key=cfg.api_key, base_url=cfg.base_url)
    deploy_mgr = DeploymentManager(api_key=cfg.api_key, base_url=cfg.base_url)

    deployment = deploy_mgr.create_or_get(
        DeploymentConfig(
            deployment_id=cfg.deployment.deployment_id,
            base_model=cfg.base_model,
            deployment_shape=cfg.deployment.deployment_shape,
            region=cfg.deployment.deployment_region,
            min_replica_count=1,
            hot_load_bucket_type=cfg.deployment.hot_load_bucket_type,
            disable_speculative_decoding=cfg.deployment.disable_speculative_decoding,
        )
    )
    endpoint = rlor_mgr.create_and_wait(
        TrainerJobConfig(
            base_model=cfg.base_model,
            lora_rank=cfg.lora_rank,
            training_shape_ref=cfg.infra.training_shape_id,
            hot_load_deployment_id=deployment.deployment_id,
            region=cfg.infra.region,
            extra_args=cfg.infra.extra_args,
            display_name="grpo-policy",
        ),
        timeout_s=cfg.infra.trainer_timeout_s,
    )
    client = None
    try:
        deployment = deploy_mgr.wait_for_ready(deployment.deployment_id, timeout_s=cfg.deployment.deployment_timeout_s)
        client = ReconnectableClient(
            rlor_mgr=rlor_mgr,
            job_id=endpoint.job_id,
            base_model=cfg.base_model,
            lora_rank=cfg.lora_rank,
            fw_api_key=cfg.api_key,
            endpoint=endpoint,
        )
        sampler = DeploymentSampler(
            inference_url=deploy_mgr.inference_url,
            model=deployment.inference_model,
            api_key=cfg.api_key,
            tokenizer=AutoTokenizer.from_pretrained(cfg.deployment.tokenizer_model),
        )
        syncer = WeightSyncer(
            policy_client=client.inner,
            deploy_mgr=deploy_mgr,
            deployment_id=deployment.deployment_id,
            base_model=cfg.base_model,
            hotload_timeout=cfg.weight_sync.weight_sync_timeout,
            first_checkpoint_type=cfg.weight_sync.first_checkpoint_type,
            dcp_timeout=cfg.weight_sync.dcp_timeout,
            lora_rank=cfg.lora_rank,
        )
        if cfg.weight_sync.weight_sync_before_training:
            syncer.save_and_hotload("step-0-base", checkpoint_type="base")

        rewards = []
        for step in range(1, cfg.steps + 1):
            reward, metrics = train_step(cfg, step, prompts, reward_fn, client, sampler)
            if cfg.weight_sync.weight_sync_interval and step % cfg.weight_sync.weight_sync_interval == 0:
                syncer.save_and_hotload(f"step-{step}")
            if cfg.weight_sync.dcp_save_interval and step % cfg.weight_sync.dcp_save_interval == 0:
                client.save_state(f"step-{step}", timeout=cfg.weight_sync.dcp_timeout)
            rewards.append(reward)
            logger.info("step %d: reward %.3f, loss %.3f", step, reward, metrics["loss:sum"])
        sampler.close()
        return rewards
    finally:
        if client is not None:
            client.close()
        rlor_mgr.delete(endpoint.job_id)
        deploy_mgr.scale_to_zero(deployment.deployment_id)
        rlor_mgr.close()
        deploy_mgr.close()
