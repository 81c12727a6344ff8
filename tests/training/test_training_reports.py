"""Record the metrics of a run in a file and in a tracker if there is one."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from training_samples import make_config

from pusa.training.reports import Reporter, metrics, read_metrics

ENTRY = {"loss": 0.5, "skipped": 1, "error_by_level": {"0.9": 0.25}, "gradient_norm": float("nan")}


class Recorder:
    """Stands in for a tracker of accelerate."""

    made: list["Recorder"]

    def __init__(self, *words: Any, **options: Any) -> None:
        self.words, self.options = words, options
        self.logged, self.pictures, self.calls = [], [], []
        self.made.append(self)

    def start(self) -> None:
        self.calls.append("start")

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def log_images(self, values: dict[str, Any], step: int, **options: Any) -> None:
        self.pictures.append((step, {name: pictures.shape for name, pictures in values.items()}, options))

    def finish(self) -> None:
        self.calls.append("finish")


class TensorBoard(Recorder):
    name = "tensorboard"


class WeightsAndBiases(Recorder):
    name = "wandb"


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Trackers are installed, and remembered when they are made."""
    Recorder.made = []
    monkeypatch.setattr(metrics, "find_spec", lambda _: True)
    monkeypatch.setattr(metrics, "TensorBoardTracker", TensorBoard)
    monkeypatch.setattr(metrics, "WandBTracker", WeightsAndBiases)
    return Recorder.made


@pytest.mark.parametrize("kind", ["auto", "tensorboard", "wandb"])
def test_a_tracker_gets_every_number_and_picture_and_is_closed(
    kind: str, tmp_path: Path, trackers: list[Recorder]
) -> None:
    config = make_config(None, tmp_path, report={"tracker": kind})
    reporter = Reporter(tmp_path, config, first_step=0)
    reporter.log(3, ENTRY)
    Image.new("L", (48, 32)).save(tmp_path / "sheet.png")
    reporter.show(3, tmp_path / "sheet.png")
    reporter.close()
    (tracker,) = trackers
    ((step, values),) = tracker.logged
    assert step == 3
    assert {name: value for name, value in values.items() if value == value} == {
        "loss": 0.5,
        "skipped": 1,
        "error_by_level/0.9": 0.25,
    }
    assert tracker.calls == ["start", "finish"]
    layout = {} if kind == "wandb" else {"dataformats": "NHWC"}
    assert tracker.pictures == [(3, {"validation": (1, 32, 48, 3)}, layout)]
    if kind == "wandb":
        assert tracker.options["config"]["method"]["rank"] == 4
    else:
        assert tracker.options == {"purge_step": 1}  # what comes later on the disk is from before a kill


def test_without_a_tracker_installed_there_is_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda _: None)
    reporter = Reporter(tmp_path, make_config(None, tmp_path, report={"tracker": "auto"}), first_step=0)
    reporter.log(1, ENTRY)
    reporter.close()
    assert read_metrics(tmp_path) == [{"step": 1, **ENTRY, "gradient_norm": None}]
    for kind in ("tensorboard", "wandb"):
        with pytest.raises(ValueError) as refused:
            Reporter(tmp_path, make_config(None, tmp_path, report={"tracker": kind}), first_step=0)
        assert str(refused.value) == (
            f"report.tracker={kind} is not installed: pip install {kind}, or report.tracker=none"
        )


def test_entries_from_after_the_checkpoint_are_taken_out(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))
    Reporter(tmp_path, make_config(None, tmp_path), first_step=2).close()
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2]
