"""`pusa eval vbench setup` makes the scorer's environment, and tells what in it or of its weights is missing."""

import json
import sys
import venv
from pathlib import Path

import pytest
from command_line import pusa

from pusa.evaluation.vbench.environment import (
    PYTHONS,
    REQUIREMENTS,
    WEIGHTS,
    check_environment,
    describe_missing,
    make_environment,
    missing_weights,
    python_of,
)
from pusa.evaluation.vbench.totals import DIMENSIONS


def make_checkout(folder: Path) -> Path:
    """Write a checkout of modules that import nothing, but for one."""
    for package, names in (
        ("vbench2_beta_i2v", ("i2v_subject", "i2v_background", "camera_motion")),
        ("vbench", [name for name, dimension in DIMENSIONS.items() if dimension.group == "quality"]),
    ):
        (folder / package).mkdir(parents=True)
        for name in ("__init__", *names):
            text = "import no_such_package" if name == "dynamic_degree" else ""
            (folder / package / f"{name}.py").write_text(text)
    return folder


def make_program(path: Path, text: str) -> Path:
    """Write a shell program that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def fill(folder: Path) -> None:
    """Put a file in the place of all weights."""
    for weights in WEIGHTS:
        path = folder / weights.path
        if not path.suffix:  # a folder
            path.mkdir(parents=True, exist_ok=True)
            path /= "hubconf.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("weights")


def test_missing_weights_are_named_with_their_dimensions_and_source(tmp_path: Path) -> None:
    assert {name for weights in WEIGHTS for name in weights.dimensions} == set(DIMENSIONS)
    assert missing_weights(tmp_path) == list(WEIGHTS)
    fill(tmp_path)
    assert missing_weights(tmp_path) == []

    (tmp_path / "raft_model" / "models" / "raft-things.pth").write_text("")  # a download that broke off
    missing = missing_weights(tmp_path)
    assert missing == missing_weights(tmp_path, ["dynamic_degree"])
    assert missing_weights(tmp_path, ["i2v_subject", "camera_motion"]) == []
    lines = list(describe_missing(tmp_path, missing))
    assert lines[0] == f"{tmp_path}/raft_model/models/raft-things.pth is missing, for dynamic_degree"
    assert lines[1].startswith(f"  unpack in {tmp_path}/raft_model: https://")


def test_each_dimension_is_imported_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_package.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of pusa's Python, not of the scorer's
    found = check_environment(Path(sys.prefix), make_checkout(tmp_path / "VBench"))
    assert found.errors["dynamic_degree"] == "ModuleNotFoundError: No module named 'no_such_package'"
    assert found.ready == [name for name in DIMENSIONS if name != "dynamic_degree"]
    assert found.versions["numpy"] is not None
    assert found.versions["decord"] is None
    with pytest.raises(FileNotFoundError, match="give a checkout of https"):
        check_environment(Path(sys.prefix), tmp_path)
    make_program(tmp_path / "environment" / "bin" / "python", "echo hello")
    with pytest.raises(RuntimeError, match="cannot import the suite: it said nothing"):
        check_environment(tmp_path / "environment", tmp_path / "VBench")


def test_an_environment_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, packages = tmp_path / "environment", tmp_path / "packages.txt"
    packages.touch()
    monkeypatch.setenv("PATH", "")  # no uv
    python = make_program(
        tmp_path / "python",
        'if [ "$1" = -c ]; then echo 3.11; else /bin/mkdir "$3"; echo > "$3/pyvenv.cfg"; echo no pip >&2; exit 1; fi',
    )
    with pytest.raises(RuntimeError, match="could not be made: no pip"):
        make_environment(environment, python=str(python), requirements=packages)
    assert not environment.exists()


@pytest.mark.skipif(f"3.{sys.version_info.minor}" not in PYTHONS, reason="the scorer needs Python 3.10 or 3.11")
def test_setup_installs_once_and_goes_on_after_a_failure(tmp_path: Path) -> None:
    environment, packages = tmp_path / "environment", tmp_path / "packages.txt"
    venv.create(environment, symlinks=True, system_site_packages=True)  # begun; a pip of its own would take 10 s
    packages.write_text("no-such-package @ file:///no/such/file.whl\n")
    with pytest.raises(RuntimeError, match="run the command again to go on"):
        make_environment(environment, requirements=packages)
    begun = (environment / "pyvenv.cfg").stat().st_mtime_ns

    packages.write_text("# none\n")
    python = make_environment(environment, requirements=packages)
    assert python == python_of(environment)
    assert python.is_relative_to(environment)
    assert (environment / "pyvenv.cfg").stat().st_mtime_ns == begun
    said: list[str] = []
    make_environment(environment, requirements=packages, say=said.append)
    assert said == [f"{environment} is installed"]


def test_setup_refuses_what_it_cannot_use_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    with pytest.raises(ValueError, match="is no environment: give a new folder"):
        make_environment(tmp_path / "mine")
    with pytest.raises(ValueError, match="is no Python: the scorer needs 3"):
        make_environment(tmp_path / "new", python=str(tmp_path / "python"), requirements=tmp_path / "mine/thesis.txt")
    with pytest.raises(ValueError, match="is pusa's own environment"):
        make_environment(Path(sys.prefix))
    refused = pusa("eval", "vbench", "setup", tmp_path / "new", "--suite", tmp_path / "mine")
    assert refused.exit_code == 2
    assert "give a checkout of https://github.com/Vchitect/VBench" in refused.stderr
    assert not (tmp_path / "new").exists()


def test_the_environment_is_pinned() -> None:
    lines = [line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines()]
    packages = dict(line.split("==") for line in lines if line)  # fails for one without a version
    assert packages["numpy"].startswith("1.")
    assert {"torch", "torchvision", "timm", "openai-clip", "pyiqa", "dreamsim", "decord"} <= packages.keys()


def test_scoring_names_the_weights_that_are_missing(tmp_path: Path) -> None:
    from vbench_runs import made_run
    from vbench_samples import make_suite

    suite = make_suite(tmp_path / "VBench")
    run = made_run(tmp_path / "run", suite, per_prompt=1)
    (suite / "vbench").mkdir()
    for package in ("vbench", "vbench2_beta_i2v"):
        (suite / package / "__init__.py").touch()
    options = ("--environment", sys.prefix, "--suite", suite, "--weights", tmp_path / "weights")
    refused = pusa("eval", "vbench", "score", run.folder, *options, "--dimensions", "camera_motion")
    assert refused.exit_code == 2
    assert "facebookresearch_co-tracker_main is missing, for camera_motion; git clone" in refused.stderr
    assert "and 1 more: pusa eval vbench setup lists them" in refused.stderr
    assert not (run.folder / "scores").exists()
    assert json.loads((run.folder / "run.json").read_text())["suite"] == "vbench"
