"""The learner between `examples` and the store: learns in micro-batches, commits steps, refuses bad ones, obeys.

A step is one transaction: changed rows with optimiser state, dense weights, next offset (DESIGN section 3, rule 8).
After any crash it goes on exactly: state and position come from one commit, the join window is filled again from the
records that the oldest held slate came with. What it does beside learning is a step of its own that learns nothing: a
control record obeyed at its offset, a step refused by the guard, whose records then passed through the join window
only. Each says in its record where the weights came from, so a recomputation along the log needs no judgement.
How learning works is in models/learner.py; the process around this in streaming/training/process.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import msgspec
import numpy as np

from infra.telemetry import EXIT_AGAIN, EXIT_FOR_GOOD
from models.bandit import RewardTable
from models.examples import CodecError, Entries, HoleError, accept, concatenate
from models.factors import sound, unpack_named
from models.learner import Learned, Learner
from models.model import STATE_FORM, STATE_ROW, Model
from models.motion import Motion
from models.rows import LEARNT, Rows
from models.window import Origin
from streaming.kafka.ground import HOLE
from streaming.state import Fault, Keys, StoredBytesError, persist
from streaming.supervision import TRIES
from streaming.training.controls import VERBS, Control, control_in
from streaming.training.guard import Guard, means, unsound
from streaming.training.steps import StepRecord as StepRecord
from streaming.training.versions import EVERY_EXAMPLES, EVERY_S, PIECE, Checkpoint, Version, VersionError, Versions

log = logging.getLogger(__name__)

MICRO_BATCH: Final = 64
NOTES: Final = 16
"""Steps that learnt nothing which the head tells of."""


class TrainerError(RuntimeError):
    """The learner cannot go on; `status` says whether starting again helps."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        super().__init__(reason)


