"""What a recipe that trains a policy on rewards would do: everything is checked, and nothing is started."""

from __future__ import annotations

import math
import sys

import anyio.to_thread

from fwasync.data.chat import ChatTokenizer
from fwasync.data.prompts import load_prompts
from fwasync.data.rendering import resolve_renderer
from fwasync.recipes.batches import Batches
from fwasync.recipes.policy_config import PolicyConfig
from fwasync.recipes.prompts import Prompts, render_prompts
from fwasync.recipes.rewards import load_reward
from fwasync.training.custom_loss import require_torch

__all__ = ("dry_run",)


async def dry_run(config: PolicyConfig, *, tokenizer: ChatTokenizer | None, max_seq_len: int | None) -> list[str]:
    """Read and tokenize the prompts, import the reward function, and count the steps; nothing is started.

    Args:
        config: What would be done.
        tokenizer: The model's, if it can be had.
        max_seq_len: The model's context length, if it is known.

    Returns:
        What was found, in lines.

    Raises:
        UsageError: The configuration, the reward function or the data cannot be trained on.

    **Cancellation:** nothing remains.
    """
    config.check()
    if not config.is_builtin(config.loss()):
        require_torch()
    load_reward(config.reward)
    rows = await load_prompts(config.dataset, max_rows=config.max_rows)
    told, usable = [f"{config.dataset}: {len(rows)} rows", *config.notes()], [True] * len(rows)
    limit = config.max_seq_len or max_seq_len
    if tokenizer is None:
        told.append("tokens: not known without the model's tokenizer")
    else:

        def rendered(tokenizer: ChatTokenizer) -> Prompts:
            renderer = resolve_renderer(config.renderer_name or None, tokenizer)
            return render_prompts(config.dataset, rows, renderer).limited(limit or sys.maxsize)

        prompts = await anyio.to_thread.run_sync(rendered, tokenizer)
        usable = prompts.usable
        told += [
            f"tokens: {sum(len(prompt) for prompt in prompts.tokens if prompt):,}, of the prompts",
            prompts.describe_dropped()
            or (f"each leaves room for an answer in {limit} tokens" if limit else "no row is left out so far"),
        ]
    order = Batches(usable, 1, epochs=config.epochs, seed=config.seed, shuffle=config.shuffle)
    groups, size = config.prompt_groups_per_step, config.completions_per_prompt
    steps = min(math.ceil(order.steps() / groups), config.max_steps or sys.maxsize)
    interval, final = config.checkpoint_interval, int(config.save_final_checkpoint)
    return [
        *told,
        f"{steps:,} steps of {groups} groups of {size} answers, of at most {config.max_completion_tokens} tokens each; "
        "fewer if groups are dropped",
        f"{final + ((steps - final) // interval if interval else 0)} checkpoint(s)",
    ]
