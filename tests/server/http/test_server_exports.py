"""Exports of finished videos (GIF, WebP, the last frame) and films of several: made on demand, marked, well named."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from api_samples import FRAMES, HEIGHT, WIDTH, InstantExecutor, Served, refusal, serving
from PIL import Image

from pusa import media
from pusa.provenance.marks import read_marks
from pusa.provenance.xmp import COMPOSITE, GENERATED, Mark, write_packet

MARK = Mark(GENERATED, "pusa tiny", "1", tool="pusa 1")


class MarkedExecutor(InstantExecutor):
    """Makes a video that says how it was made."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        levels = np.linspace(0, 255, FRAMES).astype(np.uint8)
        frames = np.broadcast_to(levels[:, None, None, None], (FRAMES, HEIGHT, WIDTH, 3)).copy()
        video = folder / "marked.mp4"
        with media.VideoWriter(video, width=WIDTH, height=HEIGHT, fps=16, xmp=write_packet(MARK)) as writer:
            writer.write(frames)
        self._files["video"] = video


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("exports")
    with serving(folder, executor=MarkedExecutor(folder / "executor"), max_upload_seconds=4.0) as served:
        yield served


def export(server: Served, id: str, variant: str) -> httpx.Response:
    answer = server.http.get(f"/v1/videos/{id}/content", params={"variant": variant})
    assert answer.status_code == 200, answer.text
    return answer


@pytest.mark.parametrize(
    ("variant", "kind", "end"),
    [("gif", "image/gif", ".gif"), ("webp", "image/webp", ".webp"), ("last_frame", "image/png", "_last_frame.png")],
)
def test_an_export_is_made_with_the_marks_of_its_video(server: Served, variant: str, kind: str, end: str) -> None:
    id = server.finished(prompt="a duck", seed=7)["id"]
    answer = export(server, id, variant)
    assert answer.headers["content-type"] == kind
    assert answer.headers["content-disposition"] == f'inline; filename="a-duck-seed-7{end}"'
    picture = Image.open(io.BytesIO(answer.content))
    assert picture.size == (WIDTH, HEIGHT)
    if variant == "last_frame":
        assert np.asarray(picture.convert("RGB")).mean() > 250  # the clip ends in white
    else:
        assert media.probe_video(io.BytesIO(answer.content)).seconds == pytest.approx(FRAMES / 16, abs=0.02)
    mark = read_marks(io.BytesIO(answer.content)).mark
    assert mark is not None
    assert (mark.source_type, mark.system) == (GENERATED, "pusa tiny")


def test_an_export_is_made_once_and_kept_with_its_video(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    id = server.finished()["id"]
    asked: list[Any] = []
    make = server.service.submitter.prober.make

    def counted(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments)
        return make(*arguments, **options)

    monkeypatch.setattr(server.service.submitter.prober, "make", counted)
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: export(server, id, "gif"), range(3)))
    assert len({answer.content for answer in answers}) == 1
    assert len(asked) == 1
    part = server.http.get(f"/v1/videos/{id}/content?variant=gif", headers={"range": "bytes=0-5"})
    assert (part.status_code, part.content) == (206, b"GIF89a")
    server.http.delete(f"/v1/videos/{id}")
    assert [key for key, _ in server.service.files.keys(f"results/{id}")] == []


def test_an_export_waits_for_its_video(server: Served) -> None:
    server.executor.gate.clear()
    id = server.create(prompt="wait")["id"]
    error = refusal(server.http.get(f"/v1/videos/{id}/content?variant=webp"), 409)
    assert error["code"] == "not_ready"
    server.executor.gate.set()
    server.ended(id)
    refusal(server.http.get(f"/v1/videos/video_{'0' * 32}/content?variant=gif"), 404)


def test_names_of_downloads_may_have_any_letters(server: Served) -> None:
    id = server.finished(prompt='红苹果 "../x"\n', seed=3)["id"]
    shown = server.http.get(f"/v1/videos/{id}/content").headers["content-disposition"]
    plain, long = shown.split("; ")[1:]
    assert plain == 'filename="___-x-seed-3.mp4"'
    assert long == "filename*=UTF-8''%E7%BA%A2%E8%8B%B9%E6%9E%9C-x-seed-3.mp4"


