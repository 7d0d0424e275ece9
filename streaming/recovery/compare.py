"""What is stored or derived against what the log folds to, in words; knows nothing of where either comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import xxhash

from models.examples import CodecError, Entries
from models.profile import canonical

DIGEST: Final = 16
"""Bytes that stand for one entry: its source offset, then a hash of all of it."""


def differences(what: str, stored: Mapping[int, bytes], folded: Mapping[int, bytes]) -> list[str]:
    """Name each of the values by item hash that differs."""
    return [
        difference(f"{what} {key:016x}", stored.get(key), folded.get(key))
        for key in sorted(stored.keys() | folded.keys())
        if stored.get(key) != folded.get(key)
    ]


def same(name: str, stored: bytes | None, folded: bytes | None) -> bool:
    """Say whether two values of a key are the same; of a profile, whichever version of the layout wrote them."""
    if stored == folded or stored is None or folded is None or ":profile:" not in name:
        return stored == folded
    try:
        return canonical([stored]) == canonical([folded])
    except CodecError:
        return False


def difference(name: str, stored: bytes | None, folded: bytes | None) -> str:
    """Say how two values of a name differ: one missing, or the first byte."""
    if stored is None or folded is None:
        return f"{name}: {'missing in the store' if stored is None else 'not in the log'}"
    at = next(
        (i for i, (a, b) in enumerate(zip(stored, folded, strict=False)) if a != b), min(len(stored), len(folded))
    )
    return f"{name}: stored {len(stored)} bytes, folded {len(folded)}, first difference at byte {at}"


def digests(entries: Entries) -> list[bytes]:
    """Return 16 bytes for each entry: source offset and hash of everything in it."""
    return [
        offset.to_bytes(8, "big") + xxhash.xxh3_64_digest(entries.slice(i, i + 1, []).to_bytes())
        for i, offset in enumerate(entries.offset.tolist())
    ]


def first_differences(kept: Mapping[int, bytes], derived: Mapping[int, bytes]) -> list[str]:
    """Name the first event of each source partition whose `examples` entries are not what folding `events` derives.

    Both are joined digests by partition; entries of events below the first that was derived are not compared, for
    what they came from is gone.
    """
    named = []
    for p in sorted(kept.keys() | derived.keys()):
        b = derived.get(p, b"")
        a = _from(kept.get(p, b""), int.from_bytes(b[:8], "big"))
        if a == b:
            continue
        size = min(len(a), len(b))
        at = next((i for i in range(0, size, DIGEST) if a[i : i + DIGEST] != b[i : i + DIGEST]), size)
        there, here = (int.from_bytes(side[at : at + 8], "big") if at < len(side) else None for side in (a, b))
        where = min(offset for offset in (there, here) if offset is not None)
        what = "differs from" if there == here else "is missing in" if here == where else "does not come of"
        named.append(f"entry of events[{p}]@{where} {what} {'`events`' if what.startswith('does') else '`examples`'}")
    return named


def _from(found: bytes, first: int) -> bytes:
    offsets = np.frombuffer(found, ">u8")[::2]
    return found[int(np.searchsorted(offsets, first)) * DIGEST :]
