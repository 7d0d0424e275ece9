"""Dead letters for the page `system`: the newest, readable, and a replay of some or all of them.

Knows nothing about why an event could not be folded.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from serving.messages import Problem, converted, decode_json, json_response, read_query
from serving.parts import Parts
from streaming.dead_letters import Replayed, newest, replay
from streaming.topics import LogError

EXCERPT: Final = 400
"""Characters of an original that are shown."""
READ: Final = 500
"""Newest records of the topic that are read for a page; at most 256 kB each, as they come."""
MOST: Final = 20_000
"""Records of the topic up to which it is replayed from here: replaying reads all of it."""
WAIT_S: Final = 20.0

_turn = asyncio.Lock()


class LettersQuery(Struct, forbid_unknown_fields=True):
    """What `/-/dead-letters` may be asked for."""

    limit: Annotated[int, Meta(ge=1, le=READ, description="How many letters, newest first.")] = 50


class ReplayBody(Struct, forbid_unknown_fields=True):
    """Which letters are appended to the log again: these, or all."""

    ids: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=400)]],
        Meta(max_length=READ, description="Ids of letters, `topic:partition:offset`."),
    ] = []
    all: Annotated[bool, Meta(description="All that were not replayed yet.")] = False


class Refused(Struct):
    """A letter that was not replayed, and why."""

    id: str
    why: str


class ReplayAnswer(Struct):
    """How many letters were appended to the log again, and what was not."""

    replayed: int
    refused: list[Refused]


async def letters(parts: Parts, request: Request) -> Response:
    """GET /-/dead-letters."""
    query = read_query(request, LettersQuery)
    try:
        async with asyncio.timeout(WAIT_S):
            found, records = await newest(parts.settings, READ)
    except (TimeoutError, OSError, RuntimeError, LogError) as error:
        raise _away(error) from error
    told = [
        {
            "id": letter.name, "topic": letter.topic, "partition": letter.partition, "offset": letter.offset,
            "time": letter.at, "reason": letter.reason, "excerpt": letter.text()[:EXCERPT],
            "replayed": bool(letter.replays),
        }
        for letter in found[: -query.limit - 1 : -1]
    ]  # fmt: skip
    return json_response({"total": len(found), "records": records, "letters": told})


async def post_replay(parts: Parts, request: Request) -> Response:
    """POST /-/dead-letters/replay."""
    async with parts.overload.body(request, small=True) as body:
        asked = converted(decode_json(body), ReplayBody, "body")
    if asked.all == bool(asked.ids):
        raise Problem(422, "body", "either ids, or all: true", "both" if asked.all else "neither")
    if (parts.dead_letters or 0) > MOST:
        raise Problem(
            409, "topic dead-letters", f"at most {MOST} records", str(parts.dead_letters),
            do="use `freshet dead-letters replay`",
        )  # fmt: skip
    if _turn.locked():
        raise Problem(409, "this process", "no replay under way", "one", do="wait for it to end")
    async with _turn:
        try:
            done = await replay(parts.settings, names=None if asked.all else set(asked.ids))
        except (TimeoutError, OSError, RuntimeError, LogError) as error:
            raise _away(error) from error
    return json_response(ReplayAnswer(len(done.appended), refused_of(done, asked.ids)))


def refused_of(done: Replayed, asked: list[str]) -> list[Refused]:
    """Return why each of the letters was not replayed; what is not named by id is told where it cannot be read."""
    refused = [Refused(name, why) for name, why in done.bad.items()]
    refused += [Refused(name, "it was replayed before") for name in done.before if name in asked]
    known = {*done.appended, *done.before, *done.bad}
    return refused + [Refused(name, "no such letter") for name in dict.fromkeys(asked) if name not in known]


def _away(error: BaseException) -> Problem:
    return Problem(
        503, "Kafka", f"an answer within {WAIT_S:g} s", f"{type(error).__name__}: {error}",
        headers={"Retry-After": "1"},
    )  # fmt: skip
