"""Events: one schema for HTTP, Kafka and replay, its limits, and the weight of each signal.

Knows nothing about transports, profiles or models. JSON comes in through the doors, MessagePack lies in the log; both
are the same structs. Evolution rule: fields are only ever added, each with a default; a field that a reader does not
know is ignored; a field never changes its meaning or type (then it gets a new name), and `v` rises when a reader
must know of a change.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, Final, NewType

import msgspec
import numpy as np
from msgspec import Meta

from infra.settings import EVENT_WEIGHTS, Weight
from models.examples import ACTION, CLICK, DWELL, HIDDEN, RATING, SKIPPED, TALLY, item_hash
from models.items import CatalogueItem
from models.profile import AWAY, COUNTERS, SEEN, SEQUENCE, Moved

UserId = NewType("UserId", str)
ItemId = NewType("ItemId", str)

MAX_FUTURE_S: Final = 300.0
"""How far an event's ts may lie ahead of the time its record was written, s."""
MAX_CONTEXT: Final = 16
MAX_ITEM_BYTES: Final = 64 * 1024

Id = Annotated[str, Meta(min_length=1, max_length=256)]
Name = Annotated[str, Meta(min_length=1, max_length=64)]
Text = Annotated[str, Meta(max_length=256)]
Version = Annotated[int, Meta(ge=1, le=65_535)]
Source = tuple[str, int, int]


class EventError(ValueError):
    """A bad event: where it is wrong, what was expected, what came."""

    def __init__(self, where: str, expected: str, got: str) -> None:
        self.where, self.expected, self.got = where, expected, got[:200]
        super().__init__(f"{where}: expected {expected}, got {self.got}")


def short(user_id: str) -> str:
    """Return what logs and reasons hold instead of a user's id: the first 12 hex digits of its SHA-256.

    An erasure takes no line out of a log. Whoever has the id finds its lines by the same hash.
    """
    return "#" + hashlib.sha256(user_id.encode("utf-8", "surrogateescape")).hexdigest()[:12]


class Common(msgspec.Struct, kw_only=True, omit_defaults=True, tag_field="type"):
    """What every interaction carries; `ts` in seconds since the epoch, `source` is set by the inlets alone."""

    user_id: Id
    ts: float
    event_id: Annotated[str, Meta(max_length=128)] | None = None
    slate_id: Annotated[str, Meta(max_length=128)] | None = None
    position: Annotated[int, Meta(ge=0, le=10_000)] | None = None
    surface: Annotated[str, Meta(max_length=64)] | None = None
    context: dict[Name, Text] | None = None
    v: Version = 1
    source: Source | None = None


class Click(Common, tag="click", kw_only=True):
    """A user opened an item."""

    item_id: Id


class Dwell(Common, tag="dwell", kw_only=True):
    """A user stayed with an item for some seconds."""

    item_id: Id
    seconds: Annotated[float, Meta(ge=0, le=86_400 * 7)]


class Rating(Common, tag="rating", kw_only=True):
    """A user rated an item on a scale (lowest, highest)."""

    item_id: Id
    value: float
    scale: tuple[float, float] = (1.0, 5.0)


class Action(Common, tag="action", kw_only=True):
    """A named act on an item: like, save, share, purchase, skip, hide, or the app's own."""

    item_id: Id
    name: Name


class View(Common, tag="view", kw_only=True):
    """An item was seen on a screen."""

    item_id: Id


class Impression(Common, tag="impression", kw_only=True):
    """A slate that was answered; `payload` is models.examples.Shown, `shown` the item ids by position."""

    shown: list[str]
    payload: bytes


class Alias(Common, tag="alias", kw_only=True):
    """An anonymous user turned out to be `user_id`: what is known of the one is moved to the other.

    Folded, and keyed, as an event of `anonymous_id`: it ends that profile. What it held follows as a Merge.
    """

    anonymous_id: Id


class Erase(Common, tag="erase", kw_only=True):
    """Forget this user: what was known when this was recorded is gone, what happened before it is ignored."""


