"""Test that the files in deploy/ fit the program: its commands, settings, modules, ports and paths."""

import configparser
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from documented_commands import options_of
from paths import ROOT

from pusa.server import connections
from pusa.server.jobs.queue import JobQueue
from pusa.server.settings import ServerSettings
from pusa.server.settings_sources import load_settings
from pusa.server.worker.worker import worker_name

DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))


def known_setting(variable: str) -> bool:
    return variable.removeprefix("PUSA_").lower() in ServerSettings.model_fields


TEXT = "\n".join(file.read_text() for file in sorted(DEPLOY.iterdir()))


def test_every_variable_is_a_setting() -> None:
    named = set(re.findall(r"\bPUSA_[A-Z_]+\b", TEXT))
    assert "PUSA_DATABASE" in named
    assert {variable for variable in named if not known_setting(variable)} == set()


def test_every_option_and_command_of_the_command_line_is_one() -> None:
    commands = re.findall(r"\bpusa (serve|worker)\b((?:[ \n#]*--[a-z-]+ [^\s,]+)*)", TEXT)
    used = {(command, option) for command, rest in commands for option in re.findall(r"--[a-z-]+", rest)}
    assert used
    assert {(command, option) for command, option in used if option not in options_of(command)} == set()


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_compose_has_an_api_a_database_and_two_workers_that_share_files(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"database", "api", "worker-0", "worker-1"}
    ours = [services[name] for name in ("api", "worker-0", "worker-1")]
    assert [service["command"] for service in ours] == [["serve", "--host", "0.0.0.0"], ["worker"], ["worker"]]
    assert "--host" in options_of("serve")
    assert "--data" in options_of("worker")
    for service in ours:
        assert "files:/files" in service["volumes"]
        assert service["depends_on"] == {"database": {"condition": "service_healthy"}}
        assert service["read_only"]
    assert services["api"]["environment"]["PUSA_WORKERS"] == "0"
    assert all("healthcheck" in service for service in services.values())


def test_compose_names_only_what_it_defines(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert set(service["networks"]) <= set(compose["networks"])
        assert {volume.split(":")[0] for volume in service.get("volumes", [])} <= set(compose["volumes"])
        assert set(service.get("secrets", [])) <= set(compose["secrets"])
        if build := service.get("build"):
            assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()


def test_only_this_machine_reaches_the_port_and_only_containers_reach_the_database(compose: dict[str, Any]) -> None:
    assert compose["services"]["api"]["ports"] == ["127.0.0.1:7860:7860"]
    assert ServerSettings.model_fields["port"].default == 7860
    assert compose["services"]["database"]["networks"] == ["inside"]
    assert compose["networks"]["inside"]["internal"] is True


@pytest.mark.parametrize("name", ["api", "worker-0"])
def test_the_settings_of_a_container_are_accepted(name: str, compose: dict[str, Any], tmp_path: Path) -> None:
    image = dict(re.findall(r"\b(PUSA_[A-Z_]+)=(\S+)", (DEPLOY / "Dockerfile").read_text().split("ENV PATH")[1]))
    variables = {**image, **compose["services"][name]["environment"]}
    if "PUSA_API_KEYS_FILE" in variables:
        (tmp_path / "keys.txt").write_text("k" * 43)
        variables["PUSA_API_KEYS_FILE"] = str(tmp_path / "keys.txt")
    host = compose["services"][name]["command"][2:]
    settings = load_settings(environ=variables, options={"host": host[0] if host else None})
    assert settings.database_url.startswith("postgresql://pusa:")
    assert settings.files_url == "/files"
    assert (settings.workers, len(settings.api_keys)) == ((0, 1) if name == "api" else (1, 0))


def test_gpu_workers_are_the_workers_of_compose(compose: dict[str, Any]) -> None:
    gpu = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())
    devices = []
    for name, service in gpu["services"].items():
        assert name in compose["services"]
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        devices += device["device_ids"]
    assert devices == ["0", "1"]


