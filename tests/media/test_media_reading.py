"""Pictures and videos in: any common one, upright, at the rate and size asked for."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media_samples import HEIGHT, WIDTH, encode, grey_levels, levels_of, moving_gradient, picture_bytes, psnr, write
from PIL import Image

from pusa.media import MediaError, iter_video, probe_video, read_image, read_video

# ---- reading videos


def test_25_frames_per_second_become_16_by_taking_the_nearest() -> None:
    levels = [4 * i for i in range(50)]
    picked = levels_of(read_video(encode(grey_levels(levels)), fps=16))
    nearest = [4 * min(range(50), key=lambda i: (abs(Fraction(i, 25) - Fraction(k, 16)), i)) for k in range(32)]
    assert picked == nearest


def test_a_higher_rate_repeats_frames() -> None:
    video = encode(grey_levels([10, 20, 30]), fps=8)
    assert levels_of(read_video(video, fps=16)) == [10, 10, 20, 20, 30, 30]


def test_at_a_variable_rate_a_frame_is_held_until_the_next_one() -> None:
    video = encode(grey_levels([10, 20, 30, 40]), times_ms=[0, 500, 600, 1000])
    assert levels_of(read_video(video)) == [10, 20, 30, 40]
    assert levels_of(read_video(video, fps=10, max_frames=11)) == [10] * 5 + [20] + [30] * 4 + [40]


@pytest.mark.parametrize("container", ["matroska", "avi"])
def test_reading_at_the_rate_of_the_file_changes_nothing(container: str) -> None:
    """Matroska rounds 1/16 s to milliseconds; that must not add, drop or repeat a frame."""
    levels = [2 * i for i in range(81)]
    video = encode(grey_levels(levels), container=container, fps=16)
    assert levels_of(read_video(video, fps=16)) == levels


def test_a_part_of_a_video_is_exact_to_the_frame(tmp_path: Path) -> None:
    levels = [5 * i for i in range(48)]
    path = write(tmp_path / "clip.mp4", grey_levels(levels), lossless=True)
    assert levels_of(read_video(path, start_seconds=1.5, max_frames=3)) == levels[24:27]
    assert levels_of(read_video(path, start_seconds=1.5, max_frames=3, fps=8)) == levels[24:30:2]
    assert levels_of(read_video(path, last_frames=13)) == levels[-13:]
    assert levels_of(read_video(path, last_frames=4, fps=8)) == levels[::2][-4:]
    assert levels_of(read_video(path, last_frames=100)) == levels
    with pytest.raises(MediaError, match=r"start_seconds=3 is past the end of .*clip.mp4 \(3 s long\)"):
        read_video(path, start_seconds=3)


def test_frames_are_scaled_down_to_cover_and_never_up(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", moving_gradient(2))  # 160 x 96
    assert next(iter_video(path, fit=(50, 48))).shape == (48, 80, 3)
    assert next(iter_video(path, fit=(150, 10))).shape == (90, 150, 3)
    assert next(iter_video(path, fit=(400, 10))).shape == (96, 160, 3)
    small = np.asarray(Image.fromarray(moving_gradient(1)[0]).resize((80, 48), Image.Resampling.LANCZOS))
    assert psnr(next(iter_video(path, fit=(80, 48))), small) > 35


def test_a_path_bytes_and_an_open_file_read_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", moving_gradient(3))
    expected = read_video(path)
    with path.open("rb") as file:
        file.seek(7)
        assert np.array_equal(read_video(file), expected)
        assert probe_video(file).frames == 3
        assert not file.closed
    assert np.array_equal(read_video(str(path)), expected)
    assert np.array_equal(read_video(path.read_bytes()), expected)


def test_a_recording_without_a_duration_is_measured() -> None:
    video = encode(grey_levels(list(range(0, 100, 4))), container="webm", codec="libvpx-vp9", pixels="yuv420p",
                   options={"live": "1"})  # fmt: skip
    info = probe_video(video)
    assert (info.frames, info.codec) == (25, "vp9")
    assert info.seconds == pytest.approx(1.0, abs=0.01)


def test_a_phones_portrait_video_stands_upright(tmp_path: Path) -> None:
    """Phones store landscape frames and a matrix in the track header; here: a quarter turn clockwise."""
    frames = np.zeros((4, 32, 64, 3), np.uint8)
    frames[:, :, 32:] = 200  # the right half is bright
    data = bytearray(write(tmp_path / "clip.mp4", frames).read_bytes())
    matrix = data.find(b"tkhd") + 4 + 40
    turned = (0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turned)
    video = bytes(data)
    assert (probe_video(video).width, probe_video(video).height) == (32, 64)
    upright = read_video(video)
    assert upright.shape == (4, 64, 32, 3)
    assert upright[0, 60, 16, 0] > 180  # bright below
    assert upright[0, 3, 16, 0] < 20
    assert next(iter_video(video, fit=(16, 16))).shape == (32, 16, 3)


@pytest.mark.parametrize(
    ("container", "codec", "pixels", "name"),
    [
        ("mp4", "libx265", "yuv420p10le", "hevc"),
        ("mp4", "libsvtav1", "yuv420p", "av1"),
        ("webm", "libvpx", "yuv420p", "vp8"),
        ("matroska", "libx264", "yuv444p", "h264"),
        ("mov", "prores_ks", "yuv422p10le", "prores"),
        ("avi", "mpeg4", "yuv420p", "mpeg4"),
        ("avi", "mjpeg", "yuvj420p", "mjpeg"),
        ("ogg", "libvpx", "yuv420p", "vp8"),
        ("mpeg", "mpeg2video", "yuv420p", "mpeg2video"),
        ("mpegts", "libx264", "yuv420p", "h264"),
        ("3gp", "mpeg4", "yuv420p", "mpeg4"),
    ],
)
def test_common_videos_are_read(container: str, codec: str, pixels: str, name: str) -> None:
    frames = moving_gradient(25)
    video = encode(frames, container=container, codec=codec, pixels=pixels)
    info = probe_video(video)
    assert (info.width, info.height, info.codec) == (WIDTH, HEIGHT, name)
    back = read_video(video)
    assert len(back) == 25
    assert psnr(back, frames) > 25
    assert len(read_video(video, fps=16)) == 16


def test_anamorphic_video_gets_square_pixels() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 72, 58, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(16, 9)
        output.mux(stream.encode(av.VideoFrame(72, 58, "yuv420p")))
        output.mux(stream.encode(None))
    assert read_video(buffer.getvalue()).shape == (1, 58, 128, 3)


def test_the_original_projects_video(inputs: Path) -> None:
    path = inputs / "input_video.mp4"
    info = probe_video(path)
    assert (info.width, info.height, info.fps, info.frames, info.seconds) == (1280, 720, 24.0, 192, 8.0)
    frames = read_video(path, fps=16, fit=(208, 120))
    assert frames.shape == (128, 120, 214, 3)
    assert np.array_equal(read_video(path, fps=16, fit=(208, 120), last_frames=13), frames[-13:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 0}, r"fps=0 is outside 0..1000"),
        ({"fps": float("nan")}, r"fps=nan is outside"),
        ({"start_seconds": -1.0}, r"start_seconds=-1.0 is not a time"),
        ({"max_frames": 0}, r"max_frames=0 is less than 1"),
        ({"last_frames": 0}, r"last_frames=0 is less than 1"),
        ({"max_frames": 1, "last_frames": 1}, r"give one of them"),
        ({"fit": (0, 10)}, r"fit=\(0, 10\) is not a size"),
    ],
)
def test_absurd_requests_are_refused_before_the_file_is_opened(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_video("does-not-exist.mp4", **options)  # type: ignore[arg-type]


# ---- reading pictures


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_pictures_are_read_exactly(kind: str) -> None:
    pixels = moving_gradient(1)[0]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = read_image(picture_bytes(Image.fromarray(pixels), kind, **options))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), pixels)


def test_the_real_pictures_are_read(inputs: Path) -> None:
    photographs = sorted(inputs.glob("*.jpg"))
    assert photographs
    for path in photographs:
        image = read_image(path)
        assert image.mode == "RGB"
        assert min(image.size) >= 400


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (40, 20))
    image.paste((250, 250, 250), (0, 0, 20, 20))  # bright on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    upright = read_image(picture_bytes(image, "JPEG", exif=exif))
    assert upright.size == (20, 40)
    assert np.asarray(upright)[5, 10, 0] > 240  # bright above
    assert np.asarray(upright)[35, 10, 0] < 10


def test_every_kind_of_pixel_becomes_rgb_or_rgba() -> None:
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    grey16 = read_image(picture_bytes(Image.fromarray(ramp), "PNG"))
    assert np.array_equal(np.asarray(grey16)[..., 0], ramp >> 8)
    transparent = Image.new("RGBA", (4, 4), (10, 20, 30, 40))
    assert read_image(picture_bytes(transparent, "PNG")).getpixel((0, 0)) == (10, 20, 30, 40)
    palette = transparent.quantize(4)
    assert read_image(picture_bytes(palette, "PNG")).mode == "RGBA"
    for mode in ("1", "L", "P"):
        assert read_image(picture_bytes(Image.new(mode, (4, 4)), "PNG")).mode == "RGB"
    assert read_image(picture_bytes(Image.new("CMYK", (4, 4)), "JPEG")).getpixel((0, 0)) == (255, 255, 255)
