"""Weights as Wan publishes them become diffusers' and back: all names, and all bits."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from _golden import within
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from model_folders import write_transformer
from safetensors.torch import load_file
from transformers import UMT5EncoderModel

from pusa import PusaPipeline, zoo
from pusa.models import files, original, tiny
from pusa.models.tensors import UnsafeFileError, load_tensors
from pusa.models.wan import PusaWanTransformer3DModel

TEXT_TO_VIDEO = {
    "wan2.1_t2v_14b_original": "wan2.1_t2v_14b_diffusers",
    "wan2.1_t2v_1.3b_original": "wan2.1_t2v_1.3b_diffusers",
    "wan2.2_t2v_a14b_original_each_expert": "wan2.1_t2v_14b_diffusers",
}
IMAGE_TO_VIDEO = ("wan2.1_i2v_14b_original", "wan2.2_i2v_a14b_original_each_expert")


def shapes_of(golden: Path, name: str) -> dict[str, list[int]]:
    return json.loads((golden / "keys" / f"{name}.json").read_text())


def shapes_in(model: torch.nn.Module) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in model.state_dict().items()}


@pytest.fixture
def wan21(golden: Path, tmp_path: Path) -> Path:
    """A folder laid out as Wan2.1's, with the recorded tiny weights."""
    folder = tmp_path / "Wan2.1-T2V-tiny"
    write_transformer(folder, load_file(golden / "transformer/weights_original.safetensors"), shards=2)
    torch.save(load_file(golden / "vae/weights_original.safetensors"), folder / "Wan2.1_VAE.pth")
    text = load_file(golden / "text/weights_original.safetensors")
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    tiny.tokenizer().save_pretrained(folder / "google/umt5-xxl")
    return folder


# ---- names of the full-size models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "diffusers_name"), TEXT_TO_VIDEO.items())
def test_full_size_transformers_match_key_by_key_in_both_directions(
    golden: Path, name: str, diffusers_name: str
) -> None:
    shapes = shapes_of(golden, name)
    with torch.device("meta"):
        model = WanTransformer3DModel(**original.config_from_keys(shapes))
    assert original.transformer_to_diffusers(shapes) == shapes_in(model) == shapes_of(golden, diffusers_name)
    assert original.transformer_to_original(shapes_in(model)) == shapes


@pytest.mark.parametrize("name", IMAGE_TO_VIDEO)
def test_image_to_video_names_convert_too_but_are_refused_as_a_base(golden: Path, name: str) -> None:
    shapes = shapes_of(golden, name)
    image = {"image_dim": 1280, "added_kv_proj_dim": 5120} if "2.1" in name else {}
    with torch.device("meta"):
        model = WanTransformer3DModel(in_channels=36, **image)
    assert original.transformer_to_diffusers(shapes) == shapes_in(model)
    assert original.transformer_to_original(shapes_in(model)) == shapes
    with pytest.raises(files.WrongArchitectureError, match=r"image-to-video.*\(36 input channels.*text-to-video base"):
        original.config_from_keys(shapes)


def test_full_size_vae_matches_in_both_directions(golden: Path) -> None:
    shapes = shapes_of(golden, "wan2.1_vae_original")
    with torch.device("meta"):
        vae = AutoencoderKLWan(**original.vae_config_from_keys(shapes))
    assert original.vae_to_diffusers(shapes) == shapes_in(vae) == shapes_of(golden, "wan2.1_vae_diffusers")
    assert original.vae_to_original(shapes_in(vae)) == shapes


def test_full_size_text_encoder_matches_in_both_directions(golden: Path) -> None:
    shapes = shapes_of(golden, "umt5_xxl_encoder_original")
    with torch.device("meta"):
        encoder = UMT5EncoderModel(original.text_encoder_config_from_keys(shapes))
    tied_once = {key: shape for key, shape in shapes_in(encoder).items() if key != "encoder.embed_tokens.weight"}
    assert original.text_encoder_to_transformers(shapes) == tied_once
    assert original.text_encoder_to_original(shapes_in(encoder)) == shapes