def film(server: Served, ids: list[str]) -> httpx.Response:
    return server.http.post("/v1/films", json={"videos": ids})


def test_videos_are_joined_to_a_film(server: Served) -> None:
    ids = [server.finished(prompt="a duck", seed=seed)["id"] for seed in (1, 2)]
    answer = film(server, [*ids, ids[0]])
    assert answer.status_code == 200, answer.text
    file = answer.json()
    assert (file["object"], file["kind"], file["frames"], file["fps"]) == ("file", "video", 3 * FRAMES, 16)
    assert (file["width"], file["height"], file["filename"]) == (WIDTH, HEIGHT, "a-duck-seed-1_film.mp4")
    content = server.http.get(f"/v1/files/{file['id']}/content").content
    frames = media.read_video(io.BytesIO(content))
    assert frames.shape == (3 * FRAMES, HEIGHT, WIDTH, 3)
    assert frames[FRAMES - 1].mean() > 250
    assert frames[FRAMES].mean() < 5
    mark = read_marks(io.BytesIO(content)).mark
    assert mark is not None
    assert mark.source_type == GENERATED
    assert [one.system for one in mark.inputs] == ["pusa tiny"] * 3


def test_a_film_of_other_sizes_has_that_of_its_first_video(tmp_path: Path) -> None:
    from pusa.media.conversions import write_film

    paths = []
    for number, (width, height) in enumerate([(64, 48), (32, 64)]):
        paths.append(tmp_path / f"{number}.mp4")
        with media.VideoWriter(paths[-1], width=width, height=height, fps=8 * (number + 1)) as writer:
            writer.write(np.full((8, height, width, 3), 200, np.uint8))
    target = io.BytesIO()
    assert write_film([str(path) for path in paths], target, size=(64, 48), fps=media.conversions.Fraction(8)) == 12
    frames = media.read_video(io.BytesIO(target.getvalue()))
    assert frames.shape == (12, 48, 64, 3)
    assert abs(int(frames[0].mean()) - 200) < 5
    assert frames[-1][:, :16].mean() < 5  # black beside the upright one
    assert abs(int(frames[-1][:, 24:40].mean()) - 200) < 5


def test_a_film_that_cannot_be_made_says_why(server: Served) -> None:
    id = server.finished()["id"]
    assert refusal(film(server, [id]), 400)["code"] == "film_too_short"
    error = refusal(film(server, [id] * 5), 400)
    assert (error["code"], error["values"]["limit"]) == ("film_too_long", 4)
    refusal(film(server, [id, f"video_{'0' * 32}"]), 404)
    failed = server.finished(prompt="fail")["id"]
    assert refusal(film(server, [id, failed]), 404)["code"] == "no_result"
    assert refusal(film(server, ["nonsense", id]), 400)["param"] == "videos"


def test_a_film_with_unmarked_videos_is_a_composite(tmp_path: Path) -> None:
    from pusa.server.transfers.making import _mark_of_film

    files = []
    for number, xmp in enumerate((write_packet(MARK), b"")):
        path = tmp_path / f"{number}.mp4"
        with media.VideoWriter(path, width=32, height=32, xmp=xmp) as writer:
            writer.write(np.zeros((2, 32, 32, 3), np.uint8))
        files.append(io.BytesIO(path.read_bytes()))
    packet = _mark_of_film(files, ["0" * 64, "1" * 64])
    assert COMPOSITE in packet.decode()
    assert _mark_of_film(files[1:], ["1" * 64]) == b""


def test_a_result_may_be_longer_than_an_upload(tmp_path: Path) -> None:
    with serving(tmp_path, near_prober=False, max_upload_seconds=0.1, max_upload_frames=2) as server:
        id = server.finished(prompt="a long one")["id"]
        for path in ("frame", "strip?count=2", *(f"content?variant={name}" for name in ("gif", "webp", "last_frame"))):
            assert server.http.get(f"/v1/videos/{id}/{path}").status_code == 200, path
        server.create(prompt="a still of it", input_reference={"video_id": id, "frame": 1})
        kept = server.http.post("/v1/files", json={"video_id": id})
        assert refusal(kept, 400)["code"] in ("video_too_long", "too_many_frames")
