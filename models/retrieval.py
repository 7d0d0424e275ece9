"""Candidates: the best few of each channel over the whole catalogue, excluded items apart. Knows nothing of ranking.

    popular_now 30 by P 15 min | popular_today 30 by P 1 d | popular 60 by the prior mixture
    transition 80 by A[h0] + .3 sum_p .8^p B[h_p] + .2 prior | vector 80 by q.E + b + log prior (exact)
    recent <= 25 of the user's own last items | fresh 10 newest first-seen items
    repeat 100 of all own earlier items (those the seen list remembers), by the transition score, else .2 prior
    co_visitation 80 by the sum of the cosines of C to the last 20 items
    context 40 by the sum of their shares in the contexts that hold: (count + 5 prior) / (total + 5)
    unexplored 30 newest (published, else first seen) of the items that few slates have shown so far

Every list is the exact top of its score; one pass of compiled code, O(items).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.bandit.posterior import FIRST
from models.decay import STEPS, blend, scan, steps_between
from models.factors import dot
from models.items import ItemArrays, cosine

CHANNELS: Final = (
    "popular_now", "popular_today", "popular", "transition", "vector", "recent", "fresh", "repeat", "co_visitation",
    "context", "unexplored",
)  # fmt: skip
"""Their places are stored in impressions: new ones go to the end."""
QUOTAS: Final = np.array([30, 30, 60, 80, 80, 25, 10, 100, 80, 40, 30])
NOT_EXPLORING: Final = QUOTAS * (np.arange(len(QUOTAS)) != CHANNELS.index("unexplored"))
"""Quotas where no slot is set apart for first impressions."""
POPULAR_NOW, POPULAR_TODAY, POPULAR, TRANSITION, VECTOR, RECENT, FRESH, REPEAT, CO_VISITATION, CONTEXT, UNEXPLORED = (
    range(len(CHANNELS))
)
NOT_FOUND: Final = np.uint16(65535)
"""The place of an item in the list of a channel that did not bring it."""
_NOW, _TODAY = 1, 3  # places of 15 min and 1 d on the grid

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
U16 = NDArray[np.uint16]
U8 = NDArray[np.uint8]


@njit(cache=True)
def _sift(values, rows, at, size):  # type: ignore[no-untyped-def]
    """Restore the min-heap below `at`."""
    value, row = values[at], rows[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and values[child + 1] < values[child]:
            child += 1
        if values[child] >= value:
            break
        values[at], rows[at] = values[child], rows[child]
        at = child
    values[at], rows[at] = value, row


@njit(cache=True)
def top(scores, n, blocked, k):  # type: ignore[no-untyped-def]
    """Return the rows i64[<= k] of the highest scores among the first n that are not blocked, best first."""
    values, rows = np.empty(k, np.float32), np.empty(k, np.int64)
    size = 0
    least = np.float32(-np.inf)
    for i in range(n):
        if scores[i] > least and not blocked[i]:
            if size < k:
                values[size], rows[size] = scores[i], i
                size += 1
                if size == k:
                    for at in range(k // 2 - 1, -1, -1):
                        _sift(values, rows, at, k)
                    least = values[0]
            else:
                values[0], rows[0] = scores[i], i
                _sift(values, rows, 0, k)
                least = values[0]
    order = np.argsort(-values[:size], kind="mergesort")
    return rows[:size][order]


@njit(cache=True)
def log_into(values, n, out):  # type: ignore[no-untyped-def]
    """Fill out f32[n] with the natural logs of positive values f32[n], to about 1e-5; compiles to vector code."""
    bits = values.view(np.int32)
    fraction = np.empty(n, np.int32)
    for i in range(n):
        fraction[i] = (bits[i] & 0x007FFFFF) | 0x3F800000
    m = fraction.view(np.float32)
    for i in range(n):
        e = np.float32((bits[i] >> 23) - 127)
        x = m[i] - np.float32(1.5)
        x *= np.float32(2.0 / 3.0)
        # log(1.5 (1 + x)), |x| <= 1/3, by its series
        y = np.float32(1.0 / 9.0)
        y = np.float32(-1.0 / 8.0) + x * y
        y = np.float32(1.0 / 7.0) + x * y
        y = np.float32(-1.0 / 6.0) + x * y
        y = np.float32(1.0 / 5.0) + x * y
        y = np.float32(-1.0 / 4.0) + x * y
        y = np.float32(1.0 / 3.0) + x * y
        y = np.float32(-1.0 / 2.0) + x * y
        y = np.float32(1.0) + x * y
        out[i] = e * np.float32(0.6931471805599453) + np.float32(0.4054651081081644) + x * y


@njit(cache=True)
def _transitions(items, history, prior, n):  # type: ignore[no-untyped-def]
    """Return f32[n] with the transition score of the rows that follow the history, -inf elsewhere."""
    out = np.full(n, -np.inf, np.float32)
    h = min(len(history), 5)
    b_total = 0.0
    for p in range(h):
        if history[p] >= 0:
            b_total += 0.8**p * items.b_sums[history[p]]
    for p in range(h):
        row = history[p]
        if row < 0:
            continue
        if p == 0:
            for k in range(items.a_items.shape[1]):
                y = items.a_items[row, k]
                if y < 0:
                    break
                if out[y] == -np.inf:
                    out[y] = 0.2 * prior[y]
                out[y] += items.a_weights[row, k] / (items.a_sums[row] + 5.0)
        for k in range(items.b_items.shape[1]):
            y = items.b_items[row, k]
            if y < 0:
                break
            if out[y] == -np.inf:
                out[y] = 0.2 * prior[y]
            out[y] += 0.3 * 0.8**p * items.b_weights[row, k] / (b_total + 5.0)
    return out


@njit(cache=True)
def _vector_scores(vectors, bias, q, n, out):  # type: ignore[no-untyped-def]
    """Add q . E + b to out f32[n]."""
    for i in range(n):
        out[i] += dot(q, vectors[i]) + bias[i]


@njit(cache=True)
def _own_earlier(own, scores, prior, blocked, k):  # type: ignore[no-untyped-def]
    """Return the k own items i64[s] of the highest transition score, .2 prior where there is none."""
    values, out_of = np.full(len(own), -np.inf, np.float32), np.zeros(len(own), np.uint8)
    for j in range(len(own)):
        row = own[j]
        out_of[j] = row < 0 or row >= len(prior) or blocked[row]
        if not out_of[j]:
            values[j] = scores[row] if scores[row] > -np.inf else 0.2 * prior[row]
    return own[top(values, len(own), out_of, k)]


@njit(cache=True)
def _visited_together(items, history, n):  # type: ignore[no-untyped-def]
    """Return f32[n] with the sum of the cosines of C from the last 20 items, -inf where no list holds the row."""
    out = np.full(n, -np.inf, np.float32)
    for p in range(min(len(history), 20)):
        row = history[p]
        if row < 0:
            continue
        for k in range(items.c_items.shape[1]):
            y = items.c_items[row, k]
            if y < 0:
                break
            if out[y] == -np.inf:
                out[y] = 0.0
            out[y] += cosine(items.c_weights[row, k], items.c_sums[row], items.weights[y, 7])
    return out


@njit(cache=True)
def _chosen_under(items, context, prior, n):  # type: ignore[no-untyped-def]
    """Return f32[n] with the sum of the shares that rows have in the contexts, -inf where no list holds the row."""
    out = np.full(n, -np.inf, np.float32)
    for c in range(len(context)):
        total = items.c_sums[context[c]]
        for k in range(items.c_items.shape[1]):
            y = items.c_items[context[c], k]
            if y < 0:
                break
            if out[y] == -np.inf:
                out[y] = 0.0
            out[y] += (items.c_weights[context[c], k] + 5.0 * prior[y]) / (total + 5.0)
    return out


@njit(cache=True)
def _merge(rows, c, seen, out_rows, out_channel, out_places, count):  # type: ignore[no-untyped-def]
    """Append a channel's rows; an item found before is credited to the channel that ranks it higher."""
    for rank in range(len(rows)):
        row = rows[rank]
        at = seen[row]
        if at < 0:
            at = seen[row] = count
            out_rows[at], out_channel[at] = row, c
            for other in range(out_places.shape[1]):
                out_places[at, other] = 65535
            count += 1
        elif rank < out_places[at, out_channel[at]]:
            out_channel[at] = c
        out_places[at, c] = rank
    return count


