"""The live path by hand, on real Kafka and Redis: events appended, folded, derived, learnt, all when the test says so.

The pure folds, the stores, the trainer and the log are the product's; only Faust is left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from infra.settings import Settings
from models.items import ItemFold
from models.rows import BEHAVIOUR
from streaming.events import Click, Event, encode
from streaming.item_agent import ItemAgent
from streaming.learn import Part, UserFold, decode_part, rounds, users_of
from streaming.recovery.cuts import ends
from streaming.state import ItemStore, Keys, ModelStore, RedisUserStore, connect
from streaming.topics import Log, epoch, partition_of, read_span, topics_of
from streaming.trainer import Trainer
from streaming.training.controls import Control, record_of
from streaming.training.versions import Version, Versions, home, read


def clicks(count: int, *, seed: int = 0, users: int = 30, items: int = 40) -> list[Event]:
    """Return clicks of some users on some items, a second apart, that end now."""
    rng, now = np.random.default_rng(seed), time.time()
    return [
        Click(
            user_id=f"u{rng.integers(users)}", item_id=f"i{rng.integers(items)}", ts=now - count + k,
            event_id=f"{seed}-{k}",
        )
        for k in range(count)
    ]  # fmt: skip


class ByLog:
    """A deployment of one generation whose agents take a step when told to."""

    def __init__(self, settings: Settings, generation: int = 1) -> None:
        self.settings, self.topics = settings, topics_of(settings)
        self.client, self.log = connect(settings.redis), Log(settings.kafka)
        self.keys = Keys(settings.namespace, generation)
        self.users = RedisUserStore(self.client, self.keys)
        self.rows = ItemStore(self.client, self.keys)
        self.weights = ModelStore(self.client, self.keys)
        self._fold = UserFold.of(settings)
        self.ground = ""

    async def __aenter__(self) -> ByLog:
        await self.log.start()
        self.ground = await epoch(self.settings.kafka, self.topics)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.log.stop()
        await self.client.aclose()

    async def run(self, events: Sequence[Event] = (), *, steps: int = 1) -> None:
        """Publish events and let every agent follow; the learner takes this many steps."""
        await self.publish(events)
        while await self.derive():
            pass
        await self.fold_rows()
        await self.learn(steps)

    async def publish(self, events: Sequence[Event]) -> None:
        """Append events to the log, by user (an alias: by the anonymous one)."""
        users = [getattr(event, "anonymous_id", None) or event.user_id for event in events]
        places = [partition_of(user, self.topics.partitions) for user in users]
        records = [(p, user.encode(), encode(event)) for p, user, event in zip(places, users, events, strict=True)]
        await self.log.append(self.topics.events, records)

    async def derive(self) -> int:
        """Be the user agent: fold what is new, append what it derives, commit; return how many records came."""
        cut = await ends(self.settings)
        reads = await self.users.read({p: [] for p in cut.events})
        spans = {p: (reads[p].applied, end) for p, end in cut.events.items()}
        count = 0
        async for p, records in read_span(self.settings.kafka, self.topics.events, spans):
            count += len(records)
            for first in range(0, len(records), 40):
                chosen = [(r.offset, r.timestamp, r.value) for r in records[first : first + 40]]
                for parts in rounds([decode_part(self.topics.events, p, chosen)]):
                    await self._commit(parts)
        return count

    async def _commit(self, parts: list[Part]) -> None:
        outcome = self._fold.fold(parts, await self.users.read(users_of(parts)))
        await self.publish(outcome.derived)
        await self.log.append(self.topics.examples, [(0, None, entries.to_bytes()) for entries in outcome.records])
        assert await self.users.commit(outcome.writes, self.ground) == [None]

    async def fold_rows(self) -> None:
        """Be the item agent: fold `examples` from the beginning, commit every row."""
        state, end = ItemFold(most=self.settings.max_items), (await ends(self.settings)).examples
        gone: set[int] = set()
        async for _, records in read_span(self.settings.kafka, self.topics.examples, {0: (0, end)}):
            for record in records:
                gone.update(state.fold(record.value).gone.tolist())
        rows, before = state.items.behaving, int((await self.rows.head()).get("next", 0))
        assert (state.items.rows.held[rows] & BEHAVIOUR).all()
        head: dict[str, Any] = ItemAgent.head(end, state.marks, state.items, self.ground)
        keys, values = state.items.rows.keys[rows].tolist(), state.items.pack(rows)
        assert await self.rows.commit(expected=before, head=head, keys=keys, values=values, gone=gone) is None
        await self.rows.commit_catalogue(0, [], [])

    async def learn(self, steps: int = 1) -> None:
        """Be the learner: go on from what is committed, in so many steps, each of which is logged."""
        versions = Versions(home(self.settings, self.keys), self.weights)
        self.trainer = trainer = Trainer(
            store=self.weights, cluster=self.ground, seed=self.settings.seed, most=self.settings.max_items,
            versions=versions,
        )  # fmt: skip
        await trainer.load()
        begin, end = trainer.begin_refill(), (await ends(self.settings)).examples
        found: list[tuple[int, bytes]] = []
        async for _, records in read_span(self.settings.kafka, self.topics.examples, {0: (begin, end)}):
            found += [(record.offset, record.value) for record in records]
        for offset, value in found:
            if offset < trainer.next:
                trainer.refill(offset, value)
        trainer.end_refill()
        fresh = [(offset, value) for offset, value in found if offset >= trainer.next]
        for part in np.array_split(np.arange(len(fresh)), steps):
            given = [fresh[i] for i in part]
            while given:
                trainer.learn(given)
                while await trainer.step() is not None:
                    await self.log.append(self.topics.steps, [(0, None, trainer.last_record)])
                given = [(offset, value) for offset, value in given if offset >= trainer.next]

    async def version(self) -> Version:
        """Publish a version of the learner's last step."""
        versions = Versions(home(self.settings, self.keys), self.weights)
        about = await versions.publish(self.trainer.checkpoint(time.time()), lambda: self.trainer.pin)
        self.trainer.published(about)
        return about

    def version_rows(self, number: int) -> dict[int, bytes]:
        """Return the rows of a version's file."""
        found = read(home(self.settings, self.keys) / f"{number}.version")
        return dict(zip(found.keys, found.rows, strict=True))

    async def control(self, control: Control) -> None:
        """Tell the learner something, and let it and the item agent come to it."""
        await self.log.append(self.topics.examples, [(0, None, record_of(control))])
        await self.run()

    async def everything(self, generation: int | None = None) -> dict[str, Any]:
        """Return every key of a generation with its value; not feeds, caches and curves."""
        keys = self.keys if generation is None else Keys(self.keys.namespace, generation)
        out: dict[str, Any] = {}
        async for name in self.client.scan_iter(f"{keys.prefix}:*", count=5000):
            short = name.decode().removeprefix(keys.prefix)
            kind = await self.client.type(name)
            if kind == b"string" and ":embedding:" not in short:
                out[short] = await self.client.get(name)
            elif kind == b"hash":
                out[short] = await self.client.hgetall(name)
            elif kind == b"zset":
                out[short] = await self.client.zrange(name, 0, -1, withscores=True)
        return out
