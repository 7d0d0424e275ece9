"""The supervisor on real servers: start, crash, restart, state kept, all gone within 10 s, nobody left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from infra import stack as stack_module
from infra.kafka import kafka_answers
from infra.process import Process, folder_lock, free_port, port_is_free
from infra.settings import Settings, read_stack
from infra.stack import Child, Stack, StackError, folder_bytes
from infra.store import redis_answers
from infra.telemetry import EXIT_FOR_GOOD

SERVERS = ("kafka", "redis")


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.02)


def redis_command(url: str, *words: str) -> bytes:
    """One command over a plain socket: only streaming/state.py imports a Redis client."""
    port = int(url.rsplit(":", 1)[1].split("/")[0])
    with socket.create_connection(("127.0.0.1", port), 2) as line:
        line.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w.encode()) for w in words))
        return line.recv(4096)


def test_servers_start_crash_and_keep_their_state(tmp_path: Path) -> None:
    with Stack(data=tmp_path, processes=SERVERS, env={}, kafka="", redis="") as stack:
        first = stack.pids()
        written = read_stack(tmp_path)
        assert written is not None
        assert (written["kafka"], written["redis"], written["processes"]) == (stack.kafka, stack.redis, first)
        assert redis_command(stack.redis, "SET", "kept", "yes").startswith(b"+OK")
        stack.kill("redis")
        stack.kill("kafka")
        until(lambda: stack.pids().keys() == first.keys() and stack.waiting_for() == [])
        assert all(stack.pids()[name] != pid for name, pid in first.items())
        assert redis_command(stack.redis, "GET", "kept") == b"$3\r\nyes\r\n"
        with pytest.raises(StackError, match=r"is in use by another `freshet up` \(process \d+\)"):
            Stack(data=tmp_path, processes=SERVERS, kafka="", redis="").start()
        address = stack.kafka
        began, last = time.monotonic(), stack.pids()
    assert time.monotonic() - began < 10
    assert not any(psutil.pid_exists(pid) for pid in last.values())
    assert (read_stack(tmp_path) or {})["processes"] == {}
    with Stack(data=tmp_path, processes=SERVERS, kafka="", redis="") as stack:
        assert redis_command(stack.redis, "GET", "kept") == b"$3\r\nyes\r\n"
        assert stack.kafka == address
        topics = (tmp_path / "kafka" / "log").glob("fr.events-?")  # Kafka, killed as it makes one, leaves a -stray
        assert len(list(topics)) == 8


@pytest.mark.skipif(
    sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux; elsewhere the next start ends leftovers"
)
def test_children_die_with_a_killed_supervisor(tmp_path: Path) -> None:
    code = (
        "import sys, time; from infra.stack import Stack\n"
        "stack = Stack(data=sys.argv[1], processes=('redis',), kafka='', redis='').start(); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    try:
        until(lambda: bool((read_stack(tmp_path) or {}).get("processes")))
        written = read_stack(tmp_path)
        assert written is not None
        assert redis_answers(written["redis"])
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not psutil.pid_exists(written["processes"]["redis"]))
    with Stack(data=tmp_path, processes=("redis",), kafka="", redis="") as stack:
        assert redis_answers(stack.redis)


def test_an_existing_server_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(StackError, match=rf"Kafka at 127.0.0.1:{port} does not answer.*FRESHET_KAFKA"):
        Stack(data=tmp_path, processes=(), kafka=f"127.0.0.1:{port}").start()
    with pytest.raises(StackError, match=rf"Redis at redis://127.0.0.1:{port}/0 does not answer.*FRESHET_REDIS"):
        Stack(data=tmp_path, processes=(), redis=f"redis://127.0.0.1:{port}/0").start()
    with pytest.raises(StackError, match="processes: expected some of kafka, redis"):
        Stack(data=tmp_path, processes=("zookeeper",))


async def test_shared_servers_and_topics_within_a_running_loop(
    kafka: str, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    stack = Stack(data=tmp_path, processes=(), kafka=kafka, redis=redis_url, namespace=namespace, partitions=2)
    with stack:
        assert kafka_answers(kafka)
    with pytest.raises(StackError, match=r"expected 3 partition\(s\), got 2"):
        Stack(data=tmp_path, processes=(), kafka=kafka, redis=redis_url, namespace=namespace, partitions=3).start()


def _child(tmp_path: Path, code: str) -> Child:
    process = Process("p", [sys.executable, "-c", code], log=tmp_path / "p.log")
    return Child(process, process.start, lambda: True)


def test_a_crash_restarts_with_growing_pauses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    child = _child(tmp_path, "raise SystemExit(3)")
    pauses = []
    child.start()
    for _ in range(3):
        assert child.process.wait(10)
        now = time.monotonic()
        child.watch(now)
        pauses.append(child.next_start - now)
        child.watch(now + pauses[-1] / 2)
        assert child.process.pid is None
        child.watch(child.next_start)
    child.wanted = False
    child.process.kill()
    assert pauses == pytest.approx([0.2, 0.4, 0.8])
    assert "p ended with code 3; starting it again in 0.2 s" in caplog.text


def test_an_end_for_good_is_left_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    child = _child(tmp_path, f"print('wrong cluster'); raise SystemExit({EXIT_FOR_GOOD})")
    child.start()
    assert child.process.wait(10)
    child.watch(time.monotonic())
    child.watch(time.monotonic() + 60)
    assert child.process.pid is None
    assert not child.wanted
    assert "wrong cluster" in caplog.text


def test_sigterm_then_sigkill(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    process = Process("deaf", [sys.executable, "-c", code], log=tmp_path / "deaf.log")
    process.start()
    until(lambda: "up" in process.tail())
    began = time.monotonic()
    process.stop(0.3)
    assert process.code == -signal.SIGKILL
    assert time.monotonic() - began < 3


@pytest.mark.skipif(sys.platform != "linux", reason="weights of processes are Linux's here")
def test_a_nice_child_gives_way_to_other_sessions(tmp_path: Path) -> None:
    """Each child has a session, and with autogroups a nice value weighs within a session only."""
    group = Path("/proc/self/autogroup")
    code = f"import os, pathlib; p = pathlib.Path('{group}'); print(os.nice(0), p.read_text() if p.exists() else '')"
    process = Process("nice", [sys.executable, "-c", code], log=tmp_path / "nice.log", nice=7)
    process.start()
    assert process.wait(10)
    nice, _, told = process.tail().partition(" ")
    assert int(nice) == 7 + os.nice(0)
    assert "nice" not in told or told.strip().endswith("nice 7")  # a kernel may have none, or tell nothing


def test_a_log_is_cut_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.process.LOG_BYTES", 1000)
    code = "import time\nfor i in range(10**6): print('line', i, flush=True); time.sleep(.001)"
    process = Process("chatty", [sys.executable, "-c", code], log=tmp_path / "chatty.log")
    process.start()
    try:
        until(lambda: process.log.exists() and process.log.stat().st_size > 2000)
        process.trim_log()
        assert (tmp_path / "chatty.log.1").stat().st_size > 1000
        assert process.log.stat().st_size < 1000
        until(lambda: "line" in process.tail())
        assert not process.log.read_bytes().startswith(b"\0")
    finally:
        process.kill()


def test_the_disk_cap_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "big").write_bytes(bytes(120_000_000))
    stack = Stack(Settings.load(tmp_path, env={}, running=False, disk_cap_gb=0.1))
    stack._check_disk()
    stack._check_disk()
    assert folder_bytes(tmp_path) >= 120_000_000
    assert caplog.text.count("over the cap of 0.1 GB (FRESHET_DISK_CAP_GB)") == 1


def test_ports_prefer_what_was_asked_for() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not port_is_free(port)
        assert free_port(port) != port
    assert free_port(port) == port


@pytest.mark.parametrize(("asked", "low"), [(0, 20_000), (18_900, 18_900)])
def test_the_api_takes_the_port_asked_for_and_any_for_zero(tmp_path: Path, asked: int, low: int) -> None:
    stack = Stack(data=tmp_path, processes=("api",), port=asked)
    stack._own_children()
    assert low <= stack.settings.port < low + (12_000 if asked == 0 else 50)


def test_a_folder_lock_is_exclusive(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "lock", wait=False) as mine, folder_lock(tmp_path / "lock", wait=False) as second:
        assert (mine, second) == (True, False)


def test_stack_file_is_whole_json_at_any_time(tmp_path: Path) -> None:
    (tmp_path / "stack.json.part").write_text("{")
    stack = Stack(data=tmp_path, processes=(), kafka="", redis="")
    stack._record()
    assert json.loads((tmp_path / "stack.json").read_text())["supervisor"] == os.getpid()
    assert stack_module.PROCESSES[0] == "kafka"
