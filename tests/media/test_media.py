"""Videos out: exact where a format can be, close where it cannot, and never half a file; and videos at a glance."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media_samples import HEIGHT, OUTPUTS, WIDTH, grey_levels, moving_gradient, psnr, write
from PIL import Image

from pusa.media import (
    MediaError,
    VideoWriter,
    contact_sheet,
    probe_video,
    read_image,
    read_metadata,
    read_video,
    sprite_sheet,
    thumbnail,
    to_uint8,
)

# ---- writing


def test_an_mp4_keeps_size_rate_length_and_picture(tmp_path: Path) -> None:
    frames = moving_gradient(33)
    path = write(tmp_path / "clip.mp4", frames)
    info = probe_video(path)
    assert (info.width, info.height, info.fps, info.frames) == (WIDTH, HEIGHT, 16.0, 33)
    assert (info.seconds, info.codec, info.has_audio) == (33 / 16, "h264", False)
    assert psnr(read_video(path), frames) > 38


def test_an_mp4_is_what_browsers_play_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", moving_gradient(9))
    data = path.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")
    with av.open(path) as container:
        context = container.streams.video[0].codec_context
        assert (context.codec.name, context.pix_fmt, context.profile) == ("h264", "yuv420p", "High")
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)


def test_colours_survive_the_way_through_yuv(tmp_path: Path) -> None:
    colours = np.array([[220, 30, 60], [20, 180, 40], [10, 60, 230], [250, 250, 250], [0, 0, 0]], np.uint8)
    frames = np.repeat(np.repeat(colours[:, None, None], 32, axis=1), 32, axis=2)  # [5, 32, 32, 3]
    back = read_video(write(tmp_path / "clip.mp4", frames, crf=5))
    assert np.abs(back.astype(int) - frames).max() <= 3


def test_the_same_frames_make_the_same_file(tmp_path: Path) -> None:
    frames = moving_gradient(20)
    first = write(tmp_path / "a.mp4", frames, metadata={"seed": 1}).read_bytes()
    assert write(tmp_path / "b.mp4", frames, metadata={"seed": 1}).read_bytes() == first


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webp"])
def test_lossless_keeps_every_pixel(tmp_path: Path, name: str) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), dtype=np.uint8)
    assert np.array_equal(read_video(write(tmp_path / name, frames, lossless=True)), frames)


@pytest.mark.parametrize(("name", "first"), [("frames", "0000.png"), ("numbered/f%03d.png", "f000.png")])
def test_png_frames_are_numbered_and_exact(tmp_path: Path, name: str, first: str) -> None:
    frames = moving_gradient(5)
    write(tmp_path / name, frames)
    folder = tmp_path / name.split("/")[0]
    paths = sorted(folder.iterdir())
    assert paths[0].name == first
    assert np.array_equal([np.asarray(read_image(path)) for path in paths], frames)


def test_one_frame_can_be_a_png(tmp_path: Path) -> None:
    frame = moving_gradient(1)
    path = write(tmp_path / "picture.png", frame, metadata={"seed": 7})
    assert np.array_equal(np.asarray(read_image(path)), frame[0])
    assert read_metadata(path) == {"seed": 7}


@pytest.mark.parametrize(("name", "least_psnr"), [("clip.gif", 30), ("clip.webp", 35)])
def test_gif_and_webp_keep_length_and_picture(tmp_path: Path, name: str, least_psnr: float) -> None:
    frames = moving_gradient(21)
    path = write(tmp_path / name, frames)
    info = probe_video(path)
    assert (info.width, info.height) == (WIDTH, HEIGHT)
    assert info.seconds == pytest.approx(21 / 16, abs=0.01)
    back = read_video(path, fps=16)
    assert back.shape == frames.shape
    assert psnr(back, frames) > least_psnr
    with Image.open(path) as image:
        assert image.info["loop"] == 0  # for ever


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("frames", [1, 5])
def test_the_request_travels_inside_the_file(tmp_path: Path, name: str, frames: int) -> None:
    request = {"prompt": 'Käse "\\" 🎬\n', "seed": 2**63, "noise": [0.0, 0.2], "picture": "QUJD" * 500_000}  # 2 MB
    path = write(tmp_path / name, moving_gradient(frames), metadata=request)
    assert read_metadata(path) == request
    if path.is_file():
        assert read_video(path)[0].shape == (HEIGHT, WIDTH, 3)
        assert read_metadata(path.read_bytes()) == request


def test_a_file_without_a_request_has_none(tmp_path: Path) -> None:
    for name in OUTPUTS:
        assert read_metadata(write(tmp_path / name, moving_gradient(2))) is None
    for comment in ("made with love", "[1, 2]", "[" * 100_000, '"text"', "1" * 10_000):
        path = tmp_path / "foreign.mp4"
        with av.open(str(path), "w") as output:
            output.metadata["comment"] = comment
            stream = output.add_stream("libx264", rate=8)
            output.mux(stream.encode(av.VideoFrame(640, 480, "yuv420p")))
            output.mux(stream.encode(None))
        assert read_metadata(path) is None


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip.webp", "frames", "new/%04d.png", "picture.png"])
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing_behind(tmp_path: Path, name: str, failure: type[BaseException]) -> None:
    def interrupted() -> None:
        with VideoWriter(tmp_path / name, width=WIDTH, height=HEIGHT) as writer:
            writer.write(moving_gradient(1))
            raise failure

    with pytest.raises(failure):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", moving_gradient(3))
    before = path.read_bytes()
    with VideoWriter(path, width=WIDTH, height=HEIGHT) as unfinished:
        unfinished.write(moving_gradient(4))
        assert path.read_bytes() == before
        with pytest.raises(
            ValueError, match=r"frames uint8 \[1, 8, 8, 3\] do not fit; uint8 \[n, 96, 160, 3\] is expected"
        ):
            unfinished.write(np.zeros((1, 8, 8, 3), np.uint8))
        unfinished.write(moving_gradient(1))
    assert probe_video(path).frames == 5
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_video_of_no_frames_is_no_video(tmp_path: Path, name: str) -> None:
    with (
        pytest.raises(MediaError, match="no frame was written"),
        VideoWriter(tmp_path / name, width=WIDTH, height=HEIGHT),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    script = f"""
