"""Rebuild: fold `events` and `examples` again, into a generation beside the one that is served, or to verify this one.

Profiles are a fold over `events`, item rows over `examples` (itself truth: its order across partitions exists nowhere
else), weights over `examples` along the logged steps, catalogue entries the last record of each item. The live path is
not touched: workers go on writing to what is served, and come over when the pointer moves. A log that was trimmed
begins from the newest snapshot that covers what is gone.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import msgspec

from infra.settings import Settings
from streaming.kafka.ground import REPARTITIONED, repartitioned, stamped
from streaming.recovery import cuts, lineage
from streaming.recovery.apart import Advance
from streaming.recovery.compare import first_differences
from streaming.recovery.cuts import Cut
from streaming.recovery.folding import Folding, folding, now
from streaming.recovery.generations import About, RecoveryError, finish, register
from streaming.recovery.generations import switch as switch_to
from streaming.recovery.lineage import MemoryModel
from streaming.recovery.snapshots import Manifest, base_for, check, find, load_weights
from streaming.state import ItemStore, Keys, ModelStore, Redis, RedisUserStore, connect, live_keys, read_metrics
from streaming.topics import Topics, end_offsets, epoch, moved, preflight, topics_of
from streaming.trainer import Trainer
from streaming.training.versions import carry, read_list

QUIET_S: Final = 4.0
"""A worker that appended no figures for so long does not run, s."""
TAIL_S: Final = 0.5
"""A round of catching up that takes no longer is the last before a switch, s."""
RebuildError = RecoveryError


@dataclass(slots=True)
class Report:
    """What a rebuild or a verification came to; `differing` names each profile, row and weight that differs.

    `seconds` is all of it, `fold_s` profiles and rows alone, written or compared, `weights_s` the weights alone.
    """

    generation: int
    events: int = 0
    entries: int = 0
    profiles: int = 0
    rows: int = 0
    catalogue: int = 0
    steps: int = 0
    seconds: float = 0.0
    fold_s: float = 0.0
    weights_s: float = 0.0
    base: str = ""
    switched: bool = False
    rederived: bool = False
    differing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the report with its rate, events a second in profiles and rows, for `--json`."""
        return {**asdict(self), "events_per_s": round(self.events / max(self.fold_s or self.seconds, 1e-9))}


async def rebuild(
    settings: Settings, *, advance: Advance, switch: bool = False, until: float = 0.0, weights: bool = True,
    snapshot: str | None = None,
) -> Report:  # fmt: skip
    """Fold the logs into the next generation; raises RecoveryError, TopicsError.

    `switch` then serves it. `until`, s since the epoch, leaves out what was written at or after that time. Without
    `weights` those of the served generation are copied as they are. `snapshot` is one to begin from, "" the newest.
    """
    if until and switch:
        raise RecoveryError(
            "--until with --switch: the workers would fold on from there to now. Build it, look at it, and drop it; or"
            " leave --until out"
        )
    topics, client = topics_of(settings), connect(settings.redis)
    try:
        began = time.monotonic()
        await preflight(settings.kafka, topics)
        ground, begin = await epoch(settings.kafka, topics), await cuts.begins(settings)
        await _refuse_repartitioned(client, settings, ground)
        cut, floor = (await cuts.ends(settings, until=until), {}) if until else await now(client, settings, ground)
        base = _chosen(settings, ground, begin, cut, snapshot)
        about = About(made=f"snapshot {base.name} and the logs since" if base else "the logs", until=until)
        stamp = stamped(ground, settings.codec)
        keys = await register(client, settings.namespace, about)
        report = Report(keys.generation, base=base.name if base else "")
        async with folding(settings, sum(cut.events.values()), advance) as halves:
            model = await _begin(settings, halves, base)
            await halves.to_one_cut(cut, floor)
            await halves.write(keys.generation, stamp)
            await _count(halves, report)
            report.fold_s = time.monotonic() - began
            served = ModelStore(client, await live_keys(client, settings.namespace))
            if weights:
                model = await _learn(settings, model, base, served, (begin, cut), until, advance, stamp, report)
            else:
                head, rows = await served.load()
                model = MemoryModel(head, dict(rows))
                model.line = {about.identity for about in await read_list(served)}
                report.notes.append(f"weights copied from the served generation as they are, at step {model.step}")
            carry(settings, served.keys, keys, model.line)
            if (pin := int(model.kept.get("pin", 0))) and not await _copy_pinned(served, ModelStore(client, keys), pin):
                model.kept["pin"] = b"0"
                report.notes.append(f"version {pin} is not pinned any more: no copy of it is served now")
            await write_model(client, settings, keys, model)
            report.weights_s = time.monotonic() - began - report.fold_s
            if switch:
                await _catch_up(halves, client, keys, ground, stamp)
        await finish(client, keys, about)
        if switch:
            await switch_to(client, settings.namespace, keys.generation, topics.partitions)
            report.switched = True
        report.seconds = time.monotonic() - began
        return report
    finally:
        await client.aclose()


