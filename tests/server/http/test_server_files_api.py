"""Files that clients keep on the server: kept once, drawn, cut, named as inputs, and nobody else's business."""

import base64
import hashlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from api_samples import FRAMES, HEIGHT, WIDTH, Served, png, refusal, serving
from file_samples import input_of, input_of_stream, keep, spooled
from media_samples import encode, moving_gradient, picture_bytes
from PIL import Image

from pusa.media import VideoWriter, read_image, read_video
from pusa.provenance.marks import read_marks
from pusa.server.jobs.client_files import ClientFileTable, expire_files
from pusa.server.jobs.housekeeping import sweep_orphans
from pusa.server.jobs.store import full_disk

# ---- keeping ---------------------------------------------------------------------------------------------------------


def test_a_file_is_kept_once_and_says_what_it_is(server: Served, video: bytes) -> None:
    file = keep(server, video, "../../holiday \u00e9t\u00e9.mov")
    assert file["id"].startswith("file_")
    facts = {name: file[name] for name in ("object", "filename", "bytes", "kind", "width", "height", "frames", "fps")}
    assert facts == {
        **{"object": "file", "filename": "holiday \u00e9t\u00e9.mov", "bytes": len(video), "kind": "video"},
        **{"width": WIDTH, "height": HEIGHT, "frames": FRAMES, "fps": 16.0},
    }
    assert (file["seconds"], file["has_request"]) == (FRAMES / 16, False)
    assert file["expires_at"] - file["created_at"] == 168 * 3600
    assert keep(server, video, "another name")["id"] == file["id"]
    url = f"data:video/mp4;base64,{base64.b64encode(video).decode()}"
    for body in ({"file_url": url}, {"file": url, "filename": "x.mp4", "purpose": "vision"}):
        assert server.http.post("/v1/files", json=body).json()["id"] == file["id"]
    assert server.http.get(f"/v1/files/{file['id']}").json()["filename"] == file["filename"]
    content = server.http.get(f"/v1/files/{file['id']}/content", headers={"range": "bytes=4-7"})
    assert (content.status_code, content.content, content.headers["content-type"]) == (206, b"ftyp", "video/mp4")
    assert content.headers["content-disposition"] == 'inline; filename="holiday _t_.mp4"'
    assert server.http.get(f"/v1/files/{file['id']}/content").content == video
    assert not spooled(server)


def test_files_are_listed_by_page_and_removed(tmp_path: Path) -> None:
    with serving(tmp_path / "pages", workers=0) as server:
        ids = [keep(server, png(grey=level))["id"] for level in range(5)]
        page = server.http.get("/v1/files?limit=2").json()
        assert ([file["id"] for file in page["data"]], page["has_more"]) == (ids[:2:-1], True)
        page = server.http.get("/v1/files", params={"limit": 2, "order": "asc", "after": ids[2]}).json()
        assert ([file["id"] for file in page["data"]], page["has_more"]) == (ids[3:], False)
        assert server.http.delete(f"/v1/files/{ids[0]}").json() == {"id": ids[0], "object": "file", "deleted": True}
        assert refusal(server.http.get(f"/v1/files/{ids[0]}"), 404)["code"] == "file_not_found"
        assert refusal(server.http.get(f"/v1/files?after={ids[0]}"), 400)["param"] == "after"
        assert len(list(server.service.files.keys("files"))) == 4


def test_the_same_content_sent_at_once_is_one_file(server: Served) -> None:
    content = png(64, 48, grey=77)
    with ThreadPoolExecutor(6) as pool:
        ids = set(pool.map(lambda _: keep(server, content)["id"], range(6)))
    assert len(ids) == 1
    keys = [key for key, _ in server.service.files.keys("files")]
    assert sum(server.service.files.get_bytes(key) == content for key in keys) == 1


