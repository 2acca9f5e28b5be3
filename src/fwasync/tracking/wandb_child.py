"""The process that talks to W&B on behalf of a run; see `fwasync.tracking.wandb`.

It is started as a file, so that it imports nothing but the standard library and wandb. It reads a line of JSON for each
thing to do: first `{"init": …}`, then `{"log": [metrics, …]}` any number of times, then `{"finish": exit_code}`; and
answers with lines of JSON: `{"ready": …}`, `{"problem": text}`, `{"done": true}`.

When its input ends without a finish, the run has died: what came is still uploaded, for a bounded time.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

__all__ = ("main",)

_ORPHANED_S = 60.0
_AXIS = "train/step"
_PREFIXES = ("train", "perf", "rollout", "batch", "infra")

Tell = Callable[..., None]


def main() -> None:
    """Do it, for as long as there is input."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what wandb prints is not for the run

    def tell(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    first: dict[str, Any] = json.loads(sys.stdin.readline())["init"]
    run = _begin(first, tell)
    if run is not None:
        exit_code = _log_on(run, sys.stdin, tell)
        try:
            run.finish(exit_code=exit_code)
        except Exception as error:
            tell(problem=f"W&B did not finish the run: {_reason(error)}")
    tell(done=True)


def _begin(given: dict[str, Any], tell: Tell) -> Any:
    """The run at W&B; offline if W&B cannot be had; `None` without W&B."""
    try:
        wandb: Any = importlib.import_module("wandb")
    except ImportError:
        tell(problem="wandb is not installed, so nothing is logged to W&B: pip install 'fwasync[wandb]'")
        return None
    timeout, arguments = given["timeout"], given["arguments"]

    def init(**mode: str) -> Any:
        limit = {} if mode else {"init_timeout": timeout}  # of the network alone
        settings = wandb.Settings(
            console="off", silent=True, x_stats_pid=given["pid"], program=given["program"], **limit
        )
        return wandb.init(**arguments, resume="allow", allow_val_change=True, settings=settings, **mode)

    try:
        try:
            run = init()
        except Exception as error:
            tell(problem=f"W&B is not reached, and logged to offline: {_reason(error)}")
            wandb.teardown()  # else it holds the id of the run that did not begin
            run = init(mode="offline")
        run.define_metric(_AXIS)
        for prefix in _PREFIXES:
            run.define_metric(f"{prefix}/*", step_metric=_AXIS)
    except Exception as error:
        tell(problem=f"nothing is logged to W&B: {_reason(error)}")
        return None
    disabled = bool(getattr(run, "disabled", False))
    tell(ready={"url": run.url, "offline": bool(run.offline), "off": disabled, "dir": str(Path(run.dir).parent)})
    return run


def _log_on(run: Any, lines: Iterable[str], tell: Tell) -> int:
    """Log what comes; the exit code of the run."""
    failed = False
    for line in lines:
        message: dict[str, Any] = json.loads(line)
        if "finish" in message:
            return int(message["finish"])
        try:
            for metrics in message["log"]:
                run.log(metrics)
        except Exception as error:
            if not failed:
                tell(problem=f"W&B does not take everything: {_reason(error)}")
            failed = True
    late = threading.Timer(_ORPHANED_S, os._exit, (1,))
    late.daemon = True
    late.start()
    return 1


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


if __name__ == "__main__":
    main()
