"""Models that a user adds by name: kept, found everywhere, and never told to others by their paths."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import pusa
from safetensors.torch import save_file
from sparse_models import transformer_shapes, vae_shapes, write_sparse

from pusa import GenerationRequest, PusaPipeline, added_models, zoo
from pusa.generate import loras
from pusa.models import original, tiny
from pusa.zoo import LoraSource

NARROW = transformer_shapes("wan2.1-1.3b")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUSA_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def transformer(tmp_path: Path) -> Path:
    return write_sparse(tmp_path / "models" / "my_model.safetensors", NARROW)


def test_a_model_of_files_gets_a_name(transformer: Path) -> None:
    result = pusa("models", "add", "mine", "--transformer", os.path.relpath(transformer))
    assert (result.exit_code, result.stdout) == (0, "mine is wan2.1-1.3b with transformer my_model.safetensors\n")
    model = zoo.find("mine")
    assert model is not None
    assert (model.family, model.hub_id) == ("wan2.1-1.3b", zoo.get("wan2.1-1.3b").hub_id)
    assert model.files == {"transformer": transformer}  # an absolute path
    assert model.defaults == zoo.get("wan2.1-1.3b").defaults
    assert zoo.public_name("mine") == "mine"
    assert "mine" in zoo.names()
    assert "mine" in pusa("models").stdout
    assert "my_model.safetensors" in pusa("models", "show", "mine").stdout
    assert pusa("models", "remove", "mine").exit_code == 0
    assert zoo.find("mine") is None
    assert transformer.exists()
    assert "no model 'mine' was added" in pusa("models", "remove", "mine").stderr


def test_comfyuis_folder_gets_a_name(tmp_path: Path) -> None:
    models = tmp_path / "ComfyUI" / "models"
    write_sparse(models / "diffusion_models" / "t.safetensors", NARROW)
    write_sparse(models / "vae" / "v.safetensors", vae_shapes("wan2.1"))
    result = pusa("models", "add", "comfy", "--comfyui", tmp_path / "ComfyUI")
    assert result.stdout == "comfy is wan2.1-1.3b with transformer t.safetensors, vae v.safetensors\n"
    assert set(zoo.get("comfy").files) == {"transformer", "vae"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mini", "--transformer", "models/my_model.safetensors"), "mini is a model of the zoo"),
        (("mine", "--transformer", "absent.safetensors"), "--transformer 'absent.safetensors' is no file"),
        (("mine", "--folder", "absent"), "--folder 'absent' is no folder"),
        (("mine",), "nothing to add"),
        (("a/b", "--transformer", "models/my_model.safetensors"), "letters, digits"),
        (("mine", "--model", "wan3", "--transformer", "models/my_model.safetensors"), "--model 'wan3' is none of"),
        (
            ("mine", "--model", "wan2.1-14b", "--transformer", "models/my_model.safetensors"),
            "30 blocks of width 1536 and 16 channels, and wan2.1-14b has 40 of 5120",
        ),
        (("mine", "--transformer", "models/other.safetensors"), "no part of a Wan or Mochi model"),
    ],
)
def test_what_cannot_be_a_model_is_refused(transformer: Path, arguments: tuple[str, ...], message: str) -> None:
    write_sparse(transformer.with_name("other.safetensors"), {"double_blocks.0.img_attn.qkv.weight": [8, 8]})
    result = pusa("models", "add", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert added_models.names() == []


def test_a_damaged_description_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "home" / "models").mkdir(parents=True)
    (tmp_path / "home" / "models" / "mine.json").write_text("{")
    with pytest.raises(ValueError, match="`pusa models remove mine`, and add it again"):
        zoo.find("mine")


def test_a_folder_of_settings_that_cannot_be_written_says_what_to_do(
    transformer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("PUSA_HOME", str(tmp_path / "a-file"))
    result = pusa("models", "add", "mine", "--transformer", str(transformer))
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr
    assert "set PUSA_HOME to a folder that you may write to" in result.stderr


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (["t.safetensors"], TypeError, 'files is a list: give the part of each, such as {"transformer": path}'),
        ({"unet": "t.safetensors"}, ValueError, "files has 'unet', which is none of transformer, transformer_2"),
    ],
)
def test_files_that_name_no_parts_are_refused(files: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        PusaPipeline.from_pretrained("tiny", files=files)


def test_parts_of_a_pipeline_come_from_files(tmp_path: Path) -> None:
    parts = tiny.components(seed=3)
    weights = original.transformer_to_original(parts["transformer"].state_dict())
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "t.safetensors")
    pipe = PusaPipeline.from_pretrained("tiny", files={"transformer": tmp_path / "t.safetensors"})
    for key, value in parts["transformer"].state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[key], value)
    assert pipe.text_encoder_identity == PusaPipeline.from_pretrained("tiny").text_encoder_identity


def test_metadata_names_files_without_their_folders_and_replay_asks_for_them(tmp_path: Path) -> None:
    file = tmp_path / "secret" / "t.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    before = loras.hashes("tiny", None, [], {"transformer": file})
    assert "secret" not in str(before)
    assert before["parts"]["transformer"]["file"] == "t.safetensors"
    assert list(loras.changes(before, before)) == []
    assert list(loras.changes(before, loras.hashes("tiny", None, []))) == [
        "the transformer comes from the model, and this video was made with t.safetensors: give it with --transformer"
    ]


def test_a_transformer_of_another_size_needs_a_model(tmp_path: Path, golden: Path) -> None:
    file = golden / "singlefiles/transformer_bf16.safetensors"
    result = pusa("generate", "a cat", "--transformer", file)
    assert result.exit_code == 2
    assert "transformer_bf16.safetensors: of no published size: give --model" in result.stderr
    result = pusa("models", "add", "small", "--transformer", file)
    assert "--transformer transformer_bf16.safetensors is of no published size: give --model" in result.stderr
    result = pusa("generate", "a cat", "--vae", golden / "singlefiles/wan_2.1_vae_bf16.safetensors")
    assert "no transformer, which would tell the model: give --model" in result.stderr


def test_info_describes_a_folder(tmp_path: Path) -> None:
    PusaPipeline.from_pretrained("tiny").save_pretrained(tmp_path / "folder")
    (tmp_path / "folder/vae/config.json").unlink()
    for command in (("info",), ("models", "show")):
        result = pusa(*command, "folder")
        assert result.exit_code == 0
        assert "none of the zoo: a transformer of 3 blocks, width 96, 16 channels" in result.stdout
        assert "missing files  vae/config.json" in result.stdout
    assert "holds no model" in pusa("info", tmp_path).stderr


# ---- notes about LoRAs -----------------------------------------------------------------------------------------------


class Absent(LoraSource):
    """A LoRA that is neither here nor to be downloaded."""

    def fetch(self, **hub: object) -> dict[str, Path]:
        raise OSError("the Hub does not answer")


def test_a_recognised_model_does_without_a_lora_that_cannot_be_had_and_says_so(tmp_path: Path) -> None:
    recognised = replace(zoo.get("wan2.1-14b"), name="mine", hub_id=None, family="wan2.1-14b")
    here = replace(recognised, lora=LoraSource(str(tmp_path), {"transformer": "pusa.safetensors"}))
    sources, notes = loras.own_files(here)
    assert sources == [{"transformer": tmp_path / "pusa.safetensors"}]
    assert notes[0].startswith("mine is recognised as wan2.1-14b: its defaults and its Pusa LoRA")
    sources, notes = loras.own_files(replace(recognised, lora=Absent("a/b", {})))
    assert sources == []
    assert "is not here and cannot be downloaded (the Hub does not answer)" in notes[0]
    with pytest.raises(OSError, match="the Hub does not answer"):  # a name asks for all of the model
        loras.own_files(replace(zoo.get("wan2.1-14b"), lora=Absent("a/b", {})))


def test_a_note_tells_where_nothing_makes_the_model_follow_conditions() -> None:
    pipe = PusaPipeline.from_pretrained("tiny")
    defaults = zoo.defaults_of("tiny")

    def note(*positions: str) -> str | None:
        conditions = [{"kind": "image", "file": "x.png", "positions": [place]} for place in positions]
        request = GenerationRequest(prompt="a cat", model="tiny", conditions=conditions, seed=0)
        return loras.missing_note(pipe, request.resolved(defaults))

    assert note() is None
    assert "images and videos will not be followed well" in (note("0") or "")
    pipe.register_to_config(expand_timesteps=True)  # as TI2V-5B has it
    assert note("0") is None
    assert "will not follow other places well" in (note("0", "last") or "")
