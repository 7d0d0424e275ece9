"""The learner by hand on a walk with slates, on real Kafka and Redis: steps, versions, controls when the test says so.

Trainer, versions, stores and log are the product's; only the process around them is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from infra.settings import Settings
from models.features import F
from models.learner import Learner
from streaming.recovery.cuts import ends
from streaming.recovery.lineage import MemoryModel, chain, difference, follow, last_step, pinned_difference, read_steps
from streaming.recovery.lineage import States as States
from streaming.state import Keys, ModelStore, connect
from streaming.topics import Log, read_span, topics_of
from streaming.trainer import StepRecord, Trainer
from streaming.training.controls import Control, record_of
from streaming.training.versions import Version, Versions, home
from tests.entries import Walk, cuts

RECORDS = [
    part.to_bytes() for part in cuts(Walk(n=1200, users=20, width=F, pace=60.0).entries(), list(range(7, 1200, 7)))
]


def rows_of(learner: Learner) -> dict[int, bytes]:
    """Return the packed state of every row."""
    rows = np.arange(learner.rows.n)
    return dict(zip(learner.rows.keys[rows].tolist(), learner.pack_state(rows), strict=True))


class ByWalk:
    """A learner that learns some more of RECORDS, steps, makes a version or is told something; then checked."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.topics, self.at = settings, topics_of(settings), 0
        self.client, self.log = connect(settings.redis), Log(settings.kafka)
        self.store = ModelStore(self.client, Keys(settings.namespace))
        self.steps: list[StepRecord] = []

    async def __aenter__(self) -> ByWalk:
        await self.log.start()
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.log.stop()
        await self.client.aclose()

    @property
    def folder(self) -> Path:
        """Where the versions lie."""
        return home(self.settings, self.store.keys)

    async def start(self) -> None:
        """Be a process that has just started: load, refill the join window."""
        self.versions = Versions(self.folder, self.store)
        self.trainer = Trainer(store=self.store, cluster="c", seed=self.settings.seed, versions=self.versions)
        await self.trainer.load()
        for offset, value in await self._span(self.trainer.begin_refill(), self.trainer.next):
            self.trainer.refill(offset, value)
        self.trainer.end_refill()

    async def _span(self, first: int, end: int) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []
        async for _, records in read_span(self.settings.kafka, self.topics.examples, {0: (first, end)}):
            found += [(record.offset, record.value) for record in records]
        return found

    async def learn(self, count: int = 20, *controls: Control) -> list[StepRecord]:
        """Append so many records, then these controls; learn and commit all there is. Returns the new steps."""
        values = [*RECORDS[self.at : self.at + count], *map(record_of, controls)]
        self.at += count
        await self.log.append(self.topics.examples, [(0, None, value) for value in values])
        return await self.go_on()

    async def go_on(self) -> list[StepRecord]:
        """Learn and commit what is in the log."""
        before = len(self.steps)
        records = await self._span(self.trainer.next, (await ends(self.settings)).examples)
        while records:
            self.trainer.learn(records)
            while (record := await self.trainer.step()) is not None:
                self.steps.append(record)
                await self.log.append(self.topics.steps, [(0, None, self.trainer.last_record)])
                await self.trainer.publish(record)
            records = [(offset, value) for offset, value in records if offset >= self.trainer.next]
        return self.steps[before:]

    async def version(self, now: float = 1.0) -> Version:
        """Publish a version of the last step."""
        about = await self.versions.publish(self.trainer.checkpoint(now), lambda: self.trainer.pin)
        self.trainer.published(about)
        return about

    async def retraced(self) -> MemoryModel:
        """Learn the log again along its steps; what is stored must be that, bit for bit, the pinned copy too."""
        head, rows = await self.store.load()
        steps = await read_steps(self.settings, 0, (await ends(self.settings)).steps)
        line, again = chain([*steps, *last_step(head)], MemoryModel(head).identity), MemoryModel()
        assert line is not None
        states = States(self.settings, line)
        await follow(self.settings, again, line, lambda *_: None, "c", states=states)
        assert difference(MemoryModel(head, dict(rows)), again) == ([], 0.0)
        assert again.rows == dict(rows)
        assert again.kept["dense"] == head["dense"]
        if pin := int(head.get("pin", 0)):
            assert await pinned_difference(self.store, pin, line, states) == ([], [])
        return again

    async def write_row(self, name: str, value: float, *, key: int | None = None) -> int:
        """Write a number into a learnt row in Redis, of the item most often met; return the item's hash."""
        from models.model import STATE_ROW

        rows, size = dict((await self.store.load())[1]), STATE_ROW.itemsize
        chosen = key or max(rows, key=lambda k: float(np.frombuffer(rows[k][:size], STATE_ROW)["weights"][0, -1]))
        row: Any = np.frombuffer(rows[chosen][:size], STATE_ROW).copy()
        row[name] = value
        await self.client.hset(
            self.store.keys.model_rows(chosen & 255), chosen.to_bytes(8, "little"), row.tobytes() + rows[chosen][size:]
        )
        return chosen