import resource, signal
import numpy as np
from pusa.media import VideoWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
noise = np.random.default_rng(0).integers(0, 256, (8, 96, 160, 3), dtype=np.uint8)
try:
    with VideoWriter({str(tmp_path / name)!r}, width=160, height=96) as writer:
        writer.write(noise)
except OSError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "File too large" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("clip.avi", {}, r"clip.avi: give .mp4, .gif, .webp, .png, a folder or folder/%04d.png"),
        ("a%sb.png", {}, r"give .mp4"),
        ("clip.mp4", {"width": 33}, r"size 33x32 is odd; an mp4 needs even sides"),
        ("clip.webp", {"width": 20_000}, r"size 20000x32 is outside 1..16383"),
        ("clip.mp4", {"height": 0}, r"size 32x0 is outside 1..16384"),
        ("clip.mp4", {"fps": 0}, r"fps=0 is outside 0.1..1000"),
        ("clip.mp4", {"crf": 52}, r"crf=52 is outside 0..51"),
        ("clip.gif", {"lossless": True}, r"a GIF holds 256 colours"),
        (".", {}, r"give .mp4|not an empty folder|no empty folder"),
    ],
)
def test_an_unwritable_output_is_refused_before_the_first_frame(
    tmp_path: Path, name: str, options: dict[str, int], message: str
) -> None:
    (tmp_path / "here").touch()
    with pytest.raises(ValueError, match=message):
        VideoWriter(tmp_path / name, **{"width": 32, "height": 32, **options})  # type: ignore[arg-type]


