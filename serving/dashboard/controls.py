"""What a person tells the learner from the page `models`: pin, unpin, roll back, save; appended to the log.

Each is a control record in `examples` (streaming/training/controls.py), so that it has its place in the one order.
Knows nothing of how the learner obeys.
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Final

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from serving.ingest import append
from serving.messages import Problem, converted, decode_json, json_response
from serving.parts import Parts
from streaming.training.controls import Control, record_of

WAIT_S: Final = 1.5
"""How long an answer waits for the learner to obey; it obeys later all the same."""


class Chosen(Struct, forbid_unknown_fields=True):
    """Which version is meant."""

    version: Annotated[int, Meta(ge=1, le=2**62, description="A version of `/-/models` that was not refused.")]


class Nothing(Struct, forbid_unknown_fields=True):
    """No more needs to be said."""


class Obeyed(Struct):
    """What became of it: the control's offset in `examples`; `done` false where the learner has not come to it yet."""

    done: bool
    offset: int
    step: int | None
    note: str


async def rollback(parts: Parts, request: Request) -> Response:
    """POST /-/models/rollback: learn on from a version."""
    return await _tell(parts, "rollback", (await _body(parts, request, Chosen)).version)


async def pin(parts: Parts, request: Request) -> Response:
    """POST /-/models/pin: serve a version while learning goes on."""
    return await _tell(parts, "pin", (await _body(parts, request, Chosen)).version)


async def unpin(parts: Parts, request: Request) -> Response:
    """POST /-/models/unpin: serve the newest weights again."""
    await _body(parts, request, Nothing)
    return await _tell(parts, "unpin")


async def save(parts: Parts, request: Request) -> Response:
    """POST /-/models/save: make a version now."""
    await _body(parts, request, Nothing)
    return await _tell(parts, "save")


async def _body(parts: Parts, request: Request, kind: type[Any]) -> Any:
    async with parts.overload.body(request, small=True) as body:
        return converted(decode_json(body) if body else {}, kind, "body")


async def _tell(parts: Parts, do: str, number: int = 0) -> Response:
    """Append a control and wait a little for what the learner notes of it; raises Problem 409 where it may not be."""
    told = await parts.snapshot.versions()
    kept = {about["version"]: about for about in told.get("versions", ()) if not about["refused"]}
    if number and number not in kept:
        known = ", ".join(map(str, sorted(kept)[-5:])) or "none is kept yet"
        raise Problem(409, "body.version", f"a version that is kept ({known})", str(number), do="see GET /-/models")
    identity = int(kept[number]["identity"], 16) if number else 0
    record = record_of(Control(do, number, identity, parts.clock()), codec=parts.settings.codec)
    offset = (await append(parts, parts.topics.examples, [(0, None, record)]))[0]
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until:
        told = await parts.snapshot.versions(fresh=True)
        note = next((note for note in told.get("notes", ()) if note["first"] == offset), None)
        if note is not None and "not done" in note["note"]:
            raise Problem(409, "the learner", f"{do}, as asked", note["note"], do="see GET /-/models")
        if note is not None:
            return json_response(Obeyed(True, offset, note["step"], note["note"]))
        await asyncio.sleep(0.1)
    return json_response(Obeyed(False, offset, None, "in the log; the learner has not come to it yet"))
