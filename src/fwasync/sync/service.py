"""`ServiceClient`: the blocking door to a trainer service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fwasync.service import AsyncServiceClient
from fwasync.sync.sampling import SamplingClient
from fwasync.sync.training import TrainingClient
from fwasync.sync.twin import Twin
from fwasync.training.model import CHECKPOINT_TIMEOUT_S

if TYPE_CHECKING:
    from tinker.types import GetServerCapabilitiesResponse

    from fwasync._http.retry import RetryPolicy
    from fwasync._http.session import Wire
    from fwasync._http.transport import Transport
    from fwasync.sampling.concurrency import ConcurrencyController

__all__ = ("ServiceClient",)


class ServiceClient(Twin[AsyncServiceClient]):
    """The blocking twin of `AsyncServiceClient`: the same names, parameters and defaults.

    ```python
    with ServiceClient("http://127.0.0.1:8000", api_key) as service:
        with service.create_training_client("fwasync/qwen3-tiny", lora_rank=8) as client:
            ...
    ```

    All blocking clients share one thread, which runs their event loop from the first `with` to the end of the last.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        wire: Wire = "auto",
        retry: RetryPolicy | None = None,
        transport: Transport | None = None,
    ) -> None:
        super().__init__(AsyncServiceClient(base_url, api_key, wire=wire, retry=retry, transport=transport))

    @property
    def base_url(self) -> str:
        """See `AsyncServiceClient.base_url`."""
        return self._client.base_url

    def create_training_client(
        self, base_model: str, lora_rank: int = 32, *, seed: int | None = None
    ) -> TrainingClient:
        """See `AsyncServiceClient.create_training_client`."""
        return TrainingClient(self._client.create_training_client(base_model, lora_rank, seed=seed))

    def create_base_training_client(self, base_model: str) -> TrainingClient:
        """See `AsyncServiceClient.create_base_training_client`."""
        return TrainingClient(self._client.create_base_training_client(base_model))

    def create_training_client_from_state(
        self,
        path: str,
        *,
        base_model: str | None = None,
        lora_rank: int | None = None,
        timeout: float | None = CHECKPOINT_TIMEOUT_S,
    ) -> TrainingClient:
        """See `AsyncServiceClient.create_training_client_from_state`."""
        return TrainingClient(
            self._client.create_training_client_from_state(
                path, base_model=base_model, lora_rank=lora_rank, timeout=timeout
            )
        )

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        *,
        base_model: str | None = None,
        lora_rank: int | None = None,
        timeout: float | None = CHECKPOINT_TIMEOUT_S,
    ) -> TrainingClient:
        """See `AsyncServiceClient.create_training_client_from_state_with_optimizer`."""
        return TrainingClient(
            self._client.create_training_client_from_state_with_optimizer(
                path, base_model=base_model, lora_rank=lora_rank, timeout=timeout
            )
        )

    def create_sampling_client(
        self,
        *,
        model_path: str | None = None,
        base_model: str | None = None,
        concurrency: ConcurrencyController | None = None,
    ) -> SamplingClient:
        """See `AsyncServiceClient.create_sampling_client`."""
        return SamplingClient(
            self._client.create_sampling_client(model_path=model_path, base_model=base_model, concurrency=concurrency)
        )

    def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """See `AsyncServiceClient.get_server_capabilities`."""
        return self._lease.run(self._client.get_server_capabilities)
