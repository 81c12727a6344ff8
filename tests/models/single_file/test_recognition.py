"""A single file is recognised by its content, from its header, without torch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from single_file_samples import Tensors, transformer_tensors, write

from pusa import load_single_file
from pusa.models.files import DamagedFileError, WrongArchitectureError, describe_single_file
from pusa.models.single_file.recognition import recognise


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return transformer_tensors()


@pytest.mark.parametrize(
    ("signs", "family", "name"),
    [
        (["vace_patch_embedding.weight", "vace_blocks.0.after_proj.weight"], "vace", "a VACE model"),
        (["casual_audio_encoder.weights"], "s2v", "S2V"),
        (["face_adapter.fuser_blocks.0.q.weight"], "animate", "Animate"),
        (["multitalk_audio_proj.norm.weight"], "multitalk", "MultiTalk"),
        (["audio_proj.audio_proj_glob_1.layer.weight"], "humo", "HuMo"),
        (["blocks.0.cam_encoder.weight"], "recammaster", "ReCamMaster"),
        (["ref_adapter.blocks.0.q.weight"], "lynx", "Lynx"),
        (["control_adapter.conv.weight"], "fun_camera", "Fun camera control"),
        (["ref_conv.weight"], "fun_control", "Fun control"),
        (["img_emb.proj.0.weight", "blocks.0.cross_attn.k_img.weight"], "i2v", "image-to-video"),
        (["img_emb.emb_pos"], "flf2v", "first-and-last-frame"),
    ],
)
def test_families_that_pass_every_check_of_shapes(
    tmp_path: Path, tensors: Tensors, signs: list[str], family: str, name: str
) -> None:
    path = write(tmp_path / "wan2.1_t2v_14B.safetensors", tensors | {sign: torch.zeros(2, 2) for sign in signs})
    assert recognise(path).parts[0].family == family
    with pytest.raises(WrongArchitectureError, match=name):
        load_single_file(path, config={"num_attention_heads": 3})


@pytest.mark.parametrize(
    ("channels", "name"),
    [((36, 16), "image-to-video"), ((48, 16), "Fun control"), ((52, 16), "Fun control"), ((20, 16), "unknown kind")],
)
def test_families_that_channels_tell(tmp_path: Path, channels: tuple[int, int], name: str) -> None:
    tensors = transformer_tensors(in_channels=channels[0], out_channels=channels[1])
    with pytest.raises(WrongArchitectureError, match=name):
        load_single_file(write(tmp_path / "wan.safetensors", tensors))


@pytest.mark.parametrize(
    ("name", "noise", "expert"),
    [
        ("wan2.2_t2v_high_noise_14B_fp8_scaled", "high", "transformer"),
        ("Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ", "low", "transformer_2"),
        ("Wan2.2-T2V-A14B-HighNoise-Q4_K_M", "high", "transformer"),
        ("wan2.1_t2v_14B_fp8_scaled", None, None),
        ("slowflow_glow", None, None),
    ],
)
def test_only_the_name_tells_high_from_low(
    tmp_path: Path, tensors: Tensors, name: str, noise: str | None, expert: str | None
) -> None:
    file = recognise(write(tmp_path / f"{name}.safetensors", tensors))
    assert (file.noise, file.expert) == (noise, expert)


def test_sizes_are_those_of_the_tensors(tmp_path: Path, tensors: Tensors) -> None:
    path = write(tmp_path / "wan.safetensors", {name: value.bfloat16() for name, value in tensors.items()})
    file, part = recognise(path), recognise(path).parts[0]
    assert (part.width, part.layers, part.text_width, part.heads) == (96, 1, 48, None)
    assert part.parameters == sum(value.numel() for value in tensors.values())
    assert part.size_bytes == 2 * part.parameters < file.size_bytes == path.stat().st_size
    assert (file.title, file.problem) == ("a Wan text-to-video transformer, bf16", "")


def test_other_files(tmp_path: Path, tensors: Tensors) -> None:
    lora = write(tmp_path / "style.safetensors", {"blocks.0.self_attn.q.lora_A.weight": torch.zeros(1, 1)})
    assert recognise(lora).is_lora
    with pytest.raises(WrongArchitectureError, match="it is a LoRA: give it with --lora"):
        load_single_file(lora)
    other = write(tmp_path / "sdxl.safetensors", {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1, 1)})
    with pytest.raises(WrongArchitectureError, match="no part of a Wan or Mochi model"):
        load_single_file(other)
    with pytest.raises(WrongArchitectureError, match="holds no tensors"):
        load_single_file(write(tmp_path / "none.safetensors", {}))
    for name in ("clip.mp4", "model.pth", "model.gguf", "list.safetensors"):
        header = b"[1]"
        (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(DamagedFileError, match=r"is no (?:safetensors|GGUF) file"):
            recognise(tmp_path / name)


def test_an_error_about_a_file_given_as_a_model_says_what_it_is(tmp_path: Path, tensors: Tensors) -> None:
    good = write(tmp_path / "good.safetensors", tensors)
    assert "is a single-file checkpoint of the transformer, not a folder" in describe_single_file(good)
    vace = write(tmp_path / "vace.safetensors", tensors | {"vace_blocks.0.norm.weight": torch.zeros(2)})
    assert "vace.safetensors holds a VACE model" in describe_single_file(vace)


def test_recognition_loads_no_torch(tmp_path: Path, tensors: Tensors) -> None:
    path = write(tmp_path / "wan.safetensors", tensors)
    program = (
        "import sys; from pusa.models.single_file.recognition import recognise; "
        f"print(recognise({str(path)!r}).title, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "a Wan text-to-video transformer, fp32 False"
