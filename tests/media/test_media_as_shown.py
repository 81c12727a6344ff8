"""Media as an ordinary player shows them: held frames, turned and mirrored, in sRGB, opaque, progressive."""

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from color_samples import (
    CHART,
    TO_BT2020,
    TO_P3,
    chart_pixels,
    chart_video,
    hlg,
    linear,
    patches,
    pq,
    profile_of,
    srgb,
)
from media_samples import encode, grey_levels, levels_of, moving_gradient, picture_bytes
from PIL import Image, ImageCms

from pusa.media import MediaError, MediaLimits, probe_image, probe_video, read_image, read_video

# ---- frames are held


def held(data: bytes, fps: float = 16) -> list[tuple[int, int]]:
    """(grey level, number of frames) of each stretch of equal frames; codecs are a little off, so rounded to tens."""
    stretches: list[tuple[int, int]] = []
    for level in (round(level, -1) for level in levels_of(read_video(data, fps=fps))):
        count = stretches.pop()[1] if stretches and stretches[-1][0] == level else 0
        stretches.append((level, count + 1))
    return stretches


@pytest.mark.parametrize(
    ("container", "codec", "pixels"),
    [
        ("mp4", "libx264", "yuv420p"),
        ("matroska", "libx264", "yuv420p"),
        ("matroska", "ffv1", "bgr0"),
        ("webm", "libvpx-vp9", "yuv420p"),
        ("avi", "mjpeg", "yuvj420p"),
    ],
)
def test_a_screen_recording_holds_a_frame_until_the_next(container: str, codec: str, pixels: str) -> None:
    levels = grey_levels([20, 120, 220])
    video = encode(levels, container=container, codec=codec, pixels=pixels, times_ms=[0, 100, 5000])
    assert held(video) == [(20, 2), (120, 78), (220, 1)]
    assert held(video, fps=4) == [(20, 1), (120, 19), (220, 1)]
    assert probe_video(video).seconds == pytest.approx(5.04, abs=0.001)


def test_the_slides_of_a_constant_slow_rate_are_held() -> None:
    video = encode(grey_levels([20, 120, 220]), container="mp4", codec="libx264", pixels="yuv420p",
                   times_ms=[0, 2000, 4000])  # fmt: skip
    assert held(video) == [(20, 32), (120, 32), (220, 1)]
    assert held(video, fps=4) == [(20, 8), (120, 8), (220, 1)]


def animation(kind: str, pictures: list[Image.Image], durations_ms: list[int], **options: Any) -> bytes:
    shared = {"save_all": True, "append_images": pictures[1:], "duration": durations_ms}
    return picture_bytes(pictures[0], kind, **shared, **options)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_an_animation_holds_its_frames_and_the_last_one(kind: str) -> None:
    pictures = [Image.new("RGB", (32, 32), (level,) * 3) for level in (40, 90, 140, 200)]
    data = animation(kind, pictures, [100, 1000, 200, 3000], **({"lossless": True} if kind == "WEBP" else {}))
    assert held(data) == [(40, 2), (90, 16), (140, 3), (200, 48)]
    info = probe_video(data)
    assert (info.frames, info.seconds) == (4, pytest.approx(4.3))


@pytest.mark.parametrize("start_ms", [2000, -300])
def test_time_begins_with_the_first_frame(start_ms: int) -> None:
    video = encode(grey_levels([20, 120, 220, 40]), times_ms=[start_ms + 100 * i for i in range(4)])
    assert held(video) == [(20, 2), (120, 1), (220, 2), (40, 1)]
    assert probe_video(video).seconds == pytest.approx(0.34)


def test_one_frame_is_a_video() -> None:
    assert read_video(encode(grey_levels([120])), fps=16).shape == (1, 32, 32, 3)


def test_an_animated_png_is_a_video_and_a_picture() -> None:
    pictures = [Image.new("RGB", (32, 32), (level,) * 3) for level in (40, 90)]
    data = animation("PNG", pictures, [500, 500])
    assert levels_of(read_video(data)) == [40, 90]
    assert read_image(data).getpixel((0, 0)) == (40, 40, 40)
    with pytest.raises(MediaError, match="is cut short"):
        read_video(data[:-30])


def test_frames_that_an_edit_list_hides_are_not_counted() -> None:
    levels = grey_levels([4 * i for i in range(60)])
    video = encode(levels, container="mp4", codec="libx264", pixels="yuv420p",
                   times_ms=[40 * i - 1200 for i in range(60)])  # fmt: skip
    info = probe_video(video)
    assert (info.frames, info.seconds) == (30, pytest.approx(1.2, abs=0.01))
    assert len(read_video(video)) == 30
    assert abs(levels_of(read_video(video))[0] - 120) <= 2


