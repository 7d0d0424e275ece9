"""Who may ask: an ASGI wrapper that checks the Host, the Origin and, where one is needed, the admin key.

Knows nothing about routes but which ones need no key.
"""

from __future__ import annotations

import hmac
import ipaddress
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.messages import Problem, problem_response

OPEN: Final = frozenset({"/health/live", "/health/ready"})
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class BindingError(ValueError):
    """The API was told to listen beyond this machine without an admin key."""


def is_loopback(host: str) -> bool:
    """Say whether a server bound to `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_binding(host: str, admin_key: str) -> None:
    """Raise BindingError where `host` is not loopback and no admin key is set."""
    if not is_loopback(host) and not admin_key:
        raise BindingError(
            f"host: expected a loopback address or a set admin key, got {host!r} and none; "
            "set FRESHET_ADMIN_KEY to a long random text, or bind to 127.0.0.1"
        )


def _name(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() and not name.endswith(":") else host


class Guard:
    """Refuse requests that a browser was tricked into (loopback) or that carry no admin key (elsewhere)."""

    def __init__(self, app: ASGIApp, *, host: str, admin_key: str) -> None:
        check_binding(host, admin_key)
        self.app = app
        self.loopback = is_loopback(host)
        self._key = admin_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            scope["freshet.privileged"] = self._check(scope)
        except Problem as problem:
            await problem_response(problem)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> bool:
        if scope["path"] in OPEN:
            return False
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.loopback:
            if not is_loopback(_name(host)):
                raise Problem(403, "header Host", "localhost, 127.0.0.1 or [::1]", repr(host[:80]))
        elif not self._has_key(headers):
            raise Problem(
                401, "header Authorization", "Bearer and the admin key (or X-API-Key)", "none or another",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        origin = headers.get("origin")
        if origin and scope["method"] not in _SAFE and origin.partition("://")[2] != host:
            raise Problem(403, "header Origin", f"this server ({host})", repr(origin[:80]))
        return True

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = headers.get("x-api-key", "")
        return hmac.compare_digest(given.strip().encode(), self._key)
