"""Erasure, alias and merge in the fold: what ends, what moves, what stays ignored; any cut gives equal bytes."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from models.examples import Entries, item_hash
from models.profile import ProfileView, unpack
from streaming.events import (
    Action,
    Alias,
    Click,
    Erase,
    Event,
    Merge,
    Rating,
    View,
    Weights,
    decode,
    encode,
    impression,
    subject,
)
from streaming.learn import Outcome, UserFold, decode_part, rounds, users_of
from streaming.state import MemoryUserStore
from tests.event_streams import T0, one_event, shown_payload

PARTITIONS = 3


def home(user: str) -> int:
    """Return the partition of a test's user."""
    return item_hash(user) % PARTITIONS


class World:
    """A log of a few partitions and its fold, in memory; derived events are appended as the user agent does."""

    def __init__(self, fold: UserFold | None = None) -> None:
        self.logs: dict[int, list[tuple[int, int, bytes]]] = defaultdict(list)
        self.store, self.fold, self.outcomes = MemoryUserStore(), fold or UserFold(Weights()), list[Outcome]()
        self.entries: list[Entries] = []

    def append(self, *events: Event, at: float = T0) -> None:
        """Append events to the log at a record time, s."""
        for event in events:
            log = self.logs[home(subject(event))]
            log.append((len(log), round(at * 1000), encode(event)))

    def applied(self, partition: int) -> int:
        """Return the next offset of a partition."""
        return self.store.applied.get(partition, (0,))[0]

    def step(self, partition: int, count: int = 1000, *, commit: bool = True) -> None:
        """Fold the next records of a partition; without `commit` the worker dies after its appends."""
        first = self.applied(partition)
        records = self.logs[partition][first : first + count]
        for (part,) in rounds([decode_part("events", partition, records)]) if records else ():
            outcome = self.fold.fold([part], {partition: self.store.read_now(partition, users_of([part])[partition])})
            self.append(*outcome.derived, at=records[-1][1] / 1000)
            if not commit:
                return
            self.outcomes.append(outcome)
            self.entries += outcome.records
            assert [self.store.commit_now(write) for write in outcome.writes] == [None]

    def drain(self, count: int = 1000) -> None:
        """Fold everything."""
        while left := [p for p, log in sorted(self.logs.items()) if self.applied(p) < len(log)]:
            for partition in left:
                self.step(partition, count)

    def now(self, *events: Event, at: float = T0) -> Outcome:
        """Append and fold; return what the last micro-batch came to."""
        self.append(*events, at=at)
        self.drain()
        return self.outcomes[-1]

    def view(self, user: str) -> ProfileView:
        """Return a user's profile."""
        values, p = self.store.values, home(user)
        return unpack(values.get(("profile", p, user)), values.get(("seen", p, user)))


def click(user: str, item: str, ts: float = T0, **more: object) -> Click:
    return Click(user_id=user, item_id=item, ts=ts, **more)  # type: ignore[arg-type]


def hashes(*items: str) -> list[int]:
    return [item_hash(item) for item in items]


def test_an_erasure_ends_all_but_the_dedupe_window() -> None:
    world = World()
    world.now(click("u", "a", event_id="e1"), impression("u", "s", T0, "home", ["b"], shown_payload("s", ["b"])))
    outcome = world.now(Erase(user_id="u", ts=T0 + 1), at=T0 + 2)
    assert (outcome.applied, outcome.erased, len(outcome.records[0])) == (1, 0, 0)
    view = world.view("u")
    assert (view.known, view.ended, len(view.items), len(view.seen), view.slates) == (False, T0 + 2, 0, 0, [])
    assert not any(view.counters.values())
    assert ("seen", home("u"), "u") not in world.store.values
    assert len(world.store.values["profile", home("u"), "u"]) == 96 + 12


def test_late_events_do_not_bring_an_erased_user_back_and_later_ones_start_anew() -> None:
    world = World()
    world.now(click("u", "a", event_id="e1"), Erase(user_id="u", ts=T0), at=T0 + 1)
    late = world.now(
        click("u", "b", T0 - 50), click("u", "c", T0 + 0.9), View(user_id="u", item_id="v", ts=T0),
        impression("u", "s", T0, "home", ["b"], shown_payload("s", ["b"])), at=T0 + 60,
    )  # fmt: skip
    assert (late.applied, late.erased, len(late.records[0])) == (0, 4, 0)
    assert not world.view("u").known
    assert world.now(click("u", "a", T0 + 70, event_id="e1"), at=T0 + 70).duplicates == 1  # its window stays
    world.now(click("u", "d", T0 + 80), at=T0 + 80)
    view = world.view("u")
    assert (view.known, view.items.tolist(), view.first_time) == (True, hashes("d"), T0 + 80)
    assert view.seen.tolist() == [item_hash("d") & 0xFFFFFFFF]


