"""Retrieve -> rank -> draw -> explain, written once: what serving answers and what replay measures.

One synchronous call on arrays, no I/O, no clock (`now` is given; `clock` only times the stages of a trace). Randomness
is Philox of the slate id. Knows nothing about HTTP, Redis or how the arrays came to be.

How slots are drawn, and with which propensities: `models/bandit/policy.py`. Policies that explore by a posterior take
the ranker's calibrated probability, what the last layer would correct of it, and how little each item was shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from models import values
from models.bandit import BOUND, FIRST, SAMPLES, Policy, draw, item_samples
from models.bandit import propensities as chances
from models.decay import NAMES, blend, scan
from models.examples import AVERSE, TALLY, Shown, item_hash
from models.factors import mix64
from models.features import FEATURES as FEATURES
from models.features import F, Frame, Learnt, Viewer, features
from models.items import Items
from models.model import Model
from models.profile import ProfileView
from models.ranker import heads
from models.retrieval import (
    CHANNELS,
    CO_VISITATION,
    CONTEXT,
    FRESH,
    NOT_EXPLORING,
    NOT_FOUND,
    POPULAR,
    POPULAR_NOW,
    QUOTAS,
    RECENT,
    REPEAT,
    TRANSITION,
    UNEXPLORED,
    VECTOR,
    blends,
    gather,
    top,
)  # fmt: skip
from models.rows import mark_low
from models.values import Judge

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
F16 = NDArray[np.float16]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

NONE: Final[U64] = np.empty(0, np.uint64)
NO_SEEN: Final[U32] = np.empty(0, np.uint32)
HISTORY_LIMIT: Final = 50
_VALUED: Final = [heads.NAMES.index(name) for name in values.HEADS]


@dataclass(slots=True)
class History:
    """What is known of a user when scoring: items u64[h], times f64[h] (s), kinds u8[h], newest first; seen u32[s].

    weights f32[h], none: all 1; averse u64[a], averse_times f64[a]: pushed away, newest first; tally f32[8].
    """

    items: U64 = field(default_factory=lambda: np.empty(0, np.uint64))
    times: F64 = field(default_factory=lambda: np.empty(0))
    kinds: U8 = field(default_factory=lambda: np.empty(0, np.uint8))
    seen: U32 = field(default_factory=lambda: np.empty(0, np.uint32))
    weights: F32 = field(default_factory=lambda: np.empty(0, np.float32))
    averse: U64 = field(default_factory=lambda: np.empty(0, np.uint64))
    averse_times: F64 = field(default_factory=lambda: np.empty(0))
    tally: F32 = field(default_factory=lambda: np.zeros(len(TALLY), np.float32))

    @classmethod
    def of(cls, view: ProfileView) -> History:
        """Return what a profile says."""
        return cls(
            view.items, view.times, view.kinds, view.seen, view.weights, view.averse, view.averse_times, view.tally
        )


@dataclass(slots=True)
class Request:
    """One question: n items at time `now` (s) for the slate named slate_id; context: `models.items.context_keys`.

    first: the share of slots for first impressions of items that few slates have shown; 0 leaves their channel out.
    """

    slate_id: str
    now: float
    n: int = 10
    surface: str = "home"
    policy: Policy = "epsilon"
    epsilon: float = 0.05
    first: float = 0.0
    exclude: U64 = field(default_factory=lambda: np.empty(0, np.uint64))
    seen: Literal["exclude", "include"] = "exclude"
    categories: frozenset[str] = frozenset()
    context: Sequence[int] = ()
    keep_candidates: bool = False
    trace: bool = False
    weights: F64 = field(default_factory=lambda: heads.DEFAULT)
    """Of the heads, f64[H]: see models/ranker/heads.py."""


@dataclass(slots=True)
class Slate:
    """The answer: k drawn items, and the m candidates they were drawn from.

    rows i64[k], items u64[k], scores f32[k], channels u8[k] (places in CHANNELS), propensities f32[k], reasons str[k];
    candidates u64[m], their scores f32[m] and places u16[m, c] in the list of each channel (65535: not in it);
    features f16[m, F] where kept, else [k, F] of the shown items.
    """

    request: Request
    step: int
    rows: I64
    items: U64
    scores: F32
    channels: U8
    propensities: F32
    reasons: list[str]
    candidates: U64
    candidate_scores: F32
    candidate_channels: U8
    places: U16
    features: F16
    trace: dict[str, Any] = field(default_factory=dict)

    def impression(self) -> Shown:
        """Return the impression of this slate: features of all candidates where kept, else of the shown items only."""
        request = self.request
        candidates = self.candidates if request.keep_candidates else self.items
        samples = f"/{SAMPLES[request.policy]}" if request.policy in SAMPLES else ""
        return Shown(
            item_hash(request.slate_id), self.step, self.items, self.propensities, self.channels, candidates,
            self.features, request.surface, request.policy + samples,
        )  # fmt: skip


def samples(slate_id: str, share: float) -> bool:
    """Return whether this slate belongs to the hash-sampled share whose candidates are kept."""
    return share >= 1.0 or float(mix64(np.uint64(item_hash(slate_id)))) < share * 2.0**64


def recommend(
    items: Items, model: Model, history: History, request: Request, *, clock: Callable[[], float] | None = None
) -> Slate:
    """Answer a request from the arrays; scoring changes nothing. An empty catalogue gives an empty slate."""
    marks = [clock()] if clock else []
    items.grow()
    model.grow()
    frame = items.popularity.at(request.now)
    viewer = _viewer(items, history, request)
    q = model.factors.encode(viewer.history)
    place = np.full(items.n, -1, np.int32)
    rows, channels, places, found = _retrieve(items, model, history, viewer, request, q, frame, place)
    marks += [clock()] if clock else []
    x, said = _rank(items, model, viewer, _judge(items, history, viewer), request, rows, q, frame, place)
    scores = heads.total(said, request.weights)
    marks += [clock()] if clock else []
    drawn, propensities = draw(
        drawn_scores(items, model, request, rows, x, said), request.policy, request.n,
        np.random.Generator(np.random.Philox(item_hash(request.slate_id))), epsilon=request.epsilon,
        first=request.first, exploring=exploring(items, rows),
    )  # fmt: skip
    marks += [clock()] if clock else []
    slate = Slate(
        request=request, step=model.step, rows=rows[drawn], items=items.rows.keys[rows[drawn]],
        scores=scores[drawn].astype(np.float32), channels=channels[drawn], propensities=propensities,
        reasons=_reasons(items, channels[drawn].tolist(), viewer.history), candidates=items.rows.keys[rows],
        candidate_scores=scores.astype(np.float32), candidate_channels=channels, places=places,
        features=(x if request.keep_candidates else x[drawn]).astype(np.float16),
    )  # fmt: skip
    if request.trace:
        slate.trace = _trace(items, model, rows, channels, found, said, slate, marks)
    return slate


def _viewer(items: Items, history: History, request: Request) -> Viewer:
    own = items.rows.find_low(history.seen if request.seen == "include" else NO_SEEN)
    times = history.times[:HISTORY_LIMIT]
    return Viewer(items.rows.find(history.items[:HISTORY_LIMIT]), times, own, items.context_rows(request.context))


def _judge(items: Items, history: History, viewer: Viewer) -> Judge:
    h = len(viewer.history)
    weights = history.weights[:h] if len(history.weights) else np.ones(h, np.float32)
    averse = items.rows.find(history.averse[:AVERSE])
    return Judge(viewer.history, history.kinds[:h], np.ascontiguousarray(weights), averse, history.tally)


def _retrieve(
    items: Items, model: Model, history: History, viewer: Viewer, request: Request, q: F32,
    frame: tuple[NDArray[np.int32], F64, F64, float], place: NDArray[np.int32],
) -> tuple[I64, U8, U16, I64]:  # fmt: skip
    """Return what `gather` finds of what may enter; place i32[>= n] is -1 everywhere and is left so."""
    n = items.n
    found: tuple[I64, U8, U16, I64] = gather(
        n, items.arrays(), blocked_rows(items, history, request), frame[0],
        blends(model.mixture, frame[1], frame[2], max(float(n), 1.0)), viewer, model.factors.vectors,
        model.factors.bias, q, QUOTAS if request.first > 0.0 else NOT_EXPLORING, place,
    )  # fmt: skip
    return found


def _rank(
    items: Items, model: Model, viewer: Viewer, judge: Judge, request: Request, rows: I64, q: F32,
    frame: tuple[NDArray[np.int32], F64, F64, float], place: NDArray[np.int32],
) -> tuple[F64, F64]:  # fmt: skip
    """Return the features f64[m, F] and the heads f64[m, H] of distinct rows; each row's depend on that row alone."""
    x = np.empty((len(rows), F))
    features(
        rows, place, viewer,
        Frame(request.now, frame[0], frame[1], frame[2], max(float(items.n), 1.0), items.token_shares(),
            *items.click_rates()),
        items.arrays(), items.born,
        Learnt(model.mixture, model.factors.vectors, model.factors.bias, q), x,
    )  # fmt: skip
    said = np.zeros((len(rows), len(heads.HEADS)))
    said[:, heads.CLICK] = model.ranker.score(x)
    if request.trace or (request.weights[_VALUED] * model.values.speaking).any():
        said[:, _VALUED] = model.values.score(rows, judge, model.factors.vectors)
    return x, said