@pytest.mark.parametrize("name", [*TEXT_TO_VIDEO, *IMAGE_TO_VIDEO])
def test_renaming_agrees_with_the_single_file_converter_of_diffusers(golden: Path, name: str) -> None:
    shapes = shapes_of(golden, name)
    assert original.transformer_to_diffusers(shapes) == convert_wan_transformer_to_diffusers(dict(shapes))
    vae = shapes_of(golden, "wan2.1_vae_original")
    assert original.vae_to_diffusers(vae) == convert_wan_vae_to_diffusers(dict(vae))


def test_the_zoo_knows_the_published_sizes(golden: Path) -> None:
    counts = json.loads((golden / "keys/hashes.json").read_text())["param_counts"]
    for name, key in (("wan2.1-14b", "wan2.1_t2v_14b"), ("wan2.1-1.3b", "wan2.1_t2v_1.3b")):
        model = zoo.get(name)
        config = original.config_from_keys(shapes_of(golden, f"{key}_original"))
        assert model.transformer.items() <= config.items()
        assert model.parameters["transformer"] == counts[f"{key}_original"]
        assert model.parameters["text_encoder"] == counts["umt5_xxl_encoder_original"]
        assert model.parameters["vae"] == counts["wan2.1_vae_original"]
    expert = counts["wan2.2_t2v_a14b_original_each_expert"]
    wan22 = zoo.get("wan2.2-a14b")
    assert (wan22.parameters["transformer"], wan22.parameters["transformer_2"]) == (expert, expert)


def test_shards_convert_one_by_one_and_no_tensor_is_copied(golden: Path) -> None:
    whole = load_file(golden / "transformer/weights_original.safetensors")
    keys = sorted(whole)
    parts = [{key: whole[key] for key in keys[:40]}, {key: whole[key] for key in keys[40:]}]
    joined = {key: value for part in parts for key, value in original.transformer_to_diffusers(part).items()}
    assert joined.keys() == original.transformer_to_diffusers(whole).keys()
    assert {value.data_ptr() for value in joined.values()} == {value.data_ptr() for value in whole.values()}


def test_foreign_tensors_are_refused_by_name(golden: Path) -> None:
    shapes = shapes_of(golden, "wan2.1_t2v_1.3b_original")
    with pytest.raises(files.WrongArchitectureError, match=r"1 of 826 tensors .* Wan transformer: vace_blocks.0.x"):
        original.config_from_keys(shapes | {"vace_blocks.0.x": [1]})
    with pytest.raises(files.WrongArchitectureError, match="no Wan transformer"):
        original.config_from_keys({"model.layers.0.weight": [1]})
    with pytest.raises(files.WrongArchitectureError, match="48 latent channels"):
        original.vae_config_from_keys(shapes_of(golden, "wan2.1_vae_original") | {"conv2.weight": [48, 48, 1, 1, 1]})


def test_heads_of_another_size_than_128_need_num_heads(golden: Path) -> None:
    shapes = {key: list(t.shape) for key, t in load_file(golden / "transformer/weights_original.safetensors").items()}
    recorded = json.loads((golden / "transformer/config.json").read_text())["diffusers_config"]
    config = original.config_from_keys(shapes, num_heads=3)
    assert {
        key: list(value) if isinstance(value, tuple) else value for key, value in config.items()
    }.items() <= recorded.items()
    with pytest.raises(files.WrongArchitectureError, match=r"width of 96 .* config\.json must say num_heads"):
        original.config_from_keys(shapes)


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "to_other", "to_original", "other"),
    [
        ("transformer", original.transformer_to_diffusers, original.transformer_to_original, "diffusers"),
        ("vae", original.vae_to_diffusers, original.vae_to_original, "diffusers"),
        ("text", original.text_encoder_to_transformers, original.text_encoder_to_original, "transformers"),
    ],
)
def test_converted_weights_are_the_recorded_ones_bit_for_bit(golden: Path, part, to_other, to_original, other) -> None:
    wan = load_file(golden / part / "weights_original.safetensors")
    hugging_face = load_file(golden / part / f"weights_{other}.safetensors")
    for converted, expected in ((to_other(wan), hugging_face), (to_original(hugging_face), wan)):
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[key], expected[key]) for key in expected)


