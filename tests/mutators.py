"""Bad input made of good: mutators of bytes, of JSON texts and of decoded objects, all from one seeded generator.

>>> import random
>>> mutated(random.Random(1), [b'{"a": 1}']) == mutated(random.Random(1), [b'{"a": 1}'])
True
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

NUMBERS: Final = (
    "0", "-0", "-1", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1e-400", "9" * 400, "-" + "9" * 400,
    "18446744073709551616", "9223372036854775808", "-9223372036854775809", "4294967296", "1.7976931348623157e308",
    "5e-324", "0x10", "1_000", "1.", ".5", "+1", "١", "true", "null", '"1"', "[]", "{}", '""',
)  # fmt: skip
TEXTS: Final = (
    "", "\x00", "\ud800", "\udfff", "é" * 200, "😀" * 300, "﷽" * 100, "a" * 5000, "\u202e", "\ufeff", "%s%n", "../..",
    "\n", "null", "NaN", "__proto__", "'", '"', "\\", "\\u", "İ", "ß", " ",
)  # fmt: skip
VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1, 2**31, 2**32, 2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**30, 0.0, -0.0, 1e308, -1e308,
    5e-324, float("nan"), float("inf"), -float("inf"), "", "x", "\x00", "é" * 300, "1", [], {}, [[]], [None], {"a": {}},
    [1, 2, 3], "type", "click", 1e11, 1e12, -1e12, b"", b"\xff" * 9,
)  # fmt: skip
_INTS: Final = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def _flip(r: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    out = bytearray(data)
    for _turn in range(r.choice((1, 1, 1, 2, 4, 16))):
        if out:
            out[r.randrange(len(out))] ^= 1 << r.randrange(8)
    return bytes(out)


def _cut(r: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data[: r.randrange(len(data) + 1)]


def _behead(r: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data[r.randrange(len(data) + 1) :]


def _extend(r: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data + r.choice((b"\0", b"\xff", b"}", b"]", b" ", b"\n", b"{", data, r.randbytes(r.randrange(1, 40))))


def _drop(r: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    a, b = sorted((r.randrange(len(data) + 1), r.randrange(len(data) + 1)))
    return data[:a] + data[b:]


def _repeat(r: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    a, b = sorted((r.randrange(len(data) + 1), r.randrange(len(data) + 1)))
    return data[:b] + data[a:b] * r.choice((1, 1, 2, 20)) + data[b:]


def _splice(r: random.Random, data: bytes, seeds: Sequence[bytes]) -> bytes:
    other = r.choice(seeds)
    return data[: r.randrange(len(data) + 1)] + other[r.randrange(len(other) + 1) :]


def _number(r: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """Write a boundary integer of some width over some place, often near the beginning, where lengths are."""
    if not data:
        return data
    width, value = r.choice((1, 2, 4, 8)), r.choice(_INTS)
    at = r.randrange(min(len(data), 32) if r.random() < 0.6 else len(data))
    packed = struct.pack("<Q", value)[:width]
    return data[:at] + packed + data[at + width :]


def _random(r: random.Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return r.randbytes(r.choice((0, 1, 2, 8, 56, 100, 1000)))


BYTES: Final[tuple[Callable[[random.Random, bytes, Sequence[bytes]], bytes], ...]] = (
    _flip, _flip, _cut, _behead, _extend, _drop, _repeat, _splice, _number, _number, _random,
)  # fmt: skip


def mutated(r: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Return one of the seeds after one to three mutations of its bytes; at most 64 kB."""
    data = r.choice(seeds)
    for _ in range(r.choice((1, 1, 1, 2, 3))):
        data = r.choice(BYTES)(r, data, seeds)
    return data[:65536]


def reshaped(r: random.Random, value: Any, depth: int = 0) -> Any:
    """Return a decoded object with one or a few of its values, names or shapes changed."""
    if isinstance(value, dict) and value and (depth == 0 or r.random() < 0.7):
        out = dict(value)
        name = r.choice(list(out))
        kind = r.random()
        if kind < 0.15:
            del out[name]
        elif kind < 0.25:
            out[r.choice(TEXTS)] = out.pop(name)
        elif kind < 0.35:
            out[r.choice(("v", "source", "later", "type", *TEXTS))] = r.choice(VALUES)
        else:
            out[name] = reshaped(r, out[name], depth + 1)
        return out
    if isinstance(value, list) and value and r.random() < 0.7:
        rows = list(value)
        at = r.randrange(len(rows))
        rows[at] = reshaped(r, rows[at], depth + 1)
        return rows if r.random() < 0.8 else rows * r.choice((0, 2, 40))
    if isinstance(value, str) and r.random() < 0.5:
        return r.choice((value + r.choice(TEXTS), r.choice(TEXTS), value * 100))
    if isinstance(value, bytes) and r.random() < 0.8:
        return mutated(r, [value])
    if isinstance(value, int | float) and not isinstance(value, bool) and r.random() < 0.4:
        return r.choice(
            (-value, value * 1000, value + 400, value / 7, float(value) if abs(value) < 1e300 else value, str(value))
        )
    return r.choice(VALUES)


def as_json(r: random.Random, value: Any) -> bytes:
    """Write an object as JSON text, now and then with numbers, names or a depth that JSON does not have."""
    text = json.dumps(value, default=lambda other: other.decode("latin-1"), ensure_ascii=r.random() < 0.5)
    kind = r.random()
    if kind < 0.15:
        digits = [i for i, letter in enumerate(text) if letter.isdigit()]
        if digits:
            at = r.choice(digits)
            text = text[:at] + r.choice(NUMBERS) + text[at + 1 :]
    elif kind < 0.2:
        deep = r.choice((10, 600, 20_000))
        text = text.replace("1", "[" * deep + "]" * r.choice((deep, 0, deep - 1)), 1)
    elif kind < 0.23:
        text = '{"a":' * r.choice((10, 600, 20_000)) + text
    return text.encode("utf-8", "surrogatepass")[:65536]
