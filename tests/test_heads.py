"""The weighted sum of heads: by the table, by the setting, and in what a lookup explains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import settings
from models.items import Items
from models.learner import Learner
from models.ranker import heads
from models.recommend import History, Request, recommend, score_items
from models.rows import Rows
from tests.entries import KEYS, Walk


def test_settings_name_the_same_heads() -> None:
    assert settings.HEADS == heads.NAMES
    assert heads.head_weights(settings.Settings.load(env={}).head_weights).tolist() == [w for _, w in heads.HEADS]
    with pytest.raises(ValueError, match="expected one of click"):
        heads.head_weights([("joy", 1.0)])


@given(seed=st.integers(0, 2**32), m=st.integers(1, 30))
def test_the_sum_is_that_of_the_parts_and_each_row_its_own(seed: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    said, weights = rng.normal(size=(m, len(heads.HEADS))), rng.normal(size=len(heads.HEADS))
    weights[rng.integers(len(weights))] = 0.0
    score = heads.total(said, weights)
    assert score == pytest.approx(heads.parts(said, weights).sum(1))
    np.testing.assert_array_equal(score, [heads.total(said[i : i + 1], weights)[0] for i in range(m)])


def world() -> tuple[Items, Learner]:
    rows = Rows()
    items, learner = Items(rows=rows), Learner(rows=rows)
    entries = Walk(n=200).entries()
    items.fold(entries)
    learner.learn(entries)
    return items, learner


def test_a_score_does_not_depend_on_what_else_may_be_shown() -> None:
    """The whole of `recommend`: with half of the items excluded the others keep their scores, bit for bit."""
    items, learner = world()
    now = float(items.popularity.last[0]) + 60.0
    history = History(items=KEYS[[4, 2, 7]], times=now - np.array([10.0, 20.0, 30.0]), kinds=np.ones(3, np.uint8))
    ask: dict[str, Any] = {"slate_id": "s", "now": now, "seen": "include", "policy": "greedy", "n": 5}
    everything = recommend(items, learner.model, history, Request(**ask))
    scores = dict(zip(everything.candidates.tolist(), everything.candidate_scores.tolist(), strict=True))
    for seed in range(5):
        gone = np.random.default_rng(seed).choice(everything.candidates, len(scores) // 2, replace=False)
        some = recommend(items, learner.model, history, Request(**ask, exclude=gone))
        assert 0 < len(some.candidates) < len(scores)
        for key, score in zip(some.candidates.tolist(), some.candidate_scores.tolist(), strict=True):
            assert scores[key] == score
    alone = score_items(items, learner.model, history, Request(**ask), everything.candidates)
    np.testing.assert_array_equal(alone.astype(np.float32), everything.candidate_scores)


def test_the_trace_shows_what_each_head_adds() -> None:
    items, learner = world()
    now = float(items.popularity.last[0]) + 60.0
    weights = heads.head_weights([("click", 0.5)])
    plain = recommend(items, learner.model, History(), Request(slate_id="s", now=now, policy="greedy"))
    slate = recommend(
        items, learner.model, History(), Request(slate_id="s", now=now, policy="greedy", weights=weights, trace=True)
    )
    np.testing.assert_allclose(slate.candidate_scores, 0.5 * plain.candidate_scores, rtol=1e-6)
    for row in slate.trace["scores"]:
        assert sum(row["heads"].values()) == pytest.approx(row["score"], abs=1e-5)
        assert tuple(row["heads"]) == heads.NAMES
        click = row["heads"]["click"] / 0.5
        assert row["probability"] == pytest.approx(
            learner.model.calibration.probability(np.array([click]))[0], rel=1e-4
        )
        assert 0.0 < row["probability"] < 1.0
