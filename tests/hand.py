"""The agents' work done by hand, in the test's own process: events folded into profiles and item rows, committed, fed.

The pure folds and the stores are the product's; only Kafka and Faust are left out, so a test says when what is applied.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import msgspec
import numpy as np

from infra.settings import Settings
from models.examples import accept
from models.items import CatalogueItem, Items
from models.rows import Rows
from streaming.events import Event, Item, encode, item_key
from streaming.learn import UserFold, decode_part, users_of
from streaming.state import Delta, ItemStore, Keys, RedisUserStore, connect
from streaming.topics import partition_of


class Hand:
    """A user agent and an item agent whose every step the test takes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client = connect(settings.redis)
        self.keys = Keys(settings.namespace)
        self.users = RedisUserStore(self.client, self.keys)
        self.store = ItemStore(self.client, self.keys)
        self.items = Items(rows=Rows())
        self.marks: dict[int, int] = {}
        self.next = self.committed = self.catalogue = 0
        self._fold = UserFold.of(settings)

    async def close(self) -> None:
        """Disconnect."""
        await self.client.aclose()

    async def learn(self, events: Sequence[Event], *, feed: bool = True, commit: bool = True) -> None:
        """Fold events as if they were the next records of their partitions; then feed and commit the rows."""
        by_partition: dict[int, list[bytes]] = defaultdict(list)
        for event in events:
            by_partition[partition_of(event.user_id, self.settings.partitions)].append(encode(event))
        applied = {p: read.applied for p, read in (await self.users.read({p: [] for p in by_partition})).items()}
        now = int(time.time() * 1000)
        parts = [
            decode_part("events", p, [(applied[p] + i, now, value) for i, value in enumerate(values)])
            for p, values in by_partition.items()
        ]
        outcome = self._fold.fold(parts, await self.users.read(users_of(parts)))
        assert await self.users.commit(outcome.writes) == [None] * len(outcome.writes)
        changed: set[int] = set()
        first = self.next
        for record in outcome.records:
            changed.update(self.items.fold(accept(record, self.marks)).tolist())
            self.next += 1
        rows = np.array(sorted(changed), np.int64)
        keys, values = self.items.rows.keys[rows].tolist(), self.items.pack(rows)
        if commit:
            head = {"next": str(self.next), "totals": self.items.pack_totals()}
            assert await self.store.commit(expected=self.committed, head=head, keys=keys, values=values) is None
            self.committed = self.next
        if feed:
            assert await self.store.publish(Delta("rows", first, self.next, keys, values, self.items.pack_totals()))

    async def catalogue_of(self, items: Sequence[Item], *, feed: bool = True) -> None:
        """Fold catalogue entries as if they were the next records of `items`."""
        keys, values = [item_key(item) for item in items], [encode(item) for item in items]
        for key, item, value in zip(keys, items, values, strict=True):
            self.items.set_item(key, item.item_id, msgspec.msgpack.decode(value, type=CatalogueItem))
        following = self.catalogue + len(items)
        await self.store.commit_catalogue(following, keys, values)
        if feed:
            await self.store.publish(Delta("catalogue", self.catalogue, following, keys, values))
        self.catalogue = following
