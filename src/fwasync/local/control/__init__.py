"""The control plane of the local service: trainer jobs with their gateway, shapes, models, deployments, sampling.

Invariants
    * What a resource is doing is computed from what was recorded and the time: nothing runs in the background, and a
      service that is killed and started again goes on where it was.
    * Everything recorded is one JSON file a resource, written beside and renamed.
"""
