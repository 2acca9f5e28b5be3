"""The blocking twins have the names, parameters and defaults of the async classes, and hand every argument on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from fwasync import (
    APIFuture,
    AsyncDeploymentManager,
    AsyncDeploymentSampler,
    AsyncFireworksClient,
    AsyncHotLoadManager,
    AsyncSamplingClient,
    AsyncServiceClient,
    AsyncTrainerJobManager,
    AsyncTrainingClient,
    AsyncWeightSyncer,
    DeploymentManager,
    DeploymentSampler,
    FireworksClient,
    ReconnectableClient,
    SamplingClient,
    ServiceClient,
    SyncFuture,
    TrainerJobManager,
    TrainingClient,
    WeightSyncer,
    errors,
)
from fwasync.control.trainer_jobs import WaitOptions
from fwasync.sampling.deployment import SamplingOptions
from fwasync.sampling.stream import CompletionStream
from fwasync.sync import control, deployment, service, weights
from fwasync.sync.deployment import SyncCompletionStream
from fwasync.sync.training import SubmittingTrainingClient


@dataclass(frozen=True)
class Pair:
    """A twin, and what it is the twin of: the async classes, by the attribute that holds one.

    `added` is what only the twin has: closers everywhere, and what is a plain attribute of the async class.
    `left_out` is what makes no sense in a thread.
    """

    twin: type
    originals: dict[str, type]
    added: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)


PAIRS = [
    Pair(ServiceClient, {"_client": AsyncServiceClient}, {"close"}),
    Pair(TrainingClient, {"_client": AsyncTrainingClient}, {"inner"}),
    Pair(SamplingClient, {"_client": AsyncSamplingClient}, {"close", "base_model", "model_path"}),
    Pair(SyncFuture, {"_future": APIFuture}),
    Pair(FireworksClient, {"_client": AsyncFireworksClient}, {"close"}, {"copy"}),
    Pair(TrainerJobManager, {"_jobs": AsyncTrainerJobManager, "_client": AsyncFireworksClient}, {"close"}, {"copy"}),
    Pair(DeploymentManager, {"_deployments": AsyncDeploymentManager, "_hot_loads": AsyncHotLoadManager}, {"close"}),
    Pair(DeploymentSampler, {"_client": AsyncDeploymentSampler}, {"close", "model"}),
    Pair(SyncCompletionStream, {"_stream": CompletionStream}, left_out={"metrics"}),  # which are for the sampler
    Pair(WeightSyncer, {"_syncer": AsyncWeightSyncer}, {"last_timing"}),
]
OPTIONS = {"Unpack[SamplingOptions]": SamplingOptions, "Unpack[WaitOptions]": WaitOptions}
RENAMED = {"aclose": "close"}
VERBS = [name for name in vars(SubmittingTrainingClient) if not name.startswith("_")]
pairs = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.twin.__name__)


def public(cls: type) -> dict[str, Any]:
    return {name: inspect.getattr_static(cls, name) for name in dir(cls) if not name.startswith("_")}


def originals(pair: Pair) -> dict[str, Any]:
    """The members of the async classes, by the name of the twin's."""
    return {
        RENAMED.get(name, name): member
        for original in pair.originals.values()
        for name, member in public(original).items()
        if name not in pair.left_out
    }


def parameters(function: Callable[..., Any], *, annotated: bool = True) -> list[tuple[Any, ...]]:
    return [
        # What is unset has a mark of its own in each module.
        (p.name, p.kind, "unset" if type(p.default) is object else p.default, p.annotation if annotated else "")
        for p in inspect.signature(function).parameters.values()
    ]


def blocking(annotation: str) -> str:
    """What a twin returns where the async class has that annotation."""
    if annotation == "AsyncGenerator[CompletionStream]":  # decorated to be a context manager
        return "Generator[SyncCompletionStream]"
    if annotation.startswith("APIFuture["):
        return annotation.removeprefix("APIFuture[").removesuffix("]")
    return annotation.replace("AsyncGenerator[", "Iterator[").removeprefix("Async")


@pairs
def test_the_public_names_are_the_same(pair: Pair) -> None:
    assert set(public(pair.twin)) == set(originals(pair)) | pair.added


