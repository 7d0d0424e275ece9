"""The learner process on real Kafka and Redis: steps are committed, logged, fed; kill -9 and resume is exact."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from infra.settings import Settings
from models.features import F
from models.learner import Learner
from models.model import Model
from models.rows import Rows
from streaming.rebuild import fold_weights
from streaming.state import Keys, ModelStore, connect, read_feed
from streaming.topics import Log, Topics
from streaming.trainer import Trainer
from tests.entries import Walk, cuts

RECORDS = [
    part.to_bytes() for part in cuts(Walk(n=1200, users=20, width=F, pace=60.0).entries(), list(range(7, 1200, 7)))
]


async def _read(kafka: str, topic: str) -> list[tuple[int, bytes]]:
    consumer = AIOKafkaConsumer(bootstrap_servers=kafka, group_id=None, auto_offset_reset="earliest")
    await consumer.start()
    try:
        place = TopicPartition(topic, 0)
        consumer.assign([place])
        end = (await consumer.end_offsets([place]))[place]
        consumer.seek(place, 0)
        out: list[tuple[int, bytes]] = []
        while end and (not out or out[-1][0] < end - 1):
            out += [(r.offset, r.value) for r in (await consumer.getmany(place, timeout_ms=500)).get(place, ())]
        return out
    finally:
        await consumer.stop()


def _start(settings: Settings) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ, "FRESHET_KAFKA": settings.kafka, "FRESHET_REDIS": settings.redis,
        "FRESHET_NAMESPACE": settings.namespace,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "infra.cli", "learner", "--data", str(settings.data)], env=environment
    )


async def _until(store: ModelStore, offset: int, *, timeout: float = 120.0) -> dict[str, bytes]:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        head = await store.head()
        if int(head.get("next", 0)) >= offset:
            return head
        await asyncio.sleep(0.05)
    raise AssertionError(f"expected examples@{offset} learnt in {timeout} s, got {await store.head()}")


def _rows(learner: Learner) -> dict[int, bytes]:
    rows = np.arange(learner.rows.n)
    return dict(zip(learner.rows.keys[rows].tolist(), learner.pack_state(rows), strict=True))


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_kill_and_resume_ends_in_the_logged_weights(
    settings: Settings, topics: Callable[..., Awaitable[Topics]]
) -> None:
    made = await topics()
    client = connect(settings.redis)
    store = ModelStore(client, Keys(settings.namespace))
    log = Log(settings.kafka)
    await log.start()
    process = _start(settings)
    try:
        half = len(RECORDS) // 2
        for record in RECORDS[:half]:
            await log.append(made.examples, [(0, None, record)])
        await _until(store, 1)
        for record in RECORDS[half : half + 20]:  # some of them learnt and not yet committed when it is killed
            await log.append(made.examples, [(0, None, record)])
        process.send_signal(signal.SIGKILL)
        process.wait()
        process = _start(settings)
        for record in RECORDS[half + 20 :]:
            await log.append(made.examples, [(0, None, record)])
        await log.append(made.examples, [(0, None, RECORDS[-1])])  # a repeat changes nothing
        head = await _until(store, len(RECORDS) + 1)
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        await log.stop()
    head, rows = await store.load()
    retraced = ModelStore(client, Keys(settings.namespace, 2))
    again = (await fold_weights(settings, retraced, lambda *_: None)).learner
    assert dict((await retraced.load())[1]) == dict(rows)
    assert int(head["step"]) == again.model.step >= 2
    assert dict(rows) == _rows(again)
    assert head["dense"] == again.dense_state()
    await _check_feed(client, settings, again)
    await client.aclose()


async def _check_feed(client: Any, settings: Settings, again: Learner) -> None:
    """What serving builds from the feed alone is the learner's model."""
    model = Model(rows=Rows())
    deltas = await read_feed(client, Keys(settings.namespace).model_feed, "0-0", count=10_000)
    assert {delta.kind for _, delta in deltas} == {"vectors", "step"}
    for _, delta in deltas:
        if delta.kind == "vectors":
            model.load_rows(np.array(delta.keys, np.uint64), list(delta.values))
        elif delta.dense:  # not the mark of a start, which says how far the model is
            model.load_dense(delta.dense)
    assert model.step == again.model.step
    keys = again.rows.keys[: again.rows.n]
    mine, theirs = model.rows.find(keys), again.rows.find(keys)
    np.testing.assert_allclose(
        model.factors.vectors[mine[mine >= 0]], again.model.factors.vectors[theirs[mine >= 0]], atol=2e-3
    )
    np.testing.assert_array_equal(model.ranker.weights, again.model.ranker.weights)


async def test_resume_refills_the_join_window(settings: Settings) -> None:
    """Stopping between any two steps and loading again gives the bytes of never having stopped."""
    client = connect(settings.redis)
    straight = Trainer(store=ModelStore(client, Keys(settings.namespace, 1)), cluster="c")
    halted = Trainer(store=ModelStore(client, Keys(settings.namespace, 2)), cluster="c")
    held = 0
    for at in range(0, len(RECORDS), 20):
        part = [(at + i, record) for i, record in enumerate(RECORDS[at : at + 20])]
        for trainer in (straight, halted):
            trainer.learn(part)
            await trainer.step()
        halted = Trainer(store=ModelStore(client, Keys(settings.namespace, 2)), cluster="c")
        await halted.load()
        for offset in range(halted.begin_refill(), halted.next):
            halted.refill(offset, RECORDS[offset])
        halted.end_refill()
        assert list(halted.learner.window) == list(straight.learner.window)
        assert halted.marks == straight.marks
        held = max(held, len(straight.learner.window))
    assert held > 3
    assert halted.learner.dense_state() == straight.learner.dense_state()
    assert _rows(halted.learner) == _rows(straight.learner)
    await client.aclose()
