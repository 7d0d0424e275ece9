"""Serving beside items that leave and bytes that nobody can read: rows go in place, bad ones are left out and named."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest

from infra.settings import Settings
from models.examples import item_hash
from models.factors import DIM
from models.items import ItemFold
from models.items import folding as item_fold
from models.model import STATE_FORM, Model
from models.rows import BEHAVIOUR, LEARNT, Rows
from serving.snapshot import Live, Snapshot, Stale
from streaming.item_agent import load_items
from streaming.state import Delta, ItemStore, Keys, ModelStore, StoredBytesError, connect
from tests.entries import KEYS, entry
from tests.hand import Hand
from tests.test_api import seeded, until

MOST = 16


@pytest.fixture
async def snapshot(settings: Settings) -> AsyncIterator[Snapshot]:
    made = Snapshot(connect(settings.redis), connect(settings.redis), namespace=settings.namespace)
    yield made
    await made.stop()


def packed(items: object) -> dict[int, bytes]:
    """Rows with behaviour by item hash."""
    rows = items.rows.held_by(BEHAVIOUR)  # type: ignore[attr-defined]
    return dict(zip(items.rows.keys[rows].tolist(), items.pack(rows), strict=True))  # type: ignore[attr-defined]


async def test_items_that_left_leave_redis_and_serving(
    settings: Settings, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Committed as the agent does, served from the feed alone, and read again: all three hold the same bytes."""
    monkeypatch.setattr(item_fold, "SWEEP", 8)
    client = connect(settings.redis)
    store, fold = ItemStore(client, Keys(settings.namespace)), ItemFold(most=MOST)
    snapshot.start()
    await until(lambda: snapshot.loaded)
    first = 0
    for i in range(96):
        done = fold.fold(entry(i % 60, 1.7e9 + i, offset=i, history=[(i - 1) % 60] if i else []).to_bytes())
        rows = np.array([r for r in done.changed.tolist() if fold.items.rows.held[r] & BEHAVIOUR], np.int64)
        every = np.union1d(rows, done.moved)
        head, gone = {"next": str(fold.next), "totals": fold.items.pack_totals()}, done.gone.tolist()
        keys = fold.items.rows.keys
        assert None is await store.commit(
            expected=first, head=head, keys=keys[every].tolist(), values=fold.items.pack(every), gone=gone
        )
        await store.publish(Delta("rows", first, fold.next, keys[rows].tolist(), fold.items.pack(rows),
                                  fold.items.pack_totals(), gone=gone))  # fmt: skip
        first = fold.next
    await until(lambda: snapshot.live.items_position == 96)
    assert snapshot.reloads == 0
    assert packed(snapshot.live.items) == packed(fold.items) == dict((await store.load())[1])
    assert snapshot.live.items.rows.known <= MOST + 8
    assert snapshot.live.items.n <= MOST + 2 * 8
    again, _ = await load_items(store, MOST)
    assert packed(again.items) == packed(fold.items)
    await client.aclose()


def test_a_row_stays_while_somebody_keeps_something_in_it() -> None:
    live, model = Live.empty(), Model(rows=Rows())
    row = model.rows.add(KEYS[:2])
    model.factors.grow()
    model.factors.vectors[row] = 0.5
    live.apply_step([Delta("vectors", 0, 1, KEYS[:2].tolist(), model.pack_rows(row), step=1)],
                    Delta("step", 0, 1, (), (), b"", 1, parts=1))  # fmt: skip
    live.items.fold(entry(0, 1.7e9))
    live.apply_item(Delta("rows", 0, 1, (), (), gone=KEYS[:1].tolist()))
    at = live.items.rows.find(KEYS[:2])
    assert live.items.rows.held[at].tolist() == [LEARNT, LEARNT]
    assert not live.items.eligible[at].any()
    assert np.allclose(live.model.factors.vectors[at[0]], 0.5)
    live.apply_step([], Delta("step", 1, 2, (), (), b"", 2, gone=KEYS[:1].tolist(), parts=0))
    assert live.items.rows.find(KEYS[:2]).tolist() == [-1, int(at[1])]
    fresh = live.items.rows.add(KEYS[[5]])
    live.model.factors.grow()
    assert fresh[0] == at[0]  # given away, and blank
    assert not np.allclose(live.model.factors.vectors[fresh], 0.5)


