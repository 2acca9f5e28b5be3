"""The snapshot chain: base, then deltas, and never a delta onto anything but what it was made from."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from fwasync import errors
from fwasync.weights.chain import Loading, Saving, Snapshot, SnapshotChain


def save(chain: SnapshotChain, name: str, kind: str | None = None) -> Snapshot:
    return chain.saved(chain.begin_save(chain.choose(kind)), name)


def load(chain: SnapshotChain, snapshot: Snapshot) -> Loading:
    loading = chain.begin_load(snapshot)
    chain.loaded(loading)
    return loading


def test_a_base_and_then_deltas() -> None:
    chain = SnapshotChain()
    assert [(s.kind, load(chain, s).previous) for s in (save(chain, name) for name in "abc")] == [
        ("base", None),
        ("delta", "a"),
        ("delta", "b"),
    ]
    assert chain.served == "c"


def test_lora_is_always_whole() -> None:
    chain = SnapshotChain(lora=True)
    for name in "ab":
        assert load(chain, save(chain, name)).previous is None
    with pytest.raises(errors.UsageError, match="LoRA are always whole"):
        chain.choose("delta")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda chain: chain.begin_save(chain.choose(None)),
        lambda chain: chain.begin_load(save(chain, "b")),
        lambda chain: save(chain, "b"),
        lambda chain: chain.seen(["foreign"]),
        lambda chain: chain.seen(["a", None]),
        lambda chain: chain.seen([]),
        lambda chain: chain.reset(),
        lambda chain: load(chain, save(chain, "b", "merged_base")),
    ],
    ids=["save lost", "load lost", "saved only", "foreign", "one restarted", "no replicas", "reset", "merged"],
)
def test_a_base_follows_what_broke_the_chain(spoil) -> None:
    chain = SnapshotChain()
    load(chain, save(chain, "a"))
    chain.seen(["tinker://run/sampler_weights/a", "a"])
    assert chain.choose(None) == "delta"
    spoil(chain)
    assert chain.choose(None) == "base"
    with pytest.raises(errors.UsageError, match="save a 'base'"):
        chain.choose("delta")
    load(chain, save(chain, "z"))
    assert chain.choose(None) == "delta"


def test_a_reset_during_a_save_or_load_takes_its_meaning() -> None:
    chain = SnapshotChain()
    base = save(chain, "a")
    loading = chain.begin_load(base)
    chain.reset()
    chain.loaded(loading)
    assert chain.served is None
    load(chain, base)
    load(chain, save(chain, "b"))
    saving = chain.begin_save("delta")
    chain.reset()
    load(chain, base)
    with pytest.raises(errors.HotLoadFailedError, match="a delta on a snapshot that is not known"):
        chain.begin_load(chain.saved(saving, "c"))


def test_snapshots_are_found_by_name() -> None:
    chain = SnapshotChain()
    base = save(chain, "a")
    assert chain.find("a") is chain.find("a", "base") is base
    assert chain.find("theirs", "base") == Snapshot("theirs", "base")
    with pytest.raises(errors.UsageError, match="not saved here"):
        chain.find("theirs")
    with pytest.raises(errors.UsageError, match="not saved here"):
        chain.find("theirs", "delta")
    with pytest.raises(errors.UsageError, match="saved as 'base', not as 'delta'"):
        chain.find("a", "delta")
    with pytest.raises(errors.UsageError, match="must be one of base, delta"):
        chain.choose("full")


def test_a_name_that_was_saved_again_means_nothing_that_was_known() -> None:
    chain = SnapshotChain()
    load(chain, save(chain, "a"))
    delta = save(chain, "b")
    save(chain, "a", "base")
    assert chain.served is None
    assert chain.choose(None) == "base"
    load(chain, chain.find("a"))
    with pytest.raises(errors.HotLoadFailedError, match="not known"):
        chain.begin_load(chain.find("b"))
    with pytest.raises(errors.HotLoadFailedError, match="not known"):
        chain.begin_load(delta)
    loading = chain.begin_load(chain.find("a"))
    save(chain, "a")
    chain.loaded(loading)
    assert chain.served is None


def test_names_are_never_used_twice() -> None:
    chain = SnapshotChain()
    assert [chain.fresh_name(name) for name in ("s", "s", "s-2", "s")] == ["s", "s-2", "s-2-2", "s-3"]


MOSTLY = st.sampled_from([True, True, True, False])
SELDOM = st.sampled_from([False, False, True])


@dataclass(frozen=True)
class Stored:
    """What the storage has under a name: weights, or the difference of weights."""

    weights: int
    made_from: int | None


class Chain(RuleBasedStateMachine):
    """A trainer, a deployment and others that meddle; every number stands for weights that differ from all others."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = SnapshotChain()
        self.numbers = itertools.count()
        self.reference = next(self.numbers)  # what the trainer's next delta is made from
        self.stored: dict[str, Stored] = {}
        self.snapshots: dict[str, Snapshot] = {}
        self.serving: tuple[str | None, int] = (None, next(self.numbers))
        self.saving: tuple[Saving, str] | None = None
        self.loading: Loading | None = None
        self.in_flight: list[Loading] = []

    @precondition(lambda self: self.saving is None)
    @rule(kind=st.sampled_from([None, None, None, "base", "delta"]), took=MOSTLY)
    def begin_save(self, kind: str | None, took: bool) -> None:
        """The trainer may save it whether or not we hear of it."""
        try:
            chosen = self.chain.choose(kind)
        except errors.UsageError:
            assert kind == "delta"
            return
        name = self.chain.fresh_name("s")
        saving = self.chain.begin_save(chosen)
        if took:
            weights = next(self.numbers)
            self.stored[name] = Stored(weights, self.reference if chosen == "delta" else None)
            self.reference = weights
            self.saving = (saving, name)

    @precondition(lambda self: self.saving is not None)
    @rule(heard=MOSTLY)
    def end_save(self, heard: bool) -> None:
        saving, name = self.saving
        self.saving = None
        if heard:
            self.snapshots[name] = self.chain.saved(saving, name)

    @precondition(lambda self: self.snapshots and self.saving is None)
    @rule(data=st.data(), arrives=MOSTLY, newest=MOSTLY)
    def begin_load(self, data: st.DataObject, arrives: bool, newest: bool) -> None:
        names = list(self.snapshots)
        name = names[-1] if newest else data.draw(st.sampled_from(names))
        self.load(name, arrives=arrives)

    def load(self, name: str, *, arrives: bool) -> None:
        self.chain.seen([self.serving[0]])
        try:
            loading = self.chain.begin_load(self.snapshots[name])
        except errors.HotLoadFailedError:
            assert self.snapshots[name].kind == "delta"
            return
        stored = self.stored[name]
        if loading.previous is None:
            assert stored.made_from is None, "a delta was loaded in full"
        else:
            assert stored.made_from == self.serving[1], "a delta was loaded onto what it was not made from"
        self.loading = loading
        if arrives:
            self.serving = (name, stored.weights)
        else:
            self.in_flight.append(loading)

    @precondition(lambda self: self.loading is not None)
    @rule(heard=MOSTLY)
    def end_load(self, heard: bool) -> None:
        loading, self.loading = self.loading, None
        if heard and self.serving[0] == loading.snapshot.identity:
            self.chain.loaded(loading)

    @precondition(lambda self: self.saving is None and self.loading is None)
    @rule(times=st.integers(1, 2))
    def syncs_succeed(self, times: int) -> None:
        for _ in range(times):
            self.chain.seen([self.serving[0]])
            self.begin_save(None, True)
            self.end_save(True)
            self.load(list(self.snapshots)[-1], arrives=True)
            self.end_load(True)
            assert self.chain.continues

    @precondition(lambda self: self.in_flight)
    @rule()
    def a_load_arrives_late(self) -> None:
        loading = self.in_flight.pop()
        if loading.previous in (None, self.serving[0]) and self.loading is None:
            name = loading.snapshot.identity
            if self.stored[name].made_from in (None, self.serving[1]):
                self.serving = (name, self.stored[name].weights)

    @precondition(lambda self: self.loading is None)
    @rule(really=SELDOM)
    def another_loads(self, really: bool) -> None:
        if not really:
            return
        number = next(self.numbers)
        self.serving = (f"foreign{number}", number)

    @rule(really=SELDOM)
    def the_trainer_is_restored(self, really: bool) -> None:
        if really:
            self.reference = next(self.numbers)
            self.chain.reset()


TestChain = Chain.TestCase
TestChain.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
