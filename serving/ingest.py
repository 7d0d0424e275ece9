"""What comes in over HTTP: events and catalogue changes, validated, appended, answered once Kafka holds them.

Knows nothing about what is made of them.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Sequence
from typing import Final, Literal

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from infra.settings import Settings
from infra.telemetry import EVENT_SKEW, EVENTS_RECEIVED
from serving.messages import (
    MAX_LIST,
    MAX_USER_EVENTS,
    Accepted,
    Problem,
    StoredAnswer,
    Verdict,
    decode_json,
    json_response,
)  # fmt: skip
from serving.parts import Parts
from streaming import events
from streaming.events import EventError
from streaming.topics import LogError, Record, encode_token, partition_of

ACK_S: Final = 2.0


async def append(parts: Parts, topic: str, records: Sequence[Record]) -> dict[int, int]:
    """Append records and return partition -> last offset once all are acknowledged; raises Problem 429, 503."""
    if parts.log_problem:
        raise _unavailable(parts.log_problem)
    parts.overload.check_appending()
    parts.overload.appending += 1
    try:
        async with asyncio.timeout(ACK_S):
            last = await parts.log.append(topic, records)
    except TimeoutError:
        raise _unavailable(f"no acknowledgement from every partition within {ACK_S:g} s") from None
    except LogError as error:
        raise _unavailable(str(error)) from error
    finally:
        parts.overload.appending -= 1
    if topic == parts.topics.events:
        parts.overload.acknowledged(last)
    return last


def _unavailable(got: str) -> Problem:
    return Problem(
        503, "Kafka", "acks=all from every partition", got,
        do="send the whole request again with the same event ids; what was stored already is recognised",
        headers={"Retry-After": "1"},
    )  # fmt: skip


_list = msgspec.json.Decoder(list[msgspec.Raw])


def objects_of(body: bytes) -> tuple[list[msgspec.Raw], bool]:
    """Split a body into undecoded objects and whether it was a list; raises Problem 413 or 422."""
    if body.lstrip()[:1] != b"[":
        return [msgspec.Raw(body)], False
    try:
        values = _list.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        raise Problem(422, "body", "a JSON list of objects", f"{body[:80]!r} ({error})") from error
    if len(values) > MAX_LIST:
        raise Problem(413, "body", f"at most {MAX_LIST} objects", str(len(values)), do="send fewer a request")
    return values, True


def read_event(value: msgspec.Raw, now: float) -> events.Posted:
    """Validate one object of the door; raises EventError that says where, what was expected and what was got."""
    event = events.parse_json(value)
    if event.ts > now + events.MAX_FUTURE_S:
        raise EventError("$.ts", f"at most {events.MAX_FUTURE_S:g} s ahead of {now:.0f}", f"{event.ts:.0f}")
    if event.event_id is None:
        event.event_id = secrets.token_hex(16)
    return event


def needs_endings(settings: Settings) -> None:
    """Raise Problem 503 where profiles are written in a version that cannot say that one ended."""
    if settings.codec < 2:
        raise Problem(
            503, "setting codec", "2: only that version of a profile can say that it ended", str(settings.codec),
            do="set FRESHET_CODEC=2 for the workers and the API once no process of the release before runs, then again",
        )  # fmt: skip


def _problem(error: EventError) -> Problem:
    return Problem(422, "body" + error.where.removeprefix("$"), error.expected, error.got)


async def post_events(parts: Parts, request: Request) -> Response:
    """POST /v1/events."""
    parts.overload.admit()
    async with parts.overload.body(request) as body:
        values, many = objects_of(body)
        parts.ring.charge(request.scope.get("freshet.key"), len(values) - 1)
        async with parts.overload.turn(many=many):
            verdicts, records = await _read_events(parts, values, many)
        last = await append(parts, parts.topics.events, records) if records else {}
    if len(records) < len(values):
        parts.telemetry.count(EVENTS_RECEIVED, len(values) - len(records), type="unknown", status="rejected")
    token = encode_token(last) if last else None
    parts.freshness.accepted(last)
    return json_response(Accepted(len(records), len(values) - len(records), verdicts, token), 202)


async def _read_events(
    parts: Parts, values: Sequence[msgspec.Raw], many: bool
) -> tuple[list[Verdict], list[Record]]:  # fmt: skip
    """Validate the events of a request, in slices; a bad one is a verdict, alone a Problem 422."""
    now, partitions = parts.clock(), parts.settings.partitions
    verdicts: list[Verdict] = []
    records: list[Record] = []
    users: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for index, value in enumerate(values):
        await parts.overload.breathe(index)
        try:
            event = read_event(value, now)
        except EventError as error:
            if not many:
                raise _problem(error) from error
            verdicts.append(Verdict(index, "rejected", reason=str(error)))
            continue
        if isinstance(event, events.Alias):
            needs_endings(parts.settings)
        types[type(event).__name__.lower()] += 1
        users[user := events.subject(event)] += 1
        if users[user] > MAX_USER_EVENTS:
            raise Problem(422, f"body[{index}].user_id", f"at most {MAX_USER_EVENTS} events of a user", "more")
        records.append((partition_of(user, partitions), user.encode(), events.encode(event)))
        verdicts.append(Verdict(index, "accepted", event_id=event.event_id or UNSET))
        parts.telemetry.observe(EVENT_SKEW, now - event.ts)
    for name, count in types.items():
        parts.telemetry.count(EVENTS_RECEIVED, count, type=name, status="accepted")
    return verdicts, records


def read_item(value: msgspec.Raw, now: float) -> events.Item:
    """Validate one catalogue entry; raises EventError."""
    item = events.parse_item(value)
    if len(value) > events.MAX_ITEM_BYTES:
        raise EventError("$", f"at most {events.MAX_ITEM_BYTES} bytes", f"{len(value)} bytes")
    if item.ts is None:
        item.ts = now
    return item


class ItemEntry(events.Item, kw_only=True, tag=False):
    """What POST /v1/items takes, as OpenAPI describes it: nothing else can be meant, so `type` may be left out."""

    type: Literal["item"] = "item"


class ItemBody(ItemEntry, kw_only=True):
    """What PUT takes: `item_id` may be left out too, for the path has it."""

    item_id: events.Id = msgspec.field(default_factory=str)


def _named(body: bytes, item_id: str) -> msgspec.Raw:
    value = decode_json(body)
    if not isinstance(value, dict):
        raise Problem(422, "body", "an object", repr(value)[:80])
    if value.setdefault("item_id", item_id) != item_id:
        raise Problem(422, "body.item_id", f"{item_id!r} as in the path, or nothing", repr(value["item_id"])[:80])
    return msgspec.Raw(msgspec.json.encode(value))


def _item_record(item: events.Item) -> Record:
    return 0, item.item_id.encode(), events.encode(item)


async def put_item(parts: Parts, request: Request) -> Response:
    """PUT /v1/items/{item_id}."""
    async with parts.overload.body(request) as body:
        return await _store(parts, _named(body, request.path_params["item_id"]))


async def delete_item(parts: Parts, request: Request) -> Response:
    """DELETE /v1/items/{item_id}: appends a record that says so."""
    return await _store(parts, _named(b'{"deleted":true}', request.path_params["item_id"]))


async def _store(parts: Parts, value: msgspec.Raw) -> Response:
    try:
        item = read_item(value, parts.clock())
    except EventError as error:
        raise _problem(error) from error
    last = await append(parts, parts.topics.items, [_item_record(item)])
    return json_response(StoredAnswer(item.item_id, last[0]), 202)


async def post_items(parts: Parts, request: Request) -> Response:
    """POST /v1/items."""
    async with parts.overload.body(request) as body:
        values, many = objects_of(body)
        parts.ring.charge(request.scope.get("freshet.key"), len(values) - 1)
        async with parts.overload.turn(many=many):
            verdicts, records = await _read_items(parts, values, many)
        if records:
            await append(parts, parts.topics.items, records)
    return json_response(Accepted(len(records), len(values) - len(records), verdicts, None), 202)


async def _read_items(
    parts: Parts, values: Sequence[msgspec.Raw], many: bool
) -> tuple[list[Verdict], list[Record]]:  # fmt: skip
    now = parts.clock()
    verdicts: list[Verdict] = []
    records: list[Record] = []
    for index, value in enumerate(values):
        await parts.overload.breathe(index)
        try:
            item = read_item(value, now)
        except EventError as error:
            if not many:
                raise _problem(error) from error
            verdicts.append(Verdict(index, "rejected", reason=str(error)))
        else:
            verdicts.append(Verdict(index, "accepted", item_id=item.item_id))
            records.append(_item_record(item))
    return verdicts, records
