"""What the HTTP door reads and answers: msgspec structs, the one error shape, and their OpenAPI schema.

Knows nothing about Kafka, Redis or how an answer is found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from models.bandit import Policy

MAX_BODY: Final = 1024 * 1024
MAX_LIST: Final = 1000
MAX_USER_EVENTS: Final = 256
Id = Annotated[str, Meta(min_length=1, max_length=256)]
Ids = Annotated[list[Id], Meta(max_length=1000)]
Count = Annotated[int, Meta(ge=1, le=100)]
Time = Annotated[float, Meta(ge=0, le=1e11)]
T = TypeVar("T")

_encode = msgspec.json.Encoder().encode
_WHERE = re.compile(r" - at `(?P<where>[^`]*)`$")


class Problem(Exception):
    """A request that cannot be answered as asked: a status, and where, what was expected, what was got, what to do."""

    def __init__(
        self, status: int, where: str, expected: str, got: str, *, do: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(f"{where}: expected {expected}, got {got}")
        self.status = status
        self.error = Error(where=where, expected=expected, got=got, do=do or UNSET)
        self.headers = dict(headers or {})


class Error(Struct):
    """Where it went wrong, what was expected, what was got and, where one is known, what to do next."""

    where: str
    expected: str
    got: str
    do: str | UnsetType = UNSET


class ErrorAnswer(Struct):
    """The body of every answer that is not a success."""

    error: Error


class Verdict(Struct):
    """What became of one object of a list; a rejected one was not stored and its reason says why."""

    index: int
    status: Literal["accepted", "rejected"]
    event_id: str | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    reason: str | UnsetType = UNSET


class Accepted(Struct):
    """Verdicts in the order of the request; `token` names the position of all that was accepted, for `after=`."""

    accepted: int
    rejected: int
    verdicts: list[Verdict]
    token: str | None


class LookupQuery(Struct, forbid_unknown_fields=True):
    """What a lookup may ask for, in the query string (lists comma-separated or repeated) or as a JSON body."""

    n: Annotated[Count, Meta(description="How many items.")] = 10
    surface: Annotated[str, Meta(max_length=64, description="Where the slate is shown; logged with it.")] = "home"
    context: Annotated[dict[str, str], Meta(description="Names and values; in the query string a JSON object.")] = {}
    exclude: Annotated[Ids, Meta(description="Item ids that may not appear.")] = []
    categories: Annotated[Ids, Meta(description="Only items of at least one of these categories.")] = []
    seen: Annotated[Literal["exclude", "include"], Meta(description="Items that the user acted on before.")] = "exclude"
    after: Annotated[
        Annotated[str, Meta(max_length=4096)] | None,
        Meta(description="Position token: answer from a profile that holds it."),
    ] = None
    wait_ms: Annotated[
        Annotated[int, Meta(ge=0, le=2000)] | None,
        Meta(description="How long `after` may wait; the setting token_wait_ms by default."),
    ] = None
    track: Annotated[bool, Meta(description="Log the slate as an impression.")] = True
    trace: Annotated[bool, Meta(description="Add candidates per channel and milliseconds per stage.")] = False
    policy: Annotated[Policy | None, Meta(description="Instead of the set policy (loopback or admin key).")] = None
    now: Annotated[Time | None, Meta(description="Score as of this time, s since 1970 (loopback or admin key).")] = None


class PopularQuery(Struct, forbid_unknown_fields=True):
    """What `/v1/popular` may be asked for."""

    n: Annotated[Count, Meta(description="How many items.")] = 10
    user_id: Annotated[Id | None, Meta(description="Leave out what this user acted on.")] = None
    exclude: Annotated[Ids, Meta(description="Item ids that may not appear.")] = []
    now: Annotated[Time | None, Meta(description="Popular as of this time (loopback or admin key).")] = None


class SimilarQuery(Struct, forbid_unknown_fields=True):
    """What `/v1/similar` may be asked for."""

    n: Annotated[Count, Meta(description="How many items.")] = 10


class Served(Struct, omit_defaults=True):
    """One item of an answer."""

    item_id: str
    score: float
    channel: str = ""
    reason: str = ""
    title: str = ""
    categories: list[str] = []


class LookupAnswer(Struct):
    """A slate. `applied` is there when `after` was asked; `reason` says why `items` is empty or short of state."""

    slate_id: str
    user_id: str
    items: list[Served]
    model_step: int
    degraded: bool
    applied: bool | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    trace: dict[str, Any] | UnsetType = UNSET


class ItemsAnswer(Struct):
    """Items without a slate: popular or similar ones."""

    items: list[Served]
    degraded: bool
    reason: str | UnsetType = UNSET


class StoredAnswer(Struct):
    """A catalogue change was acknowledged by Kafka at this offset of the topic `items`."""

    item_id: str
    offset: int


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Answer with `body` as JSON."""
    return Response(_encode(body), status, headers=headers, media_type="application/json")


