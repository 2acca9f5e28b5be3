"""Lets a real tinker client report an error; prints what it complained about as JSON.

Run as `python drive_telemetry.py <base_url> <api_key>` with telemetry on.
"""

from __future__ import annotations

import json
import sys

import tinker
from drive_tinker import MODEL, settled
from driving import Complaints


def main(base_url: str, api_key: str) -> None:
    complaints = Complaints("tinker")
    service = tinker.ServiceClient(base_url=base_url, api_key=api_key)
    settled(service.create_sampling_client(base_model=MODEL))
    telemetry = service.get_telemetry()
    # It sends this at once, and waits until it is sent.
    logged = telemetry is not None and telemetry.log_fatal_exception_sync(RuntimeError("nothing happened"))
    print(json.dumps({"logged": logged, "complaints": complaints.said}))


if __name__ == "__main__":
    main(*sys.argv[1:])
