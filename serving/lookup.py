"""The read path: profile (one Redis round trip) -> history -> `models.recommend` -> answer, and the slate to the log.

Knows nothing about how state came to be; it reads the arrays of `snapshot` and never writes state.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Final, cast

import numpy as np
from msgspec import UNSET
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from infra.telemetry import CHANGED_SECONDS, SLATE_SECONDS, SLATES, TOKEN_WAITS
from models.bandit import Policy
from models.examples import CodecError, item_hash
from models.items import context_keys
from models.profile import unpack
from models.recommend import History, Slate, popular, recommend, samples, similar
from models.recommend import Request as Ask
from models.retrieval import CHANNELS
from serving.messages import (
    ItemsAnswer,
    LookupAnswer,
    LookupQuery,
    PopularQuery,
    Problem,
    Served,
    SimilarQuery,
    converted,
    decode_json,
    json_response,
    read_query,
)  # fmt: skip
from serving.parts import Parts
from serving.snapshot import Live
from streaming import events
from streaming.state import UserRead
from streaming.topics import Position, TokenError, decode_token, partition_of

MAX_ID: Final = 256
POLL_S: Final = (0.001, 0.002, 0.002, 0.004)
"""Pauses between reads while `after=` waits; the last one repeats."""
_PLAIN: Final = LookupQuery()


async def recommendations(parts: Parts, request: Request) -> Response:
    """GET or POST /v1/recommendations/{user_id}."""
    began = time.perf_counter()
    user = user_id(request)
    query = await _lookup_query(parts, request)
    read, applied, accepted = await _read(parts, user, query.after, query.wait_ms)
    history, unreadable = known_history(parts, user, read)
    live, snapshot = parts.snapshot.live, parts.snapshot
    profile_at = time.perf_counter()
    ask = _ask(parts, query, secrets.token_hex(8), parts.clock() if query.now is None else query.now)
    slate = recommend(live.items, live.model, history, ask, clock=time.perf_counter if query.trace else None)
    slate_at = time.perf_counter()
    items = _served(live, slate)
    degraded = read is None or snapshot.degraded
    answer = LookupAnswer(ask.slate_id, user, items, live.model.step, degraded)
    if applied is not None:
        answer.applied = applied
    if not items:
        answer.reason = why_empty(live, narrowed=bool(query.exclude or query.categories))
    elif degraded:
        answer.reason = f"degraded: {snapshot.reason or 'the profile could not be read'}"
    elif unreadable:
        answer.reason = f"served as to an unknown user: {unreadable}"
    if query.track and items:
        _track(parts, user, query, slate, [item.item_id for item in items])
    end = time.perf_counter()
    stages = {"profile": profile_at - began, "recommend": slate_at - profile_at, "answer": end - slate_at}
    for stage, seconds in stages.items():
        parts.telemetry.observe(SLATE_SECONDS, seconds, stage=stage)
        parts.stages.put(stage, seconds)
    parts.telemetry.count(SLATES, policy=ask.policy, degraded=str(degraded).lower())
    if accepted is not None:
        parts.telemetry.observe(CHANGED_SECONDS, parts.freshness.answered(accepted))
    ms = {name: round(1000 * s, 3) for name, s in stages.items()}
    if query.track and items:
        parts.recent.add(slate, user, parts.clock(), ms, degraded=degraded)
    if query.trace:
        answer.trace = {"ms": ms, **slate.trace}
    return json_response(answer)


def user_id(request: Request) -> str:
    """Return the user id of the path; raises Problem 422 where it is empty or longer than 256 characters."""
    user: str = request.path_params["user_id"]
    if not 0 < len(user) <= MAX_ID:
        raise Problem(422, "path.user_id", f"1 to {MAX_ID} characters", f"{len(user)}")
    return user


async def _lookup_query(parts: Parts, request: Request) -> LookupQuery:
    if request.method == "GET":
        query = read_query(request, LookupQuery) if request.scope["query_string"] else _PLAIN
    else:
        async with parts.overload.body(request, small=True) as body:
            query = converted(decode_json(body), LookupQuery, "body") if body else _PLAIN
    privileged(request, policy=query.policy, now=query.now)
    return query


def privileged(request: Request, **given: object) -> None:
    """Raise Problem 403 where a parameter was given that only loopback or the admin key may use."""
    names = [name for name, value in given.items() if value is not None]
    if names and not request.scope.get("freshet.privileged"):
        raise Problem(403, ", ".join(names), "a caller on loopback or with the admin key", "another")


async def _read(
    parts: Parts, user: str, after: str | None, wait_ms: int | None
) -> tuple[UserRead | None, bool | None, float | None]:
    """Read a profile, waiting for the position of `after`; None where Redis does not answer.

    Returns also whether it holds that position, and when this process accepted it (perf_counter, s) where it is the
    first to be asked for it.
    """
    partition = partition_of(user, parts.settings.partitions)
    if after is None:
        return await parts.snapshot.read_user(partition, user), None, None
    token = _token(after)
    until = time.perf_counter() + (parts.settings.token_wait_ms if wait_ms is None else wait_ms) / 1000
    turn, reached = 0, False
    while True:
        read = await parts.snapshot.read_user(partition, user)
        reached = read is not None and is_applied(read, token, partition)
        pause = POLL_S[min(turn, len(POLL_S) - 1)]
        if reached or read is None or time.perf_counter() + pause > until:
            break
        await asyncio.sleep(pause)
        turn += 1
    parts.telemetry.count(TOKEN_WAITS, applied=str(reached).lower())
    accepted = parts.freshness.asked(partition, token.events.get(partition, -1)) if reached else None
    return read, reached, accepted


def _token(text: str) -> Position:
    try:
        return decode_token(text)
    except TokenError as error:
        raise Problem(
            422, "after", "a position token, or <inlet>:<partition>:<offset>", text[:60],
            do="give the token that POST /v1/events answered",
        ) from error  # fmt: skip


def is_applied(read: UserRead, token: Position, partition: int) -> bool:
    """Say whether what was read holds the position that a token names, as far as this partition goes."""
    if token.inlet is not None:
        inlet, source, offset = token.inlet
        return read.marks.get(f"{inlet}:{source}", 0) > offset
    return read.applied > token.events.get(partition, -1)


def known_history(parts: Parts, user: str, read: UserRead | None) -> tuple[History, str]:
    """Return a user's history, and why it is empty where the stored bytes cannot be read (counted and named)."""
    try:
        history = history_of(read)
    except CodecError as error:
        parts.cannot_read(user, error)
        return _NOBODY, str(error)
    if parts.unreadable and read is not None:
        parts.unreadable.pop(user, None)  # made again since, or forgotten: no longer to be named
    return history, ""


