"""The files of the shop front and the dashboard, one route a file: nothing else can be asked for.

A file is read again where it changed on disk. Knows nothing about what is in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

STATIC: Final = Path(__file__).parent.parent / "static"
PAGES: Final = {"/": "index.html", "/dashboard": "dashboard.html", "/beacon.js": "beacon.js"}
TYPES: Final = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".LICENSE": "text/plain",
}
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class File:
    """One file, in memory, with the tag of what it holds."""

    def __init__(self, path: Path) -> None:
        self._path, self._changed, self._body, self._tag = path, -1, b"", ""
        self._read()

    def _read(self) -> None:
        changed = self._path.stat().st_mtime_ns
        if changed != self._changed:
            self._body, self._changed = self._path.read_bytes(), changed
            self._tag = f'"{hashlib.sha256(self._body).hexdigest()[:16]}"'

    async def answer(self, request: Request) -> Response:
        """GET: the file, or 304 where the browser has it."""
        self._read()
        headers = {**HEADERS, "ETag": self._tag}
        if request.headers.get("if-none-match") == self._tag:
            return Response(status_code=304, headers=headers)
        return Response(self._body, headers=headers, media_type=TYPES[self._path.suffix])


def files() -> list[Path]:
    """Return every file below `static/` that is served."""
    return sorted(path for path in STATIC.rglob("*") if path.suffix in TYPES)


def routes() -> list[Route]:
    """Return the routes of the pages and of every file."""
    served: dict[str, Callable[[Request], Awaitable[Response]]] = {
        f"/static/{path.relative_to(STATIC).as_posix()}": File(path).answer for path in files()
    }
    pages = {path: served[f"/static/{name}"] for path, name in PAGES.items()}
    return [Route(path, answer) for path, answer in (pages | served).items()]