def test_what_is_no_picture_or_video_is_refused_and_leaves_nothing(server: Served) -> None:
    before = list(server.service.files.keys("files"))
    assert refusal(server.http.post("/v1/files", files={"file": ("a", b"text")}), 400)["code"] == "not_a_picture"
    for body in ({}, {"file_url": "data:,x", "video_id": f"video_{'0' * 32}"}):
        assert refusal(server.http.post("/v1/files", json=body), 400)["code"] == "missing_parameter"
    assert refusal(server.http.post("/v1/files", json={"file_url": "data:,x", "input": 0}), 400)["param"] == "input"
    assert list(server.service.files.keys("files")) == before
    assert not spooled(server)


def test_a_key_keeps_no_more_than_it_may(tmp_path: Path) -> None:
    noise = [np.random.default_rng(n).integers(0, 256, (64, 64, 3), np.uint8) for n in range(2)]
    first, second = (picture_bytes(Image.fromarray(pixels), "PNG") for pixels in noise)
    with serving(tmp_path / "limited", workers=0, key_file_bytes=len(first) + 100) as server:
        kept = keep(server, first)
        error = refusal(server.http.post("/v1/files", files={"file": ("b", second)}), 507)
        assert error["code"] == "files_full"
        assert "delete some" in error["message"]
        assert keep(server, first)["id"] == kept["id"]
        server.http.delete(f"/v1/files/{kept['id']}")
        keep(server, second)
        assert len(list(server.service.files.keys("files"))) == 1


def test_a_damaged_file_is_not_used_and_is_whole_again_once_it_is_sent_again(server: Served) -> None:
    content = png(72, 56, grey=33)
    id = keep(server, content)["id"]
    path = server.service.files.local(f"files/{id}.png")
    assert path is not None
    path.write_bytes(content[:-1] + b"x")
    assert refusal(server.http.get(f"/v1/files/{id}/content"), 409)["code"] == "file_damaged"
    server.refused(409, input_reference=id)
    assert keep(server, content)["id"] == id
    assert server.http.get(f"/v1/files/{id}/content").content == content
    path.unlink()
    assert refusal(server.http.get(f"/v1/files/{id}/frame"), 409)["code"] == "file_damaged"
    assert keep(server, content)["id"] == id
    server.create(input_reference=id)


def test_kept_files_outlast_the_server(tmp_path: Path, video: bytes) -> None:
    with serving(tmp_path / "twice", workers=0) as server:
        kept = keep(server, video, "clip.mp4")
    with serving(tmp_path / "twice", workers=0) as server:
        assert server.http.get(f"/v1/files/{kept['id']}").json() == kept
        assert server.http.get(f"/v1/files/{kept['id']}/content").content == video
        assert keep(server, video)["id"] == kept["id"]


# ---- another's files -------------------------------------------------------------------------------------------------


def test_nobody_sees_or_uses_the_file_of_another_key(tmp_path: Path, video: bytes) -> None:
    keys = ("first-key-0123456789", "second-key-0123456789")
    with serving(tmp_path / "keys", api_keys=keys) as server:
        mine, yours = (
            httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {key}"}, trust_env=False)
            for key in keys
        )
        with mine, yours:
            id = keep(server, video, http=mine)["id"]
            job = mine.post("/v1/videos", json={"prompt": "a duck", "input_reference": id}).json()["id"]
            for call in ("", "/content", "/frame", "/strip", "/request"):
                assert refusal(yours.get(f"/v1/files/{id}{call}"), 404)["code"] == "file_not_found", call
            assert refusal(yours.delete(f"/v1/files/{id}"), 404)["code"] == "file_not_found"
            assert yours.get("/v1/files").json()["data"] == []
            assert refusal(yours.get(f"/v1/files?after={id}"), 400)["param"] == "after"
            stored = {"file_id": id}
            for path, body in (
                ("", {"input_reference": id}),
                ("", {"input_reference": [{**stored, "start": 0.5}]}),
                ("", {"keyframes": [{"latent": 0, "reference": {**stored, "frame": 0}}]}),
                ("/estimate", {"input_reference": {**stored, "crop": [0, 0, 0.5, 0.5]}}),
                ("/extensions", {"video": stored}),
                ("/edits", {"video": id}),
            ):
                answer = yours.post(f"/v1/videos{path}", json={"prompt": "a duck", **body})
                assert refusal(answer, 404)["code"] == "file_not_found", (path, body)
            for body in ({"video_id": job, "input": 0}, {"video_id": job}):
                assert refusal(yours.post("/v1/files", json=body), 404)["code"] == "video_not_found"
                answer = yours.post("/v1/videos", json={"prompt": "a duck", "input_reference": body})
                assert refusal(answer, 404)["code"] == "video_not_found"
            for call in ("frame", "strip"):
                assert refusal(yours.get(f"/v1/videos/{job}/{call}"), 404)["code"] == "video_not_found"
            assert keep(server, video, http=yours)["id"] != id
            yours.delete(f"/v1/files/{yours.get('/v1/files').json()['data'][0]['id']}")
            assert mine.get(f"/v1/files/{id}/content").content == video


