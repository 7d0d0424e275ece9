"""Named features of (user, item, now). Knows nothing about retrieval, nor about what is made of them.

A feature of an item does not depend on the other candidates. "Lift" is the log of a smoothed conditional probability
over the prior: log((c / prior + 5) / (sum + 5)).
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.bandit.posterior import betas
from models.content.tokens import lifts
from models.decay import NAMES, popularities
from models.factors import dot
from models.items import cosine

FEATURES: Final = (
    *(f"log_popularity_{name}" for name in NAMES),
    "log_prior",
    "log_count",
    "lift_a0",
    "lift_a1",
    "lift_b0",
    "lift_b1",
    "lift_b2",
    "lift_b",
    "encoder",
    "similarity_0",
    "similarity_1",
    "log_transition",
    "log_age",
    "log_idle",
    "own_count",
    "own_recency",
    "log_history",
    "log_gap",
    "lift_a0_in_session",
    "own_count_in_session",
    "log_transition_in_session",
    "log_prior_by_history",
    "seen",
    "seen_order",
    "log_seen",
    "log_visited",
    "root_visited",
    "lift_fields",
    "lift_words",
    "context_most",
    "context_sum",
    "trend_15min",
    "trend_1d",
    "trend_7d",
    "trend_28d",
    "log_rate",
    "log_exposures",
)
F: Final = len(FEATURES)
LOG_PRIOR: Final = FEATURES.index("log_prior")
LOG_TRANSITION: Final = FEATURES.index("log_transition")
_SEEN: Final = FEATURES.index("seen")
_VISITED: Final = FEATURES.index("log_visited")
_CONTENT: Final = FEATURES.index("lift_fields")
_CONTEXT: Final = FEATURES.index("context_most")
_TREND: Final = FEATURES.index("trend_15min")
_RATE: Final = FEATURES.index("log_rate")

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


class Viewer(NamedTuple):
    """Who asks: rows of their sequence i64[h], newest first, -1 where unknown, and its times f64[h] (s).

    own i64[s]: rows of every item they acted on, in order of the first time, where a slate may repeat them.
    context i64[c]: rows of the contexts that hold now.
    """

    history: I64
    times: F64
    own: I64
    context: I64


class Frame(NamedTuple):
    """The moment: what the popularities of `models.decay` are read with at `now` (s), `Items.token_shares`, and what an
    item's clicks are read with, `Items.click_rates`."""

    now: float
    cells: I32
    scale: F64
    totals: F64
    known: float
    token_shares: F64
    token_ratios: F64
    click_rate: float


class Learnt(NamedTuple):
    """The weights that features need: mixture f64[8], vectors f32[capacity, d], bias f32[capacity], query f32[d]."""

    mixture: F64
    vectors: F32
    bias: F32
    query: F32


@njit(cache=True)
def _spread(place, items, weights, row, column, factor, out):  # type: ignore[no-untyped-def]
    """Add factor x the weights of one neighbour list to a column, for the candidates that are in it."""
    for k in range(items.shape[1]):
        item = items[row, k]
        if item < 0:
            break
        if place[item] >= 0:
            out[place[item], column] += factor * weights[row, k]


@njit(cache=True)
def _lift(count, total, prior):  # type: ignore[no-untyped-def]
    return math.log((count / prior + 5.0) / (total + 5.0))


@njit(cache=True)
def _own(place, own, out):  # type: ignore[no-untyped-def]
    """Fill the family `seen`: whether an item is the viewer's own, how many firsts came since, how many there are."""
    for i in range(len(out)):
        out[i, _SEEN + 2] = math.log1p(np.float64(len(own)))
    for j in range(len(own)):
        if own[j] >= 0 and place[own[j]] >= 0:
            i = place[own[j]]
            out[i, _SEEN] = 1.0
            out[i, _SEEN + 1] = math.log1p(np.float64(len(own) - 1 - j))


@njit(cache=True)
def _visited(place, rows, history, items, out):  # type: ignore[no-untyped-def]
    """Fill the family `visited`: log and root of the sum of the cosines of C from the last 20 items."""
    for p in range(min(len(history), 20)):
        row = history[p]
        if row < 0:
            continue
        for k in range(items.c_items.shape[1]):
            y = items.c_items[row, k]
            if y < 0:
                break
            if place[y] >= 0:
                out[place[y], _VISITED] += cosine(items.c_weights[row, k], items.c_sums[row], items.weights[y, 7])
    for i in range(len(rows)):
        total = min(out[i, _VISITED], 1e6)  # at most about 20; stored bytes may say anything
        out[i, _VISITED] = math.log(total + 1e-3) + 7.0
        out[i, _VISITED + 1] = math.sqrt(total)


@njit(cache=True)
def context_count(weights, total, k, prior):  # type: ignore[no-untyped-def]
    """Return the count of an item that is at place k of a context's list f64[K], or, for k < 0, in no place of it.

    A list that is full says of others only that they were not chosen more than its least: expected, total x prior, or
    that.
    """
    if k >= 0:
        return weights[k]
    if weights[len(weights) - 1] <= 0.0:
        return 0.0
    return min(total * prior, weights.min())


@njit(cache=True)
def _context_places(place, context, items, m):  # type: ignore[no-untyped-def]
    """Return i64[c, m]: the place of each candidate in the list of each context, -1 where it is not in it."""
    out = np.full((len(context), m), -1, np.int64)
    for c in range(len(context)):
        for k in range(items.c_items.shape[1]):
            y = items.c_items[context[c], k]
            if y < 0:
                break
            if place[y] >= 0:
                out[c, place[y]] = k
    return out


