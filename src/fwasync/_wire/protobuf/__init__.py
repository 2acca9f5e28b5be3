"""The protobuf form of the large messages (package `tinker_public`): numbers are raw little-endian buffers.

Both directions are here, for client and local service. Like their JSON twins in `tensors`, the large ones work a
datum a step.
"""

__all__ = ("CONTENT_TYPE",)

CONTENT_TYPE = "application/x-protobuf"