@njit(cache=True)
def gather(n, items, blocked, cells_now, blends, viewer, vectors, bias, q, quotas, place):  # type: ignore[no-untyped-def]
    """Return (rows i64[m], channel u8[m], places u16[m, c], found i64[c]): the union of all channels.

    `channel` is the one that ranks an item highest, `places` are those in the list of each, `found` how many each
    brought. blends f64[3, 9]: 15 min, 1 d, prior; place i32[capacity] is -1 everywhere and is left so.
    """
    history = viewer.history
    popularity = np.empty((3, n), np.float32)
    scan(n, items.weights, items.cells, cells_now, blends, popularity)
    transitions = _transitions(items, history, popularity[2], n)
    room = 0
    for c in range(len(quotas)):
        room += quotas[c]
    rows, channel = np.empty(room, np.int64), np.empty(room, np.uint8)
    places = np.empty((room, len(quotas)), np.uint16)
    found = np.zeros(len(quotas), np.int64)
    count = 0
    for c in range(len(quotas)):
        if quotas[c] == 0:
            continue
        if c < 3:
            best = top(popularity[c], n, blocked, quotas[c])
        elif c == 3:
            best = top(transitions, n, blocked, quotas[c])
        elif c == 4:
            scores = np.empty(n, np.float32)
            log_into(popularity[2], n, scores)
            _vector_scores(vectors, bias, q, n, scores)
            best = top(scores, n, blocked, quotas[c])
        elif c == 5:
            best = _own(history, blocked, quotas[c])
        elif c == 6:
            best = _newest(items.first, n, blocked, quotas[c])
        elif c == 7:
            best = _own_earlier(viewer.own, transitions, popularity[2], blocked, quotas[c])
        elif c == 8:
            best = top(_visited_together(items, history, n), n, blocked, quotas[c])
        elif c == 9:
            best = top(_chosen_under(items, viewer.context, popularity[2], n), n, blocked, quotas[c])
        else:
            best = _unexplored(items, n, blocked, quotas[c])
        found[c] = len(best)
        count = _merge(best, c, place, rows, channel, places, count)
    for i in range(count):
        place[rows[i]] = -1
    return rows[:count], channel[:count], places[:count], found


