"""Every door through which bytes of others come in: examples of good input, what reads it, how it may refuse.

A door raises Refused for bad input, with the reason it gave; any other exception is a crash. What it lets in goes on
into whatever works with it next (the folds, the kernels, the codecs), which must take it.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from starlette.requests import Request

from models.examples import CodecError, Entries, HoleError, Shown, accept, item_hash
from models.items import CatalogueItem, Items
from models.model import Model
from models.profile import Profiles, unpack
from models.recommend import History, popular, recommend, similar
from models.recommend import Request as Ask
from models.rows import Rows
from serving import ingest
from serving.keys import KeysError, read_keys
from serving.lookup import history_of
from serving.messages import LookupQuery, Problem, converted, decode_json, read_query
from serving.snapshot import Live, Stale
from streaming import events
from streaming.events import EventError, Weights
from streaming.feeds import Delta, delta_fields, delta_from
from streaming.learn import UserFold, decode_part, users_of
from streaming.replay.logs import ReplayError, read_log
from streaming.state import MemoryUserStore, UserRead
from streaming.topics import TokenError, decode_token, encode_token
from tests.entries import Walk
from tests.event_streams import T0, records, shown_payload
from tests.mutators import as_json, mutated, reshaped

NOW: Final = T0 + 1e6
KEYS: Final = np.array([item_hash(f"item-{k}") for k in range(12)], np.uint64)

NOBODY: Final = history_of(None)


class Refused(Exception):
    """Bad input was refused, with this reason."""


@dataclass(frozen=True)
class Door:
    """How to make bad input for a door, and how to bring it in; `share` of all inputs are its."""

    name: str
    make: Callable[[random.Random], Any]
    take: Callable[[Any], None]
    refusals: tuple[type[Exception], ...]
    share: float

    def knock(self, given: Any) -> bool:
        """Bring one input in; return whether it was taken. Any exception but a reasoned refusal is a crash."""
        try:
            self.take(given)
        except self.refusals as error:
            reason = str(error)
            assert len(reason) > 10, f"refused without a reason: {reason!r}"
            if isinstance(error, EventError | Problem):
                told = error if isinstance(error, EventError) else error.error
                assert told.where, reason
                assert told.expected, reason
            return False
        except Refused:
            return False
        return True


# -- good input -------------------------------------------------------------------------------------------------------

OBJECTS: Final[list[dict[str, Any]]] = [
    {"type": "click", "user_id": "ann", "item_id": "i1", "ts": T0, "event_id": "e1", "context": {"device": "tv"}},
    {"type": "dwell", "user_id": "bob", "item_id": "i2", "ts": T0 + 0.5, "seconds": 31.5, "position": 3},
    {"type": "rating", "user_id": "cy", "item_id": "i3", "ts": T0, "value": 4, "scale": [1, 5], "surface": "home"},
    {"type": "action", "user_id": "dee", "item_id": "i4", "ts": T0, "name": "like", "slate_id": "s1"},
    {"type": "view", "user_id": "ann", "item_id": "i5", "ts": T0, "v": 1},
    {"type": "alias", "user_id": "ann", "anonymous_id": "anon-1", "ts": T0},
]
ITEMS: Final[list[dict[str, Any]]] = [
    {"item_id": "a", "title": "A", "categories": ["x", "y"], "tags": ["t"], "published_at": T0, "ts": T0},
    {"item_id": "b", "deleted": True},
    {"item_id": "c", "text": "words", "attributes": {"k": 1.5, "l": "m", "n": True}, "provider": "p", "image": "u"},
]
QUERIES: Final[list[dict[str, Any]]] = [
    {"n": 5, "surface": "home", "context": {"a": "b"}, "exclude": ["i1"], "categories": ["x"], "seen": "include"},
    {"after": encode_token({1: 5}), "wait_ms": 10, "track": False, "trace": True, "policy": "greedy", "now": T0},
]
TEXT_QUERIES: Final = [
    b"n=5&surface=home&exclude=a,b&exclude=c&categories=x&seen=include&track=false&wait_ms=20&now=5.5",
    b"context=%7B%22a%22%3A%22b%22%7D&after=eyIxIjo1fQ&policy=greedy&trace=1",
]
TOKENS: Final = [encode_token({1: 5, 7: 10**6}).encode(), b"clicks:3:41", b"views:0:0"]
CSV: Final = b"user,item,ts,rating,kind\nann,i1,5.0,3,rating\nbob,i2,2020-01-01T00:00:00,,click\ncy,i3,7,1.5,\n" * 3
MOVIES: Final = (
    b"userId,movieId,rating,timestamp\n1,31,2.5,1260759144\n1,1029,3.0,1260759179\n2,31,4.0,1260759182\n" * 3
)
TWEETS: Final = b"1::0111161::10::1364400000\n2::0111161::8::1364400001\n" * 3
RETAIL: Final = (
    b"InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"
    b"536365,85123A,WHITE,6,2010-12-01 08:26:00,2.55,17850.0,UK\nC536379,22423,X,-1,2010-12-01 09:41:00,1,14527.0,UK\n"
)
VIDEOS: Final = (
    b"user_id\tvideo_id\ttime_ms\tis_click\tplay_time_ms\tlabel\n"
    b"1\t7\t1649581149287\t1\t46186\t1\n1\t8\t1649581150000\t0\t900\t0\n2\t7\t1649581160000\t1\t0\t1\n"
) * 2
LOGS: Final[dict[str, tuple[str, bytes, dict[str, str]]]] = {
    "csv": ("log.csv", CSV, {"rating": "rating", "kind": "kind"}), "movielens": ("log.csv", MOVIES, {}),
    "movietweetings": ("log.dat", TWEETS, {}), "online-retail": ("log.csv", RETAIL, {}),
    "kuairand": ("log.tsv", VIDEOS, {}),
}  # fmt: skip


@cache
def log_values() -> list[bytes]:
    """Return records of `events` of every type."""
    found = [value for _, _, value in records(3, 300)]
    found.append(events.encode(events.Alias(user_id="user-1", anonymous_id="anon", ts=T0)))
    found.append(events.encode(events.Erase(user_id="user-2", ts=T0)))
    return found


@cache
def log_objects() -> list[dict[str, Any]]:
    """Return the same as plain objects."""
    return [msgspec.msgpack.decode(value) for value in log_values()]


@cache
def folded() -> tuple[MemoryUserStore, list[bytes]]:
    """Return profiles of a few users in both stores' form, and the `examples` records that came of their events."""
    store, out = MemoryUserStore(), []
    fold = UserFold(Weights())
    batch = records(5, 400, users=6)
    for at in range(0, len(batch), 100):
        part = decode_part("events", 0, batch[at : at + 100])
        users = users_of([part])
        outcome = fold.fold([part], {0: store.read_now(0, users[0])})
        for write in outcome.writes:
            assert store.commit_now(write) is None
        out += [entries.to_bytes() for entries in outcome.records]
    return store, out


