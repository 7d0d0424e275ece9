"""The simulated world: deterministic, fair, and honest about expected clicks. No broker, no store, no HTTP here."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from streaming.simulation.people import item_id, rows_of
from streaming.simulation.scorecard import Scorecard, play
from streaming.simulation.world import Outcome, Rows, World, visits


def make(seed: int = 1, users: int = 60, items: int = 600) -> World:
    return World(users=users, items=items, seed=seed, start=1_000.0)


def test_the_same_seed_gives_the_same_world_however_time_is_cut() -> None:
    one, other = make(), make()
    one.advance(1_300.0)
    for now in np.arange(1_000.0, 1_300.5, 0.7):
        other.advance(float(now))
    other.advance(1_300.0)
    assert one.live == other.live
    np.testing.assert_array_equal(one.taste, other.taste)
    np.testing.assert_array_equal(one.vectors, other.vectors)
    assert [text.title for text in one.texts] == [text.title for text in other.texts]
    a, b = (w.react(3, np.arange(40), np.random.default_rng(5)) for w in (one, other))
    assert a == b
    assert not np.array_equal(make(seed=2).taste, make().taste)


def test_titles_are_distinct_and_every_item_has_words() -> None:
    world = make(items=2_000)
    assert len({text.title for text in world.texts}) == len(world.texts) >= 2_000
    assert all(text.title and text.tags and text.provider for text in world.texts)
    assert not any("{" in text.title for text in world.texts)


def test_no_slate_beats_the_oracle() -> None:
    world, rng = make(), np.random.default_rng(1)
    for user in range(0, world.users, 7):
        best = world.expected_clicks(user, world.oracle(user, 10))
        for _ in range(50):
            slate = rng.choice(world.live, 10, replace=False)
            assert world.expected_clicks(user, slate) <= best
        assert world.expected_clicks(user, rng.permutation(world.oracle(user, 10))) <= best


def test_the_oracle_leaves_out_what_is_excluded() -> None:
    world = make()
    first = world.oracle(0, 10)
    again = world.oracle(0, 10, frozenset(first[:3].tolist()))
    assert not set(first[:3].tolist()) & set(again.tolist())
    assert first[3:].tolist() == again[:7].tolist()


def test_items_that_a_stack_holds_of_another_world_are_left_out() -> None:
    """A fresh world on a used stack: what it does not know yet has no attraction, and is none of its rows."""
    world = make(items=50)
    ids = [item_id(3), item_id(world.live), item_id(len(world.texts) + 1000), "item-\u00b2", "book-1", item_id(0)]
    rows = rows_of([{"item_id": name} for name in ids], world.live)
    assert rows.tolist() == [3, 0]
    assert world.attraction(1, rows).shape == (2,)
    assert rows_of([], world.live).dtype == np.int64


def test_expected_clicks_agree_with_what_people_do() -> None:
    world, rng = make(users=8), np.random.default_rng(2)
    slate = world.oracle(2, 10)
    expected = world.expected_clicks(2, slate)
    clicks = []
    for _ in range(4_000):
        clicks.append(sum(outcome.kind == "click" for outcome in world.react(2, slate, rng)))
        world.clicked[2].clear()
    error = np.std(clicks) / np.sqrt(len(clicks))
    assert np.mean(clicks) == pytest.approx(expected, abs=4 * error)


def test_higher_positions_are_looked_at_more() -> None:
    world, rng = make(), np.random.default_rng(3)
    views = np.zeros(10)
    for _ in range(2_000):
        for outcome in world.react(0, np.arange(10), rng):
            views[outcome.position] += outcome.kind == "view"
    assert views[0] == 2_000
    np.testing.assert_allclose(views / 2_000, world.looked_at(10), atol=0.05)


def test_tastes_drift_and_sometimes_jump() -> None:
    world = make()
    before, interests = world.taste.copy(), world.interests.copy()
    world.advance(1_030.0)
    near = (before * world.taste).sum(axis=1)
    world.advance(1_900.0)
    far = (before * world.taste).sum(axis=1)
    assert near.mean() > 0.95
    assert far.mean() < near.mean() - 0.1
    assert 0.1 < (interests != world.interests).any(axis=1).mean() < 0.9


def test_items_appear_and_age() -> None:
    world = make()
    assert world.live == 600
    fresh = int(np.flatnonzero(np.isfinite(world.shelf[:600]))[0])
    before = world.attraction(0, np.array([fresh]))[0]
    drift = world.taste.copy()
    world.advance(2_800.0)
    world.taste = drift
    assert 600 < world.live <= len(world.texts)
    assert world.attraction(0, np.array([fresh]))[0] < before
    assert (world.published[: world.live] <= world.now).all()


def test_popularity_is_informative_and_personal_taste_better() -> None:
    """Nothing is learnt here: chance, true popularity, popularity within a followed topic, then the oracle."""
    world, rng = make(users=100, items=2_000), np.random.default_rng(4)
    rows = np.arange(world.live)
    liked = np.mean([world.attraction(user, rows) for user in range(world.users)], axis=0)
    popular = np.argsort(-liked)[:10]
    topical = [rows[world.topic_of[rows] == world.interests[user, 0]] for user in range(world.users)]
    value = {
        "chance": [world.expected_clicks(u, rng.choice(rows, 10, replace=False)) for u in range(world.users)],
        "popular": [world.expected_clicks(u, popular) for u in range(world.users)],
        "topic": [world.expected_clicks(u, r[np.argsort(-liked[r])[:10]]) for u, r in enumerate(topical)],
        "oracle": [world.expected_clicks(u, world.oracle(u, 10)) for u in range(world.users)],
    }
    chance, by_all, by_topic, best = (float(np.mean(values)) for values in value.values())
    assert 4 * chance < by_all
    assert 1.1 * by_all < by_topic < best


def test_an_item_already_clicked_is_less_attractive() -> None:
    world = make()
    before = world.attraction(4, np.array([9, 10]))
    world.clicked[4].add(9)
    after = world.attraction(4, np.array([9, 10]))
    assert after[0] == pytest.approx(before[0] * world.parameters.repeat)
    assert after[1] == before[1]


def test_outcomes_follow_a_click_and_values_are_in_range() -> None:
    world, rng = make(), np.random.default_rng(6)
    done = [o for user in range(world.users) for o in world.react(user, world.oracle(user, 10), rng)]
    clicked = [(o.item, o.position) for o in done if o.kind == "click"]
    assert [(o.item, o.position) for o in done if o.kind == "dwell"] == clicked
    assert all(0 < o.value <= 900 for o in done if o.kind == "dwell")
    assert {o.value for o in done if o.kind == "rating"} <= {1.0, 2.0, 3.0, 4.0, 5.0}
    assert {o.action for o in done if o.kind == "action"} <= {"like", "save", "share", "skip", "hide"}
    found = world.browse(0, rng)
    assert found[0].kind == "click"
    assert all(o.position == -1 for o in found)


def test_visits_come_at_the_rate_asked_for() -> None:
    world = make(users=200)
    coming = visits(world, slates_per_s=20, seconds=300, rng=np.random.default_rng(7))
    slates = sum(1 + len(visit.pauses) for visit in coming)
    assert slates == pytest.approx(6_000, rel=0.1)
    assert all(a.time <= b.time for a, b in itertools.pairwise(coming))


def test_the_lead_is_paired_and_clustered_by_user() -> None:
    world, card, rng = make(), Scorecard([]), np.random.default_rng(8)
    for user in range(40):
        for _ in range(5):
            card.add(world, user, world.oracle(user, 10), rng.choice(world.live, 10, replace=False), 10)
    lead = card.lead(rng=np.random.default_rng(9))
    assert 0 < lead.low < lead.mean < lead.high
    means = card.means()
    assert lead.mean == pytest.approx(means.ours - means.popular)
    assert means.ours == pytest.approx(means.oracle)
    assert np.isnan(card.lead(rng=rng, since=2_000.0).low)  # nothing to say


class Scripted:
    """A recommender that knows the truth (ours) beside one that offers the first items (popular)."""

    def __init__(self, world: World) -> None:
        self.world, self.published, self.heard = world, 0, 0

    def publish(self, rows: Rows, now: float) -> None:
        self.published += len(rows)

    def recommend(self, user: int, n: int, now: float) -> Rows:
        return self.world.oracle(user, n)

    def popular(self, user: int, n: int, now: float) -> Rows:
        return np.arange(n)

    def observe(self, user: int, outcomes: Sequence[Outcome], slate: Rows | None, now: float) -> None:
        self.heard += len(outcomes)


def test_play_scores_every_slate_and_is_deterministic() -> None:
    cards = []
    for _ in range(2):
        world = make()
        scripted = Scripted(world)
        cards.append(play(world, scripted, slates_per_s=5, seconds=60, seed=3))
        assert scripted.published == world.live
        assert scripted.heard > 300
    assert cards[0].entries == cards[1].entries
    means = cards[0].means()
    assert means.slates > 200
    assert means.ours == pytest.approx(means.oracle)
    assert means.popular < means.ours
