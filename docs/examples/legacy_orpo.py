"""ORPO as recipes of the Fireworks cookbook are written: blocking, one thing after another."""

import logging
from dataclasses import dataclass

import tinker

from fwasync import ReconnectableClient
from fwasync.losses import make_batch_orpo_loss_fn

logger = logging.getLogger(__name__)


@dataclass
class Config:
    base_model: str
    job_id: str
    api_key: str
    lora_rank: int = 0
    orpo_lambda: float = 1.0
    learning_rate: float = 1e-5
    epochs: int = 1
    batch_size: int = 4


def make_datum(tokens):
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1]),
        },
    )


def main(cfg, rlor_mgr, rows):
    """Train on rows (prompt, chosen, rejected) of tokens; the metrics of each step."""
    client = ReconnectableClient(
        rlor_mgr=rlor_mgr,
        job_id=cfg.job_id,
        base_model=cfg.base_model,
        lora_rank=cfg.lora_rank,
        fw_api_key=cfg.api_key,
    )
    adam = tinker.AdamParams(learning_rate=cfg.learning_rate, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
    history = []
    try:
        for epoch in range(cfg.epochs):
            for start in range(0, len(rows), cfg.batch_size):
                batch = rows[start : start + cfg.batch_size]
                datums = [make_datum([*prompt, *answer]) for prompt, *answers in batch for answer in answers]
                loss_fn = make_batch_orpo_loss_fn([len(prompt) for prompt, *_ in batch], cfg.orpo_lambda)
                output = client.forward_backward_custom(datums, loss_fn)
                client.optim_step(adam)
                history.append(output.metrics)
                logger.info("epoch %d: loss %.3f", epoch, output.metrics["orpo_loss"])
        client.save_weights_for_sampler_ext("final", checkpoint_type="base")
        return history
    finally:
        client.close()
