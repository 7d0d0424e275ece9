"""Readers of real logs: MovieLens, MovieTweetings, Online Retail, KuaiRand and any CSV, as columns in time order.

Knows nothing about models. A row that cannot be read is counted and listed with its line number, never silently
dropped; a file that cannot be the format is an error that says where and what was expected.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Final

from streaming.events import Action, Click, Dwell, Interaction, Rating, View, decode, encode
from streaming.replay import exports
from streaming.replay.catalogue import COLUMNS as DESCRIBING
from streaming.replay.catalogue import Catalogue

FORMATS: Final = ("movielens", "movietweetings", "online-retail", "kuairand", "csv", "freshet")
EXCLUSIONS: Final = {
    "movielens": "seen", "movietweetings": "seen", "online-retail": "invoice", "kuairand": "none", "csv": "none",
    "freshet": "none",
}  # fmt: skip
"""What a format leaves out of a slate by default."""
TARGET, HATED, FOLLOWS = 1, 0, -1
"""What an event is to a replay: ranked; only scored, as what should score low; neither, as it tells of the one before.
"""
PUSHED: Final = ("hide", "skip")
"""Actions that say no."""
CONTEXT: Final = "context:"
"""Before the name of a field of the context: --columns context:device=COLUMN."""
COLUMNS: Final = ("user", "item", "ts", "rating", "dwell", "kind", "basket")
LISTED: Final = 20


class ReplayError(ValueError):
    """A log that cannot be replayed: where, what was expected, what came."""


@dataclass(slots=True)
class ReplayLog:
    """Rows in time order, ties in file order: one interaction each, and the basket it belongs to ("" for none).

    bad: how many rows had unreadable values and the first of them; dropped: rows that the cleaning removed, by reason;
    catalogue: what is said of the items.
    """

    events: list[Interaction] = field(default_factory=list)
    baskets: list[str] = field(default_factory=list)
    bad: int = 0
    bad_rows: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    catalogue: Catalogue = field(default_factory=Catalogue)

    def reject(self, where: str, problem: str) -> None:
        """Count a bad row, and list it while the list is short."""
        self.bad += 1
        if len(self.bad_rows) < LISTED:
            self.bad_rows.append(f"{where}: {problem}")

    def drop(self, reason: str) -> None:
        """Count a row that the cleaning removes."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


def read_log(path: Path, form: str, columns: Mapping[str, str] | None = None, limit: int | None = None) -> ReplayLog:
    """Read a log file or folder of one of FORMATS, sorted by ts, the first `limit` rows; raises ReplayError."""
    if form not in FORMATS:
        raise ReplayError(f"--format: expected one of {', '.join(FORMATS)}, got {form!r}")
    if columns and form != "csv":
        raise ReplayError("--columns: goes with --format csv only")
    file = _file(path, form)
    log = ReplayLog()
    try:
        {
            "movielens": _movielens, "movietweetings": _movietweetings, "online-retail": _retail, "kuairand": _kuairand,
            "freshet": _export,
        }.get(form, lambda f, g: _csv(f, g, columns or {}))(file, log)  # fmt: skip
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ReplayError(f"{file}: expected a gzip file, got something else ({error})") from error
    except UnicodeDecodeError as error:
        raise ReplayError(f"{file}: expected utf-8 text, got byte {error.object[error.start]:#04x}") from error
    if not log.events:
        listed = "".join(f"\n  {row}" for row in log.bad_rows[:3])
        raise ReplayError(f"{file}: expected at least one event, got none ({log.bad} unreadable rows){listed}")
    order = sorted(range(len(log.events)), key=lambda i: log.events[i].ts)
    log.events, log.baskets = [log.events[i] for i in order], [log.baskets[i] for i in order]
    if limit is not None:
        rows = accumulate(role != FOLLOWS for role in roles(log.events))
        log.events = [event for event, row in zip(log.events, rows, strict=True) if row <= limit]
        log.baskets = log.baskets[: len(log.events)]
    log.catalogue.keep({event.item_id for event in log.events})
    return log


