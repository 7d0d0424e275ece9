"""The learner's logged steps as a chain, and the weights learnt again along it.

Topic `steps` holds the steps of every generation that ever learnt. A step names its parent, and its identity follows
from its parent's and its own cut: two generations that share a past share its records, and where they part (a rebuild
while the old learner went on, Redis lost, a switch back) each goes on from its own. Weights follow one chain, from the
step that a head names back to the beginning, and no other's records.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from infra.settings import Settings
from streaming.recovery.compare import differences
from streaming.recovery.generations import RecoveryError
from streaming.state import Keys, ModelStore
from streaming.topics import read_span, topics_of
from streaming.trainer import LearntStore, State, StepRecord, Trainer
from streaming.training.versions import found_by_identity

Advance = Callable[[str, int, int], None]
Rows = dict[int, bytes]


class MemoryModel:
    """Learnt rows and head in this process: what weights are folded into, compared with and saved from."""

    def __init__(self, head: dict[str, bytes] | None = None, rows: Rows | None = None) -> None:
        self.kept, self.rows, self.keys = dict(head or {}), dict(rows or {}), Keys(generation=0)
        self.line = set[int]()
        """Identities of the steps that it was learnt along here."""

    async def load(self) -> tuple[dict[str, bytes], list[tuple[int, bytes]]]:
        """Return (head, rows)."""
        return dict(self.kept), list(self.rows.items())

    async def commit(
        self, *, expected: int, head: Mapping[str, Any], keys: Sequence[int], values: Sequence[bytes],
        gone: Iterable[int] = (),
    ) -> int | None:  # fmt: skip
        """Delete rows `gone`, write rows and head; None, or the kept offset where refused."""
        stored = int(self.kept.get("next", 0))
        if stored != expected:
            return stored
        for key in gone:
            self.rows.pop(key, None)
        self.rows.update(zip(keys, values, strict=True))
        self.kept |= {name: value if isinstance(value, bytes) else str(value).encode() for name, value in head.items()}
        return None

    async def publish_step(self, **_: Any) -> None:
        """Nobody reads a feed of it."""

    @property
    def step(self) -> int:
        """Number of its last step."""
        return int(self.kept.get("step", 0))

    @property
    def window(self) -> int:
        """First offset of `examples` that learning on needs: where the join window begins."""
        return window(self.kept)

    @property
    def identity(self) -> int:
        """Identity of its last step; 0 before the first."""
        return next((step.identity for step in last_step(self.kept)), 0)


def window(head: Mapping[str, bytes]) -> int:
    """Return the first offset of `examples` that the learner of this head needs to go on."""
    following, origin = int(head.get("next", 0)), head.get("window", b"")
    return min(following, msgspec.msgpack.decode(origin)[0]) if origin else following


def last_step(head: Mapping[str, bytes]) -> list[StepRecord]:
    """Return the step that a head was committed with, which `steps` may not hold yet; none before the first."""
    record = head.get("record", b"")
    return [msgspec.msgpack.decode(record, type=StepRecord)] if record else []


def chain(records: Iterable[StepRecord], head: int | None = None, base: int = 0) -> list[StepRecord] | None:
    """Return the steps after `base` (0: the beginning) up to `head` (None: the newest of all), oldest first.

    None where they are not one line: the head's past does not lead to the base. Repeats count once.
    """
    known: dict[int, tuple[StepRecord, int]] = {}
    legacy: dict[tuple[int, int], int] = {(0, 0): 0}
    newest = base
    for record in records:
        parent = record.before if record.v > 1 else legacy.get((record.parent, record.first), -1)
        known.setdefault(record.identity, (record, parent))
        legacy[record.step, record.next] = newest = record.identity
    at, line = newest if head is None else head, list[StepRecord]()
    while at != base:
        if at not in known:
            return None
        record, at = known[at]
        line.append(record)
    return line[::-1]


async def read_steps(settings: Settings, first: int, end: int, *, until: float = 0.0) -> list[StepRecord]:
    """Return the logged steps of [first, end), those written before `until` (s) where that is given."""
    found = []
    async for _, records in read_span(settings.kafka, topics_of(settings).steps, {0: (first, end)}):
        found += [
            msgspec.msgpack.decode(record.value, type=StepRecord)
            for record in records
            if not until or record.timestamp < until * 1000
        ]
    return found


class States:
    """The states that later steps of a line go back to, kept as they are passed; the last one pinned as well.

    One of before the line's beginning is taken from the version's file, where it is kept here.
    """

    def __init__(self, settings: Settings, steps: Sequence[StepRecord]) -> None:
        self._settings = settings
        numbers = {step.pin for step in [step for step in steps if step.pin >= 0][-1:]}
        self._wanted = {step.back for step in steps if step.returns} | {
            step.identity for step in steps if step.step in numbers
        }
        self._kept: dict[int, State] = {}

    async def keep(self, store: LearntStore, identity: int) -> None:
        """Keep what the store holds, where it is wanted later."""
        if identity in self._wanted:
            head, rows = await store.load()
            self._kept[identity] = State(dict(rows), head.get("dense", b""), identity)

    def find(self, identity: int) -> State | None:
        """Return a state, None where it is not to be had."""
        if identity not in self._kept and (found := found_by_identity(self._settings, identity)) is not None:
            self._kept[identity] = State(dict(zip(found.keys, found.rows, strict=True)), found.dense, identity)
        return self._kept.get(identity)

    def of(self, step: StepRecord) -> State | None:
        """Return what a step went back to, None where it did not; raises RecoveryError where that is not to be had."""
        if step.returns and self.find(step.back) is None:
            raise RecoveryError(
                f"step {step.step} of the weights ({step.note}) goes back to one that is neither after the snapshot"
                " nor among the versions of this data folder: begin from an older snapshot, bring back the file of the"
                " version, or `--no-weights`"
            )
        return self.find(step.back) if step.returns else None


async def follow(
    settings: Settings, store: LearntStore, steps: Sequence[StepRecord], advance: Advance,
    cluster: str = "", *, first: int = 0, states: States | None = None,
) -> Trainer:  # fmt: skip
    """Learn `examples` again along these steps, onto what the store holds: bit for bit on one CPU and torch build.

    `first` is the first offset that `examples` still has; raises RecoveryError where the join window needs an earlier.
    """
    states = states or States(settings, steps)
    trainer = Trainer(
        store=store, cluster=cluster, seed=settings.seed, most=settings.max_items, rewards=settings.rewards
    )
    await trainer.load()
    await states.keep(store, trainer.lineage)
    end = steps[-1].next if steps else 0
    offset = trainer.begin_refill()
    if offset < first:
        raise RecoveryError(
            f"the weights go on from examples@{offset}, which begins at {first} by now: use a newer snapshot, or"
            " `--no-weights`"
        )
    waiting: list[tuple[int, bytes]] = []
    at, refilled = 0, False
    if end > trainer.next:
        async for _, records in read_span(settings.kafka, topics_of(settings).examples, {0: (offset, end)}):
            for record in records:
                if record.offset < trainer.next and not refilled:
                    trainer.refill(record.offset, record.value or b"")
                    continue
                if not refilled:
                    trainer.end_refill()
                    refilled = True
                waiting.append((record.offset, record.value or b""))
            while at < len(steps) and waiting and waiting[-1][0] + 1 >= steps[at].next:
                count = steps[at].next - trainer.next
                trainer.retrace(waiting[:count], steps[at].sizes, steps[at].skipped)
                del waiting[:count]
                await trainer.step(steps[at], states.of(steps[at]))
                await states.keep(store, steps[at].identity)
                at += 1
                advance("weights", trainer.next, end)
                await asyncio.sleep(0)
    return trainer


async def pinned_difference(
    store: ModelStore, pin: int, line: Sequence[StepRecord], states: States
) -> tuple[list[str], list[str]]:
    """Name each row of the pinned version's copy that is not what its step left; and what could not be compared."""
    from models.model import Model
    from models.rows import Rows as Table

    state = states.find(next((step.identity for step in line if step.step == pin), 0))
    if state is None:
        return [], [f"the copy of version {pin}, which is pinned, was not compared: its step is not on this line"]
    model, keys = Model(rows=Table()), np.array(list(state.rows), np.uint64)
    model.load_rows(keys, list(state.rows.values()))
    wanted = dict(zip(state.rows, model.pack_rows(model.rows.find(keys)), strict=True))
    return differences(f"row of version {pin}", dict((await store.pinned(pin).load())[1]), wanted), []


