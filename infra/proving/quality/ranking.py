"""Ranks over the known catalogue, and the decayed popularity that is a reference and breaks the others' ties.

What every reference shares: the state before the event's group scores all known items, items that a slate leaves out
get -inf, and the target's mid-rank is taken; items of equal score are ordered by decayed popularity, and a user without
history is offered that popularity. So a reference is never worse for what it cannot know.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from infra.proving.quality.events import Events

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
HALF_LIVES: Final = (120.0, 900.0, 7200.0, 86400.0, 604800.0, 2419200.0, 31536000.0, np.inf)
NAMES: Final = ("2min", "15min", "2h", "1d", "7d", "28d", "1y", "none")
SMOOTHING: Final = 5.0


class Log(NamedTuple):
    """The columns of Events that kernels read."""

    user: I64
    item: I64
    ts: F64
    label: NDArray[np.int8]
    start: I64
    end: I64
    known: I64
    history: I64
    history_first: I64
    history_before: I64
    blocked: I64
    blocked_first: I64
    blocked_before: I64


class Popularity(NamedTuple):
    """Decayed counts of every half-life: weights f64[8, items] and totals f64[8], as of ref f64[8]; rates f64[8]."""

    weights: F64
    totals: F64
    ref: F64
    rates: F64


class Board(NamedTuple):
    """Where scores are written: scores f32[items], popular f64[items]; out: ranks f64[n]
    (nan where not counted), raw f64[n]: the score of each event's item before it is learnt, 0 where nothing is known.
    """

    scores: F32
    popular: F64
    ranks: F64
    raw: F64


def columns(events: Events) -> Log:
    """Return the columns that kernels read."""
    return Log(
        events.user, events.item, events.ts, events.label, events.start, events.end, events.known, *events.history,
        *events.blocked,
    )  # fmt: skip


def popularity(items: int, t: float) -> Popularity:
    """Return the counts of nothing, as of time t (s)."""
    rates = np.log(2.0) / np.array(HALF_LIVES)
    return Popularity(np.zeros((8, items)), np.zeros(8), np.full(8, t), rates)


def board(events: Events) -> Board:
    """Return empty arrays to score and rank in."""
    return Board(
        np.empty(events.items, np.float32), np.empty(events.items), np.full(len(events), np.nan),
        np.zeros(len(events)),
    )  # fmt: skip


@njit(cache=True)
def count(popular, item, t):  # type: ignore[no-untyped-def]
    """Add one choice at time t."""
    for h in range(8):
        grown = popular.rates[h] * (t - popular.ref[h])
        if grown > 30.0:
            factor = np.exp(-min(grown, 700.0))
            popular.weights[h] *= factor
            popular.totals[h] *= factor
            popular.ref[h] = t
            grown = 0.0
        worth = np.exp(grown)
        popular.weights[h, item] += worth
        popular.totals[h] += worth


@njit(cache=True)
def base(popular, n, out):  # type: ignore[no-untyped-def]
    """Fill out f64[n] with the share of each item's undecayed count; returns that of an item never chosen."""
    low = 1.0 / (popular.totals[7] + 0.5 * n + 0.5)
    for i in range(n):
        out[i] = (popular.weights[7, i] + 0.5) * low
    return 0.5 * low


@njit(cache=True)
def sharpen(popular, h, t, n, out, never):  # type: ignore[no-untyped-def]
    """Turn P_longer in out f64[n] into P_h at time t: P_h = (w_h + 5 P_longer) / (W_h + 5); returns `never`'s."""
    fade = np.exp(-min(max(popular.rates[h] * (t - popular.ref[h]), -30.0), 700.0))
    low = 1.0 / (popular.totals[h] * fade + SMOOTHING)
    for i in range(n):
        out[i] = (popular.weights[h, i] * fade + SMOOTHING * out[i]) * low
    return SMOOTHING * never * low


