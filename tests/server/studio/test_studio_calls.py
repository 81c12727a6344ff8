"""Calls of the page's handlers: the server checks each value, and the page's scripts see what it has checked."""

import json
from typing import Any

import pytest

pytest.importorskip("gradio")

from api_samples import png, refusal
from page_samples import file_of
from site_samples import FIELDS, Site, values_of


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
    ("preset", None), ("mode", None), ("draft", None), ("draft", 1), ("exact", "true"), ("schedule", "wave:2"),
    ("prompts", ["a"]), ("prompts", "\ud800"),
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
