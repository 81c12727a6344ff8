"""Test `pusa replay`, `final`, `decode`, `info` and `models`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import pusa
from PIL import Image
from safetensors.numpy import save_file
from sparse_models import transformer_shapes, vae_shapes, write_sparse

from pusa.cli.options import build_conditions
from pusa.events import Done, Event
from pusa.request import GenerationRequest


def write_video(path: Path, request: GenerationRequest) -> None:
    from pusa.media import VideoWriter

    with VideoWriter(path, width=32, height=16, metadata={"request": request.model_dump(mode="json")}) as writer:
        writer.write(np.zeros((5, 16, 32, 3), np.uint8))


@pytest.fixture
def asked(monkeypatch) -> list[Any]:
    """Record the calls of `generate` and `decode`; both write an empty file."""
    asked = []

    def fake(what: Any, output: Path, **_: Any) -> Iterator[Event]:
        asked.append(what)
        output.write_bytes(b"")
        yield Done({"video": output})

    monkeypatch.setattr("pusa.generate.generate", fake)
    monkeypatch.setattr("pusa.generate.decode", fake)
    return asked


def test_replay_makes_a_video_from_the_request_inside_it(asked, picture, tmp_path):
    [condition] = build_conditions(image=picture, noise="0.2")
    request = GenerationRequest(prompt="狐", model="tiny", seed=7, conditions=[condition])
    write_video(tmp_path / "out.mp4", request)
    result = pusa("replay", "out.mp4", "-o", "again.mp4")
    assert (result.exit_code, result.stdout) == (0, "again.mp4\n")
    assert asked[0] == request


def test_replay_keeps_the_strength_of_a_lora_that_lies_elsewhere(asked, tmp_path):
    write_video(tmp_path / "out.mp4", GenerationRequest(prompt="x", model="tiny", lora=["style.safetensors@0.8"]))
    result = pusa("replay", "out.mp4")
    assert (result.exit_code, "'style.safetensors' is not here" in result.stderr) == (3, True)
    (tmp_path / "folder").mkdir()
    for file in ("style.safetensors", "folder/style.safetensors", "other.safetensors"):
        (tmp_path / file).touch()
    for options, expected in (
        ((), "style.safetensors@0.8"),
        (("--lora", "folder/style.safetensors"), "folder/style.safetensors@0.8"),
        (("--lora", "folder/style.safetensors@1.1"), "folder/style.safetensors@1.1"),
        (("--lora", "other.safetensors"), "other.safetensors"),
    ):
        assert pusa("replay", "out.mp4", *options).exit_code == 0
        assert asked[-1].lora == [expected]


def test_replay_finds_a_picture_beside_the_video(asked, picture, tmp_path, monkeypatch):
    request = GenerationRequest(prompt="x", model="tiny", conditions=build_conditions(image=picture))
    write_video(tmp_path / "out.mp4", request)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pusa("replay", "../out.mp4").exit_code == 0
    assert Path(asked[0].conditions[0].file).samefile(tmp_path / "cat.png")
    (tmp_path / "cat.png").unlink()
    result = pusa("replay", "../out.mp4")
    assert result.exit_code == 2
    assert "image 'cat.png' does not exist" in result.stderr


def test_a_video_of_others_cannot_be_replayed(picture):
    result = pusa("replay", picture)
    assert result.exit_code == 2
    assert "no request is stored inside" in result.stderr


def test_decode_makes_a_video_of_saved_latents(asked, tmp_path):
    save_file({"latents": np.zeros((1, 16, 2, 4, 4), np.float32)}, tmp_path / "z.safetensors")
    result = pusa("decode", "z.safetensors", "-o", "z.mp4")
    assert (result.exit_code, result.stdout) == (0, "z.mp4\n")
    assert asked == [Path("z.safetensors")]
    assert pusa("decode", "nope.safetensors", "-o", "z.mp4").exit_code == 2


def test_decode_finds_the_files_of_comfyuis_folder_and_others(tmp_path, monkeypatch):
    given = []

    def fake(latents: Path, output: Path, **options: Any) -> Iterator[Event]:
        given.append(options)
        output.write_bytes(b"")
        yield Done({"video": output})

    monkeypatch.setattr("pusa.generate.decode", fake)
    save_file({"latents": np.zeros((1, 16, 2, 4, 4), np.float32)}, tmp_path / "z.safetensors")
    models = tmp_path / "ComfyUI/models"
    write_sparse(models / "diffusion_models/t.safetensors", transformer_shapes("wan2.1-1.3b"))
    vae = write_sparse(models / "vae/v.safetensors", vae_shapes("wan2.1"))
    assert pusa("decode", "z.safetensors", "-o", "z.mp4", "--model", tmp_path / "ComfyUI").exit_code == 0
    assert (given[0]["model"], given[0]["load"].vae) == ("wan2.1-1.3b", vae)
    assert pusa("decode", "z.safetensors", "-o", "z.mp4", "--vae", vae).exit_code == 0
    assert (given[1]["model"], given[1]["load"].files) == (None, {"vae": vae})


def test_a_final_reads_comfyuis_folder_once_and_takes_its_files(asked, tmp_path):
    write_video(tmp_path / "draft.mp4", GenerationRequest(prompt="x", draft=True, width=416, height=240))
    models = tmp_path / "ComfyUI/models"
    own = write_sparse(models / "diffusion_models/own.safetensors", transformer_shapes("wan2.1-1.3b"))
    result = pusa("final", "draft.mp4", "-o", "final.mp4", "--model", tmp_path / "ComfyUI")
    assert (result.exit_code, result.stderr.count("wan2.1-1.3b, with transformer own.safetensors")) == (0, 1)
    assert (asked[0].model, asked[0].width, asked[0].height) == ("wan2.1-1.3b", 832, 480)
    write_sparse(models / "diffusion_models/other.safetensors", transformer_shapes("wan2.1-14b"))
    assert pusa("final", "draft.mp4", "--model", tmp_path / "ComfyUI").exit_code == 2  # one has to be chosen
    chosen = pusa("final", "draft.mp4", "-o", "b.mp4", "--model", tmp_path / "ComfyUI", "--transformer", own)
    assert (chosen.exit_code, asked[-1].model) == (0, "wan2.1-1.3b")


def test_info_of_our_video_says_how_it_was_made(tmp_path):
    write_video(tmp_path / "out.mp4", GenerationRequest(prompt="a fox", seed=7))
    facts = json.loads(pusa("info", "out.mp4", "--json").stdout)
    assert (facts["size"], facts["frames"], facts["request"]["prompt"], facts["request"]["seed"]) == (
        "32x16",
        5,
        "a fox",
        7,
    )
    assert re.search(r"^  prompt +a fox$", pusa("info", "out.mp4").stdout, re.MULTILINE)


def test_info_says_what_reading_converts(tmp_path):
    Image.new("RGBA", (8, 6)).save(tmp_path / "clear.png")
    facts = {"kind": "a PNG picture", "size": "8x6", "notes": ["its transparency is shown on white"]}
    assert json.loads(pusa("info", tmp_path / "clear.png", "--json").stdout) == facts


def test_info_of_a_picture_and_of_latents(picture, tmp_path):
    assert json.loads(pusa("info", picture, "--json").stdout) == {"kind": "a PNG picture", "size": "8x8"}
    made_from = json.dumps({"request": {"prompt": "a fox"}})
    save_file({"latents": np.zeros((16, 2, 4, 4), np.float32)}, tmp_path / "z.safetensors", {"pusa": made_from})
    facts = json.loads(pusa("info", "z.safetensors", "--json").stdout)
    assert (facts["kind"], facts["shape"], facts["dtype"]) == ("saved latents", [16, 2, 4, 4], "F32")
    assert facts["request"]["prompt"] == "a fox"


@pytest.mark.parametrize("name", ["lora/pusa_official_keys.pt", "lora/lightx2v_with_alpha.safetensors"])
def test_info_of_a_lora(golden, name):
    facts = json.loads(pusa("info", golden / name, "--json").stdout)
    assert facts["kind"] == "a LoRA"
    assert (facts["layers"], facts["for"]) == (30, "Wan (width 96, 3 blocks)")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("transformer/weights_original.safetensors", "a Wan text-to-video transformer (fp32)"),
        ("transformer/weights_diffusers.safetensors", "a Wan text-to-video transformer (fp32)"),
        ("vae/weights_original.safetensors", "the Wan2.1 VAE (fp32)"),
        ("text/weights_transformers.safetensors", "the UMT5 text encoder (fp32)"),
        ("singlefiles/transformer_bf16_prefix.safetensors", "a Wan text-to-video transformer (bf16)"),
        ("singlefiles/all_in_one_checkpoint.safetensors", "a Wan text-to-video transformer (fp8_plain) and the UMT5"),
    ],
)
def test_info_of_a_checkpoint_names_its_parts(golden, name, part):
    facts = json.loads(pusa("info", golden / name, "--json").stdout)
    assert facts["kind"] == "a checkpoint"
    assert facts["holds"].startswith(part)
    assert facts["cannot be used"] == ""


@pytest.mark.parametrize(
    ("name", "what"),
    [("vace", "a VACE model"), ("t5xxl_not_umt5", "a T5 v1.1 encoder (not UMT5)"), ("i2v_wan21", "an image-to-video")],
)
def test_info_of_a_checkpoint_that_would_be_refused_says_why(golden, name, what):
    facts = json.loads(pusa("info", golden / f"singlefiles/refuse_{name}.safetensors", "--json").stdout)
    assert facts["holds"].startswith(what)
    assert what in facts["cannot be used"]


def test_lists_of_words_are_shown_without_brackets():
    assert re.search(
        r"^  transformer +Comfy-Org/\S+ \(28\.6 GB\), Comfy", pusa("models", "show", "wan2.1-14b").stdout, re.M
    )


def test_info_of_anything_else_is_one_line(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 40)
    (tmp_path / "a.pt").write_bytes(b"\x80\x04c__builtin__\neval\n.")
    (tmp_path / "a.txt").write_text("hello, this is a text")
    for name in ("a.safetensors", "a.pt", "a.txt", "nope.mp4", "."):
        result = pusa("info", name)
        assert result.exit_code == 2, name
        assert len(result.stderr.splitlines()) == 1
        assert result.stdout == ""


def test_models_are_listed_with_sizes_and_what_this_machine_can_run():
    listed = json.loads(pusa("models", "--json").stdout)
    assert listed["wan2.1-14b"]["download"] == "80.4 GB"
    assert all(facts["here"].startswith(("yes: ", "no: ")) for facts in listed.values())
    shown = pusa("models", "show", "wan2.2-a14b")
    assert shown.exit_code == 0
    assert "transformer_2" in shown.stdout
