"""docker-compose.yml and the Dockerfile say what the settings and the stack say; a smoke test where Docker answers."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from infra.cli import app
from infra.settings import PREFIX, Settings
from infra.stack import PROCESSES, Stack
from infra.telemetry import READY_FILE

ROOT = Path(__file__).parent.parent
SETTINGS = {PREFIX + item.name.upper(): item for item in dataclasses.fields(Settings)}
# service -> the process of `freshet up` that it is; `topics` is what `up` does itself before it starts the others
SERVICES = {"kafka": "kafka", "redis": "redis", "worker": "users", "items": "items", "learner": "learner", "api": "api"}
OURS = ("topics", "worker", "items", "learner", "api")
WATCHING = ("prometheus", "grafana")


@cache
def compose() -> dict[str, Any]:
    text = (ROOT / "docker-compose.yml").read_text()
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def service(name: str) -> dict[str, Any]:
    found: dict[str, Any] = compose()["services"][name]
    return found


def test_the_services_are_the_processes_of_the_stack() -> None:
    assert set(compose()["services"]) == set(SERVICES) | {"topics"} | set(WATCHING)
    assert set(SERVICES.values()) == set(PROCESSES)


@pytest.mark.parametrize("name", OURS)
def test_every_environment_name_is_a_setting_with_a_good_value(name: str) -> None:
    environment: dict[str, str] = dict(service(name)["environment"])
    assert environment.pop(READY_FILE) == "/tmp/ready"
    plain = {}
    for key, value in environment.items():
        assert key in SETTINGS, f"{key} is no setting"
        default = re.fullmatch(r"\$\{(\w+):-(.*)\}", str(value))
        if default:
            assert default[1] == key
            own = SETTINGS[key].default
            told = json.dumps(own) if isinstance(own, tuple) else str(own)
            assert default[2] == told, f"{key}: compose has another default than the settings"
        plain[key] = default[2] if default else str(value)
    loaded = Settings.load(env=plain, running=False)
    assert loaded.kafka == service("kafka")["environment"]["KAFKA_ADVERTISED_LISTENERS"].removeprefix("PLAINTEXT://")
    assert loaded.redis == "redis://redis:6379/0"
    assert loaded.admin_key.startswith("${FRESHET_ADMIN_KEY:?")
    volumes = dict(volume.split(":") for volume in service(name)["volumes"])
    assert volumes["state"] == loaded.data


@pytest.mark.parametrize("name", OURS)
def test_what_must_be_the_same_everywhere_is_passed_on(name: str) -> None:
    given = ("codec", "max_users", "max_items", "retention_days", "cors", "keys", "partitions", "namespace")
    assert {PREFIX + setting.upper() for setting in given} <= set(service(name)["environment"])


def test_the_api_is_published_on_loopback_at_the_default_port() -> None:
    environment = service("api")["environment"]
    port = Settings.load(env={}, running=False).port
    assert environment["FRESHET_PORT"] == port
    assert environment["FRESHET_HOST"] == "0.0.0.0"  # inside the container; the key is required
    assert service("api")["ports"] == [f"${{FRESHET_PUBLISH:-127.0.0.1:{port}}}:{port}"]
    assert f":{port}/health/ready" in service("api")["healthcheck"]["test"][-1]
    published = {name: service(name)["ports"] for name in compose()["services"] if "ports" in service(name)}
    assert set(published) == {"api", *WATCHING}
    assert all(":-127.0.0.1:" in port for ports in published.values() for port in ports)


def test_volumes_are_declared_and_used() -> None:
    used = {volume.split(":")[0] for name in compose()["services"] for volume in service(name).get("volumes", [])}
    folders = {name for name in used if name.startswith("./")}
    assert used - folders == set(compose()["volumes"])
    assert all((ROOT / name).exists() for name in folders)
    assert service("kafka")["environment"]["KAFKA_LOG_DIRS"] == service("kafka")["volumes"][0].split(":")[1]


@pytest.mark.parametrize("name", sorted({*SERVICES, "topics", *WATCHING}))
def test_pinned_healthy_and_not_root(name: str) -> None:
    own = service(name)
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*", own["image"]), own["image"]
    assert int(own["user"].split(":")[0]) > 0
    assert ("test" in own["healthcheck"]) or name == "topics"
    if name in OURS and name != "topics":
        assert own["depends_on"]["topics"]["condition"] == "service_completed_successfully"


def test_kafka_is_the_version_of_the_local_stack() -> None:
    from infra.kafka import VERSION

    assert service("kafka")["image"] == f"apache/kafka:{VERSION}"
    assert service("kafka")["environment"]["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"


@pytest.mark.parametrize("name", OURS)
def test_every_command_is_a_verb_with_these_options(name: str) -> None:
    verb, *options = service(name)["command"]
    answer = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert answer.exit_code == 0, answer.output
    for option in options:
        assert not option.startswith("--") or option in answer.output


def test_only_the_worker_scales() -> None:
    assert "auto" in service("worker")["command"]
    assert all("container_name" not in service(name) for name in compose()["services"])


def test_the_image_is_pinned_not_root_and_whole() -> None:
    text = (ROOT / "infra" / "Dockerfile").read_text()
    images = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert images
    assert all(re.fullmatch(r"python:3\.1[123]\.\d+-slim-\w+", image) for image in images)
    last = text.rsplit("FROM ", 1)[1]
    user = re.search(r"^USER (\d+):\d+$", last, re.MULTILINE)
    assert user
    assert {service(name)["user"].split(":")[0] for name in OURS} == {user[1]}
    for package in ("models", "streaming", "serving", "infra"):
        assert f"COPY {package} {package}" in text
    assert 'ENTRYPOINT ["freshet"]' in last
    assert f"EXPOSE {Settings.load(env={}, running=False).port}" in last


def _docker(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    if shutil.which("docker") is None:
        return subprocess.CompletedProcess(arguments, 127, "", "no docker client on PATH")
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        ["docker", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, env=environment
    )  # fmt: skip


def test_docker_compose_config_accepts_it() -> None:
    version = _docker("compose", "version")
    if version.returncode:
        pytest.skip(f"no docker compose client: {(version.stderr or version.stdout).strip()[:100]}")
    given = _docker("compose", "config", "--format", "json", env={"FRESHET_ADMIN_KEY": "k"})
    assert given.returncode == 0, given.stderr
    services = json.loads(given.stdout)["services"]
    assert services["api"]["environment"]["FRESHET_ADMIN_KEY"] == "k"
    missing = _docker("compose", "config", "--quiet", env={"FRESHET_ADMIN_KEY": ""})
    assert missing.returncode != 0
    assert "FRESHET_ADMIN_KEY" in missing.stderr


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_same_path_on_containers(tmp_path: Path, namespace: str) -> None:
    """Kafka and Redis in containers, our processes beside them: an event through HTTP is applied."""
    engine = _docker("version", "--format", "{{.Server.Version}}")
    if engine.returncode:
        pytest.skip(f"no Docker engine answers: {(engine.stderr or engine.stdout).strip()[:100]}")
    from testcontainers.kafka import KafkaContainer
    from testcontainers.redis import RedisContainer

    kafka = KafkaContainer("confluentinc/cp-kafka:7.6.0").with_kraft()
    with kafka, RedisContainer(service("redis")["image"]) as redis:
        address = f"redis://{redis.get_container_host_ip()}:{redis.get_exposed_port(6379)}/0"
        ours = ("users", "items", "learner", "api")
        with Stack(
            data=tmp_path,
            processes=ours,
            kafka=kafka.get_bootstrap_server(),
            redis=address,
            namespace=namespace,
            port=0,
        ) as stack:
            event = {"type": "click", "user_id": "ann", "item_id": "film-1", "ts": time.time(), "event_id": "e1"}
            request = urllib.request.Request(
                stack.api + "/v1/events", json.dumps([event]).encode(), {"Content-Type": "application/json"}
            )
            token = json.loads(urllib.request.urlopen(request, timeout=10).read())["token"]
            url = f"{stack.api}/v1/recommendations/ann?after={token}&wait_ms=2000"
            assert json.loads(urllib.request.urlopen(url, timeout=10).read())["applied"] is True
