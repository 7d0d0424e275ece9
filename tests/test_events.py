"""The schema: what each door accepts, what it says of what it does not, weights, and the evolution rule."""

from __future__ import annotations

import contextlib
import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.examples import ACTION, CLICK, DWELL, RATING
from streaming.events import (
    Action,
    Alias,
    Click,
    Dwell,
    EventError,
    Item,
    Merge,
    Rating,
    Weights,
    decode,
    decode_item,
    encode,
    parse_inlet,
    parse_item,
    parse_json,
)

CLICKED = {"type": "click", "user_id": "u", "item_id": "i", "ts": 1.75e9}


def as_json(**changes: object) -> bytes:
    return json.dumps({**CLICKED, **changes}).encode()


def test_a_click_goes_through_json_and_the_log_unchanged() -> None:
    event = parse_json(as_json(event_id="e", slate_id="s", position=3, surface="home", context={"device": "tv"}))
    assert decode(encode(event)) == event


@pytest.mark.parametrize(
    ("data", "where", "expected"),
    [
        (b"", "$", "well-formed"),
        (b"[1]", "$", "object"),
        (as_json(type="nope"), "$.type", "one of click, dwell, rating, action, view"),
        (as_json(type="impression"), "$.type", "one of click, dwell, rating, action, view"),
        (json.dumps({"type": "click", "item_id": "i", "ts": 1}).encode(), "$", "user_id"),
        (as_json(user_id=7), "$.user_id", "str"),
        (as_json(user_id=""), "$.user_id", "length >= 1"),
        (as_json(item_id="x" * 257), "$.item_id", "length <= 256"),
        (as_json(ts=-1), "$.ts", "seconds since the epoch"),
        (as_json(ts=1.75e12), "$.ts", "not ms"),
        (b'{"type":"click","user_id":"u","item_id":"i","ts":1e999}', "$.ts", "Number out of range"),
        (as_json(ts=float("nan")), "$", "well-formed"),
        (as_json(position=-1), "$.position", ">= 0"),
        (as_json(context={str(i): "x" for i in range(17)}), "$.context", "at most 16"),
        (as_json(type="dwell", seconds=-1), "$.seconds", ">= 0"),
        (as_json(type="rating", value=6), "$.value", "from 1.0 to 5.0"),
        (as_json(type="rating", value=1, scale=[5, 1]), "$.scale", "lower first"),
        (as_json(type="action"), "$", "name"),
    ],
)
def test_a_bad_event_says_where_and_what_was_expected(data: bytes, where: str, expected: str) -> None:
    with pytest.raises(EventError) as caught:
        parse_json(data)
    assert caught.value.where == where
    assert expected in caught.value.expected
    assert caught.value.got


@given(st.binary(max_size=200))
def test_no_bytes_crash_a_door(data: bytes) -> None:
    for door in (parse_json, decode, parse_item, decode_item, lambda b: parse_inlet("clicks", b, ("clicks", 0, 1))):
        with contextlib.suppress(EventError):
            door(data)


def test_unknown_fields_are_never_fatal_and_new_ones_default() -> None:
    """Evolution: an older reader ignores what a newer writer added, a newer one fills in what an older left out."""
    assert parse_json(as_json(colour="red", nested={"a": [1]})) == parse_json(as_json())
    newer = msgspec.msgpack.encode({**CLICKED, "v": 2, "added": {"later": True}})
    assert decode(newer) == Click(user_id="u", item_id="i", ts=1.75e9, v=2)


