"""Single files, ComfyUI's folder and folders of models: told by their content. The files are full-size, and holes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sparse_models import text_encoder_shapes, transformer_shapes, vae_shapes, write_sparse

from pusa import PusaPipeline, zoo
from pusa.models.files import WrongArchitectureError
from pusa.models.sources import comfyui, file_parts, file_set

FAMILIES = zoo.families()
WIDE, NARROW = transformer_shapes("wan2.1-14b"), transformer_shapes("wan2.1-1.3b")
TI2V, UMT5 = transformer_shapes("wan2.2-ti2v-5b"), text_encoder_shapes()
VAE, WAN22_VAE = vae_shapes("wan2.1"), vae_shapes("wan2.2")


# ---- folders of models -----------------------------------------------------------------------------------------------


def original_folder(place: Path, shapes: dict, experts: int = 1) -> Path:
    names = ["."] if experts == 1 else ["high_noise_model", "low_noise_model"]
    for name in names:
        write_sparse(place / name / "diffusion_pytorch_model.safetensors", shapes)
        (place / name / "config.json").write_text(json.dumps({"_class_name": "WanModel"}))
    return place


@pytest.mark.parametrize(
    ("shapes", "experts", "family"),
    [
        (WIDE, 1, "wan2.1-14b"),
        (NARROW, 1, "wan2.1-1.3b"),
        (WIDE, 2, "wan2.2-a14b"),
        (TI2V, 1, "wan2.2-ti2v-5b"),
    ],
    ids=["14b", "1.3b", "a14b", "5b"],
)
def test_a_folder_is_recognised_by_its_shapes(tmp_path: Path, shapes: dict, experts: int, family: str) -> None:
    model = zoo.find(original_folder(tmp_path / "mine", shapes, experts))
    assert model is not None
    assert (model.name, model.family, model.hub_id) == ("mine", family, None)
    assert model.defaults == zoo.get(family).defaults
    assert model.lora == zoo.get(family).lora
    assert not model.is_ours
    assert zoo.defaults_of(str(tmp_path / "mine")) == zoo.get(family).defaults


def test_a_folder_in_diffusers_layout_is_recognised_by_its_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    PusaPipeline.from_pretrained("tiny").save_pretrained(folder)
    assert zoo.find(folder) is None  # of no published size
    config = folder / "transformer" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | dict(zoo.get("wan2.1-1.3b").transformer)))
    model = zoo.find(folder)
    assert model is not None
    assert model.family == "wan2.1-1.3b"
    config.write_text(json.dumps(values | dict(zoo.get("wan2.1-1.3b").transformer) | {"num_layers": 29}))
    assert zoo.find(folder) is None
    config.write_text(json.dumps(values | dict(zoo.get("wan2.1-1.3b").transformer) | {"image_dim": 1280}))
    assert zoo.find(folder) is None


def test_a_narrow_original_folder_is_nobody(tmp_path: Path) -> None:
    narrow = {name: [size // 8 if size >= 1536 else size for size in shape] for name, shape in NARROW.items()}
    assert zoo.find(original_folder(tmp_path / "mine", narrow)) is None


# ---- single files ----------------------------------------------------------------------------------------------------


SIZES = ((WIDE, "wan2.1-14b"), (NARROW, "wan2.1-1.3b"), (TI2V, "wan2.2-ti2v-5b"))


def test_a_transformer_tells_its_model_whatever_its_name_and_prefix(tmp_path: Path) -> None:
    for number, (shapes, family) in enumerate(SIZES):
        for prefix in ("", "model.diffusion_model.", "diffusion_model."):
            file = write_sparse(tmp_path / f"{number}.safetensors", shapes, prefix=prefix)
            assert file_set.family_of({"transformer": file}, FAMILIES) == family


def test_high_and_low_are_told_by_the_name_and_halves_are_asked_for(tmp_path: Path) -> None:
    high = write_sparse(tmp_path / "wan_high_noise.safetensors", WIDE, mark=b"h")
    low = write_sparse(tmp_path / "wan_low_noise.safetensors", WIDE, mark=b"l")
    pair = {"transformer": high, "transformer_2": low}
    assert file_set.family_of(file_set.expand(pair), FAMILIES) == "wan2.2-a14b"
    with pytest.raises(ValueError, match=r"high-noise expert of a wan2\.2-a14b pair: give the other one with --transf"):
        file_set.family_of({"transformer": high}, FAMILIES)
    with pytest.raises(ValueError, match="swap them"):
        file_set.expand({"transformer": low, "transformer_2": high})
    copy = tmp_path / "wan_low_noise_copy.safetensors"
    write_sparse(copy, WIDE, mark=b"h")
    with pytest.raises(ValueError, match="are the same file"):
        file_set.expand({"transformer": high, "transformer_2": copy})
    narrow = write_sparse(tmp_path / "low.safetensors", NARROW)
    with pytest.raises(ValueError, match="are of different models"):
        file_set.family_of({"transformer": high, "transformer_2": narrow}, FAMILIES)


def test_a_file_that_does_not_hold_its_part_is_refused(tmp_path: Path, golden: Path) -> None:
    vae = write_sparse(tmp_path / "vae.safetensors", VAE)
    with pytest.raises(WrongArchitectureError, match=r"--transformer vae\.safetensors holds the Wan2\.1 VAE, and"):
        file_set.expand({"transformer": vae})
    with pytest.raises(WrongArchitectureError, match="an image-to-video model"):
        file_set.expand({"transformer": golden / "singlefiles/refuse_i2v_wan21.safetensors"})
    lora = tmp_path / "lora.safetensors"
    save_file({"blocks.0.ffn.0.lora_A.weight": torch.zeros(1, 1)}, lora)
    with pytest.raises(WrongArchitectureError, match="is a LoRA: give it with --lora"):
        file_set.expand({"transformer": lora})
    with pytest.raises(FileNotFoundError):
        file_set.expand({"vae": tmp_path / "absent.safetensors"})


def test_files_of_another_model_are_refused_by_their_headers(tmp_path: Path) -> None:
    transformer = write_sparse(tmp_path / "t.safetensors", NARROW)
    values, experts = FAMILIES["wan2.1-14b"]
    with pytest.raises(WrongArchitectureError, match=r"30 blocks of width 1536 .* wan2\.1-14b has 40 of 5120"):
        file_parts.check_model({"transformer": transformer}, values, experts, "wan2.1-14b")
    vae = write_sparse(tmp_path / "v.safetensors", WAN22_VAE)
    with pytest.raises(WrongArchitectureError, match=r"48 latent channels, and wan2\.1-14b has 16"):
        file_parts.check_model({"vae": vae}, values, experts, "wan2.1-14b")
    with pytest.raises(WrongArchitectureError, match="has one transformer and --transformer-2"):
        file_parts.check_model({"transformer_2": transformer}, values, experts, "wan2.1-14b")


# ---- ComfyUI's folder ------------------------------------------------------------------------------------------------


@pytest.fixture
def comfy(tmp_path: Path) -> Path:
    """ComfyUI's folder with one 1.3B model among files of others, a damaged one and a link to one of them."""
    models = tmp_path / "ComfyUI" / "models"
    write_sparse(models / "diffusion_models/wan/my_model.safetensors", NARROW)
    write_sparse(models / "text_encoders/encoder.safetensors", UMT5)
    write_sparse(models / "vae/old.safetensors", VAE)
    write_sparse(models / "vae/new.safetensors", WAN22_VAE)
    write_sparse(models / "diffusion_models/flux.safetensors", {"double_blocks.0.img_attn.qkv.weight": [8, 8]})
    (models / "unet").mkdir()
    (models / "unet/link.safetensors").symlink_to(models / "diffusion_models/wan/my_model.safetensors")
    (models / "unet/notes.txt").write_text("hello")
    (models / "checkpoints").mkdir()
    (models / "checkpoints/broken.safetensors").write_bytes(b"\x00" * 4)
    return models