@pairs
def test_parameters_defaults_and_results_are_the_same(pair: Pair) -> None:
    for name, member in originals(pair).items():
        there = public(pair.twin)[name]
        assert isinstance(there, property) == isinstance(member, property), name
        if isinstance(member, property):
            there, member = there.fget, member.fget
        assert parameters(there) == parameters(member), name
        expected = blocking(inspect.signature(member).return_annotation)
        assert inspect.signature(there).return_annotation == expected, name
        assert not inspect.iscoroutinefunction(there)
        assert not inspect.isasyncgenfunction(there)


def test_the_client_of_futures_has_every_verb() -> None:
    returning_futures = [
        name
        for name, member in public(AsyncTrainingClient).items()
        if not isinstance(member, property) and "APIFuture" in str(inspect.signature(member).return_annotation)
    ]
    questions = ["list_checkpoints", "resolve_checkpoint_path"]  # as the client of the Fireworks SDK has them
    assert sorted(VERBS) == sorted(returning_futures + questions)
    for name in VERBS:
        there, here = getattr(SubmittingTrainingClient, name), getattr(AsyncTrainingClient, name)
        assert parameters(there) == parameters(here), name
        expected = inspect.signature(here).return_annotation.replace("APIFuture", "SyncFuture")
        assert inspect.signature(there).return_annotation == expected


# -- arguments -----------------------------------------------------------------------------------