def roles(events: Iterable[Interaction]) -> list[int]:
    """Return TARGET, HATED or FOLLOWS of each event, in order: a skip or hide is hated, a dwell follows its click."""
    newest, out = dict[str, str](), list[int]()
    for event in events:
        if isinstance(event, Action) and event.name in PUSHED:
            out.append(HATED)
        elif isinstance(event, Dwell) and newest.get(event.user_id) == event.item_id:
            out.append(FOLLOWS)
            continue
        else:
            out.append(TARGET)
        newest[event.user_id] = event.item_id if isinstance(event, Click) else ""
    return out


def _file(path: Path, form: str) -> Path:
    if path.is_dir() and form == "freshet":
        try:
            path = exports.find(path, "events") or path / "events.csv"
        except exports.ExportError as error:
            raise ReplayError(str(error)) from error
    names = {
        "movielens": "ratings.csv", "movietweetings": "ratings.dat", "online-retail": "online-retail.csv",
        "kuairand": "interactions.tsv",
    }  # fmt: skip
    if path.is_dir():
        if form not in names:
            raise ReplayError(f"{path}: expected a file for --format {form}, got a folder")
        for name in (names[form], names[form] + ".gz"):
            if (path / name).is_file():
                return path / name
        raise ReplayError(f"{path}: expected {names[form]} or {names[form]}.gz in it, found neither")
    if not path.is_file():
        raise ReplayError(f"{path}: no such file or folder")
    if path.stat().st_size == 0:
        raise ReplayError(f"{path}: the file is empty")
    return path


def _lines(file: Path, errors: str = "strict") -> Iterator[str]:
    if file.suffix == ".gz":
        with gzip.open(file, "rt", encoding="utf-8-sig", errors=errors, newline="") as lines:
            yield from lines
    else:
        with file.open("rt", encoding="utf-8-sig", errors=errors, newline="") as lines:
            yield from lines


def _beside(file: Path, name: str, read: Callable[[str, Iterator[str]], None]) -> None:
    """Read the catalogue that lies beside a log under this name or with .gz, where there is one."""
    for path in (file.parent / name, file.parent / f"{name}.gz"):
        if path.is_file():
            read(path.name, _lines(path, errors="replace"))
            return


def _table(
    file: Path, log: ReplayLog, wanted: tuple[str, ...], delimiter: str = ",", optional: tuple[str, ...] = ()
) -> Iterator[tuple[str, list[str]]]:
    """Yield (file:line, the wanted columns, then the optional ones that are there) of a CSV with a header."""
    reader = csv.reader(_lines(file), delimiter=delimiter)
    header = [name.strip() for name in next(reader, [])]
    missing = [name for name in wanted if name not in header]
    if missing:
        raise ReplayError(
            f"{file}:1: expected the column{'s' * (len(missing) > 1)} {', '.join(missing)},"
            f" got {', '.join(header) or 'nothing'}"
        )
    places = [header.index(name) for name in (*wanted, *optional) if name in header]
    last = max(places)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            log.reject(f"{file.name}:{reader.line_num}", str(error))
            continue
        if len(row) > last:
            yield f"{file.name}:{reader.line_num}", [row[place] for place in places]
        elif row:
            log.reject(f"{file.name}:{reader.line_num}", f"expected {len(header)} columns, got {len(row)}")


def _add(log: ReplayLog, where: str, make: Callable[[], Interaction], basket: str = "") -> None:
    """Make one event and append it, or list the row as bad."""
    try:
        event = make()
        if not event.user_id or not event.item_id:
            raise ValueError("expected a user and an item, got an empty one")
        decode(encode(event))  # the limits of the door: what the log would refuse is no row to replay
    except ValueError as error:
        log.reject(where, str(error))
        return
    log.events.append(event)
    log.baskets.append(basket)


