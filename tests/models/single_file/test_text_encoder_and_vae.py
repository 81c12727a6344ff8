"""UMT5 encoders, their tokenizers and the VAEs come out of single files; T5 v1.1 and parts of files do not."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from single_file_samples import HEADS, Tensors, transformer_tensors, write
from torch import nn

from pusa import load_single_file
from pusa.models import original
from pusa.models.files import WrongArchitectureError
from pusa.models.original import WAN22_VAE
from pusa.models.single_file.recognition import recognise
from pusa.models.single_file.text_encoder import write_tokenizer


def spiece_model(*, byte_fallback: bool = True) -> torch.Tensor:
    """A sentencepiece model like UMT5's, as the tensor of a file."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat walks on grass", "a train in the snow", "realistic, slow motion"] * 20),
        model_writer=written,
        vocab_size=330 if byte_fallback else 60,
        model_type="unigram",
        byte_fallback=byte_fallback,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    return torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8).clone()


@pytest.fixture
def encoder(tiny_text_encoder: Any) -> Any:
    return tiny_text_encoder(seed=3)


def names_of(encoder: nn.Module) -> Tensors:
    return {name: value for name, value in encoder.state_dict().items() if "embed_tokens" not in name}


def assert_same(loaded: nn.Module, wanted: nn.Module) -> None:
    expected = wanted.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


# ---- text encoder --------------------------------------------------------------------------------------------------


def test_names_of_transformers_and_of_wan(tmp_path: Path, encoder: Any) -> None:
    hf = names_of(encoder)
    tied = {"encoder.embed_tokens.weight" if name == "shared.weight" else name: value for name, value in hf.items()}
    decoder = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(2, 2), "lm_head.weight": torch.zeros(2, 2)}
    wan = original.text_encoder_to_original(hf)
    for name, tensors, names in (
        ("hf", hf, "hf"),
        ("tied", tied, "hf"),
        ("both", encoder.state_dict(), "hf"),
        ("whole", hf | decoder, "hf"),
        ("wan", wan, "wan"),
    ):
        path = write(tmp_path / f"{name}.safetensors", tensors)
        assert recognise(path).parts[0].names == names
        loaded = load_single_file(path)
        assert loaded.keys() == {"text_encoder"}
        assert_same(loaded["text_encoder"], encoder)
        assert loaded["text_encoder"].encoder.embed_tokens.weight is loaded["text_encoder"].shared.weight


def test_prompts_are_read_as_before(tmp_path: Path, encoder: Any) -> None:
    loaded = load_single_file(write(tmp_path / "umt5.safetensors", names_of(encoder)))["text_encoder"]
    tokens = torch.tensor([[5, 9, 1, 0]])
    with torch.no_grad():
        assert torch.equal(loaded(tokens).last_hidden_state, encoder(tokens).last_hidden_state)


def test_a_plain_t5_is_no_umt5(tmp_path: Path, encoder: Any) -> None:
    plain = {n: v for n, v in names_of(encoder).items() if "block.1" not in n or "relative_attention_bias" not in n}
    path = write(tmp_path / "t5xxl.safetensors", plain)
    with pytest.raises(WrongArchitectureError, match=r"T5 v1\.1 encoder \(not UMT5\): 1 of its 2 blocks"):
        load_single_file(path)


def test_a_missing_layer_is_named(tmp_path: Path, encoder: Any) -> None:
    short = {n: v for n, v in names_of(encoder).items() if n != "encoder.block.1.layer.1.DenseReluDense.wo.weight"}
    with pytest.raises(WrongArchitectureError, match=r"encoder\.block\.1\.layer\.1\.DenseReluDense\.wo\.weight"):
        load_single_file(write(tmp_path / "umt5.safetensors", short))


# ---- tokenizer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_the_tokenizer_inside_is_its_own_sentencepiece_model(tmp_path: Path, encoder: Any, byte_fallback: bool) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    spiece = spiece_model(byte_fallback=byte_fallback)
    path = write(tmp_path / "umt5.safetensors", names_of(encoder) | {"spiece_model": spiece})
    loaded = load_single_file(path)
    assert loaded.keys() == {"text_encoder", "tokenizer"}
    assert loaded.notes == ()
    written = write_tokenizer(recognise(path), tmp_path / "tokenizer")
    assert written.read_bytes() == spiece.numpy().tobytes()
    own = sentencepiece.SentencePieceProcessor(model_file=str(written))
    for text in ("a cat walks", "snow on the train, 4 cats", "Brücke 猫 🎈"):
        assert loaded["tokenizer"](text).input_ids == [*own.encode(text), 1]
    assert loaded["tokenizer"]("a cat", padding="max_length", max_length=8).input_ids[-1] == 0


