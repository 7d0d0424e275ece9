"""Where state lives: keys, scripts, stores and feeds. The only module that imports redis.

Values are bytes that the codecs in models/ wrote; this module moves them, atomically and once. `p` = partition of
`events`, braces are the hash tag, so that each transaction stays in one slot of a Redis Cluster. `fr@1` stands for
`<namespace>@<generation>`.

| key | value | writer |
|---|---|---|
| `fr:generation` | the generation that is served; switch-over moves it | rebuild, generation |
| `fr:generations` | hash: number -> how it was made, whether it is whole (streaming/recovery) | rebuild, generation |
| `fr@1:{u<p>}:profile:<user>` | packed profile (models/profile/) | user agent of p |
| `fr@1:{u<p>}:seen:<user>` | at most 4,096 low 32-bit item hashes | user agent of p |
| `fr@1:{u<p>}:embedding:<user>` | model step i64, 2 x 64 float16: a cache | user agent of p |
| `fr@1:{u<p>}:applied` | hash: next offset, inlet and alias marks, cluster, partitions | user agent of p |
| `fr@1:{u<p>}:active` | sorted set of the users with a profile, by offset of their last change | user agent of p |
| `fr@1:{items}:rows:<bucket>` | hash of 256 buckets, field = item hash (8 bytes), value = packed row | item agent |
| `fr@1:{items}:catalogue:<bucket>` | the same for catalogue entries (MessagePack) | item agent |
| `fr@1:{items}:applied` | hash: next, marks, totals, catalogue offset, cluster | item agent |
| `fr@1:{items}:feed` | stream of deltas, bounded in bytes | item agent |
| `fr@1:{items}:faults` | hash: offset in `examples` -> what its fold raised, how often | item agent |
| `fr@1:{model}:rows:<bucket>` | hash, field = item hash, value = vector with optimiser state | learner |
| `fr@1:{model}:head` | hash: next, step, dense weights, window, lineage | learner |
| `fr@1:{model}:feed` | stream of deltas, a `step` entry ends each step | learner |
| `fr@1:{model}:faults` | as of the items | learner |
| `fr@1:{model}:versions` | hash: number -> what is known of a version; its bytes are a file | learner |
| `fr@1:{model}:pinned:<version>` | of a pinned version what serving needs; its rows: `...:<bucket>` | learner |
| `fr@1:metrics:<name>` | stream of learning curves, bounded | the process it is named after; `crowd`, `map`: the API |
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import hiredis
import msgspec
import redis.asyncio as aioredis
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from streaming.feeds import Delta as Delta
from streaming.feeds import Feed
from streaming.feeds import append_metrics as append_metrics
from streaming.feeds import feed_top as feed_top
from streaming.feeds import read_feed as read_feed
from streaming.feeds import read_metrics as read_metrics
from streaming.users.memory import LEAVING
from streaming.users.memory import MemoryUserStore as MemoryUserStore
from streaming.users.memory import UserRead as UserRead
from streaming.users.memory import UserStore as UserStore
from streaming.users.memory import UserWrite as UserWrite

log = logging.getLogger(__name__)

BUCKETS: Final = 256
FEED_ENTRY_BYTES: Final = 1_000_000
# redis-py's stubs answer the union of its text and bytes clients; ours only ever answers bytes.
Redis = Any
StoreUnavailable = (RedisConnectionError, RedisTimeoutError, OSError)
StoreError = RedisError
T = TypeVar("T")

_READ = """
local r = redis.call('HMGET', KEYS[1], 'next', 'marks', 'cluster')
local out = {r[1] or '0', r[2] or '', r[3] or ''}
if #KEYS > 1 then
  local m = redis.call('MGET', unpack(KEYS, 2))
  for i = 1, #m do out[i + 3] = m[i] end
