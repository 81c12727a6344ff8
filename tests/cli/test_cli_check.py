"""`pusa check` says what a machine has, in words and as JSON, and its exit code whether pusa works there."""

import json

import pytest
import torch
from click.testing import CliRunner

from pusa.cli import main


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["check", "--no-ranks", *words])
    return result.exit_code, result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_so_plainly() -> None:
    code, output = run()
    assert code == 0
    assert "everything runs on the CPU" in output
    assert "there is no GPU to copy to" in output
    assert "leave --gpus out" in output
    assert "everything works; there is no GPU" in output


def test_programs_read_one_line_of_json() -> None:
    code, output = run("--json")
    report = json.loads(output.splitlines()[-1])
    assert report["ok"] == (code == 0)
    names = [finding["name"] for finding in report["findings"]]
    assert names == [
        *("software", "GPUs", "links", "memory", "disk", "attention", "quantisation", "compile", "speed"),
    ]
    speed = report["findings"][-1]["figures"]
    assert speed["float32_tflop_per_s"] > 0


def test_a_full_disk_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    code, output = run()
    assert code == 1
    assert "FAILED: 0 MB free for models" in output
    assert "set HF_HOME to a larger disk" in output
