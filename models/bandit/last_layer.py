"""A Bayesian linear layer over the ranker's last hidden features: what it would correct, and how sure it is.

    P(click | examined) of item y = p(y) + phi(y) . w,   w ~ N(0, sigma^2 / ridge)
    precision A = ridge I + sum_i g^(n - i) v_i phi_i phi_i',   b = sum_i g^(n - i) v_i phi_i (r_i - p_i)
    w | log ~ N(A^-1 b, sigma^2 A^-1)

p is the calibrated probability of the ranker's score, so that a young layer says what the ranker says; phi are the
ranker's normalised features, its hidden units and 1; v is how surely a position was examined; g forgets, a slate at a
time, and what is forgotten of A comes back as ridge. Least squares is additive: an exposure counts when it happens,
with reward 0 and the examination that is usual at its position, and a success, when it comes, adds the reward and makes
the examination certain. A and b are kept in f64 and solved when they are read: nothing is ever inverted in a recursion,
so that ten million updates lose nothing. Riquelme, Tucker and Snoek: Deep Bayesian bandits showdown (ICLR 2018), for
the neural-linear posterior; Russac, Vernade and Cappe: Weighted linear bandits (NeurIPS 2019), for forgetting.
Knows nothing about slates.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.examples import CodecError
from models.factors import fitted

PARTICLES: Final = 64
"""Draws of w that a Thompson slate takes its slots from."""
SCALE: Final = 0.1
"""Share of a posterior's standard deviation that Thompson draws have: whole ones explored far too long (DECISIONS)."""
RIDGE: Final = 4.0
FORGETTING: Final = 1.0 - 1.0 / 5_000.0
"""g: a slate counts for half after about 3,500 others."""
SLOWEST: Final = 1e-3
"""Rate of the running mean of p (1 - p), which stands for sigma^2."""

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@njit(cache=True)
def _expose(precision, b, numbers, phi, expected, examined, forgetting, ridge, slowest):  # type: ignore[no-untyped-def]
    """Forget once, then count the exposures that are finite, without reward; returns whether there was one.

    Row by row of A, each exposure after another: the matrix is gone through once.
    """
    kept, spread = 0, 0.0
    sane = np.zeros(len(phi), np.bool_)
    for k in range(len(phi)):
        total = expected[k]
        for j in range(len(b)):
            total += phi[k, j]
        sane[k] = abs(total) < np.inf
        if sane[k]:
            kept += 1
            spread += expected[k] * (1.0 - expected[k])
    if kept == 0:
        return False
    for i in range(len(b)):
        row = precision[i, : i + 1]
        for j in range(i + 1):
            row[j] *= forgetting
        row[i] += (1.0 - forgetting) * ridge
        b[i] *= forgetting
        for k in range(len(phi)):
            scaled = examined[k] * phi[k, i]
            if sane[k] and scaled != 0.0:
                for j in range(i + 1):
                    row[j] += scaled * phi[k, j]
                b[i] -= scaled * expected[k]
    numbers[0] += 1.0
    numbers[1] += max(1.0 / (numbers[0] + 50.0), slowest) * (spread / kept - numbers[1])
    return True


@njit(cache=True)
def _add(precision, b, phi, weight, reward):  # type: ignore[no-untyped-def]
    """Add weight phi phi' to the lower triangle of A, and reward phi to b."""
    for i in range(len(b)):
        scaled = weight * phi[i]
        if scaled != 0.0:
            for j in range(i + 1):
                precision[i, j] += scaled * phi[j]
        b[i] += reward * phi[i]


