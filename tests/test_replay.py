"""Replay of real logs: readers, errors with line numbers, the report, and the same folds as live."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from infra.cli import app
from infra.replaying_live import LiveReplay
from models.examples import item_hash
from models.profile import unpack
from models.retrieval import CHANNELS
from streaming.events import Action, Click, Dwell, Interaction, Rating, View
from streaming.replay.catalogue import Catalogue
from streaming.replay.logs import FOLLOWS, HATED, TARGET, ReplayError, ReplayLog, read_log, roles
from streaming.replay.prequential import Replay, run
from streaming.replay.report import plot
from streaming.topics import encode_token

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real data sets (../shared/data) are not here")


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def chain(n: int, seed: int = 0) -> ReplayLog:
    """Users who walk i -> i + 1 with a few jumps: what follows is learnable, what is popular says little."""
    rng, log, place = np.random.default_rng(seed), ReplayLog(), dict[int, int]()
    for t in range(n):
        user = int(rng.integers(12))
        step = 1 if rng.random() < 0.85 else int(rng.integers(40))
        place[user] = (place.get(user, 0) + step) % 40
        log.events.append(Click(user_id=f"u{user}", item_id=f"i{place[user]}", ts=1.6e9 + 30.0 * t))
        log.baskets.append("")
    return log


@pytest.fixture(scope="module")
def report() -> dict:  # type: ignore[type-arg]
    return run(chain(1500), exclusion="none")


def test_it_learns_the_chain(report: dict) -> None:  # type: ignore[type-arg]
    assert report["metrics"]["ndcg@10"] > 0.6
    assert report["metrics"]["ndcg@10"] > 2 * report["baseline"]["popularity"]["ndcg@10"]
    assert report["lead"]["low"] > 0.2


def test_the_report(report: dict) -> None:  # type: ignore[type-arg]
    assert (report["events"], report["users"], report["items"]) == (1500, 12, 40)
    assert report["never_seen_share"] == pytest.approx(40 / 1500)
    best = report["baseline"]["popularity"]
    assert best["ndcg@10"] == max(row["ndcg@10"] for row in report["baseline"]["half_lives"].values())
    assert report["baseline"]["half_lives"][best["half_life"]]["hit_rate@10"] == best["hit_rate@10"]
    assert sum(row["events"] for row in report["over_time"]) == 1500 - 40
    assert sum(row["events"] for row in report["by_history_length"].values()) == 1500 - 40
    assert set(report["channels"]) == set(CHANNELS)
    for row in report["channels"].values():
        assert 0 <= row["only_share"] <= row["recall"] <= 1
        assert row["hit_rate@10"] <= row["recall"]
    assert report["channels"]["popular"]["recall"] == pytest.approx(1.0)  # 40 items, a quota of 60
    assert report["channels"]["transition"]["hit_rate@10"] > report["channels"]["popular"]["hit_rate@10"]
    assert report["learn_us_per_event"] > 0
    assert report["recommend_us_per_request"] > 0
    json.dumps(report)


def test_the_same_log_and_seed_give_the_same_figures(report: dict) -> None:  # type: ignore[type-arg]
    again = run(chain(1500), exclusion="none")
    for name in ("metrics", "baseline", "weights", "over_time"):
        assert again[name] == report[name]


def test_replay_folds_what_live_folds() -> None:
    """Profiles, item counts and ranker lists after a replay are those of its events."""
    log = chain(200)
    replay = Replay(exclusion="none")
    for event in log.events:
        replay.step(event, "")
    mine = [event for event in log.events if event.user_id == "u3"]
    read = replay.store.read_now(0, ["u3"])
    profile = unpack(read.profiles[0], read.seen[0])
    assert [int(key) for key in profile.items] == [item_hash(e.item_id) for e in reversed(mine)][:50]
    assert profile.counters["click"] == len(mine)
    assert replay.items.popularity.weights[: replay.items.n, 7].sum() <= 200
    assert replay.items.shown.sum() > 200 * 5
    assert replay.learner.learnt == 200
    assert replay.learner.model.ranker.lists[0] > 100
    assert read.applied == 400


def test_excluded_items_are_never_offered() -> None:
    log = chain(300)
    for exclusion in ("seen", "invoice"):
        replay = Replay(exclusion=exclusion)
        had: dict[str, set[str]] = {}
        for i, event in enumerate(log.events):
            basket = f"b{i // 7}"
            slate = replay.step(event, basket)
            owner = event.user_id if exclusion == "seen" else basket
            offered = {replay.items.ids[row] for row in slate.rows}
            assert not offered & had.setdefault(owner, set())
            had[owner].add(event.item_id)


def baskets(n: int, seed: int = 0) -> ReplayLog:
    """Customers with three things of their own, who buy these again, and one more, every other day."""
    rng, log = np.random.default_rng(seed), ReplayLog()
    for b in range(n):
        user = int(rng.integers(15))
        for item in (*(f"u{user}-{k}" for k in range(3)), f"any-{int(rng.integers(30))}"):
            log.events.append(Click(user_id=f"u{user}", item_id=item, ts=1.6e9 + 2 * 86400.0 * b))
            log.baskets.append(f"b{b}")
    return log


def test_baskets_are_ranked_before_they_begin() -> None:
    """One slate a basket, at its first row, of the state before it; nothing of it is left out; then all is learnt."""
    log, replay = baskets(60), Replay(exclusion="invoice")
    for b in range(60):
        before = replay.learner.learnt
        own = {event.item_id for event in log.events[4 * b : 4 * b + 4]}
        slate = replay.offer(log.events[4 * b : 4 * b + 4], range(4 * b, 4 * b + 4))
        assert replay.learner.learnt == before + 4
        if b > 50:
            assert len(own & {replay.items.ids[row] for row in slate.rows}) >= 3
    assert (replay.trail.slates, len(replay.trail.ranks)) == (60, 240)
    assert replay.trail.lengths[:4] == [0, 0, 0, 0]
    report = run(baskets(60), exclusion="invoice", protocol="basket")
    assert (report["events"], report["slates"]) == (240, 60)
    assert report["channels"]["repeat"]["recall"] > 0.6
    assert report["metrics"]["ndcg@10"] > 2 * report["baseline"]["popularity"]["ndcg@10"]


def test_rows_of_a_basket_are_brought_together(tmp_path: Path) -> None:
    rows = "user,item,ts,order\na,x,1,1\nb,y,2,9\na,z,3,1\na,w,4,2\nb,v,5,\nb,u,6,\n"
    path = write(tmp_path / "l.csv", rows)
    log = read_log(path, "csv", {"basket": "order"})
    made: list[Replay] = []
    report = run(log, exclusion="none", protocol="basket", make=lambda **o: made.append(Replay(**o)) or made[0])  # type: ignore[func-returns-value]
    assert (report["events"], report["slates"]) == (6, 5)
    assert made[0].trail.events == [0, 2, 1, 3, 4, 5]
    with pytest.raises(ReplayError, match="expected rows with a basket"):
        run(read_log(path, "csv"), exclusion="none", protocol="basket")
    answer = CliRunner().invoke(app, ["replay", str(path), "--protocol", "week"])
    assert "--protocol: expected line or basket" in str(answer.exception)


def test_what_is_chosen_where(tmp_path: Path) -> None:
    """Other things are chosen in one place than in another, by anybody: a column of a csv as context tells it."""
    rng, lines = np.random.default_rng(5), ["user,item,ts,where"]
    for t in range(1200):
        where = int(rng.integers(4))
        item = 10 * where + min(int(rng.exponential(3)), 9)
        lines.append(f"u{rng.integers(400)},i{item},{1_600_000_000 + 600 * t},w{where}")
    path = write(tmp_path / "l.csv", "\n".join(lines) + "\n")
    log = read_log(path, "csv", {"context:place": "where"})
    assert log.events[0].context in [{"place": f"w{k}"} for k in range(4)]
    told, untold = run(log, exclusion="none"), run(read_log(path, "csv"), exclusion="none")
    assert told["metrics"]["ndcg@10"] > untold["metrics"]["ndcg@10"] + 0.1
    assert told["channels"]["context"]["hit_rate@10"] > 0.8
    with pytest.raises(ReplayError, match="context:NAME, got place"):
        read_log(path, "csv", {"place": "where"})


def test_movielens_is_sorted_with_ties_in_file_order(tmp_path: Path) -> None:
    rows = "userId,movieId,rating,timestamp\n1,a,4.0,300\n2,b,0.5,100\n3,c,5.0,300\n4,d,x,100\n5,e,6.0,100\n6,f,3\n"
    log = read_log(write(tmp_path / "ratings.csv", rows), "movielens")
    assert [event.item_id for event in log.events] == ["b", "a", "c"]
    first = log.events[0]
    assert isinstance(first, Rating)
    assert (first.value, first.scale) == (0.5, (0.5, 5.0))
    assert log.bad == 3
    assert log.bad_rows[0] == "ratings.csv:5: rating: expected a number, got 'x'"
    assert "ratings.csv:6: rating: expected 0.5 to 5" in log.bad_rows[1]
    assert "ratings.csv:7: expected 4 columns, got 3" in log.bad_rows[2]
    assert len(read_log(tmp_path, "movielens", limit=1).events) == 1


def test_movietweetings_gz_folder(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "ratings.dat.gz", "wt") as file:
        file.write("1::m1::7::100\n\n2::m2::7\n3::m3::11::100\n4::m1::0::90\n")
    log = read_log(tmp_path, "movietweetings")
    assert [event.user_id for event in log.events] == ["4", "1"]
    assert log.bad_rows == [
        "ratings.dat.gz:3: expected user::item::rating::timestamp, got '2::m2::7'",
        "ratings.dat.gz:4: rating: expected 0 to 10, got 11",
    ]


def test_online_retail_cleaning(tmp_path: Path) -> None:
    rows = """InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country
