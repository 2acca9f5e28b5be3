"""`AsyncServiceClient`: the door to a trainer service."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Self

from fwasync._http.credentials import find_key, find_url
from fwasync._http.reading import read
from fwasync._http.retry import RetryPolicy
from fwasync._http.session import Session, Wire
from fwasync._http.transport import Transport
from fwasync._wire.messages import Capabilities
from fwasync.errors import UsageError
from fwasync.sampling.client import AsyncSamplingClient
from fwasync.sampling.concurrency import ConcurrencyController
from fwasync.training.client import AsyncTrainingClient
from fwasync.training.model import CHECKPOINT_TIMEOUT_S, ModelSpec

if TYPE_CHECKING:
    from tinker.types import GetServerCapabilitiesResponse

__all__ = ("AsyncServiceClient",)


class AsyncServiceClient:
    """A session on a trainer service that speaks the Tinker training API.

    ```python
    async with AsyncServiceClient("http://127.0.0.1:8000", api_key) as service:
        async with service.create_training_client("fwasync/qwen3-tiny", lora_rank=8) as client:
            ...
    ```

    Everything runs on the caller's event loop, in tasks that end when the block is left.

    Args:
        base_url: The service. Unset: the environment's `FWASYNC_BASE_URL`, else `TINKER_BASE_URL`.
        api_key: Its key. Unset: the environment's `FWASYNC_API_KEY`, else `FIREWORKS_API_KEY` for hosts of fireworks.ai
            and `TINKER_API_KEY` for those of thinkingmachines.dev. It is never shown.
        wire: `"json"` or `"protobuf"` for batches and their results. `"auto"` begins with JSON, goes over to protobuf
            with a service that takes nothing else, and takes results in either.
        retry: How long requests that get no answer, or none that is final, are repeated: five minutes unless set.
        transport: Another httpx transport, to reach the service in a way of your own.

    Raises:
        UsageError: URL or key are missing or malformed.
        ServiceUnreachableError: On entering: nothing answers there.
        ProtocolError: On entering: what answers is not a trainer service.
        AuthenticationError: On entering: the key is not accepted.
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
        url = find_url(base_url, os.environ, "TINKER_BASE_URL")
        if not url:
            raise UsageError(
                "no base_url: pass the trainer service's URL, or set FWASYNC_BASE_URL. "
                "`fwasync serve` starts one on this machine and prints its URL."
            )
        self._session = Session(url, find_key(url, api_key, os.environ), wire=wire, retry=retry, transport=transport)

    def __repr__(self) -> str:
        return f"<AsyncServiceClient {self.base_url}>"

    @property
    def base_url(self) -> str:
        """The service's URL."""
        return self._session.http.base_url

    def create_training_client(
        self, base_model: str, lora_rank: int = 32, *, seed: int | None = None
    ) -> AsyncTrainingClient:
        """A client that trains a new model; entering it with `async with` creates the model on the service.

        Args:
            base_model: One of the service's models (see `get_server_capabilities`).
            lora_rank: Rank of the LoRA adapter, or 0 to train all parameters.
            seed: Seed of the adapter's initial weights.

        Raises:
            UsageError: The rank is negative.
            OperationFailedError, BadRequestError: On entering: the service does not have the base model, or not at
                that rank.
        """
        return AsyncTrainingClient(self._session, ModelSpec(base_model, lora_rank, seed=seed))

    def create_base_training_client(self, base_model: str) -> AsyncTrainingClient:
        """A frozen reference on the same service: it answers `forward` only (Fireworks and the local service).

        Args:
            base_model: One of the service's models.
        """
        return AsyncTrainingClient(self._session, ModelSpec(base_model, 0, base_only=True))

    def create_training_client_from_state(
        self,
        path: str,
        *,
        base_model: str | None = None,
        lora_rank: int | None = None,
        timeout: float | None = CHECKPOINT_TIMEOUT_S,
    ) -> AsyncTrainingClient:
        """A client of a new model that begins with a checkpoint's weights; its optimizer starts anew.

        Args:
            path: The checkpoint, from `save_state`.
            base_model: Its base model. Unset: the service is asked what the checkpoint is of.
            lora_rank: Its rank, if `base_model` is given; unset is 0, all parameters.
            timeout: Seconds that loading it may take.
        """
        return AsyncTrainingClient(self._session, ModelSpec(base_model, lora_rank, state=path, load_timeout=timeout))

    def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        *,
        base_model: str | None = None,
        lora_rank: int | None = None,
        timeout: float | None = CHECKPOINT_TIMEOUT_S,
    ) -> AsyncTrainingClient:
        """As `create_training_client_from_state`, but the optimizer goes on from the checkpoint too."""
        spec = ModelSpec(base_model, lora_rank, state=path, with_optimizer=True, load_timeout=timeout)
        return AsyncTrainingClient(self._session, spec)

    def create_sampling_client(
        self,
        *,
        model_path: str | None = None,
        base_model: str | None = None,
        concurrency: ConcurrencyController | None = None,
    ) -> AsyncSamplingClient:
        """A client that samples from a snapshot or from a base model; entered with `async with`.

        Args:
            model_path: A snapshot's path, from `save_weights_for_sampler`.
            base_model: Or one of the service's models.
            concurrency: How many samples run at a time; one controller may serve several clients, and the samplers of
                deployments too. Unset: as many as are asked for.

        Raises:
            UsageError: Both or neither are given.
            NotFoundError, BadRequestError: On entering: the service does not have it.
        """
        return AsyncSamplingClient(self._session, model_path=model_path, base_model=base_model, concurrency=concurrency)

    async def get_server_capabilities(self) -> GetServerCapabilitiesResponse:
        """The models that the service can train and sample.

        **Cancellation:** nothing remains.
        """
        from tinker.types import GetServerCapabilitiesResponse, SupportedModel

        body = await self._session.http.call("GET", "get_server_capabilities")
        capabilities = read("get_server_capabilities", body, Capabilities)
        return GetServerCapabilitiesResponse(
            supported_models=[
                SupportedModel(
                    model_name=model.model_name,
                    max_context_length=model.max_context_length,
                    trainable=model.trainable,
                    sampleable=model.sampleable,
                )
                for model in capabilities.supported_models
            ]
        )

    async def __aenter__(self) -> Self:
        await self._session.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._session.__aexit__(exc_type, exc, tb)
