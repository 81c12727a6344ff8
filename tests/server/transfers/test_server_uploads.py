"""Uploads: what they are is found out by a process that may die of them, and nothing of them lands anywhere else."""

import asyncio
import io
import subprocess
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from api_samples import FRAMES, HEIGHT, WIDTH, Served, clip, png, refusal, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from media_samples import write
from PIL import Image
from server_samples import wait_until

from pusa.server.errors import ServiceError
from pusa.server.http.body import _Multipart, parse_brackets
from pusa.server.transfers.uploads import ProbeLimits, Prober, Spool, Upload, UploadInfo, display_name


@pytest.fixture(scope="module")
def prober() -> Iterator[Prober]:
    prober = Prober(ProbeLimits(wall_seconds=60))
    yield prober
    prober.close()


def upload(folder: Path, content: bytes, name: str = "a file", expected_kind: Any = None) -> Upload:
    path = folder / f"{len(list(folder.iterdir()))}.part"
    path.write_bytes(content)
    return Upload(name=name, path=path, size=len(content), expected_kind=expected_kind)


def webp(frames: int) -> bytes:
    target = io.BytesIO()
    images = [Image.new("RGB", (32, 32), (40 * n, 0, 0)) for n in range(frames)]
    images[0].save(target, "WEBP", save_all=True, append_images=images[1:], duration=100)
    return target.getvalue()


def archive() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        file.writestr("../../evil.txt", "x")
    return target.getvalue()


def test_what_a_file_is_follows_from_its_content(prober: Prober, tmp_path: Path) -> None:
    video = clip(tmp_path)
    files = [
        upload(tmp_path, png(40, 30), "video.mp4"),
        Upload(name="picture.png", path=video),
        upload(tmp_path, webp(1)),
        upload(tmp_path, webp(3)),
        upload(tmp_path, webp(3), expected_kind="image"),
    ]
    image, moving, still, animated, first = prober.probe(files)
    assert image == UploadInfo("image", ".png", 40, 30, 1, None, 0.0)
    assert moving == UploadInfo("video", ".mp4", WIDTH, HEIGHT, FRAMES, 16.0, FRAMES / 16)
    assert (still.kind, animated.kind, first.kind) == ("image", "video", "image")
    assert animated.frames == 3


