"""Models by name, and how a source becomes a pipeline: it loads, or fails at once and says why."""

import json
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from huggingface_hub.errors import EntryNotFoundError
from lora_samples import comfyui, make_pairs, write
from model_folders import cached_snapshot
from PIL import Image
from safetensors.torch import load_file, save_file

from pusa import PusaCondition, PusaPipeline, loading, resources, zoo
from pusa.acceleration.machine import described_machine
from pusa.models import files, tiny
from pusa.models.text_encoder import check_text_encoder
from pusa.models.wan import PusaWanTransformer3DModel

GB = 10**9


def latents(pipe: PusaPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt="a duck",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=2,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model as a folder in diffusers layout, its transformer in several shards."""
    pipe = PusaPipeline.from_pretrained("tiny")
    pipe.save_pretrained(tmp_path / "tiny-wan", max_shard_size="1MB")
    return tmp_path / "tiny-wan"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Set what this machine has: `machine(disk=..., ram=...)` in bytes."""

    def pretend(*, disk: int = 10**15, ram: int = 10**15) -> None:
        usage = namedtuple("usage", "total used free")(disk, 0, disk)
        monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: usage)
        monkeypatch.setattr(resources, "free_memory_bytes", lambda: ram)

    return pretend


# ---- names ---------------------------------------------------------------------------------------------------------


def test_names_defaults_and_sizes_are_there_without_torch() -> None:
    code = "import sys; from pusa import zoo; zoo.get('wan2.1-14b').download_bytes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_pipeline_imports_no_registry() -> None:
    code = "import sys, pusa.pipeline; sys.exit(not sys.modules.keys().isdisjoint(('pusa.zoo', 'pusa.loading')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_lists_all_models_and_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"no model is called 'Wan2\.1-14': did you mean 'wan2\.1-14b'\?.*tiny.*wan2\.2-a14b"
    ):
        PusaPipeline.from_pretrained("Wan2.1-14")
    with pytest.raises(FileNotFoundError, match="no/such/folder: no such folder"):
        loading.load_pipeline(PusaPipeline, "no/such/folder")


def test_the_defaults_are_those_of_the_paper() -> None:
    wan21, wan22 = zoo.get("wan2.1-14b"), zoo.get("wan2.2-a14b")
    assert (wan21.defaults.steps, wan21.defaults.guidance, wan21.defaults.shift, wan21.defaults.alpha) == (
        10,
        3.0,
        5.0,
        1.4,
    )
    assert (wan21.experts, wan22.experts) == (1, 2)
    assert wan22.defaults.alpha == {"transformer": 1.5, "transformer_2": 1.4}
    assert wan22.defaults.boundary_ratio == 0.875
    for model in zoo.ZOO.values():
        size = model.defaults
        assert size.width % 16 == size.height % 16 == 0
        assert size.num_frames % size.frames_per_latent == 1


def test_sizes_follow_from_parameter_counts() -> None:
    model = zoo.get("wan2.1-14b")
    transformer, text, vae = 14_288_491_584, 5_680_910_336, 126_892_531
    assert model.download_bytes == 4 * (transformer + text + vae)


def describe(folder: Path, **card: Any) -> None:
    """Let `folder` say how it is meant to be used."""
    (folder / "pusa.json").write_text(json.dumps({"title": "ours", "defaults": {"width": 128, "height": 96}} | card))


@pytest.fixture
def ours(folder: Path) -> Path:
    """The tiny model as our recipe would write it: described, with a Pusa LoRA beside its weights."""
    pipe = PusaPipeline.from_pretrained("tiny")
    write(folder / "pusa_lora.safetensors", comfyui(make_pairs(pipe.transformer)))
    defaults = {"width": 64, "height": 32, "num_frames": 9, "steps": 2, "max_sequence_length": 16, "alpha": 1.2}
    defaults |= {"encode": "repeat"}
    describe(folder, defaults=defaults, lora={"transformer": "pusa_lora.safetensors"})
    return folder


