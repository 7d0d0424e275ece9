"""Names of contexts: values such as device=phone under which items were chosen. Pure bytes and hashes.

A context keeps what was chosen under it as a row beside the items' own, under a name of 64 bits that no item id has. It
is never served, never lets an item leave, and there are few: CONTEXTS at most, of which the least recently used leave.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec
import xxhash

CONTEXTS: Final = 1024
"""Contexts that are kept at most; while there are as many, new ones are not taken in."""
FIELDS: Final = 8
"""Fields of one event that count, in the order of their names."""
MOST_CONTEXT: Final = 2_000.0
"""Events after which a context's row is halved."""

_DICT = msgspec.msgpack.Decoder(dict[str, str])
_SEED: Final = 1


def context_keys(context: Mapping[str, str]) -> list[int]:
    """Return the 64-bit names of a context's values.

    >>> context_keys({"device": "phone"}) == context_keys({"device": "phone"}) != context_keys({"device": "tv"})
    True
    """
    return [_key(f"{name}={context[name]}") for name in sorted(context)[:FIELDS]]


def packed_context_keys(extra: bytes) -> list[int]:
    """Return `context_keys` of the msgpack map that an entry of `examples` carries; none where it carries no such."""
    if not extra:
        return []
    try:
        return context_keys(_DICT.decode(extra))
    except msgspec.MsgspecError:
        return []


def _key(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode(), seed=_SEED) or 1
