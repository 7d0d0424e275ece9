"""TLS and SASL: a whole stack on a broker and a Redis that ask for both; addresses, wrong passwords, what is shown."""

from __future__ import annotations

import asyncio
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from infra.kafka import Broker, Secured, kafka_answers
from infra.settings import Settings, SettingsError
from infra.stack import Stack
from infra.store import RedisServer
from streaming.kafka.address import client_options, servers, shown


class Certificates:
    """A CA and a server's certificate for 127.0.0.1, as PEM files; the key as PKCS8, which Kafka wants."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1", "localhost")
        self.ca, self.server = folder / "ca.pem", folder / "server.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        key = load_pem_private_key(issued.private_key_pem.bytes(), None)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self.server.write_bytes(pem + b"".join(blob.bytes() for blob in issued.cert_chain_pems))


class TlsFront:
    """TLS before a plain server: the bundled Redis binary has none of its own."""

    def __init__(self, certificates: Certificates, port: int) -> None:
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(certificates.server)
        self._target, self.port, self._ready = port, 0, threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(5)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve_until_told())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _serve_until_told(self) -> None:
        self._over = asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._over.wait()
        server.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await asyncio.sleep(0.1)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self._target)
        await asyncio.gather(_pump(reader, target_writer), _pump(target_reader, writer))

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(5)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except (OSError, asyncio.CancelledError):
        pass
    finally:
        writer.close()


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The settings `kafka` and `redis` of servers that ask for TLS and a password."""
    certificates = Certificates(tmp_path)
    wanted = Secured(ca=certificates.ca, server=certificates.server, user="freshet", password="p@ss w/ord")
    broker = Broker.prepare(tmp_path / "kafka", Settings.load(env={}).cache_path, secured=wanted)
    server = RedisServer(tmp_path / "redis", password="s3cret")
    front: TlsFront | None = None
    try:
        broker.start()
        server.start()
        server.wait_ready()
        broker.wait_ready()
        front = TlsFront(certificates, server.port)
        yield broker.bootstrap, f"rediss://:s3cret@127.0.0.1:{front.port}/0?ssl_ca_certs={certificates.ca}"
    finally:
        if front is not None:
            front.stop()
        server.stop()
        broker.stop()
        broker.wipe()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_whole_stack_on_tls_and_sasl(secured: tuple[str, str], tmp_path: Path) -> None:
    kafka, redis = secured
    assert kafka_answers(kafka)
    assert not kafka_answers(kafka.replace("p%40ss", "wrong")), "another password"
    assert not kafka_answers(kafka.partition("@")[2].partition("?")[0]), "no TLS"
    settings = Settings.load(tmp_path / "data", env={}, kafka=kafka, redis=redis, port=0)
    with Stack(settings, processes=("users", "items", "learner", "api")) as stack:
        assert stat.S_IMODE((tmp_path / "data" / "stack.json").stat().st_mode) == 0o600
        with httpx.Client(base_url=stack.api, timeout=20) as client:
            sent = client.post("/v1/events", json={"type": "click", "user_id": "u", "item_id": "i", "ts": time.time()})
            assert sent.status_code == 202, sent.text
            token = sent.json()["token"]
            deadline = time.monotonic() + 20
            asked = {"after": token, "wait_ms": 2000}
            while not (found := client.get("/v1/recommendations/u", params=asked).json())["applied"]:
                assert time.monotonic() < deadline, found
            assert client.get("/v1/users/u").json()["counters"]["click"] == 1
            while client.get("/v1/recommendations/other").json()["items"] == []:
                assert time.monotonic() < deadline, "the item agent and its feed never reached the API"
                time.sleep(0.1)
            assert "s3cret" not in client.get("/-/settings").text
            assert "p%40ss" not in client.get("/-/settings").text


def test_addresses(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    assert client_options("a:1,b:2") == {"bootstrap_servers": "a:1,b:2"}
    address = f"sasl_ssl://me:p%40ss@a:1,b:2?ca={certificates.ca}&cert={certificates.server}&mechanism=SCRAM-SHA-256"
    options = client_options(address)
    context = options.pop("ssl_context")
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert options == {
        "bootstrap_servers": "a:1,b:2", "security_protocol": "SASL_SSL", "sasl_mechanism": "SCRAM-SHA-256",
        "sasl_plain_username": "me", "sasl_plain_password": "p@ss",
    }  # fmt: skip
    assert client_options("sasl_plaintext://me:pw@a:1")["sasl_mechanism"] == "SCRAM-SHA-512"
    assert "sasl_mechanism" not in client_options("ssl://a:1")
    assert servers(address) == [("a", 1), ("b", 2)] == servers("a:1,b:2")
    assert shown(address) == address.replace("p%40ss", "********")
    assert Settings.load(tmp_path, env={}, kafka=address).kafka == address


@pytest.mark.parametrize(
    "address",
    ["http://a:1", "sasl_ssl://a:1", "ssl://a", "ssl://a:1?ca=nowhere.pem", "ssl://a:1?verify=no",
     "sasl_plaintext://me:secret@a:1?mechanism=MD5", "sasl_ssl://me:secret@a:b"],
)  # fmt: skip
def test_bad_addresses_say_what_is_wrong_without_the_password(address: str) -> None:
    with pytest.raises(ValueError, match="Kafka's address") as caught:
        client_options(address)
    assert "secret" not in str(caught.value)


def test_a_setting_that_cannot_be_used_is_told_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="host:port") as caught:
        Settings.load(tmp_path, env={}, kafka="sasl_ssl://me:secret@a:b")
    assert "secret" not in str(caught.value)