# ---- turned and mirrored

TURNS = {
    (1, 0, 0, 1): lambda x: x,
    (-1, 0, 0, 1): lambda x: x[:, ::-1],
    (1, 0, 0, -1): lambda x: x[::-1],
    (-1, 0, 0, -1): lambda x: x[::-1, ::-1],
    (0, 1, -1, 0): lambda x: np.rot90(x, -1),  # clockwise
    (0, -1, 1, 0): lambda x: np.rot90(x),
    (0, 1, 1, 0): lambda x: x.swapaxes(0, 1),
    (0, -1, -1, 0): lambda x: x.swapaxes(0, 1)[::-1, ::-1],
}


@pytest.mark.parametrize("matrix", TURNS, ids=str)
@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("mov", "libx265")])
def test_all_eight_display_matrices(matrix: tuple[int, ...], container: str, codec: str) -> None:
    plain = chart_video(container=container, codec=codec)
    turned = bytearray(plain)
    at = turned.find(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    turned[at : at + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    expected = TURNS[matrix](read_video(plain)[0])
    shown = read_video(bytes(turned))[0]
    assert shown.shape == expected.shape
    assert np.abs(shown.astype(int) - expected).mean() < 2
    info = probe_video(bytes(turned))
    assert (info.height, info.width) == expected.shape[:2]


# ---- colour

LIGHT = linear(CHART)
BT2020, P3 = (LIGHT @ TO_BT2020.T).clip(0, 1), (LIGHT @ TO_P3.T).clip(0, 1)
TEN_BIT: dict[str, Any] = {"codec": "libx265", "pixels": "yuv420p10le"}
WIDE: dict[str, Any] = {"matrix": 9, "colorspace": 9, "color_primaries": 9}


@pytest.mark.parametrize(
    ("coded", "options"),
    [
        (hlg(BT2020 * 203), {**TEN_BIT, **WIDE, "color_trc": 18}),
        (hlg(BT2020 * 203), {**WIDE, "color_trc": 18}),
        (hlg(BT2020 * 203), {**WIDE, "color_trc": 18, "color_range": 2}),
        (pq(BT2020 * 203), {**TEN_BIT, **WIDE, "color_trc": 16}),
        (pq(BT2020 * 203), {**TEN_BIT, "matrix": 9, "color_trc": 16}),
        (pq(P3 * 203), {**TEN_BIT, **WIDE, "color_primaries": 12, "color_trc": 16}),
    ],
    ids=["HLG", "HLG 8-bit", "HLG full range", "PQ", "PQ without other tags", "PQ P3"],
)
def test_hdr_is_tone_mapped(coded: np.ndarray, options: dict[str, Any]) -> None:
    video = chart_video(coded, **options)
    shown = patches(read_video(video)[0])
    assert np.abs(shown - CHART).mean() <= 4
    assert shown[0, 0].min() >= 235
    kind = "HLG" if options["color_trc"] == 18 else "PQ"
    assert probe_video(video).notes == (f"its HDR ({kind}) was tone-mapped to standard range",)


def test_highlights_of_hdr_keep_their_order() -> None:
    nits = np.linspace(20, 1000, 12).reshape(3, 4, 1).repeat(3, axis=2)
    shown = patches(read_video(chart_video(pq(nits), **TEN_BIT, **WIDE, color_trc=16))[0])[..., 0].ravel()
    assert np.all(np.diff(shown) >= 0)
    assert np.all(np.diff(shown[:7]) > 0)
    assert shown[6] < 254 <= shown[-1]


@pytest.mark.parametrize(
    ("coded", "options", "gamut"),
    [
        (srgb(BT2020), {**WIDE, "color_trc": 1}, "BT.2020"),
        (srgb(BT2020), {**TEN_BIT, **WIDE, "color_trc": 14}, "BT.2020"),
        (srgb(BT2020), {"matrix": 9, "colorspace": 9}, "BT.2020"),
        (srgb(P3), {"matrix": 1, "colorspace": 1, "color_primaries": 12, "color_trc": 1}, "P3"),
        (srgb(P3), {"matrix": 1, "colorspace": 1, "color_primaries": 11, "codec": "libvpx-vp9", "container": "webm"},
         "P3"),
    ],
)  # fmt: skip
def test_wide_gamuts_become_srgb(coded: np.ndarray, options: dict[str, Any], gamut: str) -> None:
    video = chart_video(coded, **options)
    assert np.abs(patches(read_video(video)[0]) - CHART).mean(axis=(0, 1)).max() <= 3
    assert probe_video(video).notes == (f"its colours were converted from {gamut} to sRGB",)


@pytest.mark.parametrize("color_range", [1, 2])
@pytest.mark.parametrize(
    ("size", "matrix", "tag"),
    [
        ((1280, 720), 1, 2),  # 2: untagged
        ((720, 1280), 1, 2),
        ((320, 240), 5, 2),
        ((720, 576), 5, 2),
        ((1280, 720), 5, 5),
        ((1280, 720), 5, 6),
        ((320, 240), 1, 1),
        ((320, 240), 7, 7),
        ((320, 240), 4, 4),
    ],
)
def test_the_matrix_is_the_tagged_one_or_that_of_the_size(
    size: tuple[int, int], matrix: int, tag: int, color_range: int
) -> None:
    video = chart_video(size=size, matrix=matrix, colorspace=tag, color_range=color_range)
    assert np.abs(patches(read_video(video)[0]) - CHART).mean() <= 2
    assert probe_video(video).notes == ()


def test_a_matrix_beyond_the_list_is_named() -> None:
    with pytest.raises(MediaError, match=r"its colour matrix \(number 8 of H.273\) is not read here; export it"):
        read_video(chart_video(matrix=1, colorspace=8))


# ---- transparency


def clip_with_alpha(codec: str, pixels: str, container: str) -> bytes:
    """Red on the right half, transparent black on the left."""
    rgba = np.zeros((4, 64, 96, 4), np.uint8)
    rgba[:, :, 48:] = (250, 0, 0, 255)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=16, options={"auto-alt-ref": "0"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, pixels
        if codec.startswith("libvpx"):
            stream.metadata["alpha_mode"] = "1"
        for index, frame in enumerate(rgba):
            picture = av.VideoFrame.from_ndarray(frame, format="rgba").reformat(format=pixels)
            picture.pts = index
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("codec", "pixels", "container"),
    [
        ("libvpx-vp9", "yuva420p", "webm"),
        ("libvpx", "yuva420p", "webm"),
        ("prores_ks", "yuva444p10le", "mov"),
        ("ffv1", "bgra", "matroska"),
    ],
)
def test_transparent_video_is_on_white(codec: str, pixels: str, container: str) -> None:
    video = clip_with_alpha(codec, pixels, container)
    frames = read_video(video, fps=16).astype(int)
    assert frames.shape == (4, 64, 96, 3)
    assert np.abs(frames[:, :, :40] - 255).max() <= 3
    assert np.abs(frames[:, :, 56:] - (250, 0, 0)).mean() <= 4
    assert probe_video(video).notes == ("its transparency is shown on white",)
    assert np.abs(read_video(video, fit=(48, 32))[:, :, :20].astype(int) - 255).max() <= 3


MOVES = [[10, 255, 255, 255], [255, 10, 255, 255], [255, 255, 10, 255]]
GROWS = [[10, 255, 255, 255], [10, 10, 255, 255], [10, 10, 10, 255]]


@pytest.mark.parametrize(
    ("kind", "options", "shown"),
    [
        ("GIF", {"disposal": 1}, GROWS),
        ("GIF", {"disposal": 2}, MOVES),
        ("WEBP", {"lossless": True}, MOVES),
        ("PNG", {}, MOVES),
        ("PNG", {"blend": 1, "disposal": 0}, GROWS),
        ("AVIF", {"quality": 100}, MOVES),
    ],
)
def test_a_shape_on_transparent_ground_is_on_white(kind: str, options: dict[str, Any], shown: list[list[int]]) -> None:
    pictures = []
    for number in range(3):
        picture = Image.new("RGBA", (32, 32))
        picture.paste((10, 10, 10, 255), (8 * number, 0, 8 * number + 8, 32))
        pictures.append(picture)
    frames = read_video(animation(kind, pictures, [100] * 3, **options))[:, 16, 4::8, 0].astype(int)
    assert np.abs(frames - shown).max() <= 2


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "AVIF"])
def test_a_transparent_animation_is_on_white(kind: str) -> None:
    pictures = [Image.new("RGBA", (32, 32), (0, 0, 0, 0)), Image.new("RGBA", (32, 32), (0, 0, 0, 128))]
    data = animation(kind, pictures, [100, 100], **({"lossless": True} if kind == "WEBP" else {}))
    assert [abs(a - b) <= 1 for a, b in zip(levels_of(read_video(data)), [255, 127], strict=True)] == [True, True]
    assert probe_video(data).notes == ("its transparency is shown on white",)


