"""Dead letters: what could not be folded, each once, with its reason and original bytes.

A letter may lie in the topic more than once, for delivery is at least once; its source position is its name. The record
that a letter names is never folded from where it lies, by no rebuild either: a replay brings it back as a new record.

Replay applies each once, whatever is interrupted: first an *intent* of each letter goes into the topic, whose own
offset is the number of the replay; the event is appended to the log with source ("dead-letters", 0, that number), which
the fold takes once and in ascending order; then a *done* says up to which number all are appended. A later replay
appends what is not done again, with the same numbers, before its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from infra.settings import Settings
from streaming.events import Event, EventError, decode, encode, parse_inlet, subject
from streaming.topics import INLETS, Log, Record, Topics, partition_of, read_span, read_topic, topic_end

if TYPE_CHECKING:
    from streaming.learn import Dead  # the API shows letters and knows no fold

log = logging.getLogger(__name__)

MOST_BYTES = 256 * 1024
"""So much of an original is kept."""
EXCERPT = 4096
SLICE = 200
"""Letters read again at a stretch, about 5 ms: a replay may be asked of a process that serves slates."""
SOURCE = "dead-letters"
MARK = b"replay"
"""Key of what is no letter: intents and dones."""


class DeadLetters:
    """Appends what cannot be read to `dead-letters`, with its source position, reason and original bytes."""

    def __init__(self, log_: Log, topics: Topics) -> None:
        self._log, self.topics = log_, topics

    async def told(self, first: Mapping[int, int]) -> Told:
        """Read what letters say of `events` from these offsets on, by partition."""
        return await told(self._log.bootstrap, self.topics, first)

    async def send(self, dead: Sequence[Dead]) -> None:
        """Append and wait for the acknowledgement."""
        records: list[Record] = [
            (0, f"{d.topic}:{d.partition}:{d.offset}".encode(), msgspec.msgpack.encode({
                "topic": d.topic, "partition": d.partition, "offset": d.offset, "reason": d.reason,
                "original": d.original[:MOST_BYTES], "at": time.time(),
            }))
            for d in dead
        ]  # fmt: skip
        for letter in dead:  # not what was got: it may be a user's id, and an erasure takes no line out of a log
            why = letter.reason.partition(", got ")[0]
            log.warning("dead letter %s[%d]@%d: %s", letter.topic, letter.partition, letter.offset, why)
        if records:
            await self._log.append(self.topics.dead_letters, records)


class Letter(msgspec.Struct):
    """One dead letter as it lies in the topic; `at` in seconds since the epoch, `replays` its numbers of replay."""

    topic: str
    partition: int
    offset: int
    reason: str
    original: bytes
    at: float
    replays: list[int] = []

    @property
    def name(self) -> str:
        """`topic:partition:offset`, what `dead-letters show` takes."""
        return f"{self.topic}:{self.partition}:{self.offset}"

    @property
    def why(self) -> str:
        """The class of its reason: invalid (no event), raised (by a fold), profile (damaged), lost (never read)."""
        for begins, name in (("its fold ", "raised"), ("learning it raised", "raised"), ("the stored prof", "profile")):
            if self.reason.startswith(begins):
                return name
        return "lost" if "were deleted by retention" in self.reason else "invalid"

    def text(self) -> str:
        """Return the original as a person can read it: text, or hex where it is none."""
        try:
            return self.original.decode()
        except UnicodeDecodeError:
            try:
                return msgspec.json.encode(msgspec.msgpack.decode(self.original)).decode()
            except (msgspec.MsgspecError, ValueError, TypeError):
                return self.original.hex(" ")

    def event(self, topics: Topics) -> Event:
        """Read the original again; raises EventError where it still is nothing to fold."""
        inlet = topics.inlet_of(self.topic)
        if len(self.original) >= MOST_BYTES:
            raise EventError("$", f"an original below {MOST_BYTES} bytes, that was kept whole", f"{MOST_BYTES} of it")
        if inlet in INLETS:
            return parse_inlet(inlet, self.original, (inlet, self.partition, self.offset))
        if self.topic != topics.events:
            raise EventError("$", f"a record of {topics.events} or of an inlet", f"one of {self.topic}")
        return decode(self.original)


class Intent(msgspec.Struct, tag="intent"):
    """The letter of this name is replayed; the record's own offset is the number."""

    name: str


class Done(msgspec.Struct, tag="done"):
    """Every intent below offset `to` is appended to the log."""

    to: int


@dataclass(slots=True)
class Box:
    """What lies in the topic: letters by name, oldest first; intents by number; up to which number all are appended."""

    letters: dict[str, Letter] = field(default_factory=dict)
    intents: dict[int, str] = field(default_factory=dict)
    done: int = 0


async def read_box(settings: Settings) -> Box:
    """Read the whole topic; what is neither letter nor mark is left out, and told in the log of this process."""
    topic = Topics(settings.namespace).dead_letters
    return await _box(topic, read_topic(settings.kafka, topic, {0: await topic_end(settings.kafka, topic)}))


