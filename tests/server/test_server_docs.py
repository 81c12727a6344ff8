"""The guide to the server runs as it stands there, against a real server, and names all that there is.

``PYTHONPATH=tests/support python tests/server/test_server_docs.py`` writes the tables of settings anew.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_samples import Served, serving
from documented_commands import options_of
from near_engine import NearExecutor
from paths import ROOT
from small_models import make_smaller

from pusa.codes import ERRORS
from pusa.fields import FieldSpec, field_specs
from pusa.server.settings import ServerSettings

PAGE = ROOT / "docs" / "server.md"
ADDRESS = "127.0.0.1:7860"
GROUPS = {
    "host": "Network and access",
    "data": "Storage",
    "model": "Model and workers",
    "queue_limit": "Limits for clients",
    "metadata": "Marks of results",
    "prompt_url": "Help with prompts",
    "log_level": "Logging",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: two pictures and a short video."""
    import shutil

    import numpy as np

    from pusa.demo import PICTURES
    from pusa.media import VideoWriter

    folder = tmp_path_factory.mktemp("user")
    for name in ("start", "end"):
        shutil.copy(PICTURES / f"whale-{name}.png", folder / f"{name}.png")
    with VideoWriter(folder / "clip.mp4", width=96, height=64) as writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (24, 64, 96, 3), np.uint8))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server with the real engine and the real child that looks at uploads, on a free port."""
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        make_smaller(patch, "tiny", width=48, height=32)
        with serving(folder, near_prober=False, executor=NearExecutor("tiny")) as served:
            yield served


@pytest.mark.slow
def test_the_shell_of_the_page_runs(server: Served, folder: Path) -> None:
    script = "set -euo pipefail\n" + "".join(blocks("bash")).replace(ADDRESS, server.url.removeprefix("http://"))
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "event: end" in done.stdout
    assert '"completed"' in done.stdout
    assert '"cancelled"' in done.stdout
    assert (folder / "rabbit.mp4").read_bytes()[4:8] == b"ftyp"
    assert (folder / "rabbit.webp").read_bytes()[8:12] == b"WEBP"


@pytest.mark.slow
def test_the_python_of_the_page_runs(
    server: Served, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("openai")
    monkeypatch.chdir(folder)
    code = "\n".join(blocks("python")).replace(ADDRESS, server.url.removeprefix("http://"))
    exec(compile(code, PAGE.name, "exec"), {})
    assert "num_inference_steps" in capsys.readouterr().out.splitlines()[-1]
    assert (folder / "balloon.mp4").read_bytes()[4:8] == b"ftyp"


# ---- tables ----------------------------------------------------------------------------------------------------------


def shown(field: FieldSpec) -> str:
    """The default in words."""
    if field.unset is not None:
        return field.unset
    if field.type == "boolean":
        return "yes" if field.default else "no"
    if field.unit == "bytes" and field.default % 2**20 == 0:
        return f"{field.default} ({field.default // 2**20} MiB)"
    if isinstance(field.default, float):
        return f"{field.default:g}"
    return str(field.default) if field.default not in (None, "", []) else "none"


def settings_tables() -> str:
    lines: list[str] = []
    for field in field_specs(ServerSettings):
        if field.name in GROUPS:
            lines += ["", f"### {GROUPS[field.name]}", "", "| setting | what | default | range |", "|---|---|---|---|"]
        limits = ", ".join(field.choices) or f"{field.range} {field.unit or ''}".strip()
        lines.append(f"| `{field.name}` | {field.help} | {shown(field)} | {limits} |")
    return "\n".join(lines).strip() + "\n"


START, END = (
    "<!-- settings: written by `PYTHONPATH=tests/support python tests/server/test_server_docs.py` -->\n",
    "<!-- end of settings -->",
)


def test_the_tables_of_settings_are_those_of_the_program() -> None:
    written = PAGE.read_text().partition(START)[2].partition(END)[0]
    assert written == settings_tables(), "run `PYTHONPATH=tests/support python tests/server/test_server_docs.py`"


def test_every_field_of_a_request_is_named() -> None:
    from pusa.server.http.schemas import CreateVideo, KeyframeInput

    table = PAGE.read_text().partition("## Fields of a request")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([a-z0-9_]+)`", table))
    assert set(CreateVideo.model_fields) - named == set()
    assert set(KeyframeInput.model_fields) - named == set()
    assert named - set(CreateVideo.model_fields) - set(KeyframeInput.model_fields) <= {
        *("generate", "extend", "transition", "loop"),
    }


def test_every_route_is_named_and_every_named_one_is_there(tmp_path: Path) -> None:
    from pusa.server.app import create_app

    app = create_app(ServerSettings(data=str(tmp_path), model="tiny", studio=False))
    there = {f"{method.upper()} {path}" for path, item in app.openapi()["paths"].items() for method in item}
    there |= {"GET /openapi.json", "GET /docs"}
    there = {re.sub(r"\{[a-z_]+(:path)?\}", "{id}", route) for route in there if "characters" not in route}
    table = PAGE.read_text().partition("## Routes")[2].partition("\n## ")[0]
    assert set(re.findall(r"`((?:GET|POST|DELETE) /[^`]*)`", table)) == there


def test_every_error_code_is_one_of_the_list() -> None:
    section = PAGE.read_text().partition("## Errors")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([a-z]+_[a-z_]+)`", section)) - set(ServerSettings.model_fields)
    assert len(named) > 40
    assert named <= set(ERRORS)


def test_every_metric_is_named() -> None:
    source = (ROOT / "src/pusa/server/metrics.py").read_text()
    there = {
        f"{name}_total" if kind == "Counter" else name for kind, name in re.findall(r'(\w*)\(?\s*"(pusa:\w+)"', source)
    }
    named = set(re.findall(r"`(pusa:\w+)`", PAGE.read_text()))
    assert {name.removesuffix("_total") for name in named} == {name.removesuffix("_total") for name in there}


# ---- the other pages -------------------------------------------------------------------------------------------------


def test_every_promise_names_tests_that_are_there() -> None:
    text = (ROOT / "docs" / "crash_safety.md").read_text()
    promises = re.split(r"^- \*\*", text.partition("## The fault run")[0], flags=re.M)[1:]
    assert len(promises) > 10
    for promise in promises:
        named = re.findall(r"^  - `(test_\w+\.py)::(test_\w+)`$", promise, re.M)
        assert named, promise
        for file, test in named:
            [path] = (ROOT / "tests").rglob(file)
            assert f"\ndef {test}(" in path.read_text(), f"{promise}: {file} has no {test}"


@pytest.mark.parametrize("page", ["server.md", "deployment.md"])
def test_settings_and_options_of_a_page_are_there(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    for variable in re.findall(r"\bPUSA_([A-Z_]+)\b", text):
        assert variable.lower() in ServerSettings.model_fields or variable in ("CONFIG", "API_KEY"), variable
    there = {name: options_of(name) for name in ("serve", "worker")}
    for name, rest in re.findall(r"\bpusa (serve|worker)((?: +--?[a-z-]+(?: [^-\s`]\S*)?)*)", text):
        assert set(re.findall(r"--[a-z-]+", rest)) <= there[name]
    for name in re.findall(r"`(--[a-z-]+)[ `]", text):
        assert name in there["serve"] | there["worker"] or name == "--build-arg", name


if __name__ == "__main__":
    text = PAGE.read_text()
    before, _, rest = text.partition(START)
    PAGE.write_text(before + START + settings_tables() + END + rest.partition(END)[2])
