"""Wires the control plane together: the records, and the desks that answer from them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fwasync.local.control.deployments import DeploymentDesk
from fwasync.local.control.hot_load import HotLoadDesk
from fwasync.local.control.hurdles import Hurdles
from fwasync.local.control.jobs import JobDesk
from fwasync.local.control.models import Models
from fwasync.local.control.promotion import PromotionDesk
from fwasync.local.control.records import Shelves
from fwasync.local.control.shapes import Shapes
from fwasync.local.control.snapshots import Snapshots
from fwasync.local.engine.api import Engine
from fwasync.local.weights import WeightStore

__all__ = ("ControlPlane", "Timing")


@dataclass(frozen=True, slots=True)
class Timing:
    """How long things take, in seconds: a job or deployment to start, a replica to swap weights."""

    startup_s: float = 0.2
    hot_load_s: float = 0.1


class ControlPlane:
    """Everything that the endpoints of the control plane need.

    Args:
        root: The data directory.
        engine: Trains and samples.
        store: Where trainers save.
        timing: How long things take.
        end_session: Ends a session, with a reason.
    """

    def __init__(
        self,
        root: Path,
        engine: Engine,
        store: WeightStore,
        timing: Timing,
        end_session: Callable[[str, str], None],
    ) -> None:
        shelves = Shelves.open(root)
        self.shapes = Shapes(engine.models)
        self.models = Models(shelves.models, engine.models, root / "models")
        self.hurdles = Hurdles(time.time)
        self.deployments = DeploymentDesk(shelves, self.models, self.shapes, timing.startup_s, time.time, self.hurdles)
        self.snapshots = Snapshots(store, shelves)
        self.hot_load = HotLoadDesk(self.deployments, self.models, self.snapshots, engine, timing.hot_load_s)
        self.promotion = PromotionDesk(shelves, self.snapshots, self.models, engine, root / "models", time.time)
        self.jobs = JobDesk(
            shelves, tuple(engine.models), self.shapes, timing.startup_s, time.time, end_session, self.hurdles
        )
