"""Snapshots: restore and the logs since are a full rebuild, byte for byte; damage is named; retention is bounded."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infra.cli import app
from infra.settings import Settings
from streaming.events import Alias, Click, Erase
from streaming.rebuild import rebuild, verify
from streaming.recovery.cuts import begins
from streaming.recovery.files import read_records, write_records
from streaming.recovery.generations import RecoveryError, generations, switch
from streaming.recovery.retention import refuse_behind_the_log, trim
from streaming.recovery.snapshots import check, diff, find, home, save, snapshots, told
from tests.by_log import ByLog, clicks

Made = Callable[..., Awaitable[object]]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Two partitions: topics are made sooner."""
    return replace(settings, partitions=2)


def silent(what: str, done: int, total: int) -> None:
    """Show nothing."""


def later(user: str) -> list[object]:
    """What comes after a snapshot: clicks, an erasure, a late event of the erased, an alias."""
    return [
        *clicks(200, seed=2), Erase(user_id=user, ts=time.time()),
        Click(user_id=user, item_id="i1", ts=time.time() - 3600, event_id="late"),
        Alias(user_id="u5", anonymous_id="u6", ts=time.time()),
    ]  # fmt: skip


async def test_restore_and_tail_are_a_full_rebuild(settings: Settings, topics: Made) -> None:
    await topics(settings.partitions)
    async with ByLog(settings) as live:
        await live.run(clicks(400, seed=1), steps=3)
        first = await save(settings, advance=silent, name="first")
        assert (first.events, first.weights["step"], first.base) == (400, 3, "")
        await live.run(later("u3"), steps=2)  # type: ignore[arg-type]
        full = await rebuild(settings, advance=silent)
        restored = await rebuild(settings, advance=silent, snapshot="first")
        assert (full.base, restored.base, full.steps, restored.steps) == ("", "first", 5, 5)
        assert restored.events == full.events - 400
        assert await live.everything(restored.generation) == await live.everything(full.generation)
        assert await live.everything() == await live.everything(full.generation)
        await check_the_erased(live, restored.generation)
        second = await save(settings, advance=silent, name="second")
        assert second.base == "first"
        whole = replace(settings, data=str(Path(settings.data) / "elsewhere"))
        scratch = await save(whole, advance=silent, name="second")
        assert scratch.base == ""
        assert [file["sha256"] for file in scratch.files] == [file["sha256"] for file in second.files]
        check_the_difference(settings)
        assert [found.name for found in snapshots(settings)] == ["first", "second"]


async def check_the_erased(live: ByLog, generation: int) -> None:
    """The erased user has nothing but the end of the profile; the late click did not bring them back."""
    mine = {name: value for name, value in (await live.everything(generation)).items() if name.endswith(":u3")}
    assert [name.split(":")[-2] for name in mine] == ["profile"]


def check_the_difference(settings: Settings) -> None:
    found = diff(settings, "first", "second")
    assert found["users"]["removed"] == 0
    assert found["users"]["changed"] > 10
    assert "u3" in found["users"]["names"]["changed"] or found["users"]["changed"] > 20
    assert found["rows"]["changed"] > 10
    assert found["offsets"]["step"] == [3, 5]
    assert sum(b - a for place, (a, b) in found["offsets"].items() if place.startswith("events")) >= 203
    nothing = diff(settings, "second", "second")
    assert nothing["users"]["changed"] == nothing["weights"]["changed"] == 0
    assert nothing["users"]["same"] > 20


async def test_a_damaged_file_is_named_and_nothing_is_restored(settings: Settings, topics: Made) -> None:
    await topics(settings.partitions)
    async with ByLog(settings) as live:
        await live.run(clicks(50))
        await save(settings, advance=silent, name="one")
        folder = home(settings) / "one"
        for name in ("users-1", "items", "weights"):
            path = folder / name
            whole = path.read_bytes()
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            with pytest.raises(RecoveryError, match=rf"{name}: damaged.*Nothing of it was used"):
                await rebuild(settings, advance=silent, snapshot="one")
            path.unlink()
            with pytest.raises(RecoveryError, match=f"{name}: No such file"):
                await rebuild(settings, advance=silent, snapshot="")
            path.write_bytes(whole)
        check(settings, find(settings, "one"))
        manifest = folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"items": 0', '"items": 1'))
        for name in ("one", ""):
            with pytest.raises(RecoveryError, match=r"manifest.json: damaged"):
                find(settings, name)
        assert snapshots(settings) == []
        assert [(name, "damaged" in why) for name, why in told(settings)[1].items()] == [("one", True)]
        after = await save(settings, advance=silent, name="two")  # from the beginning of the logs
        assert (after.base, after.events, [one.name for one in snapshots(settings)]) == ("", 50, ["two"])
        assert find(settings, "").name == "two"
        listed = CliRunner(env={"FRESHET_DATA": settings.data, "FRESHET_NAMESPACE": settings.namespace}).invoke(
            app, ["snapshot", "list", "--json"]
        )
        assert [(one["name"], "damaged" in one) for one in json.loads(listed.stdout)] == [("two", False), ("one", True)]
        found = await generations(live.client, settings.namespace, settings.partitions)
        assert [one.number for one in found if one.ready] == [1]
        assert not await live.everything(2)


