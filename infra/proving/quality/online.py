"""References that learn from every event: decayed popularity, item-kNN, ISGD, incremental BPR.

Each is one pass in compiled code: score all known items from the state before the group, rank its targets, learn it.

    item-kNN  score(y) = sum_p r^p C[h_p, y] / sqrt((n_hp + 10) (n_y + 10)), p over the user's last `window` choices
    ISGD      score(y) = p_u . q_y, learnt towards 1. Vinagre, Jorge, Gama: Fast incremental matrix factorization for
              recommendation with positive-only feedback (UMAP 2014)
    BPR       score(y) = p_u . q_y + b_y, learnt on (chosen, uniformly drawn) pairs. Rendle et al. (UAI 2009)
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import njit

from infra.proving.quality.events import Events
from infra.proving.quality.ranking import (
    NAMES,
    board,
    columns,
    dots,
    judge,
    learn_counts,
    popularity,
    rank_popular,
)
from infra.proving.quality.reference import Reference, Result, Setup, spans

KNN_ITEMS: Final = 12_000
"""Items of a co-occurrence matrix at most, the most chosen in hindsight: 576 MB."""
SHRINK: Final = 10.0


def run_popularity(events: Events, chosen: dict[str, Any], setup: Setup) -> Result:
    """Rank by popularity of the half-life `chosen["half_life"]`, or of the best in hindsight where it is None."""
    log, out = columns(events), board(events)
    counts = popularity(events.items, float(events.ts[0]))
    ranks, raw = np.full((8, len(events)), np.nan), np.zeros((8, len(events)))
    frozen = int(setup.fits[0]) if setup.frozen else len(events)
    for first, last in spans(events, setup.tell):
        rank_popular(log, first, last, out, counts, ranks, raw, frozen)
    name = chosen.get("half_life")
    from models.metrics import ndcg

    judged = events.counted & (np.arange(len(events)) >= (frozen if setup.frozen else 0))
    figures = [float(ndcg(ranks[h, judged]).mean()) if judged.any() else 0.0 for h in range(8)]
    h = NAMES.index(name) if name else int(np.argmax(figures))
    told = {"half_life": NAMES[h], "ndcg@10 of each": dict(zip(NAMES, figures, strict=True))}
    return Result(ranks[h], raw[h], told)


def run_knn(events: Events, chosen: dict[str, Any], setup: Setup) -> Result:
    """Live co-occurrence, cosine, over the last choices of a user."""
    log, out = columns(events), board(events)
    counts = popularity(events.items, float(events.ts[0]))
    m = min(events.items, KNN_ITEMS)
    place = np.full(events.items, -1, np.int64)
    times = np.bincount(events.item[events.label == 1], minlength=events.items)
    kept = np.sort(np.argsort(-times, kind="stable")[:m])
    place[kept] = np.arange(m)
    together, chosen_n = np.zeros((m, m), np.float32), np.zeros(m, np.float32)
    near = np.empty(m, np.float32)
    for first, last in spans(events, setup.tell):
        _knn(log, first, last, out, counts, setup.half_life, place, kept, together, chosen_n, near,
             chosen["window"], chosen["decay"])  # fmt: skip
    return Result(out.ranks, out.raw)


@njit(cache=True, fastmath=False)
def _knn(  # type: ignore[no-untyped-def]
    log, first, last, board, popular, h, place, kept, together, chosen_n, near, window, decay
):
    e = first
    while e < last:
        n, u0, past = log.known[e], log.history_first[e], log.history_before[e]
        any_history = False
        near[:] = 0.0
        for p in range(min(window, past)):
            a = place[log.item[log.history[u0 + past - 1 - p]]]
            if a >= 0 and chosen_n[a] > 0.0:
                any_history = True
                worth = np.float32(decay**p / np.sqrt(chosen_n[a] + SHRINK))
                for y in range(len(near)):
                    near[y] += worth * together[a, y]
        if any_history:
            board.scores[:n] = -np.inf if len(kept) < len(place) else 0.0
            for y in range(len(near)):
                if kept[y] < n:
                    board.scores[kept[y]] = near[y] / np.sqrt(chosen_n[y] + np.float32(SHRINK))
        judge(log, e, board, popular, h, not any_history)
        before = past - 1
        for j in range(e, log.end[e]):
            if log.label[j] != 1:
                continue
            before += 1  # within a group every earlier choice is history by now
            x = place[log.item[j]]
            if x < 0:
                continue
            for p in range(min(window, before)):
                a = place[log.item[log.history[u0 + before - 1 - p]]]
                if a >= 0 and a != x:
                    together[a, x] += np.float32(decay**p)
                    together[x, a] += np.float32(decay**p)
            chosen_n[x] += 1.0
        learn_counts(log, e, popular)
        e = log.end[e]


def run_isgd(events: Events, chosen: dict[str, Any], setup: Setup) -> Result:
    """Incremental SGD towards 1 for every choice."""
    return _factorise(events, chosen, setup, 0)


def run_bpr(events: Events, chosen: dict[str, Any], setup: Setup) -> Result:
    """Incremental pairwise SGD: every choice against `negatives` items drawn uniformly."""
    return _factorise(events, chosen, setup, int(chosen["negatives"]))


def _factorise(events: Events, chosen: dict[str, Any], setup: Setup, negatives: int) -> Result:
    log, out = columns(events), board(events)
    counts = popularity(events.items, float(events.ts[0]))
    rng = np.random.default_rng(setup.seed)
    d = int(chosen["factors"])
    users = rng.normal(0.0, 0.1, (events.users, d)).astype(np.float32)
    items = rng.normal(0.0, 0.1, (events.items, d)).astype(np.float32)
    bias = np.zeros(events.items, np.float32)
    for first, last in spans(events, setup.tell):
        drawn = rng.random((last - first, max(negatives, 1)), np.float32)
        _mf(log, first, last, out, counts, setup.half_life, users, items, bias, drawn,
            np.float32(chosen["rate"]), np.float32(chosen["l2"]), negatives)  # fmt: skip
    return Result(out.ranks, out.raw)


@njit(cache=True)
def _mf(log, first, last, board, popular, h, users, items, bias, drawn, rate, l2, negatives):  # type: ignore[no-untyped-def]  # fmt: skip
    e = first
    while e < last:
        n, u = log.known[e], log.user[e]
        known_user = log.history_before[e] > 0
        if known_user:
            dots(items, bias, users[u], n, board.scores)
        judge(log, e, board, popular, h, not known_user)
        for j in range(e, log.end[e]):
            if log.label[j] != 1:
                continue
            x = log.item[j]
            if negatives == 0:
                _towards_one(users[u], items[x], rate, l2)
                continue
            for k in range(negatives):
                other = np.int64(drawn[j - first, k] * max(n, 1))
                if other != x and other < len(items):
                    _pair(users[u], items[x], items[other], bias, x, other, rate, l2)
        learn_counts(log, e, popular)
        e = log.end[e]


@njit(cache=True)
def _towards_one(p, q, rate, l2):  # type: ignore[no-untyped-def]
    short = np.float32(1.0)
    for k in range(len(p)):
        short -= p[k] * q[k]
    for k in range(len(p)):
        pk = p[k]
        p[k] += rate * (short * q[k] - l2 * pk)
        q[k] += rate * (short * pk - l2 * q[k])


@njit(cache=True)
def _pair(p, q, r, bias, x, other, rate, l2):  # type: ignore[no-untyped-def]
    margin = bias[x] - bias[other]
    for k in range(len(p)):
        margin += p[k] * (q[k] - r[k])
    g = np.float32(1.0 / (1.0 + np.exp(margin)))
    for k in range(len(p)):
        pk, qk, rk = p[k], q[k], r[k]
        p[k] += rate * (g * (qk - rk) - l2 * pk)
        q[k] += rate * (g * pk - l2 * qk)
        r[k] -= rate * (g * pk + l2 * rk)
    bias[x] += rate * (g - l2 * bias[x])
    bias[other] -= rate * (g + l2 * bias[other])


REFERENCES: Final = (
    Reference(
        "popularity", "decayed popularity; the best half-life of the grid in hindsight", run_popularity, ({},),
        hindsight=True,
    ),
    Reference(
        "item_knn", "co-occurrence within the user's last choices, cosine, learnt live", run_knn,
        tuple({"window": w, "decay": r} for w in (5, 20, 100) for r in (1.0, 0.8, 0.6, 0.4) if w < 100 or r == 1.0),
    ),
    Reference(
        "isgd", "incremental matrix factorisation towards 1, learnt live", run_isgd,
        tuple({"factors": 32, "rate": r, "l2": l2} for r in (0.1, 0.3, 0.6) for l2 in (0.001, 0.01, 0.1, 0.3)),
    ),
    Reference(
        "bpr_incremental", "pairwise factorisation with item biases, learnt live", run_bpr,
        tuple(
            {"factors": 32, "rate": r, "l2": l2, "negatives": k}
            for r in (0.05, 0.1, 0.2) for l2 in (0.01, 0.05) for k in (5, 20)
        ),
    ),
)  # fmt: skip
