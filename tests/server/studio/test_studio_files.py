"""Files that the page names: a visitor's own uploads, and nothing else of the machine or of other visitors."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio")

from api_samples import NearProber, png, refusal
from fastapi.testclient import TestClient
from page_samples import KEYS, Page, copies, file_of, owner
from PIL import Image
from starlette.routing import Mount
from studio_samples import settings_of

from pusa.request import GenerationRequest
from pusa.server.app import create_app
from pusa.server.jobs.queue import NewJob
from pusa.server.studio.examples import CLIPS
from pusa.server.studio.files.uploads import Arriving, Progress, VisitorFiles

SECRET = b"a-secret-of-this-machine-0123456789"
FIELDS = ("image", "images", "video", "second_video", "loop_image")
STATES = ("timeline", "tab", "prompt")


@dataclass
class Site:
    """A server with a page, and files that nobody may have from it."""

    app: Any
    client: TestClient
    pages: list[Page]
    cache: Path
    forbidden: dict[str, str]
    asked: list[bytes]

    def is_unread(self) -> bool:
        """Tell whether nothing forbidden lies in the folder from which the page is served."""
        there = {Path(path) for path in self.forbidden.values() if not path.startswith("http")}
        marks = [SECRET, os.environ["PUSA_TEST_SECRET"].encode()]
        return not [path for path in copies(self.cache, marks) if path not in there]


@pytest.fixture(scope="module", params=["with keys", "without keys"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    keys = KEYS if request.param == "with keys" else ()
    key_file = folder / "keys.txt"
    key_file.write_bytes(b"".join(key.encode() + b"\n" for key in KEYS) + SECRET)
    with pytest.MonkeyPatch.context() as patch, listening() as (url, asked):
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "cache"))
        patch.setenv("PUSA_TEST_SECRET", "in-the-environment-" + "x" * 8)
        app = create_app(settings_of(folder / "data", workers=0, api_keys=keys, min_free_bytes=0))
        app.state.service.submitter.prober = NearProber(app.state.service.submitter.prober.limits)
        with TestClient(app, base_url="http://127.0.0.1") as client:
            pages = [Page(client, key) for key in (keys or (None,))]
            forbidden = {
                "the environment": "/proc/self/environ",
                "the keys": str(key_file),
                "the database": str(folder / "data" / "jobs.sqlite"),
                "passwords": "/etc/shadow",
                "a relative path": "../" * 12 + "etc/passwd",
                "a file below an upload": f"{pages[0].upload('a.png', png())}/../../../../../../../../etc/passwd",
                "an address": f"{url}/a.png",
                "a stored input": stored_input(app, owner(KEYS[1])),
            }
            if keys:
                forbidden["another key's upload"] = pages[1].upload("b.png", png(grey=1) + SECRET)
            yield Site(app, client, pages, folder / "cache", forbidden, asked)


class listening:  # noqa: N801
    """A port that notes what it is asked: nothing should be."""

    def __enter__(self) -> tuple[str, list[bytes]]:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.asked: list[bytes] = []
        threading.Thread(target=self._answer, daemon=True).start()
        return f"http://127.0.0.1:{self.socket.getsockname()[1]}", self.asked

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(1000))
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")

    def __exit__(self, *_: object) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def stored_input(app: Any, of: str) -> str:
    """The path of a file that a job of somebody else was given."""
    service, key = app.state.service, "inputs/video_" + "a" * 32 + "/0.png"
    service.files.put_bytes(key, png(grey=2) + SECRET)
    request = GenerationRequest.model_validate(
        {"prompt": "x", "seed": 1, "conditions": [{"kind": "image", "file": key}]}
    ).model_dump(mode="json")
    service.queue.submit(
        NewJob(owner=of, request=request, model="mini", prompt="x", seconds="1", size="96x96", inputs=(key,))
    )
    return str(service.files.local(key))


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


def values_of(field: str, file: Any) -> dict[str, Any]:
    """A page that holds a file in a field, with its tab open."""
    mode = {"video": "complete", "second_video": "transition", "loop_image": "loop"}.get(field, "complete")
    tab = {"image": "tab_image", "images": "tab_images"}.get(field, "tab_video")
    value = [{"image": file, "caption": None}] if field == "images" else file
    return {"tab": tab, "mode": mode, "prompt": "a duck", "positions": "0", "multipliers": "0.2", field: value}


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
def test_only_own_uploads_are_handed_out(site: Site, what: str) -> None:
    path = path_in(site, what)
    for route in ("file=", "file/", "proxy=", "stream/", "static/"):
        for prefix in ("/gradio_api/", "/"):
            answer = site.client.get(f"{prefix}{route}{path}", headers=site.pages[0].headers)
            assert answer.status_code in (403, 404), f"{prefix}{route}"
            assert SECRET not in answer.content
    assert site.asked == []


def test_what_is_checked_is_what_the_page_reads(site: Site) -> None:
    """A name twice in an object, and another encoding: readers of JSON differ in what they make of those."""
    page = site.pages[0]
    own, wanted = page.upload("c.png", png()), site.forbidden["the keys"]
    body = json.dumps(page.body("timeline", "refresh", values_of("image", file_of(own))))
    headers = {"content-type": "application/json", **page.headers}
    for first, second in ((own, wanted), (wanted, own)):
        twice = body.replace(f'"path": {json.dumps(own)}', f'"path": "{first}", "path": "{second}"')
        assert twice != body
        answer = site.client.post("/gradio_api/run/predict", content=twice, headers=headers)
        assert wanted not in answer.text
    forbidden = body.replace(own, wanted)
    for encoding in ("utf-16", "utf-32", "utf-8-sig", "utf-7"):
        answer = site.client.post("/gradio_api/run/predict", content=forbidden.encode(encoding), headers=headers)
        assert refusal(answer, 400)["code"] in ("invalid_body", "invalid_file")
    assert site.is_unread()


@pytest.mark.parametrize("data", [None, [1], "text", 7, {"name": {"a": 1}}, {"name": "²"}])
def test_an_event_that_names_no_example_does_nothing(site: Site, data: Any) -> None:
    answer = site.pages[0].send("pusa-stage", "run", event_data=data)
    assert answer.status_code == 200, answer.text
    assert site.client.get("/studio/jobs", headers=site.pages[0].headers).json()["jobs"] == []


@pytest.mark.parametrize(
    "value", [{"mode": "unknown", "marks": []}, {"mode": "image", "marks": []}, {"mode": "fixed", "marks": []}]
)
def test_an_edit_of_nothing_changes_nothing(site: Site, value: dict[str, Any]) -> None:
    answer = site.pages[0].send("timeline", "edit", {"timeline": value})
    assert answer.status_code == 200, answer.text


def test_an_edit_in_an_unknown_mode_writes_one_and_the_same_line(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Lines that differ would each be written, however many come."""
    for mode in ("unknown", "another", "fixed", "\n"):
        answer = site.pages[0].send("timeline", "edit", {"timeline": {"mode": mode, "marks": []}})
        assert answer.status_code == 200, answer.text
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 4
    assert len(set(lines)) == 1


