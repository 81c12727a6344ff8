"""`pusa eval mini` from the command to the report, on a model with random weights and a world of four shapes."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from lora_samples import comfyui, make_pairs, write
from PIL import Image
from shape_samples import make_shapes
from world_samples import make_photographs

from pusa import zoo
from pusa.cli import main
from pusa.cli.eval import mini as mini_command
from pusa.mini.evaluation import evaluate as mini
from pusa.mini.evaluation import photographs, report, setup
from pusa.mini.evaluation.photographs import PhotographWorld
from pusa.mini.evaluation.setup import Evaluator, load_evaluator
from pusa.mini.world import pictures
from pusa.mini.world.scenery import PLACES
from pusa.mini.world.vocabulary import CAMERAS, MOTIONS, THINGS
from pusa.mini.world.world import captions, is_held_out

SIZE, FRAMES = 32, 17


@pytest.fixture(scope="module")
def patched() -> Any:
    """No picture is fetched, and probes learn next to nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "fetch", lambda cache: None)
        patch.setattr(pictures, "load_sprites", lambda cache: make_shapes())
        patch.setattr(pictures, "load_photographs", lambda cache: make_photographs())
        patch.setattr(setup, "train_probes", partial(setup.train_probes, frame_steps=2, motion_steps=2))
        patch.setattr(setup, "REFERENCE_CLIPS", 16)
        patch.setattr(setup, "World", partial(setup.World, variants=1))
        yield patch


