"""Train with each recipe as its page says, and draw what came of it: `python docs/recipes/draw_curves.py [NAME …]`.

The settings are those of the page's TOML and the command is the page's, or all of it is the page's program. The curves
are of the run's metrics.jsonl.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from fwasync.recipes import sort_digits
from fwasync.tracking.curves import curve

HERE = Path(__file__).parent
CURVES = {
    "sft": {"train/ce_loss": "Cross-entropy (nats per token)", "train/ppl": "Perplexity"},
    "dpo": {"train/dpo_loss": "DPO loss", "train/margin": "Margin of the chosen answer (nats)"},
    "orpo": {"train/orpo_loss": "ORPO loss", "train/log_odds_ratio": "Log odds ratio"},
    "rl": {"rollout/reward": "Mean reward", "rollout/entropy": "Entropy (nats per token)"},
    "async_rl": {"rollout/reward": "Mean reward", "version/sample_staleness_max": "Staleness (versions, at most)"},
}
WIDTH, HEIGHT, TITLE = 380, 230, 26
STYLE = """
svg { --ink: #16191f; --soft: #5b6472; --rule: #d5dae1; --hue: #2563eb }
@media (prefers-color-scheme: dark) { svg { --ink: #9aa4b2; --soft: #8a94a2; --rule: #4a515c; --hue: #6ea8ff } }
text { font: 12px system-ui, sans-serif; fill: var(--soft) }
.title { font-weight: 600; fill: var(--ink) }
.grid { stroke: var(--rule); stroke-width: 1 }
.raw, .smooth { fill: none; stroke: var(--hue); stroke-linejoin: round }
.raw { stroke-width: 1; opacity: .4 }
.smooth { stroke-width: 2.4 }
.end { fill: var(--hue) }
"""


def prepare(name: str, directory: Path) -> list[str]:
    """Write data and settings of a recipe there; the command that trains, to be run there.

    The page's first block says how: settings for the command, or a program.
    """
    page = (HERE / f"{name}.md").read_text(encoding="utf-8")
    language, text = re.findall(r"^```(toml|python)\n(.*?)^```", page, re.M | re.S)[0]
    if language == "python":
        return [sys.executable, "-c", text]
    (directory / "chats.jsonl").write_text(sort_digits.data_text(), encoding="utf-8")
    (directory / "pairs.jsonl").write_text(sort_digits.make_pairs(512), encoding="utf-8")
    (directory / f"{name}.toml").write_text(text, encoding="utf-8")
    return [sys.executable, "-m", "fwasync.cli", "train", name, "--config", f"{name}.toml", "log_path=run"]


def drawing(name: str, log_path: Path) -> str:
    """The curves of a run, side by side."""
    records = [json.loads(line) for line in (log_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH + 20} {HEIGHT + TITLE}">',
        f"<style>{STYLE}</style>",
    ]
    for index, (metric, title) in enumerate(CURVES[name].items()):
        x = index * (WIDTH + 20)
        drawn = curve([(record["step"], record[metric]) for record in records], name=title)
        parts.append(f'<text class="title" x="{x + 52}" y="16">{title}</text>')
        parts.append(drawn.replace("<svg ", f'<svg x="{x}" y="{TITLE}" width="{WIDTH}" height="{HEIGHT}" ', 1))
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    for name in sys.argv[1:] or CURVES:
        with tempfile.TemporaryDirectory() as directory:
            subprocess.run(prepare(name, Path(directory)), cwd=directory, check=True)
            (HERE / f"{name}.svg").write_text(drawing(name, Path(directory) / "run"), encoding="utf-8")
