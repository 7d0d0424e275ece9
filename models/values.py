"""What an outcome is worth once it happens: the rating, the dwell, and whether they skip, hide or rate low.

    rating(y) - mean, dwell(y) = w . x,    skip(y), hide(y), low_rating(y) = sigmoid(logit rate + w . x)

x holds, for one user and one item: the item's own distribution, shrunk towards everybody's by two strengths; the
user's, from the tally of all outcomes and from the residuals of the last 20 rated items; the residuals of those,
weighted by how alike their vectors are to the item's; the likeness to items liked and pushed away; how often the item
was met. A rating is a place on its scale, -1 to 1. A dwell is log1p(s) less what item and user usually have, in
standard deviations: how much longer than usual, so that neither long videos nor slow readers count. Each head takes
an Adagrad step on every outcome as it comes, one by one: the model before each is what is judged.

Koren: Factor in the neighbors (TKDD 2010), for residuals and shrinkage. Knows nothing about rankers or slates.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from models.decay import grown
from models.examples import ACTION, DWELL, HIDDEN, LOW, RATING, SKIPPED, Entries
from models.factors import dot, fitted
from models.rows import Rows, find_row

HEADS: Final = ("rating", "dwell", "skip", "hide", "low_rating")
SIGNS: Final = (
    "one", "log_met", "unmet", "log_told", "pushed_away", "averse_most", "averse_mean", "liked_most", "liked_mean",
    "item", "item_shrunk", "user", "user_shrunk", "alike", "newest", "log_outcomes",
)  # fmt: skip
"""Names of x, in order; `met`: the item's outcomes of the head's kind, `told`: the user's."""
COLUMNS: Final = (
    "ratings", "rating_residuals", "dwells", "dwell_residuals", "outcomes", "skips", "hides", "low_ratings",
)  # fmt: skip
"""Statistics of an item: counts, and sums of what is left of ratings and log-dwells without mean and user."""
RATE: Final = 0.03
SQUARE: Final = 1e-2
"""Where Adagrad's sums of squares start."""
SLOWEST: Final = 1e-4
"""Rate of the running means once there are many."""
STORED: Final = ("weights", "squares", "world", "counts")

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]


class Known(NamedTuple):
    """What the kernels read: stats f32[capacity, 8], vectors f32[capacity, d], world f64[7] (see `Values`), weights."""

    stats: F32
    vectors: F32
    world: F64
    weights: F64


class Judge(NamedTuple):
    """Whose outcome it would be: rows i64[h] of their sequence, newest first, -1 where unknown, with kinds u8[h] and
    weights f32[h]; rows i64[a] of what they pushed away; tally f32[8]."""

    history: I64
    kinds: U8
    weights: F32
    averse: I64
    tally: F32


@njit(cache=True)
def _logit(p):  # type: ignore[no-untyped-def]
    p = min(max(p, 1e-4), 1.0 - 1e-4)
    return math.log(p / (1.0 - p))


@njit(cache=True)
def _sane(x, bound):  # type: ignore[no-untyped-def]
    """Return x within the bound, 0 for what is no number: stored bytes may say anything."""
    return min(max(x, -bound), bound) if x == x else 0.0


@njit(cache=True)
def _count(x):  # type: ignore[no-untyped-def]
    """Return a count, from 0 on."""
    return max(_sane(np.float64(x), 1e9), 0.0)


@njit(cache=True)
def _inverse_norm(vector):  # type: ignore[no-untyped-def]
    return 1.0 / (math.sqrt(dot(vector, vector)) + 1e-6)


@njit(cache=True)
def _rate(world, head):  # type: ignore[no-untyped-def]
    """Return how common a skip, hide or low rating (head 2, 3, 4) is; 0 where there never was one."""
    return world[2 + head]


