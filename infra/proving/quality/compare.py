"""Figures of what methods noted on the same events, and of one against another: paired, with intervals over users."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from infra.proving.quality.events import Events
from infra.proving.quality.reference import Result
from models import metrics

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Mask = NDArray[np.bool_]
PERIODS: Final = 20
DRAWS: Final = 1000


def judged(events: Events, result: Result, since: int) -> tuple[F64, Mask]:
    """Return ranks f64[n] with a miss where the method noted none, and which events count from `since` on."""
    counts = events.counted & (np.arange(len(events)) >= since)
    return np.where(np.isnan(result.ranks), np.inf, result.ranks), counts


def figures(events: Events, result: Result, since: int = 0) -> dict[str, Any]:
    """Return hit rate, NDCG and MRR at 10 with intervals, and NDCG over time."""
    ranks, counts = judged(events, result, since)
    rank, users = ranks[counts], events.user[counts]
    out: dict[str, Any] = dict(metrics.summary(rank))
    for name, values in (("hit_rate@10", metrics.hit_rate(rank)), ("ndcg@10", metrics.ndcg(rank))):
        out[f"{name}_interval"] = _interval(values, users)
    out["events"] = int(counts.sum())
    out["over_time"] = over_time(events, ranks, counts)
    return out


def over_time(events: Events, ranks: F64, counts: Mask) -> list[dict[str, Any]]:
    """Return NDCG@10 of twenty equal parts of the stream."""
    cuts = np.linspace(0, len(events), min(PERIODS, len(events)) + 1).astype(int)
    out = []
    for first, last in pairwise(cuts.tolist()):
        part = ranks[first:last][counts[first:last]]
        out.append({
            "until": float(events.ts[last - 1]), "events": len(part),
            "ndcg@10": float(metrics.ndcg(part).mean()) if len(part) else None,
        })  # fmt: skip
    return out


def lead(events: Events, ours: Result, theirs: Result, since: int = 0) -> dict[str, Any]:
    """Return ours minus theirs on the same events, with 95 % intervals over users."""
    mine, counts = judged(events, ours, since)
    other, _ = judged(events, theirs, since)
    out: dict[str, Any] = {}
    for name, of in (("hit_rate@10", metrics.hit_rate), ("ndcg@10", metrics.ndcg)):
        difference = of(mine[counts]) - of(other[counts])
        out[name] = float(difference.mean()) if len(difference) else 0.0
        out[f"{name}_interval"] = _interval(difference, events.user[counts])
    return out


def _interval(values: F64, users: I64) -> list[float]:
    return list(metrics.user_bootstrap(values, users, np.random.default_rng(0), draws=DRAWS))


def auc_figures(events: Events, result: Result) -> dict[str, Any]:
    """Return the AUC over all events, with an interval, and the mean of the users' own."""
    liked = events.label == 1
    return {
        "auc": metrics.auc(result.scores, liked),
        "auc_interval": _quantiles(_auc_draws(events, [result.scores])[0]),
        "auc_per_user": metrics.user_auc(result.scores, liked, events.user)[0],
    }


def auc_lead(events: Events, ours: Result, theirs: Result) -> dict[str, Any]:
    """Return the difference of the AUC over all events, with a paired interval, and of the users' own."""
    liked = events.label == 1
    drawn = _auc_draws(events, [ours.scores, theirs.scores])
    pooled = [metrics.auc(each.scores, liked) for each in (ours, theirs)]
    within = [metrics.user_auc(each.scores, liked, events.user)[0] for each in (ours, theirs)]
    return {
        "auc": pooled[0] - pooled[1], "auc_interval": _quantiles(drawn[0] - drawn[1]),
        "auc_per_user": within[0] - within[1],
    }  # fmt: skip


def _auc_draws(events: Events, scores: list[F64], draws: int = 200) -> F64:
    """Return the AUC f64[methods, draws] of whole users drawn again."""
    order = np.argsort(events.user, kind="stable")
    of = np.split(order, np.flatnonzero(np.diff(events.user[order])) + 1)
    rng, liked = np.random.default_rng(0), events.label == 1
    out = np.empty((len(scores), draws))
    for i in range(draws):
        picked = np.concatenate([of[k] for k in rng.integers(0, len(of), len(of))])
        for m, values in enumerate(scores):
            out[m, i] = metrics.auc(values[picked], liked[picked])
    return out


def rmse_figures(events: Events, result: Result) -> dict[str, Any]:
    """Return the error of predicted ratings, on their own scale, with an interval."""
    assert result.predictions is not None
    rated = np.isfinite(events.value) & ~np.isnan(result.predictions)
    square = (result.predictions[rated] - events.value[rated]) ** 2
    low, high = _interval(square, events.user[rated])
    return {
        "rating_rmse": float(np.sqrt(square.mean())), "rating_rmse_interval": [low**0.5, high**0.5],
        "ratings": int(rated.sum()),
    }  # fmt: skip


def rmse_lead(events: Events, ours: Result, theirs: Result) -> dict[str, Any]:
    """Return our error minus theirs on the same ratings (below 0: ours is better), with a paired interval."""
    assert ours.predictions is not None
    assert theirs.predictions is not None
    rated = np.isfinite(events.value) & ~np.isnan(ours.predictions) & ~np.isnan(theirs.predictions)
    _, of = np.unique(events.user[rated], return_inverse=True)
    sums = [
        np.bincount(of, (each[rated] - events.value[rated]) ** 2) for each in (ours.predictions, theirs.predictions)
    ]
    counts, rng, drawn = np.bincount(of), np.random.default_rng(0), np.empty(DRAWS)
    for i in range(DRAWS):
        picked = rng.integers(0, len(counts), len(counts))
        mine, other = (np.sqrt(each[picked].sum() / counts[picked].sum()) for each in sums)
        drawn[i] = mine - other
    mine, other = (np.sqrt(each.sum() / counts.sum()) for each in sums)
    return {"rating_rmse": float(mine - other), "rating_rmse_interval": _quantiles(drawn)}


def _quantiles(values: F64) -> list[float]:
    return [float(q) for q in np.nanquantile(values, (0.025, 0.975))]