def test_a_folder_says_itself_how_it_is_meant_to_be_used(folder: Path) -> None:
    assert zoo.find(folder) is None
    assert zoo.read_folder(folder, "mini") is None
    describe(folder, lora={"transformer": "pusa.safetensors"}, words={"things": [["duck", "mallard"], "fish"]})
    model = zoo.read_folder(folder, "mini")
    assert model is not None
    assert (model.name, model.title, model.defaults.width, model.words) == (
        *("mini", "ours", 128),
        {"things": [["duck", "mallard"], ["fish"]]},
    )
    assert model.parameters == zoo.get("tiny").parameters
    assert model.lora is not None
    assert model.lora.fetch() == {"transformer": folder / "pusa.safetensors"}
    assert zoo.find(folder) == replace(model, name=folder.name)
    assert zoo.defaults_of(str(folder)).height == 96
    describe(folder, defaults={"wide": 3})
    with pytest.raises(ValueError, match=r"pusa\.json does not describe a model .*'wide'"):
        PusaPipeline.from_pretrained(folder)


def test_the_adapter_of_a_described_folder_is_part_of_the_model(ours: Path) -> None:
    pipe = PusaPipeline.from_pretrained(ours)
    assert pipe.get_list_adapters() == {"transformer": ["pusa"]}
    base = loading.load_pipeline(PusaPipeline, ours)
    assert base.get_list_adapters() == {}
    base.load_pusa(ours / "pusa_lora.safetensors", alpha=1.2)
    assert torch.equal(latents(pipe), latents(base))
    pipe.load_pusa(ours / "pusa_lora.safetensors", alpha=0.5)  # replaces it
    assert not torch.equal(latents(pipe), latents(base))
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), latents(loading.load_pipeline(PusaPipeline, ours)))
    assert type(loading.load_pipeline(WanPipeline, ours)) is WanPipeline  # plain text to video
    assert PusaPipeline.from_pretrained(ours, transformer=None).transformer is None


def test_arguments_left_open_are_the_defaults_of_the_model(ours: Path) -> None:
    pipe = PusaPipeline.from_pretrained(ours)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.set_timesteps(2)
    video = pipe("a duck", generator=torch.Generator().manual_seed(0), output_type="latent").frames
    assert video.shape == (1, 16, 3, 4, 8)
    assert len(pipe.scheduler.timesteps) == 2
    same = {"height": 32, "width": 64, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 16}
    again = pipe("a duck", generator=torch.Generator().manual_seed(0), output_type="latent", **same).frames
    assert torch.equal(video, again)
    picture = Image.linear_gradient("L").convert("RGB")
    own, same, other = (
        pipe(
            "a duck", conditions=[PusaCondition(image=picture, seconds="last", encode=way)], output_type="latent"
        ).frames
        for way in (None, "repeat", "single")
    )
    assert torch.equal(own[:, :, -1], same[:, :, -1])
    assert not torch.equal(own[:, :, -1], other[:, :, -1])
    assert PusaPipeline(**PusaPipeline.from_pretrained("tiny").components).defaults == zoo.GenerationDefaults()


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_what_our_recipe_made_is_bf16_where_the_cpu_computes_in_it(
    ours: Path, native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "is_bf16_fast", lambda _: native)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pipe = PusaPipeline.from_pretrained(ours)
    assert (pipe.vae.dtype, pipe.text_encoder.dtype) == (dtype, torch.float32)
    assert pipe.transformer.blocks[0].ffn.net[2].weight.dtype == dtype
    assert torch.isfinite(latents(pipe)).all()
    kernels = [m.weight for m in pipe.vae.modules() if isinstance(m, torch.nn.Conv3d) and m.weight[0].numel() > 1]
    assert all(k.is_contiguous(memory_format=torch.channels_last_3d) for k in kernels) == native
    pipe.unload_lora_weights()
    pipe.save_pretrained(ours / "again")
    again = loading.load_pipeline(PusaPipeline, ours / "again", dtype=resources.native_dtype())
    assert torch.equal(latents(again), latents(pipe))