def test_names_that_are_taken_or_have_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing: no such folder; make it first"):
        VideoWriter(tmp_path / "missing" / "clip.mp4", width=32, height=32)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep.txt").touch()
    with pytest.raises(MediaError, match="full is there already and no empty folder; name another one"):
        VideoWriter(tmp_path / "full", width=32, height=32)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(MediaError, match=r"folder.mp4 is a folder; name a file in it"):
        VideoWriter(tmp_path / "folder.mp4", width=32, height=32)
    with pytest.raises(MediaError, match=r"a .png file holds one frame, and here is a second"):
        write(tmp_path / "picture.png", moving_gradient(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.mp4", "full"]


def test_a_longer_video_needs_no_more_memory(tmp_path: Path) -> None:
    """300 frames of 640x368 are 202 MiB; writing and streaming them back takes what 30 frames take."""
    script = f"""
import resource, sys
import numpy as np
from pusa.media import VideoWriter, iter_video
path = {str(tmp_path / "clip.mp4")!r}
with VideoWriter(path, width=640, height=368) as writer:
    for i in range(0, int(sys.argv[1]), 4):
        writer.write(np.full((4, 368, 640, 3), i % 256, np.uint8))
assert sum(1 for _ in iter_video(path)) == writer.frames_written
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    short, long = (
        int(subprocess.run([sys.executable, "-c", script, count], capture_output=True, check=True, timeout=60).stdout)
        for count in ("60", "300")
    )
    assert long - short < 40


# ---- pixels, previews


def test_to_uint8_rounds_once_and_alike_for_numpy_and_torch() -> None:
    values = torch.linspace(-1.2, 1.2, 3 * 2 * 8 * 8).reshape(1, 3, 2, 8, 8)
    pixels = to_uint8(values)
    assert (pixels.shape, pixels.dtype) == ((2, 8, 8, 3), np.uint8)
    assert np.array_equal(pixels, to_uint8(values[0].numpy()))
    exact = np.clip(values[0].double().numpy() / 2 + 0.5, 0, 1) * 255  # [3, n, H, W]
    assert np.abs(pixels - exact.transpose(1, 2, 3, 0)).max() <= 0.5 + 1e-4
    assert np.array_equal(to_uint8(values.bfloat16()), to_uint8(values.bfloat16().float()))
    levels = torch.arange(256).reshape(1, 1, 16, 16).expand(3, 1, 16, 16)
    assert np.array_equal(to_uint8(levels / 127.5 - 1)[0, ..., 0], levels[0, 0].numpy())
    assert to_uint8(np.zeros((3, 1, 1, 1)))[0, 0, 0, 0] == 128  # 127.5 goes to the even neighbour


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_to_uint8_refuses_numbers_that_are_none(value: float) -> None:
    for frames in (torch.full((3, 1, 2, 2), value), np.full((3, 1, 2, 2), value)):
        with pytest.raises(ValueError, match="hold NaN or infinity; decode with the VAE in float32"):
            to_uint8(frames)
    with pytest.raises(ValueError, match=r"frames of shape \[2, 3, 1, 2, 2\] are not \[3, n, H, W\]"):
        to_uint8(torch.zeros(2, 3, 1, 2, 2))


@pytest.mark.parametrize("name", [*OUTPUTS, None])
def test_a_thumbnail_is_the_frame_in_the_middle(tmp_path: Path, name: str | None) -> None:
    frames = grey_levels([0, 0, 0, 0, 200, 0, 0, 0, 0])
    image = thumbnail(frames if name is None else write(tmp_path / name, frames), 16)
    assert image.size == (16, 16)
    assert image.getpixel((8, 8))[0] == pytest.approx(200, abs=8)  # type: ignore[index]


@pytest.mark.parametrize("name", [*OUTPUTS, None])
def test_a_contact_sheet_shows_the_video_in_order(tmp_path: Path, name: str | None) -> None:
    frames = np.repeat(np.repeat(grey_levels([20 + 5 * i for i in range(40)]), 3, axis=1), 4, axis=2)  # 128 x 96
    source = frames if name is None else write(tmp_path / name, frames)
    sheet = contact_sheet(source, frames=6, columns=3, max_width=300)
    cell, margin = 94, 4
    height = (sheet.height - margin) // 2 - margin
    assert sheet.width == 3 * (cell + margin) + margin
    assert height == pytest.approx(96 * cell / 128, abs=1)
    pixels = np.asarray(sheet)
    shown = [
        int(pixels[margin + row * (height + margin) + height - 8, margin + column * (cell + margin) + cell - 8, 0])
        for row in range(2)
        for column in range(3)
    ]
    middles = [20 + 5 * ((2 * i + 1) * 40 // 12) for i in range(6)]
    assert shown == pytest.approx(middles, abs=8)
    assert pixels[margin : margin + 16, margin : margin + 40].max() > 230  # the time, in white


def test_a_sprite_sheet_has_its_frames_edge_to_edge(tmp_path: Path) -> None:
    frames = grey_levels([10 * i for i in range(25)])
    sheet = sprite_sheet(write(tmp_path / "clip.webp", frames), frames=6, columns=3, max_width=60)
    assert sheet.size == (60, 2 * 20)
    middles = [10 * ((2 * i + 1) * 25 // 12) for i in range(6)]
    shown = [sheet.getpixel((10 + 20 * column, 10 + 20 * row))[0] for row in range(2) for column in range(3)]  # type: ignore[index]
    assert shown == pytest.approx(middles, abs=8)
    assert sprite_sheet(frames[:2]).size == (2 * 32, 32)  # never larger than the video


def test_a_sheet_of_one_frame_is_one_cell() -> None:
    assert contact_sheet(grey_levels([9])).size == (32 + 8, 32 + 8)
    with pytest.raises(ValueError, match="columns=0"):
        contact_sheet(grey_levels([9]), columns=0)


def test_equal_frames_give_equal_files_whatever_lay_in_memory_before(tmp_path):
    ramp = np.linspace(0, 255, 96, dtype=np.uint8)
    rows = np.stack([np.roll(ramp, 2 * i) for i in range(24)])[:, None, :, None]
    frames = np.ascontiguousarray(np.broadcast_to(rows, (24, 64, 96, 3)))
    contents, litter = set(), []
    for size in np.random.default_rng(0).integers(1, 99_999, 12):
        litter.append(np.random.default_rng(size).random(size))  # moves what is allocated next
        with VideoWriter(tmp_path / "clip.mp4", width=96, height=64) as writer:
            for frame in frames:
                litter.append(np.full(size // 50 + 1, 0.5))
                writer.write(frame[None])
        contents.add((tmp_path / "clip.mp4").read_bytes())
    assert len(contents) == 1