# ---- naming files as inputs ------------------------------------------------------------------------------------------


def test_a_file_is_an_input_as_if_it_were_sent(server: Served, video: bytes) -> None:
    content = png(80, 64, grey=90)
    still, moving = keep(server, content)["id"], keep(server, video)["id"]
    for reference in (still, {"file_id": still}, [still]):
        id = server.create(input_reference=reference)["id"]
        assert input_of(server, id) == content
        assert server.job(id).request["conditions"][0]["sha256"] == hashlib.sha256(content).hexdigest()
    id = server.create(
        input_reference=[moving], keyframes=[{"latent": "last", "reference": {"file_id": still}, "noise": 0.25}]
    )["id"]
    [frame, kept] = server.job(id).request["conditions"]
    assert (frame["kind"], frame["positions"], frame["noise"], kept["kind"]) == ("image", ["last"], [0.25], "video")
    server.http.delete(f"/v1/files/{still}")
    assert input_of(server, id, 1) == content  # the job's own copy
    form = {"prompt": "a duck", "input_reference[file_id]": moving, "input_reference[frame]": "3"}
    answer = server.http.post("/v1/videos", data=form)
    assert server.job(answer.json()["id"]).request["conditions"][0]["kind"] == "image"
    text = json.dumps([{"latent": 0, "reference": {"file_id": moving, "frame": -1}}])
    assert server.http.post("/v1/videos", data={"prompt": "a duck", "keyframes": text}).status_code == 200
    assert not spooled(server)


def test_a_frame_a_piece_and_a_region_are_the_very_pixels(server: Served) -> None:
    content = encode(moving_gradient(24), fps=24)
    id, whole = keep(server, content)["id"], read_video(content)
    made = server.create(input_reference={"file_id": id, "frame": 7})["id"]
    assert np.array_equal(np.asarray(read_image(input_of_stream(server, made))), whole[7])
    crop = [0.25, 0.5, 0.5, 0.25]
    made = server.create(input_reference={"file_id": id, "frame": -1, "crop": crop})["id"]
    assert np.array_equal(np.asarray(read_image(input_of_stream(server, made))), whole[-1][48:72, 40:120])
    piece = {"file_id": id, "start": 0.25, "end": 0.75}
    made = server.create(input_reference=piece)["id"]
    assert np.array_equal(read_video(input_of(server, made)), whole[6:18])
    assert server.job(made).seconds == server.create(input_reference=piece)["seconds"]
    made = server.create(input_reference={**piece, "crop": crop})["id"]
    assert np.array_equal(read_video(input_of(server, made)), whole[6:18, 48:72, 40:120])
    all_of_it = server.create(input_reference={"file_id": id, "start": 0, "end": 1.0, "crop": [0, 0, 1, 1]})["id"]
    assert input_of(server, all_of_it) == content
    assert not spooled(server)