def test_bundled_models_load_without_progress_bars(ours: Path, capfd: pytest.CaptureFixture[str]) -> None:
    PusaPipeline.from_pretrained(ours)
    assert capfd.readouterr().err == ""
    (ours / "pusa.json").unlink()
    PusaPipeline.from_pretrained(ours)
    assert "Loading" in capfd.readouterr().err  # of others', they are shown


# ---- the tiny model ------------------------------------------------------------------------------------------------


def test_the_tiny_model_needs_nothing_and_is_the_same_each_time() -> None:
    assert "makes noise" in zoo.get("tiny").title
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first, second = PusaPipeline.from_pretrained("tiny"), PusaPipeline.from_pretrained("tiny")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(first.transformer, PusaWanTransformer3DModel)
    assert torch.equal(latents(first), latents(second))


def test_the_zoo_describes_the_tiny_model_as_it_is() -> None:
    model, parts = zoo.get("tiny"), tiny.components()
    assert model.parameters == {name: sum(p.numel() for p in parts[name].parameters()) for name in model.parameters}
    assert model.transformer.items() <= dict(parts["transformer"].config).items()


def test_the_tiny_tokenizer_maps_any_text() -> None:
    tokenizer = tiny.tokenizer()
    for text in ("", "a duck", "一只鸭子 🦆", "\x00<b>"):
        ids = tokenizer(text, padding="max_length", max_length=64, truncation=True).input_ids
        end = ids.index(1)
        assert len(ids) == 64
        assert set(ids[end + 1 :]) == {0}
        assert tokenizer.decode(ids[:end]) == text


def test_a_dtype_reaches_every_part() -> None:
    pipe = PusaPipeline.from_pretrained("tiny", torch_dtype={"default": torch.bfloat16, "vae": torch.float32})
    assert pipe.vae.dtype == torch.float32
    assert pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert pipe.transformer.blocks[0].scale_shift_table.dtype == torch.float32  # as diffusers loads it


# ---- folders in diffusers layout -----------------------------------------------------------------------------------


def test_a_diffusers_folder_loads_as_the_model_it_was(folder: Path) -> None:
    pipe = PusaPipeline.from_pretrained(folder)
    assert torch.equal(latents(pipe), latents(PusaPipeline.from_pretrained("tiny")))
    assert PusaPipeline.from_pretrained(folder, shift=3.0).scheduler.config.shift == 3.0
    stock = loading.load_pipeline(WanPipeline, folder, dtype={"transformer": torch.bfloat16})
    assert type(stock) is WanPipeline
    assert stock.transformer.dtype == torch.bfloat16


def test_every_file_that_a_diffusers_folder_lacks_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = sorted((folder / "transformer").glob("*.safetensors"))[1]
    vae = sorted((folder / "vae").glob("*.safetensors"))[0]
    vae.write_bytes(vae.read_bytes()[:-1])
    for path in (shard, folder / "tokenizer/tokenizer.json", folder / "scheduler/scheduler_config.json"):
        path.unlink()
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(lambda *a, **k: pytest.fail("loading began")))
    with pytest.raises(files.MissingFilesError) as error:
        loading.load_pipeline(PusaPipeline, folder)
    for name in (
        f"transformer/{shard.name}",
        f"vae/{vae.name} (cut short: ",
        "tokenizer/spiece.model",
        "scheduler/scheduler_config.json",
    ):
        assert name in str(error.value)


def test_a_folder_of_neither_layout_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(files.MissingFilesError, match=r"missing: model_index\.json"):
        PusaPipeline.from_pretrained(tmp_path)