def score_items(items: Items, model: Model, history: History, request: Request, keys: U64) -> F64:
    """Return the final scores f64[k] of the items with hashes u64[k], whether or not a slate would hold them.

    The numbers that `recommend` gives them where it retrieves them. An item that nobody knows scores as a blank row.
    """
    spare = items.rows.spare()
    items.grow()
    model.grow()
    viewer, rows = _viewer(items, history, request), items.rows.find(keys)
    rows, of = np.unique(np.where(rows < 0, spare, rows), return_inverse=True)
    q, frame = model.factors.encode(viewer.history), items.popularity.at(request.now)
    place = np.full(items.rows.capacity, -1, np.int32)
    _, said = _rank(items, model, viewer, _judge(items, history, viewer), request, rows, q, frame, place)
    scores: F64 = heads.total(said, request.weights)[of]
    return scores


def as_served(items: Items, model: Model, history: History, request: Request, shown: U64) -> Slate:
    """Return a slate of a log, distinct items with hashes u64[k], as this state of the model would have drawn it.

    propensities f32[k]: how probable its policy makes each item, given those above, 0 for one that it does not
    retrieve, which it takes for not having been there; candidates are what it retrieves, then what it does not.
    """
    spare = items.rows.spare()
    items.grow()
    model.grow()
    frame, viewer = items.popularity.at(request.now), _viewer(items, history, request)
    q, place = model.factors.encode(viewer.history), np.full(items.rows.capacity, -1, np.int32)
    rows, channels, places, _ = _retrieve(items, model, history, viewer, request, q, frame, place)
    m, asked = len(rows), items.rows.find(shown)
    asked[asked < 0] = spare
    ranked = np.concatenate((rows, np.setdiff1d(asked, rows)))
    x, said = _rank(items, model, viewer, _judge(items, history, viewer), request, ranked, q, frame, place)
    place[ranked] = np.arange(len(ranked))
    at = place[asked].astype(np.int64)
    inside, other = at < m, at[at >= m]
    propensities = np.zeros(len(shown), np.float32)
    propensities[inside] = chances(
        drawn_scores(items, model, request, rows, x[:m], said[:m]), request.policy, at[inside],
        epsilon=request.epsilon, first=request.first, exploring=exploring(items, rows),
    )  # fmt: skip
    each, scores = np.concatenate((np.arange(m), other)), heads.total(said, request.weights).astype(np.float32)
    candidates = np.concatenate((items.rows.keys[rows], shown[~inside]))
    found = np.concatenate((channels, np.zeros(len(other), np.uint8)))
    unfound = np.full((len(other), places.shape[1]), NOT_FOUND, np.uint16)
    own = np.where(inside, at, m + np.cumsum(~inside) - 1)
    return Slate(
        request=request, step=model.step, rows=asked, items=shown, scores=scores[at], channels=found[own],
        propensities=propensities, reasons=[], candidates=candidates, candidate_scores=scores[each],
        candidate_channels=found, places=np.concatenate((places, unfound)),
        features=x[each if request.keep_candidates else at].astype(np.float16),
    )  # fmt: skip


