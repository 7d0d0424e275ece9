"""The process around the agents: connect, check the ground, run until told to stop.

Knows which agents a role has and what they need; nothing about how they fold.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Coroutine
from typing import Any, Literal

import numpy as np
import uvloop

from infra.settings import Settings
from infra.telemetry import EXIT_AGAIN, EXIT_FOR_GOOD, mark_ready
from models.examples import Entries, accept
from models.factors import Factors
from models.items import Items
from models.profile import Profiles
from models.rows import Rows
from streaming import consumer
from streaming.agents import UserAgent, attach, inlet_agents
from streaming.consumer import TP, Bounds, Seek
from streaming.events import Alias, Click, Weights, encode
from streaming.item_agent import ItemAgent
from streaming.kafka.address import shown
from streaming.kafka.ground import Ground, GroundError, arrive
from streaming.learn import UserFold, decode_part
from streaming.recovery.generations import moved
from streaming.state import ItemStore, MemoryUserStore, RedisUserStore, connect, live_keys
from streaming.supervision import LoopGuard, Progress, Watchdog, leave, report
from streaming.topics import Ends, Log, LogError, TopicsError, topics_of
from streaming.users.embeddings import LiveEmbeddings

log = logging.getLogger(__name__)

Role = Literal["users", "items"]


def run(settings: Settings, role: Role, slot: int) -> None:
    """Run one worker process of a role in its slot until SIGTERM or SIGINT; exits by status where it cannot go on."""
    warm()
    uvloop.run(_main(settings, role, slot))


def warm() -> None:
    """Load (or compile) every kernel of the folds before the process calls itself ready: the first call costs most."""
    store, fold = MemoryUserStore(), UserFold(Weights())
    items, factors = Items(rows=Rows()), Factors(rows=Rows())
    for offset in range(2):
        click = Click(user_id="warm", item_id=f"warm-{offset}", ts=1.0, event_id=str(offset))
        part = decode_part("warm", 0, [(offset, 2000, encode(click))])
        outcome = fold.fold([part], {0: store.read_now(0, [click.user_id])})
        store.commit_now(outcome.writes[0])
        changed = items.fold(accept(Entries.from_bytes(outcome.records[0].to_bytes()), {0: offset}))
        Items(rows=Rows()).load(items.rows.keys[changed], items.pack(changed))
        items.pack_totals()
    alias = Alias(user_id="warm-2", anonymous_id="warm", ts=1.0, event_id="alias")
    fold.fold([decode_part("warm", 0, [(2, 2000, encode(alias))])], {0: store.read_now(0, ["warm"])})
    profiles = Profiles([store.values["profile", 0, "warm"]], [None])
    factors.rows.add(profiles.item[0, :1])
    factors.grow()
    factors.decayed_embeddings(profiles.item, profiles.time, profiles.n, profiles.times[:, 1], np.zeros(1, np.int64))


async def _main(settings: Settings, role: Role, slot: int) -> None:
    topics = topics_of(settings)
    try:
        await arrive(settings.kafka, topics)
    except TopicsError as error:
        leave(EXIT_FOR_GOOD, str(error))
    except LogError as error:
        leave(EXIT_AGAIN, f"Kafka at {shown(settings.kafka)} does not answer: {error}")
    client = connect(settings.redis)
    keys = await live_keys(client, settings.namespace)
    producer = Log(settings.kafka)
    await producer.start()
    progress, ground = Progress(), Ground(producer, topics, await producer.epoch(topics), codec=settings.codec)
    app, background = (_users if role == "users" else _items)(settings, slot, client, keys, producer, progress, ground)
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    app.finalize()
    await app.start()
    member, ends = consumer.Member(app), Ends(settings.kafka)
    LoopGuard(asyncio.get_running_loop()).start()
    background += [
        Watchdog(member, progress, ends, client.ping).watch(),
        ground.watch(),
        report(role, slot, member, progress, client, keys, topics.events if role == "users" else topics.examples),
        _leave_when_switched(client, keys),
    ]
    tasks = [asyncio.create_task(_loud(work)) for work in background]
    while not member.assignment() and not stop.is_set():
        await asyncio.sleep(0.02)
    mark_ready()
    log.info("worker %s-%d runs", role, slot)
    await stop.wait()
    for task in tasks:
        task.cancel()
    await app.stop()
    await ends.stop()
    await producer.stop()
    await client.aclose()


def _users(
    settings: Settings, slot: int, client: Any, keys: Any, producer: Log, progress: Progress, ground: Ground
) -> tuple[Any, list[Coroutine[Any, Any, None]]]:
    topics = topics_of(settings)
    embeddings = LiveEmbeddings(client, keys)
    agent = UserAgent(
        topics=topics, store=RedisUserStore(client, keys), log_=producer, progress=progress, ground=ground,
        fold=UserFold.of(settings, embed=embeddings.embed),
    )  # fmt: skip
    inlets = inlet_agents(topics, producer, progress)

    async def seek(assigned: Bounds, committed: dict[TP, int]) -> dict[TP, int]:
        progress.assign(assigned)
        found = await agent.offsets(assigned)
        for topic, inlet in inlets.items():
            found |= await inlet.offsets({tp: assigned[tp] for tp in assigned if tp.topic == topic}, committed)
        return found

    app = _app(settings, "users", slot, seek)
    attach(app, topics.events, agent.run)
    for topic, inlet in inlets.items():
        attach(app, topic, inlet.run)
    return app, [embeddings.follow()]


def _items(
    settings: Settings, slot: int, client: Any, keys: Any, producer: Log, progress: Progress, ground: Ground
) -> tuple[Any, list[Coroutine[Any, Any, None]]]:
    topics = topics_of(settings)
    store = ItemStore(client, keys, settings.feed_mb << 20)
    agent = ItemAgent(
        topics=topics, store=store, log_=producer, progress=progress, ground=ground, most=settings.max_items
    )

    async def seek(assigned: Bounds, committed: dict[TP, int]) -> dict[TP, int]:
        progress.assign(assigned)
        return await agent.offsets(assigned)

    app = _app(settings, "items", slot, seek)
    attach(app, topics.examples, agent.run_examples)
    attach(app, topics.items, agent.run_catalogue)
    return app, [agent.tick()]


def _app(settings: Settings, role: str, slot: int, seek: Seek) -> Any:
    return consumer.create_app(
        f"{settings.namespace}-{role}", kafka=settings.kafka, form=settings.consumer, instance=f"{role}-{slot}",
        seek=seek,
        on_crash=lambda name, error: leave(EXIT_AGAIN, f"agent {name} crashed: {type(error).__name__}: {error}"),
    )  # fmt: skip


async def _leave_when_switched(client: Any, keys: Any) -> None:
    """End this process, to come back in the new one, when another generation is served."""
    leave(EXIT_AGAIN, f"generation {await moved(client, keys)} is served now: starting again in it")


async def _loud(work: Coroutine[Any, Any, None]) -> None:
    """Run a background task whose failure ends the process instead of going unnoticed."""
    try:
        await work
    except asyncio.CancelledError:
        raise
    except GroundError as error:
        leave(EXIT_FOR_GOOD, str(error))
    except Exception as error:
        log.exception("background task failed")
        leave(EXIT_AGAIN, f"background task failed: {type(error).__name__}: {error}")