def test_a_part_that_the_caller_brings_or_leaves_out_need_not_be_there(folder: Path) -> None:
    for path in (folder / "text_encoder").iterdir():
        path.unlink()
    with pytest.raises(files.MissingFilesError, match=r"text_encoder/model\.safetensors"):
        PusaPipeline.from_pretrained(folder)
    assert PusaPipeline.from_pretrained(folder, text_encoder=None).text_encoder is None
    encoder = tiny.text_encoder()
    assert PusaPipeline.from_pretrained(folder, text_encoder=encoder).text_encoder is encoder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 36}, r"image-to-video transformer \(36 input channels for 16"),
        ({"image_dim": 1280}, "image-to-video transformer"),
        ({"_class_name": "HunyuanVideoTransformer3DModel"}, "is a HunyuanVideoTransformer3DModel; Pusa needs a Wan"),
    ],
)
def test_another_architecture_is_refused(folder: Path, change: dict, message: str) -> None:
    path = folder / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(files.WrongArchitectureError, match=message):
        PusaPipeline.from_pretrained(folder)


def test_untied_embeddings_of_the_text_encoder_are_found_at_load_time(folder: Path) -> None:
    """transformers issue 43992: prompts became noise."""
    encoder = tiny.text_encoder()
    check_text_encoder(encoder)
    encoder.encoder.embed_tokens = torch.nn.Embedding.from_pretrained(encoder.shared.weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"embeddings are not tied.*issue 43992"):
        PusaPipeline.from_pretrained(folder, text_encoder=encoder)
    path = folder / "text_encoder/model.safetensors"
    tensors = load_file(path)
    tensors["encoder.embed_tokens.weight"] = torch.randn_like(tensors["shared.weight"])
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(RuntimeError, match="embeddings are not tied"):
        PusaPipeline.from_pretrained(folder)


# ---- the Hub, offline ----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A local Hub cache; `hub(id)` puts the tiny model into it under that id."""
    cache = tmp_path / "cache"

    def add(hub_id: str) -> None:
        folder.rename(cached_snapshot(cache, hub_id))

    return cache, add


def test_a_cached_hub_model_loads_offline(hub) -> None:
    cache, add = hub
    add("someone/tiny-wan")
    pipe = loading.load_pipeline(PusaPipeline, "someone/tiny-wan", cache_dir=cache, local_files_only=True)
    assert torch.equal(latents(pipe), latents(PusaPipeline.from_pretrained("tiny")))
    assert pipe.text_encoder_identity == "someone/tiny-wan@abc123"