async def _refuse_repartitioned(client: Redis, settings: Settings, ground: str) -> None:
    """Raise RecoveryError where users lie in the log by another number of partitions than it has now."""
    reads = await RedisUserStore(client, await live_keys(client, settings.namespace)).read({0: []})
    if (stored := reads[0].cluster) and repartitioned(stored, ground):
        raise RecoveryError(f"the served state is folded from {moved(stored, ground)}. {REPARTITIONED}")


def _chosen(settings: Settings, ground: str, begin: Cut, cut: Cut, snapshot: str | None) -> Manifest | None:
    """Return the snapshot to begin from: the one asked for, or one that is needed."""
    if snapshot is None:
        return base_for(settings, ground, begin, cut, eager=False)
    chosen = find(settings, snapshot)
    if difference := moved(chosen.ground, ground):
        raise RecoveryError(f"snapshot {chosen.name} is of another log: {difference}. Nothing was restored")
    if not chosen.covers(begin):
        raise RecoveryError(
            f"snapshot {chosen.name} ends before the logs begin: retention has removed what came between. Use a newer"
            " one: `freshet snapshot list`"
        )
    if not chosen.within(cut):
        raise RecoveryError(
            f"snapshot {chosen.name} holds more than the logs up to there: choose an older one"
            " (`freshet snapshot list`)"
        )
    return chosen


async def _begin(settings: Settings, halves: Folding, base: Manifest | None) -> MemoryModel:
    """Load the snapshot, if there is one, after every file of it was checked; return its weights."""
    if base is None:
        return MemoryModel()
    folder = check(settings, base)
    await halves.load(folder, msgspec.to_builtins(base))
    return load_weights(folder)


async def _count(halves: Folding, report: Report) -> None:
    report.events, report.entries = halves.users.folded, halves.users.applied
    report.profiles = halves.users.count()
    report.rows, report.catalogue = await halves.items.call("count")
    report.notes += halves.lost + halves.users.notes() + await halves.items.call("notes")


async def _learn(
    settings: Settings, model: MemoryModel, base: Manifest | None, served: ModelStore, logs: tuple[Cut, Cut],
    until: float, advance: Advance, ground: str, report: Report,
) -> MemoryModel:  # fmt: skip
    """Learn on from `model` along the steps that were logged since: those of the served weights, else the newest."""
    begin, cut = logs
    steps = await lineage.read_steps(settings, max(base.steps if base else 0, begin.steps), cut.steps, until=until)
    last = lineage.last_step(await served.head())
    line = lineage.chain([*steps, *last], last[0].identity, model.identity) if last and not until else None
    if line is None:
        line = lineage.chain(steps, None, model.identity)
    if line is None:
        report.notes.append(f"weights left at step {model.step}: the later steps in `steps` do not go back to it")
        line = []
    await lineage.follow(settings, model, line, advance, ground, first=begin.examples)
    model.line = {step.identity for step in line} | {step.back for step in line}
    report.steps = model.step
    return model