BAD_VALUES = [
    ("noise", "²"), ("noise", None), ("noise", 1e300), ("noise", [1]), ("noise", True), ("steps", 10**90),
    ("preset", None), ("mode", None),
    ("preset", "unknown"), ("preset", ["balanced"]), ("mode", 1), ("prompt", ["a"]), ("positions", {"a": 1}),
    ("image", "a.png"), ("image", {"path": 1}), ("image", {"url": "data:,"}), ("images", {"image": None}),
    ("images", [1]), ("images", [{"video": None}]), ("video", [None]), ("timeline", "text"), ("timeline", {}),
    ("timeline", {"mode": "images", "marks": [{"cell": "²", "noise": 0}]}),
    ("timeline", {"mode": "images", "marks": [{"cell": 1, "noise": "nan"}]}),
    ("timeline", {"mode": "images", "marks": [{"cell": 1, "noise": 0, "place": "1" * 5000}]}),
    *(("timeline", {"mode": "image", "marks": [], "asked": asked})
      for asked in (10**60, "1", "\ud800", 1.5, True, -1, [1], {"a": 1})),
    *((part, "\ud800") for part in ("prompt", "size", "seed", "positions", "tab", "negative")),
]  # fmt: skip


@pytest.mark.parametrize(("part", "value"), BAD_VALUES)
def test_a_value_that_a_part_cannot_have_is_refused(site: Site, part: str, value: Any) -> None:
    error = refusal(site.pages[0].send("timeline", "refresh", {part: value}), 400)
    assert error["code"] in ("invalid_value", "invalid_file")
    assert len(error["message"]) < 300


BAD_FILES: list[dict[str, Any]] = [
    {"path": ""}, {"path": None}, {"size": "x"}, {"size": 10**60}, {"size": True}, {"orig_name": {}}, {"url": 1},
    {"mime_type": [1]}, {"is_stream": True}, {"is_stream": None}, {"meta": None}, {"meta": [1]}, {"meta": {}},
    {"meta": {"_type": "gradio.FileData", "a": 1}}, {"meta": "gradio.FileData"}, {"orig_name": "\ud800"},
]  # fmt: skip