def test_an_unknown_user_can_be_erased_too() -> None:
    world = World()
    world.now(Erase(user_id="u", ts=T0), at=T0)
    assert world.now(click("u", "a", T0 - 1), at=T0 + 5).erased == 1
    assert not world.view("u").known


def test_after_an_erasure_an_impression_still_creates_no_profile() -> None:
    world = World()
    world.now(click("u", "a"), Erase(user_id="u", ts=T0), at=T0)
    before = world.store.values["profile", home("u"), "u"]
    shown = impression("u", "s", T0 + 9, "home", ["b"], shown_payload("s", ["b"]))
    assert world.now(shown, at=T0 + 9).applied == 1
    assert world.store.values["profile", home("u"), "u"] == before


def test_an_erasure_holds_where_the_brokers_clock_was_set_back() -> None:
    world = World()
    world.now(Erase(user_id="u", ts=T0), at=T0)
    world.now(click("u", "a", T0 + 10), at=T0 + 10)
    world.now(Erase(user_id="u", ts=T0 - 5), at=T0 - 5)
    assert not world.view("u").known
    assert world.view("u").ended == T0


def test_an_alias_moves_the_anonymous_sequence_to_the_user() -> None:
    world = World()
    world.append(click("ann", "a", T0 + 1), click("ann", "d", T0 + 4), click("ann", "e", T0 + 5), at=T0 + 9)
    world.append(click("cookie", "b", T0 + 2), click("cookie", "c", T0 + 4), click("cookie", "a", T0 + 6), at=T0 + 9)
    world.now(Alias(user_id="ann", anonymous_id="cookie", ts=T0 + 7), at=T0 + 10)
    ann, cookie = world.view("ann"), world.view("cookie")
    assert ann.items.tolist() == list(reversed(hashes("a", "b", "c", "d", "e", "a")))  # the anonymous first at ties
    assert ann.times.tolist() == [T0 + s for s in (6, 5, 4, 4, 2, 1)]
    assert (ann.counters["click"], ann.known) == (6, True)
    assert sorted(ann.seen.tolist()) == sorted(h & 0xFFFFFFFF for h in hashes(*"abcde"))
    assert (cookie.known, len(cookie.items), len(cookie.seen)) == (False, 0, 0)
    assert sum(map(len, world.entries)) == 6  # neither alias nor merge derives an entry


def test_an_alias_of_a_user_without_profile_gives_them_one() -> None:
    world = World()
    world.append(*[click("cookie", f"i{i}", T0 - 100 + i) for i in range(60)])
    world.now(Alias(user_id="ann", anonymous_id="cookie", ts=T0))
    view = world.view("ann")
    assert view.items.tolist() == list(reversed(hashes(*[f"i{i}" for i in range(10, 60)])))
    assert (view.counters["click"], len(view.seen), view.first_time, view.last_time) == (60, 60, T0 - 100, T0 - 41)
    assert world.now(click("cookie", "late", T0 - 1), at=T0 + 5).erased == 1
    world.now(click("cookie", "new", T0 + 5), at=T0 + 5)
    assert world.view("cookie").items.tolist() == hashes("new")
    assert world.view("ann").items[0] == item_hash("i59")


def test_a_repeated_alias_moves_nothing_twice() -> None:
    world = World()
    world.append(click("cookie", "a"))
    alias = Alias(user_id="ann", anonymous_id="cookie", ts=T0, event_id="x")
    world.now(alias)
    world.now(click("cookie", "b", T0 + 5), at=T0 + 5)
    world.now(alias, at=T0 + 6)
    assert world.view("ann").items.tolist() == hashes("a")
    assert world.view("cookie").items.tolist() == hashes("b")
    nobody = World()
    assert nobody.now(Alias(user_id="ann", anonymous_id="nobody", ts=T0)).derived == []
    assert not nobody.view("ann").known


def test_an_alias_is_exactly_once_across_crashes_between_append_and_commit() -> None:
    world = World()
    world.append(*[click("cookie", f"i{i}", T0 + i) for i in range(5)], at=T0 + 10)
    world.append(Alias(user_id="ann", anonymous_id="cookie", ts=T0 + 10), at=T0 + 11)
    for count in (6, 1000, 6):
        world.step(home("cookie"), count, commit=False)
        if home("ann") != home("cookie"):
            world.step(home("ann"))
    world.drain()
    copies = [event for log in world.logs.values() for *_, v in log if isinstance(event := decode(v), Merge)]
    assert len(copies) >= 4
    assert world.view("ann").counters["click"] == 5
    assert world.view("ann").items.tolist() == list(reversed(hashes(*[f"i{i}" for i in range(5)])))
    assert world.store.applied[home("ann")][1] == {f"alias:{home('cookie')}": 6}


