"""`python -m fwasync.local`: the local trainer service as a process of its own.

Numerics are single-threaded: on small models more threads are slower, and results repeat bit for bit.
The numerical libraries read that from the environment when they are imported, so it is set before.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn

__all__ = ("main",)

_THREAD_COUNTS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Parse the command line and serve until told to stop."""
    for variable in _THREAD_COUNTS:
        os.environ[variable] = "1"
    from fwasync.local.control.plane import Timing
    from fwasync.local.engine import NumpyEngine
    from fwasync.local.engine.losses import LOSSES
    from fwasync.local.serve import ProcessOptions, run_process
    from fwasync.local.service import ServiceOptions

    defaults = ServiceOptions()
    parser = argparse.ArgumentParser(prog="python -m fwasync.local", description="The local trainer service.")
    parser.add_argument("--data-dir", type=Path, help="where everything is kept (default: a temporary directory)")
    parser.add_argument("--host", default="127.0.0.1", help="a loopback address (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="0, the default, is any free port")
    parser.add_argument("--exit-with-parent", action="store_true", help="end when standard input is closed")
    parser.add_argument("--faults", action="store_true", help="serve the admin API that scripts faults")
    parser.add_argument("--long-poll-s", type=float, default=defaults.long_poll_s, metavar="S")
    parser.add_argument("--session-timeout-s", type=float, default=defaults.session_timeout_s, metavar="S")
    timing = defaults.timing
    parser.add_argument("--startup-s", type=float, default=timing.startup_s, metavar="S", help="of jobs, deployments")
    parser.add_argument("--hot-load-s", type=float, default=timing.hot_load_s, metavar="S", help="of each replica")
    given = parser.parse_args(arguments)
    run_process(
        ProcessOptions(
            data_dir=given.data_dir,
            host=given.host,
            port=given.port,
            exit_with_parent=given.exit_with_parent,
            faults=given.faults,
            service=ServiceOptions(
                given.long_poll_s, given.session_timeout_s, Timing(given.startup_s, given.hot_load_s)
            ),
        ),
        NumpyEngine,
        LOSSES,
    )


if __name__ == "__main__":
    main()
