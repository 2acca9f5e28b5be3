"""Which fault happens when: the rules of a plan, without a service."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwasync._wire.faults import Action, Route, routes_of
from fwasync.local.faults import FaultScript, FutureFaults, Held, Lost, Who, control_route_of, route_of
from fwasync.testing import (
    CutStream,
    Delay,
    Drop,
    EvictSession,
    FailHotLoad,
    FailOperation,
    FailProvisioning,
    Fault,
    FaultPlan,
    Kill,
    LoseFuture,
    Nan,
    NotReady,
    Preempt,
    Reject,
    Reset,
    SlowFuture,
    SlowStream,
    StaleReplica,
    Status,
    StuckProvisioning,
    Truncate,
)

NOBODY = Who()
ROUTES = [route for route in get_args(Route) if route != "*"]
SAMPLES: list[Action] = [
    Drop(),
    Drop(after=True),
    Reset(after=True),
    Truncate(),
    Status(429, retry_after_s=0.5, after=True),
    Delay(0.25),
    NotReady(0.1, status=200, queue_state="paused_capacity", reason="full"),
    SlowFuture(),
    SlowFuture(1.5),
    LoseFuture(),
    FailOperation("user", "no"),
    Reject(counted=False, status=422),
    EvictSession(410),
    Nan("missing"),
    Kill(),
    Preempt("JOB_STATE_PAUSED"),
    StuckProvisioning(1.5, "JOB_STATE_CREATING"),
    FailProvisioning("no machines"),
    FailHotLoad(1),
    StaleReplica(),
    CutStream(3, clean=True),
    SlowStream(0.5),
]

whens = st.one_of(
    st.just({}),
    st.builds(lambda n: {"nth": n}, st.integers(1, 6)),
    st.builds(lambda n: {"every": n}, st.integers(1, 4)),
    st.builds(lambda n: {"first": n}, st.integers(1, 6)),
    st.builds(lambda p: {"probability": p}, st.floats(0, 1)),
)


@st.composite
def faults(draw: st.DrawFn) -> Fault:
    action = draw(st.sampled_from(SAMPLES))
    return Fault(action, draw(st.sampled_from(["*", *routes_of(action)])), **draw(whens))


plans = st.builds(FaultPlan, st.lists(faults(), max_size=6), st.integers(0, 9))
occasions = st.lists(
    st.tuples(st.sampled_from(["request", "stream", "operation", "future"]), st.sampled_from(ROUTES)), max_size=60
)


def fire(script: FaultScript, route: str, times: int, occasion: Any = "request") -> list[int]:
    """At which occasions, from 1, something happened."""
    return [n for n in range(1, times + 1) if script.fire(occasion, route, NOBODY) is not None]


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7]),
        ({"nth": 3}, [3]),
        ({"every": 3}, [3, 6]),
        ({"first": 2}, [1, 2]),
        ({"probability": 0.0}, []),
        ({"probability": 1.0}, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_when_a_rule_strikes(when: dict[str, Any], expected: list[int]) -> None:
    script = FaultScript(FaultPlan([Fault(Drop(), "optim_step", **when)]))
    assert fire(script, "forward", 7) == []
    assert fire(script, "optim_step", 7) == expected


@given(plans, occasions)
def test_at_most_one_fault_each_and_everything_is_counted(plan: FaultPlan, events: list[tuple[Any, str]]) -> None:
    script = FaultScript(plan)
    actions = [(route, script.fire(occasion, route, NOBODY)) for occasion, route in events]
    happened = [(route, action) for route, action in actions if action is not None]
    report = script.report()
    assert [(event.route, plan.faults[event.rule].action) for event in report.log] == happened
    assert report.fired == [Counter(event.rule for event in report.log)[rule] for rule in range(len(plan.faults))]
    for fault, count in zip(plan.faults, report.fired, strict=True):
        assert count <= (1 if fault.nth else fault.first or len(events))
    for event in report.log:
        fault = plan.faults[event.rule]
        assert fault.route in ("*", event.route)
        assert event.route in routes_of(fault.action)


@given(plans, occasions)
def test_equal_plans_do_equal_things(plan: FaultPlan, events: list[tuple[Any, str]]) -> None:
    reports = []
    for _ in range(2):
        script = FaultScript(msgspec.json.decode(msgspec.json.encode(plan), type=FaultPlan))
        for occasion, route in events:
            script.fire(occasion, route, NOBODY)
        reports.append(script.report())
    assert reports[0] == reports[1]


@given(st.integers(0, 5), st.lists(st.sampled_from(ROUTES), max_size=40))
def test_the_dice_of_a_route_do_not_depend_on_other_routes(seed: int, others: list[str]) -> None:
    plan = FaultPlan([Fault(Status(503), probability=0.3)], seed)
    alone = fire(FaultScript(plan), "optim_step", 20)
    script = FaultScript(plan)
    among: list[int] = []
    for n in range(1, 21):
        for route in others[2 * n - 2 : 2 * n]:
            if route != "optim_step":
                script.fire("request", route, NOBODY)
        among += [n] if script.fire("request", "optim_step", NOBODY) else []
    assert among == alone


def test_the_dice_are_fair_and_seeds_differ() -> None:
    struck = [
        len(fire(FaultScript(FaultPlan([Fault(Drop(), probability=0.1)], seed)), "optim_step", 500)) for seed in (1, 2)
    ]
    assert all(25 < count < 85 for count in struck)
    one, two = (
        fire(FaultScript(FaultPlan([Fault(Drop(), probability=0.1)], seed)), "optim_step", 500) for seed in (1, 2)
    )
    assert one != two


def test_the_first_rule_wins_and_the_others_go_on_counting() -> None:
    script = FaultScript(FaultPlan([Fault(Drop(), nth=2), Fault(Status(503), nth=2), Fault(Delay(1), nth=3)]))
    seen = [script.fire("request", "get_info", Who(model_id="m")) for _ in range(4)]
    assert seen == [None, Drop(), Delay(1), None]
    assert script.report().fired == [1, 0, 1]
    assert [(event.action, event.model_id) for event in script.report().log] == [("drop", "m"), ("delay", "m")]


@pytest.mark.parametrize(
    ("action", "route", "occasion"),
    [
        (Drop(), "forward", "request"),
        (Reject(counted=False), "forward", "request"),
        (Reject(), "forward", "operation"),
        (Nan(), "forward", "operation"),
        (FailOperation(), "forward", "operation"),
        (FailOperation(), "asample", "future"),
        (FailOperation(), "create_model", "future"),
        (SlowFuture(), "forward", "future"),
        (LoseFuture(), "asample", "future"),
        (NotReady(), "retrieve_future", "request"),
        (EvictSession(), "session_heartbeat", "request"),
        (Preempt(), "forward", "request"),
        (Preempt(), "get_trainer_job", "request"),
        (StuckProvisioning(), "create_deployment", "operation"),
        (FailProvisioning(), "resume_trainer_job", "operation"),
        (FailHotLoad(), "hot_load", "operation"),
        (StaleReplica(), "hot_load", "operation"),
        (Status(425), "completions", "request"),
        (CutStream(), "completions", "stream"),
        (SlowStream(1), "completions", "stream"),
    ],
)
def test_each_action_has_one_occasion(action: Action, route: Any, occasion: str) -> None:
    for other in ("request", "stream", "operation", "future"):
        script = FaultScript(FaultPlan([Fault(action, route)]))
        assert bool(fire(script, route, 1, other)) == (other == occasion)


def test_a_star_is_what_the_action_can_strike() -> None:
    script = FaultScript(FaultPlan([Fault(NotReady(), first=1)]))
    assert fire(script, "optim_step", 3) == []
    assert fire(script, "retrieve_future", 3) == [1]


@pytest.mark.parametrize("action", SAMPLES)
def test_a_plan_survives_the_wire(action: Action) -> None:
    plan = FaultPlan([Fault(action, every=2)], seed=3)
    assert msgspec.json.decode(msgspec.json.encode(plan), type=FaultPlan) == plan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fault(NotReady(), "optim_step"), "NotReady cannot strike 'optim_step'.*retrieve_future"),
        (lambda: Fault(Drop(), "forwrd"), "Drop cannot strike 'forwrd'"),
        (lambda: Fault(Drop(), nth=1, every=2), "has both nth and every"),
        (lambda: Fault(Drop(), nth=0), "nth is 0"),
        (lambda: Fault(Drop(), probability=1.5), "probability is 1.5"),
        (lambda: Status(200), "200 is not an error status"),
        (lambda: Delay(-1), "seconds is -1"),
        (lambda: SlowFuture(float("nan")), "seconds is nan"),
        (lambda: NotReady(-0.5), "delay_s is -0.5"),
        (lambda: Status(503, retry_after_s=float("inf")), "retry_after_s is inf"),
        (lambda: Fault(Preempt(), "completions"), "Preempt cannot strike 'completions'"),
        (lambda: StuckProvisioning(-1), "seconds is -1"),
        (lambda: CutStream(-1), "events is -1"),
        (lambda: SlowStream(float("nan")), "seconds is nan"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_misspelt_field_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="nht"):
        msgspec.json.decode(b'{"faults":[{"action":{"type":"drop"},"nht":1}]}', type=FaultPlan)


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("optim_step", "optim_step"),
        ("sessions/s1/finish", "finish_session"),
        ("sessions/s1", "sessions"),
        ("samplers/x", "samplers"),
        ("training_runs/a/checkpoints/weights/b/ttl", "training_runs"),
        ("client/config", "client/config"),
    ],
)
def test_routes_have_names(path: str, route: str) -> None:
    assert route_of(path) == route


@pytest.mark.parametrize(
    ("request_line", "route", "resource"),
    [
        ("POST /v1/accounts/local/rlorTrainerJobs", "create_trainer_job", None),
        ("GET /v1/accounts/local/rlorTrainerJobs", "list_trainer_jobs", None),
        ("GET /v1/accounts/local/rlorTrainerJobs/j1", "get_trainer_job", "j1"),
        ("DELETE /v1/accounts/local/rlorTrainerJobs/j1", "delete_trainer_job", "j1"),
        ("POST /v1/accounts/local/rlorTrainerJobs/j1:resume", "resume_trainer_job", "j1"),
        ("POST /v1/accounts/local/rlorTrainerJobs/j1:cancel", "cancel_trainer_job", "j1"),
        ("POST /v1/accounts/local/rlorTrainerJobs/j1:dance", "control_plane", "j1"),
        ("GET /v1/accounts/local/rlorTrainerJobs/j1/checkpoints", "control_plane", None),
        ("POST /v1/accounts/local/deployments", "create_deployment", None),
        ("GET /v1/accounts/local/deployments", "list_deployments", None),
        ("GET /v1/accounts/local/deployments/d1", "get_deployment", "d1"),
        ("PATCH /v1/accounts/local/deployments/d1", "update_deployment", "d1"),
        ("DELETE /v1/accounts/local/deployments/d1", "delete_deployment", "d1"),
        ("GET /v1/accounts", "control_plane", None),
        ("GET /v1/accounts/local/models/m1", "control_plane", None),
        ("POST /v1/accounts/local/checkpoints/c1:promote", "control_plane", None),
        ("POST /hot_load/v1/models/hot_load", "hot_load", None),
        ("GET /hot_load/v1/models/hot_load", "hot_load_status", None),
        ("POST /inference/v1/completions", "completions", None),
    ],
)
def test_routes_of_the_control_plane_have_names(request_line: str, route: str, resource: str | None) -> None:
    method, _, path = request_line.partition(" ")
    assert control_route_of(method, path) == (route, resource)
    assert route in ROUTES


# -- futures -----------------------------------------------------------------------------------------


def test_a_withheld_future_is_let_go_by_time() -> None:
    futures = FutureFaults()
    futures.strike(SlowFuture(5.0), "a", now=100.0)
    assert futures.fate("a", now=102.0) == Held(3.0)
    assert futures.fate("b", now=102.0) is None
    assert futures.fate("a", now=105.0) is None
    assert futures.fate("a", now=0.0) is None


def test_withheld_futures_are_let_go_by_hand() -> None:
    futures = FutureFaults()
    for name in ("a", "b", "c"):
        futures.strike(SlowFuture(), name, now=0.0)
    assert futures.fate("a", now=1e9) == Held(None)
    assert futures.release("a") == 1
    assert futures.release("a") == 0
    assert futures.fate("a", now=0.0) is None
    assert futures.release(None) == 2
    assert futures.fate("c", now=0.0) is None


def test_lost_and_failed_futures_stay_so() -> None:
    futures = FutureFaults()
    futures.strike(LoseFuture(), "a", now=0.0)
    futures.strike(FailOperation("user"), "b", now=0.0)
    assert futures.release(None) == 0
    for _ in range(2):
        assert futures.fate("a", now=1.0) == Lost()
        assert futures.fate("b", now=1.0) == FailOperation("user")
