"""Decayed counts: the grid's formula, smoothing, blends; the folds' exponential."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.decay import GRID, HALF_LIVES, RATES, Popularity, add, blend, exp, popularities, scan

TIMES = st.lists(st.floats(1.5e9, 1.5e9 + 3e7), min_size=1, max_size=30)


def counted(times: list[float]) -> Popularity:
    popularity = Popularity()
    popularity.grow(4)
    for i, t in enumerate(times):
        add(popularity.weights[i % 3], popularity.cells[i % 3], t)
        add(popularity.totals, popularity.total_cells, t)
        popularity.last[0] = max(popularity.last[0], t)
    return popularity


@given(TIMES)
def test_totals_are_the_sum_of_exponentials(times: list[float]) -> None:
    popularity = counted(times)
    now = max(times)
    _, _, totals, _ = popularity.at(now)
    for h, half_life in enumerate(HALF_LIVES):
        expected = sum(2.0 ** -((now - t) / half_life) if math.isfinite(half_life) else 1.0 for t in times)
        assert totals[h] == pytest.approx(expected, rel=1e-6)


@given(TIMES, st.integers(0, 7))
def test_a_blend_is_the_popularity(times: list[float], h: int) -> None:
    """The linear form used over the catalogue equals the recursive formula of a row."""
    popularity = counted(times)
    cells, scale, totals, _ = popularity.at(max(times) + 17.0)
    one, coefficients, p = np.eye(GRID)[h], np.empty(9), np.empty(8)
    blend(one, scale, totals, 4.0, coefficients)
    for count in (1, 3):  # the general loop, and the one for three blends
        out = np.empty((count, 4), np.float32)
        scan(4, popularity.weights, popularity.cells, cells, np.repeat(coefficients[None], count, 0), out)
        for row in range(4):
            popularities(popularity.weights[row], popularity.cells[row], cells, scale, totals, 4.0, p)
            assert out[-1, row] == pytest.approx(p[h], rel=1e-5)


def test_the_formula() -> None:
    """P_h = (w_h + 5 P_longer) / (W_h + 5), from (n + .5) / (total + .5 items)."""
    popularity = counted([1.6e9, 1.6e9, 1.6e9, 1.6e9])  # rows 0, 1, 2, 0
    cells, scale, totals, _ = popularity.at(1.6e9)
    p = np.empty(8)
    popularities(popularity.weights[0], popularity.cells[0], cells, scale, totals, 3.0, p)
    expected = (2 + 0.5) / (4 + 1.5)
    for h in range(7, -1, -1):
        expected = (2 + 5 * expected) / (4 + 5)
        assert p[h] == pytest.approx(expected, rel=1e-9)


def test_popularities_sum_to_one() -> None:
    popularity = counted([1.6e9 + 1000.0 * i for i in range(50)])
    cells, scale, totals, _ = popularity.at(1.6e9 + 60_000.0)
    total, p = np.zeros(8), np.empty(8)
    for row in range(4):
        popularities(popularity.weights[row], popularity.cells[row], cells, scale, totals, 4.0, p)
        total += p
    assert total == pytest.approx(np.ones(8), rel=1e-9)


@pytest.mark.parametrize("now", [0.0, 1.6e9 - 1e8, 1.6e9 + 1e11])
def test_any_now_is_finite(now: float) -> None:
    popularity = counted([1.6e9, 0.0, 9e10])
    cells, scale, totals, _ = popularity.at(now)
    p = np.empty(8)
    for row in range(4):
        popularities(popularity.weights[row], popularity.cells[row], cells, scale, totals, 4.0, p)
        assert np.isfinite(p).all()
        assert (p > 0).all()


def test_one_exponential() -> None:
    values = np.random.default_rng(0).uniform(-40, 31, 2000)
    assert all(exp(x) == math.exp(x) for x in values)
    assert RATES[-1] == 0.0


def test_totals_bytes() -> None:
    popularity, other = counted([1.6e9, 1.7e9]), Popularity()
    other.load_totals(popularity.pack_totals())
    assert other.pack_totals() == popularity.pack_totals()
    assert len(other.pack_totals()) == 104