async def _copy_pinned(served: ModelStore, to: ModelStore, pin: int) -> bool:
    """Copy what serving needs of a pinned version into another generation; False where there is none."""
    head, rows = await served.pinned(pin).load()
    if head.get("next") != b"1":
        return False
    for first in range(0, max(1, len(rows)), 1000):
        chunk, last = rows[first : first + 1000], first + 1000 >= len(rows)
        parts = {"keys": [key for key, _ in chunk], "values": [value for _, value in chunk]}
        await to.pinned(pin).commit(expected=0, head=head if last else {"next": b"0"}, **parts)  # type: ignore[arg-type]
    return True


async def _catch_up(halves: Folding, client: Redis, keys: Keys, ground: str, stamp: str) -> None:
    """Fold and write what came meanwhile, until that takes no time: the new generation is served without a lag."""
    for _ in range(10):
        began = time.monotonic()
        cut, _ = await now(client, halves.settings, ground)
        await halves.to_one_cut(cut, {})
        await halves.write(keys.generation, stamp)
        if time.monotonic() - began < TAIL_S:
            return


async def write_model(client: Redis, settings: Settings, keys: Keys, model: MemoryModel) -> None:
    """Write weights into a generation that has none, the head last, with its epoch in the form of the codec."""
    if not model.kept:
        return
    kept = dict(model.kept)
    if "cluster" in kept:  # weights that are copied, or a snapshot's, were stamped by whoever learnt them
        kept["cluster"] = stamped(kept["cluster"].decode(), settings.codec).encode()
    store, rows = ModelStore(client, keys, settings.feed_mb << 20), list(model.rows.items())
    for first in range(0, max(1, len(rows)), 1000):
        chunk, last = rows[first : first + 1000], first + 1000 >= len(rows)
        head = kept if last else {"next": b"0"}
        await store.commit(expected=0, head=head, keys=[k for k, _ in chunk], values=[v for _, v in chunk])


async def verify(settings: Settings, *, advance: Advance, weights: bool = True, rederive: bool = False) -> Report:
    """Fold the logs to where the served state says it is and compare every profile, row and entry byte for byte.

    With `weights` those too, learnt again along their logged steps: bit for bit, on another CPU within 1e-4. With
    `rederive` every entry of `examples` too, with what folding `events` derives. While workers run: RecoveryError.
    """
    topics, client = topics_of(settings), connect(settings.redis)
    try:
        await preflight(settings.kafka, topics)
        await refuse_while_workers_run(settings)
        keys, began = await live_keys(client, settings.namespace), time.monotonic()
        ground, begin = await epoch(settings.kafka, topics), await cuts.begins(settings)
        cut = await stored_cut(settings, keys)
        _refuse_ahead(cut, await cuts.ends(settings))
        base = base_for(settings, ground, begin, cut, eager=False)
        report = Report(keys.generation, base=base.name if base else "")
        async with folding(settings, sum(cut.events.values()), advance, rederive=rederive) as halves:
            await halves.items.call("skip_faults", keys.generation)
            model = await _begin(settings, halves, base)
            await halves.apart(cut)
            report.differing += await halves.compare(keys.generation)
            await _count(halves, report)
            if rederive:
                report.differing += first_differences(await halves.items.call("kept"), halves.users.derived())
                report.rederived = True
            report.fold_s = time.monotonic() - began
        if weights:
            found = await _compare_weights(
                settings, ModelStore(client, keys), model, base, (begin, cut), advance, report
            )
            report.differing += found
            report.weights_s = time.monotonic() - began - report.fold_s
        else:
            report.notes.append("weights were not compared")
        report.seconds = time.monotonic() - began
        return report
    finally:
        await client.aclose()


async def stored_cut(settings: Settings, keys: Keys) -> Cut:
    """Return how far a generation is folded."""
    client = connect(settings.redis)
    try:
        reads = await RedisUserStore(client, keys).read({p: [] for p in range(settings.partitions)})
        head = await ItemStore(client, keys).head()
    finally:
        await client.aclose()
    events = {p: read.applied for p, read in reads.items()}
    return Cut(events, int(head.get("next", 0)), int(head.get("catalogue", 0)))


