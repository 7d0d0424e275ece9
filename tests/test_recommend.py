"""The slate: exclusions, exact propensities, determinism, reasons, trace; each channel's top is exact."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.examples import Shown, item_hash
from models.features import F
from models.items import CatalogueItem, Items
from models.learner import Learner
from models.model import Model
from models.recommend import History, Request, popular, recommend, samples, score_items, similar
from models.retrieval import CHANNELS, NOT_FOUND, QUOTAS, REPEAT, log_into, ranks, top
from models.rows import Rows
from tests.entries import KEYS, NAMES, Walk

END = 1.7e9 + 2e6


@pytest.fixture(scope="module")
def system() -> tuple[Items, Model]:
    rows = Rows()
    items, learner = Items(rows=rows), Learner(rows=rows)
    entries = Walk(n=600, width=F).entries()
    items.fold(entries)
    for at in range(0, 600, 20):
        learner.learn(entries.slice(at, at + 20, []))
    return items, learner.model


def history(*places: int) -> History:
    keys = KEYS[list(places)]
    times = END - 60.0 * np.arange(1.0, len(places) + 1)
    return History(keys, times, np.ones(len(places), np.uint8), (keys & np.uint64(0xFFFFFFFF)).astype(np.uint32))


def test_a_slate(system: tuple[Items, Model]) -> None:
    items, model = system
    slate = recommend(items, model, history(3, 4), Request("s", END, keep_candidates=True))
    assert len(slate.rows) == len(set(slate.rows.tolist())) == 10
    assert not set(slate.candidates.tolist()) & set(KEYS[[3, 4]].tolist())
    assert slate.features.shape == (len(slate.candidates), F)
    assert np.isfinite(slate.features).all()
    assert len(slate.reasons) == 10
    assert all(slate.reasons)
    assert [items.rows.keys[row] for row in slate.rows] == slate.items.tolist()
    again = recommend(items, model, history(3, 4), Request("s", END, keep_candidates=True))
    np.testing.assert_array_equal(again.items, slate.items)


def test_an_item_scores_alike_in_a_slate_and_by_itself(system: tuple[Items, Model]) -> None:
    items, model = system
    request, capacity = Request("s", END, n=20, policy="greedy", keep_candidates=True), items.rows.capacity
    slate = recommend(items, model, history(3, 4), request)
    scores = score_items(items, model, history(3, 4), request, slate.candidates)
    np.testing.assert_array_equal(scores.astype(np.float32), slate.candidate_scores)
    strange = np.array([slate.candidates[0], 12345, 54321, slate.candidates[0]], np.uint64)
    found = score_items(items, model, history(3, 4), request, strange)
    assert found[0] == found[3] == scores[0]
    assert found[1] == found[2]
    assert np.isfinite(found).all()
    assert (items.rows.find(strange)[1:3] == -1).all()  # scoring gives nobody a row
    assert items.rows.capacity == capacity
    nobody = Rows()
    assert np.isfinite(score_items(Items(rows=nobody), Model(rows=nobody), History(), request, strange)).all()


def test_greedy_is_in_order_of_score(system: tuple[Items, Model]) -> None:
    slate = recommend(*system, history(3), Request("s", END, policy="greedy"))
    assert all(a >= b for a, b in pairwise(slate.scores.tolist()))
    assert slate.propensities.tolist() == [1.0] * 10
    assert slate.scores[0] == slate.candidate_scores.max()


def test_a_score_does_not_depend_on_the_other_candidates(system: tuple[Items, Model]) -> None:
    wide = recommend(*system, history(3), Request("s", END, policy="greedy"))
    scores = dict(zip(wide.candidates.tolist(), wide.candidate_scores.tolist(), strict=True))
    narrow = recommend(*system, history(3), Request("s", END, policy="greedy", exclude=wide.items[:5]))
    assert not set(narrow.candidates.tolist()) & set(wide.items[:5].tolist())
    for key, score in zip(narrow.candidates.tolist(), narrow.candidate_scores.tolist(), strict=True):
        assert scores.get(key, score) == score


def test_seen_excluded_categories_deleted() -> None:
    rows = Rows()
    items, model = Items(rows=rows), Model(rows=rows)
    for i in range(20):
        item = CatalogueItem(title=f"T{i}", categories=["even" if i % 2 == 0 else "odd"], deleted=i == 8)
        items.set_item(int(KEYS[i]), NAMES[i], item)

    def offered(**changes: object) -> set[int]:
        request = Request("s", END, n=30, policy="greedy", **changes)  # type: ignore[arg-type]
        return {NAMES.index(items.ids[row]) for row in recommend(items, model, history(1, 2), request).rows}

    assert offered() == set(range(20)) - {1, 2, 8}
    assert offered(seen="include") == set(range(20)) - {8}
    assert offered(exclude=KEYS[[4, 59]]) == set(range(20)) - {1, 2, 4, 8}
    assert offered(categories=frozenset({"even"})) == set(range(0, 20, 2)) - {2, 8}
    assert offered(categories=frozenset({"none"})) == set()


def test_an_empty_catalogue_gives_an_empty_slate() -> None:
    rows = Rows()
    slate = recommend(Items(rows=rows), Model(rows=rows), History(), Request("s", 1e9, trace=True))
    assert (len(slate.rows), slate.reasons) == (0, [])
    assert popular(Items(rows=rows), Model(rows=rows), 5, KEYS[:0], 1e9) == []
    assert similar(Items(rows=rows), Model(rows=rows), 5, 5) == []


def test_the_impression_carries_what_the_learner_needs(system: tuple[Items, Model]) -> None:
    for keep in (True, False):
        slate = recommend(*system, history(3), Request("s", END, keep_candidates=keep, surface="home"))
        shown = Shown.from_bytes(slate.impression().to_bytes())
        assert shown.slate == item_hash("s")
        assert (len(shown.candidates) > 10) == keep
        np.testing.assert_array_equal(shown.items, slate.items)
        np.testing.assert_array_equal(shown.candidates, slate.candidates if keep else slate.items)
        assert shown.features.shape == (len(shown.candidates), F)
        assert (shown.policy, shown.surface) == ("epsilon", "home")


def test_the_share_of_kept_slates() -> None:
    share = np.mean([samples(f"s{i}", 0.1) for i in range(4000)])
    assert 0.08 < share < 0.12
    assert samples("any", 1.0)
    assert not samples("any", 0.0)


def test_own_recent_items_come_back_when_seen_is_included(system: tuple[Items, Model]) -> None:
    slate = recommend(*system, history(3, 9), Request("s", END, seen="include", keep_candidates=True))
    recent = {int(k) for k, c in zip(slate.candidates, slate.candidate_channels, strict=True) if c == 5}
    assert recent <= set(KEYS[[3, 9]].tolist())
    assert set(KEYS[[3, 9]].tolist()) <= set(slate.candidates.tolist())


def test_own_items_beyond_the_sequence_are_repeated(system: tuple[Items, Model]) -> None:
    """The seen list reaches further than the sequence: what lies in it alone comes back by the channel `repeat`."""
    past = history(3, 9)
    past.seen = (KEYS[[40, 41, 3, 9]] & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    few = Request("s", END, seen="include", exclude=KEYS[[41]])
    slate = recommend(*system, past, few)
    place = {int(key): row[REPEAT] for key, row in zip(slate.candidates, slate.places, strict=True)}
    own = [key for key in place if place[key] != NOT_FOUND]
    assert sorted(own) == sorted(KEYS[[40, 3, 9]].tolist())
    assert sorted(place[key] for key in own) == [0, 1, 2]
    slate = recommend(*system, past, Request("s", END))
    assert (slate.places[:, REPEAT] == NOT_FOUND).all()


def test_places_are_those_of_the_channels(system: tuple[Items, Model]) -> None:
    slate = recommend(*system, history(3, 9), Request("s", END, seen="include"))
    found = slate.places != NOT_FOUND
    assert found.any(1).all()
    for c in range(len(CHANNELS)):
        assert sorted(slate.places[found[:, c], c].tolist()) == list(range(int(found[:, c].sum())))
        assert found[:, c].sum() <= QUOTAS[c]
    best = slate.places.min(1)
    at = slate.candidate_channels.astype(np.int64)
    np.testing.assert_array_equal(slate.places[np.arange(len(at)), at], best)


def test_the_trace_names_channels_and_times(system: tuple[Items, Model]) -> None:
    ticks = iter(range(100))
    slate = recommend(*system, history(3), Request("s", END, trace=True), clock=lambda: float(next(ticks)))
    assert set(slate.trace["channels"]) == set(CHANNELS)
    assert slate.trace["stages"] == {"retrieve_ms": 1e3, "rank_ms": 1e3, "draw_ms": 1e3}
    assert slate.trace["scores"][0]["score"] == pytest.approx(float(slate.candidate_scores.max()), rel=1e-5)


def test_popular_and_similar(system: tuple[Items, Model]) -> None:
    items, model = system
    best = popular(items, model, 5, KEYS[:1], END, "none")
    counts = items.popularity.weights[: items.n, 7].copy()
    counts[items.rows.find(KEYS[:1])] = 0
    assert best[0][0] in np.flatnonzero(counts == counts.max())
    with pytest.raises(ValueError, match="half_life"):
        popular(items, model, 5, KEYS[:0], END, "3d")
    near = similar(items, model, int(KEYS[7]), 5)
    assert len(near) == 5
    assert {NAMES.index(items.ids[row]) for row, _ in near} & {6, 8}
    assert similar(items, model, 999, 5) == []


def test_ranks_are_the_mid_ranks_of_popularity(system: tuple[Items, Model]) -> None:
    items, model = system
    blocked = np.zeros(items.n, np.uint8)
    blocked[3] = 1
    for h, name in ((2, "2h"), (7, "none")):
        order = popular(items, model, items.n, items.rows.keys[[3]], END, name)
        scores = dict(order)
        row = order[4][0]
        rank = ranks(items.arrays(), items.n, blocked, row, items.popularity.at(END), float(items.n))[h]
        above = sum(s > scores[row] for s in scores.values())
        assert above <= rank <= above + sum(s == scores[row] for s in scores.values()) - 1


@given(st.lists(st.integers(0, 30), min_size=1, max_size=200), st.integers(1, 40))
def test_top_is_exact(values: list[int], k: int) -> None:
    scores, blocked = np.array(values, np.float32), np.zeros(len(values), np.uint8)
    blocked[::3] = 1
    found = top(scores, len(scores), blocked, k)
    open_rows = np.flatnonzero(blocked == 0)
    assert scores[found].tolist() == sorted(scores[open_rows].tolist(), reverse=True)[:k]
    assert not blocked[found].any()


def test_the_fast_logarithm() -> None:
    values = np.exp(np.random.default_rng(0).uniform(-40, 5, 5000)).astype(np.float32)
    out = np.empty_like(values)
    log_into(values, len(values), out)
    np.testing.assert_allclose(out, np.log(values), atol=2e-5)


def test_quotas_have_names() -> None:
    assert len(QUOTAS) == len(CHANNELS)