def stored(kind: str) -> list[bytes]:
    """Return the values of one kind (profile, seen) of the folded users."""
    return [value for (name, _, _), value in folded()[0].values.items() if name == kind]


@cache
def example_records() -> list[bytes]:
    """Return records of `examples`, with and without features, small ones among them."""
    walk = Walk(seed=1, n=60, width=4).entries()
    return [*folded()[1], walk.to_bytes(), *(walk.slice(i, i + 1, [(0, i, i + 1)]).to_bytes() for i in range(12))]


@cache
def payloads() -> list[bytes]:
    """Return payloads of impressions."""
    return [shown_payload("s", ["a", "b", "c"]), shown_payload("s", ["a"], 4), shown_payload("s", [])]


@cache
def live() -> Live:
    """Return the arrays of one API process that has learnt a little."""
    made = Live.empty()
    for value in folded()[1]:
        made.items.fold(Entries.from_bytes(value))
    made.model.load_rows(KEYS, made.model.pack_rows(made.items.rows.add(KEYS)))
    return made


@cache
def row_values() -> list[bytes]:
    """Return packed item rows."""
    items = live().items
    return items.pack(items.rows.find(KEYS))


@cache
def learner_bytes() -> tuple[list[bytes], bytes]:
    """Return packed rows with optimiser state and the dense state of a learner that has learnt a little."""
    from models.learner import Learner

    learner = Learner(rows=Rows(), seed=1)
    learner.learn(Walk(seed=2, n=80).entries())
    rows = learner.take_changed()
    return learner.pack_state(rows), learner.dense_state()


# -- taking it --------------------------------------------------------------------------------------------------------


def take_http_events(body: bytes) -> None:
    """POST /v1/events, but for Kafka; what is accepted must come back from the log as it went in."""
    values, many = ingest.objects_of(body)
    bad: EventError | None = None
    for value in values:
        try:
            event = ingest.read_event(value, NOW)
        except EventError as error:
            bad = error
            if not many:
                raise
            continue
        event.user_id.encode()
        assert events.decode(events.encode(event)) == event
    if bad is not None:
        raise bad


