"""Pusa V0.5's published file takes its place beside the parts of Mochi, whoever brings it and however it is stored."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MochiTransformer3DModel
from model_folders import cached_snapshot
from safetensors.torch import save_file
from single_file_samples import matrices, scaled, transformer_tensors, write, write_gguf
from sparse_models import text_encoder_shapes, transformer_shapes, vae_shapes, write_sparse
from torch import Tensor

from pusa import PusaMochiTransformer3DModel, PusaPipeline, load_single_file, zoo
from pusa.models.files import WrongArchitectureError
from pusa.models.mochi import checkpoint, tiny
from pusa.models.sources import comfyui, file_parts, file_set
from pusa.models.sources.published import PublishedFile

CALL: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 7, "num_inference_steps": 2, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def tuned() -> MochiTransformer3DModel:
    """Make another transformer than that of the folder."""
    return tiny.components(seed=1)["transformer"]


@pytest.fixture(scope="module")
def genmo(tuned: MochiTransformer3DModel) -> dict[str, Tensor]:
    return checkpoint.transformer_to_original(tuned.state_dict())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    PusaPipeline(**tiny.components()).save_pretrained(tmp_path / "mochi")
    return tmp_path / "mochi"


@pytest.fixture
def file(tuned: MochiTransformer3DModel, tmp_path: Path) -> Path:
    checkpoint.save_transformer(tuned, tmp_path / "pusa_v0_dit.safetensors")
    return tmp_path / "pusa_v0_dit.safetensors"


@pytest.fixture(scope="module")
def full_size() -> dict[str, list[int]]:
    """Return the names and shapes of the published file."""
    with torch.device("meta"):
        model = MochiTransformer3DModel()
    return {key: list(value.shape) for key, value in checkpoint.transformer_to_original(model.state_dict()).items()}


def latents(pipe: PusaPipeline) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a duck", generator=torch.Generator().manual_seed(0), output_type="latent", **CALL).frames


def assert_holds(model: torch.nn.Module, expected: Mapping[str, Tensor]) -> None:
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(weights[key], value), key


def test_a_file_takes_the_place_of_a_folders_transformer(
    folder: Path, file: Path, tuned: MochiTransformer3DModel
) -> None:
    pipe = PusaPipeline.from_pretrained(folder, files={"transformer": file})
    assert type(pipe.transformer) is PusaMochiTransformer3DModel
    assert_holds(pipe.transformer, tuned.state_dict())
    assert pipe.defaults.frames_per_latent == 6
    assert pipe.scheduler.config.sigma_grid == "linear_quadratic"
    parts = tiny.components() | {"transformer": tiny.components(seed=1)["transformer"]}
    assert torch.equal(latents(pipe), latents(PusaPipeline(**parts)))


def test_a_file_in_diffusers_names_is_taken_too(tuned: MochiTransformer3DModel, tmp_path: Path) -> None:
    save_file(tuned.state_dict(), tmp_path / "model.safetensors")
    assert_holds(load_single_file(tmp_path / "model.safetensors")["transformer"], tuned.state_dict())


@pytest.mark.parametrize("by_row", [False, True], ids=["by tensor", "by row"])
def test_scaled_fp8_is_split_with_its_scales(genmo: dict[str, Tensor], tmp_path: Path, by_row: bool) -> None:
    stored, meant = scaled(genmo, matrices(genmo), by_row=by_row)
    path, expected = write(tmp_path / "fp8.safetensors", stored), checkpoint.transformer_to_diffusers(meant)
    assert_holds(load_single_file(path)["transformer"], expected)
    pytest.importorskip("torchao")
    kept = load_single_file(path, keep_quantized=True)["transformer"]
    inputs = _inputs()
    with torch.no_grad():
        whole = load_single_file(path)["transformer"](**inputs)[0]
        torch.testing.assert_close(kept(**inputs)[0], whole, rtol=0, atol=1e-5 * float(whole.max() - whole.min()))


def test_gguf_blocks_are_split(genmo: dict[str, Tensor], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    wide = {f"{name}.weight": "Q8_0" for name in matrices(genmo) if genmo[f"{name}.weight"].shape[1] % 32 == 0}
    path, meant = write_gguf(tmp_path / "mochi.gguf", genmo, wide, architecture="mochi")
    assert any(".qkv_x." in name for name in wide) or any(".w2." in name for name in wide)
    expected = checkpoint.transformer_to_diffusers(meant)
    whole = load_single_file(path)["transformer"]
    assert_holds(whole, expected)
    kept, inputs = load_single_file(path, keep_quantized=True)["transformer"], _inputs()
    with torch.no_grad():
        torch.testing.assert_close(kept(**inputs)[0], whole(**inputs)[0], rtol=0, atol=1e-4)


def _inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 12, 2, 4, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, tiny.TEXT_DIM, generator=generator),
        "timestep": torch.tensor([[1000.0, 250.0]]),
        "return_dict": False,
    }


def test_the_published_file_is_recognised_and_others_are_refused(
    full_size: dict[str, list[int]], tmp_path: Path
) -> None:
    families = zoo.families()
    ours = write_sparse(tmp_path / "any name.safetensors", full_size)
    for path in (ours, write_sparse(tmp_path / "comfyui.safetensors", full_size, prefix="model.diffusion_model.")):
        found = file_set.recognise(path)
        assert file_set.family_of({"transformer": path}, families) == "pusa-v0.5"
        assert file_set.describe(found, families) == "Mochi's transformer (bf16), 20 GB; fits pusa-v0.5"
    wan = write_sparse(tmp_path / "wan.safetensors", transformer_shapes("wan2.1-1.3b"))
    umt5 = write_sparse(tmp_path / "umt5.safetensors", text_encoder_shapes())
    vae = write_sparse(tmp_path / "vae.safetensors", vae_shapes("wan2.1"))
    mochi, small = families["pusa-v0.5"], families["wan2.1-1.3b"]
    file_parts.check_model({"transformer": ours}, *mochi, "pusa-v0.5")
    for part, path, model, message in (
        ("transformer", wan, mochi, "has 30 blocks of width 1536 and 16 channels, and it has 48 of 3072 and 12"),
        ("transformer", ours, small, "has 48 blocks of width 3072 and 12 channels, and it has 30 of 1536 and 16"),
        ("text_encoder", umt5, mochi, "is the UMT5 text encoder, and it reads text with another"),
        ("vae", vae, mochi, "with 16 latent channels, and it has 12"),
    ):
        with pytest.raises(WrongArchitectureError, match=message):
            file_parts.check_model({part: path}, *model, "it")
    with pytest.raises(WrongArchitectureError, match="has 48 blocks of width 3072"):
        PusaPipeline.from_pretrained("wan2.1-1.3b", files={"transformer": ours})


def test_comfyuis_folder_gives_the_transformer_and_no_part_of_wan(
    full_size: dict[str, list[int]], tmp_path: Path
) -> None:
    ours = write_sparse(tmp_path / "diffusion_models/pusa_v0_dit.safetensors", full_size)
    write_sparse(tmp_path / "text_encoders/umt5.safetensors", text_encoder_shapes())
    write_sparse(tmp_path / "vae/wan.safetensors", vae_shapes("wan2.1"))
    choice = comfyui.choose(comfyui.scan(tmp_path), zoo.families())
    assert (choice.family, choice.files) == ("pusa-v0.5", {"transformer": ours})


# ---- the Hub, offline ------------------------------------------------------------------------------------------------


def cached(cache: Path, hub_id: str, content: Path) -> None:
    """Put a folder or a file into a local cache of the Hub."""
    place = cached_snapshot(cache, hub_id)
    if content.is_dir():
        content.rename(place)
    else:
        place.mkdir()
        content.rename(place / content.name)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tuned: MochiTransformer3DModel) -> zoo.ZooModel:
    """Put a Pusa V0.5 with a transformer of the tiny size into the zoo."""
    config = dict(zoo.get("pusa-v0.5").transformer)
    config |= {name: value for name, value in tuned.config.items() if name in config and not name.startswith("_")}
    weights = PublishedFile("someone/tiny-v0.5", "pusa_v0_dit.safetensors", 10**6)
    changes: dict[str, Any] = {"hub_id": "someone/tiny-mochi", "weights": {"transformer": weights}}
    small = replace(zoo.get("pusa-v0.5"), transformer=config, parameters={"transformer": 10**5}, **changes)
    monkeypatch.setitem(zoo.ZOO, "pusa-v0.5", small)
    return small


def test_the_zoo_takes_its_own_weights_and_the_parts_of_the_base(
    model: zoo.ZooModel, folder: Path, file: Path, tuned: MochiTransformer3DModel, tmp_path: Path
) -> None:
    base, cache = tiny.components()["transformer"], tmp_path / "cache"
    (folder / "transformer/diffusion_pytorch_model.safetensors").rename(tmp_path / "weights")
    cached(cache, "someone/tiny-mochi", folder)
    load: dict[str, Any] = {"cache_dir": cache, "local_files_only": True, "dtype": torch.float32}
    with pytest.raises(
        FileNotFoundError, match=r"someone/tiny-v0\.5/pusa_v0_dit\.safetensors, the transformer of pusa"
    ):
        PusaPipeline.from_pretrained("pusa-v0.5", **load)
    cached(cache, "someone/tiny-v0.5", file)
    pipe = PusaPipeline.from_pretrained("pusa-v0.5", **load)
    assert_holds(pipe.transformer, tuned.state_dict())
    assert pipe.defaults == model.defaults
    assert pipe.text_encoder_identity == "someone/tiny-mochi@abc123"
    parts = tiny.components() | {"transformer": tiny.components(seed=1)["transformer"]}
    assert torch.equal(latents(pipe), latents(PusaPipeline(**parts)))

    place = cache / "models--someone--tiny-mochi/snapshots/abc123/transformer/diffusion_pytorch_model.safetensors"
    (tmp_path / "weights").rename(place)
    stock = PusaPipeline.from_pretrained("someone/tiny-mochi", **load)  # the base itself, by its own name
    assert_holds(stock.transformer, base.state_dict())


def test_another_file_under_the_published_name_is_refused(model: zoo.ZooModel, folder: Path, tmp_path: Path) -> None:
    cached(tmp_path / "cache", "someone/tiny-mochi", folder)
    other = write(tmp_path / "pusa_v0_dit.safetensors", transformer_tensors())
    cached(tmp_path / "cache", "someone/tiny-v0.5", other)
    with pytest.raises(WrongArchitectureError, match=r"pusa_v0_dit\.safetensors has 1 blocks of width 96"):
        PusaPipeline.from_pretrained("pusa-v0.5", cache_dir=tmp_path / "cache", local_files_only=True)