class Merge(Common, tag="merge", kw_only=True):
    """What an alias moved to `user_id`; only the user agent writes it, `source` is ("alias", partition, offset).

    One that was dead-lettered and is replayed has the number of the replay as its source instead.
    entries: (item hash, effective time s, kind with voice bit, weight), oldest first; seen: u32 little endian;
    counters in the order of models.profile.COUNTERS; first and last effective time, s; averse: (item hash, effective
    time, s) of what was pushed away, oldest first; tally in the order of models.examples.TALLY, empty for none.
    """

    entries: Annotated[list[tuple[int, float, int, float]], Meta(max_length=SEQUENCE)]
    seen: bytes
    counters: Annotated[list[int], Meta(min_length=len(COUNTERS), max_length=len(COUNTERS))]
    first_time: float
    last_time: float
    averse: Annotated[list[tuple[int, float]], Meta(max_length=AWAY)] = []
    tally: Annotated[list[float], Meta(max_length=len(TALLY))] = []

    def moved(self) -> Moved:
        """Return it as the fold of profiles takes it."""
        items, times, kinds, weights = zip(*self.entries, strict=True) if self.entries else ((), (), (), ())
        return Moved(
            items=np.array(items, np.uint64), times=np.array(times, np.float64), weights=np.array(weights, np.float32),
            kinds=np.array(kinds, np.uint8), seen=np.frombuffer(self.seen, "<u4").astype(np.uint32),
            counters=np.array(self.counters, np.uint32), first_time=self.first_time, last_time=self.last_time,
            averse=np.array([item for item, _ in self.averse], np.uint64),
            averse_times=np.array([time for _, time in self.averse], np.float64),
            tally=np.array(self.tally or [0.0] * len(TALLY), np.float32),
        )  # fmt: skip


class Item(msgspec.Struct, kw_only=True, omit_defaults=True, tag="item", tag_field="type"):
    """A catalogue entry, whole: an upsert, or a deletion where `deleted` is true."""

    item_id: Id
    deleted: bool = False
    title: Annotated[str, Meta(max_length=1024)] = ""
    text: Annotated[str, Meta(max_length=32_768)] = ""
    categories: Annotated[list[Name], Meta(max_length=32)] = []
    tags: Annotated[list[Name], Meta(max_length=64)] = []
    provider: Annotated[str, Meta(max_length=256)] = ""
    published_at: float | None = None
    image: Annotated[str, Meta(max_length=2048)] = ""
    audio: Annotated[str, Meta(max_length=2048)] = ""
    attributes: dict[Name, str | float | bool] = {}
    ts: float | None = None
    v: Version = 1


Interaction = Click | Dwell | Rating | Action | View
Posted = Click | Dwell | Rating | Action | View | Alias
"""What the HTTP door takes."""
Event = Click | Dwell | Rating | Action | View | Impression | Alias | Erase | Merge
INLETS: Final = {"clicks": Click, "dwells": Dwell, "ratings": Rating, "actions": Action, "views": View}

_from_json = msgspec.json.Decoder(Posted)
_items_from_json = msgspec.json.Decoder(Item)
_from_log = msgspec.msgpack.Decoder(Event)
_items_from_log = msgspec.msgpack.Decoder(Item)
_to_log = msgspec.msgpack.Encoder()
_EXPECTED = re.compile(r"^(?P<what>.*?)(?: - at `(?P<where>[^`]+)`)?$", re.S)


def _explain(error: Exception, given: object) -> EventError:
    """Turn msgspec's message into where, expected and got."""
    match = _EXPECTED.match(str(error))
    what, where = (match["what"], match["where"] or "$") if match else (str(error), "$")
    if isinstance(error, msgspec.ValidationError) and what.startswith("Expected ") and ", got " in what:
        expected, got = what.removeprefix("Expected ").split(", got ", 1)
        return EventError(where, expected, got)
    if what.startswith("Object missing required field "):
        field = what.removeprefix("Object missing required field ")
        return EventError(where, f"the field {field}", "an object without it")
    if what.startswith("Invalid value "):
        return EventError(
            where, "one of click, dwell, rating, action, view, alias", what.removeprefix("Invalid value ")
        )
    if isinstance(error, msgspec.ValidationError):
        return EventError(where, what.removeprefix("Expected "), _short(given))
    return EventError(where, "well-formed bytes of one object", f"{_short(given)} ({what})")


def _short(given: object) -> str:
    text = given[:80].decode(errors="replace") if isinstance(given, bytes) else repr(given)
    return text[:80]