def take_http_items(body: bytes) -> None:
    """POST and PUT of items."""
    values, _ = ingest.objects_of(body)
    for value in values:
        item = ingest.read_item(value, NOW)
        assert events.decode_item(events.encode(item)) == item
    ingest.read_item(ingest._named(body, "a"), NOW)


def take_lookup(given: bytes) -> None:
    """A lookup's JSON body and its query string."""
    if given[:1] == b"?":
        scope = {"type": "http", "query_string": given[1:], "headers": [], "method": "GET", "path": "/"}
        query = read_query(Request(scope), LookupQuery)
    else:
        query = converted(decode_json(given), LookupQuery, "body")
    [item_hash(name) for name in query.exclude]
    if query.after is not None:
        decode_token(query.after)


def take_token(data: bytes) -> None:
    """A position token."""
    decode_token(data.decode("latin-1"))


def take_inlet(given: tuple[str, bytes]) -> None:
    """A record of an inlet: JSON of any Kafka client."""
    event = events.parse_inlet(given[0], given[1], (given[0], 3, 41))
    event.user_id.encode()
    assert events.decode(events.encode(event)) == event


def take_log(data: bytes) -> None:
    """A record of the log; what can be decoded must fold, and what comes of it must be readable."""
    part = decode_part("events", 0, [(0, round(NOW * 1000), data)])
    for dead in part.dead:
        assert len(dead.reason) > 10
        raise Refused(dead.reason)
    users = users_of([part])[0]
    blank: list[bytes | None] = [None] * len(users)
    outcome = UserFold(Weights()).fold([part], {0: UserRead(0, {}, blank, list(blank), "")})
    for write in outcome.writes:
        for user, value in write.profiles.items():
            unpack(value, write.seen.get(user))
    for entries in outcome.records:
        Entries.from_bytes(entries.to_bytes())


def take_catalogue(data: bytes) -> None:
    """A record of `items`, as the item agent and serving take it."""
    item = events.decode_item(data)
    made = Live.empty()
    made.set_items([item_hash(item.item_id)], [data])
    msgspec.msgpack.decode(data, type=CatalogueItem)


def take_examples(data: bytes) -> None:
    """A record of `examples`; what can be read must fold into item rows, and pack again."""
    entries = Entries.from_bytes(data)
    marks = {partition: first for partition, first, _ in entries.ranges}
    items = Items(rows=Rows())
    rows = items.fold(accept(entries, marks))
    items.load(items.rows.keys[rows], items.pack(rows))


def take_shown(data: bytes) -> None:
    """The payload of an impression."""
    Shown.from_bytes(Shown.from_bytes(data).to_bytes())


def take_profile(given: tuple[bytes | None, bytes | None]) -> None:
    """Stored bytes of a user; what can be read must fold and pack."""
    unpack(*given)
    fold = UserFold(Weights())
    click = events.Click(user_id="ann", item_id="i1", ts=T0, event_id="e", slate_id="slate-3")
    part = decode_part("events", 0, [(0, round(T0 * 1000), events.encode(click))])
    outcome = fold.fold([part], {0: UserRead(0, {}, [given[0]], [given[1]], "")})
    for write in outcome.writes:
        unpack(write.profiles.get("ann"), write.seen.get("ann", given[1]))
    profiles = Profiles([given[0]], [given[1]])
    profiles.pack(np.zeros(1, np.int64))
    profiles.rows["changed_by"], profiles.rows["seen_changed"] = 0, True
    profiles.changes()
    history = history_of(UserRead(0, {}, [given[0]], [given[1]], ""))
    recommend(live().items, live().model, history, Ask(slate_id="s", now=T0))


def take_row(data: bytes) -> None:
    """A stored item row; what can be read must be found again as it was."""
    items = Items(rows=Rows())
    rows = items.load(KEYS[:1], [data])
    items.load(KEYS[:1], items.pack(rows))
    model = Model(rows=items.rows)
    model.load_rows(KEYS[:1], live().model.pack_rows(live().items.rows.find(KEYS[:1])))
    popular(items, model, 3, KEYS[:0], T0)
    similar(items, model, int(KEYS[0]), 3)
    past = History(items=KEYS[:1], times=np.array([T0 - 9]), kinds=np.ones(1, np.uint8), seen=np.empty(0, np.uint32))
    for history in (NOBODY, past):
        recommend(items, model, history, Ask(slate_id="s", now=T0, seen="include"))


