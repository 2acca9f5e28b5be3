"""What came of a run is told from the names of its metrics."""

from __future__ import annotations

import math

from fwasync.tracking.run import Record
from fwasync.tracking.summary import courses, ends, run_report


def test_ends_are_means_of_a_few() -> None:
    assert ends([3.0]) == (3.0, 3.0)
    assert ends([3.0, 2.0, 1.0]) == (3.0, 1.0)
    assert ends([float(value) for value in range(40)]) == (2.0, 37.0)
    assert ends([math.nan, 2.0, math.inf, 1.0]) == (2.0, 1.0)
    assert math.isnan(ends([math.nan])[0])


def test_each_phase_tells_what_matters_of_it() -> None:
    records = [Record("sft", i, i, {"train/ce_loss": 3 / i, "perf/tokens_per_s": 10.0}) for i in range(1, 4)]
    records += [Record("rl", i, 3 + i, {"rollout/reward": i / 2, "rollout/in_flight": 3, "mine": i}) for i in (1, 2)]
    found = [(course.phase, course.headline.key, str(course), course.steps) for course in courses(records)]
    assert found == [("sft", "train/ce_loss", "3 → 1", 3), ("rl", "rollout/reward", "0.500 → 1", 2)]


def test_the_report_has_cards_curves_and_settings_without_secrets() -> None:
    records = [Record("dpo", i, i * 61.0, {"train/dpo_loss": 1 / i, "train/margin": i}) for i in (1, 2)]
    config = {"beta": 0.1, "api_key": "sk-1", "infra": {"region": None, "extra_args": ["a"]}, "empty": {}}
    page = run_report(title="dpo", config=config, records=records)
    for text in ("2:02", "DPO loss", "1 → 0.500", "infra.extra_args", "[&quot;a&quot;]", "beta", "0.1", "***"):
        assert text in page
    assert "sk-1" not in page
    assert "infra.region" not in page
    assert run_report(title="nothing", config={}, records=[])
