"""Kafka's jars: checked, cached, reused offline; a failure names the way out. And the broker they make."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from infra import kafka
from infra.kafka import Broker, Jar, KafkaError, fetch_jars, kafka_answers, place, table
from infra.settings import Settings


@pytest.fixture(scope="session")
def cache(kafka: str) -> Path:
    """A cache that is warm: the session's broker was made from it (or is fetched now)."""
    path = Settings.load(env={}).cache_path
    fetch_jars(path)
    return path


def test_the_table_names_the_whole_broker() -> None:
    jars = table()
    assert len(jars) == len({jar.path for jar in jars}) == 46
    assert sum(jar.size for jar in jars) < 50_000_000
    names = {jar.coordinate for jar in jars}
    assert {f"org.apache.kafka:kafka_2.13:{kafka.VERSION}", "org.slf4j:slf4j-simple:1.7.36"} <= names
    assert all(len(jar.sha256) == 64 for jar in jars)


def test_a_warm_cache_works_offline(cache: Path) -> None:
    jars = fetch_jars(cache, offline=True)
    assert [jar.relative_to(cache / "jars").as_posix() for jar in jars] == [jar.path for jar in table()]


def test_a_cold_cache_offline_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(KafkaError, match=r"46 of 46 are not in(.|\n)*FRESHET_KAFKA=host:port"):
        fetch_jars(tmp_path, offline=True)


def test_a_wrong_file_is_deleted_and_refused(tmp_path: Path) -> None:
    jar = Jar("0" * 64, "a/b/1/b-1.jar", 3)
    fetched = tmp_path / "b-1.jar"
    fetched.write_bytes(b"bad")
    with pytest.raises(KafkaError, match=r"another sha256(.|\n)*FRESHET_KAFKA=host:port"):
        place(jar, fetched, tmp_path / "jars")
    assert not fetched.exists()
    assert not (tmp_path / "jars" / jar.path).exists()


def test_a_damaged_jar_in_the_cache_is_not_used(cache: Path, tmp_path: Path) -> None:
    smallest = min(table(), key=lambda jar: jar.size)
    target = tmp_path / "jars" / smallest.path
    target.parent.mkdir(parents=True)
    shutil.copyfile(cache / "jars" / smallest.path, target)
    assert smallest.good(tmp_path / "jars")
    target.write_bytes(bytes(smallest.size))  # the right size, the wrong bytes
    assert not smallest.good(tmp_path / "jars")
    with pytest.raises(KafkaError):
        fetch_jars(tmp_path, offline=True)


def test_a_dead_registry_says_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(kafka, "table", lambda: [Jar("0" * 64, "org/slf4j/slf4j-api/1.7.36/slf4j-api-1.7.36.jar", 1)])
    with pytest.raises(KafkaError) as caught:
        fetch_jars(tmp_path, quiet=True, timeout=2)
    text = str(caught.value)
    assert "could not download org.slf4j:slf4j-api:1.7.36 (three tries" in text
    assert "FRESHET_KAFKA=host:port" in text
    assert not list((tmp_path / "jars").rglob("*.jar"))


def test_a_broker_survives_kill_and_keeps_its_port(cache: Path, tmp_path: Path) -> None:
    broker = Broker.prepare(tmp_path / "kafka", cache, quiet=True)
    try:
        broker.start()
        broker.wait_ready()
        address, identity = broker.bootstrap, (tmp_path / "kafka/log/meta.properties").read_text()
        broker.process.kill()
        assert not kafka_answers(address, 0.5)
        broker.start()
        broker.wait_ready()
        assert broker.bootstrap == address
        assert (tmp_path / "kafka/log/meta.properties").read_text() == identity
    finally:
        broker.stop()
    assert broker.process.code == 143


def test_a_broker_that_cannot_start_shows_its_log(cache: Path, tmp_path: Path) -> None:
    broker = Broker(tmp_path / "kafka", jars=fetch_jars(cache, offline=True)[:3])
    try:
        broker.start()
        with pytest.raises(KafkaError, match=r"Kafka ended with code 1(.|\n)*ClassNotFound(.|\n)*FRESHET_KAFKA"):
            broker.wait_ready()
    finally:
        broker.stop()
