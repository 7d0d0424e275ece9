"""The routes: which handler answers which method and path, and what each takes and answers, for OpenAPI and `/docs`.

Knows nothing about how an answer comes to be.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from infra.telemetry import HTTP_SECONDS
from serving import erasure, ingest, introspect, lookup, metrics
from serving.dashboard import arms, controls, crowd, letters, search, served
from serving.dashboard.atlas import Atlas, MapQuery
from serving.doors import Door, Handler, docs_page
from serving.erasure import Receipt
from serving.ingest import ItemBody, ItemEntry
from serving.messages import (
    Accepted,
    ItemsAnswer,
    LookupAnswer,
    LookupQuery,
    PopularQuery,
    Problem,
    SimilarQuery,
    StoredAnswer,
    problem_response,
)  # fmt: skip
from serving.parts import Parts
from streaming.events import Posted

_LOOKUP_ROUTE: Final = "/v1/recommendations/{user_id}"
PartsHandler = Callable[[Parts, Request], Awaitable[Response]]

_EVENTS = (
    "One event or a list of at most 1,000, of type click, dwell, rating, action, view or alias; body at most 1 MB, at "
    "most 256 events of one user. One invalid object is a 422; each object of a list has its verdict. The answer comes "
    "after Kafka acknowledged with acks=all, and carries a position token for `after=`. An event without event_id "
    "gets one, but then a retry is not recognised as a repeat. An alias moves what is known of `anonymous_id` to "
    "`user_id`, once; what the anonymous id does afterwards is a new anonymous profile."
)
_ERASURE = (
    "Appends an erasure to the log: the profile ends where it is folded, events of before that arrive later are "
    "ignored, later ones start anew. The receipt says what ends when. Other ids of the same person are users of their "
    "own: erase them too (an anonymous id that was aliased has ended already)."
)
_LOOKUP = (
    "One Redis round trip for the profile, then arrays in this process. `after` waits until the profile holds the "
    "position of a token; when the wait is over the answer is 200 with `applied: false`. The slate is logged as an "
    "impression unless track=false."
)


def doors(parts: Parts, app: FastAPI) -> list[Door]:
    """Return every route of the API."""
    return [*_v1(parts), *_own(parts), *_dashboard(parts), _docs(parts, app)]


def _v1(parts: Parts) -> list[Door]:
    def door(method: str, path: str, handler: PartsHandler, summary: str, tag: str, **rest: Any) -> Door:
        return _door(parts, method, path, handler, summary, tag, **rest)

    user, item = "/v1/recommendations/{user_id:path}", "/v1/items/{item_id:path}"
    return [
        door("POST", "/v1/events", ingest.post_events, "Append events", "events", body=Posted | list[Posted],
             answer=Accepted, status=202, problems=(408, 413, 422, 503), notes=_EVENTS),
        door("GET", user, lookup.recommendations, "A slate for a user", "recommendations", query=LookupQuery,
             answer=LookupAnswer, problems=(422,), notes=_LOOKUP),
        door("POST", user, lookup.recommendations, "A slate for a user, asked with a JSON body", "recommendations",
             body=LookupQuery, body_needed=False, answer=LookupAnswer, problems=(408, 413, 422), notes=_LOOKUP),
        door("GET", "/v1/similar/{item_id:path}", lookup.similar_items, "Items like this one", "recommendations",
             query=SimilarQuery, answer=ItemsAnswer, problems=(404, 422)),
        door("GET", "/v1/popular", lookup.popular_items, "What is popular now", "recommendations", query=PopularQuery,
             answer=ItemsAnswer, problems=(422,)),
        door("POST", "/v1/items", ingest.post_items, "Upsert or delete items", "items",
             body=ItemEntry | list[ItemEntry], answer=Accepted, status=202, problems=(408, 413, 422, 503)),
        door("GET", item, introspect.get_item, "What is known of an item", "items", answer=dict[str, Any],
             problems=(404,)),
        door("PUT", item, ingest.put_item, "Upsert an item, whole", "items", body=ItemBody, answer=StoredAnswer,
             status=202, problems=(408, 413, 422, 503), notes="`item_id` may be left out of the body."),
        door("DELETE", item, ingest.delete_item, "Delete an item", "items", answer=StoredAnswer, status=202,
             problems=(422, 503), notes="It leaves every slate within a second; a later PUT brings it back."),
        door("GET", "/v1/users/{user_id:path}", introspect.get_user, "What is known of a user", "users",
             answer=dict[str, Any], problems=(422, 503)),
        door("DELETE", "/v1/users/{user_id:path}", erasure.delete_user, "Forget a user", "users", answer=Receipt,
             status=202, problems=(422, 429, 503), notes=_ERASURE),
    ]  # fmt: skip


def _own(parts: Parts) -> list[Door]:
    def door(path: str, handler: PartsHandler, summary: str, **rest: Any) -> Door:
        return _door(parts, "GET", path, handler, summary, "system", **{"answer": dict[str, Any], **rest})

    return [
        door("/health/live", introspect.live, "This process answers"),
        door("/health/ready", introspect.ready, "Loaded, Kafka and Redis reachable; 503 with reasons otherwise",
             problems=(503,), problem=dict[str, Any]),
        door("/metrics", metrics.Exposition().answer, "Prometheus series", answer=None, media="text/plain"),
        door("/-/settings", introspect.settings, "Every setting, secrets masked", answer=list[dict[str, Any]]),
        door("/-/topics", introspect.topics, "Topics, partitions, end offsets", problems=(503,)),
        door("/-/models", introspect.models, "Versions, what is served, what was refused, readable weights"),
        door("/-/state", introspect.state, "Positions, feeds, buffers, what is degraded"),
        door("/-/state/{user_id:path}", introspect.user_state, "Where a user's state lies and how far it is folded",
             problems=(422, 503)),
    ]  # fmt: skip


def _dashboard(parts: Parts) -> list[Door]:
    def door(path: str, handler: PartsHandler, summary: str, **rest: Any) -> Door:
        return _door(parts, "GET", path, handler, summary, "dashboard", answer=dict[str, Any], **rest)

    def act(path: str, handler: PartsHandler, summary: str, body: Any, answer: Any, **rest: Any) -> Door:
        problems = (408, 409, 413, 422, 503)
        return _door(
            parts, "POST", path, handler, summary, "dashboard", body=body, answer=answer, problems=problems, **rest
        )

    atlas = Atlas()
    return [
        door("/-/bandits", arms.bandits, "Each item's posterior, and the new ones on their way", query=arms.ArmsQuery,
             problems=(422,)),
        door("/-/map", atlas.items, "Items as points of a map that stays where it is", query=MapQuery, problems=(422,)),
        door("/-/map/users/{user_id:path}", atlas.user, "A user on that map", problems=(422, 503)),
        door("/-/items/{item_id:path}", served.item, "Through which channels an item was shown, and its neighbours",
             problems=(404,)),
        door("/-/slates", served.slates, "The last slates, with what they were drawn from", query=served.SlatesQuery,
             problems=(422,)),
        door("/-/slates/{slate_id}", served.slate, "One of the last slates", problems=(404,)),
        door("/-/quality", served.quality, "How what was shown is spread"),
        door("/-/search", search.search, "Find items, and users served lately", query=search.SearchQuery,
             problems=(422,)),
        door("/-/dead-letters", letters.letters, "What could not be folded, newest first", query=letters.LettersQuery,
             problems=(422, 503)),
        act("/-/dead-letters/replay", letters.post_replay, "Append dead letters to the log again", letters.ReplayBody,
            letters.ReplayAnswer),
        act("/-/models/rollback", controls.rollback, "Learn on from a version", controls.Chosen, controls.Obeyed),
        act("/-/models/pin", controls.pin, "Serve a version while learning goes on", controls.Chosen, controls.Obeyed),
        act("/-/models/unpin", controls.unpin, "Serve the newest weights again", controls.Nothing, controls.Obeyed,
            body_needed=False),
        act("/-/models/save", controls.save, "Make a version now", controls.Nothing, controls.Obeyed,
            body_needed=False),
        door("/-/crowd", crowd.crowd, "The simulated people: what is wished of them, what they do", problems=(503,)),
        act("/-/crowd", crowd.post_crowd, "How many people there shall be, and what is to surge", crowd.WishBody,
            dict[str, Any]),
    ]  # fmt: skip


def _docs(parts: Parts, app: FastAPI) -> Door:
    async def docs(_: Parts, request: Request) -> Response:
        return docs_page(app.openapi())

    return _door(parts, "GET", "/docs", docs, "This page", "system", media="text/html")


def _door(parts: Parts, method: str, path: str, handler: PartsHandler, summary: str, tag: str, **rest: Any) -> Door:
    return Door(method, path, timed(parts, method, path, handler), summary, tag, **rest)


def timed(parts: Parts, method: str, path: str, handler: PartsHandler) -> Handler:
    """Bind a handler to its parts: every answer's time is observed, and a Problem becomes its answer."""
    route = path.replace(":path", "")

    async def answer(request: Request) -> Response:
        began, status = time.perf_counter(), "500"
        try:
            try:
                response = await handler(parts, request)
            except Problem as problem:
                response = problem_response(problem)
            status = str(response.status_code)
            return response
        finally:
            _observe(parts, route, method, status, time.perf_counter() - began)

    return answer


def _observe(parts: Parts, route: str, method: str, status: str, seconds: float) -> None:
    parts.telemetry.observe(HTTP_SECONDS, seconds, route=route, method=method, status=status)
    parts.stages.failed += status[0] == "5"
    if route == _LOOKUP_ROUTE:
        parts.stages.put("lookup", seconds)