@pytest.mark.parametrize("change", BAD_FILES)
def test_a_file_that_the_page_would_not_describe_so_is_refused(
    site: Site, change: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """Also one's own, and also where no part expects one."""
    page = site.pages[0]
    file = {**file_of(page.upload("own.png", png())), **change}
    held = {"mode": "image", "marks": [], "x": {"deep": [file]}}
    for values in (values_of("image", file), values_of("images", file), {"timeline": held}):
        error = refusal(page.send("timeline", "refresh", values), 400)
        assert error["code"] in ("invalid_value", "invalid_file")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["notes.txt", "drawing.svg", "picture", "film.mp4", "page.html"])
@pytest.mark.parametrize("field", FIELDS)
def test_a_file_of_another_kind_is_refused_in_words(
    site: Site, field: str, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    page = site.pages[0]
    values = values_of(field, file_of(page.upload(name, b"<svg/> and words")))
    if field == "second_video":
        values["video"] = file_of(page.upload("film.mp4", b"no film"))
    assert page.send("timeline", "refresh", values).status_code == 200
    answer = page.send("generate", "click", values)
    assert answer.status_code == 200, answer.text
    assert next(value for value in answer.json()["data"] if value and "count" in value)["text"]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "header",
    [("x-forwarded-host", "a:b:c["), ("x-forwarded-host", "evil.example"), ("X-Gradio-Server", "http://["),
     ("x-gradio-server", "http://evil.example")],
)  # fmt: skip
def test_no_header_says_where_the_page_is(site: Site, header: tuple[str, str]) -> None:
    page = site.pages[0]
    for path in ("/", "/config"):
        answer = site.client.get(path, headers=[*page.headers.items(), header])
        assert answer.status_code == 200
        assert "evil" not in answer.text
    assert site.client.get("/config", headers=[*page.headers.items(), header]).json() == {
        **page.config,
        "root": "http://127.0.0.1",
    }
    body = json.dumps(page.body("timeline", "refresh", values_of("image", None)))
    headers = [("content-type", "application/json"), *page.headers.items(), header]
    assert site.client.post("/gradio_api/run/predict", content=body, headers=headers).status_code == 200


@pytest.mark.parametrize("name", ["a" * 300, "a" * 3000, "a/" * 3000, "%C3%A4" * 200, "a%00.js", "a" * 30_000])
@pytest.mark.parametrize("folder", ["/static/", "/assets/", "/studio/assets/", "/gradio_api/file="])
def test_a_name_that_no_file_can_have_is_not_found(site: Site, folder: str, name: str) -> None:
    for path in (f"{folder}{name}", f"{folder}/{name}"):
        assert site.client.get(path, headers=site.pages[0].headers).status_code in (403, 404)


@pytest.mark.parametrize(
    "change",
    [
        {"fn_index": 10**6}, {"fn_index": "1"}, {"fn_index": None}, {"fn_index": -1}, {"fn_index": True}, {"data": []},
        {"data": {}}, {"data": None}, {"session_hash": "a" * 5000}, {"session_hash": {"a": 1}},
        {"batched": "yes"}, {"request": {"headers": {}}}, {"oauth_token": "a"}, {"trigger_id": "²"},
    ],
)  # fmt: skip
def test_a_call_that_the_page_does_not_make_is_refused(site: Site, change: dict[str, Any]) -> None:
    body = {**site.pages[0].body("timeline", "refresh"), **change}
    assert refusal(site.pages[0].post(body), 400)["code"] == "invalid_value"


@pytest.mark.parametrize("body", [b"[]", b"null", b"{", b"", b"[" * 100, b"[" + b"[]," * 30_000 + b"[]]"])
def test_a_body_that_is_no_call_is_refused(site: Site, body: bytes) -> None:
    headers = {"content-type": "application/json", **site.pages[0].headers}
    answer = site.client.post("/gradio_api/run/predict", content=body, headers=headers)
    assert refusal(answer, 400)["code"] in ("invalid_body", "invalid_value")


def test_a_call_has_a_megabyte_at_most(site: Site) -> None:
    answer = site.pages[0].send("timeline", "refresh", {"prompt": "a" * 2**20})
    assert refusal(answer, 413)["code"] == "too_large"


def test_more_places_than_a_request_may_have_are_refused(site: Site) -> None:
    values = {"tab": "tab_images", "positions": "1," * 600, "multipliers": "0"}
    [drawn] = site.pages[0].send("timeline", "refresh", values).json()["data"]
    assert "too many" in drawn["error"]["text"]


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


def test_an_own_upload_is_shown_and_becomes_a_job(site: Site) -> None:
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


def test_an_example_hands_its_files_to_who_runs_it(site: Site) -> None:
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
    mounted = next(route.app for route in site.app.router.default._loaded.routes if isinstance(route, Mount))
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
def test_where_space_is_short_the_page_is_given_no_file(
    site: Site, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
