"""Versions: made, kept, gone back to, pinned; refused steps; all retraced along the log, on real servers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import numpy as np
import pytest

from infra.settings import Settings
from models.items.folding import ItemFold
from models.learner import Learned
from models.model import STATE_ROW
from serving.snapshot import Snapshot, told_versions
from streaming.state import StoredBytesError, connect
from streaming.training import guard as guarding
from streaming.training.controls import Control, control_in, record_of
from streaming.training.guard import BOUND, Guard, unsound
from streaming.training.versions import (
    KEEP,
    Checkpoint,
    Version,
    VersionError,
    described,
    found_by_identity,
    read,
    write,
)
from tests.by_walk import RECORDS, ByWalk, rows_of

Made = Callable[..., Awaitable[object]]


@pytest.fixture
async def walk(settings: Settings, topics: Made) -> AsyncIterator[ByWalk]:
    await topics()
    async with ByWalk(settings) as made:
        yield made


@pytest.fixture
async def snapshot(settings: Settings) -> AsyncIterator[Snapshot]:
    made = Snapshot(connect(settings.redis), connect(settings.redis), namespace=settings.namespace)
    yield made
    await made.stop()


def losses(encoder: float, events: int = 3000) -> Learned:
    return Learned(entered=events, encoder_loss=encoder * events)


# -- parts ------------------------------------------------------------------------------------------------------------


def test_a_control_says_nothing_to_items() -> None:
    plain, told = ItemFold(most=1000), ItemFold(most=1000)
    for value in RECORDS[:60]:
        plain.fold(value)
        folded = told.fold(value)
        folded = told.fold(record_of(Control("rollback", 7, 9)))
        assert folded.entries is not None
        assert (len(folded.entries), folded.unread, folded.aside) == (0, "", [])
    assert told.marks == plain.marks
    assert told.items.pack_totals() == plain.items.pack_totals()
    rows = np.arange(plain.items.n)
    assert told.items.pack(rows) == plain.items.pack(rows)


def test_a_control_is_read_as_it_was_written() -> None:
    from models.examples import Entries

    control = Control("pin", 12, 2**64 - 1, 1.5)
    for codec, version in ((2, 1), (3, 2)):
        told = Entries.from_bytes(record_of(control, codec=codec))
        assert (control_in(told), told.version) == (control, version)
    assert control_in(Entries.from_bytes(RECORDS[0])) is None
    broken = Entries.from_bytes(record_of(control))
    broken.extra = [b"{"]
    assert control_in(Entries.from_bytes(broken.to_bytes())) == Control("nothing that can be read")


def test_the_guard_goes_back_once_for_each_change() -> None:
    guard = Guard()
    assert guard.judge(losses(9.0)) == ""  # no good version yet
    guard.accept({"encoder_loss": 4.0})
    assert guard.judge(losses(4.0 + BOUND - 0.01)) == ""
    assert guard.judge(losses(40.0, 100)) == ""  # too few to tell
    guard.begin()
    assert "4.0" in guard.judge(losses(4.0 + BOUND + 0.01))
    guard.begin(tried=True)
    assert guard.judge(losses(7.0)) == ""  # the good weights do no better: the world has changed
    assert guard.judge(losses(7.5)) == ""
    assert guard.judge(losses(7.0 + BOUND + 0.01)) != ""
    guard.begin(tried=True)
    assert guard.judge(losses(4.0)) == ""  # the weights were it
    assert guard.judge(losses(9.5)) != ""
    assert "not finite" in guard.judge(losses(float("nan"), 1))


def test_what_is_not_finite_is_named() -> None:
    row = np.zeros(3, STATE_ROW)
    row["version"], row["form"] = 1, 2
    blobs = [one.tobytes() for one in row]
    assert unsound(blobs, b"") == ""
    row["vector"][1, 5] = np.inf
    assert unsound([one.tobytes() for one in row], b"") == "1 of 3 rows: vector is not finite"


def test_a_file_is_whole_or_refused(settings: Settings) -> None:
    about = Version(version=5, identity=2**63, parent=3, next=9, made=1.0, learnt=4, items=2, generation=1)
    folder = settings.data_path / "versions" / f"{settings.namespace}@1"
    size = write(folder, Checkpoint(about, [7, 2**64 - 1], [b"a" * 10, b"b" * 12], b"dense"))
    path = folder / "5.version"
    found = read(path)
    assert (found.keys, found.rows, found.dense) == ([7, 2**64 - 1], [b"a" * 10, b"b" * 12], b"dense")
    assert found.about == about
    told = described(path)
    assert told is not None
    assert told.bytes == size == path.stat().st_size
    again = found_by_identity(settings, 2**63)
    assert again is not None
    assert again.rows == found.rows
    for at in (2, 30, size - 40, size - 1):
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
        with pytest.raises(VersionError, match="damaged"):
            read(path)
        data[at] ^= 1
        path.write_bytes(data)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(VersionError, match="damaged"):
        read(path)
    assert found_by_identity(settings, 2**63) is None
    with pytest.raises(VersionError, match="No such file"):
        read(folder / "6.version")


# -- going back -------------------------------------------------------------------------------------------------------


async def test_rollback_sets_weights_and_optimiser_and_the_log_says_so(walk: ByWalk) -> None:
    await walk.learn(60)
    one = await walk.version()
    state = rows_of(walk.trainer.learner)
    await walk.learn(30)
    two = await walk.version()
    assert (two.parent, two.metrics["lists"] > 0, one.refused) == (one.version, True, "")
    learnt, back = await walk.learn(20, Control("rollback", one.version, one.identity))
    assert (learnt.back, back.back, back.sizes, back.note) == (0, one.identity, [], f"rollback {one.version}")
    assert back.next == back.first + 1
    assert rows_of(walk.trainer.learner) == state
    assert dict((await walk.store.load())[1]) == state  # items that came since are gone
    window = list(walk.trainer.learner.window)
    assert window  # slates that wait for their outcomes stay
    await walk.start()
    assert rows_of(walk.trainer.learner) == state
    assert list(walk.trainer.learner.window) == window
    await walk.learn(20)
    await walk.start()
    three = await walk.version()
    assert (three.parent, three.version) == (one.version, back.step + 1)
    await walk.start()
    assert walk.trainer.parent == three.version
    (again,) = await walk.learn(0, Control("rollback", two.version, two.identity))
    assert again.back == two.identity
    await walk.learn(10)
    await walk.retraced()


async def test_what_cannot_be_done_changes_nothing_and_is_told(walk: ByWalk) -> None:
    await walk.learn(20)
    one = await walk.version()
    before = rows_of(walk.trainer.learner)
    controls = (
        Control("rollback", 99), Control("rollback", one.version, 5), Control("unpin"), Control("dance", one.version),
        Control("pin", 98),
    )  # fmt: skip
    await walk.learn(0, *controls)
    path = walk.folder / f"{one.version}.version"
    found = read(path)
    found.rows = [row[:-1] for row in found.rows]  # as a build with other columns wrote them
    write(walk.folder, found)
    await walk.learn(0, Control("rollback", one.version, one.identity), Control("pin", one.version))
    path.unlink()
    await walk.learn(0, Control("rollback", one.version, one.identity))
    assert rows_of(walk.trainer.learner) == before
    notes = [note["note"] for note in (await told_versions(walk.store))["notes"]]
    assert len(notes) == len(controls) + 3
    assert ["of another build" in note for note in notes[-3:]] == [True, True, False]
    assert all("not done" in note for note in notes)
    assert notes[0] == f"rollback 99 not done: no version 99, only {one.version}"
    await walk.learn(10)
    await walk.retraced()


async def test_the_last_versions_are_kept(walk: ByWalk) -> None:
    made = []
    for at in range(KEEP + 3):
        await walk.learn(4)
        made.append(await walk.version())
        if at == 1:
            await walk.learn(0, Control("pin", made[0].version, made[0].identity))
    kept = [made[0], *made[-KEEP:]]
    assert [about.version for about in walk.versions.kept] == [about.version for about in kept]
    assert len(list(walk.folder.glob("*"))) == KEEP + 1
    listed = (await told_versions(walk.store))["versions"]
    assert [about["version"] for about in listed] == [about.version for about in kept]
    await walk.client.delete(walk.store.keys.model_versions)  # Redis lost its end: the files know
    (walk.folder / "12345.part").write_bytes(b"killed while it was written")
    await walk.start()
    assert [about.version for about in walk.versions.kept] == [about.version for about in kept]
    assert len(list(walk.folder.glob("*"))) == KEEP + 1
    assert len((await told_versions(walk.store))["versions"]) == KEEP + 1


async def test_a_file_of_a_later_step_than_redis_knows_is_of_another_line(walk: ByWalk) -> None:
    await walk.learn(20)
    one = await walk.version()
    kept = await walk.store.load()
    await walk.learn(20)
    lost = await walk.version()
    await walk.client.delete(walk.store.head_key, *(walk.store.keys.model_rows(b) for b in range(256)))
    head, rows = kept
    await walk.store.commit(expected=0, head=head, keys=[k for k, _ in rows], values=[v for _, v in rows])
    await walk.start()
    assert [about.version for about in walk.versions.kept] == [one.version]
    assert sorted(path.name for path in walk.folder.iterdir()) == [f"{one.version}.version", f"{lost.version}.aside"]
    assert found_by_identity(walk.settings, lost.identity) is not None
    await walk.go_on()
    await walk.retraced()


# -- serving ----------------------------------------------------------------------------------------------------------


async def _serves(snapshot: Snapshot, wanted: dict[int, bytes], step: int) -> float:
    """Return after how many seconds the arrays in process are these rows, and forget what is not among them."""
    began = time.monotonic()
    while time.monotonic() < began + 10:
        model = snapshot.live.model
        keys = np.array(sorted(wanted), np.uint64)
        rows = model.rows.find(keys)
        if model.step == step and (rows >= 0).all():
            with contextlib.suppress(AssertionError):
                assert dict(zip(keys.tolist(), model.pack_rows(rows), strict=True)) == wanted
                return time.monotonic() - began
        await asyncio.sleep(0.01)
    raise AssertionError(f"step {step} is not served, but {snapshot.live.model.step}")


async def test_serving_follows_a_pin_and_a_rollback(walk: ByWalk, snapshot: Snapshot, settings: Settings) -> None:
    await walk.learn(40)
    one, first = await walk.version(), walk.trainer._own()
    snapshot.start()
    await _serves(snapshot, first, one.version)
    await walk.learn(40)
    await _serves(snapshot, walk.trainer._own(), walk.trainer.steps)
    await walk.learn(0, Control("pin", one.version, one.identity))
    assert await _serves(snapshot, first, one.version) < 2.0
    await walk.learn(30)  # learning goes on, and is not served
    own = walk.trainer._own()
    assert own != first
    await asyncio.sleep(0.7)
    assert await _serves(snapshot, first, one.version) < 0.1
    assert snapshot.live.model_position == walk.trainer.next
    later = Snapshot(connect(settings.redis), connect(settings.redis), namespace=settings.namespace)
    later.start()  # on another machine, say: it was not there when the version was pinned
    await _serves(later, first, one.version)
    await later.stop()
    await walk.start()  # the learner too comes and goes
    await walk.learn(10)
    assert await _serves(snapshot, first, one.version) < 0.1
    await walk.retraced()
    await walk.learn(0, Control("unpin"))
    assert await _serves(snapshot, walk.trainer._own(), walk.trainer.steps - 1) < 2.0
    assert not await walk.client.exists(walk.store.keys.model_pinned(one.version))
    await walk.learn(10)
    await _serves(snapshot, walk.trainer._own(), walk.trainer.steps)
    await walk.learn(0, Control("rollback", one.version, one.identity))
    assert await _serves(snapshot, first, walk.trainer.steps) < 2.0
    gone = own.keys() - first.keys()
    keys = np.array(sorted(gone), np.uint64)
    model = snapshot.live.model
    assert (model.rows.find(keys) < 0).all()
    assert snapshot.reloads == 0
    told = await snapshot.versions()
    assert [note["note"] for note in told["notes"]] == [
        f"pin {one.version}", "unpin", f"rollback {one.version}",
    ]  # fmt: skip
    assert told["pinned"] is None


# -- the guard --------------------------------------------------------------------------------------------------------


async def test_a_step_that_is_not_finite_is_refused_and_learning_goes_on(walk: ByWalk, snapshot: Snapshot) -> None:
    await walk.learn(40)
    good, own = rows_of(walk.trainer.learner), walk.trainer._own()
    walk.trainer.learner.model.factors.start[0, 3] = np.nan  # memory gone bad: every vector it meets becomes nan
    (refused,) = await walk.learn(20)
    assert (refused.sizes, refused.back) == ([], refused.before)
    assert refused.note.startswith("refused: ")
    assert rows_of(walk.trainer.learner) == good
    snapshot.start()
    await _serves(snapshot, own, walk.trainer.steps)
    told = await snapshot.versions()
    assert (told["refused"], told["notes"][-1]["note"]) == (1, refused.note)
    (after,) = await walk.learn(20)
    assert after.sizes
    assert unsound(list(rows_of(walk.trainer.learner).values()), walk.trainer.learner.dense_state()) == ""
    await walk.retraced()


async def test_the_very_first_step_may_be_refused(walk: ByWalk) -> None:
    walk.trainer.learner.model.factors.start[0, 3] = np.inf
    (refused,) = await walk.learn(10)
    assert (refused.sizes, refused.back, walk.trainer.refused) == ([], 0, 1)
    await walk.learn(10)
    await walk.retraced()


async def test_poisoned_redis_goes_back_to_a_version(walk: ByWalk, snapshot: Snapshot) -> None:
    await walk.learn(40)
    one, good = await walk.version(), rows_of(walk.trainer.learner)
    await walk.learn(20)
    bad = await walk.write_row("vector", np.nan)
    snapshot.start()  # an API process that starts now leaves the row out, and says so
    end = time.monotonic() + 10
    while not snapshot.loaded:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    assert list(snapshot.live.bad.values()) == [f"model row {bad:016x}: its vector is not finite"]
    await walk.start()
    (refused,) = await walk.learn(20)
    assert (refused.sizes, refused.back) == ([], one.identity)
    assert rows_of(walk.trainer.learner) == good == dict((await walk.store.load())[1])
    await _serves(snapshot, walk.trainer._own(), walk.trainer.steps)
    assert snapshot.live.bad == {}
    await walk.learn(20)
    await walk.retraced()


async def test_poisoned_redis_without_a_version_ends_in_words(walk: ByWalk) -> None:
    await walk.learn(20)
    await walk.write_row("bias", np.inf)
    with pytest.raises(StoredBytesError, match=r"bias is not finite, and there is no version.*rebuild --switch"):
        await walk.start()


async def test_poisoned_dense_weights_too(walk: ByWalk) -> None:
    from models.factors import pack_named, unpack_named

    await walk.learn(20)
    one = await walk.version()
    head, _ = await walk.store.load()
    values = unpack_named(head["dense"])
    values["both"][3, 4] = np.nan
    await walk.client.hset(walk.store.head_key, "dense", pack_named(values))
    await walk.start()
    (refused,) = await walk.learn(20)
    assert refused.back == one.identity
    assert "dense weights: both is not finite" in refused.note
    await walk.learn(20)
    await walk.retraced()


async def test_losses_beyond_the_bound_go_back_to_the_good_version(
    walk: ByWalk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(guarding.LEAST, "encoder", 60)
    await walk.learn(60)
    one, good = await walk.version(), rows_of(walk.trainer.learner)
    assert "encoder_loss" in one.metrics
    learner = walk.trainer.learner
    learner.model.factors.vectors[: learner.rows.n] *= 40.0  # finite, and far from anything learnt
    learner._touched[: learner.rows.n] = True
    steps = await walk.learn(20)
    while steps[-1].sizes and walk.at < 130:
        steps = await walk.learn(10)
    refused = steps[-1]
    assert (refused.sizes, refused.back) == ([], one.identity)
    assert "the encoder's loss over the last events is" in refused.note
    assert rows_of(walk.trainer.learner) == good
    assert walk.trainer.refused == 1
    await walk.learn(20)
    assert walk.trainer.refused == 1


async def test_a_version_that_is_not_finite_is_refused(walk: ByWalk) -> None:
    await walk.learn(40)
    one, good = await walk.version(), rows_of(walk.trainer.learner)
    await walk.learn(20)
    learner = walk.trainer.learner
    learner.encoder.squares[5] = np.nan  # a row that no step since has touched
    bad = await walk.version()
    assert bad.refused == f"1 of {bad.items} rows: square is not finite"
    assert [about.version for about in walk.versions.kept] == [one.version]
    assert not (walk.folder / f"{bad.version}.version").exists()
    (refused,) = await walk.learn(20)
    assert refused.back == one.identity
    assert rows_of(walk.trainer.learner) == good
    listed = (await told_versions(walk.store))["versions"]
    assert [(about["version"], bool(about["refused"])) for about in listed] == [
        (one.version, False), (bad.version, True),
    ]  # fmt: skip
    await walk.learn(10)
    await walk.retraced()


# -- everything at once -----------------------------------------------------------------------------------------------


class Rewound:
    """The model's keys as they were, to be put back: what Redis may lose when its machine crashes."""

    def __init__(self, walk: ByWalk) -> None:
        self._walk, self._kept = walk, dict[bytes, bytes]()

    async def _names(self) -> list[bytes]:
        pattern = self._walk.store.keys.prefix + ":{model}:*"
        return [name async for name in self._walk.client.scan_iter(pattern, count=5000)]

    async def keep(self) -> None:
        """Remember the keys."""
        self._kept = {name: await self._walk.client.dump(name) for name in await self._names()}

    async def put_back(self) -> None:
        """Set them to what they were."""
        if names := await self._names():
            await self._walk.client.unlink(*names)
        for name, value in self._kept.items():
            await self._walk.client.restore(name, 0, value)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.timeout(300)
