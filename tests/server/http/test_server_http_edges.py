"""All routes agree on HEAD, the shape of errors, pages after what was deleted."""

from collections.abc import Iterator

import pytest
from api_samples import Served, png, refusal, serving
from starlette.routing import BaseRoute, Match


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("edges")) as server:
        yield server


def matches(route: BaseRoute, path: str) -> bool:
    scope = {"type": "http", "method": "GET", "path": path.partition("?")[0]}
    return route.matches(scope)[0] is Match.FULL


def test_every_get_route_answers_head_without_a_body(server: Served) -> None:
    id = server.finished()["id"]
    file = server.http.post("/v1/files", files={"file": ("a.png", png(), "image/png")}).json()["id"]
    paths = [
        "/health",
        "/ready",
        "/metrics",
        "/openapi.json",
        "/docs",
        "/v1/models",
        "/v1/models/tiny",
        "/v1/videos",
        f"/v1/videos/{id}",
        f"/v1/videos/{id}/content",
        f"/v1/videos/{id}/events",
        f"/v1/videos/{id}/request",
        f"/v1/videos/{id}/frame?index=0",
        f"/v1/videos/{id}/strip?count=2",
        "/v1/events",
        "/v1/session",
        "/v1/files",
        f"/v1/files/{file}",
        f"/v1/files/{file}/content",
        f"/v1/files/{file}/frame",
        f"/v1/files/{file}/strip?count=2",
        "/",
    ]
    asked = {route.path for route in server.app.routes for path in paths if matches(route, path)}
    others = {"/v1/videos/characters/{id}", "/v1/videos/{id:video}/stream", "/v1/files/{id}/request"}  # no answer here
    assert {route.path for route in server.app.routes if "GET" in route.methods} == asked | others
    for path in paths:
        get_length = None if path.endswith("/events") else server.http.get(path).headers.get("content-length")
        head = server.http.head(path)
        assert head.status_code == 200, path
        assert head.content == b""
        if path not in ("/metrics",):  # whose figures change
            assert head.headers.get("content-length") == get_length
    assert server.http.head("/v1/videos/video_unknown").status_code == 404
    refused = server.http.head("/v1/videos/edits")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert "HEAD" in server.http.put("/v1/videos").headers["allow"]


def test_a_page_may_begin_after_a_deleted_job(server: Served) -> None:
    ids = [server.finished()["id"] for _ in range(4)]
    server.http.delete(f"/v1/videos/{ids[2]}")
    answer = server.http.get(f"/v1/videos?after={ids[2]}&limit=2")
    assert [video["id"] for video in answer.json()["data"]] == [ids[1], ids[0]]
    answer = server.http.get(f"/v1/videos?after={ids[2]}&order=asc&limit=1")
    assert [video["id"] for video in answer.json()["data"]] == [ids[3]]
    refusal(server.http.get(f"/v1/videos?after=video_{'0' * 32}"), 400)


@pytest.mark.parametrize("path", ["/videos", "/videos/video_1", "/models", "/v1/nonsense", "/v1"])
def test_a_path_that_is_none_is_refused_in_the_same_shape(server: Served, path: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        error = refusal(server.http.request(method, path), 404)
        assert error["code"] == "not_found"
    assert "the API is below /v1" in refusal(server.http.post("/videos", json={"prompt": "a"}), 404)["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/films", r'{"videos": "\ud800"}'),
        ("/v1/files", r'{"input": "\ud800"}'),
        ("/v1/files", r'{"\ud800": 1}'),
        ("/v1/videos/video_00000000000000000000000000000000/move", r'{"before": "\ud800"}'),
        ("/v1/session", r'{"key": "\ud800"}'),
    ],
)
def test_an_error_may_quote_half_a_character(server: Served, path: str, body: str) -> None:
    answer = server.http.post(path, content=body, headers={"content-type": "application/json"})
    assert "went wrong" not in refusal(answer, 400)["message"]


def test_json_that_says_it_is_a_form_is_told_so(server: Served) -> None:
    headers = {"content-type": "application/x-www-form-urlencoded"}  # what `curl -d` sends
    error = refusal(server.http.post("/v1/videos", content=b' {"prompt": "a"}', headers=headers), 415)
    assert error["code"] == "unsupported_media_type"
    assert "the body is JSON and its content type says a form: send the header Content-Type" in error["message"]
    error = refusal(server.http.post("/v1/videos", content=b'{"prompt": "a"}'), 415)
    assert "the content type is nothing: send application/json" in error["message"]