# ---- interlaced


@pytest.mark.parametrize("order", ["tff", "bff"])
def test_interlaced_video_has_no_comb(order: str) -> None:
    fields = np.full((40, 96, 160, 3), 30, np.uint8)
    for number, field in enumerate(fields):
        field[:, 3 * number : 3 * number + 30] = 230
    woven = fields[::2].copy()
    second = 1 if order == "tff" else 0
    woven[:, second::2] = fields[1::2, second::2]
    video = encode(woven, container="mp4", codec="libx264", pixels="yuv420p", stream={"x264-params": f"{order}=1"})
    shown = read_video(video).astype(int)
    assert len(shown) == 20
    assert np.abs(np.diff(shown, 2, axis=1)).mean(axis=(1, 2, 3)).max() < 1
    assert np.abs(np.diff(woven.astype(int), 2, axis=1)).mean() > 10
    info = probe_video(video)
    assert (info.notes, info.frames) == (("it is interlaced and was deinterlaced",), 20)
    assert len(read_video(video, fps=16)) == 13


# ---- shapes and lengths


def test_anamorphic_mpeg2_gets_square_pixels() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpeg") as output:
        stream = output.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 72, 58, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(64, 45)
        for _ in range(3):
            output.mux(stream.encode(av.VideoFrame(72, 58, "yuv420p")))
        output.mux(stream.encode(None))
    height, width = read_video(buffer.getvalue()).shape[1:3]
    assert height == 58
    assert width == pytest.approx(72 * 64 / 45, abs=2)


