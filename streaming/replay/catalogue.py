"""What logs say of their items: titles, genres, descriptions, as the entries that the catalogue's door would take.

MovieLens `movies.csv`, MovieTweetings `movies.dat`, the Description of Online Retail, columns of any CSV. An item's
entry is what its first row says: a later row is not known yet when the item appears. Tags that users gave later
(`tags.csv`) are left out for the same reason. Knows nothing about files or models: it is given lines and columns.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from streaming.events import Item, decode_item, encode

COLUMNS: Final = ("title", "categories", "tags", "provider", "text")
"""Columns of a CSV that describe its item; categories and tags are separated by |."""
LISTED: Final = 20
_YEAR: Final = re.compile(r"\((1[89]\d\d|20\d\d)[^()]*\)\s*$")
_NO_GENRES: Final = "(no genres listed)"


@dataclass(slots=True)
class Catalogue:
    """Entries by item id; bad: how many rows could not be read, and the first of them."""

    items: dict[str, Item] = field(default_factory=dict)
    bad: int = 0
    bad_rows: list[str] = field(default_factory=list)

    def reject(self, where: str, problem: str) -> None:
        """Count a bad row, and list it while the list is short."""
        self.bad += 1
        if len(self.bad_rows) < LISTED:
            self.bad_rows.append(f"{where}: {problem}")

    def add(self, where: str, item: Item) -> None:
        """Take an item's entry, unless one came before or the catalogue's door would refuse it."""
        if item.item_id in self.items:
            return
        try:
            if "\ufffd" in item.title:
                raise ValueError(f"title: expected utf-8 text, got {item.title[:40]!r}")
            self.items[item.item_id] = decode_item(encode(item))
        except ValueError as error:
            self.reject(where, str(error))

    def keep(self, ids: set[str]) -> None:
        """Forget the entries of all other items: nothing of them is replayed."""
        self.items = {name: item for name, item in self.items.items() if name in ids}

    def movielens(self, name: str, lines: Iterable[str]) -> None:
        """Read `movieId,title,genres`, genres separated by |."""
        for number, row in _rows(csv.reader(lines), self, name):
            if number > 1 or row[:1] != ["movieId"]:
                if len(row) == 3 and row[0]:
                    self.add(f"{name}:{number}", _film(row[0], row[1], row[2]))
                elif row:
                    self.reject(f"{name}:{number}", f"expected movieId,title,genres, got {','.join(row)[:40]!r}")

    def movietweetings(self, name: str, lines: Iterable[str]) -> None:
        """Read `movieId::title (year)::genres`."""
        for number, line in enumerate(lines, 1):
            parts = line.rstrip("\r\n").split("::")
            if len(parts) == 3 and parts[0]:
                self.add(f"{name}:{number}", _film(*parts))
            elif line.strip():
                self.reject(f"{name}:{number}", f"expected movieId::title::genres, got {line[:40].rstrip()!r}")

    def columns(self, where: str, item_id: str, row: Mapping[str, str]) -> None:
        """Read the describing columns of one row of a CSV; a row that has none of them says nothing."""
        if item_id and item_id not in self.items and any(row.get(name) for name in COLUMNS):
            title = row.get("title", "").strip()
            self.add(
                where,
                Item(
                    item_id=item_id, title=title, text=row.get("text", ""), categories=parts_of(row.get("categories")),
                    tags=parts_of(row.get("tags")), provider=row.get("provider", "").strip(),
                    published_at=published(title),
                ),
            )  # fmt: skip


def _rows(reader: Iterator[list[str]], catalogue: Catalogue, name: str) -> Iterator[tuple[int, list[str]]]:
    number = 0
    while True:
        number += 1
        try:
            yield number, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            catalogue.reject(f"{name}:{number}", str(error))


def _film(item_id: str, title: str, genres: str) -> Item:
    named = [] if genres == _NO_GENRES else parts_of(genres)
    return Item(item_id=item_id, title=title.strip(), categories=named, published_at=published(title))


def parts_of(text: str | None) -> list[str]:
    """Return the distinct non-empty parts of a text separated by |."""
    return list(dict.fromkeys(part.strip() for part in (text or "").split("|") if part.strip()))


def published(title: str) -> float | None:
    """Return the start (s) of the year that ends a title in brackets, None where there is none.

    >>> published("Toy Story (1995)"), published("1984")
    (788918400.0, None)
    """
    found = _YEAR.search(title)
    return datetime(int(found[1]), 1, 1, tzinfo=UTC).timestamp() if found else None
