"""Time: late and out-of-order events end in the decayed state of in-order ones, a clock ahead owns no list."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.decay import HALF_LIVES
from models.examples import VOICE, Entries, accept, item_hash
from models.factors import Factors
from models.items import Items
from models.profile import Profiles
from models.rows import Rows
from streaming.events import Click, Weights, encode
from streaming.learn import UserFold, decode_part, users_of
from streaming.state import MemoryUserStore
from streaming.supervision import Progress
from tests.event_streams import T0

ITEMS, YEAR = 5, 365 * 86400
Stream = Sequence[tuple[float, str, str, float]]
"""(record time, user, item, ts), s."""

times = st.one_of(st.floats(0, 600), st.floats(0, 86_400), st.floats(0, 3 * YEAR))


@st.composite
def shuffled(draw: st.DrawFn) -> tuple[Stream, Stream]:
    """Return the same clicks in order and in any other: users act once on an item (one voice), at most 50 each."""
    ages = draw(st.lists(times, min_size=2, max_size=60))
    events = [(f"u{i % 12}", f"i{i // 12 % ITEMS}", T0 - age) for i, age in enumerate(ages)]
    late = draw(st.permutations(events))
    return [[(T0, *event) for event in order] for order in (sorted(events, key=lambda e: e[2]), late)]  # type: ignore[return-value]


def fold(stream: Stream) -> tuple[MemoryUserStore, Entries, Items]:
    """Fold clicks into profiles and item rows, one micro-batch."""
    store, items = MemoryUserStore(), Items(rows=Rows())
    records = [
        (i, round(at * 1000), encode(Click(user_id=user, item_id=item, ts=ts)))
        for i, (at, user, item, ts) in enumerate(stream)
    ]
    part = decode_part("events", 0, records)
    assert not part.dead
    outcome = UserFold(Weights()).fold([part], {0: store.read_now(0, users_of([part])[0])})
    store.commit_now(outcome.writes[0])
    (entries,) = outcome.records
    items.fold(accept(entries, {}))
    return store, entries, items


def popularity(items: Items, now: float) -> NDArray[np.float64]:
    """Return the decayed counts f64[items, 8] at `now`, and their totals as the last row."""
    rows = items.rows.find(np.array([item_hash(f"i{i}") for i in range(ITEMS)], np.uint64))
    found = list[NDArray[np.float64]]()
    for weights, cells in [(items.popularity.weights[r], items.popularity.cells[r]) for r in rows if r >= 0] + [
        (items.popularity.totals, items.popularity.total_cells)
    ]:
        decayed = []
        for half, weight, cell in zip(HALF_LIVES, weights, cells, strict=True):
            rate = math.log(2) / half
            decayed.append(weight * math.exp(max(30.0 * float(cell) - rate * now, -700.0)) if weight else 0.0)
        found.append(np.array(decayed))
    return np.array(found)


def direct(stream: Stream, now: float) -> NDArray[np.float64]:
    """Return the same by the definition: a sum over all events of 2^-(age / H)."""
    ages: dict[str, list[float]] = {}
    for _, _, item, ts in stream:
        ages.setdefault(item, []).append(now - ts)
    rows = [ages[item] for item in sorted(ages)]
    rows.append([age for row in rows for age in row])
    return np.array([[sum(2.0 ** -(age / half) for age in row) for half in HALF_LIVES] for row in rows])


@hypothesis_settings(max_examples=80, deadline=None)
@given(shuffled())
def test_out_of_order_and_very_late_events_decay_as_in_order(orders: tuple[Stream, Stream]) -> None:
    in_order, late = (popularity(fold(stream)[2], T0) for stream in orders)
    np.testing.assert_allclose(late, in_order, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(late, direct(orders[0], T0), rtol=1e-8, atol=1e-12)


@hypothesis_settings(max_examples=40, deadline=None)
@given(shuffled())
def test_decayed_user_embeddings_do_not_depend_on_the_order(orders: tuple[Stream, Stream]) -> None:
    found = []
    for stream in orders:
        store, _, items = fold(stream)
        factors = Factors(rows=items.rows)
        users = sorted(user for kind, _, user in store.values if kind == "profile")
        profiles = Profiles([store.values["profile", 0, user] for user in users], [None] * len(users))
        found.append(
            factors.decayed_embeddings(
                profiles.item, profiles.time, profiles.n, profiles.times[:, 1], np.arange(len(users))
            )
        )
        assert profiles.times[:, 1].max() <= T0
    np.testing.assert_allclose(found[1].astype(float), found[0].astype(float), rtol=2e-3, atol=1e-5)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 30_000), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_one_voice_an_hour_in_whatever_order(ages: list[float], random: object) -> None:
    random.shuffle(ages)  # type: ignore[attr-defined]
    _, entries, _ = fold([(T0, "u", "i0", T0 - age) for age in ages])
    voiced = np.sort(entries.time[(entries.flags & VOICE) > 0])
    assert len(voiced) >= 1
    assert (np.diff(voiced) >= 3600.0).all()


@hypothesis_settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 3600), st.floats(0, 300)), min_size=1, max_size=30))
def test_a_client_whose_clock_is_ahead_is_not_favoured(clicks: list[tuple[float, float]]) -> None:
    """One item's clicks say the right time, the other's up to 5 minutes more: both count the same."""
    clicks = sorted(clicks)
    honest = [(T0 + at, f"u{i}", "i0", T0 + at) for i, (at, _) in enumerate(clicks)]
    ahead = [(T0 + at, f"v{i}", "i1", T0 + at + skew) for i, (at, skew) in enumerate(clicks)]
    stream = sorted(honest + ahead)
    # Record times are whole milliseconds in Kafka: an honest client is never ahead of them.
    stream = [(math.ceil(at * 1000) / 1000, user, item, ts) for at, user, item, ts in stream]
    store, entries, items = fold(stream)
    counts = popularity(items, stream[-1][0])
    assert (entries.time <= [at for at, *_ in stream]).all()
    np.testing.assert_allclose(counts[1], counts[0], rtol=1e-3 * math.log(2) / HALF_LIVES[0] * 10)
    assert items.popularity.last[0] <= stream[-1][0]
    for kind, _, user in store.values:
        if kind == "profile":
            assert Profiles([store.values["profile", 0, user]], [None]).times[0, 1] <= stream[-1][0]


def test_clock_skew_shows_in_the_curves_of_the_workers_by_size_and_with_its_sign() -> None:
    progress = Progress()
    progress.skews_s = [0.01] * 90 + [-280.0] * 10
    figures = progress.take()
    assert (figures["skew_p50_s"], figures["skew_p99_s"]) == (0.01, -280.0)
    assert progress.take()["skew_p99_s"] == 0.0