def test_files_that_are_neither_or_damaged_are_refused_by_name_and_without_paths(
    prober: Prober, tmp_path: Path
) -> None:
    video = clip(tmp_path).read_bytes()
    for content, code in (
        *(
            (b"", "file_empty"),
            (b"text", "not_a_picture"),
            (archive(), "not_a_picture"),
            (b"\0" * 1000, "not_a_picture"),
        ),
        *((png()[:60], "file_unreadable"), (video[: len(video) // 2], "file_cut_short")),
    ):
        with pytest.raises(ServiceError) as refused:
            prober.probe([upload(tmp_path, png()), upload(tmp_path, content, "the second one")])
        assert (refused.value.status, refused.value.code) == (400, code)
        assert refused.value.message.startswith("the second one: ")
        assert str(tmp_path) not in refused.value.message


def test_phone_pictures_avif_and_animated_pngs_are_taken(prober: Prober, tmp_path: Path) -> None:
    phone, avif, animated = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("1", (8064, 6048)).save(phone, "PNG")
    Image.new("RGB", (64, 32)).save(avif, "AVIF")
    Image.new("L", (32, 32)).save(animated, "PNG", save_all=True, append_images=[Image.new("L", (32, 32), 9)])
    files = [upload(tmp_path, file.getvalue()) for file in (phone, avif, animated)]
    infos = prober.probe(files)
    assert [(i.kind, i.suffix, i.width, i.frames) for i in infos] == [
        ("image", ".png", 8064, 1), ("image", ".avif", 64, 1), ("video", ".png", 32, 2)
    ]  # fmt: skip


def test_limits_are_those_of_the_operator(tmp_path: Path) -> None:
    prober = Prober(ProbeLimits(max_pixels=100 * 100, max_seconds=0.5, max_bytes=50_000, wall_seconds=60))
    flat = np.zeros((FRAMES, 64, 64, 3), np.uint8)
    files = (
        upload(tmp_path, png(101, 100)),
        Upload(name="long", path=write(tmp_path / "long.mp4", flat)),
        upload(tmp_path, png(20, 20) + b"\0" * 50_000),
    )
    try:
        for file in files:
            with pytest.raises(ServiceError, match="limit"):
                prober.probe([file])
    finally:
        prober.close()


def test_a_picture_that_needs_too_much_memory_is_refused(tmp_path: Path) -> None:
    prober = Prober(ProbeLimits(memory_bytes=64 * 2**20, wall_seconds=60))
    target = io.BytesIO()
    Image.new("RGB", (5900, 5900)).save(target, "PNG", compress_level=1)  # 100 MB when decoded
    try:
        with pytest.raises(ServiceError, match="bomb"):
            prober.probe([upload(tmp_path, target.getvalue(), "bomb")])
        assert prober.probe([upload(tmp_path, png())])[0].kind == "image"
    finally:
        prober.close()


ANSWER = '{"kind": "image", "suffix": ".png", "width": 1, "height": 1, "frames": 1, "fps": null, "seconds": 0}'


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.abort()",
        "import time; time.sleep(60)",
        "import os, socket, time; control = socket.socket(fileno=0); socket.recv_fds(control, 1, 1); time.sleep(60)",
        "import os, socket; control = socket.socket(fileno=0)\n"
        "while received := socket.recv_fds(control, 1, 1)[1]:\n"
        "    connection = socket.socket(fileno=received[0])\n"
        "    connection.sendall(b'%d\\n' % os.getpid())\n"
        "    connection.recv(65536)\n"
        f"    connection.sendall(b'{ANSWER}\\n')\n"
        "    os.kill(os.getpid(), 9)",
    ],
    ids=["dies at once", "hangs", "hangs with a file", "dies at the second file"],
)  # fmt: skip
def test_a_reader_that_dies_or_hangs_costs_the_request_and_nothing_else(tmp_path: Path, code: str) -> None:
    prober = Prober(ProbeLimits(wall_seconds=2), command=["-c", code])
    files = [upload(tmp_path, png(), "first"), upload(tmp_path, png(), "second")]
    began = time.monotonic()
    with pytest.raises(ServiceError) as refused:
        prober.probe(files)
    assert time.monotonic() - began < 30
    assert refused.value.status == 400
    assert refused.value.message.startswith("second" if "sendall" in code else "first")
    prober.close()


def test_one_process_loads_the_decoders_and_each_request_has_a_fork_of_it(prober: Prober, tmp_path: Path) -> None:
    prober.warm()
    process = prober.readers.process
    assert process is not None
    with prober.readers.open(60) as waiting:  # a reader that is told nothing yet
        assert prober.probe([upload(tmp_path, png())])[0].kind == "image"
        own = next(iter(psutil.Process(process.pid).children()))
        waiting.write(b'{"limits": {"max_pixels": 1}}\n')  # it cannot do anything with that
        waiting.flush()
        assert waiting.read() == b""
    wait_until(lambda: not own.is_running())
    assert prober.probe([upload(tmp_path, png())])[0].kind == "image"
    assert prober.readers.process is process
    assert process.poll() is None


def test_a_process_that_has_died_is_started_again(prober: Prober, tmp_path: Path) -> None:
    prober.warm()
    process = prober.readers.process
    assert process is not None
    process.kill()
    process.wait()
    assert prober.probe([upload(tmp_path, png())])[0].kind == "image"
    assert prober.readers.process is not process


def test_a_closed_prober_leaves_no_process(tmp_path: Path) -> None:
    prober = Prober()
    prober.warm()
    process = prober.readers.process
    prober.close()
    assert process is not None
    assert process.poll() is not None
    prober.warm()
    assert prober.readers.process is None


def test_names_of_clients_are_shown_on_one_line() -> None:
    assert display_name(Upload(name="a\n\x1b[31mb", path=Path())) == "a??[31mb"
    assert len(display_name(Upload(name="x" * 1000, path=Path()))) == 60
    assert display_name(Upload(name="", path=Path())) == "the file"


# ---- forms -----------------------------------------------------------------------------------------------------------


def read(body: bytes, folder: Path, piece: int) -> Any:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), piece):
            yield body[start : start + piece]

    return asyncio.run(_Multipart(b"x", Spool(folder), max_files=3, max_text_bytes=1000).read(pieces()))


