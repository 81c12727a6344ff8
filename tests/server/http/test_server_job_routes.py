"""Lists by words and marks, updates, places in the queue, and removal that can be undone, over HTTP."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from api_samples import Served, refusal, serving
from server_samples import wait_until

ANNS, BOBS = "anns-key-0123456789", "bobs-key-0123456789"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path, workers=0) as server:
        yield server


def ids(server: Served, **query: Any) -> list[str]:
    answer = server.http.get("/v1/videos", params=query)
    assert answer.status_code == 200, answer.text
    return [video["id"] for video in answer.json()["data"]]


def test_a_video_says_what_a_gallery_needs(tmp_path):
    with serving(tmp_path) as server:
        video = server.finished(batch="ducks", draft=True)
    expected = {
        "task": "generate",
        "draft": True,
        "batch": "ducks",
        "favourite": False,
        "source": "api",
        "cancel_requested": False,
        "has": ["video", "thumbnail", "spritesheet", "contact_sheet"],
    }
    assert {name: video[name] for name in expected} == expected
    assert isinstance(video["note_details"], list)


def test_lists_take_words_and_marks(server):
    duck, cat = server.create(prompt="a DUCK swims"), server.create(prompt="a cat", batch="pets")
    assert ids(server, q="swims duck") == [duck["id"]]
    assert ids(server, q="a") == [cat["id"], duck["id"]]
    assert ids(server, q="\0") == []
    assert ids(server, batch="pets") == [cat["id"]]
    assert ids(server, task="loop") == []
    assert server.http.post(f"/v1/videos/{duck['id']}", json={"favourite": True}).json()["favourite"] is True
    assert ids(server, favourite="true") == [duck["id"]]
    assert ids(server, favourite="false") == [cat["id"]]
    server.http.post(f"/v1/videos/{cat['id']}/cancel")
    assert ids(server, status="cancelled") == ids(server, status="failed") == [cat["id"]]
    assert refusal(server.http.get("/v1/videos?task=dance"), 400)["param"] == "task"
    assert refusal(server.http.get("/v1/videos?favourite=perhaps"), 400)["param"] == "favourite"


def test_marks_are_changed_one_by_one(server):
    id = server.create(batch="one")["id"]

    def update(**fields: Any) -> dict[str, Any]:
        answer = server.http.post(f"/v1/videos/{id}", json=fields)
        assert answer.status_code == 200, answer.text
        return {name: answer.json()[name] for name in ("favourite", "batch")}

    assert update(favourite=True) == {"favourite": True, "batch": "one"}
    assert update(batch="two") == {"favourite": True, "batch": "two"}
    assert update(batch="", favourite=False) == {"favourite": False, "batch": None}
    assert server.http.post(f"/v1/videos/{id}", data={"favourite": "true"}).json()["favourite"] is True
    for body in ({}, {"favourite": 1}, {"batch": "x" * 65}, {"colour": "red"}, {"favourite": None}):
        assert server.http.post(f"/v1/videos/{id}", json=body).status_code == 400, body
    assert refusal(server.http.post("/v1/videos/video_0", json={"favourite": True}), 404)["code"] == "video_not_found"


@pytest.mark.parametrize(("guessed", "meant"), [("extend", "extensions"), ("edit", "edits")])
def test_a_guessed_route_is_answered_with_the_right_one(server: Served, guessed: str, meant: str) -> None:
    error = refusal(server.http.post(f"/v1/videos/{guessed}", json={"prompt": "a", "video": "video_0"}), 404)
    assert error["code"] == "not_found"
    assert error["message"] == f"there is no POST /v1/videos/{guessed}: use POST /v1/videos/{meant}"
    assert server.http.post(f"/v1/videos/{meant}", json={"prompt": "a"}).status_code == 400  # it is there


def test_creation_times_are_in_the_order_of_the_list(server: Served) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda number: server.create(seed=number), range(12)))
    listed = server.http.get("/v1/videos", params={"limit": 12}).json()["data"]
    assert {video["id"] for video in listed} == {video["id"] for video in made}
    times = [video["created_at_ms"] for video in listed]
    assert times == sorted(set(times), reverse=True)
    assert all(abs(video["created_at_ms"] / 1000 - video["created_at"]) <= 1 for video in listed)


def test_a_removed_video_can_be_restored_for_a_while(tmp_path):
    with serving(tmp_path) as server:
        id = server.finished()["id"]
        before = server.http.get(f"/v1/videos/{id}").json()
        answer = server.http.delete(f"/v1/videos/{id}", params={"undo_seconds": 60}).json()
        assert (answer["id"], answer["deleted"]) == (id, True)
        assert answer["undo_until"] >= before["created_at"] + 60
        assert ids(server) == []
        for path in ("", "/content", "/events"):
            assert refusal(server.http.get(f"/v1/videos/{id}{path}"), 404)["code"] == "video_not_found"
        for path in ("/cancel", "/retry", "/move"):
            assert server.http.post(f"/v1/videos/{id}{path}").status_code == 404
        assert server.http.delete(f"/v1/videos/{id}", params={"undo_seconds": 60}).status_code == 404
        assert server.http.post(f"/v1/videos/{id}/restore").json() == before
        assert server.http.get(f"/v1/videos/{id}/content").status_code == 200
        server.http.delete(f"/v1/videos/{id}", params={"undo_seconds": 60})
        gone = server.http.delete(f"/v1/videos/{id}").json()  # for good
        assert (gone["deleted"], gone["undo_until"]) == (True, None)
        assert refusal(server.http.post(f"/v1/videos/{id}/restore"), 404)["code"] == "video_not_found"
        assert not [key for key, _ in server.service.files.keys("results")]
        for seconds in ("-1", "86401", "1.5", "x"):
            assert server.http.delete(f"/v1/videos/{id}?undo_seconds={seconds}").status_code == 400


def test_removing_a_running_video_stops_it_and_it_can_be_made_after_all(tmp_path):
    with serving(tmp_path) as server:
        id = server.create(prompt="wait")["id"]
        wait_until(lambda: server.http.get(f"/v1/videos/{id}").json()["status"] == "in_progress")
        server.http.delete(f"/v1/videos/{id}?undo_seconds=60")
        other = server.finished(prompt="the worker is free again")
        assert other["status"] == "completed"
        restored = server.http.post(f"/v1/videos/{id}/restore").json()
        assert (restored["status"], restored["error"]["code"]) == ("failed", "cancelled")
        server.executor.gate.set()
        assert server.http.post(f"/v1/videos/{id}/retry").json()["status"] == "queued"
        assert server.ended(id)["status"] == "completed"


def test_waiting_videos_change_places(server):
    one, two, three = (server.create()["id"] for _ in range(3))

    def places() -> list[int]:
        return [server.http.get(f"/v1/videos/{id}").json()["queue_position"] for id in (one, two, three)]

    answer = server.http.post(f"/v1/videos/{three}/move", json={"before": one})
    assert answer.json()["queue_position"] == 0
    assert places() == [1, 2, 0]
    assert server.http.post(f"/v1/videos/{three}/move", json={"before": None}).json()["queue_position"] == 2
    assert server.http.post(f"/v1/videos/{one}/move").json()["queue_position"] == 2  # behind all, without a body
    assert places() == [2, 0, 1]
    unknown = "video_" + "0" * 32
    refused = refusal(server.http.post(f"/v1/videos/{one}/move", json={"before": unknown}), 400)
    assert (refused["code"], refused["param"]) == ("invalid_value", "before")
    assert refusal(server.http.post(f"/v1/videos/{unknown}/move", json={"before": one}), 404)
    server.http.post(f"/v1/videos/{two}/cancel")
    refused = refusal(server.http.post(f"/v1/videos/{one}/move", json={"before": two}), 409)
    assert (refused["code"], refused["param"]) == ("not_waiting", "before")
    refused = refusal(server.http.post(f"/v1/videos/{two}/move", json={"before": one}), 409)
    assert (refused["code"], refused["param"]) == ("not_waiting", "id")


def test_all_of_a_keys_videos_are_cancelled_at_once_and_no_other(tmp_path):
    with serving(tmp_path, workers=0, api_keys=(ANNS, BOBS)) as server:
        ann, bob = ({"authorization": f"Bearer {key}"} for key in (ANNS, BOBS))

        def create(headers: dict[str, str]) -> str:
            return server.http.post("/v1/videos", json={"prompt": "a duck"}, headers=headers).json()["id"]

        mine, theirs = [create(ann), create(ann)], create(bob)
        answer = server.http.post("/v1/videos/cancel", headers=ann).json()
        assert [video["id"] for video in answer["data"]] == mine[::-1]
        assert {video["error"]["code"] for video in answer["data"]} == {"cancelled"}
        assert server.http.get(f"/v1/videos/{theirs}", headers=bob).json()["status"] == "queued"
        assert server.http.post("/v1/videos/cancel", headers=ann).json()["data"] == []
        for path, body in (("", {"favourite": True}), ("/move", {"before": mine[0]}), ("/restore", None)):
            answer = server.http.post(f"/v1/videos/{theirs}{path}", json=body, headers=ann)
            assert refusal(answer, 404)["code"] == "video_not_found"
        assert server.http.delete(f"/v1/videos/{theirs}?undo_seconds=9", headers=ann).status_code == 404
        assert server.http.get("/v1/videos/cancel", headers=ann).status_code == 405


def test_the_studios_requests_are_marked_as_its_own(server):
    answer = server.http.post("/v1/videos", json={"prompt": "a duck"}, headers={"x-pusa-page": "1"})
    assert answer.json()["source"] == "studio"
