"""The fold of events into profiles: any cut gives equal bytes, windows, voice, joins, sources, gaps."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.examples import CLICK, ENTERS, RATING, SHOWN, VOICE, CodecError, Entries, concatenate, item_hash
from models.profile import DEDUPE, SEEN, SEQUENCE, FutureCodecError, ProfileView, unpack
from streaming.events import Action, Click, Dwell, Event, Rating, View, Weights, encode, impression
from streaming.learn import GapError, Outcome, UserFold, decode_part, users_of
from streaming.state import MemoryUserStore
from tests.event_streams import T0, records, shown_payload

P = 3


class Folding:
    """A fold on in-memory state, one partition, fed by hand."""

    def __init__(self) -> None:
        self.store, self.fold, self.outcomes = MemoryUserStore(), UserFold(Weights()), list[Outcome]()

    def feed(self, batch: list[tuple[int, int, bytes]]) -> Outcome:
        part = decode_part("fr.events", P, batch)
        read = self.store.read_now(P, users_of([part])[P])
        outcome = self.fold.fold([part], {P: read})
        for write in outcome.writes:
            assert self.store.commit_now(write) is None
        self.outcomes.append(outcome)
        return outcome

    def events(self, *events: Event, at: float = T0) -> Outcome:
        following = self.store.applied.get(P, (0, {}, ""))[0]
        return self.feed([(following + i, round(at * 1000), encode(event)) for i, event in enumerate(events)])

    def view(self, user: str) -> ProfileView:
        return unpack(self.store.values.get(("profile", P, user)), self.store.values.get(("seen", P, user)))

    def entries(self) -> Entries:
        return concatenate(record for outcome in self.outcomes for record in outcome.records)


def click(item: str, user: str = "u", ts: float = T0, **more: object) -> Click:
    return Click(user_id=user, item_id=item, ts=ts, **more)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 240), max_size=8))
def test_any_cut_gives_equal_bytes(seed: int, cuts: list[int]) -> None:
    stream = records(seed, 240)
    limits = sorted({0, 240, *cuts})
    whole, pieces = Folding(), Folding()
    whole.feed(stream)
    for first, last in itertools.pairwise(limits):
        pieces.feed(stream[first:last])
    assert pieces.store.values == whole.store.values
    assert pieces.store.applied == whole.store.applied
    assert pieces.entries().to_bytes() == whole.entries().to_bytes()


def test_one_at_a_time_gives_equal_bytes() -> None:
    stream, whole, pieces = records(7, 300), Folding(), Folding()
    whole.feed(stream)
    for record in stream:
        pieces.feed([record])
    assert pieces.store.values == whole.store.values


def test_golden_profile_bytes() -> None:
    """The layout is a contract with every profile already stored: change it only with a new version."""
    folding = Folding()
    folding.feed(records(1, 200))
    stored = b"".join(value for _, value in sorted(folding.store.values.items()))
    assert hashlib.sha256(stored).hexdigest() == "1001a24624bd71b58cd70a32d816770d8dc1a3666032d42566b0e62c5a68d9e3"


@pytest.mark.parametrize(
    "damage",
    [b"\x02" + bytes(80), b"\x01", b"\x01" + bytes(60), b"\x01\xff" + bytes(54), b"\x03" + bytes(94), b"g" * 80],
)
def test_foreign_profiles_are_refused(damage: bytes) -> None:
    with pytest.raises(CodecError, match="profile: expected version 1 to 3") as caught:
        unpack(damage, None)
    assert not isinstance(caught.value, FutureCodecError)
    with pytest.raises(CodecError, match="seen list"):
        unpack(None, b"abc")


def test_the_sequence_is_the_last_fifty_in_log_order() -> None:
    folding = Folding()
    folding.events(*[click(f"i{i}", ts=T0 - i) for i in range(SEQUENCE + 5)])
    view = folding.view("u")
    assert view.items.tolist() == [item_hash(f"i{i}") for i in range(SEQUENCE + 4, 4, -1)]
    assert view.counters["click"] == SEQUENCE + 5
    assert (view.first_time, view.last_time) == (T0 - SEQUENCE - 4, T0)


def test_signals_of_the_newest_item_update_its_entry() -> None:
    folding = Folding()
    folding.events(click("a"), Dwell(user_id="u", item_id="a", ts=T0 + 1, seconds=45))
    folding.events(Rating(user_id="u", item_id="a", ts=T0 + 2, value=5))
    view = folding.view("u")
    assert view.items.tolist() == [item_hash("a")]
    assert view.kinds.tolist() == [RATING]
    assert view.weights.tolist() == pytest.approx([1 + 0.5 + 1])
    assert [int(flags) & ENTERS for flags in folding.entries().flags] == [ENTERS, 0, 0]


def test_which_signals_enter_the_sequence() -> None:
    folding = Folding()
    folding.events(
        Rating(user_id="u", item_id="r", ts=T0, value=1), Action(user_id="u", item_id="s", ts=T0, name="skip"),
        Dwell(user_id="u", item_id="d", ts=T0, seconds=31), Dwell(user_id="u", item_id="e", ts=T0, seconds=2),
        Action(user_id="u", item_id="l", ts=T0, name="like"), View(user_id="u", item_id="v", ts=T0),
    )  # fmt: skip
    view = folding.view("u")
    assert view.items.tolist() == [item_hash(i) for i in ("l", "d", "r")]
    assert view.counters == {
        "click": 0, "dwell": 2, "rating": 1, "action": 2, "view": 1, "impression": 0, "negative": 3, "duplicate": 0,
    }  # fmt: skip
    assert len(view.seen) == 5  # acted on; viewing is not acting


def test_a_repeated_event_id_counts_once_within_the_window() -> None:
    folding = Folding()
    folding.events(click("a", event_id="x"), click("a", event_id="x"))
    assert folding.events(click("b", event_id="x")).duplicates == 1
    assert folding.view("u").counters["click"] == 1
    assert folding.view("u").counters["duplicate"] == 2
    assert folding.events(click("c", event_id="x"), at=T0 + 86_400 + 2).applied == 1


def test_dedupe_remembers_256_ids_and_counts_the_overflow() -> None:
    folding = Folding()
    for first in range(0, 260, 130):
        folding.events(*[click("a", event_id=f"e{i}") for i in range(first, first + 130)])
    assert sum(outcome.overflow for outcome in folding.outcomes) == 260 - DEDUPE
    assert folding.events(click("a", event_id="e0")).applied == 1
    assert folding.events(click("a", event_id="e259")).duplicates == 1


def test_one_voice_an_hour() -> None:
    folding = Folding()
    folding.events(*[click("a", ts=T0 - 9000 + s) for s in (0, 10, 3599, 3601)], click("b", ts=T0))
    assert [bool(flags & VOICE) for flags in folding.entries().flags] == [True, False, False, True, True]


def test_outcomes_join_the_newest_slate_that_showed_the_item() -> None:
    folding = Folding()
    folding.events(click("z"))
    for slate, shown in (("s1", ["a", "b"]), ("s2", ["b", "c"]), ("s3", ["d"])):
        folding.events(impression("u", slate, T0, "home", shown, shown_payload(slate, shown)))
    folding.events(click("b"), click("a"), click("q"), click("c", slate_id="s1"))
    entries = folding.entries()
    s1, s2, s3 = (item_hash(s) for s in ("s1", "s2", "s3"))
    assert entries.slates[-4:].tolist() == [[s2, s3, s1, 0], [s1, s3, s2, 0], [s3, s2, s1, 0], [s1, s3, s2, 0]]
    assert [bool(flags & SHOWN) for flags in entries.flags[-4:]] == [True, True, False, False]


def test_an_impression_creates_no_profile_and_an_outcome_then_joins_by_its_slate_id() -> None:
    folding = Folding()
    folding.events(impression("u", "s", T0, "home", ["a"], shown_payload("s", ["a"])))
    assert ("profile", P, "u") not in folding.store.values
    folding.events(click("a", slate_id="s"))
    entries = folding.entries()
    assert entries.slates[-1].tolist() == [item_hash("s"), 0, 0, 0]
    assert entries.flags[-1] & SHOWN
    assert entries.extra[0] == shown_payload("s", ["a"])


def test_histories_are_newest_first_and_before_the_event() -> None:
    folding = Folding()
    folding.events(*[click(f"i{i}", ts=T0 - 100 + i) for i in range(25)])
    entries = folding.entries()
    a, b = entries.history_start[-2:]
    assert entries.history_item[a:b].tolist() == [item_hash(f"i{i}") for i in range(23, 3, -1)]
    assert entries.history_time[a] == T0 - 77
    assert set(entries.history_kind[a:b].tolist()) == {CLICK}


def test_the_effective_time_is_never_after_the_record() -> None:
    folding = Folding()
    outcome = folding.events(click("a", ts=T0 + 200), click("b", ts=T0 - 50))
    assert outcome.records[0].time.tolist() == [T0, T0 - 50]


def test_what_lies_too_far_ahead_or_cannot_be_read_is_dead_with_a_reason() -> None:
    batch = [
        (0, round(T0 * 1000), encode(click("a", ts=T0 + 301))), (1, round(T0 * 1000), b"garbage"),
        (2, round(T0 * 1000), encode(impression("u", "s", T0, "home", ["a"], b"nonsense"))),
        (3, round(T0 * 1000), encode(click("b"))),
    ]  # fmt: skip
    part = decode_part("fr.events", P, batch)
    assert [dead.offset for dead in part.dead] == [0, 1, 2]
    assert "at most 300 s after its record" in part.dead[0].reason
    assert all("expected" in dead.reason for dead in part.dead)
    folding = Folding()
    folding.feed(batch)
    assert folding.store.applied[P][0] == 4
    assert folding.view("u").counters["click"] == 1


def test_a_repeated_append_of_an_inlet_is_dropped_by_its_source_mark() -> None:
    folding = Folding()
    first = [click("a", source=("clicks", 2, 7)), click("b", source=("clicks", 2, 9))]
    folding.events(*first)
    outcome = folding.events(*first, click("c", source=("clicks", 2, 10)), click("d", source=("clicks", 0, 1)))
    assert (outcome.applied, outcome.duplicates) == (2, 2)
    assert folding.store.applied[P][1] == {"clicks:2": 11, "clicks:0": 2}


def test_events_below_the_applied_offset_are_dropped_and_a_gap_is_an_error() -> None:
    folding, stream = Folding(), records(3, 40)
    folding.feed(stream[:30])
    folding.feed(stream[20:])
    whole = Folding()
    whole.feed(stream)
    assert folding.store.values == whole.store.values
    with pytest.raises(GapError, match=r"expected offset 40 next, got 41"):
        folding.feed([(41, round(T0 * 1000), encode(click("a")))])


def test_a_refused_commit_folds_again_to_the_same_state() -> None:
    """A zombie read before its twin committed: its commit is refused and its repeat changes nothing."""
    folding, stream = Folding(), records(5, 50)
    part = decode_part("fr.events", P, stream[:30])
    stale = folding.store.read_now(P, users_of([part])[P])
    folding.feed(stream[:40])
    zombie = folding.fold.fold([part], {P: stale}).writes[0]
    assert folding.store.commit_now(zombie) == 40
    folding.feed(stream[40:])
    whole = Folding()
    whole.feed(stream)
    assert folding.store.values == whole.store.values


def test_the_seen_list_keeps_the_newest() -> None:
    folding = Folding()
    for first in range(0, SEEN + 100, 1049):
        folding.events(*[click(f"i{i}") for i in range(first, first + 1049)])
    seen = folding.view("u").seen
    assert len(seen) == SEEN
    assert seen[-1] == item_hash("i4195") & 0xFFFFFFFF
    assert np.uint32(item_hash("i0") & 0xFFFFFFFF) not in seen
