"""The online ranker: a linear model and a small network over the same normalised features; the better one scores.

    z_f(y)     = clip((x_f(y) - mean_f) / sd_f, -5, 5)
    linear(y)  = sum_f w_f z_f
    network(y) = sum_f s_f z_f + sum_j v_j relu(b_j + sum_f H_fj z_f),   j < 32

Both take one listwise softmax step on every list, Adagrad .05; mean and variance run at rate max(1/n, 5e-4). Which one
scores is decided by their prequential losses (each list is scored before it is learnt), smoothed over about 500 lists:
a young network does worse and waits, as does one that diverged, which is born again. An item's score does not depend on
the other candidates: see `kernels`. Knows nothing about what the features mean.
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
from models.ranker import kernels

HIDDEN: Final = 32
STEP: Final = 0.05
"""Adagrad's learning rate."""
SLOWEST: Final = 5e-4
LOSS_RATE: Final = 2e-3
SQUARE: Final = 1e-2
"""Where Adagrad's sums of squares start."""
LAST: Final = F + HIDDEN + 1
"""Width of the last hidden layer: features, units, 1."""
SIZE: Final = 2 * F + F * HIDDEN + 2 * HIDDEN
"""Weights of both models."""
WORST: Final = 1e3
"""A loss of one list from which on a model has diverged; between sane weights and clipped features none comes near."""
_BIRTH_SEED: Final = 7

F16 = NDArray[np.float16]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@njit(cache=True)
def _cut(flat):  # type: ignore[no-untyped-def]
    """Return the parts of a flat f32 vector: linear[F], skip[F], hidden[F, 32], offset[32], output[32]."""
    width = (len(flat) - 2 * HIDDEN) // (2 + HIDDEN)  # F, which compiled code kept on disk must not know as a constant
    end = 2 * width + width * HIDDEN
    hidden = flat[2 * width : end].reshape(width, HIDDEN)
    return flat[:width], flat[width : 2 * width], hidden, flat[end : end + HIDDEN], flat[end + HIDDEN :]


@njit(cache=True)
def _linear(z, flat, out):  # type: ignore[no-untyped-def]
    out[:] = 0.0
    kernels.weighted(z, _cut(flat)[0], out)


@njit(cache=True)
def _network(z, flat, active, out):  # type: ignore[no-untyped-def]
    """Fill out f32[M] with the network's scores and active f32[32, M] with its hidden units."""
    _, skip, hidden, offset, output = _cut(flat)
    out[:] = 0.0
    kernels.weighted(z, skip, out)
    kernels.units(z, hidden, offset, active)
    kernels.weighted(active, output, out)


@njit(cache=True)
def _score(x, moments, flat, network, out):  # type: ignore[no-untyped-def]
    """Fill out f64[m] with the scores of features x f64[m, F]."""
    m = len(x)
    wide = kernels.padded(m)
    z, scores = np.empty((x.shape[1], wide), np.float32), np.empty(wide, np.float32)
    kernels.columns(x, z)
    kernels.normalise(z, moments[0], moments[1])
    if network:
        _network(z, flat, np.empty((HIDDEN, wide), np.float32), scores)
    else:
        _linear(z, flat, scores)
    for i in range(m):
        out[i] = scores[i]


@njit(cache=True)
def _last_hidden(x, moments, flat, network, out, scores):  # type: ignore[no-untyped-def]
    """Fill out f64[m, F + 33] with normalised features, hidden units and 1, and scores f64[m] as `_score` does."""
    m, width = x.shape
    wide = kernels.padded(m)
    z, active = np.empty((width, wide), np.float32), np.empty((HIDDEN, wide), np.float32)
    said = np.empty(wide, np.float32)
    kernels.columns(x, z)
    kernels.normalise(z, moments[0], moments[1])
    _network(z, flat, active, said)
    if not network:
        _linear(z, flat, said)
    for i in range(m):
        for f in range(width):
            out[i, f] = 0.2 * z[f, i]
        for j in range(HIDDEN):
            out[i, width + j] = 0.2 * active[j, i]
        out[i, width + HIDDEN] = 1.0
        scores[i] = said[i]


@njit(cache=True)
def _learn(halves, label, numbers, moments, flat, squares, slowest):  # type: ignore[no-untyped-def]
    """One listwise step of both on the bits u16[m, F] of f16 features; moves `numbers`: lists learnt, smoothed losses.

    Returns this list's losses (linear, network) before the step: (0, 0), and nothing is changed, where the list is not
    finite. Where a model diverged (its loss is not below WORST) no model takes a step.
    """
    m = len(halves)
    wide = kernels.padded(m)
    z = np.empty((halves.shape[1], wide), np.float32)
    scores, p = np.empty(wide, np.float32), np.empty(wide, np.float32)
    if not kernels.columns_of_halves(halves, z):
        return 0.0, 0.0
    numbers[0] += 1.0
    kernels.observe(z, m, max(1.0 / numbers[0], slowest), moments[0], moments[1])
    kernels.normalise(z, moments[0], moments[1])
    rate = max(1.0 / numbers[0], LOSS_RATE)
    gradient = np.empty_like(flat)
    by_linear, by_skip, by_hidden, by_offset, by_output = _cut(gradient)

    _linear(z, flat, scores)
    linear = kernels.softmax(scores, m, label, p)
    kernels.toward(z, p, by_linear)

    active = np.empty((HIDDEN, wide), np.float32)
    _network(z, flat, active, scores)
    network = kernels.softmax(scores, m, label, p)
    if not (linear < WORST and network < WORST):
        return linear, network
    numbers[1] += rate * (linear - numbers[1])
    numbers[2] += rate * (network - numbers[2])
    kernels.toward(z, p, by_skip)
    kernels.backward(z, active, p, _cut(flat)[4], by_hidden, by_offset, by_output)
    kernels.adagrad(flat, squares, gradient, np.float32(STEP))
    return linear, network