def take_totals(data: bytes) -> None:
    """Stored totals of decayed counts."""
    items = Items(rows=Rows())
    items.load_totals(data)
    items.popularity.at(T0)


def take_model_row(data: bytes) -> None:
    """A stored row of the model, of either form."""
    Model(rows=Rows()).load_rows(KEYS[:1], [data])


def take_learner_row(data: bytes) -> None:
    """A stored row with optimiser state, as a learner loads it."""
    from models.learner import Learner

    Learner(rows=Rows(), seed=1).load_state(KEYS[:1], [data])


def take_dense(data: bytes) -> None:
    """Stored dense weights, as serving loads them; then one encoding with them."""
    model = Model(rows=Rows())
    model.load_dense(data)
    model.factors.encode(np.array([-1, -1]))


def take_learner_dense(data: bytes) -> None:
    """Stored dense state, as a learner loads it."""
    from models.learner import Learner

    Learner(rows=Rows(), seed=1).load_dense(data)


def take_delta(given: dict[bytes, bytes]) -> None:
    """An entry of a feed, as serving applies it."""
    delta = delta_from(given)
    if delta.kind == "unreadable":
        raise Refused("unreadable")
    made = Live.empty()
    if delta.kind in ("vectors", "step"):
        made.apply_step([delta] if delta.kind == "vectors" else [], delta)
    else:
        made.apply_item(delta)


def taker_of_logs(folder: Path) -> Callable[[tuple[str, str, bytes]], None]:
    """Return what reads a replay file, by way of a folder."""

    def take(given: tuple[str, str, bytes]) -> None:
        form, name, data = given
        path = folder / name
        path.write_bytes(data)
        columns = LOGS[form][2] if form == "csv" else None
        log = read_log(path, form, columns)
        for event in log.events:
            assert events.decode(events.encode(event)) == event
        if log.bad:
            assert log.bad_rows
            raise Refused(log.bad_rows[0])

    return take


def taker_of_keys(folder: Path) -> Callable[[bytes], None]:
    """Return what reads a file of API keys."""

    def take(data: bytes) -> None:
        path = folder / "keys.json"
        path.write_bytes(data)
        read_keys(path)

    return take


# -- making it --------------------------------------------------------------------------------------------------------


def _json_of(r: random.Random, objects: Sequence[dict[str, Any]]) -> bytes:
    kind = r.random()
    value: Any = reshaped(r, r.choice(objects)) if kind < 0.7 else r.choice(objects)
    if r.random() < 0.3:
        value = [value, *(r.choice(objects) for _ in range(r.randrange(3)))]
    data = as_json(r, value)
    return data if r.random() < 0.6 else mutated(r, [data])


def _packed_of(r: random.Random, objects: Sequence[dict[str, Any]], values: Sequence[bytes]) -> bytes:
    if r.random() < 0.5:
        return mutated(r, values)
    try:
        return msgspec.msgpack.encode(reshaped(r, r.choice(objects)))
    except (OverflowError, UnicodeEncodeError, ValueError):
        return mutated(r, values)


def _delta_of(r: random.Random) -> dict[bytes, bytes]:
    kind = r.choice(("rows", "catalogue", "vectors", "step", "compacted"))
    values: Sequence[bytes]
    if kind == "catalogue":
        keys, values = [item_hash("a")], [events.encode(events.Item(item_id="a", title="A"))]
    elif kind == "rows":
        keys, values = KEYS[:3].tolist(), row_values()[:3]
    else:
        keys, values = KEYS[:3].tolist(), live().model.pack_rows(live().items.rows.find(KEYS[:3]))
    dense = live().items.pack_totals() if kind == "rows" else b""
    if kind == "step":
        keys, values, dense = [], [], live().model.dense_bytes()
    fields = {
        (k if isinstance(k, bytes) else str(k).encode()): (v if isinstance(v, bytes) else str(v).encode())
        for k, v in delta_fields(Delta(kind, 0, 5, keys, values, dense, 1)).items()
    }
    for _ in range(r.choice((0, 1, 1, 1, 2))):
        name = r.choice(list(fields))
        if r.random() < 0.1:
            del fields[name]
        else:
            fields[name] = mutated(r, [fields[name]])
    return fields


def _log_file_of(r: random.Random) -> tuple[str, str, bytes]:
    form = r.choice(list(LOGS))
    name, data, _ = LOGS[form]
    if r.random() < 0.2:
        packed = gzip.compress(data, 1, mtime=0)
        return form, name + ".gz", mutated(r, [packed]) if r.random() < 0.8 else gzip.compress(mutated(r, [data]), 1)
    return form, name, mutated(r, [data])


