"""Finds items by id or title, and users among those served lately; knows nothing of ranking."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final

import numpy as np
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from serving.dashboard.served import named
from serving.lookup import row_of
from serving.messages import json_response, read_query
from serving.parts import Parts
from serving.snapshot import Live

LOOKED_AT: Final = 20_000
"""Items whose ids and titles are read, those shown most first; an exact id is found wherever it is."""
SLICE: Final = 1000
"""Of them at a stretch."""


class SearchQuery(Struct, forbid_unknown_fields=True):
    """What `/-/search` may be asked for."""

    q: Annotated[str, Meta(min_length=1, max_length=256, description="Part of an id or of a title.")]
    limit: Annotated[int, Meta(ge=1, le=100, description="How many of each.")] = 20


async def search(parts: Parts, request: Request) -> Response:
    """GET /-/search."""
    query = read_query(request, SearchQuery)
    wanted = query.q.casefold()
    users = [user for user in reversed(parts.recent.users) if wanted in user.casefold()]
    items = await found_items(parts.snapshot.live, query.q, query.limit)
    return json_response({"items": items, "users": users[: query.limit]})


async def found_items(live: Live, text: str, limit: int) -> list[dict[str, Any]]:
    """Return the items whose id or title holds a text, in either case: the one of that id first, then by shown.

    Lookups have the loop between slices: all that is looked at takes 15 ms.
    """
    rows, wanted, items = [row_of(live, text)], text.casefold(), live.items
    order = np.flatnonzero(items.eligible)
    for turn, row in enumerate(order[np.argsort(-items.shown[order], kind="stable")[:LOOKED_AT]].tolist()):
        if len(rows) > limit:
            break
        if turn % SLICE == SLICE - 1:
            await asyncio.sleep(0)
        if row != rows[0] and (wanted in items.ids[row].casefold() or wanted in items.title(row).casefold()):
            rows.append(row)
    return [named(live, row) for row in rows if row >= 0][:limit]