def test_files_are_found_by_content(comfy: Path) -> None:
    found = comfyui.scan(comfy)
    assert {file.path.name for file in found.usable} == {
        "my_model.safetensors",
        "encoder.safetensors",
        "old.safetensors",
        "new.safetensors",
    }
    assert len(found.refused) == 1
    assert found.refused[0].startswith("checkpoints/broken.safetensors: ")
    choice = comfyui.choose(found, FAMILIES)
    assert choice.family == "wan2.1-1.3b"
    assert {part: path.name for part, path in choice.files.items()} == {
        "transformer": "my_model.safetensors",
        "text_encoder": "encoder.safetensors",
        "vae": "old.safetensors",
    }
    for folder in (comfy, comfy.parent):
        model = zoo.find(folder)
        assert model is not None
        assert (model.family, model.files) == ("wan2.1-1.3b", choice.files)


def test_headers_are_read_again_only_if_a_file_has_changed(comfy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scanned = []

    def scan(folder: Path, read=comfyui.scan) -> comfyui.Found:
        scanned.append(folder)
        return read(folder)

    monkeypatch.setattr(comfyui, "scan", scan)
    first = zoo.find(comfy)
    assert zoo.find(comfy) == first
    assert scanned == [comfy]
    write_sparse(comfy / "vae/another_name.safetensors", VAE)
    (comfy / "vae/old.safetensors").unlink()
    changed = zoo.find(comfy)
    assert changed is not None
    assert changed.files["vae"].name == "another_name.safetensors"
    assert scanned == [comfy, comfy]


def lora_shapes(rank: int, width: int = 1536, layers: int = 30) -> dict[str, list[int]]:
    names = [f"diffusion_model.blocks.{number}.self_attn.q" for number in range(layers)]
    return {f"{name}.lora_A.weight": [rank, width] for name in names} | {
        f"{name}.lora_B.weight": [width, rank] for name in names
    }


def test_the_only_pusa_lora_of_a_folder_is_its_own(comfy: Path) -> None:
    write_sparse(comfy / "loras/speed.safetensors", lora_shapes(64))
    write_sparse(comfy / "loras/pusa_14b.safetensors", lora_shapes(512, 5120, 40))  # of another model
    write_sparse(comfy / "loras/Pusa_high_noise.safetensors", lora_shapes(512))  # of one expert of two
    choice = comfyui.choose(comfyui.scan(comfy), FAMILIES)
    assert (choice.loras, choice.lora_note) == ((), "")
    renamed = write_sparse(comfy / "loras/mine.safetensors", lora_shapes(512))
    choice = comfyui.choose(comfyui.scan(comfy), FAMILIES)
    assert choice.own_lora == (str(renamed),)
    assert choice.lora_note == f"with the Pusa LoRA of the folder: --lora {renamed}"
    model = zoo.find(comfy)
    assert model is not None
    assert model.own_lora == (str(renamed),)
    named = write_sparse(comfy / "loras/pusa_rank64.safetensors", lora_shapes(64))
    choice = comfyui.choose(comfyui.scan(comfy), FAMILIES)
    assert choice.own_lora == ()
    assert choice.lora_note.endswith(f"choose with --lora {renamed} or --lora {named}")


def test_a_pair_of_pusa_loras_is_one(comfy: Path) -> None:
    (comfy / "diffusion_models/wan/my_model.safetensors").unlink()
    for noise in ("high", "low"):
        write_sparse(comfy / f"unet/wan2.2_{noise}_noise.safetensors", WIDE, mark=noise.encode())
    write_sparse(comfy / "loras/Wan21_Pusa.safetensors", lora_shapes(512, 5120, 40))
    high = write_sparse(comfy / "loras/Pusa_high_noise.safetensors", lora_shapes(512, 5120, 40))
    assert comfyui.choose(comfyui.scan(comfy), FAMILIES).own_lora == ()
    low = write_sparse(comfy / "loras/Pusa_low_noise.safetensors", lora_shapes(512, 5120, 40))
    assert comfyui.choose(comfyui.scan(comfy), FAMILIES).own_lora == (f"high={high},low={low}",)


def test_several_candidates_are_listed_with_the_options_that_choose(comfy: Path) -> None:
    write_sparse(comfy / "diffusion_models/other.safetensors", TI2V)
    found = comfyui.scan(comfy)
    with pytest.raises(
        ValueError, match=r"several transformers: .*--transformer .*other.*--transformer .*my_model"
    ) as error:
        comfyui.choose(found, FAMILIES)
    assert "wan2.2-ti2v-5b" in str(error.value)
    choice = comfyui.choose(found, FAMILIES, {"transformer": comfy / "diffusion_models/other.safetensors"})
    assert (choice.family, choice.files["vae"].name) == ("wan2.2-ti2v-5b", "new.safetensors")
    write_sparse(comfy / "vae/older.safetensors", VAE, "F32")
    with pytest.raises(ValueError, match=r"several VAEs: .*--vae .*old.*--vae .*older"):
        comfyui.choose(
            comfyui.scan(comfy), FAMILIES, {"transformer": comfy / "diffusion_models/wan/my_model.safetensors"}
        )


def test_a_pair_is_joined_by_its_names_and_a_half_is_not_enough(comfy: Path) -> None:
    (comfy / "diffusion_models/wan/my_model.safetensors").unlink()
    high = write_sparse(comfy / "diffusion_models/wan2.2_high_noise.safetensors", WIDE, mark=b"h")
    with pytest.raises(ValueError, match=r"wan2\.2_high_noise\.safetensors has no partner for the other noise"):
        comfyui.choose(comfyui.scan(comfy), FAMILIES)
    low = write_sparse(comfy / "unet/wan2.2_low_noise.safetensors", WIDE, mark=b"l")
    choice = comfyui.choose(comfyui.scan(comfy), FAMILIES)
    assert choice.family == "wan2.2-a14b"
    assert (choice.files["transformer"], choice.files["transformer_2"]) == (high, low)
