"""What a person sees in a terminal: `status --watch`, `top` and `user`, at two sizes, with and without a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from infra.settings import Settings
from infra.watching import top, user
from infra.watching.asking import Api, Frames
from infra.watching.status import Watch, duration

FRESHET = [sys.executable, "-P", "-m", "infra.cli"]
FRAME: dict[str, Any] = {
    "t": 1795363000,
    "users": {"events": 21, "events_click": 8, "events_impression": 13, "applied_p50_ms": 3.1, "applied_p95_ms": 8.0,
              "applied_p99_ms": 120.4, "lag": 7, "lag_0": 0, "lag_3": 7},
    "items": {"events": 20, "lag": 0},
    "learner": {"step": 431, "encoder_loss": 3.32, "ranker_loss": 2.6},
    "api": {"items": 1200, "step": 431, "degraded": False, "lookups_s": 9.1, "lookup_p50_ms": 6.0, "lookup_p95_ms": 9.0,
            "lookup_p99_ms": 12.0, "profile_p50_ms": 4.0, "loop_delay_ms": 0.4},
    "broke": [{"t": 1795362990, "what": "API: [Redis] was away"}],
}  # fmt: skip


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    return Watch(Settings.load(tmp_path, env={}, port=1))


def printed(shown: Any, width: int = 80, height: int = 24) -> str:
    out = io.StringIO()
    Console(file=out, width=width, height=height, highlight=False).print(shown)
    return out.getvalue()


def test_a_line_says_what_matters(watch: Watch) -> None:
    watch.frames.take(FRAME)
    watch.frames.problem = ""
    line = watch.line()
    assert "events 21/s  applied 3.1/120 ms  lag 7  lookups 9.1/s  6/12 ms  step 431" in line
    watch.frames.take({**FRAME, "t": FRAME["t"] + 1, "api": {**FRAME["api"], "degraded": True}})
    assert watch.line().endswith("DEGRADED")
    watch.frames.problem = "Connection refused"
    assert watch.line().endswith("Connection refused")


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40)])
def test_the_picture_fits_and_holds_it_all(watch: Watch, width: int, height: int) -> None:
    watch.frames.problem = ""
    for second in range(60):
        news = [{"t": FRAME["t"] + second, "what": f"line {second}"}] if second else FRAME["broke"]
        watch.frames.take({**FRAME, "t": FRAME["t"] + second, "broke": news})
    screen = Console(file=io.StringIO(), width=width, height=height)
    text = printed(watch.picture(screen), width, height)
    lines = text.rstrip("\n").split("\n")
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    for said in ("21/s", "click 8  impression 13", "3.1/8/120 ms", "partition 3: 7", "step 431", "1,200 may be served"):
        assert said in text
    assert text.index("line 59") < text.index("line 58")


def test_what_broke_is_shown_as_it_was_told_and_once(watch: Watch) -> None:
    watch.frames.take(FRAME)
    watch.frames.take(FRAME)
    assert printed(watch.picture(Console(file=io.StringIO(), width=80, height=24))).count("API: [Redis] was away") == 1


def test_figures_of_long_ago_are_not_those_of_now(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    watch.frames.take(FRAME)
    assert watch.told()["figures"]["users"]["events"] == 21
    now = time.monotonic()
    monkeypatch.setattr("infra.watching.asking.time.monotonic", lambda: now + 60)
    told = watch.told()["figures"]
    assert (told["users"], told["api"], told["learner"]["step"]) == ({}, {}, 431)


def test_a_stream_goes_on_after_the_last_frame(tmp_path: Path) -> None:
    frames = Frames(Api(Settings.load(tmp_path, env={}, port=1)))
    for line in ("retry: 1000", "", "id: 41", "data: " + json.dumps({**FRAME, "t": 41}), ""):
        frames.read(line)
    assert (frames.second, frames.last, frames.parts["users"]["lag"]) == (41, "41", 7)


def test_a_stream_that_breaks_off_in_the_middle_is_taken_up_again(tmp_path: Path) -> None:
    """An API that is killed leaves half a chunk; the next one goes on."""
    whole = b"id: 7\ndata: " + json.dumps({**FRAME, "t": 7}).encode() + b"\n\n"
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10.0)
        frames = Frames(Api(Settings.load(tmp_path, env={}, port=server.getsockname()[1])))
        frames.start()
        for said in (b"10\r\nid: 6\nda", b"%x\r\n%b\r\n" % (len(whole), whole)):
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(head + said)
        assert frames.new.wait(10.0)
    assert frames.parts["users"]["lag"] == 7


def test_rates_of_stages_are_those_between_two_looks() -> None:
    labels = (("stage", "profile"),)
    edges = {"0.001": 4.0, "0.01": 8.0, "+Inf": 8.0}
    first: top.Samples = {"freshet_slate_seconds_bucket": {(("le", le), *labels): count for le, count in edges.items()},
             "freshet_slate_seconds_count": {labels: 8.0}, "freshet_slate_seconds_sum": {labels: 0.04}}  # fmt: skip
    then: top.Samples = {
        "freshet_slate_seconds_bucket": {(("le", le), *labels): 2 * count for le, count in edges.items()}
    }
    assert top.counted(then, first, "freshet_slate_seconds_bucket", "stage") == {
        "profile": {0.001: 4.0, 0.01: 8.0, float("inf"): 8.0}
    }
    assert top.counted(first, {}, "freshet_slate_seconds_sum", "stage") == {"profile": {float("inf"): 0.04}}


def test_a_user_is_shown_with_what_each_entry_is_still_worth() -> None:
    now = 1795363000.0
    entry = {"item_id": "f1", "title": "Film [1]", "hash": "0" * 16, "kind": "click", "weight": 1.5,
             "decay": {"1h": 0.5, "30d": 0.999}, "time": now - 3600}  # fmt: skip
    told = {"user_id": "ann", "problem": None, "known": True, "counters": {"click": 2, "view": 0}, "partition": 3,
            "first_time": now - 7200, "last_time": now - 3600, "sequence": [entry, {**entry, "weight": -0.6}],
            "next": {"items": [{"item_id": "f2", "score": 1.25, "channel": "fresh"}], "model_step": 7}}  # fmt: skip
    text = printed(user.picture(told, now, most=1))
    for said in ("ann  since 2.0 h, last 1.0 h ago", "click 2", "Film [1]", "+1.5", "#####      0.50", "1 older ones",
                 "f2", "1.250", "weights of step 7"):  # fmt: skip
        assert said in text
    assert "view" not in text
    nobody = {**told, "known": False, "sequence": [], "next": {"items": [], "reason": "no item is known yet"}}
    assert "is not known" in printed(user.picture(nobody, now, most=5))
    assert "no slate: no item is known yet" in printed(user.picture(nobody, now, most=5))


def test_lengths_of_time_have_one_unit() -> None:
    assert [duration(s) for s in (-1, 5, 90, 5400, 200_000)] == ["0 s", "5 s", "1.5 min", "1.5 h", "2.3 d"]


def test_without_a_stack_it_is_said_what_to_do(tmp_path: Path) -> None:
    environment = {**os.environ, "FRESHET_PORT": "19998", "NO_COLOR": "1"}
    for words in (["top"], ["user", "ann"]):
        told = subprocess.run([*FRESHET, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert told.returncode == 1
        assert "Start the stack with `freshet up`" in told.stderr
    wrong = subprocess.run([*FRESHET, "top", "--by", "heat"], cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "--by: expected rising, shown, arms, topics, stages, got 'heat'" in wrong.stderr


@pytest.mark.parametrize("words", [["status", "--watch"], ["top", "--by", "topics"]])
def test_q_ends_it_and_the_terminal_is_as_before(tmp_path: Path, words: list[str]) -> None:
    mine, its = pty.openpty()
    before = _modes(its)
    child = subprocess.Popen(
        [*FRESHET, *words, "--interval", "0.2"], cwd=tmp_path, stdin=its, stdout=its, stderr=its, close_fds=True,
        env={**os.environ, "FRESHET_PORT": "19998", "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
    )  # fmt: skip
    try:
        text = _read_until(mine, b"q ends")
        assert re.search(rb"Freshet", text)
        os.write(mine, b"q")
        _drain(mine, child)
        assert child.wait(10) == 0
        assert _modes(its) == before
    finally:
        child.kill()
        child.wait()
        os.close(mine)
        os.close(its)


def _modes(place: int) -> list[Any]:
    import termios

    return termios.tcgetattr(place)


def _read_until(place: int, wanted: bytes, seconds: float = 40.0) -> bytes:
    text, end = b"", time.monotonic() + seconds
    while wanted not in text and time.monotonic() < end:
        if select.select([place], [], [], 0.2)[0]:
            text += os.read(place, 65536)
    assert wanted in text, text[-500:]
    return text


def _drain(place: int, child: subprocess.Popen[bytes]) -> None:
    """Read on, so that the child does not wait for a full terminal."""
    end = time.monotonic() + 10
    while child.poll() is None and time.monotonic() < end:
        if select.select([place], [], [], 0.1)[0]:
            os.read(place, 65536)