def difference(stored: MemoryModel, learnt: MemoryModel) -> tuple[list[str], float]:
    """Name what differs beyond 1e-4 between two states of one step, and the largest difference of all that was found.

    Equal bytes are equal; another CPU or torch build sums in another order, so numbers may differ within 1e-4.
    """
    named, widest = [], 0.0
    for key in sorted(stored.rows.keys() | learnt.rows.keys()):
        a, b = stored.rows.get(key), learnt.rows.get(key)
        if a == b:
            continue
        if a is None or b is None:
            named.append(f"learnt row {key:016x}: {'missing in the store' if a is None else 'not in the log'}")
            continue
        distance = _distance(a, b)
        widest = max(widest, distance)
        if distance > 1e-4:
            named.append(f"learnt row {key:016x}: differs by up to {distance:.2g}")
    if stored.kept.get("dense") != learnt.kept.get("dense"):
        distance = _dense_distance(stored.kept.get("dense", b""), learnt.kept.get("dense", b""))
        widest = max(widest, distance)
        if distance > 1e-4:
            named.append(f"dense weights: differ by up to {distance:.2g}")
    named += [
        f"{name} of the weights: stored {stored.kept.get(name)!r}, learnt {learnt.kept.get(name)!r}"
        for name in ("next", "step", "marks")
        if stored.kept.get(name) != learnt.kept.get(name)
    ]
    return named, widest


def _distance(a: bytes, b: bytes) -> float:
    from models.factors import read_rows
    from models.model import STATE_FORM, STATE_ROW

    x, y = (read_rows([data], STATE_ROW, form=STATE_FORM) for data in (a, b))
    names = [name for name in x.dtype.names or () if x.dtype[name].base.kind == "f"]
    return max(_apart(x[name], y[name]) for name in names)


def _dense_distance(a: bytes, b: bytes) -> float:
    from models.factors import unpack_named

    x, y = unpack_named(a), unpack_named(b)
    if x.keys() != y.keys():
        return float("inf")
    return max((_apart(x[name], y[name]) for name in x), default=0.0)


def _apart(a: Any, b: Any) -> float:
    if isinstance(a, bytes | str):
        return 0.0 if a == b else float("inf")
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape:
        return float("inf")
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    apart = np.where(same, 0.0, np.abs(np.subtract(x, y, where=~same, out=np.zeros(x.shape))))
    return float(np.max(np.where(np.isnan(apart), np.inf, apart), initial=0.0))
