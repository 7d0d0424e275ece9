"""What outcomes are worth: learnt one by one whatever the cut, scored by the number that is judged, stored and read."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from models.examples import ACTION, DWELL, RATING, CodecError, Entries, concatenate
from models.factors import pack_named, unpack_named
from models.learner import Learner
from models.model import STATE_ROW, Model
from models.recommend import History, Request, recommend
from models.rows import Rows
from models.values import HEADS, Judge, Values
from streaming.events import Action, Click, Dwell, Event, Rating, Weights, encode
from streaming.learn import UserFold, decode_part, users_of
from streaming.state import MemoryUserStore
from tests.event_streams import T0, records

RATED, DWELT, SKIP, HIDE, LOW = range(5)


def folded(stream: list[tuple[int, int, bytes]], codec: int = 3) -> Entries:
    part = decode_part("events", 0, stream)
    read = MemoryUserStore().read_now(0, users_of([part])[0])
    return concatenate(UserFold(Weights(), codec=codec).fold([part], {0: read}).records)


def told(events: list[Event]) -> Entries:
    return folded([(i, round((T0 + i) * 1000), encode(event)) for i, event in enumerate(events)])


def outcomes(entries: Entries) -> tuple[np.ndarray, np.ndarray]:
    judged = np.flatnonzero((entries.kind <= ACTION) & (entries.target != 0))
    return judged, entries.target[judged]


def made(seed: int = 0) -> tuple[Rows, np.ndarray]:
    """Return rows of the items of `records` and vectors for them."""
    rows, keys = Rows(), np.unique(folded(records(1, 300)).target)
    rows.add(keys[keys != 0])
    vectors = np.random.default_rng(seed).normal(size=(rows.capacity, 64)).astype(np.float32)
    return rows, vectors


def taught(values: Values, entries: Entries, vectors: np.ndarray) -> np.ndarray:
    judged, keys = outcomes(entries)
    return values.learn(entries, judged, values.rows.add(keys), vectors)


def state(values: Values) -> list[bytes]:
    return [values.stats.tobytes(), *(array.tobytes() for array in values.state().values())]


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(1, 199), max_size=6))
def test_any_cut_gives_equal_bytes(seed: int, places: list[int]) -> None:
    entries, (rows, vectors) = folded(records(seed, 200)), made()
    whole, pieces = Values(rows=rows), Values(rows=rows)
    said = taught(whole, entries, vectors)
    limits = sorted({0, len(entries), *(p for p in places if p < len(entries))})
    parts = [taught(pieces, entries.slice(a, b, []), vectors) for a, b in itertools.pairwise(limits)]
    np.testing.assert_array_equal(np.concatenate(parts), said)
    assert state(pieces) == state(whole)


def test_what_is_scored_is_what_is_judged() -> None:
    """Before each outcome, scoring its item for its user gives the number that the learner then compares."""
    entries, (rows, vectors) = folded(records(3, 150)), made()
    values = Values(rows=rows)
    for i in range(len(entries)):
        one = entries.slice(i, i + 1, [])
        if not len(outcomes(one)[0]):
            continue
        judge = Judge(
            rows.find(one.history_item), one.history_kind, one.history_weight.astype(np.float32), rows.find(one.averse),
            one.tally[0],
        )  # fmt: skip
        row, every = rows.find(one.target), np.arange(rows.n)
        alone = values.score(row, judge, vectors)
        np.testing.assert_array_equal(values.score(every, judge, vectors)[row], alone)
        np.testing.assert_array_equal(taught(values, one, vectors), alone)


def test_it_learns_who_and_what_is_rated_how() -> None:
    rng, events = np.random.default_rng(0), list[Event]()
    for i in range(3000):
        user, item = int(rng.integers(30)), int(rng.integers(40))
        star = float(np.clip(round(3 + (item % 5 - 2) * 0.6 + (user % 3 - 1) * 0.7 + 0.4 * rng.normal()), 1, 5))
        events.append(Rating(user_id=f"u{user}", item_id=f"i{item}", ts=T0 + i, value=star))
    entries, values = told(events), Values(rows=Rows())
    said = taught(values, entries, np.zeros((64, 64), np.float32))[1500:]
    actual = entries.value[1500:]
    assert np.mean((said[:, RATED] - actual) ** 2) < 0.25 * actual.var()
    low = actual < -1 / 3
    assert said[low, LOW].mean() > said[~low, LOW].mean() + 0.3
    assert not said[:, [SKIP, HIDE]].any()  # nobody ever did
    assert values.speaking.tolist() == [True, False, False, False, True]


def test_it_learns_who_hides_what_and_who_stays() -> None:
    rng, events = np.random.default_rng(0), list[Event]()
    for i in range(3000):
        user, item = f"u{rng.integers(20)}", int(rng.integers(40))
        at: dict[str, Any] = {"user_id": user, "item_id": f"i{item}", "ts": T0 + i}
        if rng.random() < (0.8 if item % 4 == 0 else 0.05):
            events.append(Action(name="hide", **at))
        else:
            events += [Click(**at), Dwell(seconds=float(rng.exponential(300 if user in ("u1", "u2") else 20)), **at)]
    entries, values = told(events), Values(rows=Rows())
    said = taught(values, entries, np.zeros((64, 64), np.float32))
    late = np.arange(len(entries)) > len(entries) // 2
    hidden = late & (entries.kind == ACTION)
    assert said[hidden, HIDE].mean() > said[late & ~hidden, HIDE].mean() + 0.4
    stayed = said[late & (entries.kind == DWELL), DWELT]
    assert abs(stayed.mean()) < 0.3  # beside what they usually have nobody stays longer than usual
    assert values.counts.tolist() == [0, (entries.kind == DWELL).sum(), (entries.kind != DWELL).sum()]


def test_the_learner_keeps_and_brings_back_all_of_it() -> None:
    entries = folded(records(5, 300))
    parts = [entries.slice(at, min(at + 9, len(entries)), []) for at in range(0, len(entries), 9)]
    straight, again = Learner(rows=Rows()), Learner(rows=Rows())
    for part in parts[:20]:
        straight.learn(part)
    rows = np.arange(straight.rows.n)
    blobs = straight.pack_state(rows)
    size = STATE_ROW.itemsize
    assert {(blob[0], len(blob)) for blob in blobs} <= {(1, size), (2, size + 32)}
    assert any(blob[0] == 2 for blob in blobs)
    again.load_state(straight.rows.keys[rows], blobs)
    again.load_dense(straight.dense_state())
    for part in parts[20:]:
        one, two = straight.learn(part), again.learn(part)
        assert (one.rated, one.rating_error) == (two.rated, two.rating_error)
    keys = straight.rows.keys[: straight.rows.n]
    assert again.pack_state(again.rows.find(keys)) == straight.pack_state(np.arange(straight.rows.n))
    assert again.dense_state() == straight.dense_state()
    served = Model(rows=Rows())
    served.load_rows(keys, straight.model.pack_rows(np.arange(straight.rows.n)))
    served.load_dense(straight.model.dense_bytes())
    np.testing.assert_array_equal(served.values.stats[: len(keys)], straight.model.values.stats[: len(keys)])
    served.remove(keys)
    assert not served.values.stats.any()


def test_what_was_stored_before_is_read() -> None:
    learner = Learner(rows=Rows())
    learner.learn(folded(records(5, 100)))
    old = {k: v for k, v in unpack_named(learner.dense_state()).items() if not k.startswith("values_")}
    again = Learner(rows=Rows())
    again.load_dense(pack_named(old))
    np.testing.assert_array_equal(again.model.values.weights, Values(rows=Rows()).weights)
    blob = learner.pack_state(np.array([0]))[0]
    first = b"\x01" + blob[1 : STATE_ROW.itemsize]
    rows = again.load_state(learner.rows.keys[:1], [first])
    assert not again.model.values.stats[rows].any()
    with pytest.raises(CodecError, match="version 1 or 2, form 2"):
        again.load_state(learner.rows.keys[:1], [blob[:-1]])
    with pytest.raises(CodecError, match="values_world"):
        again.load_dense(pack_named({**old, "values_world": np.full(7, np.nan)}))


def test_records_of_version_1_teach_it_nothing() -> None:
    """They do not say how their user rates; so all rows stay of version 1, which the release before reads."""
    learner, stream = Learner(rows=Rows()), records(5, 200)
    learner.learn(Entries.from_bytes(folded(stream, codec=2).to_bytes()))
    assert not learner.model.values.stats.any()
    assert {blob[0] for blob in learner.pack_state(np.arange(learner.rows.n))} == {1}
    learner.learn(folded(stream))
    assert learner.model.values.stats.any()


def test_nothing_makes_it_other_than_finite() -> None:
    entries, (rows, vectors) = folded(records(2, 200)), made()
    rng = np.random.default_rng(0)
    entries.tally = rng.choice([0.0, 1e38, -1e38, np.nan, np.inf], entries.tally.shape).astype(np.float32)
    entries.history_weight = rng.choice([1.0, np.inf, np.nan, -6e4], len(entries.history_item)).astype(np.float16)
    entries.value = np.where(entries.kind == RATING, rng.choice([1e300, np.nan, -np.inf], len(entries)), 1e300)
    vectors[::3] = 3e38
    vectors[1] = np.nan
    values = Values(rows=rows)
    values.stats[:5] = np.array([np.nan, np.inf, -5.0, 1e38, -1.0, 9.0, np.inf, np.nan])
    said = taught(values, entries, vectors)
    assert np.isfinite(said).all()
    assert np.isfinite(values.weights).all()
    assert (np.abs(said[:, RATED]) <= 1).all()
    assert ((said[:, SKIP:] >= 0) & (said[:, SKIP:] <= 1)).all()


def test_heads_reach_the_slate() -> None:
    """With a weight on `hide`, what a user keeps hiding sinks."""
    from models.items import Items

    rng, events = np.random.default_rng(0), list[Event]()
    for i in range(1200):
        item = int(rng.integers(30))
        at: dict[str, Any] = {"user_id": f"u{rng.integers(20)}", "item_id": f"i{item}", "ts": T0 + i}
        events.append(Click(**at))
        if item % 3 == 0:
            events.append(Action(name="hide", **at))
    entries, rows = told(events), Rows()
    items, learner = Items(rows=rows), Learner(rows=rows)
    items.fold(entries)
    for first in range(0, len(entries), 50):
        learner.learn(entries.slice(first, min(first + 50, len(entries)), []))

    def share(weight: float) -> float:
        weights = np.array([1.0, 0.0, 0.0, 0.0, weight, 0.0])
        request = Request("s", T0 + 1300, policy="greedy", seen="include", weights=weights, trace=True)
        slate = recommend(items, learner.model, History(), request)
        return float(np.mean([int(items.ids[row][1:]) % 3 == 0 for row in slate.rows]))

    assert share(-20.0) == 0.0 < share(20.0)
    assert len(HEADS) == 5
