"""Generations: sets of keys beside each other, one of which the pointer names; knows nothing of how one is made.

`<namespace>:generation` is the pointer; `<namespace>:generations` a hash of number -> what is known of it. Numbers are
never used twice, so that a process that slept through a drop writes to no newer state. Workers, learner and serving
look at the pointer each second and go over to what it names.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from streaming.state import ItemStore, Keys, ModelStore, Redis, RedisUserStore, StoreUnavailable, live_keys

log = logging.getLogger(__name__)

POLL_S = 1.0


class RecoveryError(RuntimeError):
    """State cannot be made, switched or restored so; the message names the next step."""


class About(msgspec.Struct, omit_defaults=True):
    """What the hash says of a generation; times in seconds since the epoch.

    `made` of what ("the logs", "snapshot NAME and the logs since"), `ready` whether it was built to its end, `until`
    where it was folded to a time.
    """

    made: str = "events as they came"
    began: float = 0.0
    ready: bool = False
    until: float = 0.0
    dropped: bool = False


@dataclass(slots=True)
class Generation:
    """One generation as `list` shows it: `events` and `examples` are offsets folded, `step` the learner's."""

    number: int
    served: bool
    ready: bool
    made: str
    began: float
    until: float
    events: int
    examples: int
    step: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for `--json`."""
        return asdict(self)


def registry(namespace: str) -> str:
    """Return the key of the hash of generations."""
    return f"{namespace}:generations"


async def moved(client: Redis, keys: Keys) -> int:
    """Wait until another generation than that of `keys` is served and return its number."""
    while True:
        await asyncio.sleep(POLL_S)
        try:
            live = await live_keys(client, keys.namespace)
        except StoreUnavailable as error:
            log.debug("generation: %s", error)
            continue
        if live.generation != keys.generation:
            return live.generation


async def _known(client: Redis, namespace: str) -> dict[int, About]:
    found = await client.hgetall(registry(namespace))
    return {int(number): msgspec.json.decode(about, type=About) for number, about in sorted(found.items())}


async def register(client: Redis, namespace: str, about: About) -> Keys:
    """Claim the next number for a generation that is about to be made, and return its keys."""
    number = (await live_keys(client, namespace)).generation
    number = max(number, *(await _known(client, namespace)), 1) + 1
    about.began = time.time()
    while not await client.hsetnx(registry(namespace), str(number), msgspec.json.encode(about)):
        number += 1
    return Keys(namespace, number)


async def finish(client: Redis, keys: Keys, about: About) -> None:
    """Say that a generation is whole and may be served."""
    about.ready = True
    await client.hset(registry(keys.namespace), str(keys.generation), msgspec.json.encode(about))


async def generations(client: Redis, namespace: str, partitions: int) -> list[Generation]:
    """Return the generations there are, oldest first."""
    served = (await live_keys(client, namespace)).generation
    known = await _known(client, namespace)
    found = []
    for number in sorted({1, served, *known}):
        about = known.get(number) or About(ready=True)
        if about.dropped:
            continue
        keys = Keys(namespace, number)
        reads = await RedisUserStore(client, keys).read({p: [] for p in range(partitions)})
        events = sum(read.applied for read in reads.values())
        items, model = await ItemStore(client, keys).head(), await ModelStore(client, keys).head()
        if number not in known and number != served and not (events or items or model):
            continue
        found.append(
            Generation(
                number, number == served, about.ready, about.made, about.began, about.until, events,
                int(items.get("next", 0)), int(model.get("step", 0)),
            )
        )  # fmt: skip
    return found


async def _chosen(client: Redis, namespace: str, number: int, partitions: int) -> Generation:
    found = {generation.number: generation for generation in await generations(client, namespace, partitions)}
    if number not in found:
        raise RecoveryError(
            f"generation {number}: there is none in namespace {namespace!r}, only"
            f" {', '.join(map(str, found)) or 'none'}. `freshet rebuild` makes the next one."
        )
    return found[number]


async def switch(client: Redis, namespace: str, number: int, partitions: int) -> int:
    """Serve another generation: one SET, which every process follows; return the one served before.

    Raises RecoveryError where that generation is not there or was not built to its end.
    """
    chosen = await _chosen(client, namespace, number, partitions)
    if not chosen.ready:
        raise RecoveryError(
            f"generation {number} was not built to its end: `freshet generation drop {number}`, then `freshet rebuild`."
        )
    before = await client.set(Keys(namespace).pointer, number, get=True)
    return int(before or 1)


async def drop(client: Redis, namespace: str, number: int, partitions: int) -> None:
    """Delete a generation that is not served; its number is not used again. Raises RecoveryError."""
    chosen = await _chosen(client, namespace, number, partitions)
    if chosen.served:
        raise RecoveryError(
            f"generation {number} is the one that is served: `freshet generation switch` to another one first."
        )
    await client.hset(registry(namespace), str(number), msgspec.json.encode(About(dropped=True)))
    await wipe(client, Keys(namespace, number))


async def wipe(client: Redis, keys: Keys) -> None:
    """Delete every key of a generation."""
    names = []
    async for name in client.scan_iter(f"{keys.prefix}:*", count=5000):
        names.append(name)
        if len(names) == 1000:
            await client.unlink(*names)
            names.clear()
    if names:
        await client.unlink(*names)