def test_the_dockerfile_copies_what_is_there_and_lets_nobody_be_root() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    sources = [name for line in re.findall(r"^COPY (?!--from)(.*)", text, re.M) for name in line.split()[:-1]]
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    for name in sources:
        assert (DEPLOY.parent / name).exists(), name
        assert f"!{name}" in allowed
    last = text[text.rindex("\nFROM ") :]
    assert last.index("USER pusa") < last.index("ENTRYPOINT")
    extras = re.findall(r"^ARG EXTRAS=(.*)", text, re.M)[0].split(",")
    pyproject = (DEPLOY.parent / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in pyproject for extra in extras)
    requirement = re.findall(r'"(torch[^"]*)"', text)
    assert requirement == re.findall(r'"(torch[^"]*)"', pyproject)[:1]


def test_the_image_serves_nobody_without_a_key() -> None:
    (command,) = re.findall(r"^CMD (.*)$", (DEPLOY / "Dockerfile").read_text(), re.M)[-1:]
    assert json.loads(command) == ["serve", "--host", "0.0.0.0"]
    with pytest.raises(ValueError) as refused:
        load_settings(environ={}, options={"host": "0.0.0.0"})
    assert "there is no API key" in str(refused.value)


def test_modules_that_are_run_are_there(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        test = service["healthcheck"]["test"]
        if "-m" in test:
            assert importlib.util.find_spec(test[test.index("-m") + 1]) is not None


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_runs_a_command_of_ours_and_is_hardened(unit: Path) -> None:
    parser = configparser.RawConfigParser(strict=False, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(unit)
    service = parser["Service"]
    assert re.fullmatch(r"/opt/pusa/bin/pusa (serve|worker)", service["ExecStart"])
    assert service["User"] == "pusa"
    assert service["ProtectSystem"] == "strict"
    assert int(service["LimitNOFILE"]) == connections._MAX_FILES
    assert {"MemoryMax", "CPUWeight", "TasksMax", "LimitCORE"} <= set(service)


def test_every_container_has_limits_of_memory_cpus_processes_and_files(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert {"mem_limit", "cpus", "pids_limit", "ulimits"} <= set(service)


def test_every_image_can_be_pinned_by_its_digest(compose: dict[str, Any]) -> None:
    guide = (ROOT / "docs/deployment.md").read_text()
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert re.findall(r"^FROM (\S+)", dockerfile, re.M) == ["${PYTHON_IMAGE}"] * 2
    assert compose["services"]["database"]["image"] == "${POSTGRES_IMAGE:-postgres:17}"
    for name in ("PYTHON_IMAGE", "POSTGRES_IMAGE"):
        assert f"echo {name}=" in guide


def test_a_container_may_open_as_many_files_as_the_server_takes(compose: dict[str, Any]) -> None:
    for name in ("api", "worker-0", "worker-1"):
        assert compose["services"][name]["ulimits"] == {"nofile": connections._MAX_FILES}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_finds_nothing_wrong_with_a_unit(unit: Path, tmp_path: Path) -> None:
    here = tmp_path / unit.name
    here.write_text(unit.read_text().replace("/opt/pusa/bin/pusa", sys.executable))
    found = subprocess.run(["systemd-analyze", "verify", str(here)], capture_output=True, text=True, timeout=60)
    assert unit.stem not in found.stderr, found.stderr  # of other units of this machine it may complain
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(here)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert rated.returncode == 0, rated.stdout  # exposure of at most 2.0 on systemd's scale of 10


def test_a_worker_is_healthy_while_its_record_is_recent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from pusa.server.worker import healthcheck as alive

    monkeypatch.setenv("PUSA_DATA", str(tmp_path))
    monkeypatch.setenv("PUSA_CONFIG", "")
    queue = JobQueue(load_settings().database_url)
    queue.record_worker("elsewhere/0/1-0/0", {"stage": "ready"})
    assert alive.main() == 1
    queue.record_worker(worker_name(), {"stage": "loading"})
    assert alive.main() == 0
    assert "loading" in capsys.readouterr().out
    monkeypatch.setattr(alive, "SEEN_WITHIN_SECONDS", -1.0)
    assert alive.main() == 1
    queue.close()