def problem_response(problem: Problem) -> Response:
    """Answer with the one error shape."""
    return json_response(ErrorAnswer(problem.error), problem.status, problem.headers)


async def read_body(request: Request, limit: int = MAX_BODY) -> bytes:
    """Read the whole body; raises Problem 413 over `limit` bytes, also where no length was declared."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise Problem(413, "body", f"at most {limit} bytes", f"{declared} bytes", do="send fewer objects a request")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise Problem(413, "body", f"at most {limit} bytes", "more", do="send fewer objects a request")
    return bytes(body)


def read_query(request: Request, kind: type[T]) -> T:
    """Read the query string into `kind`; raises Problem 422."""
    lists = [f.name for f in msgspec.structs.fields(kind) if f.default_factory is list]  # type: ignore[arg-type]
    values: dict[str, object] = {}
    for name in request.query_params:
        given = request.query_params.getlist(name)
        if name in lists:
            values[name] = [part for text in given for part in text.split(",") if part]
        elif len(given) > 1:
            raise Problem(422, f"query.{name}", "one value", f"{len(given)} values")
        else:
            values[name] = _object(name, given[0]) if name == "context" else given[0]
    return converted(values, kind, "query", strict=False)


def _object(name: str, text: str) -> object:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Problem(422, f"query.{name}", "a JSON object", f"{text[:80]!r} ({error})") from error


def converted(value: object, kind: type[T], where: str, *, strict: bool = True) -> T:
    """Convert plain values into `kind`; raises Problem 422 that names the place and what was got there."""
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        text = str(error)
        found = _WHERE.search(text)
        path = found["where"].removeprefix("$") if found else ""
        expected = _WHERE.sub("", text).removeprefix("Expected ").partition(", got ")[0]
        raise Problem(422, where + path, expected, _got(value, path)) from error


def decode_json(body: bytes, where: str = "body") -> object:
    """Decode JSON of any shape; raises Problem 422."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(422, where, "JSON", f"{bytes(body[:80])!r} ({error})") from error


def _got(value: object, path: str) -> str:
    for part in re.findall(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]", path):
        name, index = part
        if name and isinstance(value, Mapping):
            value = value.get(name, "nothing")
        elif index.isdigit() and isinstance(value, list):
            value = value[int(index)]
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def schema_of(*kinds: type) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return OpenAPI schemas of `kinds` (as references) and the components they refer to."""
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    return list(schemas), dict(components)


def query_parameters(kind: type) -> list[dict[str, Any]]:
    """Return OpenAPI parameters for a query struct."""
    ((reference,), components) = schema_of(kind)
    found = components[reference["$ref"].rpartition("/")[2]]
    parameters = []
    for name, schema in found["properties"].items():
        schema = dict(schema)
        text = schema.pop("description", "") or next(
            (part.pop("description") for part in schema.get("anyOf", []) if "description" in part), ""
        )
        entry: dict[str, Any] = {"name": name, "in": "query", "required": name in found.get("required", [])}
        if schema.get("type") == "array":
            entry |= {"style": "form", "explode": False}
            schema["items"] = {k: v for k, v in schema["items"].items() if k != "minLength"}  # nothing between commas
        parameters.append(entry | {"description": text, "schema": schema})
    return parameters