def test_models_from_original_files_compute_what_the_original_computed(golden: Path, wan21: Path) -> None:
    """Within twice the error that each `parity.json` records for a faithful implementation."""

    def recorded(part: str) -> dict:
        return json.loads((golden / part / "parity.json").read_text())

    parts = original.load_components(wan21, dtype=torch.float32)
    with torch.no_grad():
        case = load_file(golden / "transformer/case_multi_frame.safetensors")
        transformer = PusaWanTransformer3DModel.from_wan(parts["transformer"])
        output = transformer(case["latents"], case["timestep"], case["context"], return_dict=False)[0]
        limit = 2 * recorded("transformer")["multi_frame"]["diffusers_2d_vs_ref_maxabs"]
        assert (output - case["output"]).abs().max() <= limit

        case = load_file(golden / "vae/case_5frames.safetensors")
        limits = recorded("vae")["5_frames"]
        mean, std = (
            torch.tensor(v).view(1, -1, 1, 1, 1)
            for v in (parts["vae"].config.latents_mean, parts["vae"].config.latents_std)
        )
        encoded = (parts["vae"].encode(case["video"]).latent_dist.mode() - mean) / std
        limit = within(limits["encode_diffusers_vs_ref"], case["encoded"])
        assert (encoded - case["encoded"]).abs().max() <= limit
        decoded = parts["vae"].decode(case["latents"] * std + mean).sample
        assert (decoded - case["decoded"]).abs().max() <= 2 * limits["decode_diffusers_clamped_vs_ref"]

        case = load_file(golden / "text/case_len32.safetensors")
        output = parts["text_encoder"](case["input_ids"], case["attention_mask"]).last_hidden_state
        valid = case["attention_mask"].bool()
        limit = 2 * recorded("text")["len32"]["transformers_vs_ref_valid_tokens"]
        assert (output - case["encoder_output"])[valid].abs().max() <= limit


def test_reduced_precision_keeps_the_same_parts_in_fp32_as_diffusers(wan21: Path, tmp_path: Path) -> None:
    ours = original.load_transformer(wan21, torch.bfloat16)
    ours.save_pretrained(tmp_path / "diffusers")
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "diffusers", torch_dtype=torch.bfloat16)
    expected = stock.state_dict()
    assert {value.dtype for value in expected.values()} == {torch.bfloat16, torch.float32}
    for key, value in ours.state_dict().items():
        assert value.dtype == expected[key].dtype, key
        assert torch.equal(value, expected[key]), key
    assert not ours.training
    assert not ours.rope.freqs_cos.is_meta


# ---- folders -------------------------------------------------------------------------------------------------------


def generate(pipe: PusaPipeline) -> torch.Tensor:
    embeds = torch.randn(1, 32, 48, generator=torch.Generator().manual_seed(1))
    pipe.set_progress_bar_config(disable=True)
    result = pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=-embeds,
        height=32,
        width=48,
        num_frames=5,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    return result.frames


def test_an_original_folder_makes_the_same_video_as_its_diffusers_copy(wan21: Path, tmp_path: Path) -> None:
    pipe = PusaPipeline.from_pretrained(wan21)
    pipe.save_pretrained(tmp_path / "copy")
    video = generate(pipe)
    assert video.shape == (1, 5, 3, 32, 48)
    assert torch.equal(video, generate(PusaPipeline.from_pretrained(str(tmp_path / "copy"))))
    assert pipe.transformer_2 is None
    assert pipe.scheduler.config.shift == 5.0