def test_an_erasure_ends_what_an_alias_brought_and_a_merge_on_its_way() -> None:
    world = World()
    world.append(click("cookie", "a"))
    world.append(Alias(user_id="ann", anonymous_id="cookie", ts=T0 + 1), at=T0 + 1)
    world.step(home("cookie"), commit=False)  # the merge lies in the log, the erasure is behind it
    world.append(Erase(user_id="ann", ts=T0 + 2), at=T0 + 2)
    world.drain()
    assert not world.view("ann").known
    behind = World()
    behind.append(click("cookie", "a"))
    behind.append(Alias(user_id="ann", anonymous_id="cookie", ts=T0 + 1), at=T0 + 1)
    behind.now(Erase(user_id="ann", ts=T0 + 2), at=T0 + 2)  # the merge comes after the erasure
    assert not behind.view("ann").known


def mixed(seed: int, n: int) -> list[tuple[float, Event]]:
    """Return (record time, event): usual events of few users with aliases and erasures among them."""
    rng, out = np.random.default_rng(seed), list[tuple[float, Event]]()
    for i in range(n):
        at, draw = T0 + i * 7.0, rng.random()
        if draw < 0.04:
            out.append((at, Erase(user_id=f"user-{rng.integers(6)}", ts=at)))
        elif draw < 0.12:
            a, b = rng.permutation(6)[:2]
            eid = f"alias-{rng.integers(20)}" if draw < 0.08 else None
            out.append(
                (at, Alias(user_id=f"user-{a}", anonymous_id=f"user-{b}", ts=at - 20 * rng.random(), event_id=eid))
            )
        else:
            out.append((at + 0.25, one_event(rng, i, 6, 12)))
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 200), max_size=8))
def test_any_cut_gives_equal_bytes_with_aliases_and_erasures(seed: int, cuts: list[int]) -> None:
    whole = World()
    for at, event in mixed(seed, 160):
        whole.append(event, at=at)
    whole.drain()
    log = whole.logs  # with its derived events: what a rebuild reads
    pieces = World()
    for partition, records in log.items():
        limits = sorted({0, len(records), *(c for c in cuts if c < len(records))})
        for first, last in itertools.pairwise(limits):
            part = decode_part("events", partition, records[first:last])
            read = pieces.store.read_now(partition, users_of([part])[partition])
            outcome = pieces.fold.fold([part], {partition: read})
            assert [pieces.store.commit_now(write) for write in outcome.writes] == [None]
    assert pieces.store.values == whole.store.values
    assert pieces.store.applied == whole.store.applied
    assert pieces.store.active == whole.store.active


def test_an_alias_carries_what_was_pushed_away_and_the_tally() -> None:
    world = World()
    hide = [Action(user_id="cookie", item_id=i, ts=T0 + t, name="hide") for i, t in (("a", 1), ("b", 3))]
    world.append(*hide, Rating(user_id="cookie", item_id="r", ts=T0 + 4, value=5.0), at=T0 + 9)
    skip = [Action(user_id="ann", item_id=i, ts=T0 + t, name="skip") for i, t in (("a", 2), ("c", 4))]
    world.append(*skip, at=T0 + 9)
    world.now(Alias(user_id="ann", anonymous_id="cookie", ts=T0 + 7), at=T0 + 10)
    ann, cookie = world.view("ann"), world.view("cookie")
    assert ann.averse.tolist() == hashes("c", "b", "a")
    assert ann.averse_times.tolist() == [T0 + 4, T0 + 3, T0 + 2]
    assert ann.tally.tolist() == [1, 1, 0, 0, 2, 2, 0, 5]
    assert (len(cookie.averse), bool(cookie.tally.any())) == (0, False)
    world.now(Erase(user_id="ann", ts=T0 + 11), at=T0 + 11)
    assert (len(world.view("ann").averse), bool(world.view("ann").tally.any())) == (0, False)


def test_a_merge_of_an_older_release_has_neither() -> None:
    world = World(UserFold(Weights(), codec=2))
    world.append(Action(user_id="cookie", item_id="a", ts=T0, name="hide"))
    world.now(Alias(user_id="ann", anonymous_id="cookie", ts=T0))
    merges = [event for log in world.logs.values() for *_, v in log if isinstance(event := decode(v), Merge)]
    assert [(event.averse, event.tally) for event in merges] == [([], [])]
    assert world.view("ann").counters["negative"] == 1
