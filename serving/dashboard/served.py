"""Pages of what was served: the last slates, how it is spread, and through which channels an item came.

Titles are those of now. Knows nothing about how slates are made.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Final

import numpy as np
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from models.examples import item_hash
from models.retrieval import CHANNELS
from models.rows import LEARNT
from serving.dashboard.recent import SLATES, Kept, channel_shares
from serving.lookup import row_of, unknown_item
from serving.messages import Problem, json_response, read_query
from serving.parts import Parts
from serving.snapshot import Live

BEST: Final = 20
"""Candidates that a trace names."""
NEIGHBOURS: Final = 10
MOST: Final = 50_000
"""Items that one is compared with; of more, those shown most."""


async def quality(parts: Parts, request: Request) -> Response:
    """GET /-/quality: how what was shown is spread over items, providers, categories and channels."""
    return json_response(await parts.quality.told())


class SlatesQuery(Struct, forbid_unknown_fields=True):
    """What `/-/slates` may be asked for."""

    limit: Annotated[int, Meta(ge=1, le=SLATES, description="How many slates, newest first.")] = 50


async def slates(parts: Parts, request: Request) -> Response:
    """GET /-/slates: the newest kept, and which share of all that was served they are."""
    query, recent, live = read_query(request, SlatesQuery), parts.recent, parts.snapshot.live
    kept = list(recent.kept)
    told = [told_slate(live, one) for one in reversed(kept[-query.limit :])]
    among = recent.served - kept[0].number + 1 if kept else 0
    return json_response(
        {
            "kept": len(kept), "sampled_share": round(len(kept) / among, 4) if among else None,
            "window_s": round(parts.clock() - kept[0].at, 1) if kept else 0.0, "slates": told,
        }
    )  # fmt: skip


async def slate(parts: Parts, request: Request) -> Response:
    """GET /-/slates/{slate_id}: one that is still kept."""
    wanted = request.path_params["slate_id"]
    found = next((one for one in reversed(parts.recent.kept) if one.slate_id == wanted), None)
    if found is None:
        raise Problem(404, "path.slate_id", f"one of the last {SLATES} slates kept here", repr(wanted[:80]))
    return json_response(told_slate(parts.snapshot.live, found))


def named(live: Live, row: int) -> dict[str, Any]:
    """Return item_id, title and first category of a row; of none, or of one that nothing named, empty."""
    item_id = live.items.ids[row] if 0 <= row < len(live.items.ids) else ""
    entry = live.items.catalogue.get(row) if item_id else None
    title, categories = (entry.title, entry.categories) if entry is not None else ("", [])
    return {"item_id": item_id, "title": title, "category": categories[0] if categories else ""}


def told_slate(live: Live, one: Kept) -> dict[str, Any]:
    """Return a kept slate for people."""
    rows = live.items.rows.find(one.items).tolist()
    columns = (one.channels, one.scores, one.propensities, one.explored)
    items = [
        {
            **named(live, row), "channel": CHANNELS[channel], "score": round(score, 5),
            "propensity": round(propensity, 6), "explored": bool(was_explored), "reason": reason,
        }
        for row, reason, channel, score, propensity, was_explored in zip(
            rows, one.reasons, *(column.tolist() for column in columns), strict=True
        )
    ]  # fmt: skip
    return {
        "slate_id": one.slate_id, "user_id": one.user, "t": round(one.at, 3), "surface": one.surface,
        "policy": one.policy, "step": one.step, "degraded": one.degraded, "ms": one.ms, "items": items,
        "trace": _trace(live, one),
    }  # fmt: skip


def _trace(live: Live, one: Kept) -> dict[str, Any]:
    """Return how many candidates came from which channel, and the best of them by score, shown or not."""
    by_channel = Counter(CHANNELS[channel] for channel in one.candidate_channels.tolist())
    best = np.argsort(-one.candidate_scores, kind="stable")[:BEST]
    shown = set(one.items.tolist())
    keys, rows = one.candidates[best].tolist(), live.items.rows.find(one.candidates[best]).tolist()
    return {
        "candidates": len(one.candidates),
        "channels": dict(by_channel.most_common()),
        "best": [
            {
                **named(live, row), "channel": CHANNELS[int(one.candidate_channels[at])],
                "score": round(float(one.candidate_scores[at]), 5), "shown": key in shown,
            }
            for at, key, row in zip(best.tolist(), keys, rows, strict=True)
        ],
    }  # fmt: skip


async def item(parts: Parts, request: Request) -> Response:
    """GET /-/items/{item_id}: through which channels it was shown lately, and what its vector is most like."""
    item_id, live = request.path_params["item_id"], parts.snapshot.live
    row = row_of(live, item_id)
    if row < 0:
        raise unknown_item(item_id)
    window = parts.recent.window(parts.clock())
    mine = window.items == np.uint64(item_hash(item_id))
    return json_response(
        {
            "item_id": item_id,
            "channels": channel_shares(window, mine),
            "slots": int(mine.sum()),
            "window_s": round(window.seconds, 1),
            "neighbours_by_vector": _alike(live, row),
        }
    )


def _alike(live: Live, row: int) -> list[dict[str, Any]]:
    """Return the eligible items whose learnt vectors have the highest cosine with this one's, if it has one."""
    model = live.model
    model.grow()
    learnt = model.rows.held_by(LEARNT)
    if row not in learnt:
        return []
    others = learnt[live.items.eligible[learnt] & (learnt != row)]
    if len(others) > MOST:
        others = others[np.argpartition(-live.items.shown[others], MOST)[:MOST]]
    vectors, mine = model.factors.vectors[others], model.factors.vectors[row]
    lengths = np.linalg.norm(vectors, axis=1) * float(np.linalg.norm(mine))
    cosines = vectors @ mine / np.maximum(lengths, 1e-12)
    best = np.argsort(-cosines, kind="stable")[:NEIGHBOURS].tolist()
    return [{**named(live, int(others[at])), "similarity": round(float(cosines[at]), 4)} for at in best]
