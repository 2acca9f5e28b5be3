"""Test your own training code against a real service that fails on command.

`local_service` runs the local service with scripted faults; `fwasync.testing.plugin` offers it to pytest as the fixture
`fwasync_service`. `virtual_time` runs a test of minutes in milliseconds. Needs `pip install "fwasync[local]"`.

Names are looked up on first use: pytest imports this package whenever it starts.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fwasync._wire.fault_reports import AppliedOperation as AppliedOperation
    from fwasync._wire.fault_reports import FaultEvent as FaultEvent
    from fwasync._wire.fault_reports import FaultReport as FaultReport
    from fwasync._wire.fault_reports import SamplingLoad as SamplingLoad
    from fwasync._wire.faults import CutStream as CutStream
    from fwasync._wire.faults import Delay as Delay
    from fwasync._wire.faults import Drop as Drop
    from fwasync._wire.faults import EvictSession as EvictSession
    from fwasync._wire.faults import FailHotLoad as FailHotLoad
    from fwasync._wire.faults import FailOperation as FailOperation
    from fwasync._wire.faults import FailProvisioning as FailProvisioning
    from fwasync._wire.faults import Fault as Fault
    from fwasync._wire.faults import FaultPlan as FaultPlan
    from fwasync._wire.faults import Kill as Kill
    from fwasync._wire.faults import LoseFuture as LoseFuture
    from fwasync._wire.faults import Nan as Nan
    from fwasync._wire.faults import NotReady as NotReady
    from fwasync._wire.faults import Preempt as Preempt
    from fwasync._wire.faults import Reject as Reject
    from fwasync._wire.faults import Reset as Reset
    from fwasync._wire.faults import SlowFuture as SlowFuture
    from fwasync._wire.faults import SlowStream as SlowStream
    from fwasync._wire.faults import StaleReplica as StaleReplica
    from fwasync._wire.faults import Status as Status
    from fwasync._wire.faults import StuckProvisioning as StuckProvisioning
    from fwasync._wire.faults import Truncate as Truncate
    from fwasync.testing.blocking import ScriptedService as ScriptedService
    from fwasync.testing.blocking import blocking_local_service as blocking_local_service
    from fwasync.testing.clock import VirtualClockLoop as VirtualClockLoop
    from fwasync.testing.clock import virtual_time as virtual_time
    from fwasync.testing.service import AsyncScriptedService as AsyncScriptedService
    from fwasync.testing.service import local_service as local_service

__all__ = (
    "AppliedOperation",
    "AsyncScriptedService",
    "CutStream",
    "Delay",
    "Drop",
    "EvictSession",
    "FailHotLoad",
    "FailOperation",
    "FailProvisioning",
    "Fault",
    "FaultEvent",
    "FaultPlan",
    "FaultReport",
    "Kill",
    "LoseFuture",
    "Nan",
    "NotReady",
    "Preempt",
    "Reject",
    "Reset",
    "SamplingLoad",
    "ScriptedService",
    "SlowFuture",
    "SlowStream",
    "StaleReplica",
    "Status",
    "StuckProvisioning",
    "Truncate",
    "VirtualClockLoop",
    "blocking_local_service",
    "local_service",
    "virtual_time",
)

_HOMES = {
    "AppliedOperation": "fwasync._wire.fault_reports",
    "AsyncScriptedService": "fwasync.testing.service",
    "FaultEvent": "fwasync._wire.fault_reports",
    "FaultReport": "fwasync._wire.fault_reports",
    "SamplingLoad": "fwasync._wire.fault_reports",
    "ScriptedService": "fwasync.testing.blocking",
    "VirtualClockLoop": "fwasync.testing.clock",
    "blocking_local_service": "fwasync.testing.blocking",
    "local_service": "fwasync.testing.service",
    "virtual_time": "fwasync.testing.clock",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fwasync.testing' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES.get(name, "fwasync._wire.faults")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
