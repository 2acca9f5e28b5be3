"""DPO as recipes of the Fireworks cookbook are written: blocking, one thing after another."""

import logging
from dataclasses import dataclass

import tinker

from fwasync import ReconnectableClient
from fwasync.losses import make_batch_dpo_loss_fn

logger = logging.getLogger(__name__)


@dataclass
class Config:
    base_model: str
    job_id: str
    reference_job_id: str
    api_key: str
    lora_rank: int = 0
    beta: float = 0.1
    learning_rate: float = 1e-5
    epochs: int = 1
    batch_size: int = 4


def make_datum(tokens):
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1]),
            "weights": tinker.TensorData(data=[1.0] * (len(tokens) - 1), dtype="float32", shape=[len(tokens) - 1]),
        },
    )


def make_pairs(rows):
    """Datums chosen, rejected, chosen, rejected … of rows (prompt, chosen, rejected) of tokens."""
    return [make_datum([*prompt, *answer]) for prompt, *answers in rows for answer in answers]


def connect(cfg, rlor_mgr, job_id, lora_rank):
    return ReconnectableClient(
        rlor_mgr=rlor_mgr, job_id=job_id, base_model=cfg.base_model, lora_rank=lora_rank, fw_api_key=cfg.api_key
    )


def cache_reference(cfg, rlor_mgr, rows):
    """The logprobs of the frozen reference; its trainer is not needed after that."""
    reference = connect(cfg, rlor_mgr, cfg.reference_job_id, lora_rank=0)
    try:
        outputs = [reference.forward(make_pairs([row]), "cross_entropy").loss_fn_outputs for row in rows]
    finally:
        reference.close()
    return [[side["logprobs"].data for side in pair] for pair in outputs]


def main(cfg, rlor_mgr, rows):
    """Train on rows (prompt, chosen, rejected) of tokens; the metrics of each step."""
    cached = cache_reference(cfg, rlor_mgr, rows)
    client = connect(cfg, rlor_mgr, cfg.job_id, cfg.lora_rank)
    adam = tinker.AdamParams(learning_rate=cfg.learning_rate, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)
    history = []
    try:
        for epoch in range(cfg.epochs):
            for start in range(0, len(rows), cfg.batch_size):
                batch = rows[start : start + cfg.batch_size]
                chosen, rejected = zip(*cached[start : start + cfg.batch_size], strict=True)
                loss_fn = make_batch_dpo_loss_fn(chosen, rejected, [len(prompt) for prompt, *_ in batch], cfg.beta)
                output = client.forward_backward_custom(make_pairs(batch), loss_fn)
                client.optim_step(adam)  # the loss is a mean over pairs: nothing is left to divide by
                history.append(output.metrics)
                logger.info("epoch %d: loss %.3f", epoch, output.metrics["dpo_loss"])
        client.save_state(f"step-{len(history)}")
        return history
    finally:
        client.close()