def blocked_rows(items: Items, history: History, request: Request) -> U8:
    """Return u8[n]: 1 for rows that may not enter: hidden, seen, excluded, of another category."""
    blocked = items.hidden[: items.n].copy()
    table, keys = items.rows.table, items.rows.keys
    if request.seen == "exclude" and len(history.seen):
        mark_low(table, keys, history.seen, blocked, 1)
    if len(request.exclude):
        gone = items.rows.find(request.exclude)
        blocked[gone[gone >= 0]] = 1
    if request.categories:
        outside = np.ones(items.n, np.uint8)
        for name in request.categories:
            outside[list(items.by_category.get(name, ()))] = 0
        blocked |= outside
    return blocked


def exploring(items: Items, rows: I64) -> U8:
    """Return u8[m]: 1 for the rows that slates have shown less often than FIRST."""
    return (items.shown[rows] < FIRST).astype(np.uint8)


def drawn_scores(items: Items, model: Model, request: Request, rows: I64, x: F64, said: F64) -> F64:
    """Return what a slate is drawn from, f64[m, S]: S equally likely draws of the scores of rows i64[m].

    x f64[m, F] are their features, said f64[m, H] their heads. Greedy, epsilon and softmax have the one score.
    """
    policy, weights = request.policy, request.weights
    if policy in ("greedy", "epsilon", "softmax") or not len(rows):
        return heads.total(said, weights)[:, None]
    mean, deviation = items.click_log_odds(rows)
    keys = items.rows.keys[rows]
    if policy == "thompson-item":
        return item_samples(mean, deviation, keys, model.step)
    phi = model.ranker.last_hidden(x)
    expected = model.calibration.probability(said[:, heads.CLICK])
    rest = heads.total(np.where(np.arange(said.shape[1]) == heads.CLICK, 0.0, said), weights)
    if policy == "ucb":
        p = _bounded(expected + phi @ model.last_layer.mean(), expected)
        unsure = np.hypot(model.last_layer.deviations(phi) / (p * (1.0 - p)), deviation)
        found: F64 = (weights[heads.CLICK] * (np.log(p / (1.0 - p)) + BOUND * unsure) + rest)[:, None]
        return found
    p = _bounded(expected[:, None] + phi @ model.last_layer.particles(model.step), expected[:, None])
    draws: F64 = item_samples(np.log(p / (1.0 - p)), deviation, keys, model.step)
    drawn: F64 = weights[heads.CLICK] * draws + rest[:, None]
    return drawn


