"""Files that the page names: a visitor's own uploads, and nothing else of the machine or of other visitors."""

import json
import os
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio")

from api_samples import png, refusal
from page_samples import file_of
from PIL import Image
from pusa.server.studio.files.uploads import Arriving, Progress, VisitorFiles
from site_samples import FIELDS, SECRET, Site, values_of
from starlette.routing import Mount

from pusa.server.studio.examples import CLIPS

STATES = ("timeline", "tab", "prompt")


FORBIDDEN = (
    "the environment",
    "the keys",
    "the database",
    "passwords",
    "a relative path",
    "a file below an upload",
    "an address",
    "a stored input",
    "another key's upload",
)


def path_in(site: Site, what: str) -> str:
    if what not in site.forbidden:
        pytest.skip("without keys all visitors are one")
    return site.forbidden[what]


@pytest.mark.parametrize("what", FORBIDDEN)
@pytest.mark.parametrize("field", FIELDS)
def test_a_file_field_takes_only_what_its_visitor_has_sent(site: Site, field: str, what: str) -> None:
    path = path_in(site, what)
    for file in (file_of(path), file_of(path, url=path), file_of(path, is_stream=True, orig_name="a.svg")):
        for part, event in (("timeline", "refresh"), ("generate", "click")):
            answer = site.pages[0].send(part, event, values_of(field, file))
            assert refusal(answer, 400)["code"] == "invalid_file"
            assert "file=" not in answer.text
    assert site.is_unread()
    assert site.asked == []


@pytest.mark.parametrize("what", FORBIDDEN)
@pytest.mark.parametrize("state", STATES)
def test_no_other_part_of_the_page_carries_a_file(site: Site, state: str, what: str) -> None:
    path = path_in(site, what)
    held = {"mode": "image", "marks": [{"cell": 0, "noise": 0.1, "src": path}], "deep": [{"a": file_of(path)}]}
    for value in (file_of(path), held, [file_of(path)], {"video": file_of(path), "path": path}):
        answer = site.pages[0].send("timeline", "refresh", {state: value})
        assert refusal(answer, 400)["code"] == "invalid_file"
    assert site.is_unread()
    assert site.asked == []


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_event_carries_a_file(site: Site, what: str) -> None:
    path = path_in(site, what)
    for part, event in (("pusa-stage", "run"), ("pusa-stage", "last_frame"), ("pusa-stage", "extend_it")):
        answer = site.pages[0].send(part, event, event_data={"name": "penguin", "job": file_of(path)})
        assert refusal(answer, 400)["code"] == "invalid_file"
        answer = site.pages[0].send(part, event, event_data=file_of(path))
        assert refusal(answer, 400)["code"] == "invalid_file"
    assert site.is_unread()


@pytest.mark.parametrize("what", FORBIDDEN)
def test_a_client_downloads_only_its_uploads(site: Site, what: str) -> None:
    path = path_in(site, what)
    for route in ("file=", "file/", "proxy=", "stream/", "static/"):
        for prefix in ("/gradio_api/", "/"):
            answer = site.client.get(f"{prefix}{route}{path}", headers=site.pages[0].headers)
            assert answer.status_code in (403, 404), f"{prefix}{route}"
            assert SECRET not in answer.content
    assert site.asked == []


