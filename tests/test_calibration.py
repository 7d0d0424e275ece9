"""From score to probability: learnt online, corrected, stored; through the learner's join window and a restart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import metrics
from models.ranker import Calibration


def world(n: int, slope: float, offset: float, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    scores = rng.normal(40.0, 3.0, (n, 10))
    p = 1.0 / (1.0 + np.exp(-(slope * (scores - 40.0) + offset)))
    return list(zip(scores, (rng.random(p.shape) < p).astype(float), strict=True))


@pytest.mark.parametrize(("slope", "offset"), [(0.5, -3.0), (1.0, -1.0), (0.1, -4.0)])
def test_probabilities_come_true(slope: float, offset: float) -> None:
    calibration, p, y = Calibration(), [], []
    for i, (scores, chosen) in enumerate(world(4000, slope, offset)):
        before = calibration.probability(scores)
        np.testing.assert_array_equal(calibration.learn(scores, chosen), before)
        if i >= 1000:
            p.append(before)
            y.append(chosen)
    figures = metrics.calibration(list(zip(p, y, strict=True)))
    assert figures["ece"] < 0.02
    assert calibration.probability(np.array([40.0]))[0] == pytest.approx(1 / (1 + np.exp(-offset)), rel=0.15)


def test_an_item_chosen_later_is_no_item_left() -> None:
    """Slates whose second choice comes later end near those where it was known at once."""
    rng, late, at_once = np.random.default_rng(1), Calibration(), Calibration()
    for scores, _ in world(3000, 1.0, 0.0):
        two = rng.permutation(10)[:2]
        first, both = np.zeros(10), np.zeros(10)
        first[two[0]] = both[two] = 1.0
        late.learn(scores, first)
        late.correct(float(scores[two[1]]))
        at_once.learn(scores, both)
    middle = np.array([40.0])
    assert at_once.probability(middle)[0] == pytest.approx(0.2, abs=0.02)
    assert late.probability(middle)[0] == pytest.approx(at_once.probability(middle)[0], abs=0.03)


@given(scores=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_extreme_scores_give_probabilities_and_each_is_its_own(scores: list[float], seed: int) -> None:
    calibration, x = Calibration(), np.array(scores)
    for _ in range(20):
        calibration.learn(x, (np.random.default_rng(seed).random(len(x)) < 0.3).astype(float))
    p = calibration.probability(x)
    assert ((p > 0) & (p < 1)).all()
    np.testing.assert_array_equal(p, [calibration.probability(x[i : i + 1])[0] for i in range(len(x))])


def test_what_is_not_finite_is_not_learnt_and_state_round_trips() -> None:
    calibration = Calibration()
    for scores, chosen in world(50, 0.5, -3.0):
        calibration.learn(scores, chosen)
    before = calibration.numbers.copy()
    assert len(calibration.learn(np.array([1.0, np.nan]), np.zeros(2))) == 0
    calibration.correct(np.inf)
    np.testing.assert_array_equal(calibration.numbers, before)
    np.testing.assert_array_equal(Calibration().read_state(calibration.state()), before)
    np.testing.assert_array_equal(calibration.read_state({}), Calibration().numbers)


def test_ece_by_hand() -> None:
    p, y = np.repeat([0.1, 0.5], 100), np.zeros(200)
    y[:10], y[100:170] = 1.0, 1.0
    figures = metrics.calibration([(p[:50], y[:50]), (p[50:], y[50:])], bins=2)
    assert figures["ece"] == pytest.approx(0.1)  # (0 + .2) / 2
    assert [b["predicted"] for b in figures["bins"]] == pytest.approx([0.1, 0.5])
    assert [b["chosen"] for b in figures["bins"]] == pytest.approx([0.1, 0.7])
    assert figures["log_loss"] == pytest.approx(
        -(0.5 * (0.1 * np.log(0.1) + 0.9 * np.log(0.9)) + 0.5 * np.log(0.5)), rel=1e-6
    )
    assert metrics.calibration([])["ece"] is None