end
return out
"""

# KEYS applied, active, profile..., seen..., embedding...; ARGV expected, next, marks, cluster, users to keep (0: all),
# what the names of this partition's keys begin with, number of profiles, a value per key (empty: it goes), then per
# profile the offset of its last change. The least recently changed users beyond `keep` leave with all that is theirs.
_COMMIT = """
local c = redis.call('HGET', KEYS[1], 'next') or '0'
if c ~= ARGV[1] then return c end
local kv, n = {}, 0
for i = 3, #KEYS do
  local v = ARGV[i + 5]
  if v == '' then redis.call('UNLINK', KEYS[i]) else kv[n + 1] = KEYS[i]; kv[n + 2] = v; n = n + 2 end
end
if n > 0 then redis.call('MSET', unpack(kv)) end
local profile, users, at = #ARGV[6] + 9, tonumber(ARGV[7]), #KEYS + 5
if users > 0 then
  local za, m = {}, 0
  for i = 1, users do
    local user = string.sub(KEYS[i + 2], profile)
    if ARGV[i + 7] == '' then redis.call('ZREM', KEYS[2], user) else
      za[m + 1] = ARGV[at + i]; za[m + 2] = user; m = m + 2
    end
  end
  if m > 0 then redis.call('ZADD', KEYS[2], unpack(za)) end
end
redis.call('HSET', KEYS[1], 'next', ARGV[2], 'marks', ARGV[3], 'cluster', ARGV[4])
local keep = tonumber(ARGV[5])
if keep > 0 then
  local leaving = math.min(redis.call('ZCARD', KEYS[2]) - keep, LEAVING)
  if leaving > 0 then
    for _, user in ipairs(redis.call('ZRANGE', KEYS[2], 0, leaving - 1)) do
      redis.call('UNLINK', ARGV[6] .. 'profile:' .. user, ARGV[6] .. 'seen:' .. user, ARGV[6] .. 'embedding:' .. user)
    end
    redis.call('ZREMRANGEBYRANK', KEYS[2], 0, leaving - 1)
  end
end
return 'ok'
""".replace("LEAVING", str(LEAVING))

# KEYS head, bucket...; ARGV expected, number of head pairs, head pairs..., then per bucket: how many fields go, those
# fields, how many pairs come, field, value, ... A field that goes may come again.
_COMMIT_ROWS = """
local c = redis.call('HGET', KEYS[1], 'next') or '0'
if c ~= ARGV[1] then return c end
local at = 3
local pairs_ = tonumber(ARGV[2])
redis.call('HSET', KEYS[1], unpack(ARGV, at, at + 2 * pairs_ - 1))
at = at + 2 * pairs_
for b = 2, #KEYS do
  for _, call in ipairs({{'HDEL', 1}, {'HSET', 2}}) do
    local last = at + call[2] * tonumber(ARGV[at])
    at = at + 1
    while at <= last do
      local to = math.min(at + 3999, last)
      redis.call(call[1], KEYS[b], unpack(ARGV, at, to))
      at = to + 1
    end
  end