class LearntStore(Protocol):
    """What a learner loads from and commits to: a ModelStore, or its like in memory."""

    keys: Keys

    async def load(self) -> tuple[dict[str, bytes], list[tuple[int, bytes]]]:
        """Return (head, rows) of one moment."""

    async def commit(
        self, *, expected: int, head: Mapping[str, Any], keys: Sequence[int], values: Sequence[bytes],
        gone: Iterable[int] = (),
    ) -> int | None:  # fmt: skip
        """Delete rows `gone`, write rows and head; None, or the stored offset where it was refused."""

    async def publish_step(
        self, *, step: int, first: int, following: int, keys: Sequence[int], vectors: Sequence[bytes], dense: bytes,
        gone: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Tell readers of a step."""


class State(NamedTuple):
    """What a step left: packed rows by item hash, the learner's dense state, and the step's identity."""

    rows: Mapping[int, bytes]
    dense: bytes
    identity: int = 0


class Told(NamedTuple):
    """What serving is told of a step: vectors of these items, those it is to forget, weights; `step` names them.

    Without weights: the learner's own, of these items.
    """

    keys: Sequence[int]
    vectors: Sequence[bytes]
    gone: Sequence[int]
    dense: bytes
    step: int


class LearningError(RuntimeError):
    """Learning the records [first, next) raised: what is in memory may be half changed and must be thrown away."""

    def __init__(self, first: int, following: int, cause: BaseException) -> None:
        self.first, self.next = first, following
        super().__init__(f"examples@{first}..{following - 1}: {type(cause).__name__}: {cause}")


class Trainer:
    """A learner between `examples` and the store: position, marks, the step under way.

    learn(records) any number of times, then step() commits what they changed; load() at the start. Without `versions`
    none are kept: there is nothing to go back to but the parent, and controls are not obeyed.
    """

    def __init__(
        self, *, store: LearntStore, cluster: str = "", seed: int = 1, most: int = 1_000_000,
        versions: Versions | None = None, rewards: RewardTable = (),
    ) -> None:  # fmt: skip
        self._store, self._cluster, self._seed, self._most, self._versions = store, cluster, seed, most, versions
        self._rewards = rewards
        self.learner = Learner(rows=Rows(), seed=seed, rewards=rewards)
        self.marks: dict[int, int] = {}
        self.next = self.committed = self.steps = 0
        self.window: Origin | None = None
        self.last_record = self.last_value = b""
        self.totals, self.done, self.since = Learned(), Learned(), Learned()
        """What was learnt since the last step, in the last step, since the last version."""
        self.skip: set[int] = set()
        """Offsets of records that are not learnt."""
        self.careful: list[tuple[int, int]] = []
        """Ranges [first, next) whose records are learnt one by one, to find the one that raises."""
        self.control: Control | None = None
        """The control in the record at `next`; nothing is learnt before `step` has obeyed it."""
        self.pin = self.parent = self.turned = self.refused = 0
        """Versions pinned and learnt on from; the step that last went back; steps refused."""
        self.made, self.asked = 0.0, False
        self.guard, self.suspicion = Guard(), ""
        self.motion, self.moved = Motion(), dict[str, float]()
        self.notes: list[dict[str, Any]] = []
        self._sizes: list[int] = []
        self._step_seed = self._unpinned = 0

    async def load(self) -> None:
        """Read the last committed step, with the epoch of its log; raises StoredBytesError."""
        head, rows = await self._store.load()
        self.stored_epoch = head.get("cluster", b"").decode()
        self.learner = Learner(rows=Rows(), seed=self._seed, rewards=self._rewards)
        names = self._store.keys
        keys, values = [key for key, _ in rows], [value for _, value in rows]
        _, _, bad = sound(keys, values, STATE_ROW, form=STATE_FORM)
        if bad:
            bucket = int(bad[0].split()[2].rstrip(":"), 16) & 0xFF
            raise StoredBytesError(names.model_rows(bucket), f"{bad[0]} ({len(bad)} such)")
        try:
            self._load_head(head)
            if self._versions is not None:
                await self._load_versions(self._versions)
            self.suspicion = unsound(values, head.get("dense", b""))
            if self.suspicion and (self._versions is None or not self._versions.kept):
                raise StoredBytesError(names.model_head, f"{self.suspicion}, and there is no version to go back to")
            if self.suspicion:  # what is learnt from here on is thrown away by the next step, which goes back
                log.error("weights: in Redis, %s: the next step goes back to a version", self.suspicion)
                self.learner.stream_time = float(unpack_named(head["dense"])["stream_time"])
                return
            if rows:
                self.learner.load_state(np.array(keys, np.uint64), values)
            if "dense" in head:
                self.learner.load_dense(head["dense"])
        except (CodecError, ValueError, KeyError, msgspec.MsgspecError) as error:
            raise StoredBytesError(names.model_head, f"its fields are not those of a head ({error})") from error

    def _load_head(self, head: Mapping[str, bytes]) -> None:
        self.marks = msgspec.json.decode(head.get("marks", b"{}"), type=dict[int, int])
        self.next = self.committed = int(head.get("next", 0))
        self.window = _unpack_origin(head.get("window", b""))
        self.last_record = head.get("record", b"")
        self.steps, self.pin, self.parent, self.turned, self.refused = (
            int(head.get(name, 0)) for name in ("step", "pin", "version", "turned", "refused")
        )
        self.notes = msgspec.json.decode(head.get("notes", b"[]"), type=list[dict[str, Any]])
        _ = self.lineage

    async def _load_versions(self, versions: Versions) -> None:
        await persist("versions", lambda: versions.load(self.steps, self.pin))
        for about in versions.kept:
            self.made = about.made
            self.guard.accept(about.metrics)
            self.parent = about.version if about.version > self.turned else self.parent

    def suspect(self, faults: Mapping[int, Fault]) -> None:
        """Take over what raised before: records to skip, and ranges to be careful with."""
        single = {first for first, fault in faults.items() if fault.next == first + 1}
        self.skip = {first for first in single if faults[first].count >= TRIES}
        self.careful = [(first, fault.next) for first, fault in faults.items() if first not in self.skip]

    def begin_refill(self) -> int:
        """Return the offset from which `refill` wants records; `next` where the window was empty."""
        if self.window is None:
            return self.next
        self._resumed = (self.learner.stream_time, dict(self.marks))
        self.learner.stream_time, self.marks = self.window.time, dict(self.window.marks)
        return self.window.offset

    def refill(self, offset: int, value: bytes) -> None:
        """Let a record below `next` pass through the join window only."""
        origin = self._origin(offset)
        entries = self._accept(offset, value)
        if entries is not None and control_in(entries) is None:
            self.learner.refill(entries, origin)

    def end_refill(self) -> None:
        """Go on from the committed position."""
        if self.window is not None:
            self.learner.stream_time, self.marks = self._resumed

    def learn(self, records: Sequence[tuple[int, bytes]]) -> None:
        """Learn records (offset, value) of `examples`, in order, as micro-batches of at most 64 entries.

        Stops before a control record, which then is in `control`: what follows must be given again after `step`.
        Raises LearningError where learning itself fails, TrainerError at a gap.
        """
        fresh = [(offset, value) for offset, value in records if offset >= self.next]
        at = 0
        while at < len(fresh) and self.control is None:
            last = at + 1
            while last < len(fresh) and not (self._suspect(fresh[at][0]) or self._suspect(fresh[last][0])):
                last += 1
            first = self.next
            try:
                self._learn_together(fresh[at:last])
            except TrainerError:
                raise
            except Exception as error:
                raise LearningError(first, self.next, error) from error
            at = last

    def _suspect(self, offset: int) -> bool:
        return any(first <= offset < following for first, following in self.careful)

    def _learn_together(self, records: Sequence[tuple[int, bytes]]) -> None:
        parts: list[Entries] = []
        origin = self._origin(self.next)
        for offset, value in records:
            if offset > self.next:
                raise TrainerError(EXIT_AGAIN, f"examples: expected offset {self.next}, got {offset}")
            self.last_value = value
            entries = self._accept(offset, value)
            if entries is not None and (control := control_in(entries)) is not None:
                self.control = control
                break
            self.next = offset + 1
            if entries is not None and len(entries):
                parts.append(entries)
        if parts:
            self._micro_batches(concatenate(parts), origin)

    def _micro_batches(self, entries: Entries, origin: Origin) -> None:
        for first in range(0, len(entries), MICRO_BATCH):
            self._learn(entries.slice(first, min(first + MICRO_BATCH, len(entries)), []), origin)

    def _learn(self, part: Entries, origin: Origin) -> None:
        if not self._sizes:
            self._step_seed = self.learner.step_seed(part)
        self._sizes.append(len(part))
        _add(self.totals, self.learner.learn(part, origin))

    def retrace(self, records: Sequence[tuple[int, bytes]], sizes: Sequence[int], skipped: Sequence[int] = ()) -> None:
        """Learn the records of one logged step, cut as they were cut then; `step` commits it.

        Without sizes nothing was learnt: they pass through the join window.
        """
        origin, parts = self._origin(self.next), []
        self.skip.update(skipped)
        for offset, value in records:
            entries = self._accept(offset, value)
            self.next = offset + 1
            if entries is None or not len(entries) or control_in(entries) is not None:
                continue
            if not sizes:
                self.learner.refill(entries, origin)
            parts.append(entries)
        if not parts or not sizes:
            return
        at, whole = 0, concatenate(parts)
        for size in sizes:
            self._learn(whole.slice(at, at + size, []), origin)
            at += size

    def _origin(self, offset: int) -> Origin:
        return Origin(offset, self.learner.stream_time, tuple(sorted(self.marks.items())))

    def _accept(self, offset: int, value: bytes) -> Entries | None:
        """Decode a record and drop what was learnt before; None where the item agent has dead-lettered it."""
        try:
            entries = accept(Entries.from_bytes(value), self.marks)
            return entries if offset not in self.skip else None
        except CodecError as error:
            log.warning("examples@%d skipped: %s", offset, error)
            return None
        except HoleError as error:
            raise TrainerError(EXIT_FOR_GOOD, f"{error}: examples lost records. {HOLE}") from error

    async def step(self, logged: StepRecord | None = None, state: State | None = None) -> StepRecord | None:
        """Commit everything since the last step in one transaction; None where nothing came. Raises TrainerError.

        A control that waits is obeyed by a step of its own, after that one. `logged` is the step as it was logged,
        where it is taken again: the lineage goes on from that very record; `state` is what it went back to.
        """
        if self.next == self.committed:
            return None if self.control is None or logged is not None else await self._obey(self.control)
        self.done, self.totals = self.totals, Learned()
        if logged is not None and state is not None:
            return await self._commit(logged, *await self._become(state))
        learner = self.learner
        learner.model.step = self.steps + 1
        gone = learner.let_go(learner.excess(self._most) if logged is None else logged.gone).tolist()
        rows = learner.take_changed()
        values = learner.pack_state(rows)
        dense = learner.dense_state() if logged is None else b""
        if logged is None and (refusal := await self._refuse(values, dense)) is not None:
            return refusal
        _add(self.since, self.done)
        self.moved = self.motion.step(learner, rows, self.done) if logged is None else {}
        record = logged or self._record(
            sizes=self._sizes, seed=self._step_seed, gone=len(gone),
            skipped=sorted(offset for offset in self.skip if self.committed <= offset < self.next),
        )  # fmt: skip
        return await self._commit(record, learner.rows.keys[rows].tolist(), values, gone, dense=dense)

    def _record(self, *, sizes: list[int], **more: Any) -> StepRecord:
        return StepRecord(
            self.steps + 1, self.steps, self.committed, self.next, sizes, more.pop("seed", 0), v=3,
            before=self.lineage, generation=self._store.keys.generation, **more,
        )  # fmt: skip

    async def _commit(
        self, record: StepRecord, keys: Sequence[int], values: Sequence[bytes], gone: Sequence[int],
        told: Told | None = None, dense: bytes = b"",
    ) -> StepRecord:  # fmt: skip
        """Write rows and head; `told` is what serving is to hear, by default these rows, or nothing while pinned.

        dense: the learner's dense state where it was packed for this step already.
        """
        learner = self.learner
        learner.model.step = record.step
        self.last_record = msgspec.msgpack.encode(record)
        if record.note:
            self.refused += record.note.startswith("refused")
            self.notes = [*self.notes, {n: getattr(record, n) for n in ("step", "first", "next", "note")}][-NOTES:]
        self.turned = record.step if record.returns else self.turned
        if record.pin >= 0:
            self._unpinned, self.pin = self.pin, record.pin
        head = {
            "next": str(self.next), "step": str(record.step), "dense": dense or learner.dense_state(),
            "marks": msgspec.json.encode({str(p): o for p, o in sorted(self.marks.items())}),
            "window": _pack_origin(learner.window_origin()), "record": self.last_record, "cluster": self._cluster,
            "pin": str(self.pin), "version": str(self.parent), "turned": str(self.turned), "refused": str(self.refused),
            "notes": msgspec.json.encode(self.notes),
        }  # fmt: skip
        stored = await persist(
            "commit",
            lambda: self._store.commit(expected=self.committed, head=head, keys=keys, values=values, gone=gone),
        )
        if stored is not None and stored != self.next:
            raise TrainerError(
                EXIT_AGAIN, f"weights: expected offset {self.committed} in Redis, found {stored}: a rollback or a twin"
            )
        self.committed, self.steps, self._sizes = self.next, record.step, []
        self._told = told or Told(keys, (), gone, b"", record.step)
        return record

    async def publish(self, record: StepRecord) -> None:
        """Feed serving with the step's rows and weights; while a version is pinned only with its position."""
        keys, vectors, gone, dense, step = self._told
        if not dense and self.pin:
            keys, gone, step = (), (), self.pin
        elif not dense:
            model = self.learner.model
            vectors = model.pack_rows(model.rows.find(np.array(keys, np.uint64)))
            dense = model.dense_bytes()
        await persist(
            "feed",
            lambda: self._store.publish_step(
                step=step, first=record.first, following=record.next, keys=keys, vectors=vectors, dense=dense, gone=gone
            ),
        )
        if self._unpinned and (versions := self._versions) is not None:
            await persist("pin", lambda: versions.drop_copy(self._unpinned))
            self._unpinned = 0

    # -- going back ---------------------------------------------------------------------------------------------------

    async def _become(self, state: State) -> tuple[list[int], list[bytes], list[int]]:
        """Take the weights and optimiser of a state; return what its rows change in the store: keys, values, gone.

        The join window stays: it follows from the log, not from the weights.
        """
        learner = Learner(rows=Rows(), seed=self._seed, rewards=self._rewards)
        if state.rows:
            learner.load_state(np.array(list(state.rows), np.uint64), list(state.rows.values()))
        if state.dense:
            learner.load_dense(state.dense)
        learner.take_over(self.learner)
        self.learner, self.totals, self._sizes = learner, Learned(), []
        _, rows = await persist("load", self._store.load)
        stored = dict(rows)
        changed = [key for key, value in state.rows.items() if stored.get(key) != value]
        return changed, [state.rows[key] for key in changed], sorted(stored.keys() - state.rows.keys())

    async def _refuse(self, values: Sequence[bytes], dense: bytes) -> StepRecord | None:
        """Throw away what was learnt since the last step, where it is not fit to be served; None where it is.

        Values that are not finite: back to the parent, unless what Redis holds of it is not finite either. Losses
        beyond the bound, which tell of weights that were served already: back to the last good version.
        """
        parent = unsound(values, dense) if not self.suspicion else ""
        reason = self.suspicion or parent or self.guard.judge(self.done)
        if not reason:
            return None
        state = await self._parent() if parent else None
        if state is None and (state := await self._last_version()) is None:
            if self.suspicion or parent:
                raise TrainerError(
                    EXIT_FOR_GOOD, f"weights: {reason}, and there is no version to go back to. Next: `freshet rebuild"
                    " --switch` learns them again",
                )  # fmt: skip
            self.guard.begin()
            return None
        where = "the step before" if state.identity == self.lineage else f"version {self.parent}"
        log.error("examples@%d..%d refused: %s. Back to %s", self.committed, self.next - 1, reason, where)
        self.guard.begin(tried=state.identity != self.lineage)
        self.suspicion = ""
        changes = await self._become(state)
        record = self._record(sizes=[], back=state.identity, note=f"refused: {reason}. Back to {where}")
        return await self._commit(record, *changes)

    async def _parent(self) -> State | None:
        head, rows = await persist("load", self._store.load)
        dense = head.get("dense", b"")
        return None if unsound([value for _, value in rows], dense) else State(dict(rows), dense, self.lineage)

    async def _last_version(self) -> State | None:
        for about in reversed(self._versions.kept if self._versions is not None else []):
            try:
                return await self._version(about.version)
            except VersionError as error:
                log.error("version %d: %s", about.version, error)
        return None

    async def _version(self, number: int, identity: int = 0) -> State:
        """Return a version's state and learn on from it; raises VersionError and is as before where it cannot be."""
        if self._versions is None:
            raise VersionError("no versions are kept here")
        found = await self._versions.read(number, identity)
        self.parent, self.since = number, Learned()
        return State(dict(zip(found.keys, found.rows, strict=True)), found.dense, found.about.identity)

    # -- controls -----------------------------------------------------------------------------------------------------

    async def _obey(self, control: Control) -> StepRecord:
        """Do what a control asks for, in a step of its own; what cannot be done is noted and changes nothing."""
        self.control, self.next = None, self.next + 1
        self.done, self.moved = Learned(), {}
        try:
            if control.do == "rollback":
                state = await self._version(control.version, control.identity)
                self.guard.begin(tried=True)
                changes = await self._become(state)
                return await self._commit(self._record(sizes=[], back=state.identity, note=control.text), *changes)
            if control.do == "save" and self._versions is not None:
                self.asked = True
                return await self._commit(self._record(sizes=[], note=control.text), (), (), ())
            if control.do not in ("pin", "unpin") or self._versions is None:
                raise VersionError(f"expected one of {', '.join(VERBS)}")
            if control.version == self.pin:
                raise VersionError("it is pinned already" if self.pin else "none is pinned")
            told = await self._serve(self._versions, control.version, control.identity)
            note = self._record(sizes=[], pin=control.version, note=control.text)
            return await self._commit(note, (), (), (), told)
        except VersionError as error:
            log.warning("examples@%d: %s not done: %s", self.next - 1, control.text, error)
            note = self._record(sizes=[], note=f"{control.text} not done: {error}")
            return await self._commit(note, (), (), ())

    async def _serve(self, versions: Versions, number: int, identity: int) -> Told:
        """Return what serving is told to go over from what it has to a version, 0 for the learner's own weights."""
        wanted, model = self._own(), self.learner.model
        served = await persist("pin", lambda: versions.served_copy(self.pin)) if self.pin else wanted
        if number:
            found = await versions.read(number, identity)
            model = Model(rows=Rows())
            model.load_rows(np.array(found.keys, np.uint64), found.rows)
            model.load_dense(found.dense)
            wanted = _served(model, found.keys)
            await persist("pin", lambda: versions.serve_copy(number, wanted, model.dense_bytes()))
        changed = [key for key, value in wanted.items() if served.get(key) != value]
        gone = sorted(served.keys() - wanted.keys())
        return Told(changed, [wanted[key] for key in changed], gone, model.dense_bytes(), number or self.steps + 1)

    def _own(self) -> dict[int, bytes]:
        rows = self.learner.rows
        return _served(self.learner.model, rows.keys[rows.held_by(LEARNT)].tolist())

    # -- versions -----------------------------------------------------------------------------------------------------

    def due(self, now: float) -> bool:
        """Whether a version is to be made at a time, s: right after a step, after enough or where one is asked for."""
        learnt = self.since.entered
        enough = self.asked or learnt >= EVERY_EXAMPLES or (learnt > 0 and now - self.made >= EVERY_S)
        return enough and self.next == self.committed

    def checkpoint(self, now: float) -> Checkpoint:
        """Return a copy of the state of the step just committed, as a version to be published."""
        learner, since = self.learner, self.since
        rows, packed = learner.rows.held_by(LEARNT), list[bytes]()
        for first in range(0, len(rows), PIECE):
            packed += learner.pack_state(rows[first : first + PIECE])
        metrics = {f"{name}_loss": round(value, 5) for name, value in means(since).items()}
        about = Version(
            version=self.steps, identity=self.lineage, parent=self.parent, next=self.committed, made=now,
            learnt=since.entered, items=len(rows), generation=self._store.keys.generation,
            metrics=metrics | {"joined": since.joined, "lists": since.lists}, refused=self.guard.beyond(metrics),
        )  # fmt: skip
        self.made, self.since, self.asked = now, Learned(), False
        return Checkpoint(about, learner.rows.keys[rows].tolist(), packed, learner.dense_state())

    def published(self, about: Version) -> None:
        """Take note of what became of a checkpoint: learn on from it, or go back with the next step."""
        if about.refused:
            self.suspicion = (
                "" if about.refused.startswith("not written") else f"version {about.version}: {about.refused}"
            )
        else:
            self.guard.accept(about.metrics)
            self.parent = about.version if self.parent == about.parent else self.parent

    @property
    def lineage(self) -> int:
        """Identity of the last committed step; 0 at the beginning."""
        return msgspec.msgpack.decode(self.last_record, type=StepRecord).identity if self.last_record else 0

    stored_epoch = ""
    _told: Told
    _resumed: tuple[float, dict[int, int]]


def _add(to: Learned, more: Learned) -> None:
    for name in Learned.__slots__:
        setattr(to, name, getattr(to, name) + getattr(more, name))


def _served(model: Model, keys: Sequence[int]) -> dict[int, bytes]:
    """Return rows as serving reads them, by item hash."""
    return dict(zip(keys, model.pack_rows(model.rows.find(np.array(keys, np.uint64))), strict=True))


def _pack_origin(origin: Origin | None) -> bytes:
    return b"" if origin is None else msgspec.msgpack.encode((origin.offset, origin.time, origin.marks))


def _unpack_origin(data: bytes) -> Origin | None:
    if not data:
        return None
    offset, at, marks = msgspec.msgpack.decode(data, type=tuple[int, float, tuple[tuple[int, int], ...]])
    return Origin(offset, at, marks)
