"""`freshet export` on a real broker: outcomes at the slates that showed them, once; exact rows; erasures."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.evaluating.export import Pseudonyms, export, places
from infra.evaluating.labels import Counts, Erasures, Labels
from infra.evaluating.own_verbs import since_of
from infra.settings import Settings
from models.examples import Shown, item_hash
from streaming.events import (
    Action,
    Alias,
    Click,
    Dwell,
    Erase,
    Event,
    Impression,
    Item,
    Rating,
    View,
    encode,
    impression,
)
from streaming.replay import exports
from streaming.replay.exports import ExportError, Schema
from streaming.replay.logs import ReplayError, read_log
from streaming.topics import Log, Topics, create_topics, partition_of

NOW = float(int(time.time())) - 7200.0
PARTITIONS = 2


def slate(user: str, name: str, ts: float, items: Sequence[str], policy: str = "epsilon") -> Impression:
    keys = np.array([item_hash(item) for item in items], np.uint64)
    shown = Shown(
        item_hash(name), 7, keys, np.linspace(0.5, 0.25, len(items), dtype=np.float32),
        np.zeros(len(items), np.uint8), np.empty(0, np.uint64), np.empty((0, 0), np.float16), "home", policy,
    )  # fmt: skip
    return impression(user, name, ts, "home", list(items), shown.to_bytes())


def written(events: Sequence[Event], settings: Settings) -> None:
    async def write() -> None:
        topics = Topics(settings.namespace, settings.partitions)
        await create_topics(settings.kafka, topics)
        log = Log(settings.kafka)
        await log.start()
        try:
            for event in events:
                user = event.anonymous_id if isinstance(event, Alias) else event.user_id
                place = partition_of(user, settings.partitions)
                await log.append(topics.events, [(place, user.encode(), encode(event))])
            entry = Item(item_id="a", title="Alpha", categories=["greek"])
            gone = [Item(item_id="b", title="Beta"), Item(item_id="b", deleted=True)]
            await log.append(topics.items, [(0, i.item_id.encode(), encode(i)) for i in (entry, *gone)])
        finally:
            await log.stop()

    asyncio.run(write())


def exported(settings: Settings, what: Sequence[str], out: Path, **more: Any) -> dict[str, Any]:
    paths = places(list(what), more.pop("form", None), out)
    return asyncio.run(export(settings, paths, advance=lambda *_: None, **more))


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture
def two(kafka: str, redis_url: str, namespace: str, tmp_path: Path) -> Settings:
    return Settings.load(
        tmp_path, env={}, kafka=kafka, redis=redis_url, namespace=namespace, partitions=PARTITIONS,
        rewards=[["*", "click", 1], ["*", "dwell", 1]],
    )  # fmt: skip


def known_log() -> list[Event]:
    """Outcomes of every kind: named, found by the item, twice, late, of nobody's slate, of who is forgotten."""
    at = NOW
    common: dict[str, Any] = {"user_id": "ann"}
    return [
        Click(**common, item_id="z", ts=at, event_id="z0"),  # makes the profile; joins nothing
        slate("ann", "s1", at + 10, ["a", "b", "c"]),
        slate("ann", "s2", at + 20, ["c", "d"]),
        View(**common, item_id="a", ts=at + 25, slate_id="s1"),
        Click(**common, item_id="a", ts=at + 30, slate_id="s1", event_id="e1", position=0),
        Click(**common, item_id="a", ts=at + 30, slate_id="s1", event_id="e1", position=0),  # the app tried again
        Dwell(**common, item_id="a", ts=at + 40, seconds=60.0),  # no slate named: only s1 shows it
        Dwell(**common, item_id="a", ts=at + 41, seconds=5.0),  # a second dwell is added, its reward is not
        Click(**common, item_id="c", ts=at + 50, event_id="e2"),  # both show it: the newest
        Rating(**common, item_id="b", ts=at + 60, value=4.0, slate_id="s1"),
        Action(**common, item_id="b", ts=at + 70, name="save", slate_id="s1"),
        slate("bob", "s3", at + 80, ["a"], "thompson/32"),
        Click(user_id="bob", item_id="q", ts=at + 90, slate_id="s3"),  # s3 never showed q
        Click(user_id="eve", item_id="a", ts=at + 91),
        slate("eve", "s4", at + 92, ["a"]),
        Click(**common, item_id="d", ts=at + 20 + 3601, slate_id="s2"),  # an hour and a second later: too late
        Erase(user_id="eve", ts=at + 93),
        Click(user_id="eve", item_id="b", ts=time.time() + 60.0),  # comes back: that is told
    ]