def test_only_an_alias_of_the_events_about_identity_comes_in_by_a_door() -> None:
    alias = json.dumps({"type": "alias", "user_id": "u", "anonymous_id": "a", "ts": 1.75e9}).encode()
    assert parse_json(alias) == Alias(user_id="u", anonymous_id="a", ts=1.75e9)
    for kind in ("erase", "merge"):
        with pytest.raises(EventError, match=r"\$\.type"):
            parse_json(as_json(type=kind))
    with pytest.raises(EventError, match="another id"):
        parse_json(alias.replace(b'"a"', b'"u"'))
    with pytest.raises(EventError, match=r"\$\.type"):
        parse_inlet("clicks", alias, ("clicks", 0, 1))


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"source": None}, "$.source"),
        ({"source": ("clicks", 0, 1)}, "$.source"),
        ({"seen": b"abc"}, "$.seen"),
        ({"entries": [(0, 1.0, 1, 1.0)]}, "$.entries[0]"),
        ({"entries": [(1, float("nan"), 1, 1.0)]}, "$.entries[0]"),
        ({"entries": [(1, 1.0, 6, 1.0)]}, "$.entries[0]"),
        ({"entries": [(1, 1.0, 1, float("inf"))]}, "$.entries[0][3]"),
        ({"entries": [(1, 1.0, 1, 1.0)] * 51}, "$.entries"),
        ({"counters": [-1] * 8}, "$.counters"),
        ({"counters": []}, "$.counters"),
        ({"first_time": 2.0, "last_time": 1.0}, "$.first_time"),
    ],
)
def test_a_merge_that_no_alias_made_cannot_reach_the_fold(changes: dict[str, object], where: str) -> None:
    good: dict[str, object] = {
        "type": "merge", "user_id": "u", "ts": 1.0, "source": ("alias", 0, 1), "entries": [(2**64 - 1, 1.0, 129, 1.0)],
        "seen": b"abcd", "counters": [0] * 8, "first_time": 1.0, "last_time": 1.0,
    }  # fmt: skip
    assert isinstance(decode(msgspec.msgpack.encode(good)), Merge)
    with pytest.raises(EventError) as caught:
        decode(msgspec.msgpack.encode({**good, **changes}))
    assert caught.value.where == where


def test_an_inlet_fills_in_type_and_id() -> None:
    event = parse_inlet("clicks", b'{"user_id":"u","item_id":"i","ts":1.75e9}', ("clicks", 2, 40))
    assert event == Click(user_id="u", item_id="i", ts=1.75e9, event_id="clicks:2:40", source=("clicks", 2, 40))
    with pytest.raises(EventError, match=r"\$.type: expected 'dwell', got 'click'"):
        parse_inlet("dwells", as_json(), ("dwells", 0, 0))


def test_nobody_outside_sets_a_source() -> None:
    assert parse_json(as_json(source=["clicks", 0, 9])).source is None


def test_weights_follow_the_table() -> None:
    weights = Weights()
    common = {"user_id": "u", "item_id": "i", "ts": 1.0}
    assert weights.of(Click(**common)) == (CLICK, 1.0, 0.0)  # type: ignore[arg-type]
    for seconds, weight in ((30.0, 0.5), (29.9, 0.0), (3.0, 0.0), (2.9, -0.6)):
        assert weights.of(Dwell(**common, seconds=seconds)) == (DWELL, weight, seconds)  # type: ignore[arg-type]
    for value, weight in ((5.0, 1.0), (3.0, 0.0), (1.0, -1.0), (4.0, 0.5)):
        assert weights.of(Rating(**common, value=value)) == (RATING, weight, weight)  # type: ignore[arg-type]
    for name, weight, value in (
        ("like", 0.8, 1.0), ("save", 0.8, 1.0), ("share", 1.0, 1.0), ("purchase", 2.0, 1.0), ("skip", -0.6, -1.0),
        ("hide", -1.0, -2.0),
    ):  # fmt: skip
        assert weights.of(Action(**common, name=name)) == (ACTION, weight, value)  # type: ignore[arg-type]
    assert weights.of(Action(**common, name="fold")) == (ACTION, 0.0, 0.0)  # type: ignore[arg-type]


def test_catalogue_entries() -> None:
    item = parse_item(b'{"type":"item","item_id":"i","title":"T","categories":["a"],"attributes":{"price":3.5}}')
    assert (
        decode_item(encode(item)) == item == Item(item_id="i", title="T", categories=["a"], attributes={"price": 3.5})
    )
    with pytest.raises(EventError, match=r"attributes: expected at most 64"):
        parse_item(json.dumps({"item_id": "i", "attributes": {str(i): 1 for i in range(65)}}).encode())
