"""The catalogue in replay: readers with bad rows counted, entries set at first events, figures of cold start."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from models.examples import item_hash
from streaming.events import Click
from streaming.replay.catalogue import Catalogue, published
from streaming.replay.logs import ReplayLog, read_log
from streaming.replay.prequential import Replay, run


def test_movielens_films(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,1,4.0,300\n1,2,4,301\n1,3,4,302\n")
    films = 'movieId,title,genres\n1,"American President, The (1995)",Comedy|Drama|Comedy\n2,Alien\n'
    (tmp_path / "movies.csv").write_text(
        films + "3,X,(no genres listed)\n" + "4,Unseen (2001),Drama\n" + f"5,{'x' * 2000},Drama\n"
    )
    catalogue = read_log(tmp_path, "movielens").catalogue
    assert set(catalogue.items) == {"1", "3"}  # 4 is in no event, 2 and 5 cannot be read
    film = catalogue.items["1"]
    assert (film.title, film.categories) == ("American President, The (1995)", ["Comedy", "Drama"])
    assert film.published_at == 788918400.0
    assert catalogue.items["3"].categories == []
    assert catalogue.bad == 2
    assert catalogue.bad_rows[0] == "movies.csv:3: expected movieId,title,genres, got '2,Alien'"


def test_movietweetings_films_gz_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("1::0002844::7::100\n2::7::7::110\n3::8::7::110\n")
    with gzip.open(tmp_path / "movies.dat.gz", "wb") as file:
        file.write("0002844::Fantômas (1913)::Crime|Drama\n\n7::Solo\n".encode() + b"8::\xff (2001)::Drama\n")
    catalogue = read_log(tmp_path, "movietweetings").catalogue
    assert list(catalogue.items) == ["0002844"]
    assert catalogue.items["0002844"].published_at == pytest.approx(-1.7987616e9)
    assert [row.split(": ")[0] for row in catalogue.bad_rows] == ["movies.dat.gz:3", "movies.dat.gz:4"]


def test_the_first_description_of_a_product_counts(tmp_path: Path) -> None:
    rows = """InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country
1,85123A,,6,2010-12-01 08:26:00,2.55,17850.0,UK
2,85123A,WHITE HEART,6,2010-12-01 08:27:00,2.55,17850.0,UK
3,85123A,damaged,6,2010-12-01 08:28:00,2.55,17850.0,UK
"""
    (tmp_path / "r.csv").write_text(rows)
    assert read_log(tmp_path / "r.csv", "online-retail").catalogue.items["85123A"].title == "WHITE HEART"
    (tmp_path / "r.csv").write_text(rows.replace("Description", "Words"))
    assert not read_log(tmp_path / "r.csv", "online-retail").catalogue.items


def test_columns_of_a_csv_describe_from_the_earliest_row(tmp_path: Path) -> None:
    rows = "user,item,ts,name,kinds,maker\na,x,20,Late,b|c,M\na,x,10,Early (1999), a | b |,N\na,y,30,,,\n"
    (tmp_path / "l.csv").write_text(rows)
    columns = {"title": "name", "categories": "kinds", "provider": "maker"}
    catalogue = read_log(tmp_path / "l.csv", "csv", columns).catalogue
    item = catalogue.items["x"]
    assert (item.title, item.categories, item.provider) == ("Early (1999)", ["a", "b"], "N")
    assert "y" not in catalogue.items


@pytest.mark.parametrize(
    ("title", "year"),
    [
        ("Toy Story (1995)", 1995),
        ("Kin-dza-dza! (1986) ", 1986),
        ("The Office (2005-2013)", 2005),
        ("1984", None),
        ("Se7en (director's cut)", None),
        ("(2001) Odyssey", None),
        ("X (3001)", None),
    ],
)
def test_years_of_titles(title: str, year: int | None) -> None:
    found = published(title)
    assert (None if found is None else 1970 + round(found / 31556952)) == year


def described(n: int) -> ReplayLog:
    log = ReplayLog()
    rng = np.random.default_rng(1)
    for t in range(n):
        user, item = int(rng.integers(40)), int(rng.integers(1 + t // 8))
        log.events.append(Click(user_id=f"u{user}", item_id=f"i{item}", ts=1.6e9 + 60.0 * t))
        log.baskets.append("")
        log.catalogue.columns("", f"i{item}", {"title": f"Item {item} (1999)", "categories": f"c{item % 3}"})
    return log


def test_an_entry_is_known_from_the_first_event_on() -> None:
    log, known = described(80), set[str]()
    replay = Replay(catalogue=log.catalogue)
    for event in log.events:
        assert {replay.items.ids[row] for row in replay.items.catalogue} == known
        replay.step(event, "")
        known.add(event.item_id)
    row = int(replay.rows.find(np.array([item_hash("i0")], np.uint64))[0])
    assert replay.items.title(row) == "Item 0 (1999)"
    assert replay.items.born[row] == published("(1999)")
    assert row in replay.items.by_category["c0"]


def test_figures_of_cold_start_add_up() -> None:
    log = described(400)
    report = run(log, exclusion="none")
    cold = report["cold_start"]
    first = {event.item_id: i for i, event in reversed(list(enumerate(log.events)))}
    assert cold["never_seen"] == {"events": len(first), "share": len(first) / 400}
    earlier, seen = dict[str, int](), list[tuple[int, int]]()
    users = dict[str, int]()
    for event in log.events:
        if event.item_id in earlier:
            seen.append((users.get(event.user_id, 0), earlier[event.item_id]))
        earlier[event.item_id] = earlier.get(event.item_id, 0) + 1
        users[event.user_id] = users.get(event.user_id, 0) + 1
    for name, place, bounds in (
        ("user", 0, {"0": (0, 0), "1": (1, 1), "2": (2, 2), "3-5": (3, 5)}),
        ("item", 1, {"1": (1, 1), "2": (2, 2), "3-5": (3, 5), "6-10": (6, 10), "11-20": (11, 20), "21-50": (21, 50)}),
    ):
        counts = {label: sum(a <= pair[place] <= b for pair in seen) for label, (a, b) in bounds.items()}
        assert {label: row["events"] for label, row in cold[name].items()} == counts
    row = cold["item"]["3-5"]
    assert row["lead"]["ndcg@10"] == pytest.approx(row["ndcg@10"] - row["popularity"]["ndcg@10"])
    assert row["lead"]["low"] <= row["lead"]["ndcg@10"] <= row["lead"]["high"]
    assert report["catalogue"] == {"items": len(first), "bad_rows": 0, "first": []}


def test_an_empty_catalogue_changes_nothing() -> None:
    log = described(60)
    log.catalogue = Catalogue()
    assert run(log, exclusion="none")["catalogue"]["items"] == 0