def parse_json(data: bytes | msgspec.Raw) -> Posted:
    """Read one interaction or alias from JSON bytes; raises EventError. `source` from outside is dropped."""
    try:
        event: Posted = _from_json.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _explain(error, bytes(data)) from error
    event.source = None
    check(event)
    return event


def parse_object(obj: object) -> Interaction:
    """Read one interaction from a decoded JSON object; raises EventError."""
    try:
        event: Interaction = msgspec.convert(obj, Interaction)
    except msgspec.ValidationError as error:
        raise _explain(error, obj) from error
    event.source = None
    check(event)
    return event


def parse_inlet(inlet: str, data: bytes, position: Source) -> Interaction:
    """Read one record of an inlet: its `type` may be left out; without `event_id` the source position is the id."""
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _explain(error, data) from error
    if not isinstance(raw, dict):
        raise EventError("$", "an object", type(raw).__name__)
    kind = inlet.removesuffix("s")
    if raw.setdefault("type", kind) != kind:
        raise EventError("$.type", repr(kind), repr(raw["type"]))
    event = parse_object(raw)
    event.source = position
    if event.event_id is None:
        event.event_id = ":".join(map(str, position))
    return event


def parse_item(data: bytes | msgspec.Raw) -> Item:
    """Read a catalogue entry from JSON bytes; raises EventError."""
    try:
        item = _items_from_json.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _explain(error, bytes(data)) from error
    return _checked_item(item)


def decode(data: bytes) -> Event:
    """Read one record of the log; raises EventError."""
    try:
        event: Event = _from_log.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise _explain(error, data[:40].hex()) from error
    check(event)
    return event


def decode_item(data: bytes) -> Item:
    """Read one record of the topic `items`; raises EventError."""
    try:
        return _checked_item(_items_from_log.decode(data))
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _explain(error, data[:40].hex()) from error


def encode(event: Event | Item) -> bytes:
    """Write an event or a catalogue entry as it lies in the log."""
    return _to_log.encode(event)


def _checked_item(item: Item) -> Item:
    if len(item.attributes) > 64:
        raise EventError("$.attributes", "at most 64 attributes", str(len(item.attributes)))
    for where, number in (("$.published_at", item.published_at), ("$.ts", item.ts)):
        if number is not None and not math.isfinite(number):
            raise EventError(where, "a finite number", str(number))
    return item


def check(event: Event) -> None:
    """Hold the limits that types cannot say: finite numbers, a real scale, a bounded context; raises EventError."""
    if not 0.0 <= event.ts < 1e11:
        raise EventError("$.ts", "seconds since the epoch (not ms)", str(event.ts))
    if event.context and len(event.context) > MAX_CONTEXT:
        raise EventError("$.context", f"at most {MAX_CONTEXT} entries", str(len(event.context)))
    if isinstance(event, Rating):
        low, high = event.scale
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise EventError("$.scale", "two finite numbers, the lower first", str(event.scale))
        if not low <= event.value <= high:
            raise EventError("$.value", f"a number from {low} to {high} (its scale)", str(event.value))
    elif isinstance(event, Dwell) and not math.isfinite(event.seconds):
        raise EventError("$.seconds", "a finite number", str(event.seconds))
    elif isinstance(event, Alias) and event.anonymous_id == event.user_id:
        raise EventError("$.anonymous_id", "another id than user_id", repr(event.anonymous_id))
    elif isinstance(event, Merge):
        _check_merge(event)