class Ranker:
    """Both models under training, and which one scores.

    weights, squares f32[F]; mean, variance f64[F]; skip f32[F], hidden f32[F, 32], offset, output f32[32], each with
    Adagrad's `..._squares`; lists f64[1], how many were learnt; losses f64[2], smoothed prequential losses (linear,
    network). All are views of four arrays, which is what the compiled steps take.
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
        self._flat: F32 = np.zeros(SIZE, np.float32)
        self._squares: F32 = np.full(SIZE, SQUARE, np.float32)
        self._moments: F64 = np.zeros((2, F))
        self._numbers: F64 = np.zeros(3)
        self.weights, self.skip, self.hidden, self.offset, self.output = _cut(self._flat)
        self.squares, self.skip_squares, self.hidden_squares, self.offset_squares, self.output_squares = _cut(
            self._squares
        )
        self.mean, self.variance = self._moments
        self.lists, self.losses = self._numbers[:1], self._numbers[1:]
        self.variance[:] = 1.0
        self.latest = (0.0, 0.0)
        """Losses (linear, network) of the last list before its step; not stored."""
        self._bear_linear()
        self._bear_network()

    def _bear_linear(self) -> None:
        """Give the linear model its birth values: the prior and the transitions."""
        self.weights[:] = 0.0
        self.weights[[LOG_PRIOR, LOG_TRANSITION]] = 0.5
        self.squares[:] = SQUARE

    def _bear_network(self) -> None:
        """Give the network its birth values: small random units beside the linear model as it is."""
        born = np.random.Generator(np.random.Philox(_BIRTH_SEED))
        self.skip[:] = self.weights
        self.hidden[:] = born.normal(0.0, 0.5 * math.sqrt(2.0 / F), (F, HIDDEN))
        self.offset[:] = 0.0
        self.output[:] = born.normal(0.0, 0.1, HIDDEN)
        self._squares[F:] = SQUARE

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
        out = np.empty(len(x))
        _score(x, self._moments, self._flat, self.scorer == "network", out)
        return out

    def last_hidden(self, x: F64) -> F64:
        """Return what the network's last layer sees of features f64[m, F], f64[m, LAST]: each row by itself.

        Normalised features and hidden units, a fifth of each so that they are about 1 at most, and 1.
        """
        return self.seen(x)[0]

    def seen(self, x: F64) -> tuple[F64, F64]:
        """Return `last_hidden` and `score` of features f64[m, F], of one pass."""
        out, scores = np.empty((len(x), LAST)), np.empty(len(x))
        _last_hidden(x, self._moments, self._flat, self.scorer == "network", out, scores)
        return out, scores

    def loosen(self, factor: float) -> None:
        """Let both models learn faster: their sums of squares x factor, at least those of birth."""
        np.maximum(self._squares * np.float32(factor), np.float32(SQUARE), out=self._squares)

    def rates(self) -> dict[str, float]:
        """Return Adagrad's mean learning rates of either model: rate_linear, rate_network."""
        rates = STEP / np.sqrt(self._squares)
        return {"rate_linear": float(rates[: len(self.weights)].mean()),
                "rate_network": float(rates[len(self.weights) :].mean())}  # fmt: skip

    def square_sum(self) -> float:
        """Return the sum of all sums of squares: it grows by the squared norm of each list's gradient."""
        return float(self._squares.sum(dtype=np.float64))

    def learn(self, x: F16 | F64, label: int, slowest: float = SLOWEST) -> float:
        """Take one listwise step on features f16[m, F] (others are rounded to it), the chosen item at row `label`.

        slowest: least rate of the running mean and variance. Returns the loss before the step of the model that then
        scored; 0 for a list that teaches nothing. A model that diverged is born again, and a network that was has to do
        better than the linear model before it scores again.
        """
        if len(x) < 2:
            return 0.0
        at = ("linear", "network").index(self.scorer)
        if x.dtype != np.float16:
            with np.errstate(over="ignore"):  # what is beyond a half becomes infinite, and the list teaches nothing
                x = x.astype(np.float16)
        halves = np.ascontiguousarray(x).view(np.uint16)
        losses = _learn(halves, label, self._numbers, self._moments, self._flat, self._squares, slowest)
        linear, network = self.latest = losses
        if not linear < WORST:
            self._bear_linear()
        if not network < WORST:
            self._bear_network()
            self.losses[1] = self.losses[0] + 1.0
        return float(losses[at]) if losses[at] < WORST else 0.0
