"""The settings table: precedence, clear errors, masks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from infra.settings import EVENT_WEIGHTS, MASK, Settings, SettingsError, Weight


def test_at_most_thirty_each_with_default_and_help() -> None:
    items = dataclasses.fields(Settings)
    assert len(items) <= 33
    for item in items:
        assert item.default is not dataclasses.MISSING
        assert str(item.metadata["help"]).endswith(".")


def test_a_surface_has_its_own_policy() -> None:
    assert Settings.load(env={}).policy_of("home") == "epsilon"
    assert Settings.load(env={"FRESHET_POLICY": "thompson"}).policy_of("home") == "thompson"
    table = Settings.load(env={"FRESHET_POLICY": '[["home", "ucb"], ["*", "greedy"]]'})
    assert (table.policy_of("home"), table.policy_of("cart")) == ("ucb", "greedy")
    assert Settings.load(env={"FRESHET_POLICY": '[["home", "ucb"]]'}).policy_of("cart") == "epsilon"
    assert Settings.load(env=table.environment()).policy == table.policy


def test_defaults_load_from_an_empty_environment(tmp_path: Path) -> None:
    settings = Settings.load(tmp_path, env={})
    assert (settings.namespace, settings.partitions, settings.port, settings.consumer) == ("fr", 8, 8000, "chunks")
    assert settings.event_weights == EVENT_WEIGHTS
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.port = 1  # type: ignore[misc]


def test_argument_beats_environment_beats_stack_beats_default(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text(json.dumps({"kafka": "127.0.0.1:1", "redis": "redis://127.0.0.1:2/0"}))
    assert Settings.load(tmp_path, env={}).kafka == "127.0.0.1:1"
    env = {"FRESHET_KAFKA": "env:9", "FRESHET_PORT": "9000", "FRESHET_NAMESPACE": ""}
    loaded = Settings.load(tmp_path, env=env, port=7000, namespace=None)
    assert (loaded.kafka, loaded.redis, loaded.port, loaded.namespace) == ("env:9", "redis://127.0.0.1:2/0", 7000, "fr")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("port", "http", "whole number from 0 to 65535"),
        ("epsilon", "nan", "number from 0 to 1"),
        ("epsilon", "1.5", "number from 0 to 1"),
        ("policy", "best", "one of greedy, epsilon, softmax, ucb, thompson, thompson-item"),
        ("rewards", '[["*", "like", 1]]', "kind one of click, dwell, rating, action"),
        ("policy", '[["home"]]', "a JSON list of [surface, policy]"),
        ("require_catalogue", "maybe", "true or false"),
        ("kafka", "localhost", "host:port"),
        ("redis", "localhost:6379", "redis://host:port/db"),
        ("namespace", "Fr 1", "a letter, then"),
        ("event_weights", "[1]", "JSON list of"),
        ("event_weights", '[["click", "seconds < 3", 1]]', "a condition that kind click has"),
        ("event_weights", '[["applause", "", 1]]', "kind one of"),
        ("head_weights", "[1]", "JSON list of"),
        ("head_weights", '[["joy", 1]]', "head one of"),
        ("head_weights", '[["hide", "nan"]]', "from -100 to 100"),
    ],
)
def test_a_bad_value_says_where_expected_got(tmp_path: Path, name: str, value: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load(tmp_path, env={f"FRESHET_{name.upper()}": value})
    text = str(caught.value)
    assert f"setting {name} (environment FRESHET_{name.upper()})" in text
    assert says in text
    assert repr(value) in text


def test_unknown_setting_and_broken_stack_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such setting"):
        Settings.load(tmp_path, env={}, speed=3)
    (tmp_path / "stack.json").write_text("{")
    with pytest.raises(SettingsError, match=r"stack\.json: expected the JSON"):
        Settings.load(tmp_path, env={})


def test_environment_round_trip(tmp_path: Path) -> None:
    settings = Settings.load(
        tmp_path, env={}, require_catalogue=True, event_weights=[["click", "", 2]], head_weights=[["hide", -2]],
        admin_key="s3cret", port=0,
    )  # fmt: skip
    assert Settings.load(env=settings.environment()) == settings


def test_secrets_are_masked(tmp_path: Path) -> None:
    settings = Settings.load(tmp_path, env={}, admin_key="s3cret", redis="redis://user:pass@db:6379/0")
    shown = json.dumps(settings.rows())
    assert "s3cret" not in shown
    assert "pass@" not in shown
    assert f"redis://user:{MASK}@db:6379/0" in shown


def test_conditions_come_apart() -> None:
    assert Weight("click", "", 1).terms == ("always", 0.0)
    assert Weight("dwell", "seconds >= 30", 0.5).terms == (">=", 30.0)
    assert Weight("rating", "scaled", 1).terms == ("scaled", 0.0)
    assert Weight("action", "name = like", 0.8).terms == ("=", "like")
