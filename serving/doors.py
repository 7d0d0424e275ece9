"""The table of routes as a reader sees it: one `Door` per method and path, its OpenAPI entry, and the `/docs` page.

Knows nothing about what the handlers do.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from serving.messages import ErrorAnswer, query_parameters, schema_of

Handler = Callable[[Request], Awaitable[Response]]

_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_STATUS: Final = {
    400: "No HTTP, or a URL that is too long.",
    401: "No key, or nobody's.",
    403: "Not for this Host, Origin or key.",
    404: "Not known here.",
    408: "The body did not come in time.",
    409: "Cannot be done as things are; the answer says why.",
    413: "The body is over 1 MB.",
    422: "Something is not as expected; the answer says where.",
    429: "Too much at once; Retry-After says when to come again.",
    500: "A mistake of this server, which its log tells.",
    503: "A part is not reachable; the answer says which.",
}
_ANYWHERE: Final = (400, 401, 403, 429, 500)


class _AnyText(PathConvertor):
    """A path parameter to the end of the path; the framework's own stops at a line break, which an id may hold."""

    regex = "(?s:.*)"


register_url_convertor("path", _AnyText())


@dataclass(frozen=True, slots=True)
class Door:
    """One method on one path: its handler, and what it takes and answers as msgspec types."""

    method: str
    path: str
    handler: Handler
    summary: str
    tag: str
    answer: Any = None
    query: type | None = None
    body: Any = None
    status: int = 200
    problems: tuple[int, ...] = ()
    media: str = "application/json"
    notes: str = ""
    body_needed: bool = True
    problem: Any = ErrorAnswer

    def types(self) -> list[Any]:
        """Return every type that its OpenAPI entry refers to."""
        return [kind for kind in (self.answer, self.query, self.body) if kind is not None]

    def openapi(self) -> dict[str, Any]:
        """Return its OpenAPI operation, but for what the framework adds itself."""
        parameters: list[dict[str, Any]] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in _PARAMETER.findall(self.path)
        ]
        if self.query is not None and self.method == "GET":
            parameters += query_parameters(self.query)
        body = self.body if self.method != "GET" else None
        entry: dict[str, Any] = {"parameters": parameters}
        if body is not None:
            content = {"application/json": {"schema": schema_of(body)[0][0]}}
            entry["requestBody"] = {"required": self.body_needed, "content": content}
        answer = {} if self.answer is None else {"schema": schema_of(self.answer)[0][0]}
        entry["responses"] = {str(self.status): {"description": self.summary, "content": {self.media: answer}}}
        problem = {"application/json": {"schema": schema_of(self.problem)[0][0]}}
        for status in sorted({*self.problems, *_ANYWHERE}):
            content = {"text/plain": {}} if status == 400 else problem  # a 400 is the HTTP parser's own
            entry["responses"][str(status)] = {"description": _STATUS[status], "content": content}
        return entry


def mount(app: FastAPI, doors: Iterable[Door]) -> None:
    """Add every door to the application and make its OpenAPI document describe them."""
    doors = list(doors)
    for door in doors:
        app.add_api_route(
            door.path, door.handler, methods=[door.method], summary=door.summary, description=door.notes or None,
            tags=[door.tag], status_code=door.status, openapi_extra=door.openapi(), response_class=Response,
            operation_id=_operation(door), response_model=None,
        )  # fmt: skip
    components = schema_of(ErrorAnswer, *(kind for door in doors for kind in door.types()))[1]

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            document.setdefault("components", {}).setdefault("schemas", {}).update(components)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _operation(door: Door) -> str:
    return f"{door.method.lower()}{re.sub(r'[^a-z0-9]+', '_', door.path.lower())}".strip("_")


_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1b2530}
details{border:1px solid #d8dee4;border-radius:8px;margin:.5rem 0;padding:.5rem .8rem}
summary{cursor:pointer}code,pre{font:13px/1.45 ui-monospace,monospace}
pre{background:#f4f6f8;padding:.7rem;border-radius:6px;overflow:auto}
b.m{display:inline-block;min-width:4.5rem;color:#0b62c4}
td,th{text-align:left;padding:.15rem .8rem .15rem 0;vertical-align:top}
"""


def docs_page(document: dict[str, Any]) -> HTMLResponse:
    """Render an OpenAPI document as one page that needs no network and no script."""
    sections: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            tag = (operation.get("tags") or ["other"])[0]
            sections.setdefault(tag, []).append(_operation_html(path, method, operation))
    schemas = "".join(
        f"<details id='{name}'><summary><code>{name}</code></summary>{_json_html(schema)}</details>"
        for name, schema in sorted(document.get("components", {}).get("schemas", {}).items())
    )
    body = "".join(f"<h2>{html.escape(tag)}</h2>{''.join(parts)}" for tag, parts in sections.items())
    title = html.escape(document["info"]["title"])
    return HTMLResponse(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title} API</title><style>{_STYLE}</style>"
        f"<h1>{title} API</h1><p>{html.escape(document['info'].get('description', ''))} "
        f"The same as <a href='/openapi.json'>OpenAPI</a>.</p>{body}<h2>schemas</h2>{schemas}</html>",
        headers={"Content-Security-Policy": _POLICY},
    )


def _operation_html(path: str, method: str, operation: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{html.escape(p['name'])}</code></td><td>{html.escape(p['in'])}</td>"
        f"<td><code>{html.escape(_type(p['schema']))}</code></td><td>{html.escape(p.get('description', ''))}</td></tr>"
        for p in operation.get("parameters", [])
    )
    table = f"<table><tr><th>name<th>in<th>type<th>meaning</tr>{rows}</table>" if rows else ""
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    answers = "".join(
        f"<li><code>{code}</code> {html.escape(answer.get('description', ''))}</li>"
        for code, answer in operation.get("responses", {}).items()
    )
    return (
        f"<details><summary><b class=m>{method.upper()}</b><code>{html.escape(path)}</code> "
        f"{html.escape(operation.get('summary', ''))}</summary><p>{html.escape(operation.get('description', ''))}</p>"
        f"{table}{'<h4>body</h4>' + _json_html(body) if body else ''}<ul>{answers}</ul></details>"
    )


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    default = f" = {json.dumps(schema['default'])}" if "default" in schema else ""
    return f"{schema.get('type', schema.get('$ref', 'any'))}{default}"


def _json_html(schema: dict[str, Any]) -> str:
    text = html.escape(json.dumps(schema, indent=2))
    return "<pre>" + re.sub(r"#/components/schemas/(\w+)", r"<a href='#\1'>\1</a>", text) + "</pre>"