def test_a_step_whose_parts_were_trimmed_reloads() -> None:
    live = Live.empty()
    with pytest.raises(Stale, match="step 4 has 2 parts, got 0"):
        live.apply_step([], Delta("step", 0, 3, (), (), b"", 4, parts=2))
    assert live.apply_step([], Delta("step", 0, 3, (), (), b"", 4)) is True  # a writer that does not say
    assert live.apply_step([], Delta("step", 0, 3, (), (), b"", 4, parts=9)) is False


async def test_bad_bytes_are_left_out_named_and_mended_by_the_next_write(
    settings: Settings, snapshot: Snapshot
) -> None:
    hand = Hand(settings)
    await seeded(hand)
    client, keys, victim = hand.client, hand.keys, item_hash("i3")
    models = ModelStore(client, keys)
    model = Model(rows=Rows())
    place = keys.item_rows(victim & 255)
    good = await client.hget(place, victim.to_bytes(8, "little"))
    await client.hset(place, victim.to_bytes(8, "little"), b"\x63" + good[1:])  # a future version
    await client.hset(keys.item_rows(7), b"foreign", b"x")
    await client.hset(keys.model_rows(9), (9).to_bytes(8, "little"), b"\x01\x02 cut short")
    await client.hset(keys.item_catalogue(4), (4).to_bytes(8, "little"), b"\xff\xff")
    await client.set(keys.item_rows(8), b"a string")
    await client.hset(keys.model_head, mapping={"next": "0", "dense": b"\xe7\x09"})
    snapshot.start()
    await until(lambda: snapshot.loaded)
    live = snapshot.live
    assert len(live.bad) == 6
    assert snapshot.degraded
    assert not snapshot.behind
    assert "cannot be read" in snapshot.reason
    assert "rebuild --switch" in snapshot.reason
    told = " | ".join(live.bad.values())
    for words in (f"{victim:016x}", "rows:7", "model row 0000000000000009", "catalogue entry", "rows:8", "dense"):
        assert words in told, words
    assert {"i1", "i2", "i4"} <= set(live.items.ids)
    assert "i3" not in {live.items.ids[row] for row in live.items.behaving.tolist()}
    await hand.store.publish(Delta("rows", hand.next, hand.next + 1, [victim], [good]))
    await client.xadd(keys.item_feed, {"kind": "what is this", "keys": b"123"})
    await models.publish(Delta("step", 0, 1, (), (), model.dense_bytes(), 1, parts=0))
    await until(lambda: len(snapshot.live.bad) == 4)
    assert snapshot.connected
    with pytest.raises(StoredBytesError, match=r"items.*rows:.*rebuild --switch"):
        await load_items(hand.store, MOST)
    assert DIM == 64
    assert STATE_FORM == 2
    await hand.close()


async def test_the_item_agent_names_what_it_cannot_read(settings: Settings) -> None:
    hand = Hand(settings)
    await seeded(hand)
    client, keys, store = hand.client, hand.keys, hand.store
    victim = item_hash("i3")
    place, field = keys.item_rows(victim & 255), victim.to_bytes(8, "little")
    good = await client.hget(place, field)
    for bad in (b"", good[:-3], b"\x09" + good[1:], good[:1] + b"\xff" + good[2:]):
        await client.hset(place, field, bad)
        with pytest.raises(StoredBytesError, match=rf"rows:{victim & 255} field {victim:016x}.*rebuild --switch"):
            await load_items(store, MOST)
    await client.hset(place, field, good)
    for name, bad in (("totals", b"short"), ("marks", b"["), ("next", b"x1")):
        kept = await client.hget(keys.item_applied, name)
        await client.hset(keys.item_applied, name, bad)
        with pytest.raises(StoredBytesError, match=r"items.*applied.*rebuild --switch"):
            await load_items(store, MOST)
        await (client.hset(keys.item_applied, name, kept) if kept else client.hdel(keys.item_applied, name))
    await load_items(store, MOST)
    await hand.close()
