"""What each item's exposures, dwells and ratings say of it: discounted sums, read as posteriors.

    click    Beta(s0 m0 + S, s0 (1 - m0) + E - S)        E, S: examined exposures and successes, m0: its prior rate
    dwell    Normal-Gamma of log1p(seconds)              from n, sum, sum of squares
    rating   Normal-Gamma of the place on its scale      likewise

At each exposure an item's E and S are multiplied by `FORGETTING` and E grows by the chance that the position is looked
at, 1 / log2(place + 2); at each success S grows by 1. So forgetting goes by an item's own exposures: a shop and a news
site need no other. m0 is what alike items earned: the rate of everybody times the mean ratio of its tokens (category,
tags, provider, year, words of the title), each shrunk by 20 exposures; dwells and ratings likewise. Sums are moved
event by event, in order: any cut of a stream gives the same. Russo et al.: A tutorial on Thompson sampling (2018),
section 6.3, for discounting; Murphy: Conjugate Bayesian analysis of the Gaussian distribution (2007), section 3.
Knows nothing about slates or policies.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.content.tokens import BUCKETS

COLUMNS: Final = (
    "exposures", "successes", "dwells", "dwell_sum", "dwell_squares", "ratings", "rating_sum", "rating_squares",
)  # fmt: skip
FORGETTING: Final = 0.998
"""An item's own exposure counts for half after about 350 others of it."""
STRENGTH: Final = 20.0
"""s0: how many examined exposures the prior is worth."""
ALIKE: Final = 20.0
"""How many examined exposures, dwells or ratings everybody's mean is worth in that of a token."""
FIRST: Final = 30
"""An item shown less often than this is still exploring: slots set apart for first impressions may go to it."""
NORMAL_GAMMA: Final = (2.0, 2.0, 1.0)
"""Prior of a mean and a precision: observations that the mean, and twice the shape, are worth, and the variance."""

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


class NormalGamma(NamedTuple):
    """mean and its standard deviation (of a Student t with `freedom` degrees), variance of one observation."""

    mean: float
    deviation: float
    variance: float
    freedom: float
    observations: float


@njit(cache=True)
def expose(sums, rows, first, last):  # type: ignore[no-untyped-def]
    """Count one slate: its items are rows[first:last], from the first position on."""
    for k in range(first, last):
        row = rows[k]
        sums[row, 0] = FORGETTING * sums[row, 0] + 1.0 / math.log2(k - first + 2.0)
        sums[row, 1] *= FORGETTING


@njit(cache=True)
def observe(sums, row, column, x):  # type: ignore[no-untyped-def]
    """Count one dwell (column 2) or rating (column 5)."""
    for j in range(3):
        sums[row, column + j] *= FORGETTING
    sums[row, column] += 1.0
    sums[row, column + 1] += x
    sums[row, column + 2] += x * x


@njit(cache=True)
def token_ratios(tokens, sums, n, out):  # type: ignore[no-untyped-def]
    """Fill out f64[BUCKETS] with log(rate of a token's items / rate of all), shrunk; returns the rate of all."""
    exposures, successes = np.zeros(len(out)), np.zeros(len(out))
    all_exposures, all_successes = ALIKE, 1.0
    for i in range(n):
        e, s = sums[i, 0], sums[i, 1]
        if e <= 0.0:
            continue
        all_exposures += e
        all_successes += s
        for k in range(tokens.shape[1]):
            if tokens[i, k] < 0:
                break
            exposures[tokens[i, k]] += e
            successes[tokens[i, k]] += s
    rate = min(all_successes / all_exposures, 0.5)
    for t in range(len(out)):
        out[t] = 0.0
        if exposures[t] > 0.0:
            out[t] = math.log((successes[t] + ALIKE * rate) / ((exposures[t] + ALIKE) * rate))
    return rate


@njit(cache=True)
def betas(rows, tokens, sums, ratios, rate, alpha, beta):  # type: ignore[no-untyped-def]
    """Fill alpha, beta f64[m] with the click posteriors of rows i64[m]."""
    for i in range(len(rows)):
        row, total, count = rows[i], 0.0, 0
        for k in range(tokens.shape[1]):
            t = tokens[row, k]
            if t < 0:
                break
            total += ratios[t]
            count += 1
        prior = min(rate * math.exp(total / count), 0.5) if count else rate
        e, s = sums[row, 0], sums[row, 1]
        alpha[i] = STRENGTH * prior + s
        beta[i] = STRENGTH * (1.0 - prior) + max(e - s, 0.0)


@njit(cache=True)
def log_odds(alpha, beta, mean, deviation):  # type: ignore[no-untyped-def]
    """Fill mean and standard deviation f64[m] of log(p / (1 - p)) for p ~ Beta: digammas and trigammas, both exact."""
    for i in range(len(alpha)):
        a0, a1 = _gammas(alpha[i])
        b0, b1 = _gammas(beta[i])
        mean[i], deviation[i] = a0 - b0, math.sqrt(a1 + b1)


@njit(cache=True)
def _gammas(x):  # type: ignore[no-untyped-def]
    """Return digamma and trigamma of x > 0: upwards to 6, then the asymptotic series (to about 1e-9)."""
    zero, one = 0.0, 0.0
    while x < 6.0:
        zero -= 1.0 / x
        one += 1.0 / (x * x)
        x += 1.0
    y = 1.0 / (x * x)
    zero += math.log(x) - 0.5 / x - y * (1 / 12 - y * (1 / 120 - y * (1 / 252 - y * (1 / 240 - y * (1 / 132)))))
    one += 1.0 / x + 0.5 * y + y / x * (1 / 6 - y * (1 / 30 - y * (1 / 42 - y * (1 / 30 - y * (5 / 66)))))
    return zero, one


@njit(cache=True)
def alike_mean(tokens, sums, n, row, column, everybody):  # type: ignore[no-untyped-def]
    """Return what dwells (column 2) or ratings (5) of items alike one row come to: the mean over the row's tokens.

    Each token's is the mean of the observations of its items, shrunk towards everybody's by ALIKE observations.
    """
    place, count = np.full(BUCKETS, -1, np.int64), 0
    for k in range(tokens.shape[1]):
        if tokens[row, k] < 0:
            break
        place[tokens[row, k]] = count
        count += 1
    if count == 0:
        return everybody
    observed, totals = np.full(count, ALIKE), np.full(count, ALIKE * everybody)
    for i in range(n):
        if sums[i, column] > 0.0:
            for k in range(tokens.shape[1]):
                if tokens[i, k] < 0:
                    break
                if place[tokens[i, k]] >= 0:
                    observed[place[tokens[i, k]]] += sums[i, column]
                    totals[place[tokens[i, k]]] += sums[i, column + 1]
    return (totals / observed).mean()


def normal_gamma(count: float, total: float, squares: float, prior_mean: float) -> NormalGamma:
    """Return the posterior of a mean whose observations sum up to `total`; `prior_mean` is that of alike items."""
    worth, doubled_shape, variance = NORMAL_GAMMA
    freedom = doubled_shape + count
    mean = (worth * prior_mean + total) / (worth + count)
    scatter = max(squares - total * total / count, 0.0) if count > 0.0 else 0.0
    between = worth * count / (worth + count) * ((total / count - prior_mean) ** 2 if count > 0.0 else 0.0)
    spread = (doubled_shape * variance + scatter + between) / freedom
    return NormalGamma(mean, math.sqrt(spread / (worth + count)), spread, freedom, count)