@njit(cache=True)
def _user(judge, known, h, residuals, norms, away_norms, out):  # type: ignore[no-untyped-def]
    """Fill what depends on the user alone; residuals f64[h] are nan where no rating; out f64[5, 3]: told, two means."""
    stats, world = known.stats, known.world
    total, count, newest = 0.0, 0.0, 0.0
    for p in range(h):
        row = judge.history[p]
        residuals[p], norms[p] = np.nan, 0.0
        if row < 0:
            continue
        norms[p] = _inverse_norm(known.vectors[row])
        if judge.kinds[p] == RATING:
            expected = world[0] + _sane(np.float64(stats[row, 1]), 1e9) / (_count(stats[row, 0]) + 5.0)
            residuals[p] = _sane(np.float64(judge.weights[p]), 1.0) - expected
            total += residuals[p]
            count += 1.0
            if count == 1.0:
                newest = residuals[p]
    for p in range(len(judge.averse)):
        row = judge.averse[p]
        away_norms[p] = _inverse_norm(known.vectors[row]) if row >= 0 else 0.0
    tally = judge.tally
    ratings, dwells = _count(tally[0]), _count(tally[2])
    out[0, 0], out[0, 1] = ratings, total / (count + 1.0)
    out[0, 2] = (_sane(np.float64(tally[1]), 1e9) - ratings * world[0]) / (ratings + 3.0)
    mean = (_sane(np.float64(tally[3]), 1e9) - dwells * world[1]) / (dwells + 3.0)
    out[1, 0], out[1, 1], out[1, 2] = dwells, mean, mean
    outcomes = _count(tally[7])
    for head in range(2, 5):
        p = _rate(world, head)
        told = ratings if head == 4 else outcomes
        said = min(_count(tally[6 if head == 4 else 2 + head]), told)
        out[head, 0] = told
        for k in range(2):
            strength = 2.0 if k == 0 else 10.0
            out[head, 1 + k] = _logit((said + strength * p) / (told + strength)) - _logit(p)
    return newest


@njit(cache=True)
def _describe(row, judge, known, h, residuals, norms, away_norms, user, newest, x):  # type: ignore[no-untyped-def]
    """Fill x f64[5, 16] for the item in `row`: see SIGNS."""
    stats, vectors, world = known.stats, known.vectors, known.world
    own = _inverse_norm(vectors[row])
    liked_most, liked_sum, liked, alike, weight = 0.0, 0.0, 0.0, 0.0, 0.0
    for p in range(h):
        if norms[p] == 0.0:
            continue
        rated = residuals[p] == residuals[p]
        likes = judge.weights[p] > 0.0
        if not (rated or likes):
            continue
        cosine = _sane(own * norms[p] * dot(vectors[row], vectors[judge.history[p]]), 1.0)
        if likes:
            liked += 1.0
            liked_sum += cosine
            liked_most = max(liked_most, cosine)
        if rated:
            w = max(cosine, 0.0) ** 2
            alike += w * (residuals[p] - 0.5 * user[0, 1] - 0.5 * user[0, 2])
            weight += w
    away, averse_most, averse_sum, averse = 0.0, 0.0, 0.0, 0.0
    for p in range(len(judge.averse)):
        if away_norms[p] > 0.0:
            if judge.averse[p] == row:
                away = 1.0
            cosine = _sane(own * away_norms[p] * dot(vectors[row], vectors[judge.averse[p]]), 1.0)
            averse += 1.0
            averse_sum += cosine
            averse_most = max(averse_most, cosine)
    outcomes = _count(stats[row, 4])
    for head in range(5):
        z = x[head]
        met = _count(stats[row, 0]) if head in (0, 4) else _count(stats[row, 2]) if head == 1 else outcomes
        z[0], z[1], z[2] = 1.0, math.log1p(met) / 3.0, 1.0 if met == 0.0 else 0.0
        z[3], z[4] = math.log1p(user[head, 0]) / 3.0, away
        z[5], z[6] = averse_most, averse_sum / max(averse, 1.0)
        z[7], z[8] = liked_most, liked_sum / max(liked, 1.0)
        if head < 2:
            total = _sane(np.float64(stats[row, 2 * head + 1]), 1e9)
            z[9], z[10] = total / (met + 2.0), total / (met + 10.0)
        else:
            p, said = _rate(world, head), min(_count(stats[row, 3 + head]), met)
            z[9] = _logit((said + p) / (met + 1.0)) - _logit(p)
            z[10] = _logit((said + 5.0 * p) / (met + 5.0)) - _logit(p)
        z[11], z[12] = user[head, 1], user[head, 2]
        z[13], z[14], z[15] = alike / (weight + 0.5), newest, math.log1p(outcomes) / 3.0


