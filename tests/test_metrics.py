"""Ranks with ties in the middle; the three figures; the bootstrap draws users."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.metrics import auc, hit_rate, mid_rank, mrr, ndcg, summary, user_auc, user_bootstrap


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_mid_rank_is_the_mean_over_orders_of_ties(scores: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(scores) - 1))
    above = sum(s > scores[place] for s in scores)
    tied = sum(s == scores[place] for s in scores)
    expected = sum(above + i for i in range(tied)) / tied
    assert mid_rank(np.array(scores, float), place) == expected


def test_figures() -> None:
    ranks = np.array([0.0, 1.0, 9.0, 10.0, np.inf])
    assert hit_rate(ranks).tolist() == [1, 1, 1, 0, 0]
    assert ndcg(ranks) == pytest.approx([1, 1 / math.log2(3), 1 / math.log2(11), 0, 0])
    assert mrr(ranks) == pytest.approx([1, 0.5, 0.1, 0, 0])
    assert summary(ranks)["hit_rate@10"] == pytest.approx(0.6)
    assert set(summary(np.empty(0)).values()) == {0.0}


def test_bootstrap_widens_with_users_that_agree_with_themselves() -> None:
    rng = np.random.default_rng(0)
    of_user = rng.normal(size=50)
    users = np.repeat(np.arange(50), 40)
    values = of_user[users] + 0.01 * rng.normal(size=2000)
    low, high = user_bootstrap(values, users, np.random.default_rng(1))
    assert low < values.mean() < high
    independent = user_bootstrap(values, np.arange(2000), np.random.default_rng(1))
    assert high - low > 3 * (independent[1] - independent[0])
    assert user_bootstrap(values, users, np.random.default_rng(1)) == (low, high)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=30))
def test_auc_counts_pairs(rows: list[tuple[int, bool]]) -> None:
    pairs = [(a > b) + 0.5 * (a == b) for a, liked in rows for b, other in rows if liked and not other]
    found = auc(np.array([s for s, _ in rows], float), np.array([liked for _, liked in rows]))
    assert found == pytest.approx(sum(pairs) / len(pairs)) if pairs else math.isnan(found)


def test_user_auc_leaves_out_users_of_one_kind() -> None:
    scores, users = np.array([1.0, 2.0, 9.0, 4.0, 3.0]), np.array([7, 7, 8, 9, 9])
    assert user_auc(scores, np.array([True, False, True, True, False]), users) == (0.5, 2)
