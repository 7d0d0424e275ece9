"""Forgetting a user: one erasure in the log, and a receipt of what ends when. Knows nothing of how it is folded."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from infra.settings import Settings
from serving.ingest import append, needs_endings
from serving.lookup import user_id
from serving.messages import json_response
from serving.parts import Parts
from streaming import events
from streaming.topics import encode_token, partition_of


class Kept(msgspec.Struct):
    """What of a user's data ends by a rule and not at once: the rule, and the date by which it is gone where known."""

    rule: str
    until: str | None = None


class Receipt(msgspec.Struct):
    """What ends when for an erased user; `token` names the erasure's position for `after=`."""

    user_id: str
    token: str
    profile: str
    raw_events: Kept
    inlets: Kept
    dead_letters: Kept
    snapshots: Kept
    logs: Kept
    cap: Kept


async def delete_user(parts: Parts, request: Request) -> Response:
    """DELETE /v1/users/{user_id}: append the erasure, answer with the receipt; an unknown user is erased as well."""
    user = user_id(request)
    needs_endings(parts.settings)
    now = parts.clock()
    erasure = events.Erase(user_id=user, ts=now)
    partition = partition_of(user, parts.settings.partitions)
    last = await append(parts, parts.topics.events, [(partition, user.encode(), events.encode(erasure))])
    return json_response(receipt(user, encode_token(last), now, parts.settings), 202)


def receipt(user: str, token: str, now: float, settings: Settings) -> Receipt:
    """Return what is promised about a user erased at `now`, s."""
    days = settings.retention_days
    return Receipt(
        user, token,
        "ends within milliseconds, when the erasure is folded (ask with after=token): sequence, counters, seen items,"
        " slates, embedding; hashes of the last event ids stay, so that a repeat is known; older events are ignored",
        Kept("removed by the retention of the log, once a snapshot holds what they add up to", _date(now, days))
        if days
        else Kept("kept with the log: set FRESHET_RETENTION_DAYS and save snapshots to have them removed"),
        Kept("removed by the retention of the inlets", _date(now, settings.retention_inlets_days)),
        Kept("originals of events that could not be used are kept, with the id in them; reasons name it by a short"
             " hash but quote what was refused; find them with `freshet dead-letters list`"),
        Kept("those saved before now hold the profile until their folder is deleted; restoring one erases it again"),
        Kept(f"lines about single users name them {events.short(user)}, not by id; a traceback may hold more of the"
             " event; of the local stack the newest 16 MB of each process are kept"),
        Kept("that the user was erased is itself forgotten once FRESHET_MAX_USERS more recent users push the ended"
             " profile out: an older event that comes after that starts a new one"),
    )  # fmt: skip


def _date(now: float, days: int) -> str:
    # Kafka removes whole segments: a day for the one that is still written.
    return (datetime.fromtimestamp(now, UTC) + timedelta(days=days + 1)).date().isoformat()
