"""Tokens of a catalogue entry: what it shares with others, hashed into 65,536 buckets; and what a viewer's tokens say.

    lift(t) = log((H_t + 5 s_t) / ((H + 5) s_t))

H entries of the viewer's sequence are of known items, H_t of them have token t; s_t is its share of all events so far.
An item's lift is the mean over its categories, tags, provider and year of publication, and the sum over the words of
its title: rare tokens say more than common ones, and nothing is said where nothing is known. Hashing is fixed: every
process computes the same from an entry alone. Knows nothing of transports or models.
"""

from __future__ import annotations

import math
import re
import unicodedata
from itertools import islice
from typing import Final, Protocol

import numpy as np
import xxhash
from numba import njit
from numpy.typing import NDArray

BUCKETS: Final = 65_536
ROOM: Final = 24
"""Tokens of one item at most, fields before words."""
FIELDS: Final = 16
"""Of them categories, tags, provider and year."""
READ: Final = 2048
"""Characters of title and text in which words are looked for: the cost of an entry is bounded by it."""
_YEAR_S: Final = 31_556_952.0
_WORD: Final = re.compile(r"\w{3,}")

I32 = NDArray[np.int32]
F64 = NDArray[np.float64]


class Described(Protocol):
    """The fields of a catalogue entry that say what it is about."""

    title: str
    text: str
    categories: list[str]
    tags: list[str]
    provider: str
    published_at: float | None


def tokens(entry: Described) -> tuple[I32, int]:
    """Return the tokens i32[ROOM] of an entry, -1 where there are no more, and how many of them are of fields.

    >>> from types import SimpleNamespace
    >>> film = SimpleNamespace(title="Heat", text="", categories=["Drama"], tags=[], provider="", published_at=None)
    >>> found, fields = tokens(film)
    >>> (found >= 0).sum(), fields
    (2, 1)
    """
    year = "" if entry.published_at is None else str(math.floor(1970.0 + entry.published_at / _YEAR_S))
    named = [
        *(f"category {name}" for name in entry.categories), f"provider {entry.provider}" if entry.provider else "",
        f"year {year}" if year else "", *(f"tag {name}" for name in entry.tags),
    ]  # fmt: skip
    fields = list(dict.fromkeys(_bucket(name.casefold()) for name in named[: 2 * FIELDS] if name))[:FIELDS]
    text = unicodedata.normalize("NFKC", f"{entry.title[:READ]} {entry.text[:READ]}"[:READ]).casefold()
    words = (_bucket(f"word {found[0]}") for found in _WORD.finditer(text) if not found[0].isdigit())
    room = ROOM - len(fields)
    out: I32 = np.full(ROOM, -1, np.int32)
    both = [*fields, *islice(dict.fromkeys(islice(words, 4 * ROOM)), room)]
    out[: len(both)] = both
    return out, len(fields)


def _bucket(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode(errors="replace")) % BUCKETS


@njit(cache=True)
def shares(tokens, counts, n, out):  # type: ignore[no-untyped-def]
    """Fill out f64[BUCKETS] with each token's share of all events, given how often each of n items was chosen.

    One is added to every count: a token that nobody chose yet is rare, not impossible.
    """
    total = 1.0
    for t in range(len(out)):
        out[t] = 1.0
    for i in range(n):
        total += counts[i]
        for k in range(tokens.shape[1]):
            if tokens[i, k] < 0:
                break
            out[tokens[i, k]] += counts[i]
    for t in range(len(out)):
        out[t] /= total


@njit(cache=True)
def lifts(rows, history, tokens, fields, share, out, column):  # type: ignore[no-untyped-def]
    """Add two columns to out f64[m, F]: mean lift of the fields of rows i64[m], and summed lift of their words."""
    known, counts = 0.0, np.zeros(65536, np.uint8)
    for p in range(len(history)):
        row = history[p]
        if row >= 0:
            known += 1.0
            for k in range(tokens.shape[1]):
                if tokens[row, k] < 0:
                    break
                counts[tokens[row, k]] += 1
    if known == 0.0:
        return
    for i in range(len(rows)):
        row = rows[i]
        for k in range(tokens.shape[1]):
            t = tokens[row, k]
            if t < 0:
                break
            lift = math.log((counts[t] + 5.0 * share[t]) / ((known + 5.0) * share[t]))
            if k < fields[row]:
                out[i, column] += lift / fields[row]
            else:
                out[i, column + 1] += lift