def test_a_tokenizer_that_cannot_be_read_is_left_out_with_a_note(tmp_path: Path, encoder: Any) -> None:
    stand_in = torch.arange(192, dtype=torch.uint8)
    path = write(tmp_path / "umt5.safetensors", names_of(encoder) | {"spiece_model": stand_in})
    loaded = load_single_file(path)
    assert loaded.keys() == {"text_encoder"}
    assert "the tokenizer in umt5.safetensors cannot be read" in loaded.notes[0]
    assert write_tokenizer(recognise(path), tmp_path).read_bytes() == bytes(range(192))
    with pytest.raises(ValueError, match="holds no tokenizer"):
        write_tokenizer(recognise(write(tmp_path / "without.safetensors", names_of(encoder))), tmp_path)


# ---- VAE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.", "vae.", "first_stage_model."])
def test_the_vae_of_wan21(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16)
    wan = original.vae_to_original(vae.state_dict())
    flat = {name: value.flatten() if name.endswith("gamma") else value for name, value in wan.items()}
    for index, tensors in enumerate((wan, flat)):
        path = write(tmp_path / f"{index}.safetensors", tensors, prefix=prefix)
        assert recognise(path).parts[0].family == "wan2.1-vae"
        assert_same(load_single_file(path)["vae"], vae)


@pytest.mark.parametrize("names", ["wan", "diffusers"])
def test_the_vae_of_wan22_when_whole(tmp_path: Path, names: str) -> None:
    sizes = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4, decoder_base_dim=4, z_dim=48, **sizes)
    tensors = vae.state_dict() if names == "diffusers" else WAN22_VAE.to_original(vae.state_dict())
    path = write(tmp_path / "wan2.2_vae.safetensors", tensors)
    file = recognise(path)
    assert (file.parts[0].family, file.parts[0].out_channels, file.parts[0].names) == ("wan2.2-vae", 48, names)
    loaded = load_single_file(path)["vae"]
    assert_same(loaded, vae)
    assert (loaded.config.z_dim, len(loaded.config.latents_mean), len(loaded.config.latents_std)) == (48, 48, 48)
    video = torch.rand(1, 3, 1, 32, 32)
    with torch.no_grad():
        assert loaded.encode(video).latent_dist.mode().shape == (1, 48, 1, 2, 2)
    some = dict(list(tensors.items())[:-1])
    with pytest.raises(WrongArchitectureError, match=r"the Wan2\.2 VAE in .* 1 weights are in no file"):
        load_single_file(write(tmp_path / "short.safetensors", some))


# ---- all in one ----------------------------------------------------------------------------------------------------


def test_an_all_in_one_file_gives_its_components(tmp_path: Path, encoder: Any) -> None:
    torch.manual_seed(0)
    vae, transformer = AutoencoderKLWan(base_dim=4, z_dim=16), transformer_tensors()
    tensors = {
        **{f"model.diffusion_model.{name}": value for name, value in transformer.items()},
        **{f"text_encoders.umt5xxl.transformer.{name}": value for name, value in names_of(encoder).items()},
        **{f"vae.{name}": value for name, value in original.vae_to_original(vae.state_dict()).items()},
        "text_encoders.spiece_model": spiece_model(),
    }
    path = tmp_path / "all.safetensors"
    save_file({name: value.clone() for name, value in tensors.items()}, path)
    assert recognise(path).components == ("transformer", "text_encoder", "vae")
    for config in (HEADS, {"transformer": HEADS, "vae": {"z_dim": 16}}):
        loaded = load_single_file(path, config=config, torch_dtype={"default": torch.bfloat16, "vae": torch.float32})
        assert list(loaded) == ["transformer", "text_encoder", "vae", "tokenizer"]
        assert_same(loaded["vae"], vae)
        assert loaded["transformer"].dtype == loaded["text_encoder"].dtype == torch.bfloat16
    with pytest.raises(WrongArchitectureError, match="width of 96"):
        load_single_file(path)
    only_others = load_single_file(path, config={"base_dim": 4})
    assert list(only_others) == ["text_encoder", "vae", "tokenizer"]
    assert only_others.notes[0].startswith("left out: a Wan text-to-video transformer")
