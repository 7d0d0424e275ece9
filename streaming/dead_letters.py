"""Dead letters: what could not be folded, each once, with its reason and original bytes.

A letter may lie in the topic more than once, for delivery is at least once; its source position is its name.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import msgspec

from infra.settings import Settings
from streaming.learn import Dead
from streaming.topics import Log, Record, Topics, read_topic, topic_end

log = logging.getLogger(__name__)


class DeadLetters:
    """Appends what cannot be read to `dead-letters`, with its source position, reason and original bytes."""

    def __init__(self, log_: Log, topics: Topics) -> None:
        self._log, self.topics = log_, topics

    async def send(self, dead: Sequence[Dead]) -> None:
        """Append and wait for the acknowledgement."""
        records: list[Record] = [
            (0, f"{d.topic}:{d.partition}:{d.offset}".encode(), msgspec.msgpack.encode({
                "topic": d.topic, "partition": d.partition, "offset": d.offset, "reason": d.reason,
                "original": d.original[:256 * 1024], "at": time.time(),
            }))
            for d in dead
        ]  # fmt: skip
        for letter in dead:
            log.warning("dead letter %s[%d]@%d: %s", letter.topic, letter.partition, letter.offset, letter.reason)
        if records:
            await self._log.append(self.topics.dead_letters, records)


class Letter(msgspec.Struct):
    """One dead letter as it lies in the topic; `at` in seconds since the epoch."""

    topic: str
    partition: int
    offset: int
    reason: str
    original: bytes
    at: float

    @property
    def name(self) -> str:
        """`topic:partition:offset`, what `dead-letters show` takes."""
        return f"{self.topic}:{self.partition}:{self.offset}"

    def text(self) -> str:
        """Return the original as a person can read it: text, or hex where it is none."""
        try:
            return self.original.decode()
        except UnicodeDecodeError:
            try:
                return msgspec.json.encode(msgspec.msgpack.decode(self.original)).decode()
            except (msgspec.MsgspecError, ValueError, TypeError):
                return self.original.hex(" ")


async def letters(settings: Settings) -> list[Letter]:
    """Return every dead letter, oldest first, each source position once."""
    topic = Topics(settings.namespace).dead_letters
    decoder = msgspec.msgpack.Decoder(Letter)
    found: dict[str, Letter] = {}
    async for _, records in read_topic(settings.kafka, topic, {0: await topic_end(settings.kafka, topic)}):
        for record in records:
            letter = decoder.decode(record.value)
            found.setdefault(letter.name, letter)
    return list(found.values())
