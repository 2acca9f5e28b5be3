"""For all tests: one BLAS thread, and no deadlines on a machine that others may use too."""

from __future__ import annotations

import os
import signal

for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")  # read when numpy and torch are imported

# What a shell starts in the background begins deaf to Ctrl-C, and so would all that is started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis  # noqa: E402

hypothesis.settings.register_profile("fwasync", deadline=None)
hypothesis.settings.load_profile("fwasync")
