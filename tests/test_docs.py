"""The docs are whole and true: settings, topics, verbs, routes, series, keys, discovered from the code."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from infra.cli import app
from infra.settings import EVENT_WEIGHTS, Settings
from infra.telemetry import SERIES

ROOT = Path(__file__).parent.parent


@cache
def docs() -> str:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
    return "\n".join(page.read_text() for page in pages)


def verbs() -> dict[str, Any]:
    """Verb -> its command (typer brings its own click, so by duck type); a group's verbs are in its `commands`."""
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def options(verb: str) -> dict[str, str]:
    """Option -> help, of a verb and of the verbs below it."""
    found: dict[str, str] = {}
    for command in [verbs()[verb], *getattr(verbs()[verb], "commands", {}).values()]:
        for option in command.params:
            if option.param_type_name == "option":
                found |= dict.fromkeys(option.opts, option.help or "")
    return found | {"--help": "this"}


@pytest.mark.parametrize("row", Settings.load(env={}, running=False).rows(), ids=lambda row: str(row["name"]))
def test_every_setting_with_its_default_and_help(row: dict[str, object]) -> None:
    line = next((line for line in docs().splitlines() if line.startswith(f"| `{row['environment']}` |")), None)
    assert line, f"README.md has no row for {row['environment']}"
    assert str(row["help"]) in line
    default = row["default"]
    if isinstance(default, bool):
        assert f"`{str(default).lower()}`" in line
    elif isinstance(default, int | float):
        assert f"`{default if isinstance(default, int) else format(default, 'g')}`" in line
    elif isinstance(default, str) and default:
        assert f"`{default}`" in line


def test_the_table_of_weights() -> None:
    for kind, condition, weight in EVENT_WEIGHTS:
        assert f"| {kind} | {condition or 'always'} | {weight:g} |" in docs()


def test_no_setting_that_does_not_exist() -> None:
    known = {str(row["environment"]) for row in Settings.load(env={}, running=False).rows()} | {"FRESHET_READY_FILE"}
    assert set(re.findall(r"FRESHET_[A-Z_]*[A-Z]", docs())) <= known


def test_every_topic() -> None:
    from streaming.topics import Topics

    for name, (partitions, _) in Topics("fr", 8).specs().items():
        rows = [line for line in docs().splitlines() if line.startswith("|") and f"`{name}`" in line]
        assert rows, f"README.md has no row for topic {name}"
        assert any(f"| {partitions} |" in row for row in rows), f"{name} has {partitions} partitions"


@pytest.mark.parametrize("verb", sorted(verbs()))
def test_every_verb_is_documented_and_teaches(verb: str) -> None:
    assert f"`freshet {verb}`" in docs()
    assert (verbs()[verb].help or "").strip()
    for option, text in options(verb).items():
        assert text, f"freshet {verb} {option} has no help"


def test_every_freshet_command_in_the_docs_parses() -> None:
    blocks = re.findall(r"^ {4}.*$", docs(), re.MULTILINE)
    found = [match[1] for line in blocks if (match := re.search(r"(?:^|\s|bin/)freshet (\w[^#&|]*)", line))]
    assert found
    for line in found:
        verb, *words = shlex.split(line.split("  ")[0])
        assert verb in verbs(), f"freshet {line}: no such verb"
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= options(verb).keys(), (
            f"freshet {line}"
        )


def test_every_make_target_in_the_docs_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^ {4}|`)make (\w+)", docs() + (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_every_route() -> None:
    from serving.app import create_app

    application = create_app(Settings.load(env={}, running=False, kafka="127.0.0.1:1", redis="redis://127.0.0.1:1/0"))
    missing = []
    for route in application.routes:
        path = re.sub(r":path}", "}", str(getattr(route, "path", "")))
        methods = (getattr(route, "methods", None) or {"GET"}) - {"HEAD", "OPTIONS"}
        if not path.startswith(("/static", "/openapi.json")):
            missing += [f"{method} {path}" for method in methods if f"`{method} {path}`" not in docs()]
    assert not missing, f"README.md does not name {sorted(missing)}"


@pytest.mark.parametrize("series", SERIES, ids=lambda series: series.name)
def test_every_series(series: object) -> None:
    from infra.telemetry import Series

    assert isinstance(series, Series)
    assert f"| `{series.name}` | {series.kind} | {', '.join(series.labels)} | {series.of} | {series.help} |" in docs()


def test_every_series_is_measured_somewhere() -> None:
    import infra.telemetry as telemetry

    names = {name for name, value in vars(telemetry).items() if isinstance(value, telemetry.Series)}
    imported = {
        alias.name
        for package in ("streaming", "serving", "infra")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module == "infra.telemetry"
        for alias in node.names
    }
    assert not names - imported, f"named and documented but never measured: {sorted(names - imported)}"


def test_every_redis_key() -> None:
    from streaming.state import Keys

    keys = Keys("fr", 1)
    arguments: dict[str, object] = {"partition": 7, "user": "<user>", "bucket": 9, "version": 4, "name": "<name>"}
    found = set()
    for name, member in inspect.getmembers_static(Keys):
        if name.startswith("_") or name in {item.name for item in dataclasses.fields(Keys)} | {"prefix"}:
            continue
        value = getattr(keys, name)
        if inspect.isfunction(member):
            value = value(*(arguments[parameter] for parameter in inspect.signature(value).parameters))
        found.add(str(value).replace("{u7}", "{u<p>}").replace(":9", ":<bucket>").replace(":4", ":<version>"))
    assert len(found) > 8
    missing = [key for key in found if f"`{key}`" not in docs()]
    assert not missing, f"README.md does not name {missing}"


def test_no_address_or_path_that_belongs_to_one_machine() -> None:
    bad = re.compile(r"py" r"pi\.org|python" r"hosted|repo1?\.mav" r"en|registry\.npm" r"js")
    this = Path(__file__).name
    paths = [path for pattern in ("*", "*/*.py", "*/*.md", "infra/*", ".ci/*") for path in ROOT.glob(pattern)]
    for path in paths:
        if path.is_file() and path.name != this:
            assert not bad.search(path.read_text(errors="replace")), path