def test_exact_rows(two: Settings, tmp_path: Path) -> None:
    written(known_log(), two)
    told = exported(two, ["slates", "events", "items"], tmp_path / "out")
    rows = table(tmp_path / "out" / "slates.csv")
    assert list(rows[0]) == list(exports.SLATES)
    found = {(row["slate_id"], row["item_id"]): row for row in rows}
    assert sorted(found) == [("s1", "a"), ("s1", "b"), ("s1", "c"), ("s2", "c"), ("s2", "d"), ("s3", "a")]
    assert len(rows) == 6
    names = ("position", "propensity", "viewed", "clicked", "dwell", "rating", "actions", "first_outcome_s")

    def told_of(slate_id: str, item: str) -> tuple[str, ...]:
        return tuple(found[slate_id, item][name] for name in names)

    assert told_of("s1", "a") == ("0", "0.5", "1", "1", "65.0", "", "", "20.0")
    assert told_of("s1", "b") == ("1", "0.375", "0", "0", "", "4.0", "save", "50.0")
    assert told_of("s1", "c") == ("2", "0.25", "0", "0", "", "", "", "")
    assert told_of("s2", "c") == ("0", "0.5", "0", "1", "", "", "", "30.0")
    assert told_of("s2", "d") == ("1", "0.25", "0", "0", "", "", "", "")
    assert told_of("s3", "a")[2:] == ("0", "0", "", "", "", "")
    # click 1 and one dwell of a minute 1, each of a sum of weights of 2; a rating that enters counts as a click
    assert [float(found[key]["reward"]) for key in (("s1", "a"), ("s1", "b"), ("s2", "c"))] == [1.0, 0.5, 0.5]
    assert (found["s3", "a"]["policy"], found["s3", "a"]["step"]) == ("thompson/32", "7")
    assert (told["slates"], told["duplicates"], told["erased"], told["early"]) == (3, 1, 2, 0)
    assert (told["outcomes"], told["joined"]) == (10, 6)
    events = table(tmp_path / "out" / "events.csv")
    assert len(events) == told["events"] == 11
    assert [(e["user_id"], e["item_id"]) for e in events if e["user_id"] == "eve"] == [("eve", "b")]
    ann = [(e["kind"], e["value"]) for e in events if e["user_id"] == "ann"]
    assert ann[:3] == [("click", ""), ("view", ""), ("click", "")]
    assert ("save", "") in ann
    assert ("rating", "4.0") in ann
    assert [row["item_id"] for row in table(tmp_path / "out" / "items.csv")] == ["a"]
    assert os.stat(tmp_path / "out" / "events.csv").st_mode & 0o077 == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["events.csv", "items.csv", "slates.csv"]
    forms_hold_the_same(two, tmp_path)
    the_export_replays(two, tmp_path)
    since_changes_no_label(two, tmp_path)


def forms_hold_the_same(settings: Settings, tmp_path: Path) -> None:
    """Twice the same bytes; gzip and parquet hold the same values, read by the one reader."""
    pytest.importorskip("pyarrow")
    exported(settings, ["slates", "events"], tmp_path / "again")
    for form in ("csv.gz", "parquet"):
        exported(settings, ["slates", "events"], tmp_path / form, form=form)
    for what, schema in (("slates", exports.SLATES), ("events", exports.EVENTS)):
        plain = tmp_path / "out" / f"{what}.csv"
        assert plain.read_bytes() == (tmp_path / "again" / f"{what}.csv").read_bytes()
        wanted = values(plain, schema)
        for form in ("csv.gz", "parquet"):
            assert values(tmp_path / form / f"{what}.{form}", schema) == wanted


def values(path: Path, schema: Schema) -> list[dict[str, Any]]:
    return [row for _, row in exports.rows(path, schema)]