1,85123A,"A, B",6,2010-12-01 08:26:00,2.55,17850.0,UK
1,85123A,A,2,2010-12-01 08:26:00,2.55,17850.0,UK
1,POST,A,2,2010-12-01 08:26:00,2.55,17850.0,UK
C2,71053,A,2,2010-12-01 08:26:00,2.55,17850.0,UK
3,71053,A,-2,2010-12-01 08:27:00,2.55,,UK
4,71053,A,1,2010-12-01 08:27:00,2.55,,UK
5,71053,A,1,never,2.55,,UK
"""
    log = read_log(write(tmp_path / "r.csv", rows), "online-retail")
    assert [(e.user_id, e.item_id, e.ts) for e in log.events] == [
        ("17850", "85123A", 1291191960.0), ("invoice 4", "71053", 1291192020.0),
    ]  # fmt: skip
    assert log.baskets == ["1", "4"]
    assert log.dropped == {
        "code repeated in its invoice": 1, "not a product code": 1, "cancellation": 1, "quantity not positive": 1,
    }  # fmt: skip
    assert log.bad_rows == ["r.csv:8: InvoiceDate: expected seconds or an ISO date, got 'never'"]


def test_csv_kinds(tmp_path: Path) -> None:
    rows = "who,what,when,stars,stay,act\na,x,10,4,,\na,y,11,,31,\na,z,12,,,\na,z,13,,,view\na,z,14,,,like\na,,15,,,\n"
    rows += "b,x,16,2,,\n"
    log = read_log(
        write(tmp_path / "l.csv", rows), "csv",
        {"user": "who", "item": "what", "ts": "when", "rating": "stars", "dwell": "stay", "kind": "act"},
    )  # fmt: skip
    kinds = [type(event).__name__ for event in log.events]
    assert kinds == ["Rating", "Dwell", "Click", "View", "Action", "Rating"]
    assert [e.seconds for e in log.events if isinstance(e, Dwell)] == [31.0]
    assert [e.scale for e in log.events if isinstance(e, Rating)] == [(2.0, 4.0)] * 2
    assert any(isinstance(e, View) for e in log.events)
    assert log.bad_rows == ["l.csv:7: expected a user and an item, got an empty one"]


VIDEOS = (
    "user_id\tvideo_id\ttime_ms\tplay_time_ms\tlabel\n1\ta\t1649581149287\t46186\t1\n1\tb\t1649581150000\t900\t0\n"
    "1\tc\t1649581151000\t0\t1\n1\td\t1649581152000\t-5\t1\n1\te\t1649581153000\tx\t0\n1\tf\t1649581154000\t5\t2\n"
    "1\tg\tnever\t5\t1\n1\th\t1649581155000\n"
)


def test_kuairand(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "interactions.tsv.gz", "wt") as file:
        file.write(VIDEOS)
    log = read_log(tmp_path, "kuairand")
    assert [(type(e).__name__, e.item_id, getattr(e, "seconds", 0)) for e in log.events] == [
        ("Click", "a", 0), ("Dwell", "a", 46.186), ("Action", "b", 0), ("Click", "c", 0), ("Dwell", "c", 0.0),
    ]  # fmt: skip
    assert roles(log.events) == [TARGET, FOLLOWS, HATED, TARGET, FOLLOWS]
    assert log.events[0].ts == 1649581149.287
    assert (log.bad, [row.split(": ")[1] for row in log.bad_rows]) == (
        5, ["$.seconds", "play_time_ms", "label", "time_ms", "expected 5 columns, got 3"],
    )  # fmt: skip
    assert len(read_log(tmp_path / "interactions.tsv.gz", "kuairand", limit=2).events) == 3
    assert len(read_log(tmp_path, "kuairand", limit=1).events) == 2


def test_a_dwell_is_a_target_unless_it_follows_its_click() -> None:
    made: dict[str, Any] = {"user_id": "u", "ts": 1.0}
    events: list[Interaction] = [
        Dwell(item_id="a", seconds=1, **made), Click(item_id="b", **made), Dwell(item_id="b", seconds=1, **made),
        Dwell(item_id="b", seconds=9, **made), Dwell(item_id="a", seconds=1, **made),
        Action(item_id="a", name="skip", **made), Action(item_id="a", name="like", **made),
    ]  # fmt: skip
    assert roles(events) == [TARGET, TARGET, FOLLOWS, FOLLOWS, TARGET, HATED, TARGET]


def test_likes_and_hates_are_scored_and_only_likes_are_ranked() -> None:
    log, rng = chain(300), np.random.default_rng(1)
    for i in sorted(rng.choice(300, 60, replace=False).tolist(), reverse=True):
        event = log.events[i]
        hide = Action(user_id=event.user_id, item_id=f"n{i}", ts=event.ts, name="hide")
        log.events.insert(i, hide)
        log.baskets.insert(i, "")
    result = run(log, exclusion="none")
    assert result["judged"]["likes"] == 300
    assert result["judged"]["hates"] == 60
    assert 0.5 < result["auc"] <= 1.0  # nobody ever chose what is hated here
    assert sum(row["events"] for row in result["over_time"]) == 300 - 40
    assert result["events"] == 360


@pytest.mark.parametrize(
    ("text", "form", "columns", "message"),
    [
        ("", "csv", {}, "the file is empty"),
        ("user,item\na,b\n", "csv", {}, r"l\.csv:1: expected the column ts, got user, item"),
        ("user,item,ts\n", "csv", {}, "expected at least one event"),
        ("user,item,ts\na,b,now\n", "csv", {}, r"l\.csv:2: ts: expected seconds or an ISO date, got 'now'"),
        ("user,item,ts\na,b,1700000000000\n", "csv", {}, "not ms"),
        ("user,item,ts\na,b,1\n", "csv", {"colour": "x"}, "--columns: expected user, item"),
        ("user,item,ts\na,b,1\n", "movielens", {"user": "x"}, "goes with --format csv"),
        ("a\n", "parquet", {}, "--format: expected one of movielens"),
        ("a::b\n", "movietweetings", {}, "expected at least one event, got none"),
    ],
)
def test_clear_errors(tmp_path: Path, text: str, form: str, columns: dict[str, str], message: str) -> None:
    with pytest.raises(ReplayError, match=message):
        read_log(write(tmp_path / "l.csv", text), form, columns)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="no such file or folder"):
        read_log(tmp_path / "none.csv", "csv")
    with pytest.raises(ReplayError, match=r"expected ratings\.csv or ratings\.csv\.gz in it"):
        read_log(tmp_path, "movielens")
    with pytest.raises(ReplayError, match="expected a gzip file"):
        read_log(write(tmp_path / "l.csv.gz", "user,item,ts\n"), "csv")
    (tmp_path / "l.csv").write_bytes(b"user,item,ts\n\xff\xfe,b,1\n")
    with pytest.raises(ReplayError, match="expected utf-8"):
        read_log(tmp_path / "l.csv", "csv")


def test_the_verb(tmp_path: Path) -> None:
    lines = ["u,i,t,bad"] + [f"u{k % 5},i{k % 7},{1000 + k},1" for k in range(60)] + ["u1,i1,soon,1"]
    path = write(tmp_path / "l.csv", "\n".join(lines) + "\n")
    arguments = ["replay", str(path), "--columns", "user=u,item=i,ts=t", "--plot", str(tmp_path / "p.png")]
    answer = CliRunner().invoke(app, [*arguments, "--json", "--limit", "50"])
    assert answer.exit_code == 0, answer.output
    result = json.loads(answer.stdout)
    assert result["events"] == 50
    assert result["bad_rows"]["count"] == 1
    assert (tmp_path / "p.png").stat().st_size > 5000
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.output
    assert "60 events, 5 users, 7 items" in answer.output
    assert "l.csv:62: ts: expected seconds or an ISO date" in answer.output


@needs_data
@pytest.mark.parametrize(
    ("name", "form", "exclusion", "floor"),
    [
        ("movietweetings-100k", "movietweetings", "seen", 0.13),
        ("online-retail.csv.gz", "online-retail", "invoice", 0.12),
    ],
)
def test_real_data(tmp_path: Path, name: str, form: str, exclusion: str, floor: float) -> None:
    log = read_log(DATA / name, form, limit=2500)
    result = run(log, exclusion=exclusion)  # type: ignore[arg-type]
    assert result["metrics"]["ndcg@10"] > floor
    plot(result, str(tmp_path / "p.png"))


@needs_data
def test_real_rows() -> None:
    assert len(read_log(DATA / "online-retail.csv.gz", "online-retail").events) == 518_385
    assert len(read_log(DATA / "movietweetings-100k", "movietweetings").events) == 100_000
    assert len(read_log(DATA / "ml-latest-small", "movielens").events) == 100_004
    videos = read_log(DATA / "kuairand-subset", "kuairand")
    assert np.bincount(np.array(roles(videos.events)) + 1).tolist() == [33_745, 8_083, 33_745]
    assert videos.bad == 0


def test_a_live_replay_sends_again_what_a_loaded_api_refused() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.content.decode())
        if len(asked) < 3:
            return httpx.Response(429 if len(asked) == 1 else 503, headers={"Retry-After": "0"}, json={})
        return httpx.Response(200, json={"token": encode_token({3: 17})})

    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://api") as client:
        live = LiveReplay(client, "none", Catalogue())
        live.publish(Click(user_id="u", item_id="i", ts=1e9))
    assert len(asked) == 3
    assert len(set(asked)) == 1
