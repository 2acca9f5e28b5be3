"""The blocking twins have the names, parameters and defaults of the async classes, and hand every argument on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from fwasync import APIFuture, AsyncSamplingClient, AsyncServiceClient, AsyncTrainingClient
from fwasync.sync.client import ReconnectableClient
from fwasync.sync.future import SyncFuture
from fwasync.sync.sampling import SamplingClient
from fwasync.sync.service import ServiceClient
from fwasync.sync.training import SubmittingTrainingClient, TrainingClient

TWINS = [
    pytest.param(AsyncServiceClient, ServiceClient, id="service"),
    pytest.param(AsyncTrainingClient, TrainingClient, id="training"),
    pytest.param(AsyncSamplingClient, SamplingClient, id="sampling"),
    pytest.param(APIFuture, SyncFuture, id="future"),
]
RENAMED = {"aclose": "close"}
# Beyond the async class: closers everywhere, the client of futures, and what is a plain attribute there.
ADDED = {"close", "inner", "base_model", "model_path"}
VERBS = [name for name in vars(SubmittingTrainingClient) if not name.startswith("_")]


def public(cls: type) -> dict[str, Any]:
    return {name: inspect.getattr_static(cls, name) for name in dir(cls) if not name.startswith("_")}


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any, Any]]:
    return [
        # What is unset has a mark of its own in each module.
        (p.name, p.kind, "unset" if type(p.default) is object else p.default, p.annotation)
        for p in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize(("original", "twin"), TWINS)
def test_the_public_names_are_the_same(original: type, twin: type) -> None:
    expected = {RENAMED.get(name, name) for name in public(original)}
    assert expected - set(public(twin)) == set()
    assert set(public(twin)) - expected <= ADDED


@pytest.mark.parametrize(("original", "twin"), TWINS)
def test_parameters_defaults_and_kinds_are_the_same(original: type, twin: type) -> None:
    for name, member in public(original).items():
        there = public(twin)[RENAMED.get(name, name)]
        assert isinstance(there, property) == isinstance(member, property), name
        if isinstance(member, property):
            assert inspect.signature(there.fget).return_annotation == inspect.signature(member.fget).return_annotation
            continue
        assert parameters(there) == parameters(member), name
        result = inspect.signature(member).return_annotation.removeprefix("APIFuture[").removeprefix("Async")
        result = result.removesuffix("]") if "APIFuture" in inspect.signature(member).return_annotation else result
        assert inspect.signature(there).return_annotation == result, name
        assert not inspect.iscoroutinefunction(there)


def test_the_constructor_of_the_service_client_is_the_same() -> None:
    assert parameters(ServiceClient.__init__) == parameters(AsyncServiceClient.__init__)


def test_the_client_of_futures_has_every_verb() -> None:
    returning_futures = [
        name
        for name, member in public(AsyncTrainingClient).items()
        if not isinstance(member, property) and "APIFuture" in str(inspect.signature(member).return_annotation)
    ]
    assert sorted(VERBS) == sorted(returning_futures)
    for name in VERBS:
        there, here = getattr(SubmittingTrainingClient, name), getattr(AsyncTrainingClient, name)
        assert parameters(there) == parameters(here), name
        expected = inspect.signature(here).return_annotation.replace("APIFuture", "SyncFuture")
        assert inspect.signature(there).return_annotation == expected


def test_the_cookbook_client_is_that_of_its_reference() -> None:
    def table(function: Callable[..., Any]) -> dict[str, Any]:
        return {p.name: p.default for p in list(inspect.signature(function).parameters.values())[1:]}

    required = inspect.Parameter.empty
    assert table(ReconnectableClient.__init__) == {
        "rlor_mgr": required,
        "job_id": required,
        "base_model": required,
        "lora_rank": 0,
        "fw_api_key": None,
        "default_timeout": 600,
        "endpoint": None,
    }
    assert {name: table(member) for name, member in public(ReconnectableClient).items() if callable(member)} == {
        "forward": {"data": required, "loss_fn": required},
        "forward_backward": {"data": required, "loss_fn": "cross_entropy", "loss_fn_config": None},
        "forward_backward_custom": {"data": required, "loss_fn": required},
        "optim_step": {"params": required, "grad_accumulation_normalization": None},
        "save_state": {"name": required, "timeout": 2700},
        "load_state_with_optimizer": {"path": required, "timeout": 2700},
        "save_weights_for_sampler_ext": {"name": required, "checkpoint_type": "base", "timeout": 2700},
        "resolve_checkpoint_path": {"name": required, "source_job_id": None},
        "list_checkpoints": {},
        "close": {},
    }
    properties = {name for name, member in public(ReconnectableClient).items() if isinstance(member, property)}
    assert properties == {"inner", "endpoint", "job_id"}


class Recorder:
    """Takes any call, and remembers the last one by the parameters' names in the async class."""

    def __init__(self, original: type) -> None:
        self.original = original
        self.seen: dict[str, Any] = {}
        self.called = ""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> str:
            bound = inspect.signature(getattr(self.original, name)).bind(self, *args, **kwargs)
            self.called = name
            self.seen = {key: value for key, value in bound.arguments.items() if key != "self"}
            return f"result of {name}"

        return method