@njit(cache=True)
def _newest(first, n, blocked, k):  # type: ignore[no-untyped-def]
    """Return the k rows with the latest first event, newest first; seconds since the newest keep f32 exact enough."""
    latest = -np.inf
    for i in range(n):
        if first[i] < np.inf:
            latest = max(latest, first[i])
    ages = np.empty(n, np.float32)
    for i in range(n):
        ages[i] = first[i] - latest if first[i] < np.inf else -np.inf
    return top(ages, n, blocked, k)


@njit(cache=True)
def _unexplored(items, n, blocked, k):  # type: ignore[no-untyped-def]
    """Return the k newest rows that were shown less often than FIRST."""
    latest, since = 0.0, np.empty(n)
    for i in range(n):
        since[i] = items.born[i] if items.born[i] > 0.0 else items.first[i]
        if items.shown[i] >= FIRST or since[i] == np.inf:
            since[i] = -np.inf
        latest = max(latest, since[i])
    ages = np.empty(n, np.float32)
    for i in range(n):
        ages[i] = since[i] - latest
    return top(ages, n, blocked, k)


@njit(cache=True)
def _own(history, blocked, k):  # type: ignore[no-untyped-def]
    """Return the user's own last distinct rows, newest first."""
    out = np.empty(k, np.int64)
    count = 0
    for p in range(len(history)):
        row = history[p]
        known = row >= 0 and not blocked[row]
        for j in range(count):
            if out[j] == row:
                known = False
        if known and count < k:
            out[count] = row
            count += 1
    return out[:count]


def blends(mixture: F64, scale: F64, totals: F64, known: float) -> F64:
    """Return f64[3, 9]: how to read P 15 min, P 1 d and the prior off a row's raw counts (see `models.decay.blend`)."""
    out = np.empty((3, 9))
    for i, half_life in enumerate((_NOW, _TODAY)):
        one = np.zeros(8)
        one[half_life] = 1.0
        blend(one, scale, totals, known, out[i])
    blend(mixture, scale, totals, known, out[2])
    return out


def ranks(items: ItemArrays, n: int, blocked: U8, row: int, frame: tuple[I32, F64, F64, float], known: float) -> F64:
    """Return f64[8]: the mid-rank (0 = best) of a row among those not blocked, by each half-life's popularity."""
    out: F64 = _ranks(items.weights, items.cells, n, blocked, row, frame[0], frame[1], frame[2], known)
    return out


@njit(cache=True)
def _ranks(weights, cells, n, blocked, row, cells_now, scale, totals, known):  # type: ignore[no-untyped-def]
    out, mine, p = np.full(8, -0.5), np.empty(8), np.empty(8)
    own, carried = np.empty(8), np.empty(8)  # P_h = own_h w_h exp(-30 dk_h) + carried_h P_longer
    for h in range(8):
        own[h], carried[h] = scale[h] / (totals[h] + 5.0), 5.0 / (totals[h] + 5.0)
    base = 1.0 / (totals[7] + 0.5 * known)
    _grid(weights[row], cells[row], cells_now, own, carried, base, mine)
    for i in range(n):
        if not blocked[i]:
            _grid(weights[i], cells[i], cells_now, own, carried, base, p)
            for h in range(8):
                out[h] += (p[h] > mine[h]) + 0.5 * (p[h] == mine[h])
    return np.maximum(out, 0.0)


@njit(cache=True)
def _grid(weights, cells, cells_now, own, carried, base, out):  # type: ignore[no-untyped-def]
    p = (weights[7] + 0.5) * base
    for h in range(7, -1, -1):
        w = weights[h]
        if w != 0.0 and cells[h] != cells_now[h]:
            w *= STEPS[steps_between(cells[h], cells_now[h])]
        p = own[h] * w + carried[h] * p
        out[h] = p
