"""Single files that others publish: taken where they are smaller, and where the repository's own are not here."""

from pathlib import Path

import pytest
from model_folders import cached_snapshot

from pusa import zoo
from pusa.models.sources import published

MODEL = zoo.get("wan2.1-14b")
ASKED = {"transformer": "bfloat16", "text_encoder": "fp8", "vae": "bfloat16"}


def wanted(cache: Path, storages: dict[str, str], **options: object) -> dict[str, str]:
    found = published.wanted(
        MODEL.published, storages, str(MODEL.hub_id), larger_than=MODEL.file_bytes, cache=cache, **options
    )
    return {part: file.name.rpartition("/")[2] for part, file in found.items()}


def test_the_file_follows_the_storage_of_a_plan(tmp_path: Path) -> None:
    assert wanted(tmp_path, ASKED) == {
        "transformer": "wan2.1_t2v_14B_bf16.safetensors",
        "text_encoder": "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
    }
    assert wanted(tmp_path, {"transformer": "fp8"}) == {"transformer": "wan2.1_t2v_14B_fp8_scaled.safetensors"}
    assert wanted(tmp_path, ASKED, skip=["transformer", "text_encoder"]) == {}
    assert wanted(tmp_path, {"transformer": "float32"}) == {}


def test_a_model_without_a_bf16_file_takes_the_fp16_one() -> None:
    files = zoo.get("wan2.2-a14b")
    found = published.wanted(
        files.published, {"transformer_2": "bfloat16"}, str(files.hub_id), larger_than=files.file_bytes
    )
    assert found["transformer_2"].name.endswith("wan2.2_t2v_low_noise_14B_fp16.safetensors")
    assert found["transformer_2"].size_bytes == 2 * 14_288_491_584


def test_a_file_as_large_as_the_repositorys_own_is_not_taken() -> None:
    model = zoo.get("wan2.2-a14b")  # its text encoder is published in bf16
    asked = {"text_encoder": "bfloat16"}
    assert published.wanted(model.published, asked, str(model.hub_id), larger_than=model.file_bytes) == {}


def test_what_is_in_the_cache_is_not_downloaded_again(tmp_path: Path) -> None:
    part = cached_snapshot(tmp_path, str(MODEL.hub_id)) / "transformer"
    part.mkdir(parents=True)
    (part / "config.json").write_text("{}")
    assert "transformer" in wanted(tmp_path, ASKED)  # the configuration alone
    (part / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert "transformer" not in wanted(tmp_path, ASKED)


def test_a_file_that_cannot_be_had_leaves_its_part_to_the_repository(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def download(repository: str, name: str, **hub: object) -> str:
        asked.append((repository, hub))
        if "umt5" in name:
            raise OSError("404")
        return str(tmp_path / name)

    found = published.wanted(MODEL.published, ASKED, str(MODEL.hub_id), larger_than=MODEL.file_bytes, cache=tmp_path)
    paths = published.fetch(found, download=download, cache_dir=tmp_path)
    assert set(paths) == {"transformer"}
    assert asked[0] == ("Comfy-Org/Wan_2.1_ComfyUI_repackaged", {"cache_dir": tmp_path})
    assert "umt5_xxl_fp8_e4m3fn_scaled.safetensors is not to be had (404): taking larger files" in caplog.text
