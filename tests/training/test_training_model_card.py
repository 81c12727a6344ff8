"""Write a run's model card from the run's own files; its code runs, its links lead to files."""

import json
import math
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from components import make_text_encoder, make_tokenizer, make_vae
from diffusers import WanPipeline
from PIL import Image
from training_samples import make_config, write_dataset

from pusa.cli.train import card as command
from pusa.data.dataset import LatentDataset
from pusa.models.tiny import components
from pusa.training.reports.charts import Panel, Series, panels_of, points_of, smooth, write_chart
from pusa.training.reports.model_card import write_card
from pusa.training.reports.validation import ValidationSettings, Validator
from pusa.training.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with held-out losses and validation videos."""
    folder = tmp_path_factory.mktemp("somewhere")
    data = LatentDataset(write_dataset(folder / "clips"))
    config = make_config(
        folder / "clips",
        folder / "run",
        name="practice",
        steps=3,
        objective={"weighting": "none"},
        report={"held_out_every": 2, "held_out_draws": 1, "validate_every": 3, "validate_clips": 1, "tracker": "none"},
    )
    settings = ValidationSettings(tasks=("image-to-video", "extension"), steps=1, columns=3)
    return train(config, dataset=data, on_validate=Validator(config, data, settings=settings))


@pytest.fixture(scope="module")
def card(run: Path) -> str:
    return write_card(run).read_text()


@pytest.fixture(scope="module")
def card_for_wan(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """That of the same run, had it been one of Wan 14B with a budget of latent frames."""
    folder = tmp_path_factory.mktemp("runs") / "practice"
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["source"] = "wan2.1-14b"
    config |= {"batch_size": None, "batch_frames": 6}
    (folder / "config.json").write_text(json.dumps(config))
    return write_card(folder).read_text()


def test_it_says_what_was_trained_on_what_and_for_how_long(run: Path, card: str, card_for_wan: str) -> None:
    facts = json.loads((run / "run.json").read_text())
    assert "# practice\n" in card
    assert "A LoRA of rank 4" in card
    assert f"`{facts['data_hash']}`" in card
    assert f"{facts['clips']} clips (48x32 x 9 frames" in card
    assert "3 steps, 6 clips" in card
    assert "| clips per step | 2 |" in card
    assert "| clips per step | as many as have 6 latent frames on each process, 2 in the mean |" in card_for_wan
    assert "| times of frames | each its own, from the grid with shift 5 |" in card
    assert "too few for anything but trying the machinery" in card


def front_matter(card: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in card.split("---\n")[1].splitlines())


def test_its_front_matter_is_what_a_hub_reads(card: str, card_for_wan: str) -> None:
    fields = front_matter(card_for_wan)
    assert fields["base_model"] == "Wan-AI/Wan2.1-T2V-14B-Diffusers"
    assert fields["base_model_relation"] == "adapter"
    assert "pusa" in fields["tags"]
    assert front_matter(card).keys() == fields.keys() - {"base_model", "base_model_relation"}  # tiny is on no Hub


def test_its_links_lead_to_files_of_the_run(run: Path, card: str) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)]+)\)", card)
    assert {"curves.png", "validation/step-00000003.jpg", "validation/step-00000003/1-extension.mp4"} <= set(targets)
    for target in targets:
        assert (run / target).is_file(), target


def test_its_python_runs_in_the_folder_of_the_run(run: Path, card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert np.asarray(names["video"]).shape[0] == 1


def test_its_adapter_loads_in_plain_diffusers(run: Path, card: str, card_for_wan: str) -> None:
    assert 'WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-14B-Diffusers"' in card_for_wan
    assert 'pipe.load_lora_weights("adapter.safetensors", adapter_name="pusa")' in card_for_wan
    assert "there is nothing to load in diffusers" in card
    parts = components() | {"vae": make_vae(), "text_encoder": make_text_encoder(), "tokenizer": make_tokenizer()}
    pipe = WanPipeline(**parts)
    pipe.load_lora_weights(str(run / "adapter.safetensors"), adapter_name="pusa")
    pipe.set_adapters("pusa", 1.4)
    assert pipe.get_active_adapters() == ["pusa"]


def test_no_folder_of_the_machine_is_in_it(run: Path, card: str) -> None:
    assert str(run.parent) not in card
    assert str(Path.home()) not in card


def test_writing_it_again_changes_nothing(run: Path, card: str) -> None:
    assert write_card(run).read_text() == card
    assert not list(run.glob("*.part"))


def test_the_command_names_the_file_it_wrote(run: Path) -> None:
    result = CliRunner().invoke(command, [str(run)])
    assert result.output == f"{run / 'README.md'}\n"


def test_an_unfinished_run_is_called_so(run: Path, tmp_path: Path) -> None:
    for name in ("config.json", "run.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    card = write_card(tmp_path).read_text()
    assert "not written yet: the run is not finished" in card
    assert "## Samples" not in card


def test_a_folder_without_a_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no configuration .*: give a \.toml file"):
        write_card(tmp_path)
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError) as error:
        write_card(tmp_path)
    assert str(error.value).endswith("has no run.json: the run has not begun, or this is no run's folder")


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_smoothing_keeps_a_straight_line_and_calms_noise() -> None:
    line = [(float(x), 3.0 * x) for x in range(100)]
    assert smooth(line)[50] == pytest.approx((50, 150))
    noise = np.random.default_rng(0).normal(size=400)
    calm = [y for _, y in smooth(list(enumerate(noise.tolist())))]
    assert np.std(calm) < 0.3 * np.std(noise)


def drawn(path: Path, *panels: Panel) -> Image.Image:
    return Image.open(write_chart(panels, path / "chart.png")).convert("RGB")


def blue(picture: Image.Image) -> np.ndarray:
    """Find the pixels of the first curve: (rows, columns)."""
    return np.argwhere(abs(np.asarray(picture).astype(int) - np.array([66, 110, 180])).sum(-1) < 60)


def test_a_falling_curve_falls_on_the_picture(tmp_path: Path) -> None:
    picture = drawn(tmp_path, Panel("loss", "step", [Series("", [(step, 1 / (1 + step)) for step in range(50)])]))
    points = blue(picture)
    points = points[points[:, 0] > 60]  # below the legend
    left, right = points[points[:, 1] < 200], points[points[:, 1] > 400]
    assert left[:, 0].min() < right[:, 0].min() - 100


def test_what_is_not_finite_or_not_there_is_left_out(tmp_path: Path) -> None:
    metrics = [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": None},
        {"step": 2, "held_out_loss": 0.5, "held_out_error_by_level": {"0.0": 0.1, "0.9": None}},
    ]
    loss, levels = panels_of(metrics)
    assert [list(series.points) for series in loss.series] == [[(1.0, 1.0)], [(2.0, 0.5)]]
    assert [list(series.points) for series in levels.series] == [[(0.05, 0.1)]]
    assert levels.x_range == (0, 1)
    assert drawn(tmp_path, loss, levels).size == (1120, 320)
    assert drawn(tmp_path, Panel("", "", [Series("", [(0.0, math.nan)])])).size == (560, 320)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="at least one panel"):
        write_chart([], tmp_path / "chart.png")


def test_a_step_that_a_resume_repeated_counts_once() -> None:
    entries = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert points_of(entries, "loss") == [(1.0, 3.0), (2.0, 1.0)]


def test_a_chart_as_svg_says_what_it_shows_and_has_a_mark_for_each_point(tmp_path: Path) -> None:
    line = Series("a & b", [(1, 0.1), (2, 0.2), (4, 0.15)], (0.01, None, 0.02), dots=True)
    panel = Panel("Title", "x", [line], "y", log_x=True)
    chart = write_chart([panel, panel], tmp_path / "chart.svg", columns=1)
    first = chart.read_bytes()
    root = ET.fromstring(first)
    assert {"Title", "x", "y", "a & b", "1", "2", "4"} <= {(node.text or "").strip() for node in root.iter()}
    marks = [node for node in root.iter() if node.get("style", "").startswith("fill: #426eb4")]
    assert len(marks) == 2 * (3 + 1)  # the points, and one in the legend
    places = [(float(node.get("x", "nan")), float(node.get("y", "nan"))) for node in marks[:3]]
    (a, high), (b, low), (c, middle) = places
    assert b - a == pytest.approx(c - b, abs=0.2)  # equal factors, equal distances
    assert low < middle < high
    assert write_chart([panel, panel], chart, columns=1).read_bytes() == first


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RuntimeError) as error:
        write_chart([Panel("loss", "step", [])], tmp_path / "chart.png")
    message = "charts need matplotlib, which is not installed: pip install 'pusa[train]' or 'pusa[eval]'"
    assert str(error.value) == message


def test_equal_values_make_equal_pictures_and_others_do_not(tmp_path: Path) -> None:
    def picture(seed: int) -> bytes:
        values = torch.randn(30, generator=torch.Generator().manual_seed(seed)).tolist()
        return drawn(tmp_path, Panel("loss", "step", [Series("a", list(enumerate(values)), smooth=True)])).tobytes()

    assert picture(0) == picture(0)
    assert picture(0) != picture(1)
