"""schemathesis against the application's own OpenAPI document, on real servers: what it says is what it does."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from infra.settings import Settings
from serving.app import create_app, warm

Make = Callable[..., Awaitable[object]]
EXAMPLES = 5
BUSY = 0.02
"""The share of answers that may say that the machine is busy (429, 503); more of them would hide what is tested."""
# A 503 says that Kafka or Redis did not answer in time, which a busy machine may bring about: allowed where the
# document lists it, and few of them. Three things lie beyond a schema, so valid data may be refused: a position token,
# an alias of oneself, an item id that is not that of the path. A list of events or items is always accepted; each
# object in it has its own verdict. What another method gets is the framework's, for all alike: one stands for all.
CONFIG = """
[checks]
positive_data_acceptance.enabled = false
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "503"]

[phases.coverage]
unexpected-methods = ["PATCH"]

[[operations]]
include-path-regex = "^/v1/(events|items)$"
checks.negative_data_rejection.enabled = false
"""


@pytest.fixture
def served(settings: Settings, topics: Make) -> Iterator[str]:
    """The address of the application, served by uvicorn in a thread, with everything it needs."""
    asyncio.run(_made(topics))
    warm()
    given = {name: getattr(settings, name) for name in ("kafka", "redis", "namespace")}
    app = create_app(Settings.load(settings.data, env={}, port=0, partitions=2, **given))
    config = uvicorn.Config(app, port=0, log_level="error", loop="asyncio", server_header=False, date_header=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        threading.Event().wait(0.02)
    address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    while httpx.get(address + "/health/ready").status_code != 200:
        threading.Event().wait(0.05)
    yield address
    server.should_exit = True
    thread.join(10)


async def _made(topics: Make) -> None:
    await topics(2)


@pytest.mark.slow
def test_the_document_is_what_the_application_does(served: str, tmp_path: Path) -> None:
    """Every operation with input that fits the document and input that does not; every check of schemathesis."""
    words = [
        "run", served + "/openapi.json", "--phases", "coverage,fuzzing", "--max-examples", str(EXAMPLES), "--seed", "1",
        "--request-timeout", "20", "--suppress-health-check", "all", "--no-color",
        "--generation-deterministic", "--continue-on-failure",
    ]  # fmt: skip
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", *words], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    print(done.stdout[-2500:])
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert found, done.stdout[-2500:]
    assert int(found[1]) > 300
    answers = _answers(httpx.get(served + "/metrics").text)
    busy = answers["429"] + answers["503"]
    assert answers["500"] == 0, answers
    assert busy < BUSY * sum(answers.values()), answers


def _answers(metrics: str) -> Counter[str]:
    """Return status -> answers given, as the server counted them; but for readiness, which was asked until it came."""
    counted: Counter[str] = Counter()
    for line in re.findall(r"^freshet_http_seconds_count{.*", metrics, re.M):
        status = re.search(r'status="(\d+)"', line)
        assert status, line
        if "/health/ready" not in line:
            counted[status[1]] += int(float(line.rpartition(" ")[2]))
    return counted
