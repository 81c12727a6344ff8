"""Frames and strips of whatever is kept, and of results: the right ones, small, and within limits."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from api_samples import FRAMES, Served, png, refusal, serving
from file_samples import grey, keep, picture, spooled
from media_samples import encode, moving_gradient, picture_bytes
from PIL import Image

FRAMES_OF_THREE = moving_gradient(3)
FORMATS = {
    "hevc": ("video", lambda: encode(FRAMES_OF_THREE, container="mp4", codec="libx265", pixels="yuv420p")),
    "prores": ("video", lambda: encode(FRAMES_OF_THREE, container="mov", codec="prores_ks", pixels="yuv422p10le")),
    "avi": ("video", lambda: encode(FRAMES_OF_THREE, container="avi", codec="mpeg4", pixels="yuv420p")),
    "webm": ("video", lambda: encode(FRAMES_OF_THREE, container="webm", codec="libvpx-vp9", pixels="yuv420p")),
    "gif": ("video", lambda: animation("GIF")),
    "webp": ("video", lambda: animation("WEBP")),
    "apng": ("video", lambda: animation("PNG")),
    "avif": ("image", lambda: picture_bytes(Image.fromarray(FRAMES_OF_THREE[0]), "AVIF")),
    "still webp": ("image", lambda: picture_bytes(Image.fromarray(FRAMES_OF_THREE[0]), "WEBP")),
    "cmyk jpeg": ("image", lambda: picture_bytes(Image.fromarray(FRAMES_OF_THREE[0]).convert("CMYK"), "JPEG")),
}


def animation(kind: str) -> bytes:
    images = [Image.fromarray(frame) for frame in (FRAMES_OF_THREE[0], 255 - FRAMES_OF_THREE[1], FRAMES_OF_THREE[2])]
    return picture_bytes(images[0], kind, save_all=True, append_images=images[1:], duration=100)


@pytest.mark.parametrize("name", list(FORMATS))
def test_whatever_is_kept_is_drawn(server: Served, name: str) -> None:
    kind, make = FORMATS[name]
    file = keep(server, make(), name)
    assert (file["kind"], file["width"], file["height"]) == (kind, 160, 96)
    drawn = picture(server.http.get(f"/v1/files/{file['id']}/frame?index=0&width=80"))
    assert drawn.size == (80, 48)
    expected = Image.fromarray(FRAMES_OF_THREE[0]).resize((80, 48))
    assert np.abs(np.asarray(drawn, np.float64) - np.asarray(expected)).mean() < 12
    strip = picture(server.http.get(f"/v1/files/{file['id']}/strip?count=5&height=24"))
    assert strip.size == (5 * 40, 24)


def test_frames_are_found_by_number_and_time(server: Served, video: bytes) -> None:
    url = f"/v1/files/{keep(server, video)['id']}"
    levels = np.linspace(0, 255, FRAMES)
    for number in (0, 5, FRAMES - 1):
        assert grey(server.http.get(f"{url}/frame?index={number}")) == pytest.approx(levels[number], abs=4)
        assert grey(server.http.get(f"{url}/frame?time={number / 16}")) == pytest.approx(levels[number], abs=4)
    assert grey(server.http.get(f"{url}/frame?index=-2")) == pytest.approx(levels[-2], abs=4)
    cells = np.asarray(picture(server.http.get(f"{url}/strip?count={FRAMES}&height=32")))[16, 24::48, 0]
    assert cells.tolist() == pytest.approx(levels.tolist(), abs=4)
    first = server.http.get(f"{url}/frame?index=1")
    again = server.http.get(f"{url}/frame?index=1", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert "immutable" in first.headers["cache-control"]
    assert not spooled(server)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        *(("frame?width=1025", "width"), ("frame?width=1", "width"), ("frame?index=17", "index")),
        *(
            ("frame?index=-18", "index"),
            ("frame?time=9", "time"),
            ("frame?time=-1", "time"),
            ("frame?time=nan", "time"),
        ),
        *(("frame?index=1&time=0", "time"), ("frame?index=one", "index")),
        *(("strip?count=65", "count"), ("strip?count=0", "count"), ("strip?height=513", "height")),
    ],
)
def test_drawing_has_limits(server: Served, video: bytes, query: str, param: str) -> None:
    url = f"/v1/files/{keep(server, video)['id']}"
    assert refusal(server.http.get(f"{url}/{query}"), 400)["param"] == param


def test_what_a_waiting_video_is_made_from_is_drawn_without_a_file(server: Served) -> None:
    server.executor.gate.clear()
    files = {"input_reference": ("a.png", png(grey=200), "image/png")}
    answer = server.http.post("/v1/videos", data={"prompt": "wait", "num_frames": str(FRAMES)}, files=files)
    url = f"/v1/videos/{answer.json()['id']}"
    try:
        before = server.http.get("/v1/files").json()["data"]
        assert (answer.json()["status"], answer.json()["inputs"]) == ("queued", 1)
        assert grey(server.http.get(f"{url}/frame?input=0&width=32")) == pytest.approx(200, abs=4)
        assert picture(server.http.get(f"{url}/strip?input=0&count=2&height=24")).height == 24
        assert server.http.get("/v1/files").json()["data"] == before
        assert not spooled(server)
        assert refusal(server.http.get(f"{url}/frame?input=1"), 400)["param"] == "input"
        assert refusal(server.http.get(f"{url}/frame?input=-1"), 400)["param"] == "input"
        assert refusal(server.http.get(f"{url}/frame"), 409)["code"] == "not_ready"
    finally:
        server.executor.gate.set()
        server.ended(answer.json()["id"])


def test_what_a_video_is_made_from_is_its_owners_alone(tmp_path: Path) -> None:
    with serving(tmp_path, workers=0, api_keys=("anns-key-0123456789", "bobs-key-0123456789")) as server:
        anns, bobs = ({"authorization": f"Bearer {name}-key-0123456789"} for name in ("anns", "bobs"))
        files = {"input_reference": ("a.png", png(), "image/png")}
        job = server.http.post("/v1/videos", data={"prompt": "a"}, files=files, headers=anns).json()
        url = f"/v1/videos/{job['id']}/frame?input=0"
        assert server.http.get(url, headers=anns).status_code == 200
        assert refusal(server.http.get(url, headers=bobs), 404)["code"] == "video_not_found"
        assert server.http.get(url).status_code == 401


def test_a_picture_has_one_frame_and_turns_upright(server: Served) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    url = f"/v1/files/{keep(server, picture_bytes(Image.new('RGB', (60, 30)), 'JPEG', exif=exif))['id']}"
    assert picture(server.http.get(f"{url}/frame?width=1000")).size == (30, 60)
    assert refusal(server.http.get(f"{url}/frame?index=1"), 400)["param"] == "index"


def test_frames_of_results_are_drawn(server: Served) -> None:
    id = server.finished()["id"]
    assert grey(server.http.get(f"/v1/videos/{id}/frame?index=-1")) > 245
    assert picture(server.http.get(f"/v1/videos/{id}/strip?count=3&height=32")).size == (3 * 48, 32)
    waiting = server.create(prompt="wait")["id"]
    assert refusal(server.http.get(f"/v1/videos/{waiting}/frame"), 409)["code"] == "not_ready"
    server.http.post(f"/v1/videos/{waiting}/cancel")
    unknown = f"/v1/videos/video_{'0' * 32}/frame"
    assert refusal(server.http.get(unknown), 404)["code"] == "video_not_found"


def test_what_many_ask_for_at_once_is_drawn_once(server: Served, video: bytes, monkeypatch) -> None:
    id = keep(server, video)["id"]
    prober = server.service.submitter.prober
    drawn, make = [], prober.make
    monkeypatch.setattr(prober, "make", lambda *args, **options: drawn.append(1) or make(*args, **options))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: server.http.get(f"/v1/files/{id}/strip?count=5&height=33"), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len(drawn) == 1
