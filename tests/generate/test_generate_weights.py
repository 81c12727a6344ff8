"""A run tells which LoRA got which strength, reads changed files again, and keeps latents whatever decoding does."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d
from lora_samples import comfyui, make_pairs, write
from safetensors.torch import load_file, save_file

from pusa import PusaPipeline, media
from pusa.fsutil import fingerprint_of, sha256_of
from pusa.generate import decode, generate, load_latents, load_pipeline
from pusa.models import tiny
from pusa.models.finite import NotFiniteError
from pusa.models.vae import DecodeError
from pusa.request import GenerationRequest

SMALL = {"prompt": "a cat", "width": 32, "height": 32, "frames": 5, "steps": 2, "seed": 0}


def run(output: Path, made_with: Any = None, **values: Any) -> list[str]:
    """Make a video; return the messages of its notes."""
    request = GenerationRequest(**{**SMALL, "model": "tiny", **values})
    return [event.message for event in generate(request, output, made_with=made_with) if event.kind == "note"]


def frames_of(path: Path) -> np.ndarray:
    return media.read_video(path)


def lora(path: Path, seed: int) -> Path:
    return write(path, comfyui(make_pairs(tiny.components()["transformer"], seed=seed)))


@pytest.fixture
def wan22(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PUSA_CACHE", str(tmp_path / "cache"))
    second = tiny.components(seed=5)["transformer"]
    PusaPipeline(**tiny.components(), transformer_2=second, boundary_ratio=0.875).save_pretrained(tmp_path / "wan22")
    return tmp_path / "wan22"


# ---- which file got which strength ---------------------------------------------------------------------------------


def test_each_file_its_strength_and_its_expert_are_said(tmp_path: Path, wan22: Path) -> None:
    high, low, glow = (lora(tmp_path / f"{name}.safetensors", 1) for name in ("a_HIGH", "a_LOW", "glow"))
    sources = [str(low), str(high), f"{glow}@0.5"]
    notes = run(tmp_path / "o.mp4", model=str(wan22), lora=sources, alpha=1.2, alpha_2=1.1)
    assert notes[:2] == [
        "LoRA a_LOW.safetensors: strength 1.1 on the low-noise expert (transformer_2), by its name",
        "LoRA a_HIGH.safetensors: strength 1.2 on the high-noise expert (transformer), by its name",
    ]
    assert [note.split(",")[0] for note in notes[2:]] == [
        "LoRA glow.safetensors: strength 0.5 on the high-noise expert (transformer)",
        "LoRA glow.safetensors: strength 0.5 on the low-noise expert (transformer_2)",
    ]
    both = run(tmp_path / "p.mp4", model=str(wan22), lora=[f"high={low}@0.7,low={high}"], alpha=1.2)
    assert both == [
        "LoRA a_LOW.safetensors: strength 0.7 on the high-noise expert (transformer), as given",
        "LoRA a_HIGH.safetensors: strength 1.2 on the low-noise expert (transformer_2), as given",
    ]
    alone = run(tmp_path / "q.mp4", model=str(wan22), lora=[str(low)], alpha=1.2)
    assert alone == ["LoRA a_LOW.safetensors: strength 1.2 on the low-noise expert (transformer_2), by its name"]
    assert run(tmp_path / "r.mp4", lora=[str(glow)], alpha=1.0) == ["LoRA glow.safetensors: strength 1 on transformer"]


def test_layers_that_are_left_out_are_said(tmp_path: Path) -> None:
    keys = load_file(lora(tmp_path / "i2v.safetensors", 1))
    keys |= {f"diffusion_model.blocks.0.cross_attn.k_img.lora_{h}.weight": torch.ones(4, 4) for h in "AB"}
    save_file(keys, tmp_path / "i2v.safetensors")
    with pytest.raises(ValueError, match="--lora-layers fitting"):
        run(tmp_path / "o.mp4", lora=[str(tmp_path / "i2v.safetensors")])
    [note] = run(tmp_path / "o.mp4", lora=[str(tmp_path / "i2v.safetensors")], lora_layers="fitting")
    assert note.endswith("on transformer; 1 image-to-video layers are left out (blocks.0.attn2.add_k_proj, ...)")


# ---- files that change under their names ---------------------------------------------------------------------------


def test_a_lora_that_changed_is_read_again_and_replay_says_so(tmp_path: Path) -> None:
    file = lora(tmp_path / "style.safetensors", 1)
    run(tmp_path / "first.mp4", lora=[str(file)])
    metadata = media.read_metadata(tmp_path / "first.mp4")
    assert metadata is not None
    assert metadata["weights"]["lora"] == [{"file": "style.safetensors", "sha256": sha256_of(file)}]
    same = run(tmp_path / "again.mp4", lora=[str(file)], made_with=metadata["weights"])
    assert not any("another one" in note for note in same)

    before = file.stat()
    shutil.copyfile(lora(tmp_path / "other.safetensors", 2), file)  # of the same size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # and of the same age
    notes = run(tmp_path / "second.mp4", lora=[str(file)], made_with=metadata["weights"])
    assert not np.array_equal(frames_of(tmp_path / "second.mp4"), frames_of(tmp_path / "first.mp4"))
    run(tmp_path / "fresh.mp4", lora=[str(tmp_path / "other.safetensors")])
    assert np.array_equal(frames_of(tmp_path / "second.mp4"), frames_of(tmp_path / "fresh.mp4"))
    assert any(note.startswith("LoRA style.safetensors is another one than this video was made with") for note in notes)


def test_a_model_that_changed_is_read_again_and_replay_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUSA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    PusaPipeline.from_pretrained("tiny").save_pretrained(folder)
    run(tmp_path / "first.mp4", model=str(folder))
    made_with = (media.read_metadata(tmp_path / "first.mp4") or {})["weights"]
    pipe = load_pipeline(str(folder))
    assert load_pipeline(str(folder)) is pipe
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out.bias"] += 1
    save_file(tensors, path, {"format": "pt"})
    assert load_pipeline(str(folder)) is not pipe
    notes = run(tmp_path / "second.mp4", model=str(folder), made_with=made_with)
    assert not np.array_equal(frames_of(tmp_path / "second.mp4"), frames_of(tmp_path / "first.mp4"))
    assert any(note.startswith("the model is another one than this video was made with") for note in notes)


def test_a_folders_fingerprint_follows_its_files_alone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.json").write_text("1")
    first = fingerprint_of(tmp_path / "a")
    (tmp_path / "a/film.mp4").write_text("no part of the model")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert fingerprint_of(tmp_path / "a") == fingerprint_of(tmp_path / "b") == first
    (tmp_path / "a/x.json").write_text("2")
    assert fingerprint_of(tmp_path / "a") != first


# ---- what fails after denoising ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("odd"), OSError("gone"), ZeroDivisionError("no"), RuntimeError("shapes")])
@pytest.mark.parametrize("where", ["decoder", "writer"])
def test_any_failure_after_denoising_keeps_the_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    run(tmp_path / "whole.mp4")

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    owner, name = {"decoder": (WanDecoder3d, "forward"), "writer": (media.VideoWriter, "write")}[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(
            DecodeError, match=rf"{error.args[0]}; the denoised latents are in .*out\.latents"
        ) as caught:
            run(tmp_path / "out.mp4")
    assert caught.value.__cause__ is error
    saved = tmp_path / "out.latents.safetensors"
    assert torch.equal(load_latents(saved)[0], caught.value.latents)
    list(decode(saved, tmp_path / "out.mp4"))
    assert np.array_equal(frames_of(tmp_path / "out.mp4"), frames_of(tmp_path / "whole.mp4"))


def test_a_vae_with_nan_is_blamed_and_a_transformer_with_nan_leaves_no_latents(tmp_path: Path) -> None:
    pipe = PusaPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    request = GenerationRequest(**{**SMALL, "model": "tiny"})
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(DecodeError, match="the vae has decoded NaN or infinity"):
        list(generate(request, tmp_path / "vae.mp4", pipeline=pipe, preview_every=1))
    assert [path.name for path in tmp_path.iterdir()] == ["vae.latents.safetensors"]
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("inf"))
    options = {"pipeline": pipe, "preview_every": 1, "checkpoint": tmp_path / "c.safetensors", "checkpoint_every": 1}
    with pytest.raises(NotFiniteError, match="the transformer has computed NaN or infinity in step 1 of 2"):
        list(generate(request, tmp_path / "dit.mp4", **options))
    assert [path.name for path in tmp_path.iterdir()] == ["vae.latents.safetensors"]