@pytest.mark.parametrize("piece", [1, 7, 4096])
def test_a_file_arrives_whole_however_it_is_cut(tmp_path: Path, piece: int) -> None:
    content = b"\r\n--x-\r\n--y\r\n" * 50 + bytes(range(256))
    body = (
        b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na duck \xf0\x9f\xa6\x86\r\n'
        b'--x\r\nContent-Disposition: form-data; name="input_reference"; filename="../../a.png"\r\n'
        b"Content-Type: image/png\r\n\r\n" + content + b"\r\n--x--\r\n"
    )
    received = read(body, tmp_path, piece)
    assert received.values == {"prompt": "a duck \U0001f986"}
    [(name, file)] = received.files
    assert (name, file.name, file.content_type, file.size) == (
        "input_reference",
        "../../a.png",
        "image/png",
        len(content),
    )
    assert file.path.read_bytes() == content
    assert file.path.parent == tmp_path
    received.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", range(3, 140, 9))
def test_a_form_that_is_cut_short_leaves_nothing(tmp_path: Path, cut: int) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\n' + b"c" * 50 + b"\r\n--x--\r\n"
    with pytest.raises(ServiceError):
        read(body[:-cut], tmp_path, 16)
    assert not list(tmp_path.iterdir())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.text("ab[]01.", max_size=8), st.text('01[]{}",a', max_size=8)), max_size=6))
def test_names_with_brackets_become_values_or_a_refusal(pairs: list[tuple[str, str]]) -> None:
    with suppress(ServiceError):
        assert set(parse_brackets(pairs)) == {name.partition("[")[0] for name, _ in pairs}


def test_the_same_name_twice_is_a_list() -> None:
    pairs = [("a", "1"), ("a", "2"), ("b[]", "3"), ("c[d]", "4"), ("e[1]", "6"), ("e[0]", "5"), ("f", '{"g": [7]}')]
    expected = {"a": ["1", "2"], "b": ["3"], "c": {"d": "4"}, "e": ["5", "6"], "f": {"g": [7]}}
    assert parse_brackets(pairs) == expected
    assert parse_brackets([("prompt", "[a duck]")]) == {"prompt": "[a duck]"}


# ---- the server's folders --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("uploads")) as served:
        yield served


@pytest.mark.parametrize(
    "name",
    ["../../../evil.png", "/etc/evil.png", "a\\..\\b.png", "\u202egnp.exe", "a" * 5000, "con.png", "%2e%2e/x", ""],
)
def test_nothing_of_a_clients_name_becomes_a_path(server: Served, name: str) -> None:
    root = server.service.settings.data_folder

    def outside() -> set[Path]:
        return {path for other in root.parent.iterdir() if other != root for path in (other, *other.rglob("*"))}

    before = outside()
    files = {"input_reference": (name, png(), "image/png")}
    answer = server.http.post("/v1/videos", data={"prompt": "x"}, files=files)
    if name == "" or len(name) > 4096:  # then it is no file part, or its header is too long
        refusal(answer, 400)
        return
    id = answer.json()["id"]
    assert server.job(id).inputs == (f"inputs/{id}/0.png",)
    assert outside() == before


def test_refused_uploads_leave_nothing_behind(server: Served) -> None:
    stored = {key for key, _ in server.service.files.keys("inputs")}
    for data, files in (
        ({"prompt": "x"}, {"input_reference": ("a.png", b"no picture")}),
        ({"prompt": "x", "size": "wide"}, {"input_reference": ("a.png", png())}),
        ({"prompt": "x", "cond_positions": "99"}, {"input_reference": ("a.png", png())}),
        ({"prompt": "x"}, {"unknown": ("a.png", png())}),
        ({"prompt": "x"}, {"video": ("a.png", png())}),
    ):
        refusal(server.http.post("/v1/videos", data=data, files=files), 400)
    refusal(server.http.post("/v1/videos/extensions", files={"video": ("a.png", png())}), 400)
    assert not list(server.service.spool.folder.iterdir())
    assert {key for key, _ in server.service.files.keys("inputs")} == stored


def test_the_reader_is_confined_before_it_reads() -> None:
    code = (
        "import resource; from pusa.server.transfers.probe import confine; confine(10**9, 5);"
        "kinds = (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NOFILE);"
        "print([resource.getrlimit(kind)[0] for kind in kinds]);"
        "x = bytearray(2 * 10**9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[0, 0, 64]"
    assert "MemoryError" in done.stderr


@pytest.mark.slow
def test_damaged_requests_find_no_unhandled_error_and_write_nothing_elsewhere(tmp_path: Path) -> None:
    import hostile_requests

    figures = hostile_requests.run(150, 1, tmp_path)
    assert hostile_requests.is_good(figures), figures
    assert sum(results.get("4xx", 0) for results in figures["outcomes"].values()) > 50
    assert sum(results.get("2xx", 0) for results in figures["outcomes"].values()) > 5
