"""Make FVDM models, new ones and of checkpoints, and prepare clips for models of pictures and of Mochi."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bases import fvdm_folder, mochi_folder
from command_line import pusa
from media_samples import moving_gradient, write

from pusa import PusaPipeline, zoo
from pusa.data.dataset import LatentDataset
from pusa.models.fvdm import tiny
from pusa.new_models import make_fvdm


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a folder with a VAE of pictures, 8 x 8 pixels to each of 4 channels."""
    return fvdm_folder(tmp_path_factory.mktemp("models") / "fvdm")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three videos of 20 frames, 160 x 96, without captions."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(3):
        write(folder / f"{number}.mp4", moving_gradient(20 + number)[number:], fps=8)
    return folder


def test_a_new_model_is_made_on_the_command_line(pictures: Path, tmp_path: Path) -> None:
    options = ("--size", "T/2", "--video", "64x32", "--frames", 6, "--classes", 3, "--fps", 12)
    result = pusa("models", "make-fvdm", tmp_path / "new", "--vae", pictures, *options)
    assert result.exit_code == 0, result.output
    pipe = PusaPipeline.from_pretrained(tmp_path / "new")
    config, defaults = pipe.transformer.config, pipe.defaults
    assert (config.depth, config.hidden_size, tuple(config.input_size), config.num_classes) == (6, 192, (4, 8), 3)
    assert (defaults.width, defaults.height, defaults.num_frames, defaults.fps) == (64, 32, 6, 12)
    assert defaults.guidance == 7
    assert (defaults.classes, defaults.longest_window, defaults.overlap) == (3, 6, 3)
    assert not pipe.transformer.final_layer.linear.weight.any()  # it begins by predicting nothing
    assert zoo.defaults_of(tmp_path / "new") == defaults
    vae = PusaPipeline.from_pretrained(pictures).vae.state_dict()
    assert all(torch.equal(value, vae[key]) for key, value in pipe.vae.state_dict().items())


def test_the_seed_decides_the_weights(pictures: Path, tmp_path: Path) -> None:
    def first_layer(seed: int, name: str) -> torch.Tensor:
        folder = make_fvdm(tmp_path / name, vae=pictures, size="T/2", width=32, height=32, seed=seed)
        return PusaPipeline.from_pretrained(folder).transformer.x_embedder.proj.weight

    first = first_layer(1, "a")
    assert torch.equal(first_layer(1, "b"), first)
    assert not torch.equal(first_layer(2, "c"), first)


def test_a_checkpoint_becomes_a_model_once(pictures: Path, tmp_path: Path) -> None:
    state = tiny.components(seed=3, num_classes=2)["transformer"].state_dict()
    torch.save({"ema": state, "model": {}}, tmp_path / "0250000.pt")
    options = ("--vae", pictures / "vae", "--checkpoint", tmp_path / "0250000.pt")
    result = pusa("models", "make-fvdm", tmp_path / "made", *options)
    assert "give num_heads" in result.stderr  # 48 channels are no size of the paper's
    result = pusa("models", "make-fvdm", tmp_path / "made", *options, "--heads", 3)
    assert result.exit_code == 0, result.output
    pipe = PusaPipeline.from_pretrained(tmp_path / "made")
    assert all(torch.equal(value, state[key]) for key, value in pipe.transformer.state_dict().items())
    assert (pipe.defaults.width, pipe.defaults.height, pipe.defaults.num_frames) == (64, 64, 16)
    assert pipe.transformer.config.num_classes == zoo.defaults_of(tmp_path / "made").classes == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 40, "height": 32}, "size 40x32: sides are multiples of 16"),
        ({"width": 32}, "width and height go together"),
        ({"size": "M/2"}, "'M/2' is no size of FVDM's"),
    ],
)
def test_a_size_that_cannot_be_is_refused(
    options: dict[str, Any], message: str, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make_fvdm(tmp_path / "new", vae=pictures, **options)
    assert not (tmp_path / "new").exists()


def test_other_folders_and_vaes_are_refused(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exists already"):
        make_fvdm(pictures, vae=pictures)
    with pytest.raises(FileNotFoundError, match="is no VAE of pictures"):
        make_fvdm(tmp_path / "new", vae=tmp_path)


def prepared(model: Path, videos: Path, output: Path, *options: Any) -> LatentDataset:
    arguments = ("--model", model, "--size", "32x32", "--fps", 8, "--workers", 0, *options)
    result = pusa("data", "prepare", videos, output, *arguments)
    assert result.exit_code == 0, result.output
    return LatentDataset(output)


def test_clips_of_a_model_without_text_need_no_captions(pictures: Path, videos: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text('{"0": "a cat"}')  # and have no use for one
    data = prepared(pictures, videos, tmp_path / "out", "--frames", 7, "--captions", tmp_path / "captions.json")
    assert list(data.buckets) == [(4, 7, 4, 4)]  # as many latent frames as frames
    assert {clip.caption for clip in data.clips} == {""}
    assert data.embeds(0).numel() == 0
    pipe = PusaPipeline.from_pretrained(pictures)
    decoded = pipe.decode(data.latents(0)[None], output_type="pt")
    assert np.shape(decoded) == (1, 7, 3, 32, 32)


def test_clips_with_classes_have_their_numbers_as_captions(videos: Path, tmp_path: Path) -> None:
    model = fvdm_folder(tmp_path / "model", num_classes=3)
    (tmp_path / "classes.json").write_text('{"0": "0", "1": "2"}')  # and of one video none is known
    data = prepared(model, videos, tmp_path / "out", "--frames", 4, "--captions", tmp_path / "classes.json")
    labels = {clip.source: data.embeds(index) for index, clip in enumerate(data.clips)}
    base = PusaPipeline.from_pretrained(model).base
    padded = [torch.nn.functional.pad(labels[f"{n}.mp4"], (0, 0, 0, 1 - len(labels[f"{n}.mp4"]))) for n in range(3)]
    arguments = base.text_inputs(torch.stack(padded), torch.zeros(3))
    assert arguments["class_labels"].tolist() == [0, 2, 3]  # 3 is no class
    (tmp_path / "classes.json").write_text('{"0": "3"}')
    options = ("--model", model, "--size", "32x32", "--frames", 4, "--captions", tmp_path / "classes.json")
    refused = pusa("data", "prepare", videos, tmp_path / "wrong", *options, "--workers", 0)
    assert "this model's prompt is the number of a class, 0..2, or empty" in refused.stderr


def test_clips_of_mochi_are_of_its_length_and_its_empty_caption_is_no_text(videos: Path, tmp_path: Path) -> None:
    model = mochi_folder(tmp_path / "model")
    data = prepared(model, videos, tmp_path / "out", "--frames", 13, "--caption", "a cat")
    assert list(data.buckets) == [(12, 3, 4, 4)]
    assert len(data.embeds(0)) > 1
    assert len(data.empty_embeds) == 0
    refused = pusa("data", "prepare", videos, tmp_path / "wrong", "--model", model, "--frames", 9, "--caption", "a")
    assert "frames=9: a clip has 6n + 1 frames; give 7" in refused.stderr
