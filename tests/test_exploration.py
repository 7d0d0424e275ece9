"""The simulated world as a test bed of policies: trials, presets, discovery, the check of propensities, the report."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from infra.proving import exploration as x
from models.bandit import POLICIES, Policy, propensities
from streaming.simulation.informed import Informed
from streaming.simulation.scorecard import Play
from streaming.simulation.trial import Trial
from streaming.simulation.world import Outcome, Rows, World

SMALL = x.Size(users=20, items=40, warmup_s=10.0, after_s=30.0, block_s=10.0, lookups=5)


@pytest.fixture(scope="module")
def played() -> Play:
    return x.warmed("drifting", 3, SMALL)


def test_a_run_is_a_function_of_its_seed_and_forks_go_on_alike(played: Play) -> None:
    again = x.warmed("drifting", 3, SMALL)
    assert again.card.entries == played.card.entries
    assert len(played.card.entries) > 20
    one, other = x.goes_on(played, "drifting", "thompson", SMALL), x.goes_on(again, "drifting", "thompson", SMALL)
    assert one == other
    assert x.goes_on(played, "drifting", "epsilon", SMALL) != one
    straight = copy.deepcopy(played)  # a fork is as good as what it was forked from
    for play in (again, straight):
        play.until(x.START + 20.0)
    assert again.card.entries == straight.card.entries


class Oracle:
    """A recommender that knows the truth."""

    def __init__(self, world: World) -> None:
        self.world = world

    def publish(self, rows: Rows, now: float) -> None:
        pass

    def recommend(self, user: int, n: int, now: float) -> Rows:
        return self.world.oracle(user, n)

    def popular(self, user: int, n: int, now: float) -> Rows:
        return self.world.oracle(user, n)

    def observe(self, user: int, outcomes: Sequence[Outcome], slate: Rows | None, now: float) -> None:
        pass


def test_who_knows_the_items_learns_the_people() -> None:
    """Tastes inferred from what was looked at come nearer to the true ones, and it earns more than what all like."""
    world = World(users=20, items=100, seed=5, start=x.START, parameters=x.PRESETS["stationary"].parameters)
    people, card = Informed(world), x.Ledger([])
    before = float((world.taste @ people.mean).mean())
    Play(world, people, slates_per_s=5.0, seconds=60.0, seed=5, card=card).until()
    inferred = np.array([people.taste(user) for user in range(world.users)])
    after = float((inferred * world.taste).sum(1).mean())
    assert after > before + 0.1
    welcome = np.argsort(-world.welcome(np.arange(100)))[:10]
    regret = np.mean([entry.oracle - entry.ours for entry in card.entries])
    assert regret > 0.0
    assert np.mean([entry.ours for entry in card.entries]) > np.mean(
        [world.expected_clicks(user, welcome) for user in range(world.users)]
    )
    assert x.informed("drifting", 3, SMALL) == x.informed("drifting", 3, SMALL)
    assert x.informed("abrupt", 3, SMALL) != x.informed("stationary", 3, SMALL)


def test_the_best_slates_have_no_regret_and_find_what_is_good() -> None:
    many = replace(x.PRESETS["drifting"].parameters, arrivals=0.5)
    world = World(users=30, items=40, seed=2, start=x.START, parameters=many)
    card = x.Ledger([])
    play = Play(world, Oracle(world), slates_per_s=5.0, seconds=80.0, seed=2, card=card)
    play.until()
    assert [entry.ours for entry in card.entries] == [entry.oracle for entry in card.entries]
    times = np.array([entry.time for entry in card.entries])
    found = x.discovered(world, card.shown, times, replace(SMALL, warmup_s=0.0, after_s=80.0))
    assert len(found) >= 1
    assert np.isfinite(found).any()


def test_presets_do_what_they_say() -> None:
    worlds = {
        name: World(users=20, items=40, seed=4, start=x.START, parameters=preset.parameters)
        for name, preset in x.PRESETS.items()
    }
    before = {name: world.taste.copy() for name, world in worlds.items()}
    for world in worlds.values():
        world.advance(x.START + 120.0)
    assert worlds["stationary"].live == worlds["abrupt"].live == 40
    assert worlds["drifting"].live > 40
    np.testing.assert_allclose(worlds["stationary"].taste, before["stationary"])
    assert not np.allclose(worlds["drifting"].taste, before["drifting"])
    world, rows = worlds["abrupt"], np.arange(40)
    attraction, appeal = world.attraction(0, rows), np.sort(world.appeal)
    world.break_off(np.random.default_rng(1))
    assert not np.allclose(world.attraction(0, rows), attraction)
    np.testing.assert_array_equal(np.sort(world.appeal), appeal)
    assert [name for name, preset in x.PRESETS.items() if preset.breaks] == ["abrupt"]
    assert world.welcome(rows).shape == (40,)
    assert 0.0 < world.expected_joy(0, rows[:10]) < world.expected_clicks(0, rows[:10])


def test_wrong_propensities_are_found_and_true_ones_are_not(played: Play) -> None:
    people = copy.deepcopy(played).people
    assert isinstance(people, Trial)
    for policy in POLICIES:
        scores, exploring = people.drawn_from(1, played.world.now, policy, 12)
        assert x.propensity_p(scores, exploring, policy, slates=4000) > 1e-4

    def flatter(scores: NDArray[np.float64], policy: str, slate: NDArray[np.int64], **asked: object) -> object:
        true = propensities(scores, policy, slate, **asked)  # type: ignore[arg-type]
        return 0.9 * true + 0.1 / (len(scores) - np.arange(len(slate)))

    scores, exploring = people.drawn_from(1, played.world.now, "thompson", 12)
    assert x.propensity_p(scores, exploring, "thompson", slates=4000, chance=flatter) < 1e-3  # type: ignore[arg-type]


def test_the_report_has_every_figure_and_says_what_was_reached() -> None:
    told: list[str] = []
    presets = ("stationary", "drifting")
    policies: tuple[Policy, ...] = ("greedy", "epsilon", "thompson")
    report = x.measure([1, 2], size=SMALL, presets=presets, policies=policies, slates=100, advance=told.append)
    assert len(told) == 2 * (2 * 3 + 1) + 1
    for preset in presets:
        for policy in policies:
            found = report["regret"][preset][policy]
            assert found["low"] <= found["mean"] <= found["high"]
    assert set(report["informed"]) == set(presets)
    assert report["informed"]["drifting"]["low"] <= report["informed"]["drifting"]["mean"]
    assert set(report["discovery"]["drifting"]) == set(policies)
    assert report["discovery"]["stationary"]["greedy"] is None
    assert report["lookup_ms_added"] > -5.0
    assert 0.0 <= report["propensity_p"] <= 1.0
    assert report["satisfaction"]["difference"]["mean"] == pytest.approx(
        report["satisfaction"]["dwell"]["mean"] - report["satisfaction"]["click"]["mean"]
    )
    assert [target["reached"] for target in report["targets"][:3]] == [
        target["mean"] <= target["wanted"] for target in report["targets"][:3]
    ]
    assert x.runs(10) == 10 * (3 * len(POLICIES) + 1) + 1
