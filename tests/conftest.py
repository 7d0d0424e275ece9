"""One real Kafka broker and one real Redis for each process of the run, a namespace for each test.

`FRESHET_KAFKA` and `FRESHET_REDIS` name servers that run already; otherwise both are started by `infra`, on free
ports, in a folder that is deleted at the end.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings

from infra.kafka import Broker, kafka_answers
from infra.settings import PREFIX, Settings
from infra.store import RedisServer, redis_answers

# The first example of a law may compile kernels.
hypothesis_settings.register_profile("freshet", deadline=None)
hypothesis_settings.load_profile("freshet")

WORKERS = 3
"""Test processes side by side: the long tests wait for processes of their own most of the time."""
SERVERS = ("KAFKA", "REDIS")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Several for whole folders; one where their output is asked for (-s) and on servers given, which some hold up."""
    whole = any((config.invocation_params.dir / argument).is_dir() for argument in config.args)
    given = any(os.environ.get(PREFIX + name) for name in SERVERS)
    return WORKERS if whole and not given and config.option.capture != "no" else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first: what begins last then takes little."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def given() -> dict[str, str]:
    """The servers that the environment names, and no longer does: no process that a test starts finds them there."""
    return {name: os.environ.pop(PREFIX + name, "") for name in SERVERS}


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory, given: dict[str, str]) -> Iterator[str]:
    """`host:port` of a real Kafka broker."""
    if address := given["KAFKA"]:
        assert kafka_answers(address), f"FRESHET_KAFKA={address} does not answer"
        yield address
        return
    broker = Broker.prepare(tmp_path_factory.mktemp("kafka"), Settings.load(env={}).cache_path)
    try:
        broker.start()
        broker.wait_ready()
        yield broker.bootstrap
    finally:
        broker.stop()
        broker.wipe()


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory, given: dict[str, str]) -> Iterator[str]:
    """`redis://...` of a real Redis server."""
    if address := given["REDIS"]:
        assert redis_answers(address), f"FRESHET_REDIS={address} does not answer"
        yield address
        return
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    try:
        server.start()
        server.wait_ready()
        yield server.url
    finally:
        server.stop()


@pytest.fixture
def namespace() -> str:
    """A namespace that no other test has."""
    return f"t{uuid.uuid4().hex[:10]}"


@pytest.fixture
def settings(kafka: str, redis_url: str, namespace: str, tmp_path: Path) -> Settings:
    """Settings on the run's real servers, with the test's own namespace and data folder."""
    return Settings.load(tmp_path, env={}, kafka=kafka, redis=redis_url, namespace=namespace, port=0)


@pytest.fixture
def topics(kafka: str, namespace: str) -> Callable[..., Awaitable[object]]:
    """`await topics(partitions=8)` creates the namespace's topics and returns its `Topics`."""

    async def create(partitions: int = 8) -> object:
        from streaming.topics import Topics, create_topics

        made = Topics(namespace, partitions)
        await create_topics(kafka, made)
        return made

    return create