@njit(cache=True)
def _say(x, known, head):  # type: ignore[no-untyped-def]
    """Return what a head says of x f64[5, 16]: a rating, standard deviations of dwell, or a probability."""
    world = known.world
    s = 0.0
    for f in range(x.shape[1]):
        s += known.weights[head, f] * x[head, f]
    if head == 0:
        return min(max(world[0] + s, -1.0), 1.0)
    if head == 1:
        return min(max(s, -3.0), 3.0)
    p = _rate(world, head)
    if p == 0.0:
        return 0.0
    return 1.0 / (1.0 + math.exp(-min(max(_logit(p) + s, -30.0), 30.0)))


@njit(cache=True)
def _score(rows, judge, known, out):  # type: ignore[no-untyped-def]
    """Fill out f64[m, 5] with what the heads say of rows i64[m]; each row's depend on that row alone."""
    h = min(len(judge.history), 20)
    residuals, norms, away_norms = np.empty(h), np.empty(h), np.empty(len(judge.averse))
    user, x = np.empty((5, 3)), np.empty((5, 16))
    newest = _user(judge, known, h, residuals, norms, away_norms, user)
    for i in range(len(rows)):
        _describe(rows[i], judge, known, h, residuals, norms, away_norms, user, newest, x)
        for head in range(5):
            out[i, head] = _say(x, known, head)


@njit(cache=True)
def _step(x, known, squares, head, error):  # type: ignore[no-untyped-def]
    """Take an Adagrad step of a head, whose error is prediction less label."""
    for f in range(x.shape[1]):
        g = error * x[head, f]
        squares[head, f] += g * g
        known.weights[head, f] -= RATE * g / math.sqrt(squares[head, f])


@njit(cache=True)
def _learn(judged, targets, kind, value, start, items, kinds, weights, averse_start, averse, tally, table, keys, known, squares, counts, out):  # type: ignore[no-untyped-def]  # noqa: E501  # fmt: skip
    """Outcome by outcome: fill out f64[k, 5] with what the heads say before it, then learn it.

    known.world f64[7] and counts f64[3] as in `Values`.
    """
    stats, world = known.stats, known.world
    residuals, norms, away_norms = np.empty(20), np.empty(20), np.empty(8)
    user, x = np.empty((5, 3)), np.empty((5, 16))
    history, away = np.empty(20, np.int64), np.empty(8, np.int64)
    for i in range(len(targets)):
        e, row = judged[i], targets[i]
        k, v, first = kind[e], value[e], start[e]
        h = min(start[e + 1] - first, 20)
        for p in range(h):
            history[p] = find_row(table, keys, items[first + p])
        a = min(averse_start[e + 1] - averse_start[e], 8)
        for p in range(a):
            away[p] = find_row(table, keys, averse[averse_start[e] + p])
        judge = Judge(history[:h], kinds[first : first + h], weights[first : first + h], away[:a], tally[e])
        newest = _user(judge, known, h, residuals, norms, away_norms, user)
        _describe(row, judge, known, h, residuals, norms, away_norms, user, newest, x)
        for head in range(5):
            out[i, head] = _say(x, known, head)
        v = _sane(v, 1.0) if k == RATING else min(_count(v), 1e7) if k == DWELL else v
        if k == RATING:
            _step(x, known, squares, 0, out[i, 0] - v)
            low = 1.0 if v < LOW else 0.0
            if world[6] > 0.0:
                _step(x, known, squares, 4, out[i, 4] - low)
            counts[0] += 1.0
            rate = max(1.0 / counts[0], 1e-4)
            stats[row, 0] += 1.0
            by_user = known.weights[0, 11] * x[0, 11] + known.weights[0, 12] * x[0, 12]
            stats[row, 1] += np.float32(v - world[0] - by_user)
            stats[row, 7] += np.float32(low)
            world[0] += rate * (v - world[0])
            world[6] += rate * (low - world[6])
        elif k == DWELL:
            stay = math.log1p(v)
            by_item = _sane(np.float64(stats[row, 3]), 1e9) / (_count(stats[row, 2]) + 3.0)
            residual = stay - world[1] - user[1, 1] - by_item
            z = residual / math.sqrt(world[3] + 1e-6)
            _step(x, known, squares, 1, out[i, 1] - min(max(z, -3.0), 3.0))
            counts[1] += 1.0
            rate = max(1.0 / counts[1], 1e-4)
            stats[row, 2] += 1.0
            stats[row, 3] += np.float32(stay - world[1] - user[1, 1])
            world[1] += rate * (stay - world[1])
            world[3] += rate * (residual * residual - world[3])
        if k == DWELL and h > 0 and history[0] == row:
            continue  # it belongs to the outcome before it
        counts[2] += 1.0
        rate = max(1.0 / counts[2], 1e-4)
        stats[row, 4] += 1.0
        for head in range(2, 4):
            said = 1.0 if k == ACTION and v == (SKIPPED if head == 2 else HIDDEN) else 0.0
            if world[2 + head] > 0.0:
                _step(x, known, squares, head, out[i, head] - said)
            stats[row, 3 + head] += np.float32(said)
            world[2 + head] += rate * (said - world[2 + head])


