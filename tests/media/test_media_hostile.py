"""Whatever the bytes: a picture, a video, or one line that says what, why and what to do; and nothing left behind."""

import io
import os
import random
import socket
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media_samples import encode, moving_gradient, picture_bytes
from PIL import Image

from pusa.media import (
    DEFAULT_LIMITS,
    MediaError,
    MediaLimits,
    VideoWriter,
    contact_sheet,
    iter_video,
    probe_video,
    read_image,
    read_metadata,
    read_video,
    thumbnail,
)

READERS: list[Callable[..., object]] = [read_image, probe_video, read_video, read_metadata, thumbnail, contact_sheet]
PICTURES = ("PNG", "JPEG", "WEBP", "BMP")
FRAMES = moving_gradient(8)[:, :48, :64]
VIDEOS = ("mp4", "gif", "webp", "webm", "mkv", "avi", "mov", "ts", "apng", "avif")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One small valid file of each kind."""
    folder = tmp_path_factory.mktemp("samples")
    made = {kind: picture_bytes(Image.fromarray(FRAMES[0]), kind) for kind in PICTURES}
    for kind in ("mp4", "gif", "webp"):
        path = folder / f"clip.{kind}"
        with VideoWriter(path, width=64, height=48, metadata={"prompt": "a cat"}) as writer:
            writer.write(FRAMES)
        made[kind] = path.read_bytes()
    made["webm"] = encode(FRAMES, container="webm", codec="libvpx-vp9", pixels="yuv420p")
    made["mkv"] = encode(FRAMES, container="matroska", codec="mpeg4", pixels="yuv420p")
    made["avi"] = encode(FRAMES, container="avi", codec="mjpeg", pixels="yuvj420p")
    made["mov"] = encode(FRAMES, container="mov", codec="prores_ks", pixels="yuv422p10le")
    made["ts"] = encode(FRAMES, container="mpegts", codec="mpeg2video", pixels="yuv420p")
    first, *others = (Image.fromarray(frame) for frame in FRAMES)
    for kind, name in (("apng", "PNG"), ("avif", "AVIF")):
        made[kind] = picture_bytes(first, name, save_all=True, append_images=others, duration=40)
    assert set(made) == {*PICTURES, *VIDEOS}
    return made


def refusal(reader: Callable[..., object], source: object, **options: object) -> str:
    """The message with which `reader` refuses `source`; it must be one line that ends with the way out."""
    with pytest.raises(MediaError) as caught:
        reader(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    assert len(message) < 500
    assert ";" in message
    return message


def answer(reader: Callable[..., object], source: object) -> str | None:
    """The message with which `reader` refuses `source`, None if it does not; any other exception is a failure."""
    try:
        reader(source)
    except MediaError as error:
        return str(error)
    return None


def png_chunk(name: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


# ---- limits


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (MediaLimits(max_bytes=1024), r"MiB, the limit is 0.0009766 MiB; shorten it"),
        (
            MediaLimits(max_pixels=3000),
            r"64x48 is 0.003072 megapixels, the limit is 0.003; scale it down first",
        ),
        (MediaLimits(max_frames=7), r"clip.mp4: has 8 frames, the limit is 7; cut out the part you need"),
        (MediaLimits(max_seconds=0.25), r"clip.mp4: lasts 0.5 s, the limit is 0.25 s; cut out the part you need"),
        (MediaLimits(max_decode_seconds=1e-9), r"clip.mp4: decoding takes longer than the limit of 1e-09 s; shorten"),
    ],
)
def test_each_limit_names_the_value_the_limit_and_the_way_out(
    samples: dict[str, bytes], tmp_path: Path, limits: MediaLimits, message: str
) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(samples["mp4"])
    for reader in (read_video, probe_video, thumbnail, contact_sheet):
        assert message.replace(r"\.", ".") in refusal(reader, path, limits=limits)


def test_a_stacked_video_is_bounded_but_a_streamed_one_need_not_be(samples: dict[str, bytes]) -> None:
    limits = MediaLimits(max_decoded_bytes=5 * 64 * 48 * 3)
    assert "64x48 video of more than 5 frames passes the limit" in refusal(read_video, samples["mp4"], limits=limits)
    assert len(read_video(samples["mp4"], limits=limits, last_frames=5)) == 5
    assert sum(1 for _ in iter_video(samples["mp4"], limits=limits)) == 8


def test_time_spent_by_the_consumer_is_not_decoding_time(samples: dict[str, bytes]) -> None:
    count = 0
    for _ in iter_video(samples["gif"], limits=MediaLimits(max_decode_seconds=1.0)):
        time.sleep(0.15)
        count += 1
    assert count == 8


def test_a_rate_cannot_multiply_frames_past_the_limit(samples: dict[str, bytes]) -> None:
    message = refusal(read_video, samples["mp4"], fps=1000, limits=MediaLimits(max_frames=100))
    assert "fps=1000 makes more than 100 frames" in message


def test_a_jump_in_the_time_stamps_is_no_flood_of_frames() -> None:
    video = encode(FRAMES, times_ms=[0, 40, 80, 120, 160, 2_000_000_000, 2_000_000_040, 2_000_000_080])
    started = time.monotonic()
    assert "lasts 2e+06 s, the limit is 1200 s" in refusal(read_video, video, fps=16)
    assert time.monotonic() - started < 5


# ---- bombs


def test_a_picture_bomb_is_refused_unopened(tmp_path: Path) -> None:
    """12000 x 12000 pixels of one bit in 18 KB; as RGB they are 432 MB, and Pillow alone would only warn."""
    header = (12_000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    rows = zlib.compress(bytes(12_000 * 1_501), 9)
    path = tmp_path / "bomb.png"
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    assert path.stat().st_size < 20_000
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "bomb.png: 12000x12000 is 144 megapixels, the limit is 110; scale" in refusal(read_image, path)
    assert time.monotonic() - started < 1


def test_a_huge_size_in_a_header_is_refused(samples: dict[str, bytes]) -> None:
    gif = bytearray(samples["gif"])
    gif[6:10] = b"\xff\xff\xff\xff"
    for reader in (probe_video, read_video, thumbnail):
        assert "its frame size is unreadable or above 36 megapixels" in refusal(reader, bytes(gif))
    jpeg = bytearray(samples["JPEG"])
    size = jpeg.find(b"\xff\xc0") + 5
    jpeg[size : size + 4] = (65_000).to_bytes(2, "big") * 2
    assert "is far above the limit of 110 megapixels; scale it down" in refusal(read_image, bytes(jpeg))


def test_a_video_that_grows_in_mid_stream_is_refused() -> None:
    """Two MPEG-TS pieces, one after the other: 64x48, then 2048x1024."""
    pieces = []
    for width, height in ((64, 48), (2048, 1024)):
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mpegts") as output:
            stream = output.add_stream("mpeg2video", rate=25)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for _ in range(8):
                output.mux(stream.encode(av.VideoFrame(width, height, "yuv420p")))
            output.mux(stream.encode(None))
        pieces.append(buffer.getvalue())
    assert read_video(pieces[1], max_frames=1).shape == (1, 1024, 2048, 3)
    refusal(read_video, b"".join(pieces), limits=MediaLimits(max_pixels=1_000_000))
    assert "the frame size changes within the video" in refusal(read_video, b"".join(pieces))


def test_a_jpeg_of_a_thousand_scans_is_refused() -> None:
    data = picture_bytes(Image.fromarray(FRAMES[0]), "JPEG", progressive=True)
    last = data.rfind(b"\xff\xda")
    bomb = data[:last] + data[last:-2] * 1000 + data[-2:]
    assert read_image(data).size == (64, 48)
    assert "JPEG scans, the limit is 100" in refusal(read_image, bomb)


# ---- mislabelled, misplaced


def archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("clip.mp4", b"x" * 1000)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (archive(), "a ZIP archive"),
        (b"<!doctype html><title>404</title>" * 9, "a web page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>" * 9, "an SVG drawing"),
        (b"%PDF-1.7\n" * 40, "a PDF document"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n" * 9, "a playlist"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n" * 9, "a playlist"),
        (b"the quick brown fox\n" * 40, "text"),
        (b"\0\0\0\x1cftypheic\0\0\0\0" + bytes(99), "a HEIC picture"),
        (b"FLV\x01" + bytes(99), "a Flash video (FLV), which is not read here; convert it to MP4"),
        (b"\x30\x26\xb2\x75" + bytes(99), "a Windows Media video (WMV), which is not read here; convert it to MP4"),
        (b"\x7fELF\x02\x01\x01" + bytes(99), "of no kind known here"),
        (b"\0", "of no kind known here"),
    ],
)
def test_a_file_is_what_its_content_says(tmp_path: Path, content: bytes, what: str) -> None:
    for name in ("clip.mp4", "picture.png"):
        path = tmp_path / name
        path.write_bytes(content)
        for reader in READERS:
            assert f"{name} is {what}" in refusal(reader, path)


def test_pictures_and_videos_are_not_mistaken_for_each_other(samples: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(samples["PNG"])
    assert "clip.mp4 is a PNG picture, not a video; pass it as an image" in refusal(read_video, path)
    assert read_image(path).size == (64, 48)
    path = tmp_path / "picture.png"
    path.write_bytes(samples["mp4"])
    assert "picture.png is an MP4 or MOV video, not PNG, JPEG" in refusal(read_image, path)
    assert len(read_video(path)) == 8


@pytest.mark.parametrize(
    "name", ["http://127.0.0.1:9/a.mp4", "concat:a.mp4|b.mp4", "file:///etc/passwd", "data:video/mp4,x"]
)
def test_addresses_are_refused(name: str) -> None:
    for reader in READERS:
        assert "only local files are read, no addresses" in refusal(reader, name)


def test_places_that_hold_no_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        for reader in (read_image, probe_video, read_video):
            assert "is a folder; name a " in refusal(reader, tmp_path)
            assert "empty.mp4 is empty (0 bytes)" in refusal(reader, tmp_path / "empty.mp4")
            assert "pipe.mp4 is a device or a pipe" in refusal(reader, tmp_path / "pipe.mp4")
            assert "is a device or a pipe" in refusal(reader, tmp_path / "s")
            assert "is a device or a pipe" in refusal(reader, "/dev/zero")
            assert "cannot be opened" in refusal(reader, "a\0b.mp4")
            assert "cannot be opened" in refusal(reader, "x" * 5000)
    for reader in READERS:
        with pytest.raises(FileNotFoundError, match=r"missing.mp4: no such file; check the path") as caught:
            reader(tmp_path / "missing.mp4")
        assert "\n" not in str(caught.value)
        with pytest.raises(TypeError, match="comes from a path, bytes or a binary file, not from int"):
            reader(7)


def test_a_name_cannot_break_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a\nb\x1b[31m.mp4"
    path.write_bytes(b"\0" * 100)
    assert "a b [31m.mp4" in refusal(read_video, path)


# ---- damaged


def test_a_video_without_pictures_is_refused() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        sound = output.add_stream("aac", rate=44100)
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        tone.sample_rate = 44100
        output.mux(sound.encode(tone))
        output.mux(sound.encode(None))
    assert "has no video stream" in refusal(read_video, buffer.getvalue())


def test_an_mp4_of_no_frames_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=16)
        stream.width = stream.height = 64
        stream.codec_context.open()
        output.start_encoding()
    for reader in (probe_video, read_video, thumbnail):
        refusal(reader, path)


def test_a_codec_beyond_the_list_is_named() -> None:
    assert "its codec (rawvideo) is not read here; export it as H.264 MP4" in refusal(
        read_video, encode(FRAMES, container="avi", codec="rawvideo", pixels="yuv420p")
    )


@pytest.mark.parametrize("kind", [*PICTURES, *VIDEOS])
def test_a_file_cut_short_anywhere_is_refused(samples: dict[str, bytes], kind: str) -> None:
    """MPEG-TS is a stream that may end anywhere; a PNG is complete without its last chunk and check sum."""
    data = samples[kind]
    reader = read_image if kind in PICTURES else read_video
    end = len(data) - {"PNG": 32, "JPEG": 2}.get(kind, 1)
    for part in range(1, 25):
        cut = data[: max(1, end * part // 24)]
        if kind == "ts":
            assert answer(reader, cut) is None or refusal(reader, cut)
        else:
            refusal(reader, cut)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_read_or_refused(samples: dict[str, bytes], data: st.DataObject) -> None:
    content = bytearray(samples[data.draw(st.sampled_from(sorted(samples)))])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        new = data.draw(st.binary(max_size=16))
        content[at : at + data.draw(st.integers(0, 16))] = new
        content = content or bytearray(b"\0")
    for reader in READERS:
        message = answer(reader, bytes(content))
        assert message is None or (message.isprintable() and len(message) < 500)


@settings(max_examples=150, deadline=None)
@given(content=st.binary(min_size=1, max_size=400), kind=st.sampled_from([b"", b"RIFF\0\0\0\0WEBPVP8X", b"GIF89a",
    b"\0\0\0\x20ftypisom", b"\x1a\x45\xdf\xa3", b"RIFF\0\0\0\0AVI LIST", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0",
    b"BM\0\0\0\0\0\0\0\0", b"OggS", b"\0\0\x01\xba"]))  # fmt: skip
def test_random_bytes_behind_any_signature_are_read_or_refused(content: bytes, kind: bytes) -> None:
    for reader in READERS:
        message = answer(reader, kind + content)
        assert message is None or (message.isprintable() and len(message) < 500)


def test_a_damaged_source_interrupts_a_writer_without_a_trace(samples: dict[str, bytes], tmp_path: Path) -> None:
    rng = random.Random(0)
    refused = 0
    for kind in VIDEOS:
        for _ in range(6):
            content = bytearray(samples[kind])
            for _ in range(20):
                content[rng.randrange(len(content) // 2, len(content))] ^= 1 << rng.randrange(8)
            try:
                with VideoWriter(tmp_path / "copy.mp4", width=64, height=48) as writer:
                    for frame in iter_video(bytes(content)):
                        writer.write(frame[None])
            except MediaError:
                refused += 1
                assert list(tmp_path.iterdir()) == []
            else:
                (tmp_path / "copy.mp4").unlink()
    assert 5 < refused < 6 * len(VIDEOS)


def test_a_process_prints_nothing_but_the_line(samples: dict[str, bytes], tmp_path: Path) -> None:
    """FFmpeg and libjpeg like to talk to the terminal themselves."""
    for kind, content in samples.items():
        (tmp_path / kind).write_bytes(content[: len(content) // 2] + bytes(64) + content[len(content) // 2 + 64 :])
    script = """
import pathlib, sys
from pusa.media import (MediaError, probe_video, read_image, read_video,)
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    for reader in (read_image, probe_video, read_video):
        try:
            reader(path)
        except MediaError as error:
            print(error)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(str(tmp_path) in line for line in done.stdout.splitlines())


def test_default_limits_are_those_of_the_documentation() -> None:
    assert (
        MediaLimits(
            max_bytes=512 * 2**20,
            max_pixels=36_000_000,
            max_picture_pixels=110_000_000,
            max_frames=20_000,
            max_seconds=1200,
            max_decode_seconds=120,
            max_decoded_bytes=4 * 2**30,
        )
        == DEFAULT_LIMITS
    )
