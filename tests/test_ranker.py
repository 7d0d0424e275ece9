"""Named features by formula; the ranker: learning what separates, alone or in a batch, linear or network."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.examples import IMPRESSION
from models.features import FEATURES, LOG_PRIOR, LOG_TRANSITION, F, Frame, Learnt, Viewer, context_count, features
from models.items import Items, context_keys
from models.learner import Learner
from models.ranker import Ranker
from models.ranker.listwise import WORST
from models.rows import Rows
from tests.entries import KEYS, Walk


def system(n: int = 300) -> tuple[Items, Learner]:
    rows = Rows()
    items, learner = Items(rows=rows), Learner(rows=rows)
    entries = Walk(n=n, width=F).entries()
    items.fold(entries)
    for at in range(0, n, 20):
        learner.learn(entries.slice(at, min(at + 20, n), []))
    return items, learner


def compute(items: Items, learner: Learner, places: list[int], history: list[int], **changes: Any) -> np.ndarray:
    now = changes.get("now", float(items.popularity.last[0]) + 60.0)
    times = changes.get("times", now - 100.0 * np.arange(1.0, len(history) + 1))
    rows, own = items.rows.find(KEYS[places]), items.rows.find(KEYS[history] if history else KEYS[:0])
    seen = items.rows.find(KEYS[changes.get("seen", [])])
    context = np.array(changes.get("context", []), np.int64)
    frame, factors = items.popularity.at(now), learner.model.factors
    out = np.empty((len(rows), F))
    place = np.full(items.n, -1, np.int32)
    features(
        rows, place, Viewer(own, times, seen, context),
        Frame(now, frame[0], frame[1], frame[2], float(items.n), items.token_shares(), *items.click_rates()),
        items.arrays(), items.born,
        Learnt(learner.model.mixture, factors.vectors, factors.bias, factors.encode(own)), out,
    )  # fmt: skip
    assert (place == -1).all()
    return out


def test_features_are_the_same_in_a_batch_or_alone() -> None:
    items, learner = system()
    places, history = list(range(30)), [5, 7, 5, 1, 9]
    together = compute(items, learner, places, history)
    assert np.isfinite(together).all()
    backwards = compute(items, learner, places[::-1], history)
    np.testing.assert_array_equal(together, backwards[::-1])
    for i, place in enumerate(places):
        np.testing.assert_array_equal(together[i], compute(items, learner, [place], history)[0])


def test_features_by_formula() -> None:
    items, learner = system()
    now = float(items.popularity.last[0]) + 60.0
    x = compute(items, learner, [6], [5, 6], now=now, times=np.array([now - 100.0, now - 200.0]))[0]
    value = dict(zip(FEATURES, x, strict=True))
    row, h0 = items.rows.find(KEYS[[6, 5]]).tolist()
    prior = math.exp(value["log_prior"])
    p = np.exp(x[:8])
    assert prior == pytest.approx(float(learner.model.mixture @ p))
    count = float(items.a_weights[h0][items.a_items[h0] == row].sum())
    lift = math.log((count / prior + 5) / (items.a_sums[h0] + 5))
    assert value["lift_a0"] == pytest.approx(lift)
    assert value["lift_a0_in_session"] == pytest.approx(lift)
    assert value["own_count"] == pytest.approx(math.log(2))
    assert value["own_recency"] == pytest.approx(math.log1p(2592000 / 260))
    assert value["log_gap"] == pytest.approx(math.log(101))
    assert value["log_history"] == pytest.approx(math.log(3))
    assert value["log_count"] == pytest.approx(math.log1p(items.popularity.weights[row, 7]))
    assert value["log_age"] == pytest.approx(math.log1p(now - items.first[row]))
    assert value["log_idle"] == pytest.approx(math.log1p(now - items.last[row]))
    vectors = learner.model.factors.vectors
    assert value["similarity_0"] == pytest.approx(float(vectors[h0] @ vectors[row]), rel=1e-4)


def test_features_of_own_items_and_of_long_co_visitation() -> None:
    items, learner = system()
    history, seen = [5, 6, 7], [9, 6, 30, 7, 5]
    x = compute(items, learner, [6, 30, 31], history, seen=seen)
    columns = {name: x[:, i].tolist() for i, name in enumerate(FEATURES)}
    assert columns["seen"] == [1.0, 1.0, 0.0]
    assert columns["seen_order"] == pytest.approx([math.log(4), math.log(3), 0.0])
    assert columns["log_seen"] == pytest.approx([math.log(6)] * 3)
    row = int(items.rows.find(KEYS[[6]])[0])
    total = 0.0
    for h in items.rows.find(KEYS[history]).tolist():
        weight = float(items.c_weights[h][items.c_items[h] == row].sum())
        total += weight / math.sqrt((items.c_sums[h] + 10) * (items.popularity.weights[row, 7] + 10))
    assert total > 0
    assert columns["root_visited"][0] == pytest.approx(math.sqrt(total))
    assert columns["log_visited"][0] == pytest.approx(math.log(total + 1e-3) + 7)


def test_features_of_contexts() -> None:
    """The lift over the prior in each context that holds; where a full list lacks an item, what it can have at most."""
    items, learner = system()
    entries = Walk(seed=9).entries()
    entries.extra[:] = [msgspec.msgpack.encode({"device": "tv", "day": str(i % 3)}) for i in range(len(entries))]
    items.fold(entries.take(entries.kind != IMPRESSION))
    known = items.context_rows(context_keys({"device": "tv", "day": "1", "town": "nowhere"}))
    assert len(known) == 2
    x = compute(items, learner, [6, 30], [5], context=known)
    for i, row in enumerate(items.rows.find(KEYS[[6, 30]]).tolist()):
        prior, lifts = math.exp(x[i, LOG_PRIOR]), []
        for under in known.tolist():
            count = float(items.c_weights[under][items.c_items[under] == row].sum())
            lifts.append(math.log((count / prior + 5) / (items.c_sums[under] + 5)))
        assert x[i, FEATURES.index("context_most")] == pytest.approx(max(lifts))
        assert x[i, FEATURES.index("context_sum")] == pytest.approx(sum(lifts))
    full, part = np.arange(1.0, 61.0), np.r_[np.ones(59), 0.0]
    assert context_count(full, 1e4, 4, 0.5) == 5.0
    assert context_count(full, 1e4, -1, 0.5) == 1.0
    assert context_count(full, 1e4, -1, 1e-5) == pytest.approx(0.1)
    assert context_count(part, 1e4, -1, 0.5) == 0.0


def test_without_a_history_the_user_features_are_zero() -> None:
    items, learner = system()
    x = compute(items, learner, [1, 2, 3], [])
    assert np.isfinite(x).all()
    for name in ("lift_a0", "lift_b0", "lift_b", "similarity_0", "own_count", "own_recency", "lift_a0_in_session"):
        assert not x[:, FEATURES.index(name)].any()


def test_birth_scores_by_prior_and_transition() -> None:
    ranker, x = Ranker(), np.zeros((2, F))
    x[1, LOG_PRIOR], x[1, LOG_TRANSITION] = 1.0, 2.0
    assert np.diff(ranker.score(x))[0] == pytest.approx(1.5, rel=1e-5)


def test_it_learns_what_separates_and_normalises() -> None:
    ranker, rng = Ranker(), np.random.default_rng(0)
    wins = 0
    for i in range(800):
        x = 100.0 + 7.0 * rng.normal(size=(30, F))
        label = int(np.argmax(x[:, 3] - x[:, 5]))
        wins += i >= 400 and int(np.argmax(ranker.score(x))) == label
        ranker.learn(x, label)
    assert wins > 200  # of 400, against 13 by chance
    assert ranker.mean == pytest.approx(np.full(F, 100.0), abs=1.0)
    assert np.sqrt(ranker.variance) == pytest.approx(np.full(F, 7.0), rel=0.2)
    assert ranker.named()[FEATURES[3]] > 0.5 > -0.5 > ranker.named()[FEATURES[5]]


def test_lists_that_teach_nothing_change_nothing() -> None:
    ranker = Ranker()
    before = ranker.weights.copy()
    assert ranker.learn(np.ones((1, F)), 0) == 0.0
    assert ranker.learn(np.full((3, F), np.nan), 0) == 0.0
    np.testing.assert_array_equal(ranker.weights, before)


def test_feature_names_are_distinct() -> None:
    assert len(set(FEATURES)) == F


def crossed(rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """A list whose best item no weighted sum of features finds: features 3 and 5 agree in sign."""
    x = rng.normal(size=(20, F))
    return x, int(np.argmax(x[:, 3] * x[:, 5]))


def test_the_network_takes_over_where_it_is_better() -> None:
    ranker, rng = Ranker(), np.random.default_rng(1)
    assert ranker.scorer == "linear"
    for _ in range(1500):
        ranker.learn(*crossed(rng))
    assert ranker.scorer == "network"
    assert ranker.losses[1] < 0.8 * ranker.losses[0]
    wins = 0
    for _ in range(200):
        x, label = crossed(rng)
        wins += int(np.argmax(ranker.score(x))) == label
    assert wins > 60  # of 200, against 10 by chance


def test_the_linear_model_stays_where_the_network_fails() -> None:
    ranker, rng = Ranker(), np.random.default_rng(2)
    ranker.output[:] = 50.0
    for _ in range(5):
        x = rng.normal(size=(20, F))
        ranker.learn(x, int(np.argmax(x[:, 8])))
    assert ranker.scorer == "linear"
    assert ranker.score(x) == pytest.approx(_by_weights(ranker, x), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("broken", ["network", "linear"])
def test_a_model_that_diverged_is_born_again(broken: str) -> None:
    """It neither scores nor stays in the state, which refuses what is not finite; the network waits its turn again."""
    ranker, rng = Ranker(), np.random.default_rng(5)
    for _ in range(1500):
        ranker.learn(*crossed(rng))
    assert ranker.scorer == "network"
    (ranker.output if broken == "network" else ranker.weights)[:] = 1e30
    if broken == "network":
        ranker.output[3] = np.nan
    before = ranker.losses.copy()
    assert ranker.learn(*crossed(rng)) < WORST
    assert ranker.scorer == ("linear" if broken == "network" else "network")
    again = Ranker()
    again.set_state(again.read_state(ranker.state()))
    assert np.isfinite(again.score(crossed(rng)[0])).all()
    for _ in range(1500):
        assert np.isfinite(ranker.learn(*crossed(rng)))
    assert ranker.scorer == "network"
    assert ranker.losses[1] < before[0]


def test_a_loosened_ranker_steps_further() -> None:
    ranker, rng = Ranker(), np.random.default_rng(6)
    for _ in range(300):
        ranker.learn(*crossed(rng))
    other = Ranker()
    other.set_state(other.read_state(ranker.state()))
    other.loosen(0.1)
    assert all((value >= np.float32(0.01)).all() for name, value in other.state().items() if "squares" in name)
    x, before = crossed(rng), {name: getattr(ranker, name).copy() for name in ("weights", "skip", "hidden")}
    ranker.learn(*x)
    other.learn(*x)
    for name, value in before.items():
        step, further = (np.abs(getattr(one, name) - value).sum() for one in (ranker, other))
        assert further > 1.5 * step


@given(seed=st.integers(0, 2**32), m=st.integers(2, 70), n=st.integers(0, 5))
def test_learning_is_the_same_bits_each_time(seed: int, m: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    lists = [(3.0 * rng.normal(size=(m, F)), int(rng.integers(m))) for _ in range(n)]
    one, other = Ranker(), Ranker()
    assert [one.learn(*x) for x in lists] == [other.learn(np.asfortranarray(x.copy()), label) for x, label in lists]
    for name, value in one.state().items():
        np.testing.assert_array_equal(other.state()[name], value)


def _by_weights(ranker: Ranker, x: np.ndarray) -> np.ndarray:
    z = np.clip((x - ranker.mean) / np.sqrt(ranker.variance + 1e-6), -5, 5)
    return np.asarray(z @ ranker.weights)


@given(seed=st.integers(0, 2**32), m=st.integers(1, 40))
def test_a_score_does_not_depend_on_the_other_candidates(seed: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    ranker = Ranker()
    ranker.hidden[:], ranker.losses[:] = rng.normal(size=ranker.hidden.shape), (1.0, 0.5)
    x = 3.0 * rng.normal(size=(m, F))
    together = ranker.score(x)
    np.testing.assert_array_equal(together, [ranker.score(x[i : i + 1])[0] for i in range(m)])


def test_the_gradient_is_that_of_the_loss() -> None:
    """One step of Adagrad from its start moves each weight against the loss's numerical slope."""
    rng = np.random.default_rng(3)
    x, label = rng.normal(size=(9, F)).astype(np.float16).astype(float), 4
    ranker = Ranker()
    ranker.lists[:], ranker.variance[:] = 1e9, 1.0
    before = {name: getattr(ranker, name).copy() for name in ("skip", "hidden", "offset", "output")}
    ranker.learn(x, label)
    for name, index in (("skip", (3,)), ("hidden", (2, 7)), ("hidden", (11, 30)), ("offset", (5,)), ("output", (9,))):
        slopes = []
        for change in (2e-3, -2e-3):
            other = Ranker()
            other.mean[:], other.variance[:], other.losses[:] = ranker.mean, ranker.variance, (1.0, 0.5)
            getattr(other, name)[index] += change
            scores = other.score(x)
            slopes.append(np.log(np.exp(scores - scores[label]).sum()))
        slope = (slopes[0] - slopes[1]) / 4e-3
        moved = getattr(ranker, name)[index] - before[name][index]
        assert moved == pytest.approx(-0.05 * slope / math.sqrt(1e-2 + slope**2), rel=5e-3, abs=3e-4)


def test_state_of_version_0_1_is_read() -> None:
    """It had no network: the linear model is taken over, the network starts at birth."""
    learnt, rng = Ranker(), np.random.default_rng(4)
    for _ in range(50):
        learnt.learn(*crossed(rng))
    old = {name: learnt.state()[name] for name in ("features", "ranker", "ranker_squares", "mean", "variance", "lists")}
    again = Ranker()
    again.set_state(again.read_state(old))
    np.testing.assert_array_equal(again.weights, learnt.weights)
    np.testing.assert_array_equal(again.hidden, Ranker().hidden)
    assert again.scorer == "linear"
    again.set_state(again.read_state(learnt.state()))
    for name, value in learnt.state().items():
        np.testing.assert_array_equal(again.state()[name], value)
    doubles = {name: np.asarray(value, float) for name, value in learnt.state().items() if name != "features"}
    again.set_state(again.read_state({**doubles, "features": list(FEATURES)}))  # until 0.2 all were f64
    np.testing.assert_array_equal(again.hidden, learnt.hidden)