def test_the_path_is_checked_again_where_it_is_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away the check in front of the page."""
    from pusa.server.studio.files import request_filter

    monkeypatch.setattr(request_filter, "check_files", lambda *_: None)
    for what, path in site.forbidden.items():
        for field in FIELDS:
            answer = site.pages[0].send("generate", "click", values_of(field, file_of(path)))
            assert site.client.get("/studio/jobs", headers=site.pages[0].headers).json()["jobs"] == []
            assert "video_" not in answer.text, what
    assert site.is_unread()
    assert site.asked == []


# ---- own files -------------------------------------------------------------------------------------------------------


def test_an_upload_is_shown_and_becomes_a_job(site: Site) -> None:
    page = site.pages[0]
    path = page.upload("my picture.png", png())
    assert page.fetched(path).content == png()
    part = site.client.get(f"/gradio_api/file={path}", headers={**page.headers, "range": "bytes=1-3"})
    assert (part.status_code, part.content) == (206, b"PNG")
    drawn = page.send("timeline", "refresh", values_of("image", file_of(path)))
    assert drawn.status_code == 200, drawn.text
    assert "my%20picture.png" in drawn.json()["data"][0]["marks"][0]["src"]
    answer = page.send("generate", "click", values_of("image", file_of(path)))
    stage = next(value for value in answer.json()["data"] if isinstance(value, dict) and "job" in value)
    job = site.app.state.service.queue.get(stage["job"])
    assert site.app.state.service.files.get_bytes(job.inputs[0]) == png()
    site.app.state.service.queue.delete(job.id)


def test_an_example_hands_its_files_to_the_visitor_who_runs_it(site: Site) -> None:
    answer = site.pages[0].send("pusa-stage", "run", event_data={"name": "penguin"})
    files = [value for value in answer.json()["data"] if isinstance(value, dict) and "path" in json.dumps(value)]
    path = next(value.get("value", value) for value in files)["path"]
    assert site.pages[0].fetched(path).status_code == 200
    for other in site.pages[1:]:
        assert other.fetched(path).status_code == 404
    listed = site.client.get("/studio/jobs", headers=site.pages[0].headers).json()["jobs"]
    for job in listed:
        site.app.state.service.queue.delete(job["id"])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK"])
def test_a_picture_stays_unopened_after_its_part_was_updated(
    site: Site, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of the mode is answered with new properties of the parts, of which a session has copies."""
    page = site.pages[0]
    content = BytesIO()
    Image.new(mode, (64, 48)).save(content, "TIFF" if mode == "CMYK" else "PNG")
    file = file_of(page.upload("loop.png", content.getvalue()))
    session = {"session_hash": f"changed-{mode}"}
    assert page.send("mode", "input", values_of("loop_image", None), **session).status_code == 200

    def opened(*_: Any, **__: Any) -> Any:
        raise AssertionError("the server has opened the picture itself")

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", opened)
        drawn = page.send("timeline", "refresh", values_of("loop_image", file), **session)
    assert drawn.status_code == 200, drawn.text
    assert "visitors" in drawn.json()["data"][0]["marks"][0]["src"]
    assert page.send("generate", "click", values_of("loop_image", file), **session).status_code == 200
    for job in site.client.get("/studio/jobs", headers=page.headers).json()["jobs"]:
        site.app.state.service.queue.delete(job["id"])


def test_junk_is_refused_in_words_after_its_part_was_updated(site: Site) -> None:
    page, session = site.pages[0], {"session_hash": "changed-junk"}
    file = file_of(page.upload("junk.png", b"no picture"))
    assert page.send("mode", "input", values_of("loop_image", None), **session).status_code == 200
    assert page.send("timeline", "refresh", values_of("loop_image", file), **session).status_code == 200
    answer = page.send("generate", "click", values_of("loop_image", file), **session)
    assert answer.status_code == 200, answer.text
    assert next(value for value in answer.json()["data"] if value and "count" in value)["text"]


def test_no_session_is_kept(site: Site) -> None:
    for number in range(3):
        page = site.pages[0]
        answer = page.send("mode", "input", {"mode": "loop"}, session_hash=f"session-{number}")
        assert answer.status_code == 200, answer.text
        [shown] = [part for part in answer.json()["data"] if part.get("visible") is True]
        assert shown["__type__"] == "update"
    mounted = next(route.app for route in site.app.router.default.loaded.routes if isinstance(route, Mount))
    assert mounted.page.state_holder.session_data == {}


@pytest.mark.parametrize(
    "name", ["../../../evil.png", "/etc/evil.png", "..", ".hidden", "a\0b.png", "x" * 400 + ".png"]
)
def test_the_name_of_an_upload_is_only_a_name(site: Site, name: str) -> None:
    path = Path(site.pages[0].upload(name, png()))
    assert path.resolve().is_relative_to(site.cache.resolve())
    assert not path.name.startswith(".")
    assert len(path.name) <= 120


def test_an_upload_keeps_to_the_limits(site: Site) -> None:
    post, headers = site.client.post, site.pages[0].headers
    many = [("files", (f"{n}.png", b"x")) for n in range(17)]
    assert refusal(post("/gradio_api/upload", files=many, headers=headers), 400)["code"] == "too_many_files"
    assert refusal(post("/gradio_api/upload", json={"path": "/etc/passwd"}, headers=headers), 400)
    assert refusal(post("/gradio_api/upload", data={"files": "/etc/passwd"}, headers=headers), 400)
    assert not [path for path in site.cache.rglob("*") if path.is_file() and path.read_bytes() == b"x"]


