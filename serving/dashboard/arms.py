"""The items as arms of a bandit: what exposures say of each, how sure that is, and those still on their way.

Only reads; the posteriors are those that drawing a slate uses (models/bandit/posterior.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from models.bandit import FIRST
from models.decay import NAMES, STEPS
from serving.dashboard.recent import Slots
from serving.dashboard.served import named
from serving.messages import json_response, read_query
from serving.parts import Parts
from serving.snapshot import Live

MOST: Final = 20_000
"""Arms whose posteriors are compared; of more, those shown most."""
NEWCOMERS: Final = 20

I64 = NDArray[np.int64]


class ArmsQuery(Struct, forbid_unknown_fields=True):
    """What `/-/bandits` may be asked for."""

    limit: Annotated[int, Meta(ge=1, le=200, description="How many arms.")] = 40
    sort: Annotated[
        Literal["shown", "new", "mean", "unsure", "rising"],
        Meta(description="Most shown, newest, best, with the widest posterior, or fastest rising first."),
    ] = "shown"


async def bandits(parts: Parts, request: Request) -> Response:
    """GET /-/bandits."""
    query, live = read_query(request, ArmsQuery), parts.snapshot.live
    live.items.grow()
    window = parts.recent.window(parts.clock())
    rows = np.flatnonzero(live.items.eligible)
    rise = rising(live, rows, parts.clock()) if query.sort == "rising" else np.zeros(0)
    order = np.argsort(-rise, kind="stable")[: query.limit]
    picked = rows[order] if len(rise) else sorted_arms(live, rows, query.sort)[: query.limit]
    new = rows[live.items.shown[rows] < FIRST]
    newest = new[np.lexsort((rows_of_birth(live, new),))[::-1][:NEWCOMERS]]
    arms, newcomers = _arms(live, picked, window), _arms(live, newest, window)
    for arm, factor in zip(arms, rise[order].tolist(), strict=False):
        arm["rising"] = round(factor, 2)
    for arm in newcomers:
        arm["to_go"] = max(0, FIRST - arm["shown"])
    slots = len(window.items)
    return json_response(
        {
            "policy": [list(row) for row in parts.settings.policy], "first_share": parts.settings.first_share,
            "epsilon": parts.settings.epsilon, "first": FIRST,
            "exploration": {
                "share": round(float(window.explored.mean()), 5) if slots else None, "slots": slots,
                "window_s": round(window.seconds, 1),
            },
            "arms": arms, "newcomers": newcomers, "newcomers_total": len(new),
        }
    )  # fmt: skip


def rows_of_birth(live: Live, rows: I64) -> NDArray[np.float64]:
    """Return when each of rows i64[k] was published or, where that is not told, first seen, s; 0 for never."""
    born, first = live.items.born[rows], live.items.first[rows]
    return np.where(born > 0.0, born, np.where(np.isfinite(first), first, 0.0))


def rising(live: Live, rows: I64, now: float) -> NDArray[np.float64]:
    """Return how many times its share of a day each of rows i64[k] had of the last quarter of an hour; 1 for unseen.

    (w_15min + 1) / (w_1d W_15min / W_1d + 1)
    """
    popularity = live.items.popularity
    cells, scale, _, _ = popularity.at(now)
    recent, day = (
        popularity.weights[rows, at] * scale[at]
        * STEPS[np.clip(int(cells[at]) - popularity.cells[rows, at].astype(np.int64), 0, len(STEPS) - 1)]
        for at in (NAMES.index("15min"), NAMES.index("1d"))
    )  # fmt: skip
    return np.asarray((recent + 1.0) / (day * (recent.sum() / max(day.sum(), 1e-9)) + 1.0))


def sorted_arms(live: Live, rows: I64, by: str) -> I64:
    """Return rows i64[k] in the order that was asked for."""
    shown = live.items.shown[rows]
    if by == "shown":
        return rows[np.argsort(-shown, kind="stable")]
    if by == "new":
        return rows[np.argsort(-rows_of_birth(live, rows), kind="stable")]
    rows = rows[np.argsort(-shown, kind="stable")[:MOST]]
    alpha, beta = live.items.click_posteriors(rows)
    if by == "mean":
        return rows[np.argsort(-alpha / (alpha + beta), kind="stable")]
    spread = alpha * beta / ((alpha + beta) ** 2 * (alpha + beta + 1.0))
    return rows[np.argsort(-spread, kind="stable")]


def _arms(live: Live, rows: I64, window: Slots) -> list[dict[str, Any]]:
    items, keys = live.items, live.items.rows.keys[rows]
    alpha, beta = items.click_posteriors(rows)
    low, high = items.click_interval(rows)
    total, slots = max(len(window.items), 1), window.counts(keys)
    return [
        {
            **named(live, row), "shown": int(items.shown[row]), "exposures": round(float(items.sums[row, 0]), 2),
            "successes": round(float(items.sums[row, 1]), 2), "alpha": round(float(alpha[k]), 4),
            "beta": round(float(beta[k]), 4), "mean": round(float(alpha[k] / (alpha[k] + beta[k])), 5),
            "low": round(float(low[k]), 5), "high": round(float(high[k]), 5),
            "still_exploring": bool(items.shown[row] < FIRST),
            "first_time": float(items.first[row]) if np.isfinite(items.first[row]) else None,
            "share": round(int(slots[k]) / total, 5),
        }
        for k, row in enumerate(rows.tolist())
    ]  # fmt: skip