end
return 'ok'
"""


class _Connection(aioredis.Connection):
    """A connection that packs commands in C: a micro-batch has thousands of words, Python needs 1 us for each."""

    def pack_command(self, *args: Any) -> list[bytes]:
        """Return the bytes of one command; its name may hold a space, as in SCRIPT LOAD."""
        return [hiredis.pack_command((*args[0].split(), *args[1:]))]

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        """Send; raises ConnectionError also where uvloop says in its own way that the connection is gone."""
        try:
            await super().send_packed_command(command, check_health)
        except RuntimeError as error:  # reset since it was last used: "the handler is closed"
            raise RedisConnectionError(str(error)) from error


def connect(url: str, *, timeout: float = 5.0) -> Redis:
    """Return a client; nothing is sent before the first call. A dropped connection is retried once."""
    return aioredis.Redis.from_url(
        url, connection_class=_Connection, socket_timeout=timeout, socket_connect_timeout=timeout,
        health_check_interval=30, retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 1),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of all keys of one generation of one namespace."""

    namespace: str = "fr"
    generation: int = 1

    @property
    def prefix(self) -> str:
        """`<namespace>@<generation>`."""
        return f"{self.namespace}@{self.generation}"

    @property
    def pointer(self) -> str:
        """The key that says which generation is served."""
        return f"{self.namespace}:generation"

    def profile(self, partition: int, user: str) -> str:
        """Packed profile of a user."""
        return f"{self.prefix}:{{u{partition}}}:profile:{user}"

    def seen(self, partition: int, user: str) -> str:
        """Items a user acted on."""
        return f"{self.prefix}:{{u{partition}}}:seen:{user}"

    def embedding(self, partition: int, user: str) -> str:
        """Cached decayed embeddings of a user."""
        return f"{self.prefix}:{{u{partition}}}:embedding:{user}"

    def active(self, partition: int) -> str:
        """The users of a partition, by when they were last active."""
        return f"{self.prefix}:{{u{partition}}}:active"

    def applied(self, partition: int) -> str:
        """How far a partition of `events` is folded."""
        return f"{self.prefix}:{{u{partition}}}:applied"

    def item_rows(self, bucket: int) -> str:
        """Rows of the items whose hash ends in this byte."""
        return f"{self.prefix}:{{items}}:rows:{bucket}"

    def item_catalogue(self, bucket: int) -> str:
        """Catalogue entries of the items whose hash ends in this byte."""
        return f"{self.prefix}:{{items}}:catalogue:{bucket}"

    @property
    def item_applied(self) -> str:
        """How far `examples` and `items` are folded into rows."""
        return f"{self.prefix}:{{items}}:applied"

    @property
    def item_feed(self) -> str:
        """Deltas of item rows."""
        return f"{self.prefix}:{{items}}:feed"

    def model_rows(self, bucket: int) -> str:
        """Learnt rows of the items whose hash ends in this byte."""
        return f"{self.prefix}:{{model}}:rows:{bucket}"

    @property
    def model_head(self) -> str:
        """The learner's position, dense weights and lineage."""
        return f"{self.prefix}:{{model}}:head"

    @property
    def model_feed(self) -> str:
        """Deltas of learnt rows and weights."""
        return f"{self.prefix}:{{model}}:feed"

    @property
    def model_versions(self) -> str:
        """The learner's versions, by number."""
        return f"{self.prefix}:{{model}}:versions"

    def model_pinned(self, version: int) -> str:
        """The dense weights of a version that is pinned; its rows follow under `<this>:<bucket>`."""
        return f"{self.prefix}:{{model}}:pinned:{version}"

    def metrics(self, name: str) -> str:
        """Learning curve of a process."""
        return f"{self.prefix}:metrics:{name}"


async def persist(what: str, call: Callable[[], Awaitable[T]]) -> T:
    """Call Redis until it answers: while it is gone a fold waits, it neither loses nor repeats."""
    delay = 0.05
    while True:
        try:
            return await call()
        except StoreUnavailable as error:
            log.warning("%s: Redis does not answer (%s), again in %.2f s", what, error, delay)
            await asyncio.sleep(delay)
            delay = min(2 * delay, 1.0)


async def live_keys(client: Redis, namespace: str) -> Keys:
    """Return the keys of the generation that is served; 1 where no pointer was ever set."""
    value = await client.get(Keys(namespace).pointer)
    return Keys(namespace, int(value or 1))


class _Script:
    """A Lua script called by its hash, loaded again where the server forgot it."""

    def __init__(self, text: str, *, reads: bool = False) -> None:
        self._text, self._sha, self._call = text, "", "EVALSHA_RO" if reads else "EVALSHA"

    async def pipelined(self, client: Redis, calls: Sequence[tuple[Sequence[str], Sequence[Any]]]) -> list[Any]:
        """Run the script once per (keys, arguments), all in one round trip."""
        for attempt in (0, 1):
            if not self._sha:
                self._sha = await client.script_load(self._text)
            commands = [(self._call, self._sha, len(keys), *keys, *arguments) for keys, arguments in calls]
            try:
                if len(commands) == 1:  # a lookup: the client's pipeline costs more than the call
                    return [await client.execute_command(*commands[0])]
                pipe = client.pipeline(transaction=False)
                for command in commands:
                    pipe.execute_command(*command)
                return list(await pipe.execute())
            except NoScriptError:
                if attempt:
                    raise
                self._sha = ""
        raise AssertionError("unreachable")


