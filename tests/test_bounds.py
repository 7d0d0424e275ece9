"""What is held is bounded and told: Redis by kind, processes; items leave across kills; how a soak judges."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from infra.proving.soak import CAP, PARTITIONS, Churn, Soak, judge, run_soak
from infra.settings import Settings
from infra.telemetry import EXIT_AGAIN
from models.examples import Entries
from streaming.dead_letters import letters
from streaming.rebuild import verify
from streaming.sizes import redis_sizes
from streaming.state import ItemStore, Keys, connect
from streaming.topics import Log, Topics
from tests.entries import Walk, cuts
from tests.forked import CONTEXT, _run
from tests.hand import Hand
from tests.test_api import click, compiled, seeded, serving, settings_with, until

__all__ = ["compiled"]


async def test_redis_sizes_are_near_the_truth(settings: Settings) -> None:
    hand = Hand(settings)
    await hand.learn([click(f"u{i}", f"i{i % 300}", 100.0 - i / 100) for i in range(1500)])
    sizes = await redis_sizes(hand.client, hand.keys, settings.partitions)
    assert sizes.users == 1500
    assert 150 < sizes.items < 600  # of 300, by a sixteenth of the buckets
    whole = 0
    async for name in hand.client.scan_iter(f"{hand.keys.prefix}:{{u*", count=5000):
        whole += await hand.client.memory_usage(name, samples=0)
    assert sizes.bytes["profiles"] == pytest.approx(whole, rel=0.3)
    assert sizes.bytes["items"] > 30_000
    assert sizes.bytes["total"] > sizes.bytes["profiles"]
    assert sizes.bytes["feeds"] > 0
    await hand.close()


async def test_gauges_say_what_is_held_and_what_may_be(settings: Settings, topics: object) -> None:
    settings = settings_with(settings, max_items=5000)
    await topics(settings.partitions)  # type: ignore[operator]
    hand = Hand(settings)
    await seeded(hand)
    key = hand.keys.metrics("items")
    await hand.client.xadd(key, {"t": "1", "rss_mb": "321.5", "slot": "0", "rows_to_commit": "7"})
    async with serving(settings) as (client, app):
        parts = app.state.parts
        await until(lambda: parts.snapshot.live.items.n == 30 and not parts.log_problem)
        text = (await client.get("/metrics")).text
        assert 'freshet_process_bytes{process="items-0"} 3.215e+08' in text
        assert 'freshet_process_bytes{process="api"}' in text
        assert 'freshet_kept_bound{what="items"} 5000.0' in text
        assert "freshet_snapshot_bad 0.0" in text
        for kind in ("total", "profiles", "items", "catalogue", "model", "feeds", "curves"):
            assert f'freshet_redis_bytes{{kind="{kind}"}}' in text
        state = (await client.get("/-/state")).json()
        assert state["memory"]["process_mb"]["items-0"] == 321.5
        assert state["snapshot"]["bad"] == 0
        place, field = hand.keys.item_rows(3), (3).to_bytes(8, "little")
        await hand.client.hset(place, field, b"what is this")
        await app.state.parts.snapshot.load()
        answer = (await client.get("/v1/recommendations/u1")).json()
        assert (answer["degraded"], len(answer["items"])) == (True, 10)
        assert "rebuild --switch" in answer["reason"]
        assert "freshet_snapshot_bad 1.0" in (await client.get("/metrics")).text
        assert (await client.get("/health/ready")).status_code == 200
    await hand.close()


def _start_items(settings: Settings) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **settings.environment()}
    words = ["worker", "--role", "items", "--slot", "0", "--data", str(settings.data)]
    return subprocess.Popen([sys.executable, "-m", "infra.cli", *words], env=environment)


@pytest.mark.timeout(120)
async def test_items_that_left_are_gone_after_a_kill_and_in_a_verification(
    settings: Settings, topics: Callable[..., Awaitable[Topics]]
) -> None:
    """2,050 records on 60 items where 16 may stay, the item agent killed: Redis holds what a rebuild folds."""
    settings = settings_with(settings, max_items=16)
    made, count = await topics(settings.partitions), 2050
    parts = cuts(Walk(n=count, users=40, pace=60.0).entries(), list(range(count)))
    log, client = Log(settings.kafka), connect(settings.redis)
    store = ItemStore(client, Keys(settings.namespace))
    await log.start()
    process = _start_items(settings)
    try:
        for first in range(0, count, 300):
            await log.append(made.examples, [(0, None, part.to_bytes()) for part in parts[first : first + 300]])
            if first == 900:
                await asyncio.sleep(0.5)
                process.send_signal(signal.SIGKILL)
                process.wait()
                process = _start_items(settings)
        deadline = time.monotonic() + 60
        while int((await store.head()).get("next", 0)) < count:
            assert time.monotonic() < deadline, await store.head()
            await asyncio.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        await log.stop()
    _, rows = await store.load()
    assert len(rows) <= 16 + 2 * 21  # since the last look: two targets, and the 20 items before each
    report = await verify(settings, advance=lambda *_: None, weights=False)
    assert report.differing == []
    assert report.rows == len(rows)
    await client.aclose()


def _with_a_defect(settings: Settings, log: Path) -> None:
    """The item agent, whose fold raises at one event: a defect of the kind that no codec sees."""
    from models.items import Items

    fold = Items.fold

    def defective(self: Items, entries: Entries) -> np.ndarray:
        if 7 in entries.offset.tolist():
            raise IndexError("out of bounds")
        return fold(self, entries)

    Items.fold = defective  # type: ignore[method-assign]
    _run("items", settings, log)


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_record_whose_fold_raises_three_times_is_set_aside(
    settings: Settings, topics: Callable[..., Awaitable[Topics]], tmp_path: Path
) -> None:
    """Twice before, now the third time: it starts again and goes on without the record; verify agrees."""
    made = await topics(settings.partitions)
    parts = cuts(Walk(n=20, pace=60.0).entries(), list(range(20)))
    log, client = Log(settings.kafka), connect(settings.redis)
    store = ItemStore(client, Keys(settings.namespace))
    await log.start()
    await log.append(made.examples, [(0, None, part.to_bytes()) for part in parts])
    assert [await store.blame(7, 8, "IndexError") for _ in range(2)] == [1, 2]
    codes: list[int | None] = []
    process = None
    try:
        deadline = time.monotonic() + 90
        while int((await store.head()).get("next", 0)) < 20:
            assert time.monotonic() < deadline, (codes, (tmp_path / "items.log").read_text()[-2000:])
            if process is None or process.exitcode is not None:
                codes += [] if process is None else [process.exitcode]
                process = CONTEXT.Process(target=_with_a_defect, args=(settings, tmp_path / "items.log"))
                process.start()
            await asyncio.sleep(0.1)
    finally:
        if process is not None:
            process.kill()
            process.join(5)
        await log.stop()
    assert codes == [EXIT_AGAIN]
    (letter,) = await letters(settings)
    assert (letter.topic, letter.offset) == (made.examples, 7)
    assert "raised 3 times" in letter.reason
    assert "IndexError: out of bounds" in letter.reason
    assert (await store.faults())[7].count == 3
    report = await verify(settings, advance=lambda *_: None, weights=False)
    assert report.differing == []
    await client.aclose()


def test_a_soak_judges_the_second_half() -> None:
    times = np.arange(0, 600, 3.0).tolist()
    rising_at_first = [min(100.0 + t / 3, 180.0) for t in times]
    assert judge(times, rising_at_first, 600)["flat"] is True
    leaking = [200.0 + t / 30 for t in times]
    assert judge(times, leaking, 600) == {
        "start_mb": 205.0, "end_mb": 219.9, "max_mb": 219.9, "slope_mb_min": 2.0, "flat": False,
    }  # fmt: skip
    saw = [200.0 + (t % 60) / 6 for t in times]
    assert judge(times, saw, 600)["flat"] is True
    soak = Soak(9.0)
    soak.add(3.0, {"api": 1.0})
    soak.add(6.0, {"api": 2.0, "items": 3.0})
    soak.add(9.0, {"items": 4.0})
    assert soak.samples == {"api": [1.0, 2.0, 2.0], "items": [3.0, 3.0, 4.0]}


def test_users_and_items_come_and_go() -> None:
    churn = Churn()
    events = [churn.event() for _ in range(3000)]
    assert churn.made["user"] > 400
    assert churn.made["item"] > 400
    assert len({event["event_id"] for event in events}) == 3000
    assert len({event["item_id"] for event in events[-100:]}) < 100


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_short_soak_keeps_to_its_caps(tmp_path: Path) -> None:
    report = run_soak(6.0, data=tmp_path / "soak")
    kept = report["kept"]
    assert kept["events"] > 300
    assert kept["items_kept"] <= CAP + 1024 * 20
    assert kept["users_kept"] <= CAP + 4096 * PARTITIONS
    assert {"api", "items", "users-0", "learner", "redis", "kafka", "redis, used"} <= report["memory"].keys()
    assert set(report["done"]) >= {"events 202", "lookup 200"}
