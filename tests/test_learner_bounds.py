"""What the learner keeps is bounded: items leave at step boundaries, the same along the logged steps; bad records."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from infra.settings import Settings
from infra.telemetry import EXIT_FOR_GOOD
from models.examples import ENTERS, IMPRESSION, VOICE, Entries, item_hash
from models.features import F
from models.learner import Learner
from models.rows import LEARNT, Rows
from streaming.recovery.lineage import MemoryModel
from streaming.state import Keys, ModelStore, StoredBytesError, connect
from streaming.trainer import LearningError, StepRecord, Trainer
from tests.entries import KEYS, Walk, cuts, entry

MOST = 16


@pytest.fixture(autouse=True)
def _short_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw negatives from the last 8 targets, so that few items are protected by them."""
    monkeypatch.setattr("models.encoder.RECENT", 8)
    monkeypatch.setattr("models.learner.RECENT", 8)


def records(seed: int = 0, n: int = 240) -> list[bytes]:
    parts = cuts(Walk(seed=seed, n=n, users=6, width=F, pace=60.0).entries(), list(range(5, n, 5)))
    return [part.to_bytes() for part in parts]


def rows(learner: Learner) -> dict[int, bytes]:
    held = learner.rows.held_by(LEARNT)
    return dict(zip(learner.rows.keys[held].tolist(), learner.pack_state(held), strict=True))


@hypothesis_settings(max_examples=5)
@given(st.integers(0, 9), st.lists(st.integers(1, 47), min_size=1, max_size=7, unique=True))
async def test_the_logged_steps_give_the_same_weights_with_any_cap(seed: int, boundaries: list[int]) -> None:
    """Steps of any sizes, a restart after each; then taken again along their records, under another cap."""
    log, store, logged = records(seed), MemoryModel(), list[StepRecord]()
    first = 0
    for last in [*sorted(boundaries), len(log)]:
        trainer = Trainer(store=store, most=MOST)
        await trainer.load()
        for offset in range(trainer.begin_refill(), trainer.next):
            trainer.refill(offset, log[offset])
        trainer.end_refill()
        trainer.learn([(offset, log[offset]) for offset in range(first, last)])
        step = await trainer.step()
        assert step is not None
        logged.append(step)
        first = last
    assert sum(step.gone for step in logged) > 10
    assert dict((await store.load())[1]) == rows(trainer.learner)
    assert trainer.learner.excess(MOST) == 0
    again = Trainer(store=MemoryModel(), most=1_000_000)
    for step in logged:
        again.retrace([(o, log[o]) for o in range(step.first, step.next)], step.sizes, step.skipped)
        await again.step(step)
    assert rows(again.learner) == rows(trainer.learner)
    assert again.learner.dense_state() == trainer.learner.dense_state()


async def test_rows_leave_redis_in_the_step_and_the_feed_says_so(settings: Settings) -> None:
    client = connect(settings.redis)
    store = ModelStore(client, Keys(settings.namespace))
    trainer = Trainer(store=store, most=MOST)
    log = records()
    for at in range(0, len(log), 12):
        trainer.learn([(offset, log[offset]) for offset in range(at, at + 12)])
        step = await trainer.step()
        assert step is not None
        await trainer.publish(step)
        assert dict((await store.load())[1]) == rows(trainer.learner)
    from models.model import Model
    from streaming.state import read_feed

    model = Model(rows=Rows())
    for _, delta in await read_feed(client, Keys(settings.namespace).model_feed, "0-0", count=1000):
        if delta.keys:
            model.load_rows(np.array(delta.keys, np.uint64), list(delta.values))
        model.remove(np.array(delta.gone, np.uint64))
    assert set(model.rows.keys[model.rows.held_by(LEARNT)].tolist()) == rows(trainer.learner).keys()
    assert model.rows.known == len(rows(trainer.learner))
    await client.aclose()


def test_what_comes_back_begins_blank() -> None:
    learner = Learner(rows=Rows())
    for i in range(20):
        learner.learn(entry(i, 1.7e9 + 7200.0 * i))
    assert learner.let_go(5).tolist() == KEYS[:5].tolist()
    fresh = Learner(rows=Rows())
    for one in (learner, fresh):
        one.rows.add(KEYS[[2]])
        one.grow()
    row = learner.rows.find(KEYS[[2]])
    assert int(row[0]) < 20  # a row that was free
    assert learner.rows.known == 16
    assert learner.pack_state(row) == fresh.pack_state(np.array([0]))


