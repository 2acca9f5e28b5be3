"""GRPO in the cookbook's style: it learns on the local service, through a deployment that takes its weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from fwasync.testing import blocking_local_service

RECIPE = Path(__file__).parents[2] / "docs" / "examples" / "legacy_grpo.py"

PROGRAM = """
import json, sys, threading
sys.path.insert(0, sys.argv[1])
from fwasync import DeployConfig, InfraConfig, WeightSyncConfig
import legacy_grpo

cfg = legacy_grpo.Config(
    base_model="accounts/fwasync/models/qwen3-tiny",
    api_key=sys.argv[3],
    base_url=sys.argv[2],
    learning_rate=1e-2,
    steps=12,
    max_completion_tokens=8,
    infra=InfraConfig(training_shape_id="accounts/fwasync/trainingShapes/qwen3-tiny"),
    deployment=DeployConfig(deployment_id="grpo-serving", tokenizer_model=sys.argv[4]),
    weight_sync=WeightSyncConfig(weight_sync_before_training=True, dcp_save_interval=6),
)
prompts = ["Write letters.", "More letters.", "Go on.", "And again."]
rewards = legacy_grpo.main(cfg, prompts, lambda text: sum(character.islower() for character in text) / 8)
assert "fwasync-sync" not in [thread.name for thread in threading.enumerate()]
print(json.dumps(rewards))
"""


def test_it_learns() -> None:
    with blocking_local_service() as local:
        command = [sys.executable, "-W", "error", "-c", PROGRAM, str(RECIPE.parent), local.base_url, local.api_key]
        done = subprocess.run(
            [*command, str(local.data_dir / "tokenizer")], capture_output=True, text=True, check=False, timeout=200
        )
        assert done.returncode == 0, done.stderr
        rewards = json.loads(done.stdout.splitlines()[-1])
        models = local.effects().values()
    assert len(rewards) == 12
    assert min(rewards[-2:]) > 3 * rewards[0]
    [kinds] = [[operation.kind for operation in operations] for operations in models]
    assert kinds.count("optim_step") == kinds.count("forward_backward") == 12
    assert kinds.count("save_weights_for_sampler") == 13
