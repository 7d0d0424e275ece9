"""Dead letters: written with position, reason and original; read once each, however often they were delivered."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from typer.testing import CliRunner

from infra.cli import app
from infra.settings import Settings
from models.examples import CodecError
from models.profile import Moved, Profiles
from streaming.agents import InletAgent, poison_reason
from streaming.consumer import TP
from streaming.dead_letters import DeadLetters, Letter, letters
from streaming.events import decode, encode, merge
from streaming.learn import Dead
from streaming.supervision import Progress
from streaming.topics import Log, Topics


async def test_an_inlet_sends_what_it_cannot_read_to_the_dead_letters(
    settings: Settings, topics: Callable[..., Awaitable[Topics]], monkeypatch: Any
) -> None:
    made = await topics()
    log = Log(settings.kafka)
    await log.start()
    records = [(7, 0, b"not json"), (8, 0, b'{"user_id":"u","item_id":"i","ts":1}'), (9, 0, b'{"user_id":"u","ts":1}')]

    async def once() -> Any:
        yield {TP(made.inlet("clicks"), 2): records}

    for _ in range(2):  # delivery is at least once
        progress = Progress()
        await InletAgent("clicks", topics=made, log_=log, progress=progress).run(once())
        assert progress.dead == 2
    await DeadLetters(log, made).send([Dead(made.events, 0, 1, "expected version 1", b"\xff\x00")])
    await log.stop()
    found = await letters(settings)
    assert [letter.name for letter in found] == [
        f"{made.inlet('clicks')}:2:7", f"{made.inlet('clicks')}:2:9", f"{made.events}:0:1",
    ]  # fmt: skip
    assert "well-formed bytes of one object, got not json" in found[0].reason
    assert "the field `item_id`" in found[1].reason
    assert found[0].text() == "not json"
    assert found[2].text() == "ff 00"


def test_originals_are_shown_as_a_person_can_read_them() -> None:
    def text(original: bytes) -> str:
        return Letter("t", 0, 1, "r", original, 0.0).text()

    assert text(b'{"a":1}') == '{"a":1}'
    assert text(b"\x81\xa1a\xcb@\x00\x00\x00\x00\x00\x00\x00") == '{"a":2.0}'
    assert text(b"\xc1\xff") == "c1 ff"


def test_what_an_alias_moved_is_replayed_as_any_event() -> None:
    """The alias ended the anonymous profile: publishing it again would bring nothing back."""
    nothing = Profiles([None], [None])
    moved = Moved(
        items=np.array([7], np.uint64), times=np.array([5.0]), weights=np.ones(1, np.float32),
        kinds=np.ones(1, np.uint8), seen=np.array([7], np.uint32), counters=nothing.counters[0], first_time=5.0,
        last_time=5.0,
    )  # fmt: skip
    topics = Topics("fr")
    event = Letter(topics.events, 0, 3, "r", encode(merge("ann", 6.0, (1, 2), moved)), 0.0).event(topics)
    event.source = ("dead-letters", 0, 9)
    assert decode(encode(event)) == event


def test_the_verbs_list_and_show(
    settings: Settings, topics: Callable[..., Awaitable[Topics]], monkeypatch: Any, tmp_path: Any
) -> None:
    import asyncio

    async def prepare() -> None:
        made = await topics()
        log = Log(settings.kafka)
        await log.start()
        await DeadLetters(log, made).send([Dead(made.events, 3, 5, "a reason to act on", b"original")])
        await log.stop()

    asyncio.run(prepare())
    for name in ("kafka", "redis", "namespace"):
        monkeypatch.setenv(f"FRESHET_{name.upper()}", getattr(settings, name))
    run = CliRunner().invoke
    position = f"{settings.namespace}.events:3:5"
    listed = json.loads(run(app, ["dead-letters", "list", "--json", "--data", str(tmp_path)]).output)
    assert [(row["position"], row["reason"], row["original"]) for row in listed] == [
        (position, "a reason to act on", "original")
    ]
    shown = run(app, ["dead-letters", "show", position, "--data", str(tmp_path)])
    assert "a reason to act on" in shown.output
    missing = run(app, ["dead-letters", "show", "x:0:1", "--data", str(tmp_path)])
    assert missing.exit_code == 1


def test_a_letter_knows_the_class_of_its_reason() -> None:
    reasons = {
        "$.user_id: expected `str`, got 1": "invalid",
        poison_reason("ann", ValueError("no")): "raised",
        poison_reason("ann", CodecError("short")): "profile",
        "its fold into items raised 3 times: x": "raised",
        "learning it raised 3 times: x": "raised",
        "12 records, up to offset 11, were deleted by retention before a worker read them": "lost",
    }
    for reason, why in reasons.items():
        assert Letter("fr.clicks", 0, 1, reason, b"", 0.0).why == why