@njit(cache=True)
def share(popular, h, t, n, out):  # type: ignore[no-untyped-def]
    """Fill out f64[n] with P_h of all items at time t, each half-life smoothed by the next longer."""
    never = base(popular, n, out)
    for g in range(6, h - 1, -1):
        never = sharpen(popular, g, t, n, out, never)


@njit(cache=True, fastmath={"reassoc", "contract", "nsz"})  # nan stays nan: a model that diverged must not shine
def dots(vectors, bias, user, n, out):  # type: ignore[no-untyped-def]
    """Fill out f32[n] with user . vector + bias of each item."""
    for i in range(n):
        total = bias[i]
        for k in range(len(user)):
            total += user[k] * vectors[i, k]
        out[i] = total


@njit(cache=True)
def block(log, e, scores):  # type: ignore[no-untyped-def]
    """Set the scores of items that the slate of event e leaves out to -inf."""
    n, first = log.known[e], log.blocked_first[e]
    for k in range(log.blocked_before[e]):
        item = log.item[log.blocked[first + k]]
        if item < n:
            scores[item] = -np.inf


@njit(cache=True)
def mid_rank(scores, n, target, popular, h, t, shares, filled):  # type: ignore[no-untyped-def]
    """Return the mid-rank of a target among scores [n], ties by popularity; inf where it is left out."""
    mine = scores[target]
    if not mine > -np.inf:  # left out, or nan
        return np.inf
    above, equal = 0, 0
    for i in range(n):
        above += not scores[i] <= mine  # nan, where a model diverged, counts as above
        equal += scores[i] == mine
    if equal > 1:
        if not filled:
            share(popular, h, t, n, shares)
        equal = 0
        for i in range(n):
            if scores[i] == mine:
                above += shares[i] > shares[target]
                equal += shares[i] == shares[target]
    return above + 0.5 * (equal - 1)


@njit(cache=True)
def judge(log, e, board, popular, h, fallback):  # type: ignore[no-untyped-def]
    """Rank all targets of the group that begins with e by board.scores, or by popularity where told to fall back."""
    n, t = log.known[e], log.ts[e]
    for j in range(e, log.end[e]):
        if log.item[j] < n and not fallback:
            board.raw[j] = board.scores[log.item[j]]
    if fallback:
        share(popular, h, t, n, board.popular)
        for i in range(n):
            board.scores[i] = board.popular[i]
    block(log, e, board.scores)
    filled = fallback
    for j in range(e, log.end[e]):
        if log.label[j] == 1 and log.item[j] < n:
            board.ranks[j] = mid_rank(board.scores, n, log.item[j], popular, h, t, board.popular, filled)


@njit(cache=True)
def learn_counts(log, e, popular):  # type: ignore[no-untyped-def]
    """Count the choices of the group that begins with e."""
    for j in range(e, log.end[e]):
        if log.label[j] == 1:
            count(popular, log.item[j], log.ts[j])


@njit(cache=True)
def rank_popular(log, first, last, board, popular, ranks, raw, frozen_from):  # type: ignore[no-untyped-def]
    """Rank by each half-life's popularity: fill ranks, raw f64[8, n]; counts learn nothing from `frozen_from` on."""
    e = first
    while e < last:
        n, t = log.known[e], log.ts[e]
        never = base(popular, n, board.popular)
        for h in range(7, -1, -1):
            if h < 7:
                never = sharpen(popular, h, t, n, board.popular, never)
            for i in range(n):
                board.scores[i] = board.popular[i]
            for j in range(e, log.end[e]):
                raw[h, j] = np.log(board.popular[log.item[j]] if log.item[j] < n else never)
            block(log, e, board.scores)
            for j in range(e, log.end[e]):
                if log.label[j] == 1 and log.item[j] < n:
                    ranks[h, j] = mid_rank(board.scores, n, log.item[j], popular, h, t, board.popular, True)
        if e < frozen_from:
            learn_counts(log, e, popular)
        e = log.end[e]