def _check_merge(event: Merge) -> None:
    """Hold what a profile can take: no bytes of another writer may break the fold of a partition."""
    if event.source is None or event.source[0] not in ("alias", "dead-letters"):
        raise EventError("$.source", "the position of an alias, or the number of a replay", str(event.source))
    if len(event.seen) % 4 or len(event.seen) > 4 * SEEN:
        raise EventError("$.seen", f"at most {SEEN} hashes of 4 bytes", f"{len(event.seen)} bytes")
    for i, (item, time, kind, weight) in enumerate(event.entries):
        if not (0 < item < 2**64 and 0.0 <= time < 1e11 and CLICK <= kind & 0x7F <= ACTION and kind < 256):
            raise EventError(f"$.entries[{i}]", "(item hash, time, kind, weight)", str((item, time, kind, weight)))
        if not abs(weight) < 3e38:
            raise EventError(f"$.entries[{i}][3]", "a finite 32-bit number", str(weight))
    for i, (item, time) in enumerate(event.averse):
        if not (0 < item < 2**64 and 0.0 <= time < 1e11):
            raise EventError(f"$.averse[{i}]", "(item hash, time)", str((item, time)))
    if len(event.tally) not in (0, len(TALLY)) or not all(abs(number) < 1e30 for number in event.tally):
        raise EventError("$.tally", f"{len(TALLY)} finite numbers or none", str(event.tally))
    if not all(0 <= counter < 2**32 for counter in event.counters):
        raise EventError("$.counters", "whole numbers of 32 bits", str(event.counters))
    if not 0.0 <= event.first_time <= event.last_time < 1e11:
        raise EventError("$.first_time", "at most last_time", str(event.first_time))


def impression(
    user_id: str, slate_id: str, ts: float, surface: str, shown: Sequence[str], payload: bytes
) -> Impression:
    """Return the event that tells the log which slate was answered."""
    return Impression(user_id=user_id, slate_id=slate_id, ts=ts, surface=surface, shown=list(shown), payload=payload)


def merge(user_id: str, ts: float, position: tuple[int, int], moved: Moved) -> Merge:
    """Return the event that brings to `user_id` what the alias at (partition, offset) took from another profile."""
    columns = (moved.items, moved.times, moved.kinds, moved.weights)
    return Merge(
        user_id=user_id, ts=ts, source=("alias", *position),
        entries=list(zip(*(column.tolist() for column in columns), strict=True)), seen=moved.seen.tobytes(),
        counters=moved.counters.tolist(), first_time=moved.first_time, last_time=moved.last_time,
        averse=list(zip(moved.averse.tolist(), moved.averse_times.tolist(), strict=True)),
        tally=moved.tally.tolist() if moved.tally.any() else [],
    )  # fmt: skip


def subject(event: Event) -> str:
    """Return the user whose profile an event is folded into, which is its key and gives its partition."""
    return event.anonymous_id if isinstance(event, Alias) else event.user_id


class Weights:
    """The table of signal weights, compiled: rows of (kind, condition, weight), the first that fits counts.

    An action without a row has weight 0, a rating's weight multiplies its place on its scale, from -1 to 1.
    """

    def __init__(self, table: Sequence[Weight] = EVENT_WEIGHTS) -> None:
        self._click = next((row.weight for row in table if row.kind == "click"), 0.0)
        self._rating = next((row.weight for row in table if row.kind == "rating"), 0.0)
        self._actions = {row.terms[1]: row.weight for row in table if row.kind == "action"}
        self._dwell = [(row.terms[0], float(row.terms[1]), row.weight) for row in table if row.kind == "dwell"]

    def of(self, event: Interaction) -> tuple[int, float, float]:
        """Return (kind, weight, value) of an interaction other than a view."""
        if isinstance(event, Click):
            return CLICK, self._click, 0.0
        if isinstance(event, Rating):
            low, high = event.scale
            value = (event.value - low) / (high - low) * 2.0 - 1.0
            return RATING, self._rating * value, value
        if isinstance(event, Dwell):
            for sign, bound, weight in self._dwell:
                if sign == "always" or (event.seconds >= bound if sign == ">=" else event.seconds < bound):
                    return DWELL, weight, event.seconds
            return DWELL, 0.0, event.seconds
        if isinstance(event, Action):
            weight = self._actions.get(event.name, 0.0)
            if weight < 0.0:
                return ACTION, weight, SKIPPED if event.name == "skip" else HIDDEN
            return ACTION, weight, float(weight > 0.0)
        raise TypeError(f"expected an interaction with a weight, got {type(event).__name__}")


def to_builtins(event: Event | Item) -> Any:
    """Return a JSON-able object of an event, for people to read."""
    return msgspec.to_builtins(event)


def catalogue_item(item: Item) -> CatalogueItem:
    """Return what the arrays of items take of a catalogue entry."""
    return CatalogueItem(**{name: getattr(item, name) for name in CatalogueItem.__struct_fields__})


def item_key(item: Item) -> int:
    """Return the hash under which a catalogue entry's item is known."""
    return item_hash(item.item_id)
