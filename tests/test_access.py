"""Who may ask: keys with scopes and rates, what browsers may do, the headers on every answer, no key leaks."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import stat
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from typer.testing import CliRunner

from infra.cli import app as cli
from infra.settings import Settings, SettingsError
from serving.app import create_app
from serving.guard import BindingError, scope_of
from serving.keys import Bucket, KeyRing, KeysError, add_key, hashed, read_keys, revoke_key

ROUTES = {
    "publish": [("POST", "/v1/events")],
    "read": [
        ("GET", "/v1/recommendations/ann"), ("POST", "/v1/recommendations/ann"), ("GET", "/v1/similar/i"),
        ("GET", "/v1/popular"), ("GET", "/v1/items/i"), ("HEAD", "/v1/popular"),
    ],
    "admin": [
        ("POST", "/v1/items"), ("PUT", "/v1/items/i"), ("DELETE", "/v1/items/i"), ("GET", "/v1/users/ann"),
        ("DELETE", "/v1/users/ann"), ("GET", "/metrics"), ("GET", "/-/settings"), ("GET", "/-/state/ann"),
        ("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/-/live"), ("GET", "/nothing"),
        ("DELETE", "/v1/events"), ("PATCH", "/v1/popular"), ("GET", "/v1/recommendations"), ("OPTIONS", "/v1/events"),
    ],
}  # fmt: skip


@asynccontextmanager
async def door(
    folder: Path, *, base: str = "http://127.0.0.1:8000", **given: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, FastAPI]]:
    """The application without its lifespan: who may ask is decided before Kafka or Redis are needed."""
    settings = Settings.load(folder, env={}, kafka="127.0.0.1:1", redis="redis://127.0.0.1:1/0", **given)
    app = create_app(settings)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=base) as client:
        yield client, app


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_every_route_has_one_scope(tmp_path: Path) -> None:
    for scope, routes in ROUTES.items():
        for method, path in routes:
            assert scope_of(method, path) == scope, (method, path)


async def test_a_key_opens_what_its_scopes_say_and_nothing_else(tmp_path: Path) -> None:
    keys = {scope: add_key(tmp_path / "keys.json", scope, [scope]) for scope in ROUTES}
    async with door(tmp_path) as (client, _):
        for needed, routes in ROUTES.items():
            for method, path in routes:
                assert (await client.request(method, path)).status_code == 401
                assert (await client.request(method, path, headers=bearer("fr_" + "x" * 43))).status_code == 401
                if path in ("/-/live", "/-/topics"):
                    continue  # streams, or waits for Kafka
                for scope, key in keys.items():
                    status = (await client.request(method, path, headers=bearer(key))).status_code
                    if scope in (needed, "admin"):
                        assert status not in (401, 403), (scope, method, path)
                    else:
                        assert status == 403, (scope, method, path)
        assert (await client.get("/health/live")).status_code == 200
        assert (await client.get("/v1/popular?now=5", headers=bearer(keys["read"]))).status_code == 403
        assert (await client.get("/v1/popular?now=5", headers=bearer(keys["admin"]))).status_code == 200
        assert (await client.get("/v1/popular", headers={"X-API-Key": keys["read"]})).status_code == 200
        basic = base64.b64encode(f"me:{keys['admin']}".encode()).decode()
        assert (await client.get("/", headers={"Authorization": f"Basic {basic}"})).status_code == 200
        for wrong in ("Basic !!", "Basic " + base64.b64encode(b"\xff\xfe").decode(), "Bearer", "Bearer \xe9"):
            headers = {"Authorization": wrong.encode("latin-1")}
            assert (await client.get("/", headers=headers)).status_code == 401  # type: ignore[arg-type]
        asked = await client.get("/", headers={"Accept": "text/html"})
        assert asked.headers["www-authenticate"].startswith("Basic")


async def test_the_key_of_the_settings_goes_with_and_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(BindingError, match="freshet keys add"):
        create_app(Settings.load(tmp_path, env={}, host="0.0.0.0"))
    with pytest.raises(BindingError, match=r"at least 16 characters.*got 15"):
        create_app(Settings.load(tmp_path, env={}, host="0.0.0.0", admin_key="s" * 15))
    async with door(tmp_path, admin_key="s"):  # on loopback it may be any
        pass
    async with door(tmp_path, host="0.0.0.0", admin_key="s" * 30) as (client, _):
        assert (await client.get("/v1/popular")).status_code == 401
        assert (await client.get("/v1/popular", headers=bearer("s" * 30))).status_code == 200
    text = add_key(tmp_path / "keys.json", "reader", ["read"])
    async with door(tmp_path, host="0.0.0.0") as (client, _):
        assert (await client.get("/v1/popular", headers=bearer(text))).status_code == 200
    async with door(tmp_path, admin_key="s" * 30) as (client, _):
        for key, status in ((text, 403), ("s" * 30, 200)):
            assert (await client.get("/-/settings", headers=bearer(key))).status_code == status


async def test_a_proxys_login_does_not_hide_the_key(tmp_path: Path) -> None:
    text = add_key(tmp_path / "keys.json", "reader", ["read"])
    login = {"Authorization": "Basic " + base64.b64encode(b"proxy:password").decode()}
    async with door(tmp_path) as (client, _):
        assert (await client.get("/v1/popular", headers=login)).status_code == 401
        for other in (login, bearer("another")):
            assert (await client.get("/v1/popular", headers={**other, "X-API-Key": text})).status_code == 200


def _change_keys(path: Path, worker: int) -> None:
    for number in range(10):
        add_key(path, f"k{worker}-{number}", ["read"])
        if number % 2:
            revoke_key(path, f"k{worker}-{number}")


def test_of_changes_at_once_none_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with ThreadPoolExecutor(4) as pool:  # each opens the lock for itself, as a process does
        list(pool.map(_change_keys, [path] * 4, range(4)))
    assert {key.name for key in read_keys(path)} == {f"k{w}-{n}" for w in range(4) for n in range(0, 10, 2)}


async def test_the_file_is_read_again_when_it_changes_and_never_fails_open(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    async with door(tmp_path) as (client, app):
        ring: KeyRing = app.state.parts.ring
        now = [0.0]
        ring.clock = lambda: now[0]

        async def status(key: str) -> int:
            now[0] += 2.0
            return (await client.get("/v1/popular", headers=bearer(key))).status_code

        assert await status("none is needed yet") == 200
        path.write_text("{")
        assert await status("none that can be read") == 401
        path.unlink()
        first = add_key(path, "first", ["read"])
        assert [await status(first), await status("x")] == [200, 401]
        second = add_key(path, "second", ["read"])
        revoke_key(path, "first")
        assert [await status(first), await status(second)] == [401, 200]
        kept = path.read_bytes()
        path.write_text("{")
        assert [await status(second), await status("x")] == [200, 401]
        assert "keys read before stay" in ring.problem
        path.unlink()
        assert [await status(second), await status("x")] == [200, 401]
        path.write_bytes(kept)
        assert (await status(second), ring.problem) == (200, "")
        revoke_key(path, "second")
        assert await status(second) == 401


async def test_a_key_has_a_rate_and_a_list_counts_its_objects(tmp_path: Path) -> None:
    keep = add_key(tmp_path / "keys.json", "keep", ["read", "publish"], rate=3)
    async with door(tmp_path) as (client, app):
        now = [100.0]
        app.state.parts.ring.clock = lambda: now[0]
        answers = [await client.get("/v1/popular", headers=bearer(keep)) for _ in range(5)]
        assert [a.status_code for a in answers] == [200, 200, 200, 429, 429]
        assert answers[-1].headers["retry-after"] == "1"
        assert answers[-1].json()["error"]["where"] == "rate"
        now[0] += 1.0
        batch = [{"type": "click", "user_id": "u", "item_id": "i", "ts": 1.0}] * 13
        assert (await client.post("/v1/events", json=batch, headers=bearer(keep))).status_code == 503  # no Kafka here
        late = await client.get("/v1/popular", headers=bearer(keep))
        assert (late.status_code, late.headers["retry-after"]) == (429, "4")  # 10 in debt, one to take: 11 / 3 s
        now[0] += 4.0
        assert (await client.get("/v1/popular", headers=bearer(keep))).status_code == 200


def test_a_bucket_holds_one_second_and_never_more() -> None:
    bucket = Bucket(0.5, 1.0, 0.0)
    assert bucket.wait(0.0) == 0.0
    assert bucket.wait(0.0) == pytest.approx(2.0)
    assert bucket.wait(2.0) == 0.0
    assert bucket.wait(1e6) == 0.0
    assert bucket.wait(1e6) == pytest.approx(2.0)


HEADERS = ("x-content-type-options", "referrer-policy", "content-security-policy", "cache-control")


async def test_every_answer_carries_the_headers(tmp_path: Path) -> None:
    async with door(tmp_path) as (client, app):

        async def broken(request: Request) -> Response:
            raise RuntimeError("boom")

        app.router.add_route("/broken", broken)
        for path, status in (
            ("/v1/popular", 200), ("/", 200), ("/docs", 200), ("/nothing", 404), ("/broken", 500),
            ("/health/ready", 503), ("/v1/popular?n=0", 422), ("/metrics", 200), ("/openapi.json", 200),
        ):  # fmt: skip
            answer = await client.get(path)
            assert answer.status_code == status
            assert all(name in answer.headers for name in HEADERS), path
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        refused = await client.get("/v1/popular", headers={"Host": "evil.example"})
        assert all(name in refused.headers for name in HEADERS)
        assert (await client.get("/v1/popular")).headers["cache-control"] == "no-store"


async def test_pages_of_listed_origins_may_call_and_others_may_not(tmp_path: Path) -> None:
    shop, evil = {"Origin": "https://shop.example"}, {"Origin": "https://evil.example"}
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    key = add_key(tmp_path / "keys.json", "page", ["publish"])
    admin = add_key(tmp_path / "keys.json", "us", ["admin"])
    event = {"type": "click"}
    async with door(tmp_path, cors="https://shop.example,http://localhost:3000") as (client, _):
        preflight = await client.options("/v1/events", headers={**shop, **asks})
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-origin"] == "https://shop.example"
        assert "authorization" in preflight.headers["access-control-allow-headers"]
        refused = await client.options("/v1/events", headers={**evil, **asks})
        assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (403, False)
        posted = await client.post("/v1/events", json=event, headers={**shop, **bearer(key)})
        assert (posted.status_code, posted.headers["access-control-allow-origin"]) == (422, "https://shop.example")
        assert "Origin" in posted.headers["vary"]
        assert (await client.post("/v1/events", json=event, headers={**evil, **bearer(key)})).status_code == 403
        unknown = await client.get("/v1/popular", headers=shop)
        assert (unknown.status_code, unknown.headers["access-control-allow-origin"]) == (401, "https://shop.example")
        for headers in ({**shop, **asks}, {**shop, **bearer(admin)}):  # a shop's page neither looks into the system
            method = "OPTIONS" if headers.keys() & asks.keys() else "POST"
            acted = await client.request(method, "/-/crowd", json={"users": 1}, headers=headers)
            assert (acted.status_code, "access-control-allow-origin" in acted.headers) == (403, False)  # nor acts on it
    async with door(tmp_path) as (client, _):
        assert (await client.options("/v1/events", headers={**shop, **asks})).status_code == 403
        assert "access-control-allow-origin" not in (await client.get("/v1/popular", headers=shop)).headers
    with pytest.raises(SettingsError, match="cors"):
        Settings.load(tmp_path, env={}, cors="shop.example")


async def test_no_key_is_ever_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    admin = add_key(tmp_path / "keys.json", "ops", ["admin"])
    reader, bootstrap, wrong = add_key(tmp_path / "keys.json", "app", ["read"], 2), "b" * 40, "fr_" + "w" * 43
    told: list[str] = [(tmp_path / "keys.json").read_text()]
    async with door(tmp_path, admin_key=bootstrap) as (client, app):

        async def broken(request: Request) -> Response:
            raise RuntimeError("boom")

        app.router.add_route("/broken", broken)
        for key in (admin, reader, bootstrap, wrong):
            for path in ("/v1/popular", "/v1/popular?n=0", "/-/settings", "/-/state", "/metrics", "/docs", "/broken",
                         "/openapi.json", "/v1/users/ann", "/nothing"):  # fmt: skip
                for headers in (bearer(key), {"X-API-Key": key}):
                    answer = await client.get(path, headers=headers)
                    told += [answer.text, str(answer.headers)]
        told += [repr(app.state.parts.ring), str(app.state.parts.settings.rows()), caplog.text]
    for key in (admin, reader, bootstrap, wrong):
        assert not any(key in text for text in told)


def test_a_file_of_keys_is_checked_whole(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    good = {"name": "a", "sha256": hashed("x"), "scopes": ["read"], "rate": 1}
    for keys in ([{**good, "sha256": "x"}], [{**good, "scopes": []}], [{**good, "scopes": ["root"]}], [good, good],
                 [{**good, "rate": -1}], [{**good, "key": "x"}], [{**good, "name": "a b"}], 5):  # fmt: skip
        path.write_text(json.dumps({"keys": keys}))
        with pytest.raises(KeysError, match=r"keys\.json"):
            read_keys(path)
    with pytest.raises(KeysError, match="freshet keys add"):
        create_app(Settings.load(tmp_path, env={}, keys=str(tmp_path / "elsewhere.json")))


def test_keys_are_added_listed_and_revoked_in_the_terminal(tmp_path: Path) -> None:
    run, path = CliRunner(), tmp_path / "keys.json"

    def freshet(*words: str) -> Any:
        return run.invoke(cli, ["keys", *words, "--data", str(tmp_path)])

    assert "loopback only" in freshet("list").stdout
    made = freshet("add", "shop", "--scope", "read", "--scope", "publish", "--rate", "50")
    text = made.stdout.strip()
    assert made.exit_code == 0
    assert read_keys(path)[0].sha256 == hashed(text)
    assert text not in path.read_text()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    told = json.loads(freshet("add", "ops", "--scope", "admin", "--json").stdout)
    assert hashed(told["key"]) == read_keys(path)[1].sha256
    assert [row["name"] for row in json.loads(freshet("list", "--json").stdout)] == ["shop", "ops"]
    assert "50/s" in freshet("list").stdout
    for words in (("add", "shop", "--scope", "read"), ("add", "x", "--scope", "root"), ("revoke", "nobody")):
        assert isinstance(freshet(*words).exception, KeysError), words
    assert freshet("revoke", "shop").exit_code == 0
    assert [key.name for key in read_keys(path)] == ["ops"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".keys.json.lock", "keys.json"]


async def test_writers_of_the_file_leave_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "first", ["read"])

    async def read() -> None:
        for _ in range(200):
            assert read_keys(path)[0].name == "first"
            await asyncio.sleep(0)

    async def write() -> None:
        for number in range(50):
            await asyncio.to_thread(add_key, path, f"k{number}", ["read"])

    await asyncio.gather(read(), write())