@pytest.fixture(scope="module")
def model(tiny_pipeline: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the recipe makes it, with an adapter of random weights."""
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder)
    write(folder / "lora.safetensors", comfyui(make_pairs(pipe.transformer)))
    defaults = {
        "width": SIZE,
        "height": SIZE,
        "num_frames": FRAMES,
        "steps": 2,
        "guidance": 2.0,
        "shift": 3.0,
        "alpha": 1.4,
        "max_sequence_length": 32,
        "negative_prompt": "",
    }
    card = {
        "title": "noise",
        "defaults": defaults,
        "lora": {"transformer": "lora.safetensors"},
        "words": {"things": [list(names[1:]) for names in THINGS[:4]]},
    }
    (folder / zoo.CARD_FILE).write_text(json.dumps(card))
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def evaluator(model: Path, patched: Any, out: Path) -> Evaluator:
    return load_evaluator(model, Path("nowhere"), out)


def test_the_model_s_card_says_what_is_evaluated(evaluator: Evaluator) -> None:
    assert evaluator.things == 4
    assert evaluator.world.motion_frames == FRAMES - 1
    assert evaluator.has_adapter
    assert evaluator.defaults.width == SIZE


def test_a_model_without_words_is_refused(patched: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        load_evaluator("tiny", Path("nowhere"), tmp_path)
    assert str(error.value).startswith("'tiny' does not list the small world's things")


def test_probes_are_trained_once_for_a_model(evaluator: Evaluator, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []
    monkeypatch.setattr(
        setup, "train_probes", lambda world, vae, *, things, size: trained.append(1) or evaluator.probes
    )
    file = out / "probes.safetensors"
    again = setup.probes_for(evaluator.pipe, evaluator.world, things=4, size=SIZE, file=file)
    assert not trained
    video = torch.rand(1, 3, FRAMES, SIZE, SIZE)
    assert torch.equal(again.classify(video).features, evaluator.probes.classify(video).features)
    setup.probes_for(evaluator.pipe, evaluator.world, things=4, size=2 * SIZE, file=file)
    assert trained


@pytest.mark.parametrize("held_out", [False, True])
def test_scenes_hold_every_motion_as_often_and_half_of_the_cameras_move(evaluator: Evaluator, held_out: bool) -> None:
    scenes = evaluator.scenes(24, seed=1, held_out=held_out)
    assert torch.bincount(scenes.motion).tolist() == [2] * len(MOTIONS)
    assert int((scenes.camera > 0).sum()) == 12
    assert (is_held_out(scenes.thing, scenes.motion, scenes.place) == held_out).all()
    assert (scenes.place < len(PLACES)).all()
    assert (scenes.second < 0).all()


def test_without_the_adapter_is_the_base_model_and_the_adapter_comes_back(evaluator: Evaluator) -> None:
    text = captions(evaluator.scenes(1, seed=2))
    with_it = evaluator.denoise(text)
    with evaluator.without_adapter():
        base = evaluator.denoise(text)
    assert not torch.equal(base, with_it)
    assert torch.equal(evaluator.denoise(text), with_it)
    evaluator.pipe.unload_lora_weights()
    assert torch.equal(evaluator.denoise(text), base)
    evaluator.pipe.load_pusa(Path(evaluator.model) / "lora.safetensors", alpha=evaluator.defaults.alpha)


def test_noise_belongs_to_the_clip_and_not_to_its_batch(evaluator: Evaluator) -> None:
    texts = captions(evaluator.scenes(setup.BATCH + 1, seed=3))
    together = evaluator.denoise(texts, seed=7)
    alone = evaluator.denoise(texts[-1:], seed=7 + setup.BATCH)
    torch.testing.assert_close(alone[0], together[-1], atol=1e-4, rtol=1e-4)


def test_the_features_of_real_clips_are_nearer_to_real_ones_than_those_of_noise(evaluator: Evaluator) -> None:
    real, _ = evaluator.draw(evaluator.scenes(12, seed=4))
    noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    near, far = (evaluator.frechet(evaluator.classify(video).features)["value"] for video in (real, noise))
    assert near < far


def test_photographs_are_filmed_by_every_camera_and_each_end_is_nearest_to_its_photograph(
    evaluator: Evaluator, tmp_path: Path
) -> None:
    files = []
    for number in range(2):
        files.append(tmp_path / f"{number}.png")
        noise = torch.rand(40, 60, 3, generator=torch.Generator().manual_seed(number)) * 255
        Image.fromarray(noise.byte().numpy()).resize((400, 300)).save(files[-1])
    world = PhotographWorld(files, motion_frames=FRAMES - 1)
    real = world.clips(evaluator, 8)
    assert sorted(set(real.scenes.camera.tolist())) == list(range(1, len(CAMERAS)))
    assert (real.scenes.thing < 0).all()
    own = world.nearest_end(evaluator, real, real.video[:, :, -1:])
    other = world.nearest_end(evaluator, real, real.video.roll(1, 0)[:, :, -1:])
    assert (own > 35).all()  # but for rounding to grey levels
    assert (own > other + 10).all()


def test_no_photographs_are_refused_and_installed_ones_are_files() -> None:
    with pytest.raises(ValueError) as error:
        PhotographWorld([], motion_frames=4)
    assert str(error.value).startswith("no photographs: give files")
    assert all(path.is_file() for path in photographs.installed_photographs())


def test_the_command_measures_every_part_and_keeps_what_is_done(
    model: Path, patched: Any, evaluator: Evaluator, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "load_evaluator", lambda *arguments: evaluator)
    photo = tmp_path / "photo.png"
    Image.effect_noise((80, 60), 90).convert("RGB").save(photo)
    command = ["eval", "mini", "--model", str(model), "--cache", "nowhere", "--out", str(out), "--clips", "2"]
    first = CliRunner().invoke(main, [*command, "--steps", "2,1", "--part", "vae,t2v,i2v", "--photos", str(photo)])
    assert first.exit_code == 0, first.output
    assert "| 2 steps |" in first.stdout
    assert "without captions, without the adapter" in first.stdout
    rest = "probes,start-end,keyframes,extension,transition,loop"
    second = CliRunner().invoke(main, [*command, "--part", rest, "--photos", str(photo), "--json"])
    assert second.exit_code == 0, second.output
    found = json.loads(second.stdout)
    assert list(found["parts"]) == list(mini.PARTS)
    assert found == json.loads((out / "report.json").read_text())
    assert found["parts"]["vae"]["tables"]["the VAE"]["held-out clips"]["PSNR, dB"]["n"] == 2
    kept = found["parts"]["i2v"]["tables"]["image to video, held-out clips"]["with captions"]
    assert kept["first frame against the VAE's, dB"]["value"] > 45  # held at noise 0; the VAE computes in bfloat16
    assert kept["first frame, dB"]["value"] < 45
    extended = found["parts"]["extension"]["tables"]["extension, 5 in a row"]["extended"]
    assert extended["seam"]["n"] == 2
    for name in ("t2v", "i2v", "start-end", "keyframes", "extension", "transition", "loop"):
        with Image.open(out / f"{name}.png") as sheet:
            assert sheet.width > 300
    assert (out / "report.md").read_text() == report.as_markdown(found)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--part", "t2v,x2v", "'x2v' is none of probes, vae, t2v"),
        ("--steps", "4,many", "'4,many': write numbers of steps in 1..200"),
        ("--photos", str(Path(__file__).parent), "no JPEG, PNG or WebP file is in"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(option: str, value: str, message: str) -> None:
    result = CliRunner().invoke(main, ["eval", "mini", option, value])
    assert result.exit_code == 2
    assert message in result.stderr


def test_help_names_all_parts() -> None:
    assert tuple(mini.PARTS) == mini_command.PARTS


def test_reports_show_rates_means_chance_and_equality() -> None:
    assert report.format_figure({"value": 0.9, "n": 40, "low": 0.77, "high": 0.96}) == "90 % (77-96)"
    assert report.format_figure({"value": 1.234, "n": 4, "error": 0.1}) == "1.23 ± 0.10"
    assert report.format_figure({"value": 24.34, "n": 4, "error": 0.25}, "frames, dB") == "24.3 ± 0.2"
    assert report.format_figure({"value": 80.0, "n": 4, "error": 0.0}, "first frame, dB") == "equal"
    assert report.format_figure({"value": 0.25}) == "25 %"
    assert report.format_figure({"value": None, "n": 0}) == ""
    table = report.format_table({"a": {"x": {"value": 1.0, "n": 2}}, "b": {"y": {"value": None, "n": 3}}})
    assert table.splitlines() == ["| | clips | x | y |", "|---|---|---|---|", "| a | 2 | 1.00 |  |", "| b | 3 |  |  |"]
