"""What a replay came to: figures overall, over time, by history length and by channel; a plot of them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from models import metrics
from models.decay import GRID, NAMES
from models.learner import Learner
from models.retrieval import CHANNELS, NOT_FOUND, QUOTAS
from streaming.events import Rating
from streaming.replay.logs import TARGET, ReplayError, ReplayLog, roles

if TYPE_CHECKING:
    from streaming.replay.prequential import Trail

PERIODS: Final = 20
LENGTHS: Final = (0, 1, 2, 5, 10, 20)
"""History lengths at which a new row of the table begins, and one for longer ones."""
USER_EVENTS: Final = (0, 1, 2, 3, 6)
"""A user's earlier events at which a row of the cold start's table begins; those who had more are not cold."""
ITEM_EVENTS: Final = (1, 2, 3, 6, 11, 21, 51)
"""The same of an item's earlier events."""
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


def report(log: ReplayLog, trail: Trail, learner: Learner, done: int) -> dict[str, Any]:
    """Return the figures of a replay: overall, beside every popularity, over time, by history length, by channel."""
    rank = np.array(trail.ranks)
    seen = ~np.isnan(rank)
    popularity = np.array(trail.popularity).reshape(-1, GRID)
    until = max(done, 1 + max(trail.events, default=-1))  # baskets are taken whole, where they begin
    names = {user: i for i, user in enumerate(dict.fromkeys(event.user_id for event in log.events[:until]))}
    owners = np.array([names[event.user_id] for event in log.events[:until]])
    users, times = owners[trail.events], [log.events[i].ts for i in trail.events]
    alone = {name: metrics.summary(popularity[seen, h]) for h, name in enumerate(NAMES)}
    best = max(range(GRID), key=lambda h: alone[NAMES[h]]["ndcg@10"])
    lead = metrics.ndcg(rank[seen]) - metrics.ndcg(popularity[seen, best])
    low, high = metrics.user_bootstrap(lead, users[seen], np.random.default_rng(0), draws=400)
    return {
        "events": done,
        "slates": trail.slates,
        "users": len(names),
        "items": len({event.item_id for event in log.events[:done]}),
        "learn_us_per_event": round(1e6 * trail.learn_s / max(done, 1), 1),
        "recommend_us_per_request": round(1e6 * trail.recommend_s / max(trail.slates, 1), 1),
        "metrics": metrics.summary(rank[seen]),
        "baseline": {"popularity": {**alone[NAMES[best]], "half_life": NAMES[best]}, "half_lives": alone},
        "lead": {"ndcg@10": float(lead.mean()) if len(lead) else 0.0, "low": low, "high": high},
        "never_seen_share": float((~seen).mean()),
        "retrieved_share": float(np.isfinite(rank[seen]).mean()) if seen.any() else 0.0,
        **_judged(log, trail, owners),
        **_rated(log, trail),
        "over_time": _over_time(times, rank, popularity[:, best]),
        "by_history_length": _by_length(rank, popularity[:, best], np.array(trail.lengths)),
        "cold_start": _cold_start(trail, rank, popularity[:, best], users),
        "channels": _channels(rank, np.array(trail.places).reshape(-1, len(CHANNELS))),
        "calibration": metrics.calibration(trail.calibrated),
        "catalogue": {
            "items": len(log.catalogue.items),
            "bad_rows": log.catalogue.bad,
            "first": log.catalogue.bad_rows,
        },
        "bad_rows": {"count": log.bad, "first": log.bad_rows},
        "dropped_rows": log.dropped,
        "weights": {
            "mixture": dict(zip(NAMES, learner.model.mixture.round(4).tolist(), strict=True)),
            "ranker": learner.model.ranker.named(),
        },
    }


def _pair(rank: F64, baseline: F64) -> dict[str, Any]:
    return {
        "events": len(rank), **metrics.summary(rank),
        "popularity": {"ndcg@10": metrics.summary(baseline)["ndcg@10"]},
    }  # fmt: skip


def _rated(log: ReplayLog, trail: Trail) -> dict[str, Any]:
    """Root of the mean squared error of ratings on their own scale, each predicted before it was learnt."""
    count = sum(rated for _, rated, _ in trail.rated)
    if not count:
        return {}
    error = 0.0
    for place, _, squared in trail.rated:
        event = log.events[place]
        low, high = event.scale if isinstance(event, Rating) else (-1.0, 1.0)
        error += squared * (0.5 * (high - low)) ** 2
    return {"rating_rmse": math.sqrt(error / count), "ratings": count}


