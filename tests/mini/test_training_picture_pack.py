"""The pack of pictures for a machine that can fetch nothing; discs and noise stand in for its pictures."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from paths import ROOT
from PIL import Image
from safetensors.torch import save_file
from world_samples import make_sprites

from pusa.cli import main
from pusa.mini.world import picture_pack, pictures
from pusa.mini.world.scenery import CANVAS
from pusa.mini.world.vocabulary import THINGS
from pusa.mini.world.world import World, draw_scenes


def make_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture of nothing."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def make_images() -> dict[str, Image.Image]:
    return {
        "panorama 00": make_image(512, 256),
        "photograph wide": make_image(480, 320, 1),
        "photograph tall": make_image(320, 400, 2),
    }


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    path = tmp_path / "pack.safetensors"
    picture_pack.write_pack(path, make_sprites()[:5], make_images(), sources={"art.tgz": "0" * 64})
    return path


def test_what_was_packed_comes_out_in_the_format_that_the_world_takes(pack: Path) -> None:
    sprites, photographs = picture_pack.load_pack(pack)
    torch.testing.assert_close(sprites, make_sprites()[:5], atol=0.5 / 255 + 1e-6, rtol=0)
    assert photographs.dtype == torch.float32
    assert photographs.shape[1:] == (3, CANVAS, CANVAS)
    assert 0 <= photographs.min() < photographs.max() <= 1
    # two squares of the wide one show it from edge to edge, nine of the panorama a part each
    assert len(photographs) == 9 + (2 + 2 * 3 + 3 * 4 + 4 * 6) + (1 + 2 * 2 + 4 * 3 + 5 * 4)
    world = World(sprites, photographs, variants=1)
    assert world.render(draw_scenes(4, 0, things=5), 1)[0].isfinite().all()


def test_views_of_a_photograph_are_its_squares_and_a_panorama_is_kept_exactly(pack: Path) -> None:
    _, photographs = picture_pack.load_pack(pack)
    wide = make_images()["photograph wide"].crop((0, 0, 320, 320)).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    first = photographs[9 + 37]  # names are in order: panorama, tall, wide
    assert (first - torch.from_numpy(np.array(wide)).permute(2, 0, 1) / 255).abs().mean() < 0.01
    cut = make_images()["panorama 00"].crop((0, 46, 176, 222)).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    assert (photographs[0] * 255 - torch.from_numpy(np.array(cut)).permute(2, 0, 1)).abs().max() < 2


def test_the_same_pictures_give_the_same_bytes(pack: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    picture_pack.write_pack(again, make_sprites()[:5], make_images(), sources={"art.tgz": "0" * 64})
    assert again.read_bytes() == pack.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "pack.safetensors"]


def test_credits_notices_and_sources_are_inside(pack: Path) -> None:
    about = picture_pack.read_about(pack)
    assert about["credits"] == [list(credit) for credit in pictures.CREDITS]
    assert about["things"] == [names[1] for names in THINGS[:5]]
    assert about["sources"] == {"art.tgz": "0" * 64}
    notices = str(about["notices"])
    third_party = (ROOT / "THIRD_PARTY.md").read_text().split("## MIT License")[1]
    assert set(third_party.split()) <= set(notices.split())
    for licence in ("creativecommons.org/licenses/by/4.0/", "creativecommons.org/publicdomain/zero/1.0/"):
        assert licence in notices


def test_a_pack_that_would_be_too_large_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        picture_pack.write_pack(tmp_path / "pack.safetensors", torch.zeros(12, 4, 512, 512), {})
    assert str(error.value) == "the pictures take 12.6 MB and a pack may take 12 MB"
    assert not list(tmp_path.iterdir())


def test_a_picture_that_is_too_small_or_of_no_kind_is_refused(tmp_path: Path) -> None:
    for name, message in (
        ("panorama 00", "panorama 00 of 100 x 100 pixels is too small: 512 x 256 is expected"),
        ("drawing", "'drawing' is neither a panorama nor a photograph"),
    ):
        with pytest.raises(ValueError) as error:
            picture_pack.write_pack(tmp_path / "pack.safetensors", make_sprites(), {name: make_image(100, 100)})
        assert str(error.value) == message


def test_damaged_and_foreign_files_are_refused_with_the_remedy(pack: Path, tmp_path: Path) -> None:
    remedy = f"make it anew with `pusa mini pictures {pack}`"
    content = bytearray(pack.read_bytes())
    content[-1000] ^= 1
    pack.write_bytes(content)
    with pytest.raises(ValueError) as error:
        picture_pack.load_pack(pack)
    assert str(error.value) == f"{pack} is damaged (its contents do not have the hash that it names): {remedy}"

    pack.write_bytes(content[:-2000])
    with pytest.raises(ValueError) as error:
        picture_pack.load_pack(pack)
    assert str(error.value).startswith(f"{pack} is no pack of pictures or is damaged (")
    assert str(error.value).endswith(remedy)

    save_file({"sprites": torch.zeros(1)}, pack)
    with pytest.raises(ValueError) as error:
        picture_pack.load_pack(pack)
    assert str(error.value) == (f"{pack} is no pack of pictures ('pusa pictures 1' is not in its metadata): {remedy}")

    pack.unlink()
    with pytest.raises(FileNotFoundError) as missing:
        picture_pack.load_pack(pack)
    assert str(missing.value) == f"{pack} is not there: make it with `pusa mini pictures {pack}`, which downloads"


def test_a_pack_without_photographs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pack.safetensors"
    picture_pack.write_pack(path, make_sprites()[:2], {})
    with pytest.raises(ValueError) as error:
        picture_pack.load_pack(path)
    assert str(error.value) == f"{path} holds no photographs: make it anew with `pusa mini pictures {path}`"


def test_the_command_fetches_once_and_writes_a_pack_in_its_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    monkeypatch.setattr(pictures, "fetch", lambda cache: (cache.mkdir(), fetched.append(cache)))
    monkeypatch.setattr(pictures, "load_sprites", lambda cache, size, things: make_sprites(size)[:things])
    panoramas = torch.rand(18, 3, 256, 512, generator=torch.Generator().manual_seed(0)).mul(0.05)
    monkeypatch.setattr(pictures, "load_panoramas", lambda cache: iter(panoramas))
    monkeypatch.setattr(
        pictures, "open_photographs", lambda cache: ((str(n), make_image(2400, 1600, n)) for n in range(10))
    )
    path = tmp_path / "pack.safetensors"
    done = CliRunner().invoke(main, ["mini", "pictures", str(path)])
    assert done.exit_code == 0, done.output
    assert fetched == [tmp_path / "pictures_cache"]
    assert path.stat().st_size <= picture_pack.LARGEST_BYTES
    assert done.output == f"{path}: {path.stat().st_size / 1e6:.1f} MB\n"
    began = time.monotonic()
    sprites, photographs = picture_pack.load_pack(path)
    assert time.monotonic() - began < 10  # of 1.5 seconds on two quiet cores
    assert sprites.shape == (40, 4, 128, 128)
    assert len(photographs) == 18 * 9 + 10 * (2 + 2 * 3 + 3 * 4 + 4 * 6)

    wrong = CliRunner().invoke(main, ["mini", "pictures", str(tmp_path / "pack.zip")])
    assert wrong.exit_code == 2
    assert "must end in .safetensors" in wrong.output