def history_of(read: UserRead | None) -> History:
    """Return the sequence and the seen items of a profile, newest first; empty without one; raises CodecError."""
    if read is None or (read.profiles[0] is None and read.seen[0] is None):
        return _NOBODY
    return History.of(unpack(read.profiles[0], read.seen[0]))


_NOBODY: Final = History()


def _hashes(ids: list[str]) -> NDArray[np.uint64]:
    return np.fromiter(map(item_hash, ids), np.uint64, len(ids))


def _ask(parts: Parts, query: LookupQuery, slate_id: str, now: float) -> Ask:
    settings = parts.settings
    return Ask(
        n=query.n, slate_id=slate_id, now=now, surface=query.surface, epsilon=settings.epsilon,
        first=settings.first_share, policy=query.policy or cast(Policy, settings.policy_of(query.surface)),
        exclude=_hashes(query.exclude), seen=query.seen,
        categories=frozenset(query.categories), context=context_keys(query.context), trace=query.trace,
        keep_candidates=query.track and samples(slate_id, settings.feature_share),
        weights=parts.head_weights,
    )  # fmt: skip


def _served(live: Live, slate: Slate) -> list[Served]:
    ids, rows = live.items.ids, slate.rows.tolist()
    return [
        Served(ids[row], round(score, 6), CHANNELS[channel], reason, *_named(live, row))
        for row, score, channel, reason in zip(
            rows, slate.scores.tolist(), slate.channels.tolist(), slate.reasons, strict=True
        )
    ]


