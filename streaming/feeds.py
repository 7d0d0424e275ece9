"""Feeds: one bounded Redis Stream per writer that tells readers which rows changed (DESIGN section 3, rule 10).

A delta carries absolute values for the positions [first, next) of `examples`. Learning curves are Streams too. Knows
nothing about what rows mean, and nothing of Redis but the commands of Streams.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Delta:
    """One entry of a feed: absolute values of rows for the positions [first, next) of `examples`.

    kind "rows" (item rows, `dense` = totals), "catalogue" (entries; `next` = offset in `items`), "vectors" (part of a
    model step), "step" (its end: `dense` = weights, `first`/`next` of the whole step, `parts` = entries before it, -1
    where the writer did not say), "unreadable" (bytes that are no delta). `gone` are rows to forget before `values`.
    """

    kind: str
    first: int
    next: int
    keys: Sequence[int]
    values: Sequence[bytes]
    dense: bytes = b""
    step: int = 0
    gone: Sequence[int] = ()
    parts: int = -1

    @property
    def size(self) -> int:
        """Bytes of what it carries."""
        return 8 * (len(self.keys) + len(self.gone)) + sum(map(len, self.values)) + len(self.dense)


def delta_fields(delta: Delta) -> dict[Any, Any]:
    """Return a delta as the fields of a stream entry."""
    count = len(delta.keys)
    return {
        "kind": delta.kind, "first": delta.first, "next": delta.next, "step": delta.step,
        "keys": struct.pack(f"<{count}Q", *delta.keys),
        "sizes": struct.pack(f"<{count}I", *map(len, delta.values)),
        "values": b"".join(delta.values), "dense": delta.dense,
        "gone": struct.pack(f"<{len(delta.gone)}Q", *delta.gone), "parts": delta.parts,
    }  # fmt: skip


def delta_from(fields: Mapping[bytes, bytes]) -> Delta:
    """Read `delta_fields`; kind "unreadable" where these are others."""
    try:
        keys, sizes, gone = fields[b"keys"], fields[b"sizes"], fields.get(b"gone", b"")
        count, at, values = len(keys) // 8, 0, []
        for size in struct.unpack(f"<{count}I", sizes):
            values.append(fields[b"values"][at : at + size])
            at += size
        if at != len(fields[b"values"]):
            raise ValueError(f"values of {at} bytes expected, got {len(fields[b'values'])}")
        return Delta(
            fields[b"kind"].decode(), int(fields[b"first"]), int(fields[b"next"]), struct.unpack(f"<{count}Q", keys),
            values, fields[b"dense"], int(fields[b"step"]), struct.unpack(f"<{len(gone) // 8}Q", gone),
            int(fields.get(b"parts", -1)),
        )  # fmt: skip
    except (KeyError, ValueError, struct.error) as error:
        log.warning("feed: an entry that is no delta (%s: %s)", type(error).__name__, error)
        return Delta("unreadable", 0, 0, (), ())


async def feed_top(client: Any, key: str) -> str:
    """Return the id of a feed's newest entry, "0-0" for an empty one: where a reader starts before it loads."""
    entries = await client.xrevrange(key, count=1)
    return entries[0][0].decode() if entries else "0-0"


async def read_feed(
    client: Any, key: str, last_id: str, *, block_ms: int = 1000, count: int = 64
) -> list[tuple[str, Delta]]:
    """Wait at most `block_ms` for entries after `last_id`; return them in order with their ids."""
    answer = await client.xread({key: last_id}, count=count, block=block_ms)
    if not answer:
        return []
    streams = answer.items() if isinstance(answer, dict) else answer
    entries: list[tuple[str, Delta]] = []
    for _, rows in streams:
        batch = rows[0] if rows and isinstance(rows[0], list) and rows[0] and isinstance(rows[0][0], tuple) else rows
        entries += [(entry_id.decode(), delta_from(fields)) for entry_id, fields in batch]
    return entries


class Feed:
    """The writing end of a feed: ids are `<next>-<sequence>`, older entries leave when it outgrows its bytes."""

    def __init__(self, client: Any, key: str, limit_bytes: int) -> None:
        self._client, self._key, self._limit, self._since = client, key, limit_bytes, 0

    async def publish(self, delta: Delta) -> bool:
        """Append; False where the feed already has an entry beyond it (this writer is behind: a rollback or a twin)."""
        fields = delta_fields(delta)
        # A catalogue entry has no position of its own in `examples`: it goes behind whatever is newest.
        at = (await feed_top(self._client, self._key)).split("-")[0] if delta.kind == "catalogue" else delta.next
        try:
            await self._client.xadd(self._key, fields, id=f"{at}-*")
        except Exception as error:  # the server's own word; its exceptions are named in state.py only
            if "equal or smaller" not in str(error):
                raise
            return False
        self._since += len(fields["values"]) + len(fields["dense"])
        if self._since > self._limit // 16:
            self._since = 0
            await self._trim()
        return True

    async def _trim(self) -> None:
        used = await self._client.memory_usage(self._key, samples=0) or 0
        if used > self._limit:
            length = await self._client.xlen(self._key)
            keep = max(1, int(length * 0.75 * self._limit / used))
            await self._client.xtrim(self._key, maxlen=keep, approximate=False)


async def append_metrics(client: Any, key: str, fields: Mapping[str, Any], *, keep: int = 3600) -> None:
    """Append a point to a learning curve that keeps about the last `keep` points."""
    await client.xadd(key, dict(fields), maxlen=keep, approximate=True)


async def read_metrics(
    client: Any, key: str, *, after: str = "-", count: int = 600
) -> list[tuple[str, dict[str, str]]]:
    """Return points of a learning curve after an id (exclusive), or its newest `count` for "-"."""
    if after == "-":
        entries = list(reversed(await client.xrevrange(key, count=count)))
    else:
        entries = await client.xrange(key, min=f"({after}", count=count)
    return [(i.decode(), {k.decode(): v.decode() for k, v in fields.items()}) for i, fields in entries]
