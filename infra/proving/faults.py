"""The faults that `freshet chaos` inflicts on a stack: what each does, how a run of them is drawn from a seed.

A fault is a kind of FAULTS done at one moment; it blocks its thread until it is over (a process stopped and continued,
a second worker come and gone). Knows nothing about events or about how a stack recovers.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from infra.proving.proxy import Proxy
from infra.stack import Stack
from streaming.state import ModelStore, StoreError, StoreUnavailable, connect, live_keys
from streaming.topics import Log, LogError, topics_of
from streaming.training.controls import Control, record_of
from streaming.training.versions import read_list

STOPPED_S: Final = (6.5, 9.0)
"""How long a worker is stopped: longer than its session with Kafka (6 s)."""
SECOND: Final = 1
"""Slot of the worker that joins and leaves."""
TELL_S: Final = 15.0
"""How long telling the learner something may take, s."""


@dataclass(slots=True)
class Target:
    """What faults act on: the stack, and the proxy before each of its doors."""

    stack: Stack
    proxies: dict[str, Proxy]
    random: random.Random


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind: how often it is in a deck, what it acts on (one fault at a time each), whose state waits for it."""

    often: int
    on: str
    states: tuple[str, ...]
    does: Callable[[Target], str]
    """Returns what was done, for people."""


def _worker(target: Target) -> str:
    """One of the user workers that live."""
    living = [name for name in target.stack.pids() if name.startswith("users-")]
    return target.random.choice(living or ["users-0"])


def _worker_kill(target: Target) -> str:
    name = _worker(target)
    target.stack.kill(name)
    return name


def _worker_term(target: Target) -> str:
    name = _worker(target)
    target.stack.signal(name, signal.SIGTERM)
    return name


def _worker_stop(target: Target) -> str:
    name, seconds = _worker(target), target.random.uniform(*STOPPED_S)
    target.stack.signal(name, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        target.stack.signal(name, signal.SIGCONT)
    return f"{name} for {seconds:.1f} s"


def _worker_joins(target: Target) -> str:
    seconds, killed = target.random.uniform(6.0, 14.0), target.random.random() < 0.3
    name = target.stack.join(SECOND)
    time.sleep(seconds)
    if killed:
        target.stack.kill(name, hold=True)
    else:
        target.stack.hold(name)
    return f"{name} for {seconds:.0f} s, {'killed' if killed else 'left'}"


def _kill(name: str) -> Callable[[Target], str]:
    def kill(target: Target) -> str:
        target.stack.kill(name)
        return name

    return kill


def _redis_rollback(target: Target) -> str:
    """Lose up to a second of acknowledged writes, as a crash of the machine may with appendfsync everysec."""
    store = target.stack.store
    assert store is not None
    log, kept = store.data / "appendonlydir", store.data / "appendonlydir.kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(log, kept)
    seconds = target.random.uniform(0.2, 1.0)
    time.sleep(seconds)
    target.stack.kill("redis", hold=True)
    shutil.rmtree(log)
    kept.rename(log)
    target.stack.restart("redis")
    return f"{seconds:.1f} s of writes"


def _cut(name: str) -> Callable[[Target], str]:
    def cut(target: Target) -> str:
        seconds = target.random.choice((0.0, 0.5, 2.0))
        met = target.proxies[name].cut(seconds=seconds, share=target.random.choice((0.5, 1.0)))
        return f"{met} connections, none for {seconds:g} s"

    return cut


def _stall(name: str) -> Callable[[Target], str]:
    def stall(target: Target) -> str:
        seconds = target.random.uniform(0.5, 4.0)
        met = target.proxies[name].stall(seconds=seconds)
        time.sleep(seconds)
        return f"{met} connections for {seconds:.1f} s"

    return stall


def _half_close(name: str) -> Callable[[Target], str]:
    def half_close(target: Target) -> str:
        return f"{target.proxies[name].half_close(share=0.6)} connections"

    return half_close


def _model_told(target: Target) -> str:
    """Tell the learner to make a version, to go back to one, to serve one while it learns on, or to end that."""
    do = target.random.choice(("save", "rollback", "rollback", "pin", "unpin"))
    try:
        return asyncio.run(asyncio.wait_for(_tell(target, do), TELL_S))
    except (LogError, StoreError, *StoreUnavailable, TimeoutError) as error:  # what it is told by is away as well
        return f"{do} could not be sent ({type(error).__name__})"


async def _tell(target: Target, do: str) -> str:
    assert target.stack.store is not None
    settings, client = target.stack.settings, connect(target.stack.store.url, timeout=2.0)
    try:
        store = ModelStore(client, await live_keys(client, settings.namespace))
        kept = [about for about in await read_list(store) if not about.refused]
    finally:
        await client.aclose()
    control = Control("unpin" if do == "unpin" else "save")
    if kept and do in ("rollback", "pin"):
        chosen = target.random.choice(kept)
        control = Control(do, chosen.version, chosen.identity)
    log = Log(target.stack.kafka)
    await log.start()
    try:
        await log.append(topics_of(settings).examples, [(0, None, record_of(control, codec=settings.codec))])
    finally:
        await log.stop()
    return control.text


USERS, ALL = ("users",), ("users", "items", "learner")
FAULTS: Final[dict[str, Fault]] = {
    "worker_kill": Fault(4, "worker", USERS, _worker_kill),
    "worker_term": Fault(2, "worker", USERS, _worker_term),
    "worker_stop": Fault(2, "worker", USERS, _worker_stop),
    "worker_joins": Fault(2, "second", USERS, _worker_joins),
    "items_kill": Fault(2, "items", ("users", "items"), _kill("items")),
    "learner_kill": Fault(2, "learner", ("users", "learner"), _kill("learner")),
    "model_told": Fault(3, "model", ("users", "learner"), _model_told),
    "api_kill": Fault(2, "api", USERS, _kill("api")),
    "redis_kill": Fault(2, "redis", ALL, _kill("redis")),
    "redis_rollback": Fault(2, "redis", ALL, _redis_rollback),
    "kafka_kill": Fault(2, "kafka", ALL, _kill("kafka")),
    "redis_cut": Fault(1, "redis_line", ALL, _cut("redis")),
    "redis_stall": Fault(1, "redis_line", ALL, _stall("redis")),
    "redis_half_close": Fault(1, "redis_line", ALL, _half_close("redis")),
    "kafka_cut": Fault(1, "kafka_line", ALL, _cut("kafka")),
    "kafka_stall": Fault(1, "kafka_line", ALL, _stall("kafka")),
    "kafka_half_close": Fault(1, "kafka_line", ALL, _half_close("kafka")),
    "api_cut": Fault(1, "api_line", USERS, _cut("api")),
    "api_stall": Fault(1, "api_line", USERS, _stall("api")),
    "api_half_close": Fault(1, "api_line", USERS, _half_close("api")),
}
"""Every kind, by name; a fault on a `_line` acts on connections through its proxy."""


def drawn(count: int, seed: int) -> Iterator[str]:
    """Yield `count` kinds: shuffled decks, so that each comes about as often as its share, in an order of the seed."""
    draw, deck = random.Random(seed), list[str]()
    for _ in range(count):
        if not deck:
            deck = [kind for kind, fault in FAULTS.items() for _ in range(fault.often)]
            draw.shuffle(deck)
        yield deck.pop()