class Recorder:
    """Takes any call, and remembers the last one by the parameters' names in the async class."""

    def __init__(self, original: type) -> None:
        self.original = original
        self.seen: dict[str, Any] = {}
        self.called = ""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        definition = getattr(self.original, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(definition).bind(self, *args, **kwargs)
            self.called = name
            self.seen = {key: value for key, value in bound.arguments.items() if key != "self"}
            return rows(f"result of {name}") if inspect.isasyncgenfunction(definition) else f"result of {name}"

        method.__qualname__ = name
        return method


async def rows(only: str) -> Any:
    yield only


class Direct:
    """A lease without a loop."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if not inspect.iscoroutine(result):
            return result
        with pytest.raises(StopIteration) as stop:  # it waits for nothing
            result.send(None)
        return stop.value.value

    call = run

    def close(self, left_by: BaseException | None = None) -> None:
        assert left_by is None


def sentinels(method: Callable[..., Any]) -> tuple[list[object], dict[str, object], dict[str, object]]:
    """Arguments, given by position where that is possible, and all of them by name."""
    args: list[object] = []
    kwargs: dict[str, object] = {}
    expected: dict[str, object] = {}
    for parameter in inspect.signature(method).parameters.values():
        mark: object = f"<{parameter.name}>"
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            mark = {name: f"<{name}>" for name in OPTIONS[parameter.annotation].__annotations__}
            kwargs.update(mark)
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            kwargs[parameter.name] = mark
        else:
            args.append(mark)
        expected[parameter.name] = mark
    return args, kwargs, expected


def outcome(result: Any) -> Any:
    """What the async class gave."""
    if hasattr(result, "__enter__") and hasattr(result, "gen"):
        with result as stream:
            return stream._stream
    if inspect.isgenerator(result):
        [only] = result
        return only
    return getattr(result, "_future", getattr(result, "_client", result))


def methods(cls: type, *leave_out: str) -> list[str]:
    return [name for name, member in public(cls).items() if callable(member) and name not in leave_out]


FORWARDING = [
    *(
        (pair.twin, pair.originals, name)
        for pair in PAIRS
        if pair.twin is not SyncFuture  # whose `result` is more than the other's
        for name in methods(pair.twin, "close")
    ),
    *((SubmittingTrainingClient, {"_client": AsyncTrainingClient}, name) for name in VERBS),
]


@pytest.mark.parametrize(
    ("cls", "homes", "name"), FORWARDING, ids=[f"{cls.__name__}-{name}" for cls, _, name in FORWARDING]
)
def test_every_argument_arrives(cls: type, homes: dict[str, type], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployment, "Lease", Direct)
    client: Any = cls.__new__(cls)
    vars(client).update({attribute: Recorder(original) for attribute, original in homes.items()})
    vars(client)["_held" if isinstance(getattr(cls, "_lease", None), property) else "_lease"] = Direct()
    args, kwargs, expected = sentinels(getattr(client, name))
    assert outcome(getattr(client, name)(*args, **kwargs)) == f"result of {name}"
    [(called, seen)] = [(each.called, each.seen) for each in vars(client).values() if getattr(each, "called", "")]
    assert (called, seen) == (name, expected)


class Made:
    """Stands for an async class, and remembers how it was made."""

    made: Any = None
    base_url = "http://made"
    plane = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        type(self).made = (args, kwargs)

    async def __aenter__(self) -> Made:
        return self

    async def __aexit__(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    ("module", "twin", "original", "added"),
    [
        (service, ServiceClient, AsyncServiceClient, set()),
        (control, FireworksClient, AsyncFireworksClient, set()),
        (deployment, DeploymentSampler, AsyncDeploymentSampler, set()),
        (weights, WeightSyncer, AsyncWeightSyncer, {"dcp_timeout"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_constructors_are_the_same(
    module: Any, twin: type, original: type, added: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    annotated = twin is not WeightSyncer  # which takes the blocking clients
    here = parameters(original.__init__, annotated=annotated)
    there = parameters(twin.__init__, annotated=annotated)
    assert [each for each in there if each[0] not in added] == here
    assert {each[0] for each in there} == {each[0] for each in here} | added

    made = type(original.__name__, (Made,), {})
    monkeypatch.setattr(module, original.__name__, made)
    args, kwargs, expected = sentinels(twin)
    if twin is WeightSyncer:
        policy: Any = SubmittingTrainingClient("<policy_client>", Direct())  # type: ignore[arg-type]
        args, kwargs = [policy], {**kwargs, "deploy_mgr": None, "deployment_id": "<deployment_id>"}
        expected["deploy_mgr"] = None
    client = twin(*args, **kwargs)
    bound = inspect.signature(original.__init__).bind(None, *made.made[0], **made.made[1])
    assert {"self": None, **{name: value for name, value in expected.items() if name not in added}} == bound.arguments
    if hasattr(client, "close"):
        client.close()


def test_managers_are_made_of_a_client_or_of_key_and_url() -> None:
    with FireworksClient("http://127.0.0.1:9", "key-1") as fireworks:
        for manager in (TrainerJobManager(fireworks), DeploymentManager(fireworks)):
            with manager:
                pass
            manager.close()
        assert fireworks.base_url == "http://127.0.0.1:9"
        with pytest.raises(errors.UsageError, match="either"):
            TrainerJobManager(fireworks, api_key="key-2")
    with pytest.raises(errors.UsageError, match="either") as caught:
        DeploymentManager("key-3")  # type: ignore[arg-type]
    assert "key-3" not in str(caught.value)
    with TrainerJobManager(api_key="key-4", base_url="http://127.0.0.1:9") as jobs:
        assert jobs.base_url == "http://127.0.0.1:9"
        assert repr(jobs) == "<TrainerJobManager http://127.0.0.1:9>"
    urls = {"base_url": "http://127.0.0.1:9", "inference_url": "http://127.0.0.1:9/"}
    with DeploymentManager(api_key="key-5", hotload_api_url="http://127.0.0.1:9", **urls) as deployments:
        assert deployments.inference_url == "http://127.0.0.1:9"
    with pytest.raises(errors.UsageError, match="hotload_api_url is http://elsewhere"):
        DeploymentManager(api_key="key-6", hotload_api_url="http://elsewhere", **urls)
    with pytest.raises(errors.ClosedError, match="is closed"):
        deployments.get("d")


def test_a_weight_syncer_takes_blocking_clients_only() -> None:
    with pytest.raises(errors.UsageError, match="policy_client is a object"):
        WeightSyncer(object())  # type: ignore[arg-type]
    policy: Any = SubmittingTrainingClient(None, Direct())  # type: ignore[arg-type]
    with pytest.raises(errors.UsageError, match="deploy_mgr is a AsyncHotLoadManager"):
        WeightSyncer(policy, AsyncHotLoadManager(Made()))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", methods(ReconnectableClient, "close", "resolve_checkpoint_path"))
def test_every_argument_of_the_cookbook_client_arrives(name: str) -> None:
    client: Any = ReconnectableClient.__new__(ReconnectableClient)
    client._client = recorder = Recorder(AsyncTrainingClient)
    client._held = Direct()
    client._default_timeout = 17.0
    args, kwargs, expected = sentinels(getattr(client, name))
    assert getattr(client, name)(*args, **kwargs) == f"result of {name}"
    renamed = {"adam_params" if key == "params" else key: value for key, value in expected.items()}
    if name in ("forward", "forward_backward", "forward_backward_custom", "optim_step"):
        renamed["timeout"] = 17.0
    assert (recorder.called, recorder.seen) == (name, renamed)