def _judged(log: ReplayLog, trail: Trail, owners: NDArray[np.int64]) -> dict[str, Any]:
    """Likes above hates: pooled over all events, as a mean of the users' own, and among items seen before."""
    if not trail.judged:
        return {}
    places = np.array([place for place, _ in trail.judged])
    scores, each = np.array([score for _, score in trail.judged]), np.array(roles(log.events))
    liked = each[places] == TARGET
    per_user, judging = metrics.user_auc(scores, liked, owners[places])
    return {
        "auc": metrics.auc(scores, liked),
        "judged": {"likes": int(liked.sum()), "hates": int((~liked).sum()), "user_auc": per_user, "users": judging},
    }


def _over_time(times: list[float], rank: F64, baseline: F64) -> list[dict[str, Any]]:
    done = len(times)
    cuts = np.linspace(0, done, min(PERIODS, done) + 1).astype(int)
    out = []
    for first, last in pairwise(cuts.tolist()):
        part = np.arange(first, last)[~np.isnan(rank[first:last])]
        out.append({"until": times[last - 1], **_pair(rank[part], baseline[part])})
    return out


def _by_length(rank: F64, baseline: F64, lengths: NDArray[np.int64]) -> dict[str, dict[str, Any]]:
    out = {}
    for first, following in zip(LENGTHS, (*LENGTHS[1:], None), strict=True):
        inside = (lengths >= first) & (lengths < (following or np.inf)) & ~np.isnan(rank)
        last = following - 1 if following else None
        name = f"{first}+" if last is None else str(first) if last == first else f"{first}-{last}"
        out[name] = _pair(rank[inside], baseline[inside])
    return out


def _cold_start(trail: Trail, rank: F64, baseline: F64, users: I64) -> dict[str, Any]:
    """Figures of users and of items with few earlier events, each beside popularity; never_seen is not averaged."""
    seen, out = ~np.isnan(rank), dict[str, Any]()
    for name, column, steps in (("user", trail.lengths, USER_EVENTS), ("item", trail.earlier, ITEM_EVENTS)):
        earlier, rows = np.array(column), dict[str, Any]()
        for first, following in pairwise(steps):
            inside = seen & (earlier >= first) & (earlier < following)
            label = str(first) if following == first + 1 else f"{first}-{following - 1}"
            rows[label] = _cold(rank[inside], baseline[inside], users[inside])
        out[name] = rows
    return {**out, "never_seen": {"events": int((~seen).sum()), "share": float((~seen).mean())}}


def _cold(rank: F64, baseline: F64, users: I64) -> dict[str, Any]:
    lead = metrics.ndcg(rank) - metrics.ndcg(baseline)
    low, high = metrics.user_bootstrap(lead, users, np.random.default_rng(0), draws=400)
    alone = metrics.summary(baseline)
    return {
        "events": len(rank), **metrics.summary(rank),
        "popularity": {name: alone[name] for name in ("hit_rate@10", "ndcg@10")},
        "lead": {"ndcg@10": float(lead.mean()), "low": low, "high": high} if len(lead) else None,
    }  # fmt: skip


def _channels(rank: F64, places: NDArray[np.uint16]) -> dict[str, dict[str, float]]:
    """What each channel brings of the seen targets, and what would be missed without it.

    recall: share of the targets in its list (as long as its quota); hit_rate@10: in the first ten of it; only_share and
    only_hit_share: shares of all seen targets, and of the slate's hits, that no other channel brought.
    """
    seen = ~np.isnan(rank)
    place, hit = places[seen], rank[seen] < 10
    found = place != NOT_FOUND
    alone = found & (found.sum(1) == 1)[:, None]
    return {
        name: {
            "quota": int(QUOTAS[c]),
            "recall": _share(found[:, c]), "hit_rate@10": _share(place[:, c] < 10),
            "only_share": _share(alone[:, c]), "only_hit_share": _share(alone[hit, c]),
        }
        for c, name in enumerate(CHANNELS)
    }  # fmt: skip


def _share(values: NDArray[np.bool_]) -> float:
    return float(values.mean()) if len(values) else 0.0


def plot(result: dict[str, Any], path: str) -> None:
    """Draw NDCG@10 over the stream, ours beside the best popularity, into a picture file."""
    try:
        import matplotlib
    except ImportError as error:
        raise ReplayError("--plot: needs matplotlib; install freshet[plot]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    periods = [period for period in result["over_time"] if period["events"]]
    events = np.cumsum([period["events"] for period in periods])
    figure, axis = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    axis.plot(events, [period["ndcg@10"] for period in periods], label="Freshet", linewidth=2)
    name = result["baseline"]["popularity"]["half_life"]
    axis.plot(events, [period["popularity"]["ndcg@10"] for period in periods], label=f"popularity, {name}")
    axis.set(xlabel="events", ylabel="NDCG@10", ylim=(0, None))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