async def newest(settings: Settings, count: int) -> tuple[list[Letter], int]:
    """Return the letters among the newest `count` records, oldest first, and how many records there are in all.

    Of each original at most EXCERPT bytes are kept. Whether one was replayed is known, for a replay comes after it.
    """
    topic = Topics(settings.namespace).dead_letters
    end = await topic_end(settings.kafka, topic)
    span = read_span(settings.kafka, topic, {0: (max(0, end - count), end)}, reset="earliest")
    return list((await _box(topic, span, keep=EXCERPT)).letters.values()), end


async def _box(topic: str, found: AsyncIterator[tuple[int, list[Any]]], keep: int = MOST_BYTES) -> Box:
    box = Box()
    letter, mark = msgspec.msgpack.Decoder(Letter), msgspec.msgpack.Decoder(Intent | Done)
    async for _, records in found:
        for record in records:
            try:
                said = (mark if record.key == MARK else letter).decode(record.value or b"")
            except msgspec.MsgspecError as error:
                log.warning("%s[0]@%d: no dead letter (%s)", topic, record.offset, error)
                continue
            if isinstance(said, Letter):
                said.original = said.original[:keep]
                box.letters.setdefault(said.name, said)
            elif isinstance(said, Done):
                box.done = max(box.done, said.to)
            elif said.name in box.letters:
                box.intents[record.offset] = said.name
                box.letters[said.name].replays.append(record.offset)
    return box


async def letters(settings: Settings) -> list[Letter]:
    """Return every dead letter, oldest first, each source position once."""
    return list((await read_box(settings)).letters.values())


@dataclass(slots=True)
class Told:
    """Offsets of `events` by partition: `letters` that name them, and those of them that are `aside`.

    Those could be read, and no fold takes them from where they lie.
    """

    letters: dict[int, set[int]] = field(default_factory=dict)
    aside: dict[int, set[int]] = field(default_factory=dict)


async def told(kafka: str, topics: Topics, first: Mapping[int, int] | None = None) -> Told:
    """Read what letters say of `events`: of partitions in `first` from these offsets on, else of all."""
    topic, found, letter = topics.dead_letters, Told(), msgspec.msgpack.Decoder(Letter)
    mine = f"{topics.events}:".encode()
    async for _, records in read_topic(kafka, topic, {0: await topic_end(kafka, topic)}):
        for record in records:
            if not (record.key or b"").startswith(mine):
                continue
            try:
                said = letter.decode(record.value or b"")
            except msgspec.MsgspecError:  # `read_box` tells of it
                continue
            if first is not None and said.offset < first.get(said.partition, said.offset + 1):
                continue
            found.letters.setdefault(said.partition, set()).add(said.offset)
            try:
                decode(said.original)
            except EventError:  # cannot be read anyway, or the id of an item, whose event was folded
                continue
            found.aside.setdefault(said.partition, set()).add(said.offset)
    return found


async def set_aside(settings: Settings) -> dict[int, set[int]]:
    """Return the offsets of `events` by partition that could be read and no fold takes from where they lie."""
    return (await told(settings.kafka, Topics(settings.namespace))).aside


@dataclass(slots=True)
class Replayed:
    """What a replay came to, letters by name; `bad` with why each still cannot be read."""

    appended: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)


async def replay(
    settings: Settings, *, reason: str = "", position: str = "", names: Collection[str] | None = None
) -> Replayed:
    """Append the originals of letters to the log again: all, those whose reason holds a text, or the one of a position.

    names: only of these letters.

    What was replayed before is left. An event that cannot be folded again becomes a new letter, of its new position.
    """
    topics, outcome = Topics(settings.namespace, settings.partitions), Replayed()
    log_ = Log(settings.kafka)
    await log_.start()
    try:
        intents: list[Record] = []
        for turn, letter in enumerate((await read_box(settings)).letters.values()):
            if turn % SLICE == SLICE - 1:
                await asyncio.sleep(0)
            if reason not in letter.reason or (position and position != letter.name):
                continue
            if names is not None and letter.name not in names:
                continue
            if letter.replays:
                outcome.before.append(letter.name)
                continue
            try:
                letter.event(topics)
            except EventError as error:
                outcome.bad[letter.name] = str(error)
                continue
            intents.append((0, MARK, msgspec.msgpack.encode(Intent(letter.name))))
            outcome.appended.append(letter.name)
        if intents:
            await log_.append(topics.dead_letters, intents)
        await _finish(settings, topics, log_)
    finally:
        await log_.stop()
    return outcome


async def _finish(settings: Settings, topics: Topics, log_: Log) -> None:
    """Append every event that is intended and not done, in the order of the numbers."""
    box = await read_box(settings)
    waiting = sorted(number for number in box.intents if number >= box.done)
    if not waiting:
        return
    records: list[Record] = []
    for turn, number in enumerate(waiting):
        if turn % SLICE == SLICE - 1:
            await asyncio.sleep(0)
        event = box.letters[box.intents[number]].event(topics)
        event.source = (SOURCE, 0, number)
        user = subject(event)
        records.append((partition_of(user, topics.partitions), user.encode(), encode(event)))
    await log_.append(topics.events, records)
    await log_.append(topics.dead_letters, [(0, MARK, msgspec.msgpack.encode(Done(waiting[-1] + 1)))])