def the_export_replays(settings: Settings, tmp_path: Path) -> None:
    log = read_log(tmp_path / "out", "freshet")
    assert len(log.events) == 10
    assert sum(log.dropped.values()) == 1  # the view
    assert log.catalogue.items["a"].title == "Alpha"
    assert [type(event).__name__ for event in log.events].count("Dwell") == 2
    assert next(e for e in log.events if isinstance(e, Rating)).scale == (1.0, 5.0)


def since_changes_no_label(settings: Settings, tmp_path: Path) -> None:
    whole = table(tmp_path / "out" / "slates.csv")
    cut = sorted(float(row["recorded"]) for row in whole)[3]
    exported(settings, ["slates"], tmp_path / "late.csv", since=cut)
    assert table(tmp_path / "late.csv") == [row for row in whole if float(row["recorded"]) >= cut]


def test_pseudonyms_are_the_same_in_all_tables_of_a_run_and_hide_ids(two: Settings, tmp_path: Path) -> None:
    written(known_log(), two)
    exported(two, ["slates", "events"], tmp_path / "one", pseudonyms=True)
    exported(two, ["slates", "events"], tmp_path / "two", pseudonyms=True)
    text = "".join((tmp_path / "one" / f"{what}.csv").read_text() for what in ("slates", "events"))
    assert not any(f",{name}," in text for name in ("ann", "bob", "eve", "e1"))
    users = [{row["user_id"] for row in table(tmp_path / run / "events.csv")} for run in ("one", "two")]
    assert len(users[0]) == len(users[1]) == 3
    assert not users[0] & users[1]
    assert {row["user_id"] for row in table(tmp_path / "one" / "slates.csv")} <= users[0]


# -- the join by itself -----------------------------------------------------------------------------------------------


def joined(
    events: Sequence[Event], cut: int, gone: dict[str, int] | None = None, first: int = 0
) -> tuple[list[dict[str, Any]], Counts]:
    counts = Counts()
    labels = Labels(Settings.load(env={}, running=False), 0, first, gone or {}, counts)
    records = [(first + i, round(event.ts * 1000), encode(event)) for i, event in enumerate(events)]
    rows = []
    for at in range(0, len(records), cut):
        rows += labels.take(records[at : at + cut])[1]
    return rows + labels.end(), counts


def busy_log(n: int, seed: int) -> list[Event]:
    rng, out = np.random.default_rng(seed), list[Event]()
    for k in range(n):
        user, ts = f"u{rng.integers(6)}", NOW + 40.0 * k
        if rng.random() < 0.4:
            out.append(slate(user, f"s{k}", ts, [f"i{i}" for i in rng.choice(12, 4, replace=False)]))
        else:
            id_ = f"e{rng.integers(k // 2, k + 1)}" if rng.random() < 0.5 else None
            out.append(Click(user_id=user, item_id=f"i{rng.integers(12)}", ts=ts, event_id=id_))
    return out


@pytest.mark.parametrize("seed", [0, 1])
def test_labels_do_not_depend_on_how_the_log_is_cut(seed: int) -> None:
    events = busy_log(900, seed)
    whole, counts = joined(events, len(events))
    assert counts.joined > 100
    assert counts.duplicates > 10
    for cut in (1, 7, 256):
        rows, again = joined(events, cut)
        assert rows == whole
        assert again == counts


def test_each_outcome_joins_one_slate_at_most() -> None:
    rows, counts = joined(busy_log(900, 3), 64)
    assert sum(row["clicked"] for row in rows) <= counts.joined <= counts.outcomes
    assert len({(row["slate_id"], row["position"]) for row in rows}) == len(rows)


def test_a_log_whose_beginning_was_trimmed(tmp_path: Path) -> None:
    rows, _ = joined([Click(user_id="u", item_id="z", ts=NOW), slate("u", "s", NOW + 1, ["a", "b"]),
                      Click(user_id="u", item_id="a", ts=NOW + 2)], 2, first=4000)  # fmt: skip
    assert [row["clicked"] for row in rows] == [1, 0]


def test_slates_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.evaluating.labels.HELD", 5)
    events = [slate("u", f"s{i}", NOW + i, ["a", "b"]) for i in range(20)]
    rows, counts = joined([Click(user_id="u", item_id="z", ts=NOW), *events], 4)
    assert (len(rows), counts.slates, counts.early) == (40, 20, 15)