def _refuse_ahead(stored: Cut, end: Cut) -> None:
    """Raise RecoveryError where state is folded further than the logs go: there is nothing to compare it with."""
    ahead = [
        f"events[{p}] ends at {end.events[p]}, folded to {at}" for p, at in stored.events.items() if at > end.events[p]
    ]
    if stored.examples > end.examples:
        ahead.append(f"examples ends at {end.examples}, folded to {stored.examples}")
    if stored.items > end.items:
        ahead.append(f"items ends at {end.items}, folded to {stored.items}")
    if ahead:
        raise RecoveryError(
            f"the served state is ahead of the log ({'; '.join(ahead)}): the log lost its end, or this is another one."
            " Bring that log back; or `freshet rebuild --switch` folds what is left of it"
        )


async def _compare_weights(
    settings: Settings, store: ModelStore, model: MemoryModel, base: Manifest | None, logs: tuple[Cut, Cut],
    advance: Advance, report: Report,
) -> list[str]:  # fmt: skip
    begin, _ = logs
    head, rows = await store.load()
    stored = MemoryModel(head, dict(rows))
    end = (await cuts.ends(settings)).steps  # after the load: a learner that still catches up goes on meanwhile
    steps = await lineage.read_steps(settings, max(base.steps if base else 0, begin.steps), end)
    line = lineage.chain([*steps, *lineage.last_step(head)], stored.identity, model.identity)
    if line is None:
        return [f"weights: step {stored.step} does not go back to {f'step {model.step}' if base else 'the beginning'}"
                " along topic `steps`"]  # fmt: skip
    states, ground = lineage.States(settings, line), head.get("cluster", b"").decode()
    await lineage.follow(settings, model, line, advance, ground, first=begin.examples, states=states)
    report.steps = model.step
    named, widest = lineage.difference(stored, model)
    if pin := int(head.get("pin", 0)):
        found, note = await lineage.pinned_difference(store, pin, line, states)
        named, report.notes = named + found, report.notes + note
    if widest and not named:
        report.notes.append(f"weights equal within {widest:.1g}, not bit for bit: another CPU or torch build")
    return named


async def fold_weights(settings: Settings, store: ModelStore, advance: Advance, cluster: str = "") -> Trainer:
    """Learn `examples` again into an empty store along the newest line of logged steps.

    What came after the last logged step is left to the learner.
    """
    steps = await lineage.read_steps(settings, 0, (await cuts.ends(settings)).steps)
    return await lineage.follow(settings, store, lineage.chain(steps) or [], advance, cluster)


async def refuse_while_workers_run(settings: Settings) -> None:
    """Raise RecoveryError while a worker writes: each appends its figures to its learning curve every second."""
    client = connect(settings.redis)
    try:
        keys = await live_keys(client, settings.namespace)
        deadline = time.monotonic() + QUIET_S
        while True:
            running = [role for role in ("users", "items") if await _age_s(client, keys.metrics(role)) < QUIET_S]
            if not running:
                return
            if time.monotonic() > deadline:
                raise RecoveryError(
                    f"the workers of namespace {settings.namespace!r} still run and write ({', '.join(running)}): end"
                    " `freshet up` (Ctrl-C) and call this again, it starts what it needs; on your own servers stop"
                    " the workers only"
                )
            await asyncio.sleep(0.3)
    finally:
        await client.aclose()


async def _age_s(client: Redis, curve: str) -> float:
    """Seconds, by Redis's own clock, since a process appended to its curve; infinite where none ever did."""
    points = await read_metrics(client, curve, count=1)
    seconds, micros = await client.time()
    return seconds + micros / 1e6 - int(points[0][0].split("-")[0]) / 1000 if points else float("inf")


async def log_ends(kafka: str, topics: Topics) -> dict[tuple[str, int], int]:
    """Return the end of each partition of the log, `examples` and `items`."""
    ends = await end_offsets(kafka, {topics.events: topics.partitions, topics.examples: 1, topics.items: 1})
    return {(topic, partition): end for topic, found in ends.items() for partition, end in enumerate(found)}