def doors(folder: Path) -> list[Door]:
    """Return every door; files are written into `folder`."""
    keys = json.dumps({"keys": [{"name": "a", "sha256": "0" * 64, "scopes": ["read"], "rate": 1}]}).encode()
    item_values = [msgspec.msgpack.encode({"type": "item", **item}) for item in ITEMS]
    inlets = {f"{o['type']}s": o for o in OBJECTS[:5]}

    def inlet(r: random.Random) -> tuple[str, bytes]:
        name = r.choice(list(inlets))
        value = {k: v for k, v in inlets[name].items() if k != "type" or r.random() < 0.5}
        return name, _json_of(r, [value])

    def profile(r: random.Random) -> tuple[bytes | None, bytes | None]:
        if r.random() < 0.7:
            return mutated(r, stored("profile")), r.choice(stored("seen"))
        return r.choice(stored("profile")), mutated(r, stored("seen"))

    def lookup(r: random.Random) -> bytes:
        return _json_of(r, QUERIES) if r.random() < 0.6 else b"?" + mutated(r, TEXT_QUERIES)

    made = learner_bytes
    return [
        Door("HTTP events", lambda r: _json_of(r, OBJECTS), take_http_events, (Problem, EventError), 20),
        Door("HTTP items", lambda r: _json_of(r, ITEMS), take_http_items, (Problem, EventError), 6),
        Door("HTTP lookups", lookup, take_lookup, (Problem, TokenError), 8),
        Door("position tokens", lambda r: mutated(r, TOKENS), take_token, (TokenError,), 5),
        Door("inlets", inlet, take_inlet, (EventError,), 16),
        Door("log", lambda r: _packed_of(r, log_objects(), log_values()), take_log, (), 12),
        Door("catalogue", lambda r: _packed_of(r, [{"type": "item", **i} for i in ITEMS], item_values), take_catalogue,
             (EventError,), 6),
        Door("examples", lambda r: mutated(r, example_records()), take_examples, (CodecError, HoleError), 6),
        Door("impressions", lambda r: mutated(r, payloads()), take_shown, (CodecError,), 6),
        Door("Redis profiles", profile, take_profile, (CodecError,), 6),
        Door("Redis item rows", lambda r: mutated(r, row_values()), take_row, (CodecError,), 6),
        Door("Redis totals", lambda r: mutated(r, [live().items.pack_totals()]), take_totals, (CodecError,), 2),
        Door("Redis model rows", lambda r: mutated(r, [*live().model.pack_rows(np.arange(3)), *made()[0][:5]]),
             take_model_row, (CodecError,), 3),
        Door("Redis learner rows", lambda r: mutated(r, made()[0][:20]), take_learner_row, (CodecError,), 0.5),
        Door("Redis dense weights", lambda r: _dense_of(r, live().model.dense_bytes()), take_dense, (CodecError,), 2),
        Door("Redis learner weights", lambda r: _dense_of(r, made()[1]), take_learner_dense, (CodecError,), 0.5),
        Door("Redis feeds", _delta_of, take_delta, (CodecError, Stale, EventError), 4),
        Door("replay files", _log_file_of, taker_of_logs(folder), (ReplayError,), 2),
        Door("keys file", lambda r: mutated(r, [keys]), taker_of_keys(folder), (KeysError,), 1),
    ]  # fmt: skip


def _dense_of(r: random.Random, data: bytes) -> bytes:
    if r.random() < 0.4:
        return mutated(r, [data])
    try:
        return data[:2] + msgspec.msgpack.encode(reshaped(r, msgspec.msgpack.decode(data[2:])))
    except (OverflowError, UnicodeEncodeError):
        return mutated(r, [data])


def run(folder: Path, total: int, seed: int) -> dict[str, dict[str, int]]:
    """Knock at every door, `total` times in all; return how often each was tried and refused. A crash raises."""
    found: dict[str, dict[str, int]] = {}
    every = doors(folder)
    whole = sum(door.share for door in every)
    for door in every:
        r = random.Random(f"{seed} {door.name}")
        tried = max(1, round(total * door.share / whole))
        refused = 0
        for number in range(tried):
            given = door.make(r)
            try:
                refused += not door.knock(given)
            except Exception as error:
                error.add_note(f"door {door.name!r}, seed {seed}, input {number}: {str(given)[:2000]}")
                raise
        found[door.name] = {"tried": tried, "refused": refused}
    return found
