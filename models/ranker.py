"""The online ranker: a linear model and a small network over the same normalised features; the better one scores.

    z_f(y)     = clip((x_f(y) - mean_f) / sd_f, -5, 5)
    linear(y)  = sum_f w_f z_f
    network(y) = sum_f s_f z_f + sum_j v_j relu(b_j + sum_f H_fj z_f),   j < 32

Both take one listwise softmax step on every list, Adagrad .05; mean and variance run at rate max(1/n, 5e-4). Which one
scores is decided by their prequential losses (each list is scored before it is learnt), smoothed over about 500 lists:
a young network does worse and waits. An item's score does not depend on the other candidates: rows are computed one by
one, without a matrix library, whose sums depend on the shape. Knows nothing about what the features mean.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.examples import CodecError
from models.factors import fitted
from models.features import FEATURES, LOG_PRIOR, LOG_TRANSITION, F

HIDDEN: Final = 32
STEP: Final = 0.05
"""Adagrad's learning rate."""
SLOWEST: Final = 5e-4
LOSS_RATE: Final = 2e-3
SQUARE: Final = 1e-2
"""Where Adagrad's sums of squares start."""
_BIRTH_SEED: Final = 7

F64 = NDArray[np.float64]


@njit(cache=True)
def _observe(x, lists, mean, variance):  # type: ignore[no-untyped-def]
    """Move the running mean and variance to one more list."""
    m, width = x.shape
    lists[0] += 1.0
    rate = max(1.0 / lists[0], SLOWEST)
    for f in range(width):
        s = 0.0
        for i in range(m):
            s += x[i, f]
        mean[f] += rate * (s / m - mean[f])
        v = 0.0
        for i in range(m):
            v += (x[i, f] - mean[f]) ** 2
        variance[f] += rate * (v / m - variance[f])


@njit(cache=True)
def _normalise(x, mean, variance, z):  # type: ignore[no-untyped-def]
    for f in range(x.shape[1]):
        inverse = 1.0 / math.sqrt(variance[f] + 1e-6)
        for i in range(len(x)):
            z[i, f] = min(max((x[i, f] - mean[f]) * inverse, -5.0), 5.0)


@njit(cache=True)
def _linear(z, weights, out):  # type: ignore[no-untyped-def]
    for i in range(len(z)):
        s = 0.0
        for f in range(z.shape[1]):
            s += weights[f] * z[i, f]
        out[i] = s


@njit(cache=True)
def _network(z, skip, hidden, offset, output, active, out):  # type: ignore[no-untyped-def]
    """Scores of the network; active f64[m, 32] receives the hidden units. The inner loop is over units: vector code."""
    for i in range(len(z)):
        units = active[i]
        for j in range(len(units)):
            units[j] = offset[j]
        s = 0.0
        for f in range(z.shape[1]):
            value = z[i, f]
            s += skip[f] * value
            for j in range(len(units)):
                units[j] += value * hidden[f, j]
        for j in range(len(units)):
            units[j] = max(units[j], 0.0)
            s += output[j] * units[j]
        out[i] = s


@njit(cache=True)
def _softmax(scores, label, p):  # type: ignore[no-untyped-def]
    """Fill p with the probabilities less 1 at the label: the gradient by the scores; returns the loss."""
    top = scores.max()
    total = 0.0
    for i in range(len(scores)):
        p[i] = math.exp(scores[i] - top)
        total += p[i]
    for i in range(len(scores)):
        p[i] /= total
    p[label] -= 1.0
    return math.log(total) + top - scores[label]


@njit(cache=True)
def _adagrad(weights, squares, gradient):  # type: ignore[no-untyped-def]
    for k in range(len(weights)):
        squares[k] += gradient[k] * gradient[k]
        weights[k] -= STEP * gradient[k] / math.sqrt(squares[k])


@njit(cache=True)
def _learn(x, label, lists, mean, variance, losses, weights, squares, skip, skip_squares, hidden, hidden_squares, offset, offset_squares, output, output_squares):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
    """One listwise step of both; moves the smoothed `losses` and returns this list's, (linear, network), before it."""
    m, width = x.shape
    units = len(output)
    _observe(x, lists, mean, variance)
    z, scores, p = np.empty((m, width)), np.empty(m), np.empty(m)
    _normalise(x, mean, variance, z)
    rate = max(1.0 / lists[0], LOSS_RATE)

    _linear(z, weights, scores)
    linear = _softmax(scores, label, p)
    losses[0] += rate * (linear - losses[0])
    gradient = np.zeros(width)
    for i in range(m):
        for f in range(width):
            gradient[f] += p[i] * z[i, f]
    _adagrad(weights, squares, gradient)

    active = np.empty((m, units))
    _network(z, skip, hidden, offset, output, active, scores)
    network = _softmax(scores, label, p)
    losses[1] += rate * (network - losses[1])
    by_skip, by_hidden = np.zeros(width), np.zeros((width, units))
    by_offset, by_output, back = np.zeros(units), np.zeros(units), np.empty(units)
    for i in range(m):
        for j in range(units):
            by_output[j] += p[i] * active[i, j]
            back[j] = p[i] * output[j] if active[i, j] > 0.0 else 0.0
            by_offset[j] += back[j]
        for f in range(width):
            value = z[i, f]
            by_skip[f] += p[i] * value
            for j in range(units):
                by_hidden[f, j] += value * back[j]
    _adagrad(skip, skip_squares, by_skip)
    _adagrad(hidden.reshape(-1), hidden_squares.reshape(-1), by_hidden.reshape(-1))
    _adagrad(offset, offset_squares, by_offset)
    _adagrad(output, output_squares, by_output)
    return linear, network


