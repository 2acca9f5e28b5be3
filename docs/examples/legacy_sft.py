"""Supervised fine-tuning as recipes of the Fireworks cookbook are written: blocking, one thing after another."""

import logging
from dataclasses import dataclass

import tinker

from fwasync import ReconnectableClient

logger = logging.getLogger(__name__)


@dataclass
class Config:
    base_model: str
    job_id: str
    api_key: str
    lora_rank: int = 0
    learning_rate: float = 1e-4
    epochs: int = 3
    batch_size: int = 32
    dcp_save_interval: int = 0


def make_batch(rows):
    """Datums of pairs (prompt, answer) of tokens. The answers' weights sum to 1, because trainers sum."""
    trained = sum(len(answer) for _, answer in rows)
    datums = []
    for prompt, answer in rows:
        tokens = [*prompt, *answer]
        weights = [0.0] * (len(prompt) - 1) + [1.0 / trained] * len(answer)
        datums.append(
            tinker.Datum(
                model_input=tinker.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={
                    "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64", shape=[len(weights)]),
                    "weights": tinker.TensorData(data=weights, dtype="float32", shape=[len(weights)]),
                },
            )
        )
    return datums


def main(cfg, rlor_mgr, rows):
    """Train on rows (prompt, answer) of tokens; the loss of each step, in nats per trained token."""
    client = ReconnectableClient(
        rlor_mgr=rlor_mgr,
        job_id=cfg.job_id,
        base_model=cfg.base_model,
        lora_rank=cfg.lora_rank,
        fw_api_key=cfg.api_key,
    )
    adam = tinker.AdamParams(learning_rate=cfg.learning_rate, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
    losses = []
    try:
        for epoch in range(cfg.epochs):
            for start in range(0, len(rows), cfg.batch_size):
                output = client.forward_backward(make_batch(rows[start : start + cfg.batch_size]), "cross_entropy")
                client.optim_step(adam)
                losses.append(output.metrics["loss:sum"])
                step = len(losses)
                logger.info("epoch %d, step %d: loss %.3f", epoch, step, losses[-1])
                if cfg.dcp_save_interval and step % cfg.dcp_save_interval == 0:
                    client.save_state(f"step-{step}")
        client.save_weights_for_sampler_ext("final", checkpoint_type="base")
        return losses
    finally:
        client.close()
