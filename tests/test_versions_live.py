"""Versions beside all else: a real learner killed at chosen points, the verbs, rebuild and verify, what HTTP tells."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from infra.settings import Settings
from serving.snapshot import Snapshot, told_versions
from streaming.rebuild import rebuild, verify
from streaming.recovery.generations import RecoveryError, switch
from streaming.recovery.snapshots import save
from streaming.state import Keys
from streaming.training.controls import Control, record_of
from streaming.training.versions import home
from tests.by_log import ByLog, clicks
from tests.by_walk import RECORDS, ByWalk
from tests.test_api import serving
from tests.test_versions import snapshot, walk

__all__ = ["snapshot", "walk"]
Made = Callable[..., Awaitable[object]]


# -- the process ------------------------------------------------------------------------------------------------------

DIES = """
import os, signal, sys
from infra.settings import Settings
from streaming import trainer
from streaming.training import process, versions


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


point, original = sys.argv[1], trainer.Trainer.publish
if point == "before the list":
    versions.Versions._list = die
elif point == "before the effect":
    trainer.Trainer._obey = die
elif point == "before the feed":
    trainer.Trainer.publish = lambda self, record: die() if record.back else original(self, record)
process.run(Settings.load(sys.argv[2]))
"""


class Process:
    """The learner's own process, which may be told where to die."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.environment = {
            **os.environ, "FRESHET_KAFKA": settings.kafka, "FRESHET_REDIS": settings.redis,
            "FRESHET_NAMESPACE": settings.namespace,
        }  # fmt: skip
        self.running: subprocess.Popen[bytes] | None = None

    def start(self, point: str = "") -> None:
        """Start it."""
        command = [sys.executable, "-c", DIES, point, str(self.settings.data)]
        self.running = subprocess.Popen(command, env=self.environment)

    async def dies(self) -> None:
        """Wait until it killed itself."""
        assert self.running is not None
        assert await asyncio.to_thread(self.running.wait, 120) == -signal.SIGKILL

    def end(self) -> None:
        """End it in order."""
        assert self.running is not None
        self.running.terminate()
        assert self.running.wait(60) == 0

    async def freshet(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a verb beside it."""
        command = [sys.executable, "-m", "infra.cli", *words, "--data", str(self.settings.data)]
        return await asyncio.to_thread(
            subprocess.run, command, env=self.environment, capture_output=True, text=True, timeout=200
        )

    async def told(self, *words: str) -> Any:
        """Run a verb that must answer, and return its JSON."""
        done = await self.freshet("models", *words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


async def _listed(walk: ByWalk, count: int) -> list[dict[str, Any]]:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        found = (await told_versions(walk.store))["versions"]
        if len(found) == count:
            return list(found)
        await asyncio.sleep(0.05)
    raise AssertionError(f"expected {count} versions, got {found}")


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_killed_anywhere_it_does_once_what_it_was_told(
    walk: ByWalk, snapshot: Snapshot, settings: Settings
) -> None:
    """kill -9 between a version's file and its list, before a control's effect, between its commit and the feed."""
    process, examples = Process(settings), walk.topics.examples
    await walk.log.append(examples, [(0, None, value) for value in RECORDS[:60]])
    try:
        process.start("before the list")
        await walk.log.append(examples, [(0, None, record_of(Control("save")))])
        await process.dies()
        assert await told_versions(walk.store)
        assert len(list(walk.folder.glob("*.version"))) == 1
        process.start("before the effect")
        (one,) = await _listed(walk, 1)
        number = str(one["version"])
        await walk.log.append(examples, [(0, None, value) for value in RECORDS[60:100]])
        late = await process.freshet("models", "rollback", number, "--wait", "1")
        assert late.returncode == 1
        assert "the learner did not come to it" in late.stderr
        assert "Traceback" not in late.stderr
        await process.dies()
        before = int((await walk.store.head())["next"])
        snapshot.start()
        process.start("before the feed")
        await process.dies()
        assert int((await walk.store.head())["next"]) > before
        process.start()
        end = time.monotonic() + 60
        while snapshot.live.model.step != int((await walk.store.head())["step"]):
            assert time.monotonic() < end, "serving stays behind"
            await asyncio.sleep(0.05)
        told = await process.told("list")
        assert [note["note"] for note in told["notes"]] == ["save", f"rollback {number}"]
        await walk.log.append(examples, [(0, None, value) for value in RECORDS[100:140]])
        assert (await process.told("pin", number))["note"] == f"pin {number}"
        began = time.monotonic()
        while snapshot.live.model.step != one["version"]:
            assert time.monotonic() < began + 2.0, "a pin is served within 2 s"
            await asyncio.sleep(0.01)
        shown = await process.told("show", number)
        assert (shown["pinned"], shown["line"], shown["parent"]) == (True, [one["version"]], 0)
        assert (await process.told("list"))["pinned"] == one["version"]
        again = await process.freshet("models", "pin", number)
        assert (again.returncode, "it is pinned already" in again.stderr) == (1, True)
        none = await process.freshet("models", "rollback", "999999")
        assert f"no version 999999: kept are {number}. `freshet models list`" in " ".join(none.stderr.split())
        saved = (await process.told("save"))["step"]
        assert [about["version"] for about in await _listed(walk, 2)] == [one["version"], saved]
        await walk.retraced()  # the pinned copy with it
        assert (await process.told("unpin"))["note"] == "unpin"
        process.end()
    finally:
        if process.running is not None:
            process.running.kill()
    await walk.retraced()


# -- beside everything else -------------------------------------------------------------------------------------------


async def test_rebuild_and_verify_with_controls_in_the_log(settings: Settings, topics: Made) -> None:
    """Item rows, entries and weights are what the logs fold to; a rebuild takes versions and pin along."""
    await topics(settings.partitions)
    async with ByLog(settings) as live:
        await live.run(clicks(150, seed=1), steps=2)
        one = await live.version()
        await live.run(clicks(100, seed=2), steps=2)
        await live.control(Control("rollback", one.version, one.identity))
        await live.run(clicks(60, seed=3), steps=2)
        await live.control(Control("pin", one.version, one.identity))
        await live.run(clicks(60, seed=4), steps=1)
        report = await verify(settings, advance=lambda *_: None, rederive=True)
        assert (report.differing, report.notes) == ([], [])
        await live.client.hset(live.weights.pinned(one.version).head_key + ":7", b"\x07" * 8, b"\x01\x01" + bytes(134))
        (named,) = (await verify(settings, advance=lambda *_: None)).differing
        assert named.startswith(f"row of version {one.version}")
        await live.client.hdel(live.weights.pinned(one.version).head_key + ":7", b"\x07" * 8)
        report = await rebuild(settings, advance=lambda *_: None)
        mine, theirs = await live.everything(), await live.everything(report.generation)
        compared = [name for name in mine if not name.endswith((":head", ":versions"))]
        assert {name: mine[name] for name in compared} == {name: theirs[name] for name in compared}
        assert theirs[":{model}:head"][b"pin"] == str(one.version).encode()
        assert [path.name for path in home(settings, Keys(settings.namespace, 2)).iterdir()] == [
            f"{one.version}.version"
        ]
        await switch(live.client, settings.namespace, report.generation, settings.partitions)
        assert (await verify(settings, advance=lambda *_: None)).differing == []
        async with ByLog(settings, report.generation) as after:
            await after.control(Control("unpin"))
            await after.control(Control("rollback", one.version, one.identity))
            assert dict((await after.weights.load())[1]) == after.version_rows(one.version)
        assert (await verify(settings, advance=lambda *_: None)).differing == []
        copied = await rebuild(settings, advance=lambda *_: None, weights=False)
        assert (await live.everything(copied.generation))[":{model}:head"][b"pin"] == b"0"


async def test_a_snapshot_between_a_version_and_going_back_to_it(settings: Settings, topics: Made) -> None:
    await topics(settings.partitions)
    async with ByLog(settings) as live:
        await live.run(clicks(150, seed=1), steps=2)
        one = await live.version()
        await live.run(clicks(50, seed=2), steps=2)
        await save(settings, advance=lambda *_: None, name="between")
        await live.control(Control("rollback", one.version, one.identity))
        await live.run(clicks(50, seed=3), steps=1)
        report = await rebuild(settings, advance=lambda *_: None, snapshot="between")
        mine, theirs = await live.everything(), await live.everything(report.generation)
        compared = [name for name in mine if not name.endswith((":head", ":versions"))]
        assert {name: mine[name] for name in compared} == {name: theirs[name] for name in compared}
        for path in (settings.data_path / "versions").rglob("*.version"):
            path.unlink()
        with pytest.raises(RecoveryError, match=r"goes back to one that is neither after the snapshot.*--no-weights"):
            await rebuild(settings, advance=lambda *_: None, snapshot="between")
        assert (await rebuild(settings, advance=lambda *_: None)).steps == report.steps  # from the beginning it can


async def test_what_is_served_is_told_over_http(walk: ByWalk, settings: Settings) -> None:
    await walk.learn(40)
    one = await walk.version()
    walk.trainer.learner.model.factors.start[0, 3] = np.nan
    await walk.learn(10, Control("pin", one.version, one.identity))
    async with serving(settings) as (client, app):
        end = time.monotonic() + 60
        while not app.state.parts.snapshot.loaded:
            assert time.monotonic() < end
            await asyncio.sleep(0.02)
        told = (await client.get("/-/models")).json()
        assert (told["step"], told["pinned"], told["refused"]) == (one.version, one.version, 1)
        (listed,) = told["versions"]
        assert (listed["version"], listed["identity"], listed["parent"]) == (one.version, f"{one.identity:016x}", 0)
        assert [note["note"].partition(":")[0] for note in told["notes"]] == ["refused", f"pin {one.version}"]
        assert told["learnt"] == {"step": walk.trainer.steps, "next": walk.trainer.next}
        text = (await client.get("/metrics")).text
        for line in (
            f'freshet_model_step{{what="served"}} {one.version}.0',
            f'freshet_model_step{{what="pinned"}} {one.version}.0',
            f'freshet_model_step{{what="learnt"}} {walk.trainer.steps}.0', "freshet_model_refused 1.0",
        ):  # fmt: skip
            assert line in text, line