class LastLayer:
    """The posterior of w; precision f64[d, d] (its lower triangle), b f64[d], numbers f64[2]: slates, sigma^2.

    `step` of a model names the draw of the particles: a fixed state always draws the same.
    """

    def __init__(self, *, width: int) -> None:
        self.precision: F64 = np.diag(np.full(width, RIDGE))
        self.b: F64 = np.zeros(width)
        self.numbers: F64 = np.array([0.0, 0.05])
        self._solved: tuple[F64, F64] | None = None
        self._drawn: tuple[int, F64] | None = None

    @property
    def slates(self) -> int:
        """How many slates were counted."""
        return int(self.numbers[0])

    def expose(self, phi: F64, expected: F64, examined: F64) -> None:
        """Count one slate's exposures: phi f64[k, d], the probabilities expected f64[k], examined f64[k] from 0 to 1.

        What is not finite is left out.
        """
        if _expose(
            self.precision, self.b, self.numbers, phi, expected, examined, FORGETTING, RIDGE, SLOWEST
        ):  # fmt: skip
            self._solved = self._drawn = None

    def succeed(self, phi: F64, expected: float, examined: float, reward: float, *, first: bool = True) -> None:
        """Count the reward of an exposure f64[d] that was counted as `examined` when it happened.

        first: nothing has said before that it was examined; that becomes certain.
        """
        if not (np.isfinite(phi).all() and math.isfinite(expected) and math.isfinite(reward)):
            return
        more = 1.0 - examined if first else 0.0
        _add(self.precision, self.b, phi, more, reward - more * expected)
        self._solved = self._drawn = None

    def _solve(self) -> tuple[F64, F64]:
        """Return the mean f64[d] and the inverse f64[d, d] of A's lower Cholesky factor."""
        if self._solved is None:
            lower = np.linalg.cholesky(self.precision)  # reads the lower triangle
            inverse = np.linalg.inv(lower)
            self._solved = inverse.T @ (inverse @ self.b), inverse
        return self._solved

    def mean(self) -> F64:
        """Return the posterior mean f64[d] of w."""
        return self._solve()[0]

    def deviations(self, phi: F64) -> F64:
        """Return the posterior standard deviations f64[m] of phi f64[m, d] . w."""
        inverse = self._solve()[1]
        spread: F64 = np.sqrt(self.numbers[1] * ((phi @ inverse.T) ** 2).sum(1))
        return spread

    def particles(self, step: int) -> F64:
        """Return draws f64[d, PARTICLES] of w, SCALE of the posterior wide, the same for a state and a step."""
        if self._drawn is None or self._drawn[0] != step:
            mean, inverse = self._solve()
            rng = np.random.Generator(np.random.Philox(key=step))
            noise = rng.standard_normal((len(self.b), PARTICLES))
            self._drawn = step, mean[:, None] + SCALE * math.sqrt(self.numbers[1]) * (inverse.T @ noise)
        return self._drawn[1]

    def state(self) -> dict[str, Any]:
        """Return what is stored."""
        lower = self.precision[np.tril_indices(len(self.b))]
        return {"layer_precision": lower, "layer_b": self.b, "layer": self.numbers}

    def read_state(self, values: dict[str, Any]) -> tuple[F64, F64, F64]:
        """Return what `state` stored, birth values where nothing of this width was.

        Raises CodecError, also where a precision is not positive definite.
        """
        born = LastLayer(width=len(self.b))
        lower = born.precision[np.tril_indices(len(self.b))]
        stored_b = values.get("layer_b")
        if not isinstance(stored_b, np.ndarray) or stored_b.shape != born.b.shape:
            return lower, born.b, born.numbers
        stored = fitted(values, "layer_precision", lower)
        try:
            born.precision[np.tril_indices(len(self.b))] = stored
            np.linalg.cholesky(born.precision)
        except np.linalg.LinAlgError:
            raise CodecError("dense weights: layer_precision: expected a positive definite matrix") from None
        return stored, fitted(values, "layer_b", born.b), fitted(values, "layer", born.numbers)

    def set_state(self, found: tuple[F64, F64, F64]) -> None:
        """Copy what `read_state` found."""
        self.precision[np.tril_indices(len(self.b))] = found[0]
        self.b[:], self.numbers[:] = found[1], found[2]
        self._solved = self._drawn = None