@pytest.mark.parametrize("event", ["run", "last_frame", "extend_it"])
def test_a_full_disk_hands_no_file_to_the_page(site: Site, event: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service, page = site.app.state.service, site.pages[0]

    async def get(*_: Any) -> Any:
        return SimpleNamespace(id="video_1", prompt="a duck")

    async def content(*_: Any) -> Any:
        return SimpleNamespace(open=lambda: (CLIPS / "apple.mp4").open("rb"))

    monkeypatch.setattr(service, "get", get)
    monkeypatch.setattr(service, "content", content)
    monkeypatch.setattr(service, "settings", service.settings.model_copy(update={"min_free_bytes": 2**62}))
    before = sorted(site.cache.rglob("*"))
    answer = page.send("pusa-stage", event, event_data={"name": "penguin", "job": "video_1"})
    assert answer.status_code == 200, answer.text
    assert "disk is full" in next(value for value in answer.json()["data"] if value and "count" in value)["text"]
    assert sorted(site.cache.rglob("*")) == before


def test_an_upload_that_is_refused_has_ended(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the page would be told for ever that it goes on."""
    known: list[Arriving] = []
    of = Progress.of
    monkeypatch.setattr(Progress, "of", lambda *said: known.append(of(*said)) or known[-1])
    headers = {"content-type": "multipart/form-data; boundary=x", **site.pages[0].headers}
    answer = site.client.post("/gradio_api/upload?upload_id=zz", content=b"--x\r\nno form", headers=headers)
    assert refusal(answer, 400)["code"] == "invalid_body"
    assert [one.is_done for one in known] == [True]
    told = site.client.get("/gradio_api/upload_progress?upload_id=zz", headers=site.pages[0].headers)
    assert '"done"' in told.text


def test_an_upload_reserves_its_space_before_it_comes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, page = site.app.state.service._disk, site.pages[0]
    taken: list[int] = []
    take = disk.take
    monkeypatch.setattr(disk, "take", lambda folders, size: taken.extend([len(folders), size]) or take(folders, size))
    path = page.upload("small.png", png())
    assert taken[0] == 2  # the spool and the visitors' folder
    assert taken[1] > Path(path).stat().st_size
    assert disk.reserved_bytes == 0
    monkeypatch.setattr(disk, "minimum_bytes", 2**62)
    files = {"files": ("a.png", png())}
    assert (
        refusal(site.client.post("/gradio_api/upload", files=files, headers=page.headers), 507)["code"] == "disk_full"
    )
    assert disk.reserved_bytes == 0


def test_an_upload_of_yesterday_is_removed(site: Site) -> None:
    page = site.pages[0]
    old, new = (Path(page.upload(name, png(grey=9))) for name in ("old.png", "new.png"))
    os.utime(old.parent, (1, 1))
    VisitorFiles(site.cache).remove_old(86400)
    assert not old.exists()
    assert new.exists()


# ---- other routes of the framework -----------------------------------------------------------------------------------

CLOSED = [
    ("POST", "/gradio_api/queue/join"),
    ("GET", "/gradio_api/queue/data?session_hash=abc"),
    ("GET", "/gradio_api/queue/status"),
    ("POST", "/gradio_api/api/predict"),
    ("POST", "/gradio_api/call/generate"),
    ("POST", "/gradio_api/call/v2/generate"),
    ("POST", "/gradio_api/component_server"),
    ("POST", "/gradio_api/process_recording"),
    ("POST", "/gradio_api/stream/abc"),
    ("POST", "/gradio_api/reset"),
    ("POST", "/gradio_api/cancel"),
    ("POST", "/gradio_api/vibe-edit"),
    ("GET", "/gradio_api/info"),
    ("GET", "/gradio_api/openapi.json"),
    ("GET", "/gradio_api/deep_link?session_hash=a"),
    ("GET", "/gradio_api/heartbeat/abc"),
    ("GET", "/gradio_api/dev/reload"),
    ("GET", "/gradio_api/runs"),
    ("GET", "/gradio_api/custom_component/1/client/component/index.js"),
    ("GET", "/monitoring"),
    ("GET", "/monitoring/summary"),
    ("POST", "/login"),
    ("GET", "/svelte/index.js"),
    ("GET", "/?deep_link=abc"),
    ("GET", "/config?deep_link=abc"),
]


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_routes_that_the_page_does_not_need_are_closed(site: Site, method: str, path: str) -> None:
    content = {"content": b"{}"} if method == "POST" else {}
    answer = site.client.request(
        method, path, headers={"content-type": "application/json", **site.pages[0].headers}, **content
    )
    assert refusal(answer, 404)["code"] == "not_found"