def _bounded(p: F64, expected: F64) -> F64:
    """Return probabilities that may be corrected to a hundredth of what was expected, not to less, nor to certainty."""
    return np.clip(p, 1e-4 + 1e-2 * expected, 0.99)


def _reasons(items: Items, channels: list[int], own: I64) -> list[str]:
    newest = int(own[0]) if len(own) else -1
    title = items.title(newest) if newest >= 0 else ""
    texts = {
        POPULAR_NOW: "Chosen most in the last minutes",
        POPULAR: "Chosen most of late",
        RECENT: "You have been here before",
        REPEAT: "You chose it before",
        CO_VISITATION: "Goes with what you chose lately",
        FRESH: "New here",
        CONTEXT: "Chosen most where you are",
        UNEXPLORED: "New here",
        TRANSITION: f"Often chosen after {title}",
        VECTOR: "Close to what you chose lately" if title else "Chosen most of late",
    }
    return [texts.get(channel, "Chosen most today") for channel in channels]


def _trace(
    items: Items, model: Model, rows: I64, channels: U8, found: I64, said: F64, slate: Slate, marks: list[float]
) -> dict[str, Any]:
    scores = slate.candidate_scores
    best = np.argsort(-scores, kind="stable")
    parts, probabilities = heads.parts(said, slate.request.weights), model.calibration.probability(said[:, heads.CLICK])
    per_channel = {
        name: {
            "found": int(found[c]),
            "candidates": [items.ids[rows[i]] for i in best if channels[i] == c],
        }
        for c, name in enumerate(CHANNELS)
    }
    names = ("retrieve_ms", "rank_ms", "draw_ms")
    stages = {name: 1e3 * (b - a) for name, a, b in zip(names, marks[:-1], marks[1:], strict=False)}
    top_scores = [
        {
            "id": items.ids[rows[i]], "channel": CHANNELS[channels[i]], "score": float(scores[i]),
            "heads": dict(zip(heads.NAMES, parts[i].round(6).tolist(), strict=True)),
            "probability": float(probabilities[i]),
        }
        for i in best[:50]
    ]  # fmt: skip
    return {"channels": per_channel, "scores": top_scores, "stages": stages}