def test_videos_are_extended_and_edited_from_pieces(server: Served, video: bytes) -> None:
    result, moving = server.finished(prompt="a whale")["id"], keep(server, video)["id"]
    for path, reference in (
        ("extensions", {"video_id": result}),
        ("extensions", {"video_id": result, "start": 0.5}),
        ("edits", [{"video_id": result, "end": 0.5}, moving]),
    ):
        answer = server.http.post(f"/v1/videos/{path}", json={"video": reference})
        assert answer.status_code == 200, answer.text
        assert (answer.json()["remixed_from_video_id"], answer.json()["prompt"]) == (result, "a whale")
    answer = server.http.post("/v1/videos/extensions", json={"video": moving, "prompt": "on", "seconds": 1})
    assert server.job(answer.json()["id"]).request["task"] == "extend"
    again = server.create(input_reference={"video_id": answer.json()["id"], "input": 0})["id"]
    assert input_of(server, again) == video


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ({"frame": 17}, "the clip has 17 frames"),
        ({"frame": 1, "start": 0}, "give one of these"),
        ({"start": 2}, "not before the end"),
        ({"end": 2}, "after the end"),
        ({"start": 0.5, "end": 0.5}, "not after start"),
        ({"crop": [0.5, 0, 0.6, 1]}, "beyond the picture"),
        ({"crop": [0, 0, 0, 1]}, "above 0"),
        ({"crop": [0, 0, 0.01, 1]}, "too small"),
        ({"crop": [0, 0, 1]}, "crop"),
        ({"input": 0}, "video_id"),
        ({"crop": [0, 0, 2, 1]}, "crop"),
    ],
)
def test_parts_that_are_not_there_are_refused(server: Served, video: bytes, part: dict[str, Any], text: str) -> None:
    id = keep(server, video)["id"]
    error = server.refused(400, input_reference={"file_id": id, **part})
    assert text in error["message"]
    assert error["param"] == "input_reference"
    error = server.refused(400, keyframes=[{"latent": 0, "reference": {"file_id": id, **part}}])
    assert error["param"] == "keyframes"
    assert not spooled(server)


def test_a_picture_has_no_pieces_and_a_clip_is_no_keyframe(server: Served, video: bytes) -> None:
    still, moving = keep(server, png())["id"], keep(server, video)["id"]
    error = server.refused(400, input_reference={"file_id": still, "frame": 0})
    assert "this is a picture" in error["message"]
    assert "is a video" in server.refused(400, keyframes=[{"reference": {"file_id": moving}}])["message"]
    assert server.refused(400, input_reference=[still] * 17)["code"] == "too_many_files"
    assert server.refused(404, input_reference="file_1")["code"] == "file_not_found"