async def test_what_is_interrupted_is_never_listed(settings: Settings, topics: Made) -> None:
    await topics(settings.partitions)
    async with ByLog(settings) as live:
        await live.run(clicks(50))

        def stop(what: str, done: int, total: int) -> None:
            raise InterruptedError

        with pytest.raises(InterruptedError):
            await save(settings, advance=stop, name="one")
        assert [path.name for path in home(settings).iterdir()] == [".lock"]
        left = home(settings) / "two.part"  # as a kill -9 just before the end would leave it
        left.mkdir()
        (left / "manifest.json").write_text("{}")
        assert snapshots(settings) == []
        with pytest.raises(RecoveryError, match="freshet snapshot save"):
            find(settings, "")
        await save(settings, advance=silent, name="two")
        assert [one.name for one in snapshots(settings)] == ["two"]
        assert not left.exists()
        with pytest.raises(RecoveryError, match="is there already"):
            await save(settings, advance=silent, name="two")
        with pytest.raises(RecoveryError, match=r"no snapshot 'three'.*only two"):
            find(settings, "three")
        with pytest.raises(RecoveryError, match="letters, digits"):
            await save(settings, advance=silent, name="../two")


async def test_retention_deletes_what_a_snapshot_covers_and_no_more(settings: Settings, topics: Made) -> None:
    await topics(settings.partitions)
    bounded = replace(settings, retention_days=1)
    async with ByLog(settings) as live:
        await live.run(clicks(200, seed=1), steps=2)
        manifest = await save(settings, advance=silent, name="one")
        await live.run(clicks(60, seed=2))
        full = await live.everything()
        assert await trim(settings, manifest) == {}  # keep all
        assert await trim(bounded, manifest) == {}  # nothing is a day old
        gone = await trim(bounded, manifest, now=time.time() + 86_400 * 2)
        assert gone == {live.topics.events: 200, live.topics.examples: manifest.rows["examples"], live.topics.steps: 2}
        begin = await begins(settings)
        assert begin.events == {int(p): said["next"] for p, said in manifest.users.items()}
        assert await trim(bounded, manifest, now=time.time() + 86_400 * 2) == {}
        report = await verify(settings, advance=silent, rederive=True)
        assert (report.differing, report.base, report.events, report.steps) == ([], "one", 60, 3)
        rebuilt = await rebuild(settings, advance=silent)
        assert rebuilt.base == "one"
        assert await live.everything(rebuilt.generation) == full
        await behind_the_log_is_not_served(live)
        (home(settings) / "one").rename(Path(settings.data) / "away")
        for call in (verify(settings, advance=silent), rebuild(settings, advance=silent)):
            with pytest.raises(RecoveryError, match=r"the logs were trimmed .* bring one back from a copy"):
                await call


async def behind_the_log_is_not_served(live: ByLog) -> None:
    """A generation that stands before the trimmed log's beginning could never go on."""
    old = live.keys.generation + 40
    await live.client.hset(f"{live.keys.namespace}:generations", str(old), json.dumps({"ready": True}))
    with pytest.raises(RecoveryError, match=r"generation 41 needs events\[0\] from 0.*cannot go on"):
        await refuse_behind_the_log(live.settings, old)
    await refuse_behind_the_log(live.settings, live.keys.generation)
    with pytest.raises(RecoveryError, match="there is none"):
        await switch(live.client, live.keys.namespace, 99, live.settings.partitions)


async def test_the_verbs_save_list_restore(settings: Settings, topics: Made) -> None:
    await topics(settings.partitions)
    async with ByLog(settings) as live:
        await live.run(clicks(50))
    asked = {
        "FRESHET_KAFKA": settings.kafka, "FRESHET_REDIS": settings.redis, "FRESHET_NAMESPACE": settings.namespace,
        "FRESHET_DATA": settings.data, "FRESHET_PARTITIONS": "2",
    }  # fmt: skip
    runner = CliRunner(env=asked)

    def run(*words: str) -> str:
        done = runner.invoke(app, list(words))
        assert done.exit_code == 0, (done.output, done.exception)
        return done.stdout

    def verbs() -> None:
        assert "No snapshot in" in run("snapshot", "list")
        saved = json.loads(run("snapshot", "save", "--json"))
        assert (saved["events"], saved["trimmed"]) == (50, {})
        assert saved["name"] in run("snapshot", "list")
        assert "same bytes as a full rebuild" in " ".join(run("snapshot", "restore", "--help").split())
        restored = json.loads(run("snapshot", "restore", "--switch", "--json"))
        assert (restored["switched"], restored["generation"], restored["base"]) == (True, 2, saved["name"])
        listed = json.loads(run("generation", "list", "--json"))
        assert [(one["number"], one["served"], one["events"]) for one in listed] == [(1, False, 50), (2, True, 50)]
        assert json.loads(run("generation", "switch", "1", "--json")) == {"served": 1, "before": 2}
        assert json.loads(run("generation", "drop", "2", "--json")) == {"dropped": 2}
        assert "24" in run("snapshot", "diff", saved["name"], saved["name"])
        assert "Identical" in run("rebuild", "--verify")

    await asyncio.to_thread(verbs)


def test_a_file_of_records_is_read_as_it_was_written(tmp_path: Path) -> None:
    records = [(b"", b""), (b"a", b"x" * 2_000_000), ("ü:1".encode(), b"\x00")]
    said = write_records(tmp_path / "f", records)
    assert list(read_records(tmp_path / "f")) == records
    assert (said["name"], said["records"], said["bytes"]) == ("f", 3, (tmp_path / "f").stat().st_size)
