"""The crowd of simulated people: what the page wishes of it, and what it tells of itself.

The wish lies in Redis (the curve `crowd`, which only the API writes); the simulation asks for it each second, and tells
what it does in the curve `world`. Knows nothing about how people are simulated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from serving.dashboard.live import numbers
from serving.messages import Problem, converted, decode_json, json_response
from serving.parts import Parts
from streaming.state import StoreError, StoreUnavailable

MAX_USERS: Final = 500
SILENT_S: Final = 5.0
"""A simulation that told nothing for so long does not run, s."""
CURVE: Final = "crowd"
_away = (StoreError, *StoreUnavailable)


class WishBody(Struct, forbid_unknown_fields=True):
    """What the crowd is to be: how many people, and a topic that is to surge now."""

    users: Annotated[int, Meta(ge=0, le=MAX_USERS, description="People active at once.")] | None = None
    surge: Annotated[str, Meta(min_length=1, max_length=64, description="A topic of the crowd's world.")] | None = None


class Wish(Struct):
    """What was last wished, and when (s since 1970; 0: never)."""

    users: int | None = None
    users_t: float = 0.0
    surge: str | None = None
    surge_t: float = 0.0


async def crowd(parts: Parts, request: Request) -> Response:
    """GET /-/crowd."""
    try:
        return json_response(await _told(parts))
    except _away as error:
        raise _gone(error) from error


async def post_crowd(parts: Parts, request: Request) -> Response:
    """POST /-/crowd."""
    async with parts.overload.body(request, small=True) as body:
        asked = converted(decode_json(body), WishBody, "body")
    if asked.users is None and asked.surge is None:
        raise Problem(422, "body", "users, or surge, or both", "neither")
    try:
        told = await _told(parts)
        if not told["running"]:
            raise Problem(409, "the crowd", "a simulation that runs", "none", do="start `freshet demo`")
        if asked.surge is not None and asked.surge not in told["topics"]:
            raise Problem(422, "body.surge", f"one of {', '.join(told['topics'])}", repr(asked.surge))
        wish, now = told["wish"], round(parts.clock(), 3)
        if asked.users is not None:
            wish.users, wish.users_t = asked.users, now
        if asked.surge is not None:
            wish.surge, wish.surge_t = asked.surge, now
        await parts.snapshot.note(CURVE, {"wish": msgspec.json.encode(wish).decode()})
        return json_response(told)
    except _away as error:
        raise _gone(error) from error


def _gone(error: BaseException) -> Problem:
    got = f"{type(error).__name__}: {error}"
    return Problem(503, "Redis", "an answer", got, do="try again", headers={"Retry-After": "1"})


async def _told(parts: Parts) -> dict[str, Any]:
    points = [await parts.snapshot.read_metrics(name, "-", 1) for name in (CURVE, "world")]
    wished, world = (newest[-1][1] if newest else {} for newest in points)
    return {"wish": wish_of(wished), **world_of(world, parts.clock())}


def wish_of(fields: Mapping[str, str]) -> Wish:
    """Read a stored wish; what is none wishes nothing."""
    try:
        return msgspec.json.decode(fields.get("wish", "{}"), type=Wish)
    except msgspec.MsgspecError:
        return Wish()


def world_of(point: Mapping[str, str], now: float) -> dict[str, Any]:
    """Return what the newest point of the curve `world` says at a time, s."""
    figures = numbers(point)
    running = now - figures.get("t", 0.0) < SILENT_S
    topic = point.get("topic", "") if running else ""
    surge = {"topic": topic, "t": figures.get("surge_t"), "age_s": figures.get("surge_age_s")} if topic else None
    noticed = {"topic": topic, "seconds": figures["noticed_s"]} if topic and "noticed_s" in figures else None
    return {
        "running": running, "users": figures.get("users") if running else None, "max_users": MAX_USERS,
        "topics": [name for name in point.get("topics", "").split("|") if name] if running else [],
        "surge": surge, "noticed": noticed,
    }  # fmt: skip