class RedisUserStore:
    """Profiles in Redis: one round trip to read a micro-batch, one to commit it."""

    def __init__(self, client: Redis, keys: Keys) -> None:
        self.client, self.keys = client, keys
        self._read, self._commit = _Script(_READ, reads=True), _Script(_COMMIT)

    async def read(self, wanted: Mapping[int, Sequence[str]]) -> dict[int, UserRead]:
        """Read applied, marks, profiles and seen lists of these users of these partitions."""
        keys = self.keys
        calls: list[tuple[Sequence[str], Sequence[Any]]] = [
            ([keys.applied(p), *_each(keys.profile(p, ""), users), *_each(keys.seen(p, ""), users)], ())
            for p, users in wanted.items()
        ]
        answers = await self._read.pipelined(self.client, calls)
        out = {}
        for (p, users), answer in zip(wanted.items(), answers, strict=True):
            values = [*answer[3:], *([None] * (2 * len(users) - len(answer) + 3))]
            profiles, seen = values[: len(users)], values[len(users) :]
            out[p] = UserRead(int(answer[0]), _unpack_marks(answer[1]), profiles, seen, answer[2].decode())
        return out

    async def commit(self, writes: Sequence[UserWrite], cluster: str = "") -> list[int | None]:
        """Apply each write whose `expected` is what is stored; None where it was, else the stored offset."""
        answers = await self._commit.pipelined(self.client, [self._call(w, cluster) for w in writes])
        return [None if answer == b"ok" else int(answer) for answer in answers]

    def _call(self, write: UserWrite, cluster: str) -> tuple[Sequence[str], Sequence[Any]]:
        keys, p = self.keys, write.partition
        names = [
            keys.applied(p), keys.active(p), *_each(keys.profile(p, ""), write.profiles),
            *_each(keys.seen(p, ""), write.seen), *_each(keys.embedding(p, ""), write.embeddings),
        ]  # fmt: skip
        values = (*write.profiles.values(), *write.seen.values(), *write.embeddings.values())
        offsets = [str(write.active.get(user, 0)) for user in write.profiles]
        return names, (
            str(write.expected), str(write.next), _pack_marks(write.marks), cluster, str(write.keep),
            keys.profile(p, "").removesuffix("profile:"), str(len(write.profiles)), *values, *offsets,
        )  # fmt: skip


def _each(prefix: str, users: Iterable[str]) -> list[str]:
    return [prefix + user for user in users]


async def read_user(store: UserStore, partition: int, user: str) -> UserRead:
    """Read one user's profile with the offset it is folded to, in one round trip."""
    return (await store.read({partition: [user]}))[partition]


def _pack_marks(marks: Mapping[Any, int]) -> bytes:
    return msgspec.json.encode({str(k): v for k, v in sorted(marks.items())})


def _unpack_marks(data: bytes) -> dict[str, int]:
    return msgspec.json.decode(data, type=dict[str, int]) if data else {}


