"""A person says which file goes to which expert of Wan2.2, and how strongly, or the file's name does."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lora_samples import Pairs, comfyui, make_pairs, pipe, write

from pusa.lora import load_pusa
from pusa.lora.adapters import lora_layers
from pusa.lora.placement import place_loras
from pusa.lora.sources import EXPERTS, expert_of, parse_lora, public_name, replace_loras, stem_of

HIGH = (
    "high_noise_pusa.safetensors",
    "Wan22_PusaV1_lora_HIGH_resized_dynamic_avg_rank_98_bf16.safetensors",
    "Wan2.2-T2V-A14B-HighNoise.safetensors",
    "wan22HighNoise.safetensors",
    "T2VHigh.safetensors",
    "my_glow_high_noise.safetensors",
    "low_rank_64_high_noise.safetensors",
    "style_H.safetensors",
    "NSFW-22-H-e8.safetensors",
    "style-HN.safetensors",
    "pusaHN.safetensors",
    "HIGH_rank64.safetensors",
    "high.safetensors",
    "loras/high_noise/adapter_model.safetensors",
)
LOW = (
    "low-noise.safetensors",
    "low noise lora.safetensors",
    "lownoise.safetensors",
    "slowmo_LOW_v1.1.safetensors",
    "wan2.2_style_l_000020.safetensors",
    "style_LN_v2.safetensors",
    "owner/repo/low_noise_model.safetensors",
    "loras/LowNoise/lora.pt",
)
NEITHER = (
    "glow.safetensors",
    "GLow.safetensors",
    "slowmo.safetensors",
    "SlowMo.safetensors",
    "yellow_style.safetensors",
    "highway.safetensors",
    "HighWay.safetensors",
    "follow-below.safetensors",
    "thigh_highs.safetensors",
    "low_poly_style.safetensors",
    "high_res_fix.safetensors",
    "size_XL.safetensors",
    "H100.safetensors",
    "L.safetensors",
    "high_low_combined.safetensors",
    "loras/low/style.safetensors",
)


@pytest.mark.parametrize("name", HIGH)
def test_a_name_with_high_noise_in_it_is_the_first_experts(name: str) -> None:
    assert expert_of(name) == "transformer"


@pytest.mark.parametrize("name", LOW)
def test_a_name_with_low_noise_in_it_is_the_second_experts(name: str) -> None:
    assert expert_of(name) == "transformer_2"


@pytest.mark.parametrize("name", NEITHER)
def test_high_and_low_inside_words_or_of_something_else_tell_nothing(name: str) -> None:
    assert expert_of(name) is None


def test_the_two_files_of_a_pair_have_one_stem() -> None:
    for high, low in (("x_HIGH_y.pt", "x_LOW_y.pt"), ("a/high_noise/l.pt", "a/low_noise/l.pt"), ("sH.pt", "sH.pt")):
        assert stem_of(high) == stem_of(low)
    assert stem_of("pusa_high.pt") != stem_of("lightning_low.pt")


def test_strengths_and_experts_are_written_with_the_file(tmp_path: Path) -> None:
    assert parse_lora("a.safetensors@1.2").strengths == {"": 1.2}
    both = parse_lora("high=a, b.safetensors@.5,LOW_noise=owner/repo@-2")
    assert both.files == {"transformer": "a, b.safetensors", "transformer_2": "owner/repo"}
    assert both.strengths == {"transformer": 0.5, "transformer_2": -2.0}
    assert str(both) == "high=a, b.safetensors@0.5,low=owner/repo@-2"
    assert public_name("high=/x/a.pt@1.2,low=/y/b.pt") == "high=a.pt@1.2,low=b.pt"


def test_files_that_lie_elsewhere_keep_their_strength_and_expert() -> None:
    stored = ["high=a.pt@1.2,low=b.pt", "style.pt@0.5"]
    moved = replace_loras(stored, ["/x/a.pt", "/x/b.pt", "/y/style.pt"])
    assert moved == ["high=/x/a.pt@1.2,low=/x/b.pt", "/y/style.pt@0.5"]
    assert replace_loras(stored, ["/y/style.pt"]) == ["high=a.pt@1.2,low=b.pt", "/y/style.pt@0.5"]
    assert replace_loras(stored, ["/y/style.pt@0.7"]) == ["/y/style.pt@0.7"]
    assert replace_loras(stored, []) == []


@pytest.mark.parametrize("name", ["high=a.pt", "a@1.2", "low=a@b@2", "user@host.pt"])
def test_a_file_that_is_really_called_so_is_that_file(tmp_path: Path, monkeypatch: Any, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).touch()
    assert (parse_lora(name).files, parse_lora(name).strengths) == ({"": name}, {})
    assert (parse_lora(f"{name}@0.5").files, parse_lora(f"{name}@0.5").strengths) == ({"": name}, {"": 0.5})
    assert parse_lora(f"low={name}").files == {"transformer_2": name}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("high=a,high=b", "names high= twice"),
        ("high=a,low=", "no file after low="),
        ("here.pt@strong", "strength 'strong' is no number"),
        ("here.pt@nan", "strength 'nan' is no number"),
    ],
)
def test_what_is_not_understood_is_said(tmp_path: Path, monkeypatch: Any, text: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.pt").touch()
    with pytest.raises(ValueError, match=message):
        parse_lora(text)


# ---- several files -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, transformer: Any) -> Path:
    for number, name in enumerate(("pusa_HIGH", "pusa_LOW", "fast-high", "fast-low", "glow")):
        write(tmp_path / f"{name}.safetensors", comfyui(make_pairs(transformer, seed=number)))
    return tmp_path


def placed(folder: Path, experts: tuple[str, ...], *names: str) -> list[dict[str, str]]:
    sources = [f"{folder}/{name}.safetensors" for name in names]
    return [{e: f.path.stem for e, f in files.items()} for files in place_loras(experts, sources)]


def test_a_high_and_a_low_file_are_one_lora_in_either_order(folder: Path) -> None:
    pusa = {"transformer": "pusa_HIGH", "transformer_2": "pusa_LOW"}
    fast = {"transformer": "fast-high", "transformer_2": "fast-low"}
    assert (
        placed(folder, EXPERTS, "pusa_HIGH", "pusa_LOW") == placed(folder, EXPERTS, "pusa_LOW", "pusa_HIGH") == [pusa]
    )
    assert placed(folder, EXPERTS, "pusa_HIGH", "fast-low", "pusa_LOW", "fast-high") == [pusa, fast]
    assert placed(folder, EXPERTS, "fast-low", "pusa_HIGH") == [
        {"transformer_2": "fast-low", "transformer": "pusa_HIGH"}
    ]
    assert placed(folder, EXPERTS, "pusa_LOW", "glow") == [
        {"transformer_2": "pusa_LOW"},
        dict.fromkeys(EXPERTS, "glow"),
    ]


def test_for_one_transformer_a_pair_is_refused_and_one_half_is_taken_with_a_word(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"pusa_HIGH\.safetensors and pusa_LOW\.safetensors are a Wan2\.2 pair"):
        placed(folder, EXPERTS[:1], "pusa_LOW", "pusa_HIGH")
    [files] = place_loras(EXPERTS[:1], [folder / "pusa_LOW.safetensors"])
    assert files["transformer"].reason == "though it is named as Wan2.2's low-noise one"
    with pytest.raises(ValueError, match="source names transformer_2; this pipeline has transformer"):
        place_loras(EXPERTS[:1], [f"low={folder}/glow.safetensors"])


def test_a_lone_half_goes_to_its_expert_alone(folder: Path, experts: SimpleNamespace) -> None:
    assert load_pusa(experts, folder / "pusa_LOW.safetensors") == 20
    assert not lora_layers(experts.transformer)
    assert lora_layers(experts.transformer_2)


def test_words_decide_against_names_and_carry_strengths(
    folder: Path, experts: SimpleNamespace, transformer: Any
) -> None:
    load_pusa(experts, f"high={folder}/pusa_LOW.safetensors@0.5,low={folder}/glow.safetensors", alpha=1.2)
    scales = [{layer.scaling["pusa"] for layer in lora_layers(e).values()} for e in vars(experts).values()]
    assert scales == [{0.5}, {1.2}]
    high = make_pairs(transformer, seed=1)["blocks.0.attn1.to_q"]
    assert torch.equal(lora_layers(experts.transformer)["blocks.0.attn1.to_q"].lora_A["pusa"].weight, high[0])


def test_a_folder_with_glow_and_low_is_no_pair(folder: Path, experts: SimpleNamespace) -> None:
    for name in ("pusa_HIGH", "fast-high", "fast-low"):
        (folder / f"{name}.safetensors").unlink()
    with pytest.raises(ValueError, match="holds 2 LoRA files; name one of them: glow"):
        load_pusa(experts, folder)


def test_one_file_may_hold_both_experts(tmp_path: Path, experts: SimpleNamespace, pairs: Pairs) -> None:
    """diffusers' names of the second transformer begin with ``transformer_2.``."""
    second = make_pairs(experts.transformer_2, seed=9)
    keys = {
        f"{expert}.{name}.lora_{half}.weight": matrix
        for expert, layers in (("transformer", pairs), ("transformer_2", second))
        for name, pair in layers.items()
        for half, matrix in zip("AB", pair, strict=True)
    }
    file = write(tmp_path / "both.safetensors", keys)
    assert load_pusa(experts, file) == 40
    for expert, expected in ((experts.transformer, pairs), (experts.transformer_2, second)):
        for name, layer in lora_layers(expert).items():
            assert torch.equal(layer.lora_B["pusa"].weight, expected[name][1])
    with pytest.raises(ValueError, match=r"holds LoRAs of both experts of Wan2\.2 and this pipeline has one"):
        load_pusa(pipe(experts.transformer), file)
    only = {key: value for key, value in keys.items() if key.startswith("transformer_2.")}
    [files] = place_loras(EXPERTS, [write(tmp_path / "high.safetensors", only)])
    assert (list(files), files["transformer_2"].reason) == (["transformer_2"], "by its keys")
