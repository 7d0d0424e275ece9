"""The console command through its front door: help that teaches, errors without tracebacks, `up` until Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from infra.settings import MASK, read_stack

FRESHET = [sys.executable, "-P", "-m", "infra.cli"]


def environment(**given: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FRESHET_")}
    return {**clean, "NO_COLOR": "1", "COLUMNS": "140", "TERM": "dumb", **given}


def freshet(*words: str, cwd: Path, **given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*FRESHET, *words], cwd=cwd, env=environment(**given), capture_output=True, text=True, timeout=60
    )  # fmt: skip


def test_help_teaches(tmp_path: Path) -> None:
    told = freshet("--help", cwd=tmp_path)
    assert told.returncode == 0
    for text in ("freshet demo", "freshet up", "curl", "/v1/recommendations/", "Run", "Look inside"):
        assert text in told.stdout


@pytest.mark.parametrize(
    ("words", "given", "says"),
    [
        (("serve",), {}, "no Kafka: FRESHET_KAFKA is not set and .freshet/stack.json names none. Run `freshet up`"),
        (("status",), {"FRESHET_PORT": "x"}, "setting port (environment FRESHET_PORT): expected a whole number"),
        (("worker", "--role", "cook"), {}, "--role: expected users or items, got 'cook'"),
        (("up", "--kafka", "127.0.0.1:1"), {}, "Kafka at 127.0.0.1:1 does not answer. It was named by FRESHET_KAFKA"),
        (("user", "ann"), {"FRESHET_PORT": "19999"}, "the API at http://127.0.0.1:19999 gives no answer."),
        (("topics",), {}, "no Kafka: set FRESHET_KAFKA=host:port, or run `freshet up`."),
    ],
)
def test_an_error_is_a_line_and_a_next_step(
    tmp_path: Path, words: tuple[str, ...], given: dict[str, str], says: str
) -> None:
    told = freshet(*words, cwd=tmp_path, **given)
    assert told.returncode != 0
    assert says in " ".join(told.stderr.split())
    assert "Traceback" not in told.stderr


def test_settings_are_listed_with_secrets_masked(tmp_path: Path) -> None:
    told = freshet("settings", "--json", cwd=tmp_path, FRESHET_ADMIN_KEY="s3cret", FRESHET_WORKERS="3")
    rows = {row["name"]: row for row in json.loads(told.stdout)}
    assert rows["admin_key"]["value"] == MASK
    assert (rows["workers"]["value"], rows["workers"]["default"]) == (3, 1)
    assert "FRESHET_WORKERS" in freshet("settings", cwd=tmp_path).stdout


def test_status_without_a_stack_says_so(tmp_path: Path) -> None:
    assert "No stack runs in this folder" in freshet("status", cwd=tmp_path).stdout
    told = json.loads(freshet("status", "--json", cwd=tmp_path).stdout)
    assert (told["processes"], told["kafka"]["answers"], told["api"]["ready"]) == ({}, False, False)


def test_topics_are_created_and_checked(tmp_path: Path, kafka: str, namespace: str) -> None:
    given = {"FRESHET_KAFKA": kafka, "FRESHET_NAMESPACE": namespace, "FRESHET_PARTITIONS": "2"}
    missing = freshet("topics", cwd=tmp_path, **given)
    assert missing.returncode == 1
    assert f"{namespace}.events: expected 2 partition(s), got no such topic" in missing.stderr
    made = freshet("topics", "--create", "--json", cwd=tmp_path, **given)
    assert json.loads(made.stdout)[f"{namespace}.events"]["partitions"] == 2


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_up_from_start_to_ctrl_c(tmp_path: Path) -> None:
    data = tmp_path / "data"
    # A script's job in the background ignores SIGINT, and hands that on to what it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    up = subprocess.Popen(
        [*FRESHET, "up", "--data", str(data), "--port", "18400"],
        cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert up.stderr is not None
    try:
        said = []
        for line in up.stderr:
            said.append(line)
            if "Ctrl-C ends all" in line:
                break
        assert "Ctrl-C ends all" in said[-1], "".join(said)
        stack = read_stack(data)
        assert stack is not None
        assert set(stack["processes"]) == {"kafka", "redis", "users-0", "items", "learner", "api"}
        with urllib.request.urlopen(stack["api"] + "/health/ready", timeout=5) as answer:
            assert answer.status == 200
        told = json.loads(freshet("status", "--data", str(data), "--json", cwd=tmp_path).stdout)
        assert told["kafka"]["answers"]
        assert told["redis"]["answers"]
        assert told["api"]["ready"]
        asked = freshet("user", "ann", "--data", str(data), "--json", cwd=tmp_path)
        assert json.loads(asked.stdout)["user_id"] == "ann"
        assert all(process["rss_mb"] > 1 for process in told["processes"].values())
        second = freshet("up", "--data", str(data), cwd=tmp_path)
        assert second.returncode == 1
        assert f"in use by another `freshet up` (process {up.pid})" in second.stderr
        pids = list(stack["processes"].values())
        began = time.monotonic()
        up.send_signal(signal.SIGINT)
        assert up.wait(15) == 0
        assert time.monotonic() - began < 10
        assert not any(psutil.pid_exists(pid) for pid in pids)
    finally:
        up.terminate()
        up.wait(20)
        up.stderr.close()
