"""The probability that a shown item is chosen, from its score: online Platt scaling.

    p = sigmoid(a u + b),   u = (score - mean) / sd of shown scores

Learnt slate by slate as logistic regression: a step of Newton's method on running averages (rate max(1/(n + 50), 1e-3))
of gradient and curvature. A slate is learnt whole, what was chosen and what was not, at its first outcome, with scores
as they are before the ranker learns from it, or when it leaves the join window unchosen. Knows nothing about slates.
Platt: Probabilistic outputs for support vector machines (1999).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.factors import fitted

SLOWEST: Final = 1e-3
YOUNG: Final = 50.0
"""Slates that the first steps pretend to have seen."""
RIDGE: Final = 1e-3
"""Added to the curvature, so that a step is never of unbounded length."""

F64 = NDArray[np.float64]
_N, _MEAN, _VARIANCE, _A, _B, _AA, _AB, _BB = range(8)


@njit(cache=True)
def _probability(numbers, score):  # type: ignore[no-untyped-def]
    u = (score - numbers[_MEAN]) / np.sqrt(numbers[_VARIANCE] + 1e-6)
    at = min(max(numbers[_A] * u + numbers[_B], -30.0), 30.0)
    return 1.0 / (1.0 + np.exp(-at))


@njit(cache=True)
def _probabilities(numbers, scores, out):  # type: ignore[no-untyped-def]
    for i in range(len(scores)):
        out[i] = _probability(numbers, scores[i])


@njit(cache=True)
def _step(numbers, gradient_a, gradient_b):  # type: ignore[no-untyped-def]
    """Move (a, b) by a step of Newton's method against a gradient."""
    rate = max(1.0 / (numbers[_N] + YOUNG), SLOWEST)
    aa, ab, bb = numbers[_AA] + RIDGE, numbers[_AB], numbers[_BB] + RIDGE
    determinant = aa * bb - ab * ab
    numbers[_A] -= rate * (bb * gradient_a - ab * gradient_b) / determinant
    numbers[_B] -= rate * (aa * gradient_b - ab * gradient_a) / determinant


@njit(cache=True)
def _learn(numbers, scores, chosen, out):  # type: ignore[no-untyped-def]
    """Learn one slate; out f64[k] receives the probabilities before it."""
    k = len(scores)
    _probabilities(numbers, scores, out)
    numbers[_N] += 1.0
    moments, rate = max(1.0 / numbers[_N], SLOWEST), max(1.0 / (numbers[_N] + YOUNG), SLOWEST)
    mean, variance = 0.0, 0.0
    for i in range(k):
        mean += scores[i]
    numbers[_MEAN] += moments * (mean / k - numbers[_MEAN])
    for i in range(k):
        variance += (scores[i] - numbers[_MEAN]) ** 2
    numbers[_VARIANCE] += moments * (variance / k - numbers[_VARIANCE])
    gradient_a, gradient_b, aa, ab, bb = 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(k):
        u = (scores[i] - numbers[_MEAN]) / np.sqrt(numbers[_VARIANCE] + 1e-6)
        p = _probability(numbers, scores[i])
        error, curvature = p - chosen[i], p * (1.0 - p)
        gradient_a += error * u
        gradient_b += error
        aa += curvature * u * u
        ab += curvature * u
        bb += curvature
    numbers[_AA] += rate * (aa - numbers[_AA])
    numbers[_AB] += rate * (ab - numbers[_AB])
    numbers[_BB] += rate * (bb - numbers[_BB])
    _step(numbers, gradient_a, gradient_b)


class Calibration:
    """From score to probability; numbers f64[8]: slates learnt, mean and variance, a, b, curvature (aa, ab, bb)."""

    def __init__(self) -> None:
        self.numbers: F64 = np.array([0.0, 0.0, 1.0, 1.0, -3.5, 1.0, 0.0, 1.0])

    def probability(self, scores: F64) -> F64:
        """Return f64[k], each of one score alone; scores that order one way are probabilities that order so."""
        out = np.empty(len(scores))
        _probabilities(self.numbers, scores, out)
        return out

    def learn(self, scores: F64, chosen: F64) -> F64:
        """Learn one slate's shown items, chosen f64[k] 1 or 0; returns their probabilities before the step."""
        out = np.empty(len(scores))
        if len(scores) and np.isfinite(scores).all():
            _learn(self.numbers, scores, chosen, out)
            return out
        return out[:0]

    def correct(self, score: float) -> None:
        """Take back that an item of a slate that was learnt was not chosen: it has been chosen since."""
        if np.isfinite(score):
            u = (score - self.numbers[_MEAN]) / np.sqrt(self.numbers[_VARIANCE] + 1e-6)
            _step(self.numbers, -u, -1.0)

    def state(self) -> dict[str, Any]:
        """Return what is stored."""
        return {"calibration": self.numbers}

    def read_state(self, values: dict[str, Any]) -> F64:
        """Return what `state` stored, birth values where nothing was; raises CodecError."""
        born = Calibration().numbers
        return fitted(values, "calibration", born) if "calibration" in values else born