class Direct:
    """A lease without a loop."""

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call = run


def sentinels(method: Callable[..., Any]) -> tuple[list[object], dict[str, object], dict[str, object]]:
    """Arguments, given by position where that is possible, and all of them by name."""
    args: list[object] = []
    kwargs: dict[str, object] = {}
    for parameter in inspect.signature(method).parameters.values():
        mark = f"<{parameter.name}>"
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            kwargs[parameter.name] = mark
        else:
            args.append(mark)
    return args, kwargs, {name: f"<{name}>" for name in inspect.signature(method).parameters}


def methods(cls: type, *leave_out: str) -> list[str]:
    return [name for name, member in public(cls).items() if callable(member) and name not in leave_out]


@pytest.mark.parametrize(
    ("cls", "original", "name"),
    [
        *((ServiceClient, AsyncServiceClient, name) for name in methods(ServiceClient, "close")),
        *((TrainingClient, AsyncTrainingClient, name) for name in methods(TrainingClient, "close")),
        *((SamplingClient, AsyncSamplingClient, name) for name in methods(SamplingClient, "close")),
        *((SubmittingTrainingClient, AsyncTrainingClient, name) for name in VERBS),
    ],
)
def test_every_argument_arrives(cls: type, original: type, name: str) -> None:
    client = cls.__new__(cls)
    client._client = recorder = Recorder(original)
    client._held = Direct()
    if cls is SubmittingTrainingClient:
        client._lease = Direct()
    method = getattr(client, name)
    args, kwargs, expected = sentinels(method)
    result = method(*args, **kwargs)
    assert (recorder.called, recorder.seen) == (name, expected)
    inner = getattr(result, "_future", getattr(result, "_client", result))
    assert inner == f"result of {name}"


@pytest.mark.parametrize("name", methods(ReconnectableClient, "close", "resolve_checkpoint_path"))
def test_every_argument_of_the_cookbook_client_arrives(name: str) -> None:
    client: Any = ReconnectableClient.__new__(ReconnectableClient)
    client._client = recorder = Recorder(AsyncTrainingClient)
    client._lease = Direct()
    client._default_timeout = 17.0
    args, kwargs, expected = sentinels(getattr(client, name))
    assert getattr(client, name)(*args, **kwargs) == f"result of {name}"
    renamed = {"adam_params" if key == "params" else key: value for key, value in expected.items()}
    if name in ("forward", "forward_backward", "forward_backward_custom", "optim_step"):
        renamed["timeout"] = 17.0
    assert (recorder.called, recorder.seen) == (name, renamed)