def similar(items: Items, model: Model, key: int, n: int) -> list[tuple[int, float]]:
    """Return the n (row, score) most likely to follow or resemble the item with this hash; empty for an unknown one.

    score(y) = log((.5 A + .5 B share of y) + 1e-3) + cosine(E, E_y): neighbours first, vectors where there are none.
    """
    items.grow()
    model.factors.grow()
    row = int(items.rows.find(np.array([key], np.uint64))[0])
    if row < 0:
        return []
    vectors = model.factors.vectors[: items.n]
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors)) + 1e-6
    share = np.zeros(items.n)
    for lists, weights, sums in (
        (items.a_items, items.a_weights, items.a_sums), (items.b_items, items.b_weights, items.b_sums),
    ):  # fmt: skip
        known = lists[row] >= 0
        np.add.at(share, lists[row][known], 0.5 * weights[row][known] / (sums[row] + 5.0))
    scores = (np.log(share + 1e-3) + (vectors @ vectors[row]) / (norms * norms[row])).astype(np.float32)
    blocked = items.hidden[: items.n].copy()
    blocked[row] = 1
    best = top(scores, items.n, blocked, max(1, min(n, items.n)))
    return [(int(r), float(scores[r])) for r in best]


def popular(
    items: Items, model: Model, n: int, exclude: U64, now: float, half_life: str = "prior"
) -> list[tuple[int, float]]:
    """Return the n (row, probability) most popular items at `now`, by a half-life's name or the learnt prior."""
    items.grow()
    if not items.n:
        return []
    mixture = model.mixture
    if half_life != "prior":
        if half_life not in NAMES:
            raise ValueError(f"half_life: expected one of prior, {', '.join(NAMES)}; got {half_life!r}")
        mixture = np.eye(len(NAMES))[NAMES.index(half_life)]
    cells_now, scale, totals, _ = items.popularity.at(now)
    coefficients = np.empty(9)
    blend(mixture, scale, totals, float(items.n), coefficients)
    scores = _popularity(items, cells_now, coefficients)
    blocked = items.hidden[: items.n].copy()
    gone = items.rows.find(exclude)
    blocked[gone[gone >= 0]] = 1
    best = top(scores, items.n, blocked, max(1, min(n, items.n)))
    return [(int(r), float(scores[r])) for r in best]


def _popularity(items: Items, cells_now: NDArray[np.int32], coefficients: F64) -> F32:
    out: NDArray[np.float32] = np.empty((1, items.n), np.float32)
    scan(items.n, items.popularity.weights, items.popularity.cells, cells_now, coefficients[None], out)
    return out.reshape(-1)