def test_a_zoo_name_checks_what_the_hub_holds_before_the_download(
    hub, machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, add = hub
    machine()
    monkeypatch.setattr(WanPipeline, "download", lambda *a, **k: pytest.fail("the download began"))
    with pytest.raises(FileNotFoundError, match=r"Wan-AI/Wan2\.1-T2V-1\.3B-Diffusers is not in the local cache"):
        PusaPipeline.from_pretrained("wan2.1-1.3b", cache_dir=cache, local_files_only=True)
    add("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    with pytest.raises(files.WrongArchitectureError, match="attention_head_dim=32, and not 128 as expected"):
        PusaPipeline.from_pretrained("wan2.1-1.3b", cache_dir=cache, local_files_only=True)


def test_a_hub_repository_in_the_original_layout_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: object, **kwargs: object) -> None:
        raise EntryNotFoundError("404")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", absent)
    with pytest.raises(files.WrongArchitectureError, match=r"take the repository called \.\.\.-Diffusers"):
        loading.load_pipeline(PusaPipeline, "Wan-AI/Wan2.1-T2V-14B")


# ---- resources -----------------------------------------------------------------------------------------------------


def test_too_little_disk_is_an_error_that_counts_cached_files(machine, tmp_path: Path) -> None:
    model = zoo.get("wan2.1-1.3b")
    machine(disk=20 * GB)
    with pytest.raises(
        resources.ResourcesError, match=r"wan2\.1-1\.3b needs 29 GB more disk .* has 20 GB: .*cache_dir or HF_HOME"
    ):
        zoo.check_resources(model, folder=tmp_path / "cache")
    blobs = tmp_path / "cache/models--Wan-AI--Wan2.1-T2V-1.3B-Diffusers/blobs"
    blobs.mkdir(parents=True)
    with (blobs / "half").open("wb") as file:
        file.truncate(15 * GB)  # sparse: takes no space
    zoo.check_resources(model, folder=tmp_path / "cache")
    zoo.check_resources(model, folder=tmp_path / "elsewhere", skip=["text_encoder"])


def test_too_little_memory_is_an_error_with_the_way_out(machine) -> None:
    model = zoo.get("wan2.1-14b")
    machine(ram=32 * GB)
    with pytest.raises(
        resources.ResourcesError,
        match=r"needs 47 GB of RAM .* without a GPU, and 32 GB is free: .*smaller model \(.*wan2\.1-1\.3b.*\)$",
    ):
        zoo.check_resources(model)
    zoo.check_resources(zoo.get("wan2.1-1.3b"))
    zoo.check_resources(model, skip=["transformer"])  # the others are small
    zoo.check_resources(model, machine=described_machine(gpu_gb=24, ram_gb=64))
    with pytest.raises(resources.ResourcesError, match=r"needs 21 GB of RAM .* on this card, and 15 GB is free"):
        zoo.check_resources(model, machine=described_machine(gpu_gb=12, ram_gb=16))
    machine(ram=28 * GB)
    with pytest.raises(resources.ResourcesError, match="needs 30 GB of memory"):
        zoo.check_resources(zoo.get("wan2.1-1.3b"), dtype=torch.float32)


def test_memory_is_checked_before_a_folder_is_read(folder: Path, machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(ram=GB)  # what Python itself is given
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(lambda *a, **k: pytest.fail("loading began")))
    with pytest.raises(
        resources.ResourcesError, match=r"tiny-wan needs 1\.0 GB of memory to be loaded, and 1\.0 GB is free"
    ):
        loading.load_pipeline(PusaPipeline, folder)


def test_free_memory_is_no_more_than_the_machine_has() -> None:
    total = resources.psutil.virtual_memory().total + resources.psutil.swap_memory().total
    assert 0 < resources.free_memory_bytes() <= total


@pytest.mark.parametrize(
    ("gpu", "ram", "line"),
    [
        (
            80,
            64,
            "yes: transformer on the GPU in bfloat16, merged; 44 GB of 84 GB of GPU memory, 6.9 GB of 67 GB of RAM",
        ),
        (
            24,
            64,
            "yes: transformer on the GPU in bfloat16, its blocks streamed from RAM, merged; 12 GB of 25 GB of GPU",
        ),
        (24, 32, "yes: transformer on the GPU in fp8, merged; 21 GB of 25 GB of GPU memory, 18 GB of 32 GB of RAM"),
        (12, 16, "no: wan2.1-14b needs 21 GB of RAM for 832x480 and 81 frames on this card, and 15 GB is free"),
        (0, 64, "yes: transformer on the CPU in bfloat16, merged; 47 GB of 67 GB of RAM; very slow: "),
        (0, 42, "no: wan2.1-14b needs 47 GB of RAM"),
    ],
)
def test_one_line_tells_whether_a_model_fits(gpu: int, ram: int, line: str) -> None:
    there = described_machine(gpu_gb=gpu, ram_gb=ram)
    assert zoo.describe_fit(zoo.get("wan2.1-14b"), there).startswith(line)


def test_large_models_default_to_bf16_with_an_fp32_vae() -> None:
    assert resources.default_dtype(14 * GB) == {"default": torch.bfloat16, "vae": torch.float32}
    assert resources.default_dtype(10**6) == torch.float32
    counts = zoo.get("wan2.1-14b").parameters
    assert resources.weight_bytes(counts) == resources.weight_bytes(counts, resources.default_dtype(14 * GB))
