"""How much Redis holds, by kind: estimated from samples, so that asking costs next to nothing. Only reads.

Profiles are counted exactly and a few of each partition are weighed; of the 256 buckets of rows 16 are weighed. Knows
what the keys are called, not what their values mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from streaming.state import BUCKETS, Keys, Redis

SAMPLED: Final = 16
"""Buckets, and users, that are weighed."""
CURVES: Final = ("users", "items", "learner", "world")


@dataclass(slots=True)
class Sizes:
    """Bytes by kind (`total`: all that this Redis uses, whoever's it is), and how many users and rows there are."""

    bytes: dict[str, int] = field(default_factory=dict)
    users: int = 0
    items: int = 0
    learnt: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return it for people, in MB."""
        return {
            "mb": {kind: round(value / 1e6, 2) for kind, value in self.bytes.items()},
            "users": self.users, "items": self.items, "learnt": self.learnt,
        }  # fmt: skip


async def redis_sizes(client: Redis, keys: Keys, partitions: int) -> Sizes:
    """Estimate what one generation of a namespace takes; raises what Redis raises."""
    out = Sizes(bytes={"total": int((await client.info("memory"))["used_memory"])})
    out.bytes["profiles"], out.users = await _profiles(client, keys, partitions)
    some = range(0, BUCKETS, BUCKETS // SAMPLED)
    out.bytes["items"], out.items = await _buckets(client, [keys.item_rows(b) for b in some])
    out.bytes["catalogue"], _ = await _buckets(client, [keys.item_catalogue(b) for b in some])
    out.bytes["model"], out.learnt = await _buckets(client, [keys.model_rows(b) for b in some])
    out.bytes["model"] += sum(await _weighed(client, [keys.model_head]))
    out.bytes["feeds"] = sum(await _weighed(client, [keys.item_feed, keys.model_feed], 0))  # 2 ms for 45 MB; 8 said 220
    out.bytes["curves"] = sum(await _weighed(client, [keys.metrics(name) for name in CURVES]))
    return out


async def _weighed(client: Redis, names: Sequence[str], samples: int = 8) -> list[int]:
    """Return the bytes of keys; `samples` values of each are weighed, 0: all."""
    pipe = client.pipeline(transaction=False)
    for name in names:
        pipe.memory_usage(name, samples=samples)
    return [size or 0 for size in await pipe.execute()]


async def _buckets(client: Redis, names: Sequence[str]) -> tuple[int, int]:
    """Return (bytes, fields) of all buckets, from a few of them."""
    pipe = client.pipeline(transaction=False)
    for name in names:
        pipe.hlen(name)
    share = BUCKETS // len(names)
    return share * sum(await _weighed(client, names)), share * sum(await pipe.execute())


async def _profiles(client: Redis, keys: Keys, partitions: int) -> tuple[int, int]:
    """Return (bytes, users) of all partitions: profile, seen list, embedding and the place in the sorted set."""
    pipe = client.pipeline(transaction=False)
    for p in range(partitions):
        pipe.zcard(keys.active(p))
        pipe.zrandmember(keys.active(p), max(1, SAMPLED // partitions))
    answers = await pipe.execute()
    counts = [int(count) for count in answers[::2]]
    sampled = [(p, user.decode()) for p, users in enumerate(answers[1::2]) for user in users]
    if not sampled:
        return 0, 0
    names = [name(p, user) for p, user in sampled for name in (keys.profile, keys.seen, keys.embedding)]
    sets = sum(await _weighed(client, [keys.active(p) for p in range(partitions)]))
    return sets + round(sum(await _weighed(client, names)) / len(sampled) * sum(counts)), sum(counts)
