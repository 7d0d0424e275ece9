"""Dashboards, alert rules and the scrape configuration name only series and labels that there are, and say what to do.

Expressions are taken apart by a small tokeniser here; promtool parses them too, where it is installed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from infra.cli import app
from infra.telemetry import SERIES, Series

INFRA = Path(__file__).parent.parent / "infra"
RULES = INFRA / "prometheus" / "alerts.yml"
SCRAPE = INFRA / "prometheus" / "prometheus.yml"
BOARDS = sorted((INFRA / "grafana" / "dashboards").glob("*.json"))
SOURCE = {"type": "prometheus", "uid": "freshet"}
ADDED = {"instance", "job"}
"""Labels that Prometheus adds to what it scrapes."""
SUFFIXES = ("_bucket", "_sum", "_count")
BRACES = r"\{(?:\"[^\"]*\"|[^}\"])*\}"
SELECTOR = re.compile(rf"(freshet_\w+)({BRACES})?")
FUNCTIONS = {
    "absent", "avg", "delta", "histogram_quantile", "increase", "max", "min", "rate", "sum", "by", "or", "and",
}  # fmt: skip


class Use(NamedTuple):
    """An expression and where it stands."""

    where: str
    expression: str


@cache
def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def boards() -> list[tuple[Path, dict[str, Any]]]:
    return [(path, json.loads(path.read_text())) for path in BOARDS]


def uses() -> list[Use]:
    found = [Use(rule["alert"], rule["expr"]) for rule in rules()]
    for path, board in boards():
        for panel in board["panels"]:
            found += [Use(f"{path.stem}: {panel['title']}", target["expr"]) for target in panel["targets"]]
        found += [Use(f"{path.stem}: {note['name']}", note["expr"]) for note in board["annotations"]["list"]]
    return found


def named(name: str) -> tuple[Series, str]:
    """The series of a name in an expression, and its suffix where it is a histogram; KeyError where there is none."""
    known = {series.name: series for series in SERIES}
    if name in known and known[name].kind != "histogram":
        return known[name], ""
    for suffix in SUFFIXES:
        series = known.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
        if series is not None and series.kind == "histogram":
            return series, suffix
    raise KeyError(name)


def selections(expression: str) -> list[tuple[Series, str, list[str]]]:
    """Series, suffix and the labels asked for, of each selector of an expression."""
    found = []
    for name, braces in SELECTOR.findall(expression):
        labels = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", braces)
        found.append((*named(name), labels))
    return found


@pytest.mark.parametrize("use", uses(), ids=lambda use: use.where)
def test_an_expression_names_series_and_labels_that_there_are(use: Use) -> None:
    chosen = selections(use.expression)
    assert chosen
    known = set(ADDED)
    for series, suffix, labels in chosen:
        own = {*series.labels, *(["le"] if suffix == "_bucket" else [])}
        assert set(labels) <= own | ADDED, f"{series.name} has no label {set(labels) - own}"
        known |= own
        if series.kind == "counter" or suffix:
            assert re.search(r"(rate|increase)\(" + series.name, use.expression), f"{series.name} counts: take its rate"
        else:
            assert not re.search(r"(rate|increase)\(" + series.name, use.expression), f"{series.name} is a gauge"
    for group in re.findall(r"by \(([^)]*)\)", use.expression):
        assert set(group.replace(" ", "").split(",")) <= known, use.expression
    bare = re.sub(rf"{BRACES}|\[[^\]]*\]|freshet_\w+|by \([^)]*\)", " ", use.expression)
    assert set(re.findall(r"[a-z_]{2,}", bare)) <= FUNCTIONS, use.expression


@pytest.mark.parametrize("use", uses(), ids=lambda use: use.where)
def test_what_all_api_processes_expose_alike_is_not_added_up(use: Use) -> None:
    for series, _, _ in selections(use.expression):
        if series.of == "deployment":
            before = use.expression[: use.expression.index(series.name)]
            outer = re.findall(r"\b(sum|max|min|avg|absent)\b", before)
            assert outer, f"{use.expression}: one line for each API process"
            assert outer[-1] in ("max", "min"), f"{use.expression}: {series.name} is the same from each API process"


@pytest.mark.parametrize("use", uses(), ids=lambda use: use.where)
def test_percentiles_keep_their_edges(use: Use) -> None:
    for by in re.findall(r"histogram_quantile\([^,]+, \w+ by \(([^)]*)\)", use.expression):
        assert "le" in by.replace(" ", "").split(",")
    grouped = re.findall(r"histogram_quantile\([^,]+, \w+ by", use.expression)
    assert use.expression.count("histogram_quantile") == len(grouped)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_waits_and_says_what_to_do(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"\d+m", rule["for"])
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"].endswith(".")
    assert len(rule["annotations"]["runbook"]) > 30
    labels = {label for series, _, _ in selections(rule["expr"]) for label in series.labels} | ADDED
    for text in rule["annotations"].values():
        assert set(re.findall(r"\$labels\.(\w+)", text)) <= labels
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for verb in re.findall(r"`freshet (\S+?)[ `]", rule["annotations"]["runbook"]):
        assert verb in verbs, f"no such verb: freshet {verb}"


def test_alerts_have_names_of_their_own() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names) > 10


def test_every_series_is_on_a_dashboard_or_in_an_alert() -> None:
    shown = {series.name for use in uses() for series, _, _ in selections(use.expression)}
    # Said by others that are shown: accepted ones by type come again as folded ones, positions as lags.
    besides = {
        "freshet_events_received_total", "freshet_fold_lag_events", "freshet_snapshot_position",
        "freshet_snapshot_rows",
    }  # fmt: skip
    assert {series.name for series in SERIES} - shown == besides


@pytest.mark.parametrize(("path", "board"), boards(), ids=[path.stem for path in BOARDS])
def test_a_dashboard_is_whole(path: Path, board: dict[str, Any]) -> None:
    assert board["uid"] == f"freshet-{path.stem}"
    assert board["title"].startswith("Freshet: ")
    assert {link["url"] for link in board["links"]} == {f"/d/freshet-{p.stem}" for p in BOARDS if p != path}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        assert panel["datasource"] == SOURCE
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        for target in panel["targets"]:
            by = re.findall(r"by \(([^)]*)\)", target["expr"])
            held = {label for group in by for label in group.replace(" ", "").split(",")}
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= held
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells


def test_grafana_finds_its_source_and_dashboards_where_compose_puts_them() -> None:
    provisioning = INFRA / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "freshet.yml").read_text())["providers"]
    services = yaml.safe_load((INFRA.parent / "docker-compose.yml").read_text())["services"]
    mounts = dict(volume.removesuffix(":ro").split(":") for volume in services["grafana"]["volumes"])
    assert (source["type"], source["uid"]) == (SOURCE["type"], SOURCE["uid"])
    assert source["url"] == "http://prometheus:9090"
    assert mounts["./infra/grafana/provisioning"] == "/etc/grafana/provisioning"
    assert mounts["./infra/grafana/dashboards"] == provider["options"]["path"]
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent.as_posix() == provider["options"]["path"]
    assert (INFRA / "grafana" / "dashboards" / home.name).exists()


def test_prometheus_scrapes_the_api_with_the_key_of_the_deployment() -> None:
    content = yaml.safe_load(SCRAPE.read_text())
    compose = yaml.safe_load((INFRA.parent / "docker-compose.yml").read_text())
    own, (job,) = compose["services"]["prometheus"], content["scrape_configs"]
    mounts = dict(volume.removesuffix(":ro").split(":") for volume in own["volumes"])
    assert content["rule_files"] == [mounts["./infra/prometheus/alerts.yml"]]
    assert f"--config.file={mounts['./infra/prometheus/prometheus.yml']}" in own["command"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{own['secrets'][0]}"
    assert compose["secrets"][own["secrets"][0]] == {"environment": "FRESHET_ADMIN_KEY"}
    (found,) = job["dns_sd_configs"]
    assert found["names"] == ["api"]
    assert found["port"] == compose["services"]["api"]["environment"]["FRESHET_PORT"]


def promtool(*words: str) -> None:
    if (tool := shutil.which("promtool")) is None:
        pytest.skip("no promtool: it comes with Debian's package prometheus")
    done = subprocess.run([tool, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_rules_and_configuration() -> None:
    promtool("check", "rules", str(RULES))
    promtool("check", "config", "--syntax-only", str(SCRAPE))


def test_promtool_accepts_every_expression_of_the_dashboards(tmp_path: Path) -> None:
    made = [
        {"record": f"test:r{number}", "expr": use.expression.replace("$__rate_interval", "1m")}
        for number, use in enumerate(uses())
    ]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "boards", "rules": made}]}))
    promtool("check", "rules", str(tmp_path / "rules.yml"))


# Two API processes: what both expose alike, events that wait, an item agent that went silent, two new dead letters.
PLAYED = {
    'freshet_ready{instance="a"}': "1x20",
    'freshet_ready{instance="b"}': "1x20",
    'freshet_lag_events{instance="a",fold="user",partition="3"}': "20000x20",
    'freshet_lag_events{instance="b",fold="user",partition="3"}': "20000x20",
    'freshet_told_age_seconds{instance="a",process="users-0"}': "1x20",
    'freshet_told_age_seconds{instance="a",process="items"}': "0+60x20",
    'freshet_dead_letters{instance="a"}': "3x5 5x15",
    'freshet_http_seconds_count{instance="a",status="200"}': "0+1000x20",
    'freshet_http_seconds_count{instance="a",status="503"}': "0+5x20",
}
FIRE = {
    "FreshetLagging": {"fold": "user", "partition": "3"},
    "FreshetProcessSilent": {"process": "items"},
    "FreshetDeadLetters": {},
}
SILENT = ("FreshetDown", "FreshetErrors", "FreshetLearnerBehind")


def test_alerts_fire_once_where_they_should_and_else_are_silent(tmp_path: Path) -> None:
    severities = {rule["alert"]: rule["labels"] for rule in rules()}
    wanted = {name: [{"exp_labels": {**labels, **severities[name]}}] for name, labels in FIRE.items()}
    wanted |= {name: [] for name in SILENT}
    told = tmp_path / "alerts.yml"  # without their texts: those hold figures
    told.write_text(json.dumps({"groups": [{"name": "freshet", "rules": [
        {key: value for key, value in rule.items() if key != "annotations"} for rule in rules()
    ]}]}))  # fmt: skip
    body = {
        "rule_files": [str(told)], "evaluation_interval": "1m",
        "tests": [{
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in PLAYED.items()],
            "alert_rule_test": [
                {"eval_time": "9m", "alertname": name, "exp_alerts": alerts} for name, alerts in wanted.items()
            ],
        }],
    }  # fmt: skip
    (tmp_path / "test.yml").write_text(json.dumps(body))
    promtool("test", "rules", str(tmp_path / "test.yml"))
