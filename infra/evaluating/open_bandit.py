"""Reader of Open Bandit logs (Saito et al. 2021): what was shown where, with which probability, and was it clicked.

Knows nothing of estimators. A file is taken whole or refused: a row left out would bend every propensity.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

COLUMNS: Final = ("timestamp", "item_id", "position", "click", "propensity_score")


class BanditLogError(ValueError):
    """A log that cannot be evaluated: where, what was expected, what came, what to do."""


@dataclass(frozen=True, slots=True)
class BanditLog:
    """Rows of one policy's log; arrays of one length n.

    item, position: i64[n] from 0; click: f64[n], 0 or 1; propensity: f64[n] in (0, 1], the probability of the item
    given the position at that time (not of the whole slate); slate: i64[n], equal for what was shown together.
    """

    policy: str
    item: NDArray[np.int64]
    position: NDArray[np.int64]
    click: NDArray[np.float64]
    propensity: NDArray[np.float64]
    slate: NDArray[np.int64]


def read_bandit_log(folder: Path, policy: str, campaign: str) -> BanditLog:
    """Read <folder>/<policy>-<campaign>.csv, .gz too; raises BanditLogError.

    Rows of the same time and user are one slate. Items and positions are numbers in these logs; positions begin at 1.
    """
    file = _file(folder, policy, campaign)
    try:
        rows = list(_rows(file))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BanditLogError(f"{file}: expected a gzip file, got something else ({error})") from error
    except UnicodeDecodeError as error:
        raise BanditLogError(f"{file}: expected utf-8 text, got byte {error.object[error.start]:#04x}") from error
    if not rows:
        raise BanditLogError(f"{file}: expected at least one row, got none")
    items, positions, clicks, propensities, slates = zip(*rows, strict=True)
    numbers: dict[tuple[str, ...], int] = {}
    return BanditLog(
        policy, np.array(items, np.int64), np.array(positions, np.int64) - 1, np.array(clicks, np.float64),
        np.array(propensities, np.float64), np.array([numbers.setdefault(s, len(numbers)) for s in slates], np.int64),
    )  # fmt: skip


def _file(folder: Path, policy: str, campaign: str) -> Path:
    if not folder.is_dir():
        raise BanditLogError(f"--log: expected a folder of Open Bandit files, got {folder}, which is none")
    for name in (f"{policy}-{campaign}.csv.gz", f"{policy}-{campaign}.csv"):
        if (folder / name).is_file():
            return folder / name
    there = sorted({path.name.split(".csv")[0] for path in folder.glob("*-*.csv*") if "context" not in path.name})
    raise BanditLogError(
        f"{folder}: expected {policy}-{campaign}.csv or .csv.gz (POLICY-CAMPAIGN), found "
        f"{', '.join(there) or 'no such file'}; choose --from, --to and --campaign among them"
    )


def _rows(file: Path) -> Iterator[tuple[int, int, int, float, tuple[str, ...]]]:
    opened = gzip.open if file.suffix == ".gz" else open
    with opened(file, "rt", encoding="utf-8-sig", newline="") as text:
        lines = csv.reader(text)
        header = next(lines, [])
        if missing := [name for name in COLUMNS if name not in header]:
            raise BanditLogError(f"{file}: expected the columns {', '.join(COLUMNS)}; {', '.join(missing)} missing")
        places = [header.index(name) for name in COLUMNS]
        user = [place for place, name in enumerate(header) if name.startswith("user_feature")]
        for row in lines:
            if row:
                yield _row(f"{file}:{lines.line_num}", row, len(header), places, user)


def _row(
    where: str, row: list[str], width: int, places: list[int], user: list[int]
) -> tuple[int, int, int, float, tuple[str, ...]]:
    if len(row) != width:
        raise BanditLogError(f"{where}: expected {width} fields as in the header, got {len(row)}")
    time, *values = (row[place] for place in places)
    numbers = []
    for name, value in zip(COLUMNS[1:], values, strict=True):
        try:
            numbers.append(float(value))
        except ValueError:
            raise BanditLogError(f"{where}: {name}: expected a number, got {value!r}") from None
    item, position, click, propensity = numbers
    if not (0 <= item < 1e6 and item == int(item)):
        raise BanditLogError(f"{where}: item_id: expected a whole number from 0, got {values[0]!r}")
    if not (1 <= position < 1000 and position == int(position)):
        raise BanditLogError(f"{where}: position: expected a whole number from 1, got {values[1]!r}")
    if click not in (0.0, 1.0):
        raise BanditLogError(f"{where}: click: expected 0 or 1, got {values[2]!r}")
    if not 0.0 < propensity <= 1.0:
        raise BanditLogError(
            f"{where}: propensity_score: expected a probability above 0 and at most 1, got {values[3]!r}; what was "
            "shown had one: log it with the row, or leave this log"
        )
    return int(item), int(position), int(click), propensity, (time, *(row[place] for place in user))