def test_two_ids_with_one_hash_are_learnt_once() -> None:
    learner = Learner(rows=Rows())
    learner.learn(entry(1, 1.7e9))
    before = learner.dense_state(), rows(learner)
    other = entry(1, 1.7e9 + 1, offset=7, flags=ENTERS | VOICE)
    other.ids = ["another-id"]
    learner.learn(other)
    assert (learner.dense_state(), rows(learner)) == before
    assert learner.collided == 1
    again = Learner(rows=Rows())
    again.load_state(np.array([*before[1]], np.uint64), [*before[1].values()])
    again.learn(other)
    assert again.collided == 1  # the check is stored with the row
    assert item_hash("another-id") != item_hash(entry(1, 0.0).ids[0])


def test_an_unreadable_impression_is_left_out() -> None:
    learner = Learner(rows=Rows())
    learner.learn(entry(-1, 1.7e9, flags=0, kind=IMPRESSION, extra=b"\xe5\x09 no payload"))
    assert (learner.window.unreadable, len(learner.window)) == (1, 0)


class Brittle(Learner):
    """A learner with a defect: it raises at one record."""

    def learn(self, entries: Entries, *rest: object) -> object:  # type: ignore[override]
        if (entries.offset == 12 * 5).any():
            raise IndexError("out of bounds")
        return super().learn(entries, *rest)  # type: ignore[arg-type]


async def test_the_record_that_raises_is_found_and_skipped(settings: Settings) -> None:
    """First a range is to blame, then one record, then it is set aside; the log of steps says so."""
    client, log = connect(settings.redis), records()
    store, raised, steps = ModelStore(client, Keys(settings.namespace)), list[tuple[int, int]](), list[StepRecord]()
    for _ in range(9):
        trainer = Trainer(store=store, most=1000)
        await trainer.load()
        trainer.learner.__class__ = Brittle
        trainer.suspect(await store.faults())
        try:
            for at in range(trainer.next - trainer.next % 8, 40, 8):
                trainer.learn([(offset, log[offset]) for offset in range(at, at + 8)])
                step = await trainer.step()
                if step is not None:
                    steps.append(step)
        except LearningError as error:
            raised.append((error.first, error.next))
            await store.blame(error.first, error.next, str(error.__cause__))
            continue
        break
    assert raised == [(8, 16), (12, 13), (12, 13), (12, 13)]
    assert [step.skipped for step in steps] == [[], [12], [], [], []]
    again = Trainer(store=MemoryModel())
    for step in steps:
        again.retrace([(o, log[o]) for o in range(step.first, step.next)], step.sizes, step.skipped)
        await again.step(step)
    assert rows(again.learner) == rows(trainer.learner)
    await client.aclose()


async def test_foreign_bytes_stop_the_learner_and_name_key_and_next_step(settings: Settings) -> None:
    client, keys = connect(settings.redis), Keys(settings.namespace)
    store = ModelStore(client, keys)
    trainer = Trainer(store=store)
    trainer.learn([(0, records()[0])])
    await trainer.step()
    key = int(trainer.learner.rows.keys[0])
    place, good = keys.model_rows(key & 255), (await store.load())[1][0][1]
    field = key.to_bytes(8, "little")
    kept = await client.hget(place, field)
    for bad in (kept[:-1], b"\x07" + kept[1:], b"", good[:5]):
        await client.hset(place, field, bad)
        with pytest.raises(StoredBytesError, match=rf"model.*rows:{key & 255}.*{key:016x}.*rebuild --switch"):
            await Trainer(store=store).load()
    await client.hset(place, field, kept)
    await client.hset(place, b"a field of ours?", b"no")
    with pytest.raises(StoredBytesError, match="expected fields of 8 bytes"):
        await Trainer(store=store).load()
    await client.hdel(place, b"a field of ours?")
    dense = await client.hget(keys.model_head, "dense")
    for bad in (b"", dense[:40], b"\xe7\x02" + dense[2:], b"\xe7\x01\x80"):
        await client.hset(keys.model_head, "dense", bad)
        with pytest.raises(StoredBytesError, match=r"model.*head.*rebuild --switch"):
            await Trainer(store=store).load()
    await client.hset(keys.model_head, "dense", dense)
    await client.hset(keys.model_head, "marks", b"{not json")
    with pytest.raises(StoredBytesError, match="head"):
        await Trainer(store=store).load()
    assert EXIT_FOR_GOOD == 78
    await client.aclose()
