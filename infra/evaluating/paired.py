"""`freshet compare`: one log replayed through two configurations, their figures and paired differences over users.

Both rank the same targets; an event that one of them could not have ranked, the other could not either, so that every
difference is of the same events. Knows nothing of files and terminals.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from infra.evaluating.own_log import BETTER, WORSE, verdict
from models import metrics
from streaming.events import Rating
from streaming.replay.logs import TARGET, ReplayError, ReplayLog, roles
from streaming.replay.prequential import Chosen, Exclusion, Protocol, Replay, Trail, run

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
DRAWS: Final = 1000
AUC_DRAWS: Final = 200
"""Each of these sorts all scores anew."""


@dataclass(slots=True)
class Side:
    """One configuration: its name, settings, seed; then what its replay noted."""

    name: str
    chosen: Chosen
    seed: int
    report: dict[str, Any]
    trail: Trail


def compare(
    log: ReplayLog, a: tuple[str, Chosen, int], b: tuple[str, Chosen, int], *, exclusion: Exclusion,
    protocol: Protocol = "line", progress: Callable[[str, int, Replay], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Replay a log through a, then through b (name, settings, seed), and return what b changes."""
    sides = [_replayed(log, *side, exclusion, protocol, progress) for side in (a, b)]
    first, second = sides
    users = _owners(log)
    out = {
        "events": first.report["events"], "users": first.report["users"], "items": first.report["items"],
        **{key: _told(side) for key, side in zip("ab", sides, strict=True)}, "level": 0.95,
        "difference": {**_ranking(first, second, users), **_rating(log, first, second, users),
                       **_judged(log, first, second, users)},
    }  # fmt: skip
    return out | {"verdict": verdict(out["difference"]["ndcg@10"]), "says": _sentence(out, second.name, first.name)}


def _replayed(
    log: ReplayLog, name: str, chosen: Chosen, seed: int, exclusion: Exclusion, protocol: Protocol,
    progress: Callable[[str, int, Replay], None] | None,
) -> Side:  # fmt: skip
    made: list[Replay] = []

    def make(**given: Any) -> Replay:
        made.append(Replay(**given, chosen=chosen))
        return made[-1]

    told = None if progress is None else partial(progress, name)
    report = run(log, exclusion=exclusion, protocol=protocol, seed=seed, progress=told, make=make)
    return Side(name, chosen, seed, report, made[0].trail)


def _told(side: Side) -> dict[str, Any]:
    report = side.report
    kept = ("auc", "rating_rmse", "over_time", "learn_us_per_event", "recommend_us_per_request")
    ranked = {name: report["metrics"][name] for name in ("hit_rate@10", "ndcg@10")}
    return {"name": side.name, **ranked, **{name: report[name] for name in kept if name in report}}


def _owners(log: ReplayLog) -> I64:
    names = {user: i for i, user in enumerate(dict.fromkeys(event.user_id for event in log.events))}
    return np.array([names[event.user_id] for event in log.events])


def _ranking(a: Side, b: Side, users: I64) -> dict[str, Any]:
    first, second = np.array(a.trail.ranks), np.array(b.trail.ranks)
    seen = ~np.isnan(first)
    owners, out = users[np.array(a.trail.events)][seen], {}
    for name, measure in (("hit_rate@10", metrics.hit_rate), ("ndcg@10", metrics.ndcg)):
        apart = measure(second[seen]) - measure(first[seen])
        low, high = metrics.user_bootstrap(apart, owners, np.random.default_rng(0), draws=DRAWS)
        out[name] = {"value": float(apart.mean()) if len(apart) else 0.0, "low": low, "high": high}
    return out


def _rating(log: ReplayLog, a: Side, b: Side, users: I64) -> dict[str, Any]:
    """Return the difference of the root mean squared errors of ratings; users are drawn again."""
    if not a.trail.rated or [row[:2] for row in a.trail.rated] != [row[:2] for row in b.trail.rated]:
        return {}
    places = np.array([place for place, _, _ in a.trail.rated])
    counts = np.array([rated for _, rated, _ in a.trail.rated], np.float64)
    scale = np.array([_half_scale(log, place) for place in places.tolist()]) ** 2
    _, of = np.unique(users[places], return_inverse=True)
    n = np.bincount(of, counts)
    errors = [np.bincount(of, scale * np.array([row[2] for row in side.trail.rated])) for side in (a, b)]

    def apart(taken: I64) -> float:
        below = n[taken].sum()
        return math.sqrt(errors[1][taken].sum() / below) - math.sqrt(errors[0][taken].sum() / below)

    return {"rating_rmse": _interval(apart, len(n), DRAWS)}


def _half_scale(log: ReplayLog, place: int) -> float:
    event = log.events[place]
    return 0.5 * (event.scale[1] - event.scale[0]) if isinstance(event, Rating) else 1.0


def _judged(log: ReplayLog, a: Side, b: Side, users: I64) -> dict[str, Any]:
    """Return the difference of the AUC of likes above hates; users are drawn again with all they judged."""
    if not a.trail.judged:
        return {}
    places = np.array([place for place, _ in a.trail.judged])
    scores = [np.array([score for _, score in side.trail.judged]) for side in (a, b)]
    liked = np.array(roles(log.events))[places] == TARGET
    if liked.all() or not liked.any():
        return {}
    _, of = np.unique(users[places], return_inverse=True)
    order = np.argsort(of, kind="stable")
    rows = np.split(order, np.flatnonzero(np.diff(of[order])) + 1)

    def apart(taken: I64) -> float:
        at = np.concatenate([rows[user] for user in taken.tolist()])
        return metrics.auc(scores[1][at], liked[at]) - metrics.auc(scores[0][at], liked[at])

    return {"auc": _interval(apart, len(rows), AUC_DRAWS)}


def _interval(apart: Callable[[I64], float], users: int, draws: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    drawn = [apart(rng.integers(0, users, users)) for _ in range(draws)]
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return {"value": apart(np.arange(users)), "low": float(low), "high": float(high)}


def _sentence(out: dict[str, Any], candidate: str, present: str) -> str:
    apart = out["difference"]["ndcg@10"]
    ends = f"NDCG@10 {apart['value']:+.4f} [{apart['low']:+.4f}, {apart['high']:+.4f}]"
    found = verdict(apart)
    if found == BETTER:
        text = f"{candidate} ranks what users did next better than {present}: {ends}."
    elif found == WORSE:
        text = f"{candidate} ranks what users did next worse than {present}: {ends}. Keep {present}."
    else:
        text = f"This log shows no difference between {candidate} and {present}: {ends}."
    for name, title in (("hit_rate@10", "HR@10"), ("rating_rmse", "rating RMSE"), ("auc", "AUC")):
        row = out["difference"].get(name)
        if row is not None and not row["low"] <= 0.0 <= row["high"]:
            text += f" {title} {row['value']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]."
    return text


def plot(report: dict[str, Any], path: str) -> None:
    """Draw NDCG@10 of both over the log into a picture file; raises ReplayError where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ReplayError("--plot: needs matplotlib; install freshet[plot]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for key in ("a", "b"):
        periods = [period for period in report[key]["over_time"] if period["events"]]
        ranked = np.cumsum([period["events"] for period in periods])
        axis.plot(ranked, [period["ndcg@10"] for period in periods], label=report[key]["name"], linewidth=2)
    axis.set(xlabel="events", ylabel="NDCG@10", ylim=(0, None))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