class Values:
    """Statistics of all items, aligned to shared rows, and the weights of the heads.

    stats f32[capacity, 8]; weights, squares f64[5, 16]; world f64[7]: mean rating, mean log-dwell, (free), variance of
    dwell residuals, rates of skip, hide, low rating; counts f64[3]: ratings, dwells, outcomes.
    """

    def __init__(self, *, rows: Rows) -> None:
        self.rows = rows
        self.stats: F32 = np.zeros((0, len(COLUMNS)), np.float32)
        self.weights: F64 = np.zeros((len(HEADS), len(SIGNS)))
        self.weights[0, 9:13] = self.weights[2:, 9:13] = 0.5
        self.squares: F64 = np.full((len(HEADS), len(SIGNS)), SQUARE)
        self.world: F64 = np.array([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
        self.counts: F64 = np.zeros(3)
        self.grow()

    def grow(self) -> None:
        """Follow the shared rows."""
        self.stats = grown(self.stats, self.rows.capacity)

    def forget(self, rows: I64) -> None:
        """Set these rows to what new ones are."""
        self.stats[rows] = 0.0

    @property
    def speaking(self) -> NDArray[np.bool_]:
        """bool[5]: heads that ever met an outcome of their kind; the others say 0 of everything."""
        return np.concatenate((self.counts[:2], self.world[4:])) > 0.0

    def known(self, vectors: F32) -> Known:
        """Return what the kernels read."""
        return Known(self.stats, vectors, self.world, self.weights)

    def score(self, rows: I64, judge: Judge, vectors: F32) -> F64:
        """Return what the heads say of rows i64[m], f64[m, 5] in the order of HEADS."""
        out = np.empty((len(rows), len(HEADS)))
        _score(rows, judge, self.known(vectors), out)
        return out

    def learn(self, entries: Entries, judged: I64, targets: I64, vectors: F32) -> F64:
        """Learn the outcomes among entries at `judged` i64[k], of the items in rows targets i64[k], in order.

        Returns what the heads said of each before it, f64[k, 5].
        """
        out = np.empty((len(judged), len(HEADS)))
        _learn(
            judged, targets, entries.kind, entries.value, entries.history_start, entries.history_item,
            entries.history_kind, entries.history_weight.astype(np.float32), entries.averse_start, entries.averse,
            entries.tally, self.rows.table, self.rows.keys, self.known(vectors), self.squares, self.counts, out,
        )  # fmt: skip
        return out

    def state(self) -> dict[str, F64]:
        """Return everything that is not per item, by name."""
        return {f"values_{name}": getattr(self, name) for name in STORED}

    def read_state(self, values: dict[str, Any]) -> dict[str, F64]:
        """Return what `state` stored, for `set_state`; birth values where there is none; raises CodecError."""
        born = Values(rows=Rows(capacity=1))
        return {
            name: fitted(values, f"values_{name}", getattr(born, name)) if f"values_{name}" in values
            else getattr(born, name)
            for name in STORED
        }  # fmt: skip

    def set_state(self, found: dict[str, F64]) -> None:
        """Copy what `read_state` found into the arrays."""
        for name, value in found.items():
            getattr(self, name)[...] = value
