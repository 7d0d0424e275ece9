"""A crowd that grows and shrinks, a topic that surges, and how soon that is noticed. Pure: no broker, no HTTP."""

from __future__ import annotations

import numpy as np
import pytest

from streaming.simulation.scorecard import Scorecard
from streaming.simulation.trend import BASE_S, FEWEST, SURE, TOPICS, Share, Trend
from streaming.simulation.world import World, visits

PER_S = 25.0


def make(users: int = 60, seed: int = 1) -> World:
    return World(users=users, items=600, seed=seed, start=1_000.0)


def test_growing_leaves_the_first_people_as_they_are_and_does_not_depend_on_the_steps() -> None:
    small, at_once, by_steps = make(), make(), make()
    at_once.grow(90)
    by_steps.grow(70)
    by_steps.grow(90)
    by_steps.grow(80)  # nobody leaves
    assert at_once.users == by_steps.users == len(by_steps.clicked) == 90
    np.testing.assert_array_equal(at_once.taste[:60], small.taste)
    np.testing.assert_array_equal(at_once.activity[:60], small.activity)
    np.testing.assert_array_equal(at_once.taste, by_steps.taste)
    np.testing.assert_array_equal(at_once.activity, by_steps.activity)
    at_once.advance(1_010.0)
    assert not np.array_equal(at_once.taste[60:], by_steps.taste[60:])  # they drift as the first do
    assert len(at_once.react(89, np.arange(10), np.random.default_rng(1))) > 0


def test_newcomers_follow_the_laws_of_the_first() -> None:
    world = make(users=300)
    world.grow(600)
    for name in ("bias", "activity"):
        first, later = getattr(world, name)[:300], getattr(world, name)[300:]
        assert later.mean() == pytest.approx(first.mean(), abs=4 * first.std() / np.sqrt(150))
        assert later.std() == pytest.approx(first.std(), rel=0.5)
    np.testing.assert_allclose(np.linalg.norm(world.taste, axis=1), 1.0)


def test_only_those_invited_come() -> None:
    world = make(users=200)
    world.grow(300)
    for people in (1, 50, 300):
        coming = visits(world, slates_per_s=20, seconds=100, rng=np.random.default_rng(2), people=people)
        assert {visit.user for visit in coming} <= set(range(people))
    everybody = {visit.user for visit in visits(world, slates_per_s=50, seconds=300, rng=np.random.default_rng(2))}
    assert len(everybody) > 280
    assert max(everybody) == 299


def test_a_surge_lifts_its_topic_for_everybody_fades_and_ends() -> None:
    world = make()
    p, rows = world.parameters, np.arange(world.live)
    world.topic_of[0], world.topic_of[1] = 3, 4
    plain = world.attraction(5, rows)
    world.surge(3)
    assert world.surge_strength() == 1.0
    now = world.attraction(5, rows)
    lifted = np.log(now / (1 - now)) - np.log(plain / (1 - plain))
    np.testing.assert_allclose(lifted, np.where(world.topic_of[rows] == 3, p.surge_lift, 0.0), atol=1e-9)
    world.now += p.surge_half_life_s
    assert world.surge_strength() == pytest.approx(0.5)
    world.now = 1_000.0 + p.surge_s
    assert world.surge_strength() == 0.0
    assert world.attraction(5, rows)[0] == pytest.approx(make_at(p.surge_s, rows)[0])


def make_at(passed: float, rows: np.ndarray) -> np.ndarray:
    world = make()
    world.now += passed
    return world.attraction(5, rows)


def test_while_a_topic_surges_more_is_found_without_us_and_the_best_slates_hold_more_of_it() -> None:
    world, rng = make(), np.random.default_rng(3)
    topic = 7

    def browsing() -> tuple[float, float, float]:
        drawn = np.mean([world.browses(rng) for _ in range(2_000)])
        found = [world.topic_of[world.browse(user, rng)[0].item] == topic for user in range(60) for _ in range(5)]
        for known in world.clicked:
            known.clear()
        best = [np.mean(world.topic_of[world.oracle(user, 10)] == topic) for user in range(60)]
        return float(drawn), float(np.mean(found)), float(np.mean(best))

    before = browsing()
    world.surge(topic)
    after = browsing()
    assert before[0] == pytest.approx(0.3, abs=0.05)
    assert after[0] == pytest.approx(0.8, abs=0.05)
    assert after[1] > 2 * before[1]
    assert after[2] > 2 * before[2]


def test_no_slate_beats_the_oracle_while_a_topic_surges() -> None:
    world, rng, card = make(), np.random.default_rng(4), Scorecard([])
    world.surge(2)
    for user in range(0, 60, 7):
        for _ in range(20):
            entry = card.add(world, user, rng.choice(world.live, 10, replace=False), np.arange(10), 10)
            assert max(entry.ours, entry.popular) <= entry.oracle


def test_the_error_of_a_share_is_that_of_sums_over_people() -> None:
    share, rng = Share(), np.random.default_rng(5)
    users, values = rng.integers(0, 9, 200), rng.random(200)
    for user, value in zip(users.tolist(), values.tolist(), strict=True):
        share.add(user, value)
    off = np.bincount(users, values - values.mean())
    assert share.mean == pytest.approx(values.mean())
    assert share.error == pytest.approx(np.sqrt((off**2).sum() * 9 / 8) / 200)
    one = Share()
    one.add(1, 0.5)
    assert one.error == np.inf


def played(seed: int, lift: float, *, seconds: float, before: float = BASE_S) -> Trend:
    """Slates of 100 people with tastes of their own; the share of topic 0 rises by `lift` when the surge begins."""
    rng = np.random.default_rng(seed)
    tastes = rng.dirichlet(np.full(TOPICS, 0.25), 100).cumsum(axis=1)
    trend, users = Trend(), rng.integers(0, 100, int((before + seconds) * PER_S))
    for k, user in enumerate(users.tolist()):
        now = k / PER_S - before
        if now >= 0 and trend.watched is None:
            trend.begin(0, now)
        slots = np.searchsorted(tastes[user], rng.random(10)).clip(0, TOPICS - 1)
        if trend.watched is not None:
            slots[rng.random(10) < lift] = 0
        trend.add(now, user, slots, [0] * 10)
    return trend


def test_a_surge_is_noticed_the_sooner_the_stronger_it_is() -> None:
    weak, strong = ([played(seed, lift, seconds=60) for seed in range(6)] for lift in (0.1, 0.5))
    times = [[trend.watched.noticed for trend in trends if trend.watched is not None] for trends in (weak, strong)]
    assert all(time is not None and time > FEWEST / PER_S - 0.1 for time in times[1])
    assert np.median([time or 60 for time in times[0]]) > 1.5 * np.median([time or 60 for time in times[1]])
    ours, best = played(1, 0.5, seconds=20).shares()
    assert ours.sum() == pytest.approx(1.0)
    assert ours[0] > 0.5
    assert best[0] == 1.0


def test_without_a_surge_hardly_ever_a_false_alarm() -> None:
    assert SURE == 4.0
    alarms = [played(seed, 0.0, seconds=100).watched for seed in range(20)]
    assert sum(watched is None or watched.noticed is not None for watched in alarms) == 0


def test_without_enough_slates_before_it_nothing_is_noticed() -> None:
    trend = played(1, 0.5, seconds=20, before=0.5)
    assert trend.watched is not None
    assert np.isnan(trend.watched.base)
    assert trend.watched.noticed is None
    trend.end()
    assert trend.watched is None
    assert np.isnan(Trend().shares()[0]).all()