def test_an_estimate_makes_no_parts(server: Served, video: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    id = keep(server, video)["id"]
    reference = {"file_id": id, "start": 0.25, "end": 0.75, "crop": [0, 0, 0.5, 1]}
    prober = server.service.submitter.prober

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is to be made")

    monkeypatch.setattr(prober, "make", refuse)
    answer = server.http.post("/v1/videos/estimate", json={"prompt": "a duck", "input_reference": reference})
    assert answer.status_code == 200, answer.text


def test_a_reader_that_dies_while_cutting_costs_the_request_alone(
    server: Served, video: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = keep(server, video)["id"]
    prober = server.service.submitter.prober
    monkeypatch.setattr(prober, "limits", prober.limits.__class__(memory_bytes=2**20, wall_seconds=20))
    for part in ({"start": 0.4, "end": 0.6}, {"frame": 4, "crop": [0, 0, 0.7, 0.7]}):
        assert server.refused(400, input_reference={"file_id": id, **part})["code"] == "file_unreadable"
    assert not spooled(server)
    assert server.service._disk.reserved_bytes == 0


def test_a_part_of_what_ai_made_says_so(server: Served, tmp_path: Path) -> None:
    request = {"prompt": "a duck", "model": "tiny", "conditions": []}
    stored = {"pusa": "1.0", "digital_source_type": "trainedAlgorithmicMedia", "request": request}
    with VideoWriter(tmp_path / "made.mp4", width=WIDTH, height=HEIGHT, metadata=stored) as writer:
        writer.write(np.zeros((FRAMES, HEIGHT, WIDTH, 3), np.uint8))
    content = (tmp_path / "made.mp4").read_bytes()
    id = keep(server, content)["id"]
    for part in ({"frame": 2}, {"start": 0.25}):
        made = server.create(input_reference={"file_id": id, **part})["id"]
        mark = read_marks(input_of_stream(server, made)).mark
        assert mark is not None
        assert (mark.source_type, mark.system) == ("trainedAlgorithmicMedia", "pusa (tiny)")
        assert mark.original_sha256 == hashlib.sha256(content).hexdigest()
        assert b"a duck" not in input_of(server, made)


# ---- results and inputs as files -------------------------------------------------------------------------------------


def test_results_and_inputs_become_files(server: Served) -> None:
    content = png(88, 64, grey=12)
    id = server.create(input_reference=keep(server, content)["id"])["id"]
    server.ended(id)
    result = server.http.post("/v1/files", json={"video_id": id}).json()
    assert (result["kind"], result["frames"]) == ("video", FRAMES)
    made = server.http.get(f"/v1/videos/{id}/content").content
    assert server.http.get(f"/v1/files/{result['id']}/content").content == made
    again = server.http.post("/v1/files", json={"video_id": id, "input": 0, "filename": "start"}).json()
    assert again["id"] == keep(server, content)["id"]
    error = refusal(server.http.post("/v1/files", json={"video_id": id, "input": 1}), 400)
    assert error["param"] == "input"
    server.http.delete(f"/v1/videos/{id}")
    assert server.http.get(f"/v1/files/{result['id']}/content").content == made


def test_the_request_inside_a_video_comes_back_with_its_inputs(server: Served, tmp_path: Path) -> None:
    carried = png(96, 64, grey=200)
    sha256 = hashlib.sha256(carried).hexdigest()
    conditions = [
        {"kind": "image", "file": "cat.png", "positions": [0], "noise": [0.25], "sha256": sha256},
        {"kind": "image", "file": "large.png", "positions": ["last"], "sha256": "0" * 64},
    ]
    request = {"prompt": "a duck", "model": "tiny", "width": 96, "height": 64, "seed": 5, "conditions": conditions}
    stored = {"pusa": "1.0", "request": request, "inputs": {sha256: base64.b64encode(carried).decode()}}
    with VideoWriter(tmp_path / "made.mp4", width=96, height=64, metadata=stored) as writer:
        writer.write(np.zeros((5, 64, 96, 3), np.uint8))
    file = keep(server, (tmp_path / "made.mp4").read_bytes())
    assert file["has_request"]
    answer = server.http.get(f"/v1/files/{file['id']}/request")
    assert answer.status_code == 200, answer.text
    assert answer.json()["missing"] == ["large.png"]
    body = answer.json()["request"]
    assert (body["prompt"], body["seed"], body["width"]) == ("a duck", 5, 96)
    again = server.http.post("/v1/videos", json=body)
    assert again.status_code == 200, again.text
    assert input_of(server, again.json()["id"]) == carried
    [condition] = server.job(again.json()["id"]).request["conditions"]
    assert (condition["positions"], condition["noise"]) == ([0], [0.25])
    plain = keep(server, png(grey=201))
    assert refusal(server.http.get(f"/v1/files/{plain['id']}/request"), 404)["code"] == "no_request"


@pytest.mark.parametrize("request_inside", [{"prompt": 3}, {"conditions": [{"file": "../../etc/passwd", "kind": "x"}]}])
def test_a_request_inside_that_is_none_is_refused(server: Served, tmp_path: Path, request_inside: Any) -> None:
    with VideoWriter(tmp_path / "odd.gif", width=32, height=32, metadata={"pusa": "1", "request": request_inside}) as w:
        w.write(np.zeros((2, 32, 32, 3), np.uint8))
    id = keep(server, (tmp_path / "odd.gif").read_bytes())["id"]
    assert refusal(server.http.get(f"/v1/files/{id}/request"), 400)["code"] == "invalid_file"


# ---- how long files are kept -----------------------------------------------------------------------------------------


def test_files_expire_after_their_last_use_and_never_with_a_job_that_waits(server: Served) -> None:
    service = server.service
    table = ClientFileTable(service.queue)
    content = png(104, 64, grey=3)
    id = keep(server, content)["id"]
    job = server.create(prompt="wait", input_reference=id)["id"]
    used_at = table.get(id, "").used_at
    key = f"files/{id}.png"
    assert key in service.queue.keys_in_use([key, f"files/file_{'0' * 32}.png", "files/readme"])
    later = ClientFileTable(service.queue, clock=lambda: used_at + 5000)
    assert later.use(id, "", at_most_every_seconds=9000).used_at == used_at
    assert later.use(id, "", at_most_every_seconds=3600).used_at == used_at + 5000
    expire_files(table, service.files, used_before=used_at + 4000, limit=100)
    assert table.get(id, "") is not None
    assert expire_files(table, service.files, used_before=used_at + 5001, limit=100) >= 1
    assert (table.get(id, ""), service.files.exists(key)) == (None, False)
    assert input_of(server, job) == content
    server.http.post(f"/v1/videos/{job}/cancel")


def test_contents_that_no_row_names_are_orphans(server: Served) -> None:
    service = server.service
    id = keep(server, png(112, 64))["id"]
    lost, foreign = f"files/file_{'1' * 32}.png", "files/readme.txt"
    for key in (lost, foreign):
        service.files.put_bytes(key, b"x")
    sweep_orphans(service.queue, service.files, now=10**12, older_than_seconds=3600)
    assert [service.files.exists(key) for key in (lost, foreign, f"files/{id}.png")] == [False, True, True]


def test_a_file_removed_while_it_is_taken_is_a_clear_error(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    id = keep(server, png(120, 64))["id"]
    library = server.service.library
    begun, bring = threading.Event(), library._bring

    def late(key: str) -> Path:
        server.http.delete(f"/v1/files/{id}")
        begun.set()
        return bring(key)

    monkeypatch.setattr(library, "_bring", late)
    assert server.refused(404, input_reference=id)["code"] == "file_gone"
    assert begun.is_set()
    assert not spooled(server)


def test_space_for_the_copies_of_files_is_reserved(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    content = png(136, 64)
    id, disk = keep(server, content)["id"], server.service._disk
    taken: list[int] = []
    take = disk.take

    def count(folders: Any, size_bytes: int) -> list[int]:
        taken.append(size_bytes)
        if size_bytes == len(content):
            raise full_disk(0, 2**30)
        return take(folders, size_bytes)

    monkeypatch.setattr(disk, "take", count)
    assert server.refused(507, input_reference=id)["code"] == "disk_full"
    assert refusal(server.http.post("/v1/files", json={"video_id": server.create()["id"]}), 409)["code"] == "not_ready"
    assert len(content) in taken
    assert disk.reserved_bytes == 0
    assert not spooled(server)


def test_a_store_without_links_is_copied_from(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    content = png(128, 64)
    id = keep(server, content)["id"]

    def refuse(*_: Any) -> None:
        raise OSError(18, "another disk")

    monkeypatch.setattr("pusa.server.files.os.link", refuse)
    assert input_of(server, server.create(input_reference=id)["id"]) == content
