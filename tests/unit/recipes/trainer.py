"""A trainer that remembers what it was asked for, and in which order: no service, no numbers to wait for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio.lowlevel
import numpy as np

from fwasync.local.tokenizer import save_tokenizer
from fwasync.types import ForwardBackwardOutput, OptimStepResponse, TensorData


class Future:
    """Resolved when it is awaited, which is written down too."""

    def __init__(self, name: str, log: list[str], value: Any) -> None:
        self._name, self._log, self._value = name, log, value

    def __await__(self):
        self._log.append(f"await {self._name}")
        yield from anyio.lowlevel.checkpoint().__await__()
        return self._value


class Trainer:
    """What the recipes ask of a training client. The logprob of every token is -1."""

    base_model = "fake"
    model_id = "model"

    def __init__(self, directory: Path) -> None:
        save_tokenizer(directory)
        self.directory = directory
        self.log: list[str] = []
        self.batches: list[tuple[str, list[Any]]] = []
        self.adams: list[Any] = []
        self.forwards: list[list[Any]] = []
        self.normalizations: list[str | None] = []
        self.save_timeouts: list[float] = []
        self.metrics = {"loss:sum": 3.5}

    def forward(self, data: Any, loss_fn: str, *, timeout: float) -> Future:
        self.forwards.append(list(data))
        return self._submit(f"forward {len(self.forwards)}", self._output(data))

    def forward_backward(self, data: Any, loss_fn: str, loss_fn_config: Any = None, *, timeout: float = 0) -> Future:
        self.batches.append((loss_fn, list(data)))
        return self._submit(f"forward_backward {len(self.batches)}", self._output(data))

    def forward_backward_custom(self, data: Any, loss_fn: Any, *, timeout: float = 0) -> Future:
        self.batches.append((loss_fn.name, list(data)))
        return self._submit(f"forward_backward {len(self.batches)}", self._output(data))

    def _output(self, data: Any) -> ForwardBackwardOutput:
        logprobs = [
            {"logprobs": TensorData.from_numpy(np.full(datum.model_input.length, -1, np.float32))} for datum in data
        ]
        return ForwardBackwardOutput(loss_fn_output_type="", loss_fn_outputs=logprobs, metrics=self.metrics)

    def optim_step(self, adam: Any, normalization: str | None = None, *, timeout: float = 0) -> Future:
        self.normalizations.append(normalization)
        self.adams.append(adam)
        return self._submit(f"optim_step {len(self.adams)}", OptimStepResponse(metrics={"grad_norm": 2.5}))

    def save_state(self, name: str, *, timeout: float = 0) -> Future:
        self.save_timeouts.append(timeout)
        return self._submit(f"save_state {name}", SimpleNamespace(path=f"state:{name}"))

    def save_weights_for_sampler(self, name: str, *, timeout: float = 0) -> Future:
        self.save_timeouts.append(timeout)
        return self._submit(f"snapshot {name}", SimpleNamespace(path=f"snapshot:{name}"))

    def save_weights_for_sampler_ext(self, name: str, checkpoint_type: str, *, timeout: float = 0) -> Future:
        full = f"{name}-0a1b2c3d"
        return self._submit(f"{checkpoint_type} {name}", SimpleNamespace(path=f"snapshot:{full}", snapshot_name=full))

    async def get_info(self) -> Any:
        return SimpleNamespace(model_data=SimpleNamespace(tokenizer_id=str(self.directory)))

    def _submit(self, name: str, value: Any) -> Future:
        self.log.append(name)
        return Future(name, self.log, value)


class Service:
    """What the recipes ask of a service client."""

    def __init__(self, *, context: int | None = 64, make_sampler: Callable[[str], Any] | None = None) -> None:
        self.context = context
        self.make_sampler = make_sampler

    async def get_server_capabilities(self) -> Any:
        model = SimpleNamespace(model_name="fake", max_context_length=self.context)
        return SimpleNamespace(supported_models=[model])

    def create_sampling_client(self, *, model_path: str) -> Any:
        assert self.make_sampler is not None
        return self.make_sampler(model_path)