def test_a_wan22_folder_has_two_experts_and_their_boundary(golden: Path, wan21: Path) -> None:
    high = load_file(golden / "transformer/weights_original.safetensors")
    low = {key: value + 1 if key == "head.head.bias" else value for key, value in high.items()}
    for path in wan21.glob("diffusion_pytorch_model*"):
        path.unlink()
    write_transformer(wan21 / "high_noise_model", high)
    write_transformer(wan21 / "low_noise_model", low, shards=3)
    pipe = PusaPipeline.from_pretrained(wan21)
    assert pipe.config.boundary_ratio == 0.875
    assert torch.equal(pipe.transformer_2.proj_out.bias, pipe.transformer.proj_out.bias + 1)
    assert generate(pipe).isfinite().all()

    (wan21 / "low_noise_model/diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(files.MissingFilesError, match=r"missing: low_noise_model/\S+-00002-of-00003\.safetensors$"):
        PusaPipeline.from_pretrained(wan21)


def test_every_missing_file_is_named_at_once_before_anything_is_read(
    wan21: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = ["diffusion_pytorch_model-00002-of-00002.safetensors", "Wan2.1_VAE.pth", "google/umt5-xxl/tokenizer.json"]
    for name in gone:
        (wan21 / name).unlink()
    monkeypatch.setattr(original, "fill", lambda *_, **__: pytest.fail("weights were read"))
    gone[2] = "google/umt5-xxl/spiece.model"  # either of the two would do
    assert files.missing_files(wan21) == gone
    with pytest.raises(files.MissingFilesError, match=f"missing: {', '.join(gone)}"):
        PusaPipeline.from_pretrained(wan21)
    assert files.missing_files(wan21, skip=["vae", "tokenizer"]) == gone[:1]


def test_without_an_index_the_numbers_of_the_shards_tell_what_is_missing(wan21: Path) -> None:
    (wan21 / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert files.missing_files(wan21) == []
    (wan21 / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    assert files.missing_files(wan21) == ["diffusion_pytorch_model-00001-of-00002.safetensors"]


def test_files_cut_short_by_a_broken_download_are_found_out(wan21: Path) -> None:
    for name in ("diffusion_pytorch_model-00001-of-00002.safetensors", "Wan2.1_VAE.pth"):
        path = wan21 / name
        path.write_bytes(path.read_bytes()[:-100])
    (wan21 / "diffusion_pytorch_model-00002-of-00002.safetensors").write_bytes(b"oops")
    first, second, vae = files.missing_files(wan21)
    assert first.startswith("diffusion_pytorch_model-00001-of-00002.safetensors (cut short: ")
    assert second == (
        "diffusion_pytorch_model-00002-of-00002.safetensors "
        "(no whole safetensors file: it has 4 bytes; download or copy it again)"
    )
    assert vae.startswith("Wan2.1_VAE.pth (cut short: ")
    with pytest.raises(files.MissingFilesError, match="cut short"):
        PusaPipeline.from_pretrained(wan21)


def test_an_image_to_video_folder_is_refused(wan21: Path) -> None:
    (wan21 / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "i2v", "num_heads": 3}))
    with pytest.raises(files.WrongArchitectureError, match="model_type='i2v': Pusa needs a text-to-video base"):
        PusaPipeline.from_pretrained(wan21)


def test_a_folder_without_all_weights_in_its_shards_is_refused(golden: Path, wan21: Path) -> None:
    tensors = load_file(golden / "transformer/weights_original.safetensors")
    del tensors["blocks.1.norm3.bias"]
    write_transformer(wan21, tensors, shards=2)
    with pytest.raises(files.WrongArchitectureError, match=r"1 weights are in no file: blocks\.1\.norm2\.bias"):
        PusaPipeline.from_pretrained(wan21)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(wan21: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"conv1.weight": torch.zeros(1), "extra": Payload(marker)}, wan21 / "Wan2.1_VAE.pth")
    with pytest.raises(UnsafeFileError, match=r"Wan2\.1_VAE\.pth holds more than tensors"):
        PusaPipeline.from_pretrained(wan21)
    (wan21 / "Wan2.1_VAE.pth").write_bytes(pickle.dumps(Payload(marker), protocol=2))  # not even a torch file
    with pytest.raises(UnsafeFileError, match="holds more than tensors"):
        load_tensors(wan21 / "Wan2.1_VAE.pth")
    assert not marker.exists()


def test_a_wrapped_state_dict_and_old_pickles_load(golden: Path, tmp_path: Path) -> None:
    weights = load_file(golden / "vae/weights_original.safetensors")
    torch.save({"model_state": weights}, tmp_path / "a.pth")
    torch.save(weights, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    for name in ("a.pth", "b.pth"):
        loaded = load_tensors(tmp_path / name)
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[key], weights[key]) for key in weights)
    torch.save([torch.zeros(1)], tmp_path / "c.pth")
    with pytest.raises(UnsafeFileError, match=r"c\.pth is no state dict"):
        load_tensors(tmp_path / "c.pth")