async def test_any_order_of_all_that_may_happen_is_retraced(
    walk: ByWalk, snapshot: Snapshot, settings: Settings, seed: int
) -> None:
    """Learning, versions, controls, a poisoned memory and Redis, restarts, a Redis rolled back: always one line."""
    rng, rewound, met = np.random.default_rng(seed), Rewound(walk), set[str]()
    await rewound.keep()
    snapshot.start()
    names = ("version", "rollback", "pin", "unpin", "poison", "poisoned Redis", "restart", "keep", "put back")
    for _ in range(24):
        await walk.learn(int(rng.integers(1, 8)))
        name = str(rng.choice(names))
        kept = walk.versions.kept
        one = kept[int(rng.integers(len(kept)))] if kept else None
        met.add(name)
        if name == "version":
            await walk.version()
        elif name in ("rollback", "pin") and one is not None:
            await walk.learn(2, Control(name, one.version, one.identity))
        elif name == "unpin":
            await walk.learn(1, Control("unpin"))
        elif name == "poison":
            walk.trainer.learner.model.factors.start[0, 0] = np.inf
        elif name == "poisoned Redis" and kept:
            await walk.write_row("square", np.nan)
            await walk.start()
        elif name == "restart":
            await walk.start()
        elif name == "keep":
            await rewound.keep()
        elif name == "put back":
            await rewound.put_back()
            await walk.start()
            await walk.go_on()
    await walk.learn(3)
    assert len(met) >= 6
    await walk.retraced()
    pin = walk.trainer.pin
    wanted = await walk.versions.served_copy(pin) if pin else walk.trainer._own()
    late = Snapshot(connect(settings.redis), connect(settings.redis), namespace=settings.namespace)
    late.start()
    for one_api in (snapshot, late):
        await _serves(one_api, wanted, pin or walk.trainer.steps)
    await late.stop()