def test_an_erasure_reaches_the_ids_that_became_the_users() -> None:
    erasures = Erasures()
    log: list[Event] = [
        Alias(user_id="ann", anonymous_id="x1", ts=NOW), Alias(user_id="bob", anonymous_id="x2", ts=NOW + 1),
        Alias(user_id="x1", anonymous_id="x0", ts=NOW - 1), Erase(user_id="ann", ts=NOW + 2),
        Alias(user_id="ann", anonymous_id="x3", ts=NOW + 3),
    ]  # fmt: skip
    for offset, event in enumerate(log):
        erasures.look(offset, round(event.ts * 1000), encode(event))
    erasures.look(9, 0, b"erase is said here, but this is no event")
    assert erasures.found() == {"ann": 3, "x1": 0, "x0": 2}


def test_actions_named_like_other_kinds_come_back() -> None:
    rows, _ = joined([Click(user_id="u", item_id="z", ts=NOW)], 1)
    assert rows == []
    from infra.evaluating.labels import event_row

    action = Action(user_id="u", item_id="a", ts=NOW, name="rating", context={"device": "tv"})
    assert exports.event_of(event_row(action, NOW, 0, 1)) == action
    assert exports.event_of(event_row(Action(user_id="u", item_id="a", ts=NOW, name="buy"), NOW, 0, 1)).name == "buy"  # type: ignore[union-attr]


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "form", "out", "said"),
    [
        (["clicks"], None, None, "expected one or more of slates, events, items, got clicks"),
        (["slates"], "xlsx", None, "--format: expected csv, csv.gz or parquet, got 'xlsx'"),
        (["slates", "events"], None, Path("x.csv"), "expected a folder for 2 tables, got the file x.csv"),
        (["slates"], "parquet", Path("x.csv"), "expected a name that ends in .parquet, as --format says, got x.csv"),
    ],
)
def test_what_cannot_be_written(what: list[str], form: str | None, out: Path | None, said: str) -> None:
    with pytest.raises(ExportError, match=said.replace("(", r"\(")):
        places(what, form, out)


def test_places() -> None:
    assert places(["slates"], None, None) == {"slates": Path("freshet-export/slates.csv")}
    assert places(["events"], None, Path("e.csv.gz")) == {"events": Path("e.csv.gz")}
    assert places(["events", "slates"], "parquet", Path("o"))["events"] == Path("o/events.parquet")


def test_since() -> None:
    assert since_of("90m", 10_000.0) == 4_600.0
    assert since_of("2026-11-22T10:30:00", 0.0) == since_of("1795343400", 0.0) == 1795343400.0
    with pytest.raises(SystemExit):
        since_of("yesterday", 0.0)


def test_without_pyarrow_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ExportError, match=r'install "freshet\[parquet\]"'):
        exports.arrow()


def test_what_cannot_be_read(tmp_path: Path) -> None:
    bad = tmp_path / "events.csv"
    bad.write_text("user,item\nu,i\n")
    with pytest.raises(ReplayError, match="expected the columns of `freshet export`, ts, recorded"):
        read_log(bad, "freshet")
    bad.write_text(",".join(exports.EVENTS) + "\n" + "x" + "," * (len(exports.EVENTS) - 1) + "\n")
    with pytest.raises(ReplayError, match=r"events.csv:2: ts: expected a number number, got 'x'"):
        read_log(bad, "freshet")
    (tmp_path / "events.parquet").write_bytes(b"PAR1nothing")
    with pytest.raises(ReplayError, match="expected one table of events"):
        read_log(tmp_path, "freshet")
    pytest.importorskip("pyarrow")
    with pytest.raises(ReplayError, match="expected a parquet file"):
        read_log(tmp_path / "events.parquet", "freshet")


def test_a_failure_leaves_no_file(two: Settings, tmp_path: Path) -> None:
    written(known_log()[:2], two)
    paths = places(["events"], None, tmp_path / "out")

    def fails(*_: object) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        asyncio.run(export(two, paths, advance=fails))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_pseudonym_is_of_its_key() -> None:
    names = Pseudonyms()
    assert names.hide({"user_id": "a"}) == names.hide({"user_id": "a"}) != Pseudonyms().hide({"user_id": "a"})
    assert json.dumps(names.hide({"user_id": "a", "event_id": "x"})).count("null") == 1