def _number(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{what}: expected a number, got {text[:40]!r}")
    return value


def _time(text: str, what: str = "ts") -> float:
    """Read seconds since the epoch, or an ISO date (UTC where it names no zone)."""
    try:
        ts = float(text)
    except ValueError:
        try:
            date = datetime.fromisoformat(text.strip())
        except ValueError:
            raise ValueError(f"{what}: expected seconds or an ISO date, got {text[:40]!r}") from None
        ts = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    if not 0.0 <= ts < 1e11:
        raise ValueError(f"{what}: expected seconds since the epoch (not ms), got {text[:40]!r}")
    return ts


def _rating(user: str, item: str, value: str, scale: tuple[float, float], ts: str) -> Interaction:
    number = _number(value, "rating")
    if not scale[0] <= number <= scale[1]:
        raise ValueError(f"rating: expected {scale[0]:g} to {scale[1]:g}, got {value}")
    return Rating(user_id=user, item_id=item, value=number, scale=scale, ts=_time(ts, "timestamp"))


def _movielens(file: Path, log: ReplayLog) -> None:
    for where, (user, item, value, ts) in _table(file, log, ("userId", "movieId", "rating", "timestamp")):
        _add(log, where, lambda u=user, i=item, r=value, t=ts: _rating(u, i, r, (0.5, 5.0), t))  # type: ignore[misc]
    _beside(file, "movies.csv", log.catalogue.movielens)


def _movietweetings(file: Path, log: ReplayLog) -> None:
    for number, line in enumerate(_lines(file), 1):
        parts = line.rstrip("\r\n").split("::")
        if len(parts) != 4:
            if line.strip():
                log.reject(
                    f"{file.name}:{number}", f"expected user::item::rating::timestamp, got {line[:40].rstrip()!r}"
                )
            continue
        _add(log, f"{file.name}:{number}", lambda p=parts: _rating(p[0], p[1], p[2], (0.0, 10.0), p[3]))  # type: ignore[misc]
    _beside(file, "movies.dat", log.catalogue.movietweetings)


def _retail(file: Path, log: ReplayLog) -> None:
    """Clean as the recipe says: no cancellations, no returns, product codes only, a code once per invoice."""
    bought: set[tuple[str, str]] = set()
    wanted = ("InvoiceNo", "StockCode", "Quantity", "InvoiceDate", "CustomerID")
    rows = _table(file, log, wanted, optional=("Description",))
    for where, (invoice, code, quantity, date, customer, *description) in rows:
        try:
            amount = _number(quantity, "Quantity")
        except ValueError as error:
            log.reject(where, str(error))
            continue
        if invoice.startswith("C"):
            log.drop("cancellation")
        elif amount <= 0:
            log.drop("quantity not positive")
        elif not (len(code) >= 5 and code[:5].isdigit()):
            log.drop("not a product code")
        elif (invoice, code) in bought:
            log.drop("code repeated in its invoice")
        else:
            bought.add((invoice, code))
            # A purchase of the newest item would update its entry; as clicks every line is an entry of its own.
            user = customer.removesuffix(".0") or f"invoice {invoice}"
            _add(
                log, where, lambda u=user, c=code, d=date: Click(user_id=u, item_id=c, ts=_time(d, "InvoiceDate")),  # type: ignore[misc]
                invoice,
            )  # fmt: skip
            log.catalogue.columns(where, code, {"title": "".join(description)})


def _kuairand(file: Path, log: ReplayLog) -> None:
    """Read a video liked (label 1) as a click and then its dwell, one that was hated (label 0) as the action `hide`."""
    wanted = ("user_id", "video_id", "time_ms", "play_time_ms", "label")
    for where, (user, video, ms, played, label) in _table(file, log, wanted, "\t"):
        try:
            ts, seconds = _time(str(_number(ms, "time_ms") / 1000), "time_ms"), _number(played, "play_time_ms") / 1000
            if label not in ("0", "1"):
                raise ValueError(f"label: expected 0 or 1, got {label[:40]!r}")
            dwell = Dwell(user_id=user, item_id=video, ts=ts, seconds=seconds)
            decode(encode(dwell))  # a row is read whole or not at all
        except ValueError as error:
            log.reject(where, str(error))
            continue
        if label == "0":
            _add(log, where, lambda d=dwell: Action(user_id=d.user_id, item_id=d.item_id, ts=d.ts, name="hide"))  # type: ignore[misc]
            continue
        _add(log, where, lambda d=dwell: Click(user_id=d.user_id, item_id=d.item_id, ts=d.ts))  # type: ignore[misc]
        _add(log, where, lambda d=dwell: d)  # type: ignore[misc]


def _csv(file: Path, log: ReplayLog, columns: Mapping[str, str]) -> None:
    known = (*COLUMNS, *DESCRIBING)
    unknown = [name for name in columns if name not in known and not name.startswith(CONTEXT)]
    if unknown:
        raise ReplayError(f"--columns: expected {', '.join(known)}, {CONTEXT}NAME, got {', '.join(unknown)}")
    names = {"user": "user", "item": "item", "ts": "ts", **columns}
    fields = list(names)
    rows = list(_table(file, log, tuple(names.values())))
    finite = _finite(row[fields.index("rating")] for _, row in rows) if "rating" in names else []
    scale = (min(finite), max(finite)) if len(set(finite)) > 1 else (0.0, max([1.0, *finite]))
    described: dict[str, tuple[float, str, dict[str, str]]] = {}
    for where, values in rows:
        row, count = dict(zip(fields, values, strict=True)), len(log.events)
        _add(log, where, lambda r=row: _interaction(r, scale), row.get("basket", ""))  # type: ignore[misc]
        for event in log.events[count:]:
            if event.ts < described.get(event.item_id, (math.inf,))[0]:
                described[event.item_id] = (event.ts, where, row)
    for item_id, (_, where, row) in described.items():
        log.catalogue.columns(where, item_id, row)


def _export(file: Path, log: ReplayLog) -> None:
    """Read the events that `freshet export` wrote, and the catalogue beside them, where there is one."""
    try:
        for _, event in exports.events(file, log.reject):
            if isinstance(event, View):
                log.drop("view, which says what was shown and not what was chosen")
                continue
            event.event_id = None  # each was applied once
            log.events.append(event)
            log.baskets.append("")
        if (beside := exports.find(file.parent, "items")) is not None:
            log.catalogue.items.update((item.item_id, item) for _, item in exports.items(beside))
    except exports.ExportError as error:
        raise ReplayError(str(error)) from error


def _finite(texts: Iterable[str]) -> list[float]:
    """Return the finite numbers among some texts: a rating that is none is the row's own problem, told later."""
    found = []
    for text in texts:
        with contextlib.suppress(ValueError):
            if math.isfinite(value := float(text)):
                found.append(value)
    return found


def _interaction(row: dict[str, str], scale: tuple[float, float]) -> Interaction:
    event = _bare(row, scale)
    context = {name.removeprefix(CONTEXT): value for name, value in row.items() if name.startswith(CONTEXT) and value}
    event.context = context or None
    return event


def _bare(row: dict[str, str], scale: tuple[float, float]) -> Interaction:
    """Read a CSV row: its kind by the column `kind`, else by which of rating and dwell it has, else a click."""
    user, item, ts = row["user"], row["item"], _time(row["ts"])
    kind = row.get("kind") or ("rating" if row.get("rating") else "dwell" if row.get("dwell") else "click")
    if kind == "rating":
        return Rating(user_id=user, item_id=item, ts=ts, value=_number(row.get("rating", ""), "rating"), scale=scale)
    if kind == "dwell":
        return Dwell(user_id=user, item_id=item, ts=ts, seconds=_number(row.get("dwell", ""), "dwell"))
    if kind == "click":
        return Click(user_id=user, item_id=item, ts=ts)
    if kind == "view":
        return View(user_id=user, item_id=item, ts=ts)
    return Action(user_id=user, item_id=item, ts=ts, name=kind)