class Ranker:
    """Both models under training, and which one scores.

    weights, squares, mean, variance f64[F]; skip f64[F], hidden f64[F, 32], offset, output f64[32], each with Adagrad's
    `..._squares`; lists f64[1], how many were learnt; losses f64[2], smoothed prequential losses (linear, network).
    """

    PER_FEATURE: Final = ("weights", "squares", "mean", "variance", "skip", "skip_squares", "hidden", "hidden_squares")
    """Arrays whose first axis is the features, by name: what is stored goes by feature name."""
    OTHER: Final = ("offset", "offset_squares", "output", "output_squares", "lists", "losses")
    STORED: Final = {"weights": "ranker", "squares": "ranker_squares"}
    """Names under which version 0.1 stored what it had; the others are stored under their own."""
    SINCE_0_2: Final = (
        "skip", "skip_squares", "hidden", "hidden_squares", "offset", "offset_squares", "output", "output_squares",
        "losses",
    )  # fmt: skip

    def __init__(self) -> None:
        self.weights: F64 = np.zeros(F)
        self.weights[[LOG_PRIOR, LOG_TRANSITION]] = 0.5
        self.squares: F64 = np.full(F, SQUARE)
        self.mean: F64 = np.zeros(F)
        self.variance: F64 = np.ones(F)
        born = np.random.Generator(np.random.Philox(_BIRTH_SEED))
        self.skip: F64 = self.weights.copy()
        self.hidden: F64 = born.normal(0.0, 0.5 * math.sqrt(2.0 / F), (F, HIDDEN))
        self.offset: F64 = np.zeros(HIDDEN)
        self.output: F64 = born.normal(0.0, 0.1, HIDDEN)
        self.skip_squares: F64 = np.full(F, SQUARE)
        self.hidden_squares: F64 = np.full((F, HIDDEN), SQUARE)
        self.offset_squares: F64 = np.full(HIDDEN, SQUARE)
        self.output_squares: F64 = np.full(HIDDEN, SQUARE)
        self.lists: F64 = np.zeros(1)
        self.losses: F64 = np.zeros(2)

    @property
    def scorer(self) -> str:
        """Which model scores now: "network" where its prequential loss is the lower one, else "linear"."""
        return "network" if self.losses[1] < self.losses[0] else "linear"

    def named(self) -> dict[str, float]:
        """Return the linear weights by feature name, for people to read."""
        return {name: round(float(weight), 4) for name, weight in zip(FEATURES, self.weights, strict=True)}

    def state(self) -> dict[str, Any]:
        """Return every array by name, with the names of the features that the rows of some stand for."""
        names = (*self.PER_FEATURE, *self.OTHER)
        return {"features": list(FEATURES), **{self.STORED.get(name, name): getattr(self, name) for name in names}}

    def read_state(self, values: dict[str, Any]) -> dict[str, F64]:
        """Return the arrays that `state` stored, for `set_state`; changes nothing, raises CodecError.

        Features go by name. What was not stored, a new feature or the network of version 0.1, keeps its birth values.
        """
        names = values.get("features")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CodecError(f"dense weights: features: expected a list of names, got {names!r:.80}")
        stored = {name: i for i, name in enumerate(names)}
        here = [(place, stored[name]) for place, name in enumerate(FEATURES) if name in stored]
        to, at = [place for place, _ in here], [place for _, place in here]
        born, found = Ranker(), dict[str, F64]()
        for name in (*self.PER_FEATURE, *self.OTHER):
            found[name], key = getattr(born, name), self.STORED.get(name, name)
            if name in self.SINCE_0_2 and key not in values:
                continue
            if name in self.PER_FEATURE:
                found[name][to] = fitted(values, key, np.empty((len(names), *found[name].shape[1:])))[at]
            else:
                found[name] = fitted(values, key, found[name])
        return found

    def set_state(self, found: dict[str, F64]) -> None:
        """Copy what `read_state` found into the arrays."""
        for name, value in found.items():
            getattr(self, name)[...] = value

    def score(self, x: F64) -> F64:
        """Return the scores f64[m] of features f64[m, F]; each row's score depends on that row alone."""
        z, out = np.empty(x.shape), np.empty(len(x))
        _normalise(x, self.mean, self.variance, z)
        if self.scorer == "network":
            _network(z, self.skip, self.hidden, self.offset, self.output, np.empty((len(x), HIDDEN)), out)
        else:
            _linear(z, self.weights, out)
        return out

    def learn(self, x: F64, label: int) -> float:
        """Take one listwise step on features f64[m, F], the chosen item at row `label`.

        Returns the loss before the step of the model that then scored; 0 for a list that teaches nothing.
        """
        if len(x) < 2 or not np.isfinite(x).all():
            return 0.0
        at = ("linear", "network").index(self.scorer)
        losses = _learn(
            x, label, self.lists, self.mean, self.variance, self.losses, self.weights, self.squares,
            self.skip, self.skip_squares, self.hidden, self.hidden_squares, self.offset, self.offset_squares,
            self.output, self.output_squares,
        )  # fmt: skip
        return float(losses[at])
