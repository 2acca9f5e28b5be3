"""For all tests: one BLAS thread, and nothing that depends on chance or on how busy the machine is.

Hypothesis draws the same examples in every run, so that a change fails for what it did. To look for new ones:
`pytest --hypothesis-profile=explore`, or with a seed `--hypothesis-seed=1` beside it.
"""

from __future__ import annotations

import os
import signal

for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"  # read when numpy and torch are imported

# Whatever proxy leads to the network, what runs on this machine is not asked through it.
for _variable in ("NO_PROXY", "no_proxy"):
    _others = [os.environ[_variable]] if os.environ.get(_variable) else []
    os.environ[_variable] = ",".join([*_others, "127.0.0.1", "localhost", ".test"])

# What a shell starts in the background begins deaf to Ctrl-C, and so would all that is started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis  # noqa: E402

# No deadlines and no complaints of slowness: others may use the machine too.
_PATIENT = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("explore", _PATIENT)
hypothesis.settings.register_profile("fwasync", _PATIENT, derandomize=True)
hypothesis.settings.load_profile("fwasync")
