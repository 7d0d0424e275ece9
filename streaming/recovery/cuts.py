"""Where the logs begin, end, and stood at a time; knows nothing of what their records mean.

A *cut* says how far each log is folded. The one cut that a state may be served from: item rows to an offset of
`examples`, profiles to exactly the events that `examples` covers up to there. Were profiles ahead, the entries of the
events between would never be derived, and the next record would leave a hole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from infra.settings import Settings
from streaming.topics import client_options, topics_of

Place = tuple[str, int]


@dataclass(slots=True)
class Cut:
    """Offsets that are folded up to, not including: `events` by partition; one partition each of the others."""

    events: dict[int, int] = field(default_factory=dict)
    examples: int = 0
    items: int = 0
    steps: int = 0


async def _ask(settings: Settings, ask: Any) -> Any:
    consumer = AIOKafkaConsumer(**client_options(settings.kafka))
    await consumer.start()
    try:
        return await ask(consumer, _places(settings))
    finally:
        await consumer.stop()


def _places(settings: Settings) -> list[TopicPartition]:
    topics = topics_of(settings)
    return [TopicPartition(topics.events, p) for p in range(topics.partitions)] + [
        TopicPartition(name, 0) for name in (topics.examples, topics.items, topics.steps)
    ]


def _cut(settings: Settings, found: Mapping[Any, int]) -> Cut:
    topics = topics_of(settings)
    return Cut(
        {p: found[TopicPartition(topics.events, p)] for p in range(topics.partitions)},
        *(found[TopicPartition(name, 0)] for name in (topics.examples, topics.items, topics.steps)),
    )


async def ends(settings: Settings, *, until: float = 0.0) -> Cut:
    """Return where the logs end, or with `until` (s since the epoch) the first records written at or after then."""

    async def ask(consumer: AIOKafkaConsumer, places: list[TopicPartition]) -> dict[TopicPartition, int]:
        found: dict[TopicPartition, int] = await consumer.end_offsets(places)
        if until:
            at = await consumer.offsets_for_times(dict.fromkeys(places, round(until * 1000)))
            found.update({tp: where.offset for tp, where in at.items() if where is not None})
        return found

    return _cut(settings, await _ask(settings, ask))


async def begins(settings: Settings) -> Cut:
    """Return the first offset that each log still has: above 0 where retention removed what was before."""

    async def ask(consumer: AIOKafkaConsumer, places: list[TopicPartition]) -> dict[TopicPartition, int]:
        found: dict[TopicPartition, int] = await consumer.beginning_offsets(places)
        return found

    return _cut(settings, await _ask(settings, ask))
