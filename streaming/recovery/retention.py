"""Bounded retention: deletes from the logs what a snapshot covers and what is old enough; never anything else.

`items` is compacted by Kafka; inlets and dead letters have their own retention.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from infra.settings import Settings
from streaming.recovery import cuts
from streaming.recovery.cuts import Cut
from streaming.recovery.generations import RecoveryError
from streaming.recovery.lineage import window
from streaming.recovery.snapshots import Manifest
from streaming.state import ItemStore, Keys, ModelStore, RedisUserStore, connect, live_keys
from streaming.topics import client_options, topics_of

DAY_S = 86_400.0


async def trim(settings: Settings, manifest: Manifest, *, now: float = 0.0) -> dict[str, int]:
    """Delete records that the snapshot covers and that are older than `retention_days`; return how many, by topic.

    What the served generation has not folded yet stays as well, whatever its age. `now` is from when age counts, s.
    """
    if not settings.retention_days:
        return {}
    old = await cuts.ends(settings, until=(now or time.time()) - settings.retention_days * DAY_S)
    client = connect(settings.redis)
    try:
        served = await folded(settings, await live_keys(client, settings.namespace))
    finally:
        await client.aclose()
    covered = Cut(
        {int(p): said["next"] for p, said in manifest.users.items()},
        min(manifest.rows["examples"], manifest.weights["window"]), 0, manifest.steps,
    )  # fmt: skip
    begin, topics = await cuts.begins(settings), topics_of(settings)
    until = {(topics.events, p): min(old.events[p], covered.events.get(p, 0), served.events[p]) for p in old.events}
    until[topics.examples, 0] = min(old.examples, covered.examples, served.examples)
    until[topics.steps, 0] = min(old.steps, covered.steps)
    had = {(topics.events, p): offset for p, offset in begin.events.items()}
    had |= {(topics.examples, 0): begin.examples, (topics.steps, 0): begin.steps}
    wanted = {place: offset for place, offset in until.items() if offset > had[place]}
    await _delete(settings, wanted)
    gone: dict[str, int] = {}
    for place, offset in wanted.items():
        gone[place[0]] = gone.get(place[0], 0) + offset - had[place]
    return gone


async def _delete(settings: Settings, until: Mapping[tuple[str, int], int]) -> None:
    if not until:
        return
    admin = AIOKafkaAdminClient(**client_options(settings.kafka))
    await admin.start()
    try:
        await admin.delete_records(
            {TopicPartition(*place): RecordsToDelete(before_offset=offset) for place, offset in until.items()}
        )
    finally:
        await admin.close()


async def folded(settings: Settings, keys: Keys) -> Cut:
    """Return what a generation still needs of the logs: from these offsets on."""
    client = connect(settings.redis)
    try:
        reads = await RedisUserStore(client, keys).read({p: [] for p in range(settings.partitions)})
        items, model = await ItemStore(client, keys).head(), await ModelStore(client, keys).head()
    finally:
        await client.aclose()
    return Cut(
        {p: read.applied for p, read in reads.items()}, min(int(items.get("next", 0)), window(model)),
        int(items.get("catalogue", 0)),
    )  # fmt: skip


async def refuse_behind_the_log(settings: Settings, number: int) -> None:
    """Raise RecoveryError where a generation needs records that retention has removed: it could not go on."""
    begin, needs = await cuts.begins(settings), await folded(settings, Keys(settings.namespace, number))
    short = [f"events[{p}] from {needs.events[p]}" for p, first in begin.events.items() if needs.events[p] < first]
    if needs.examples < begin.examples:
        short.append(f"examples from {needs.examples}")
    if short:
        raise RecoveryError(
            f"generation {number} needs {', '.join(short)}, which retention has removed: it cannot go on. Drop it:"
            f" `freshet generation drop {number}`."
            " `freshet rebuild --switch` makes one that can"
        )