def _named(live: Live, row: int) -> tuple[str, list[str]]:
    entry = live.items.catalogue.get(row)
    return ("", []) if entry is None else (entry.title, list(entry.categories))


def why_empty(live: Live, *, narrowed: bool) -> str:
    """Say why nothing was found."""
    if live.items.n == 0:
        return "no item is known yet: send events or items first"
    if not live.items.eligible.any():
        return "no item may be served: all are deleted, or lack the catalogue entry that require_catalogue asks for"
    if narrowed:
        return "no item is left after exclude, seen and categories"
    return "this user has acted on every item; ask with seen=include"


def _track(parts: Parts, user: str, query: LookupQuery, slate: Slate, ids: list[str]) -> None:
    """Hand the slate to the log; encoded after the answer left."""
    ts, partitions = parts.clock(), parts.settings.partitions

    def make() -> tuple[int, bytes, bytes]:
        event = events.impression(user, slate.request.slate_id, ts, query.surface, ids, slate.impression().to_bytes())
        event.context = query.context or None
        return partition_of(user, partitions), user.encode(), events.encode(event)

    parts.impressions.offer(make)


async def popular_items(parts: Parts, request: Request) -> Response:
    """GET /v1/popular."""
    query = read_query(request, PopularQuery)
    privileged(request, now=query.now)
    live, degraded, exclude = parts.snapshot.live, parts.snapshot.degraded, _hashes(query.exclude)
    if query.user_id is not None:
        read = await parts.snapshot.read_user(partition_of(query.user_id, parts.settings.partitions), query.user_id)
        degraded = degraded or read is None
        history, _ = known_history(parts, query.user_id, read)
        exclude = np.concatenate([exclude, _seen_keys(live, history)])
    now = parts.clock() if query.now is None else query.now
    found = popular(live.items, live.model, query.n, exclude, now)
    return _listed(live, found, degraded, "popular", narrowed=bool(len(exclude)))


def _seen_keys(live: Live, history: History) -> NDArray[np.uint64]:
    keys = live.items.rows.keys[: live.items.n]
    return keys[np.isin((keys & np.uint64(0xFFFFFFFF)).astype(np.uint32), history.seen)]


async def similar_items(parts: Parts, request: Request) -> Response:
    """GET /v1/similar/{item_id}."""
    query = read_query(request, SimilarQuery)
    live, key = parts.snapshot.live, item_hash(request.path_params["item_id"])
    if row_of(live, request.path_params["item_id"]) < 0:
        raise unknown_item(request.path_params["item_id"])
    found = similar(live.items, live.model, key, query.n)
    return _listed(live, found, parts.snapshot.degraded, "similar", narrowed=True)


def row_of(live: Live, item_id: str) -> int:
    """Return the row of an item id, -1 where neither an event nor the catalogue named it."""
    row = int(live.items.rows.find(_hashes([item_id]))[0])
    return row if row >= 0 and live.items.ids[row] else -1


def unknown_item(item_id: str) -> Problem:
    """Return the Problem 404 for an item id."""
    return Problem(404, "path.item_id", "an item that an event or the catalogue named", repr(item_id[:80]))


def _listed(live: Live, found: list[tuple[int, float]], degraded: bool, channel: str, *, narrowed: bool) -> Response:
    ids = live.items.ids
    items = [Served(ids[row], round(score, 8), channel, "", *_named(live, row)) for row, score in found]
    reason = UNSET if items else why_empty(live, narrowed=narrowed)
    return json_response(ItemsAnswer(items, degraded, reason))
