"""`make demo`: four videos, and all of them in one picture that fits into a README."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_models import make_smaller

from pusa import media, zoo
from pusa.media.previews import Strip
from pusa.mini import demo

MADE = ("text-to-video", "image-to-video", "start-end", "extension")


def strip(name: str, frames: int, held: slice = slice(0), noisy: bool = False) -> Strip:
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (frames, 32, 32, 3), np.uint8) if noisy else np.full((frames, 32, 32, 3), 90, np.uint8)
    return Strip("a duck spins", video, held=range(frames)[held], title=name)


def test_it_makes_four_videos_and_says_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = "mini" if "mini" in zoo.ZOO else "tiny"
    make_smaller(monkeypatch, model, width=64, height=64, steps=2)
    demo.main(["--output", str(tmp_path), "--model", model])
    size = zoo.get(model).defaults
    printed = capsys.readouterr().out
    for name in MADE:
        info = media.probe_video(tmp_path / f"{name}.mp4")
        assert (info.width, info.height) == (size.width, size.height)
        assert info.frames > size.num_frames if name == "extension" else info.frames == size.num_frames
        assert f"{name}.mp4" in printed
    assert f"models show {model} --words" in printed
    assert (tmp_path / "contact-sheet.gif").stat().st_size <= demo.GIF_BYTES
    with Image.open(tmp_path / "contact-sheet.gif") as sheet:
        assert sheet.n_frames > size.num_frames // 4
    assert Image.open(tmp_path / "contact-sheet.png").width > 900


def test_the_examples_are_in_the_package_and_small() -> None:
    for clip in [*demo.clips(Path("demo")), *demo.more_clips()]:
        for condition in clip.request.get("conditions", []):
            if condition.get("kind") != "video":
                assert Image.open(condition["file"]).size == (256, 256)
    assert sum(path.stat().st_size for path in demo.PICTURES.iterdir()) < 500_000


def test_conditions_are_outlined() -> None:
    sheet = np.asarray(demo.still_sheet([strip("one", 9, slice(0, 4))], columns=3, tile=40))
    row = sheet[60]
    marked = [tuple(row[x]) == demo._OUTLINE for x in (6, 52, 98)]
    assert marked == [True, False, False]


def test_the_moving_sheet_lasts_as_long_as_the_longest_and_fits(tmp_path: Path) -> None:
    clips = [strip("short", 9), strip("long", 17)]
    demo.moving_sheet(clips, tmp_path / "a.gif", columns=2)
    with Image.open(tmp_path / "a.gif") as sheet:
        total_ms = 0
        for frame in range(sheet.n_frames):
            sheet.seek(frame)
            total_ms += sheet.info["duration"]
    assert total_ms == pytest.approx(1000 * 17 / 16 + 700, abs=20)
    noise = [strip("noise", 33, noisy=True)]
    demo.moving_sheet(noise, tmp_path / "b.gif", columns=1, max_bytes=400_000)
    assert (tmp_path / "b.gif").stat().st_size <= 400_000
    with pytest.raises(ValueError, match="1 videos do not fit into 1000 bytes: show fewer"):
        demo.moving_sheet(noise, tmp_path / "c.gif", columns=1, max_bytes=1000)