@njit(cache=True)
def _context(context, places, items, out):  # type: ignore[no-untyped-def]
    """Fill the family `context`: the greatest lift over the contexts that hold, and their sum."""
    for c in range(len(context)):
        weights, total = items.c_weights[context[c]], items.c_sums[context[c]]
        for i in range(len(out)):
            prior = math.exp(out[i, 8])
            lift = _lift(context_count(weights, total, places[c, i], prior), total, prior)
            out[i, _CONTEXT] = lift if c == 0 else max(out[i, _CONTEXT], lift)
            out[i, _CONTEXT + 1] += lift


@njit(cache=True)
def _trend(out):  # type: ignore[no-untyped-def]
    """Fill the family `trend`: how much more popular an item is of late than over the while before."""
    for i in range(len(out)):
        out[i, _TREND] = out[i, 1] - out[i, 3]
        out[i, _TREND + 1] = out[i, 3] - out[i, 4]
        out[i, _TREND + 2] = out[i, 4] - out[i, 5]
        out[i, _TREND + 3] = out[i, 5] - out[i, 7]


@njit(cache=True)
def _posterior(rows, items, frame, out):  # type: ignore[no-untyped-def]
    """Fill the family `posterior`: log of an item's expected click rate against everybody's, and its exposures."""
    m = len(rows)
    alpha, beta = np.empty(m), np.empty(m)
    betas(rows, items.tokens, items.sums, frame.token_ratios, frame.click_rate, alpha, beta)
    for i in range(m):
        out[i, _RATE] = math.log(alpha[i] / (alpha[i] + beta[i]) / frame.click_rate)
        out[i, _RATE + 1] = math.log1p(items.sums[rows[i], 0])


@njit(cache=True)
def features(rows, place, viewer, frame, items, born, learnt, out):  # type: ignore[no-untyped-def]
    """Fill out f64[m, F] with the features of candidate rows i64[m]; `place` i32[n] is -1 everywhere and is left so."""
    history, times, now = viewer.history, viewer.times, frame.now
    vectors = learnt.vectors
    m, h = len(rows), len(history)
    h0 = history[0] if h > 0 else np.int64(-1)
    h1 = history[1] if h > 1 else np.int64(-1)
    gap = max(now - times[0], 0.0) if h > 0 else 1e9
    session = 1.0 if gap < 3600.0 else 0.0
    for i in range(m):
        place[rows[i]] = i
        for f in range(out.shape[1]):
            out[i, f] = 0.0
    for p in range(min(h, 5)):
        if history[p] >= 0:
            if p < 2:
                _spread(place, items.a_items, items.a_weights, history[p], 10 + p, 1.0, out)
            if p < 3:
                _spread(place, items.b_items, items.b_weights, history[p], 12 + p, 1.0, out)
            _spread(place, items.b_items, items.b_weights, history[p], 15, 0.8**p, out)
    _own(place, viewer.own, out)
    _visited(place, rows, history, items, out)
    lifts(rows, history, items.tokens, items.token_fields, frame.token_shares, out, _CONTENT)
    context_places = _context_places(place, viewer.context, items, m)
    own_latest = np.full(m, -np.inf)
    for p in range(h):
        if history[p] >= 0 and place[history[p]] >= 0:
            i = place[history[p]]
            out[i, 22] += 1.0
            own_latest[i] = max(own_latest[i], times[p])
    b_total = 0.0
    for p in range(min(h, 5)):
        if history[p] >= 0:
            b_total += 0.8**p * items.b_sums[history[p]]
    a0_total = items.a_sums[h0] if h0 >= 0 else 0.0
    log_history = math.log1p(np.float64(h))
    log_gap = math.log1p(gap)
    grid = np.empty(8)
    for i in range(m):
        row = rows[i]
        place[row] = -1
        popularities(items.weights[row], items.cells[row], frame.cells, frame.scale, frame.totals, frame.known, grid)
        prior = 0.0
        for g in range(8):
            prior += learnt.mixture[g] * grid[g]
            out[i, g] = math.log(grid[g])
        out[i, 8] = math.log(prior)
        out[i, 9] = math.log1p(items.weights[row, 7])
        transition = out[i, 10] / (a0_total + 5.0) + 0.3 * out[i, 15] / (b_total + 5.0) + 0.2 * prior
        if h0 >= 0:
            out[i, 10] = _lift(out[i, 10], a0_total, prior)
            out[i, 17] = dot(vectors[h0], vectors[row])
        if h1 >= 0:
            out[i, 11] = _lift(out[i, 11], items.a_sums[h1], prior)
            out[i, 18] = dot(vectors[h1], vectors[row])
        for p in range(min(h, 3)):
            if history[p] >= 0:
                out[i, 12 + p] = _lift(out[i, 12 + p], items.b_sums[history[p]], prior)
        if h > 0:
            out[i, 15] = _lift(out[i, 15], b_total, prior)
        out[i, 16] = dot(learnt.query, vectors[row]) + learnt.bias[row]
        out[i, 19] = math.log(transition + 1e-6) + 7.0
        since = items.first[row]
        if since > now:
            since = born[row] if born[row] > 0.0 else now
        out[i, 20] = math.log1p(max(now - since, 0.0))
        out[i, 21] = math.log1p(min(max(now - items.last[row], 0.0), 1e9))
        out[i, 22] = math.log1p(out[i, 22])
        if own_latest[i] > -np.inf:
            out[i, 23] = math.log1p(2592000.0 / (max(now - own_latest[i], 0.0) + 60.0))
        out[i, 24], out[i, 25] = log_history, log_gap
        out[i, 26] = session * out[i, 10]
        out[i, 27] = session * out[i, 22]
        out[i, 28] = session * out[i, 19]
        out[i, 29] = out[i, 8] / (1.0 + h)
    _context(viewer.context, context_places, items, out)
    _trend(out)
    _posterior(rows, items, frame, out)
