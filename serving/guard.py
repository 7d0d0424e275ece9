"""Who may ask: an ASGI wrapper that checks Host, Origin and key, keeps the rates, and puts safe headers on each answer.

Knows nothing about routes but which scope of a key opens which.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import math
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.keys import Key, KeyRing
from serving.messages import Problem, problem_response

OPEN: Final = frozenset({"/health/live", "/health/ready", "/beacon.js"})
"""Without a key: load balancers ask the first two, pages of other origins load the script."""
SECURITY_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
"""On every answer that does not say otherwise itself (the pages do)."""
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_READ: Final = ("/v1/recommendations/", "/v1/similar/", "/v1/items/")
_CORS_METHODS: Final = "GET, POST, PUT, DELETE"
_CORS_HEADERS: Final = "authorization, content-type, x-api-key"
_CORS_AGE_S: Final = "600"


MIN_ADMIN_KEY: Final = 16
"""Characters of the settings' key off loopback; those that `freshet keys` makes have 46."""


class BindingError(ValueError):
    """The API was told to listen beyond this machine without any key, or with one that can be guessed."""


def is_loopback(host: str) -> bool:
    """Say whether a server bound to `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_binding(host: str, *, has_key: bool, admin_key: str = "") -> None:
    """Raise BindingError where `host` is not loopback and there is no key, or the settings' key is short."""
    if not is_loopback(host) and 0 < len(admin_key) < MIN_ADMIN_KEY:
        raise BindingError(
            f"FRESHET_ADMIN_KEY: expected at least {MIN_ADMIN_KEY} characters where host is {host!r}, which others"
            f" can reach, got {len(admin_key)}; `openssl rand -hex 16` makes a good one"
        )
    if not is_loopback(host) and not has_key:
        raise BindingError(
            f"host: expected a loopback address or a key, got {host!r} and none; "
            "`freshet keys add NAME --scope admin` makes one (or set FRESHET_ADMIN_KEY to a long random text), "
            "or bind to 127.0.0.1"
        )


def scope_of(method: str, path: str) -> str:
    """Return the scope that a request needs. What is not named here needs admin, also what does not exist."""
    if method == "POST" and path == "/v1/events":
        return "publish"
    reads = method in ("GET", "HEAD") and (path == "/v1/popular" or path.startswith(_READ))
    if reads or (method == "POST" and path.startswith("/v1/recommendations/")):
        return "read"
    return "admin"


def _name(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() and not name.endswith(":") else host


class Guard:
    """Refuse what a browser was tricked into (no keys, loopback), or what carries no key that opens it (keys)."""

    def __init__(self, app: ASGIApp, *, host: str, ring: KeyRing, origins: tuple[str, ...] = ()) -> None:
        self.app, self.ring, self.origins = app, ring, origins
        self.loopback = is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        answer = self._dressed(send, self._lists(headers.get("origin", ""), scope["path"]))
        try:
            early = self._check(scope, headers)
        except Problem as problem:
            early = problem_response(problem)
        if early is not None:
            await early(scope, receive, answer)
        else:
            await self.app(scope, receive, answer)

    def _lists(self, origin: str, path: str) -> str:
        """Return an origin of the setting cors, else ""; what looks into the system or acts on it is for own pages."""
        return origin if origin in self.origins and not path.startswith("/-/") else ""

    def _dressed(self, send: Send, listed: str) -> Send:
        """Put the headers on that every answer carries, and those that let a listed origin read it."""

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                if self.origins:
                    headers.add_vary_header("Origin")
                    if listed:
                        headers["Access-Control-Allow-Origin"] = listed
                        headers["Access-Control-Expose-Headers"] = "Retry-After"
            await send(message)

        return dressed

    def _check(self, scope: Scope, headers: Headers) -> Response | None:
        """Return an answer that needs no route, or None where the request may go on; raises Problem."""
        self.ring.refresh()
        guarded = self.ring.found or not self.loopback
        host, method, path = headers.get("host", ""), scope["method"], scope["path"]
        scope["freshet.privileged"] = False
        if path in OPEN:
            return None
        if not guarded and not is_loopback(_name(host)):
            raise Problem(403, "header Host", "localhost, 127.0.0.1 or [::1]", repr(host[:80]))
        origin = headers.get("origin", "")
        listed = self._lists(origin, path)
        if method == "OPTIONS" and "access-control-request-method" in headers:
            if not listed:
                raise Problem(403, "header Origin", "an origin of the setting cors", repr(origin[:80]))
            return _preflight()
        if guarded:
            key = self._authorized(scope_of(method, path), headers)
            scope["freshet.key"], scope["freshet.privileged"] = key, key.opens("admin")
        else:
            scope["freshet.privileged"] = True
        if origin and method not in _SAFE and not listed and origin.partition("://")[2] != host:
            raise Problem(403, "header Origin", f"this server ({host}), or one of the setting cors", repr(origin[:80]))
        return None

    def _authorized(self, needed: str, headers: Headers) -> Key:
        given = _given(headers)
        key = self.ring.known(given)
        if key is None:
            html = "text/html" in headers.get("accept", "")  # a browser then asks for the key as a password
            raise Problem(
                401, "header Authorization", "Bearer and a key (or X-API-Key)", "another" if given else "none",
                headers={"WWW-Authenticate": 'Basic realm="freshet", charset="UTF-8"' if html else "Bearer"},
            )  # fmt: skip
        if not key.opens(needed):
            raise Problem(403, "header Authorization", f"a key with the scope {needed}", f"the key {key.name!r}")
        if (seconds := self.ring.wait(key)) > 0:
            raise Problem(
                429, "rate", f"at most {key.rate:g} objects a second of the key {key.name!r}", "more",
                do="wait as Retry-After says", headers={"Retry-After": str(math.ceil(seconds))},
            )  # fmt: skip
        return key


def _given(headers: Headers) -> str:
    """Return the key that a request carries: X-API-Key, Bearer, or the password of Basic (what a browser sends).

    X-API-Key goes first: Authorization may hold the login of a proxy in front, which is none of our keys.
    """
    if own := headers.get("x-api-key", "").strip():
        return own
    scheme, _, rest = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def _preflight() -> Response:
    return Response(
        status_code=204,
        headers={
            "Access-Control-Allow-Methods": _CORS_METHODS,
            "Access-Control-Allow-Headers": _CORS_HEADERS,
            "Access-Control-Max-Age": _CORS_AGE_S,
        },
    )