class StoredBytesError(RuntimeError):
    """A key of ours holds what no build of this writes; the message names the key, what is wrong and the next step."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"Redis key {key}: {problem}. Written by something else or a newer build? Run that build, or"
                         " `freshet rebuild --switch` to fold the logs again")  # fmt: skip


def _bucketed(keys: Iterable[int], values: Iterable[bytes]) -> dict[int, list[bytes]]:
    """Group rows by bucket as a flat list field, value, field, value, ..."""
    buckets: dict[int, list[bytes]] = {}
    for key, value in zip(keys, values, strict=True):
        buckets.setdefault(key & (BUCKETS - 1), []).extend((struct.pack("<Q", key), value))
    return buckets


class Fault(msgspec.Struct, array_like=True):
    """Records of `examples` up to `next` whose fold raised, how often, and the end of the last traceback."""

    next: int
    count: int
    text: str


class RowStore:
    """Rows in 256 hashes beside a head that says how far they are folded: the shape of item and model state alike."""

    def __init__(self, client: Redis, head: str, rows: Any, feed: str, feed_bytes: int = 64 << 20) -> None:
        self.client, self.head_key, self._rows = client, head, rows
        self.faults_key = head.rpartition(":")[0] + ":faults"
        self._script = _Script(_COMMIT_ROWS)
        self._feed = Feed(client, feed, feed_bytes)

    async def head(self) -> dict[str, bytes]:
        """Return the head's fields; empty where nothing was ever committed."""
        return {k.decode(): v for k, v in (await self.client.hgetall(self.head_key)).items()}

    async def load(self, bad: list[str] | None = None) -> tuple[dict[str, bytes], list[tuple[int, bytes]]]:
        """Return (head, rows) of one moment: read again until the head did not move meanwhile.

        What cannot be a row is named in `bad`; where that is None, raises StoredBytesError.
        """
        while True:
            head, wrong = await self.head(), list[str]()
            rows = [row async for row in self.scan(self._rows, wrong if bad is not None else None)]
            if (await self.head()).get("next") == head.get("next"):
                if bad is not None:
                    bad += wrong
                return head, rows
            await asyncio.sleep(0.05)

    async def faults(self) -> dict[int, Fault]:
        """Return what raised while it was folded, by the offset of its record in `examples`."""
        found = await self.client.hgetall(self.faults_key)
        return {int(at): msgspec.msgpack.decode(value, type=Fault) for at, value in found.items()}

    async def blamed(self, first: int) -> int:
        """Return how often folding from the record at `first` has raised."""
        fault = (await self.faults()).get(first)
        return fault.count if fault is not None else 0

    async def blame(self, first: int, following: int, text: str) -> int:
        """Note that folding the records [first, following) raised `text`; return how often it has."""
        old = (await self.faults()).get(first)
        fault = Fault(following, old.count + 1 if old is not None else 1, text)
        await self.client.hset(self.faults_key, str(first), msgspec.msgpack.encode(fault))
        return fault.count

    def row_key(self, key: int) -> str:
        """Return the Redis key that holds the row of an item hash, for messages."""
        return f"{self._rows(key & (BUCKETS - 1))} field {key:016x}"

    async def scan(self, name: Any, bad: list[str] | None = None) -> AsyncIterator[tuple[int, bytes]]:
        """Yield every (item hash, bytes) of the buckets `name(b)`; what is none: see `load`."""
        for first in range(0, BUCKETS, 32):
            pipe = self.client.pipeline(transaction=False)
            for bucket in range(first, first + 32):
                pipe.hgetall(name(bucket))
            for bucket, found in enumerate(await pipe.execute(raise_on_error=False), first):
                problems = []
                if isinstance(found, ResponseError):
                    problems, found = [f"expected a hash of rows ({found})"], {}
                elif isinstance(found, Exception):
                    raise found
                for key, value in found.items():
                    if len(key) == 8 and key[0] == bucket:
                        yield struct.unpack("<Q", key)[0], value
                    else:
                        problems.append(f"expected fields of 8 bytes of this bucket, got {key[:16].hex()}")
                if problems and bad is None:
                    raise StoredBytesError(name(bucket), problems[0])
                if bad is not None:
                    bad += [f"{name(bucket)}: {problem}" for problem in problems]

    async def commit(
        self, *, expected: int, head: Mapping[str, Any], keys: Sequence[int], values: Sequence[bytes],
        gone: Iterable[int] = (),
    ) -> int | None:  # fmt: skip
        """Delete rows `gone`, write rows and head (with its new `next`), in one transaction.

        Returns None, or the stored offset where it was refused.
        """
        buckets, leaving = _bucketed(keys, values), dict[int, list[bytes]]()
        for key in gone:
            leaving.setdefault(key & (BUCKETS - 1), []).append(struct.pack("<Q", key))
        arguments: list[Any] = [str(expected), len(head)]
        for name, value in head.items():
            arguments += [name, value]
        touched = sorted(buckets.keys() | leaving.keys())
        for bucket in touched:
            left, flat = leaving.get(bucket, []), buckets.get(bucket, [])
            arguments += [len(left), *left, len(flat) // 2, *flat]
        names = [self.head_key, *(self._rows(bucket) for bucket in touched)]
        (answer,) = await self._script.pipelined(self.client, [(names, arguments)])
        return None if answer == b"ok" else int(answer)

    async def publish(self, delta: Delta) -> bool:
        """Append a delta to the feed; False where the feed is already beyond it."""
        return await self._feed.publish(delta)

    async def wipe(self) -> None:
        """Delete head and rows."""
        await self.client.unlink(self.head_key, *(self._rows(bucket) for bucket in range(BUCKETS)))


class ItemStore(RowStore):
    """Item rows, catalogue and feed."""

    def __init__(self, client: Redis, keys: Keys, feed_bytes: int = 64 << 20) -> None:
        super().__init__(client, keys.item_applied, keys.item_rows, keys.item_feed, feed_bytes)
        self.keys = keys

    async def load_catalogue(self, bad: list[str] | None = None) -> list[tuple[int, bytes]]:
        """Return every catalogue entry as (item hash, MessagePack); what is none: see `load`."""
        return [row async for row in self.scan(self.keys.item_catalogue, bad)]

    async def commit_catalogue(
        self, following: int, keys: Sequence[int], values: Sequence[bytes], *, expected: int | None = None
    ) -> int | None:
        """Write catalogue entries and the next offset of `items` in one transaction; a repeat is harmless.

        None, or the stored offset where it is not the `expected` one: Redis was rolled back, or there is a twin.
        """
        async with self.client.pipeline(transaction=True) as pipe:
            if expected is not None:
                await pipe.watch(self.head_key)
                stored = int(await pipe.hget(self.head_key, "catalogue") or 0)
                if stored not in (expected, following):
                    return stored
                pipe.multi()
            for bucket, flat in _bucketed(keys, values).items():
                pipe.hset(self.keys.item_catalogue(bucket), items=flat)
            pipe.hset(self.head_key, "catalogue", str(following))
            await pipe.execute()
        return None


class ModelStore(RowStore):
    """Learnt rows with optimiser state, dense weights in the head, the feed that serving reads, and its versions."""

    def __init__(self, client: Redis, keys: Keys, feed_bytes: int = 64 << 20) -> None:
        super().__init__(client, keys.model_head, keys.model_rows, keys.model_feed, feed_bytes)
        self.keys = keys

    def pinned(self, version: int) -> RowStore:
        """Return where the copy of a pinned version lies: rows as serving reads them."""
        head = self.keys.model_pinned(version)
        return RowStore(self.client, head, lambda bucket: f"{head}:{bucket}", self.keys.model_feed)

    async def load_served(self, bad: list[str]) -> tuple[dict[str, bytes], list[tuple[int, bytes]], bool]:
        """Return (head, rows, whether they are a pinned version's copy) of what is to be served; `bad`: as load."""
        while True:
            pin, wrong = int(await self.client.hget(self.head_key, "pin") or 0), list[str]()
            copy, rows = await self.pinned(pin).load(wrong) if pin else ({}, [])
            if pinned := copy.get("next") == b"1":
                head = await self.head() | {"dense": copy["dense"]}
            else:
                head, rows = await self.load(wrong)
            if int(head.get("pin", 0)) == pin:
                bad += wrong
                return head, rows, pinned

    async def versions(self) -> list[bytes]:
        """Return what is known of each version (JSON)."""
        return list((await self.client.hgetall(self.keys.model_versions)).values())

    async def publish_step(
        self, *, step: int, first: int, following: int, keys: Sequence[int], vectors: Sequence[bytes], dense: bytes,
        gone: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Append a step: its vectors in entries of about 1 MB, then the entry that ends it and counts them."""
        at = parts = 0
        while at < len(keys):
            last, size = at, 0
            while last < len(keys) and (size == 0 or size + len(vectors[last]) <= FEED_ENTRY_BYTES):
                size += len(vectors[last])
                last += 1
            await self.publish(Delta("vectors", first, following, keys[at:last], vectors[at:last], step=step))
            at, parts = last, parts + 1
        await self.publish(Delta("step", first, following, (), (), dense, step, gone, parts))
