"""The client sends what the server reads, gives up late and once, and never leaves half a file."""

import asyncio
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from pusa.client import (
    AsyncPusaClient,
    JobFailedError,
    Keyframe,
    PusaClient,
    PusaError,
    ServerUnreachableError,
    WaitTimeoutError,
)

ID = "video_" + "0" * 32
Answer = Callable[[httpx.Request], httpx.Response]


def video(**values: Any) -> httpx.Response:
    job = {"id": ID, "object": "video", "status": "queued", "progress": 0, "seconds": "1", "size": "96x64"}
    headers = {"openai-poll-after-ms": "50"}
    return httpx.Response(200, json={**job, "created_at": 1, "model": "tiny", **values}, headers=headers)


def refused(status: int, headers: dict[str, str] | None = None, **error: Any) -> httpx.Response:
    body = {"error": {"message": "no", "type": "x", "param": None, "code": None, **error}}
    return httpx.Response(status, json=body, headers=headers)


class Server:
    """Answers in turn; the last answer stays. An answer that is an exception is a lost connection."""

    def __init__(self, *answers: httpx.Response | Exception | Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx.Response) else answer(request)

    def client(self, **options: Any) -> PusaClient:
        return PusaClient("http://pusa.test/v1", "key-1", transport=httpx.MockTransport(self), **options)


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the seconds of each sleep, without sleeping."""
    slept: list[float] = []
    monkeypatch.setattr("pusa.client.client.time.sleep", slept.append)
    return slept


def test_importing_it_loads_no_torch_and_no_server() -> None:
    code = (
        "import sys; from pusa.client import PusaClient\n"
        "bad = {n.split('.')[0] for n in sys.modules} & {'torch', 'fastapi', 'sqlalchemy'}\n"
        "bad |= {n for n in sys.modules if n.startswith('pusa.server')}\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_request_without_files_is_json_with_the_key_and_an_idempotency_key() -> None:
    server = Server(video())
    job = server.client().create("a fox", size=(96, 64), seconds=1.5, seed=7, cond_positions=None)
    request = server.requests[0]
    assert (request.method, str(request.url)) == ("POST", "http://pusa.test/v1/videos")
    assert json.loads(request.content) == {"prompt": "a fox", "size": "96x64", "seconds": "1.5", "seed": 7}
    assert request.headers["authorization"] == "Bearer key-1"
    assert len(request.headers["idempotency-key"]) == 32
    assert (job.id, job.status, job.details["object"]) == (ID, "queued", "video")


def form(request: httpx.Request) -> dict[str, list[bytes]]:
    """Parts of a form: name -> contents."""
    boundary = request.headers["content-type"].split("boundary=")[1].encode()
    parts: dict[str, list[bytes]] = {}
    for part in request.content.split(b"--" + boundary)[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        parts.setdefault(head.split(b'name="')[1].split(b'"')[0].decode(), []).append(content.removesuffix(b"\r\n"))
    return parts


def test_an_image_goes_as_input_reference_whatever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "fox.png"
    Image.new("RGB", (8, 8), "red").save(path)
    server = Server(video())
    for image in (path, str(path), path.read_bytes(), Image.open(path)):
        server.client().create("a fox", image=image, noise_multipliers=[0.1, 0.2], extra_params={"seed": 1})
    assert len(server.requests) == 4
    for request in server.requests:
        parts = form(request)
        assert parts["input_reference"][0].startswith(b"\x89PNG")
        assert parts["noise_multipliers"] == [b"0.1,0.2"]
        assert json.loads(parts["extra_params"][0]) == {"seed": 1}


def test_the_prompts_of_a_story_stay_apart_in_a_form() -> None:
    server = Server(video())
    server.client().create(image=b"picture", prompts=["a fox, red", "it runs"], schedule="wave")
    (request,) = server.requests
    assert json.loads(form(request)["prompts"][0]) == ["a fox, red", "it runs"]


def test_a_final_sends_what_is_given_and_a_key() -> None:
    server = Server(video(remixed_from_video_id=ID))
    assert server.client().final(ID, noise_multiplier=0.5, size=(96, 64)).remixed_from_video_id == ID
    server.client().final(ID)
    first, second = server.requests
    assert (first.method, first.url.path) == ("POST", f"/v1/videos/{ID}/final")
    assert json.loads(first.content) == {"noise_multiplier": 0.5, "size": "96x64"}
    assert json.loads(second.content) == {}
    assert first.headers["idempotency-key"] != second.headers["idempotency-key"]


def test_an_estimate_sends_what_a_video_would_and_no_key() -> None:
    answer = {"object": "video.estimate", "model": "tiny", "tokens": 120, "plan": "tiny: on the CPU", "seconds": None}
    server = Server(httpx.Response(200, json=answer))
    found = server.client().estimate("a fox", size=(96, 64), num_frames=17)
    assert (found.tokens, found.plan, found.seconds, found.problem) == (120, "tiny: on the CPU", None, None)
    (request,) = server.requests
    assert request.url.path == "/v1/videos/estimate"
    assert json.loads(request.content) == {"prompt": "a fox", "size": "96x64", "num_frames": 17}
    assert "idempotency-key" not in request.headers
    server.client().estimate("a fox", image=b"picture")
    assert b'name="input_reference"' in server.requests[-1].content


def test_keyframes_are_one_json_string_that_points_to_files() -> None:
    server = Server(video())
    places: tuple[int | str, ...] = (3, "80f", "1.5s", "last")
    frames = [Keyframe(b"%d" % number, at, noise=0.25 * number) for number, at in enumerate(places)]
    server.client().create("a fox", image=b"first", keyframes=frames)
    parts = form(server.requests[0])
    assert parts["input_reference[]"] == [b"first", b"0", b"1", b"2", b"3"]
    assert json.loads(parts["keyframes"][0]) == [
        {"latent": 0, "file": 0},
        {"latent": 3, "file": 1, "noise": 0.0},
        {"frame": 80, "file": 2, "noise": 0.25},
        {"time": 1.5, "file": 3, "noise": 0.5},
        {"latent": "last", "file": 4, "noise": 0.75},
    ]
    with pytest.raises(ValueError) as error:
        server.client().create("a fox", keyframes=[Keyframe(b"1", "soon")])
    assert str(error.value).startswith("position 'soon' is not understood: write a latent frame (3)")


def test_an_image_and_a_video_are_both_sent() -> None:
    server = Server(video())
    server.client().create("a fox", image=b"first", video=b"piece", cond_positions=[4, 5])
    parts = form(server.requests[0])
    assert parts["input_reference[]"] == [b"first"]
    assert parts["video_reference"] == [b"piece"]
    assert json.loads(parts["keyframes"][0]) == [{"latent": 0, "file": 0}]


def test_extend_and_edit_take_ids_or_files() -> None:
    server, other = Server(video()), "video_" + "1" * 32
    client = server.client()
    client.extend(ID, "on", 2)
    client.extend(b"mp4", "on", "2", num_inference_steps=4)
    client.edit([ID, other], "joined")
    client.edit([b"a", b"b"], "joined")
    first, second, third, fourth = server.requests
    assert json.loads(first.content) == {"prompt": "on", "seconds": "2", "video": {"id": ID}}
    assert form(second) == {"prompt": [b"on"], "seconds": [b"2"], "num_inference_steps": [b"4"], "video": [b"mp4"]}
    assert json.loads(third.content)["video"] == [{"id": ID}, {"id": other}]
    assert form(fourth)["video[]"] == [b"a", b"b"]
    assert [r.url.path for r in server.requests] == ["/v1/videos/extensions"] * 2 + ["/v1/videos/edits"] * 2
    with pytest.raises(ValueError, match="an id and a file cannot be sent together"):
        client.edit([ID, b"a"], "joined")


def test_files_on_the_server_are_named_not_sent() -> None:
    file_id, answer = "file_" + "a" * 32, {"object": "file", "filename": "a.png", "bytes": 7, "kind": "image"}
    server = Server(httpx.Response(200, json={"id": "file_" + "a" * 32, **answer}))
    client = server.client()
    kept = client.upload_file(b"picture", filename="a.png")
    assert (kept.id, kept.kind, kept.bytes, kept.details["object"]) == (file_id, "image", 7, "file")
    client.upload_file(ID)
    client.upload_file({"video_id": ID, "input": 1})
    sent, *bodies = server.requests
    assert form(sent) == {"filename": [b"a.png"], "file": [b"picture"]}
    assert [json.loads(body.content) for body in bodies] == [{"video_id": ID}, {"video_id": ID, "input": 1}]

    server = Server(video())
    client, part = server.client(), {"file_id": file_id, "start": 0.5}
    client.create("a fox", image=kept)
    client.create("a fox", image=file_id, video=part, keyframes=[Keyframe(b"last", "last")])
    client.extend(part, "on")
    client.edit([ID, file_id], "joined")
    first, second, third, fourth = server.requests
    assert json.loads(first.content) == {"prompt": "a fox", "input_reference": {"file_id": file_id}}
    parts = form(second)
    assert parts["input_reference[]"] == [b"last"]
    assert json.loads(parts["video_reference"][0]) == part
    assert json.loads(parts["keyframes"][0]) == [
        {"latent": 0, "reference": {"file_id": file_id}},
        {"latent": "last", "file": 0},
    ]
    assert json.loads(third.content)["video"] == part
    assert json.loads(fourth.content)["video"] == [{"id": ID}, {"file_id": file_id}]
    client.delete_file(file_id)
    assert (server.requests[-1].method, server.requests[-1].url.path) == ("DELETE", f"/v1/files/{file_id}")


def test_an_error_says_which_field_and_why(pauses: list[float]) -> None:
    server = Server(refused(400, {"x-request-id": "r1"}, message="seed=-1: at least 0", param="seed", code="invalid"))
    with pytest.raises(PusaError) as error:
        server.client().create("a fox", seed=-1)
    e = error.value
    assert (str(e), e.status, e.param, e.code, e.request_id) == ("seed=-1: at least 0", 400, "seed", "invalid", "r1")
    assert not pauses


def test_a_page_of_a_proxy_is_an_error_too() -> None:
    server = Server(httpx.Response(502, text="<h1>Bad gateway</h1>"))
    with pytest.raises(PusaError) as error:
        server.client(max_retries=0).retrieve(ID)
    assert str(error.value) == "502 Bad Gateway"


def test_a_lost_answer_is_requested_again_with_the_same_key_and_the_whole_file(pauses: list[float]) -> None:
    server = Server(httpx.ReadError("reset"), refused(503), refused(429, {"retry-after": "3"}), video())
    job = server.client().create("a fox", image=b"picture")
    assert job.id == ID
    assert len({request.headers["idempotency-key"] for request in server.requests}) == 1
    assert [form(request)["input_reference"] for request in server.requests] == [[b"picture"]] * 4
    assert 0 < pauses[0] <= 0.5 < pauses[1] <= 1
    assert pauses[2] == 3


def test_two_calls_have_two_keys_unless_the_caller_names_one() -> None:
    server = Server(video())
    for key in (None, None, "mine"):
        server.client().create("a fox", idempotency_key=key)
    first, second, third = (request.headers["idempotency-key"] for request in server.requests)
    assert first != second
    assert third == "mine"


@pytest.mark.parametrize(
    "answer",
    [refused(500, {"x-should-retry": "false"}), refused(429, {"retry-after": "600"}), refused(404), refused(409)],
    ids=["told not to", "told to come back late", "not there", "not now"],
)
def test_what_trying_again_cannot_mend_is_not_tried_again(answer: httpx.Response) -> None:
    server = Server(answer)
    with pytest.raises(PusaError) as refusal:
        server.client().retrieve(ID)
    assert refusal.value.status == answer.status_code
    assert len(server.requests) == 1


def test_it_gives_up_in_the_end() -> None:
    server = Server(httpx.ConnectError("refused"))
    with pytest.raises(ServerUnreachableError) as error:
        server.client(max_retries=2).models()
    assert str(error.value) == f"no answer from {server.client().base_url}: refused"
    assert len(server.requests) == 3


def test_what_is_no_address_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"'localhost:7860' is no address of a server: write http://HOST:PORT"):
        PusaClient("localhost:7860")


def test_waiting_polls_as_often_as_the_server_asks_and_outlives_its_restart(pauses: list[float]) -> None:
    server = Server(
        video(),
        video(status="in_progress", progress=40),
        httpx.ConnectError("restarting"),
        httpx.Response(502, text="<h1>Bad gateway</h1>"),
        video(status="in_progress", progress=40),
        video(status="completed", progress=100),
    )
    seen: list[tuple[str, int]] = []
    done = server.client(max_retries=0).wait(ID, on_progress=lambda v: seen.append((v.status, v.progress)))
    assert done.status == "completed"
    assert seen == [("queued", 0), ("in_progress", 40), ("completed", 100)]
    assert pauses == [0.05, 0.05, 1.0, 1.0, 0.05]


def test_waiting_says_why_a_job_failed() -> None:
    failed = video(status="failed", error={"code": "cancelled", "message": "it was cancelled"})
    with pytest.raises(JobFailedError) as error:
        Server(video(), failed).client().create_and_wait("a fox")
    assert (str(error.value), error.value.code, error.value.video.cancelled) == ("it was cancelled", "cancelled", True)


def test_waiting_ends_when_its_time_is_over() -> None:
    with pytest.raises(WaitTimeoutError) as error:
        Server(video()).client().wait(ID, timeout_seconds=0)
    assert str(error.value) == f"{ID} has not ended after 0 seconds; it goes on"


def test_it_waits_for_the_server_and_for_its_model() -> None:
    loading = {"ready": False, "stage": "transformer", "percent": 40.0, "message": "loading"}
    server = Server(
        httpx.ConnectError("not yet"),
        httpx.Response(502, text="<h1>Bad gateway</h1>"),
        httpx.Response(503, json=loading),
        httpx.Response(200, json={**loading, "ready": True, "percent": 100.0}),
    )
    seen: list[float] = []
    state = server.client(max_retries=0).wait_until_ready(on_progress=lambda s: seen.append(s.percent))
    assert state.ready
    assert seen == [40, 100]
    loading_for_ever = Server(httpx.Response(503, json=loading)).client()
    with pytest.raises(WaitTimeoutError) as error:
        loading_for_ever.wait_until_ready(timeout_seconds=0)
    assert str(error.value) == "the server is not ready after 0 seconds: transformer 40 %"


def pages(request: httpx.Request) -> httpx.Response:
    ids = [f"video_{n}" for n in range(5)]
    after, limit = request.url.params.get("after"), int(request.url.params["limit"])
    start = ids.index(after) + 1 if after else 0
    data = [video(id=name).json() for name in ids[start : start + limit]]
    body = {"object": "list", "data": data, "last_id": data[-1]["id"], "has_more": start + limit < len(ids)}
    return httpx.Response(200, json=body)


def test_listing_goes_through_all_pages() -> None:
    server = Server(pages)
    assert [v.id for v in server.client().list(page_size=2, order="asc")] == [f"video_{n}" for n in range(5)]
    assert [r.url.params.get("after") for r in server.requests] == [None, "video_1", "video_3"]


class Broken(httpx.SyncByteStream):
    def __iter__(self) -> Iterator[bytes]:
        yield b"half"
        raise httpx.ReadError("reset")


def test_a_download_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "fox.mp4"
    server = Server(httpx.Response(200, stream=Broken()), httpx.Response(200, content=b"whole"))
    assert server.client().download(ID, "thumbnail", to=target) == target
    assert target.read_bytes() == b"whole"
    assert server.requests[0].url.params["variant"] == "thumbnail"
    with pytest.raises(ServerUnreachableError):
        Server(lambda _: httpx.Response(200, stream=Broken())).client(max_retries=1).download(ID, to=target)
    with pytest.raises(PusaError):
        Server(refused(404)).client().download(ID, to=target)
    assert target.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [target]
    whole = Server(httpx.Response(200, content=b"whole")).client()
    assert whole.download(ID, to=tmp_path) == tmp_path / f"{ID}.mp4"
    assert whole.download(ID, "thumbnail", to=tmp_path).name == f"{ID}_thumbnail.webp"
    assert Server(httpx.Response(200, content=b"whole")).client().download(ID) == b"whole"


def stream(*events: tuple[str, dict[str, Any]]) -> httpx.Response:
    text = "retry: 2000\n\n" + "".join(
        f"id: {n}\nevent: {name}\ndata: {json.dumps(data)}\n\n" for n, (name, data) in enumerate(events)
    )
    return httpx.Response(200, text=": hello\n\n" + text)


def test_events_go_on_after_a_restart_and_a_lost_connection() -> None:
    running, done = video(status="in_progress", progress=10).json(), video(status="completed", progress=100).json()
    server = Server(
        stream(("video", running), ("end", {"reason": "shutdown"})),
        httpx.ConnectError("restarting"),
        refused(503),
        stream(("video", running), ("preview", {"image": "data:image/webp;base64,YWJj"})),
        stream(("video", done), ("end", {"reason": "completed"})),
    )
    events = list(server.client().events(ID))
    assert [(e.name, e.video and e.video.status) for e in events] == [
        ("video", "in_progress"),
        ("video", "in_progress"),
        ("preview", "in_progress"),
        ("video", "completed"),
        ("end", "completed"),
    ]
    assert events[2].preview == b"abc"


def test_a_video_is_deleted_for_good_or_until_it_is_restored() -> None:
    server = Server(video())
    client = server.client()
    client.delete(ID)
    client.delete(ID, undo_seconds=30)
    assert client.restore(ID).id == ID
    assert [(request.method, str(request.url).partition("/v1")[2]) for request in server.requests] == [
        ("DELETE", f"/videos/{ID}"),
        ("DELETE", f"/videos/{ID}?undo_seconds=30"),
        ("POST", f"/videos/{ID}/restore"),
    ]


def test_events_of_a_deleted_job_end_and_of_an_unknown_one_are_an_error() -> None:
    running = video(status="in_progress").json()
    assert len(list(Server(stream(("video", running)), refused(404)).client().events(ID))) == 1
    assert [e.name for e in Server(stream(("end", {"reason": "deleted"}))).client().events(ID)] == ["end"]
    with pytest.raises(PusaError) as error:
        list(Server(refused(404)).client().events(ID))
    assert error.value.status == 404
    with pytest.raises(ServerUnreachableError):
        list(Server(stream()).client(max_retries=2).events(ID))


def test_a_growing_video_comes_in_pieces_and_is_never_begun_twice(pauses: list[float]) -> None:
    server = Server(httpx.ConnectError("restarting"), refused(503), httpx.Response(200, content=b"parts"))
    assert list(server.client().stream(ID)) == [b"parts"]
    assert server.requests[-1].url.path == f"/v1/videos/{ID}/stream"
    assert server.requests[-1].extensions["timeout"]["read"] == 3600
    assert len(pauses) == 2
    broken = Server(httpx.Response(200, stream=Broken()))
    pieces = broken.client().stream(ID)
    assert next(pieces) == b"half"
    with pytest.raises(ServerUnreachableError, match="reset"):
        next(pieces)
    assert len(broken.requests) == 1
    with pytest.raises(PusaError) as error:
        list(Server(refused(409, code="not_a_wave")).client().stream(ID))
    assert error.value.code == "not_a_wave"


def test_the_async_client_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = video(status="in_progress", progress=10).json()

    def answer(request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if path.endswith("/events"):
            return stream(("video", running), ("end", {"reason": "completed"}))
        if path.endswith(("/content", "/stream")):
            return httpx.Response(200, content=b"whole")
        return pages(request) if request.method == "GET" and path == "/v1/videos" else video(status="completed")

    async def use() -> None:
        transport = httpx.MockTransport(Server(httpx.ReadError("reset"), answer))
        async with AsyncPusaClient("http://pusa.test", transport=transport) as client:
            done = await client.create_and_wait("a fox", image=b"picture")
            assert done.status == "completed"
            assert [v.id async for v in client.list(page_size=2)] == [f"video_{n}" for n in range(5)]
            assert [e.name async for e in client.events(ID)] == ["video", "end"]
            assert await client.download(ID, to=tmp_path / "fox.mp4") == tmp_path / "fox.mp4"
            assert [piece async for piece in client.stream(ID)] == [b"whole"]
            assert (await client.final(ID, num_inference_steps=7)).status == "completed"

    async def no_sleep(_: float) -> None:
        return None

    monkeypatch.setattr("pusa.client.client.asyncio.sleep", no_sleep)
    asyncio.run(use())


def test_both_clients_have_the_same_verbs_and_say_what_they_return() -> None:
    verbs = [name for name in vars(PusaClient) if not name.startswith("_")]
    assert verbs == [name for name in vars(AsyncPusaClient) if not name.startswith("_")]
    assert str(inspect.signature(PusaClient.retrieve)) == "(self, video_id: str) -> pusa.client.wire.Video"
    assert all(getattr(PusaClient, name).__doc__ for name in verbs if name != "close")


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUSA_API_KEY", "key-2")
    server = Server(video())
    PusaClient("http://pusa.test", transport=httpx.MockTransport(server)).retrieve(ID)
    assert server.requests[0].headers["authorization"] == "Bearer key-2"