# ---- pictures


@pytest.mark.parametrize("gamut", ["P3", "BT.2020"])
@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB")])
def test_a_pictures_profile_is_applied(gamut: str, kind: str, mode: str) -> None:
    coded = srgb({"P3": P3, "BT.2020": BT2020}[gamut])
    picture = Image.fromarray(chart_pixels(coded, 160, 96, depth=8))
    picture = picture.quantize(16) if mode == "P" else picture.convert(mode)
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}[kind]
    data = picture_bytes(picture, kind, icc_profile=profile_of(gamut), **options)
    image = read_image(data)
    assert image.mode == ("RGBA" if mode == "RGBA" else "RGB")
    assert np.abs(patches(np.asarray(image.convert("RGB"))) - CHART).mean() <= 4
    (note,) = probe_image(data).notes
    assert note.startswith("its colours were converted from ")


def test_a_profile_of_srgb_changes_nothing_and_a_damaged_one_is_told() -> None:
    picture = Image.fromarray(moving_gradient(1)[0])
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = picture_bytes(picture, "PNG", icc_profile=content)
    assert np.array_equal(np.asarray(read_image(data)), moving_gradient(1)[0])
    assert probe_image(data).notes == ()
    damaged = picture_bytes(picture, "PNG", icc_profile=content[:200])
    assert np.array_equal(np.asarray(read_image(damaged)), moving_gradient(1)[0])
    assert probe_image(damaged).notes == ("its colour profile is damaged and was ignored",)


def test_transparent_pictures_say_so() -> None:
    grey = Image.new("LA", (4, 4), (90, 100))
    palette = Image.new("RGBA", (4, 4), (10, 20, 30, 0)).quantize(4)
    for picture in (grey, palette):
        data = picture_bytes(picture, "PNG")
        assert read_image(data).mode == "RGBA"
        assert probe_image(data).notes == ("its transparency is shown on white",)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "1"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "I;16")],
)
def test_a_large_picture_is_read_at_a_part_of_its_size(kind: str, mode: str) -> None:
    picture = Image.fromarray(chart_pixels(CHART / 255, 600, 400, depth=8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    data = picture_bytes(picture, kind, exif=exif)
    limits = MediaLimits(max_pixels=70_000, max_picture_pixels=240_000)
    image, info = read_image(data, limits=limits), probe_image(data, limits=limits)
    assert (info.width, info.height) == (400, 600)
    assert image.size == (200, 300)
    with pytest.raises(MediaError, match=r"600x400 is 0\.24 megapixels, the limit is 0\.2; scale it down first"):
        read_image(data, limits=MediaLimits(max_pixels=70_000, max_picture_pixels=200_000))


def test_avif_is_read_and_heic_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    chart = Image.fromarray(chart_pixels(CHART / 255, 160, 96, depth=8))
    image = read_image(picture_bytes(chart, "AVIF", quality=95))
    assert np.abs(patches(np.asarray(image)) - CHART).mean() <= 4
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)  # not installed
    with pytest.raises(MediaError, match=r"is a HEIC picture, which is not read here; install its reader \(`pip"):
        read_image(b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(99))
    monkeypatch.delitem(Image.OPEN, "AVIF")
    with pytest.raises(MediaError, match="is an AVIF picture, which is not read here; upgrade Pillow"):
        read_image(picture_bytes(chart, "AVIF"))
