"""The API: what OpenAI's own client does with it, and what it adds to that."""

import asyncio
import base64
import hashlib
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_samples import FRAMES, Served, clip, png, refusal, serving
from server_samples import wait_until

from pusa import zoo

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("api")) as served:
        yield served


@pytest.fixture
def sdk(server: Served) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The Sora API is scheduled", category=DeprecationWarning)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            yield client


@pytest.fixture
def video_file(tmp_path: Path) -> Path:
    return clip(tmp_path)


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# ---- OpenAI's client -------------------------------------------------------------------------------------------------


def test_sdk_creates_polls_and_downloads(server: Served, sdk: Any) -> None:
    video = sdk.videos.create(prompt="a duck", seconds="1", size="96x64")
    assert (video.status, video.object, video.seconds, video.size) == ("queued", "video", "1", "96x64")
    assert isinstance(video.created_at, int)
    done = sdk.videos.poll(video.id)
    assert (done.status, done.progress) == ("completed", 100)
    assert done.completed_at >= done.created_at
    assert done.plan == "tiny: transformer on the CPU in float32"
    content = sdk.videos.download_content(video.id).read()
    assert content[4:8] == b"ftyp"
    assert server.job(video.id).request["frames"] == 16
    for variant in ("thumbnail", "spritesheet"):
        assert sdk.videos.download_content(video.id, variant=variant).read()[8:12] == b"WEBP"


def test_sdk_creates_from_a_picture_and_from_a_video(server: Served, sdk: Any, video_file: Path) -> None:
    video = sdk.videos.create_and_poll(prompt="it moves", input_reference=("a cat.png", png(), "image/png"))
    assert video.status == "completed"
    job = server.job(video.id)
    [condition] = job.request["conditions"]
    assert (condition["kind"], condition["positions"], condition["file"]) == ("image", [0], f"inputs/{video.id}/0.png")
    assert condition["sha256"] == hashlib.sha256(png()).hexdigest()
    video = sdk.videos.create(prompt="it goes on", input_reference=video_file)
    [condition] = server.job(video.id).request["conditions"]
    assert (condition["kind"], condition["positions"]) == ("video", [])


def test_sdk_lists_pages_in_both_orders(server: Served, sdk: Any) -> None:
    ids = [sdk.videos.create(prompt=f"number {n}").id for n in range(5)]
    newest = [video.id for video, _ in zip(sdk.videos.list(limit=2), range(5), strict=False)]
    assert newest == ids[::-1]
    oldest_first = [video.id for video in sdk.videos.list(limit=3, order="asc")]
    assert oldest_first[-5:] == ids
    page = sdk.videos.list(limit=2)
    assert (page.has_more, page.last_id) == (True, ids[-2])


def test_sdk_remixes_extends_and_edits(server: Served, sdk: Any, video_file: Path) -> None:
    first = sdk.videos.create_and_poll(prompt="a duck", seconds="1", input_reference=("cat.png", png()))
    remix = sdk.videos.remix(first.id, prompt="a goose")
    assert remix.remixed_from_video_id == first.id
    old, new = server.job(first.id).request, server.job(remix.id).request
    assert (new["prompt"], new["seed"], new["frames"]) == ("a goose", old["seed"], old["frames"])
    assert new["conditions"][0]["sha256"] == old["conditions"][0]["sha256"]
    assert new["conditions"][0]["file"].startswith(f"inputs/{remix.id}/")

    longer = sdk.videos.extend(prompt="it flies", seconds="1", video=video_file)
    asked = server.job(longer.id).request
    assert (asked["task"], asked["frames"] - asked["overlap"]) == ("extend", 16)
    assert float(longer.seconds) == pytest.approx(FRAMES / 16 + 1, abs=0.26)  # lengths are 4n + 1 frames

    by_id = sdk.videos.extend(prompt="it flies", seconds="1", video=openai.omit, extra_body={"video": {"id": first.id}})
    assert by_id.remixed_from_video_id == first.id
    beside = sdk.videos.extend(prompt="it flies", seconds="1", video=b"", extra_body={"video": {"id": first.id}})
    assert beside.remixed_from_video_id == first.id

    edited = sdk.videos.edit(prompt="in the snow", video=video_file)
    asked = server.job(edited.id).request
    assert (asked["task"], asked["frames"], asked["conditions"][0]["noise"]) == ("generate", FRAMES, [0.7])


def test_a_draft_becomes_a_final(server: Served, sdk: Any) -> None:
    reference = {"input_reference": ("cat.png", png()), "extra_body": {"draft": True}}
    draft = sdk.videos.create_and_poll(prompt="a duck", **reference)
    defaults = zoo.defaults_of("tiny")
    response = server.http.post(f"/v1/videos/{draft.id}/final", json={"noise_multiplier": 0.5})
    assert response.status_code == 200, response.text
    final = response.json()
    assert (final["remixed_from_video_id"], final["size"]) == (draft.id, f"{defaults.width}x{defaults.height}")
    asked = server.job(final["id"]).request
    assert [(c["kind"], c["noise"]) for c in asked["conditions"]] == [("image", None), ("draft", [0.5])]
    assert (asked["draft"], asked["seed"]) == (False, server.job(draft.id).request["seed"])
    for headers in ({}, {"content-type": "application/json"}):
        bare = server.http.post(f"/v1/videos/{draft.id}/final", headers=headers)
        assert server.job(bare.json()["id"]).request["conditions"][-1]["noise"] is None

    whole = sdk.videos.create_and_poll(prompt="a duck")
    error = server.http.post(f"/v1/videos/{whole.id}/final", json={})
    assert error.status_code == 400
    assert "it is no draft" in error.json()["error"]["message"]


def test_sdk_cancels_by_post_and_deletes(server: Served, sdk: Any) -> None:
    running = sdk.videos.create(prompt="wait for it")
    waiting = sdk.videos.create(prompt="wait behind it")
    for video in (waiting, running):
        sdk.post(f"/videos/{video.id}/cancel", cast_to=object)
        ended = sdk.videos.poll(video.id)
        assert (ended.status, ended.error.code) == ("failed", "cancelled")
    deleted = sdk.videos.delete(running.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (running.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        sdk.videos.retrieve(running.id)
    assert not list(server.service.files.keys(f"results/{running.id}"))


def test_the_openai_sdk_raises_its_classes_of_errors(server: Served, sdk: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.videos.create(prompt="a duck", size="0x0")
    assert (refused.value.param, refused.value.type, refused.value.code) == (
        "size",
        "invalid_request_error",
        "size_unknown",
    )
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.videos.retrieve("video_unknown")
    assert missing.value.code == "video_not_found"
    waiting = sdk.videos.create(prompt="wait")
    with pytest.raises(openai.ConflictError) as early:
        sdk.videos.download_content(waiting.id)
    assert early.value.code == "not_ready"
    assert early.value.response.headers["x-should-retry"] == "false"
    sdk.videos.delete(waiting.id)
    failed = sdk.videos.create_and_poll(prompt="fail")
    assert (failed.status, failed.error.code) == ("failed", "out_of_memory")
    with pytest.raises(openai.APIStatusError) as characters:
        sdk.videos.create_character(name="Ann", video=b"video")
    assert (characters.value.status_code, characters.value.code) == (501, "not_supported")


def test_async_sdk_creates_and_streams_a_download(server: Served, tmp_path: Path) -> None:
    async def all_of_it() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            video = await client.videos.create_and_poll(prompt="a duck", input_reference=("cat.png", png()))
            assert video.status == "completed"
            async with client.videos.with_streaming_response.download_content(video.id) as answer:
                await answer.stream_to_file(tmp_path / "out.mp4")

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The Sora API is scheduled", category=DeprecationWarning)
        asyncio.run(all_of_it())
    assert (tmp_path / "out.mp4").read_bytes()[4:8] == b"ftyp"


def test_sdk_sends_our_fields_as_form_and_as_json(server: Served, sdk: Any) -> None:
    form = sdk.videos.create(
        prompt="a duck",
        extra_body={"num_frames": 9, "seed": 7, "noise_multiplier": 0.25, "preset": "faithful", "guidance_scale": 1.5},
        input_reference=[("a.png", png()), ("b.png", png())],
    )
    asked = server.job(form.id).request
    assert (asked["frames"], asked["seed"], asked["preset"], asked["guidance"]) == (9, 7, "faithful", 1.5)
    assert [(c["positions"], c["noise"]) for c in asked["conditions"]] == [([0], [0.25]), (["last"], [0.25])]
    as_json = sdk.videos.create(
        prompt="a duck",
        extra_headers={"Content-Type": "application/json"},
        extra_body={"keyframes": [{"latent": 2, "image_url": data_url(png()), "noise": 0.5}]},
    )
    [condition] = server.job(as_json.id).request["conditions"]
    assert (condition["positions"], condition["noise"]) == ([2], [0.5])


# ---- fields ----------------------------------------------------------------------------------------------------------


def test_every_field_reaches_the_request_under_its_published_name(server: Served) -> None:
    video = server.create(
        width=96, height=64, num_frames=9, fps=8, num_inference_steps=3, guidance_scale=2, guidance_scale_2=2.5,
        flow_shift=4, seed=5, negative_prompt="rain", lora_alpha=1.2, lora_alpha_2=1.1, window=9, overlap=1,
        task="loop", schedule="wave:3",
    )  # fmt: skip
    asked = server.job(video["id"]).request
    wanted = {
        "width": 96, "height": 64, "frames": 9, "fps": 8, "steps": 3, "guidance": 2, "guidance_2": 2.5, "shift": 4,
        "seed": 5, "negative_prompt": "rain", "alpha": 1.2, "alpha_2": 1.1, "window": 9, "overlap": 1, "task": "loop",
        "schedule": "wave:3",
    }  # fmt: skip
    assert {name: asked[name] for name in wanted} == wanted
    assert (video["size"], video["seconds"], video["seed"]) == ("96x64", "1.12", 5)


@pytest.mark.parametrize("size", ["96x64", "96X64", "96×64", "96*64"])
def test_a_size_may_have_any_sign_of_multiplication(server: Served, size: str) -> None:
    assert server.create(size=size)["size"] == "96x64"


def test_num_frames_wins_over_seconds_and_width_over_size(server: Served) -> None:
    asked = server.job(server.create(seconds="3", num_frames=5, size="128x128", width=96)["id"]).request
    assert (asked["frames"], asked["width"], asked["height"]) == (5, 96, 128)


def test_fields_win_over_extra_params(server: Served) -> None:
    asked = server.job(server.create(seed=1, extra_params={"seed": 2, "num_inference_steps": 2})["id"]).request
    assert (asked["seed"], asked["steps"]) == (1, 2)


KEYFRAMES = [{"frame": 0, "file": 1, "noise": 0.1}, {"time": 0.5, "file": 0}, {"latent": "last", "file": 1}]


@pytest.mark.parametrize(
    "fields",
    [
        {"keyframes": json.dumps(KEYFRAMES)},
        {
            "keyframes[0][frame]": "0", "keyframes[0][file]": "1", "keyframes[0][noise]": "0.1",
            "keyframes[1][time]": "0.5", "keyframes[1][file]": "0",
            "keyframes[2][latent]": "last", "keyframes[2][file]": "1",
        },
    ],
    ids=["a JSON string", "bracketed keys"],
)  # fmt: skip
def test_keyframes_place_files_of_a_form(server: Served, fields: dict[str, str]) -> None:
    files = [("input_reference[]", ("a.png", png(grey=1))), ("input_reference[]", ("b.png", png(grey=2)))]
    answer = server.http.post("/v1/videos", data={"prompt": "a duck", **fields}, files=files)
    assert answer.status_code == 200, answer.text
    conditions = server.job(answer.json()["id"]).request["conditions"]
    digests = [hashlib.sha256(png(grey=grey)).hexdigest() for grey in (2, 1, 2)]
    assert [c["sha256"] for c in conditions] == digests
    assert [c["positions"] for c in conditions] == [["0f"], ["0.5s"], ["last"]]
    assert [c["noise"] for c in conditions] == [[0.1], None, None]


def test_lists_of_objects_whose_pairs_the_form_lost_are_put_together_by_order(server: Served) -> None:
    files = [("input_reference[]", ("a.png", png())), ("input_reference[]", ("b.png", png()))]
    fields = {"prompt": "a duck", "keyframes[][latent]": ["0", "3"], "keyframes[][file]": ["1", "0"]}
    answer = server.http.post("/v1/videos", data=fields, files=files)
    assert [c["positions"] for c in server.job(answer.json()["id"]).request["conditions"]] == [[0], [3]]
    uneven = {**fields, "keyframes[][noise]": ["0.5"]}
    error = refusal(server.http.post("/v1/videos", data=uneven, files=files), 400)
    assert error["param"] == "keyframes"


def test_positions_and_multipliers_come_as_text_or_as_lists(server: Served, video_file: Path) -> None:
    pictures = [data_url(png())] * 3
    as_text = server.create(input_reference=pictures, cond_positions="0,0.5s,-1", noise_multipliers="0,0.2,0.5")
    as_lists = server.create(input_reference=pictures, cond_positions=[0, "0.5s", -1], noise_multipliers=[0, 0.2, 0.5])
    for video in (as_text, as_lists):
        conditions = server.job(video["id"]).request["conditions"]
        assert [c["positions"] for c in conditions] == [[0], ["0.5s"], ["last"]]
        assert [c["noise"] for c in conditions] == [[0], [0.2], [0.5]]
    answer = server.http.post(
        "/v1/videos",
        data={"prompt": "a duck", "cond_positions": "0,1,2", "noise_multipliers": "0,0.3,0.4"},
        files={"input_reference": video_file.open("rb")},
    )
    [condition] = server.job(answer.json()["id"]).request["conditions"]
    assert (condition["kind"], condition["positions"], condition["noise"]) == ("video", [0, 1, 2], [0, 0.3, 0.4])


def test_vllm_omni_and_curl_send_references_as_objects(server: Served) -> None:
    for fields in (
        {"input_reference": {"image_url": data_url(png())}},
        {"image_reference": {"image_url": data_url(png())}},
        {"keyframes": [{"image_b64": base64.b64encode(png()).decode()}]},
    ):
        [condition] = server.job(server.create(**fields)["id"]).request["conditions"]
        assert condition["sha256"] == hashlib.sha256(png()).hexdigest()
    form = {"prompt": "a duck", "input_reference[image_url]": data_url(png())}
    answer = server.http.post("/v1/videos", data=form)
    assert len(server.job(answer.json()["id"]).inputs) == 1
    form = {"prompt": "a duck", "image_reference": json.dumps({"image_url": data_url(png())})}
    answer = server.http.post("/v1/videos", data=form)
    assert len(server.job(answer.json()["id"]).inputs) == 1


def test_keyframes_beside_a_piece_of_video(server: Served, video_file: Path) -> None:
    files = [("input_reference[]", ("a.png", png())), ("video_reference", ("b.mp4", video_file.read_bytes()))]
    fields = {"prompt": "x", "keyframes": '[{"latent": 4, "file": 0}]', "cond_positions": "0,1"}
    answer = server.http.post("/v1/videos", data=fields, files=files)
    conditions = server.job(answer.json()["id"]).request["conditions"]
    assert [(c["kind"], c["positions"]) for c in conditions] == [("image", [4]), ("video", [0, 1])]


def test_two_videos_are_joined(server: Served, video_file: Path) -> None:
    files = [("video[]", ("a.mp4", video_file.read_bytes())), ("video[]", ("b.mp4", video_file.read_bytes()))]
    answer = server.http.post("/v1/videos/edits", data={"prompt": "it becomes"}, files=files)
    job = server.job(answer.json()["id"])
    assert job.request["task"] == "transition"
    assert float(job.seconds) > 2 * FRAMES / 16


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": "  "}, None, "empty"),
        ({"prompt": 3}, "prompt", "not text"),
        ({"prompt": "\u0000"}, "prompt", "valid text"),
        ({"seconds": "soon"}, "seconds", "soon"),
        ({"size": "wide"}, "size", "wide"),
        ({"seed": -1}, "seed", "leave it out: one is drawn"),
        ({"num_inference_steps": "4"}, "num_inference_steps", "whole number"),
        ({"num_inference_steps": 0}, "num_inference_steps", "1..200"),
        ({"guidance_scale": 1e9}, "guidance_scale", "1..20"),
        ({"noise_multiplier": 0.5}, "noise_multiplier", "input_reference"),
        ({"noise_multiplyer": 1}, "noise_multiplyer", "did you mean noise_multiplier?"),
        ({"model": "../../etc/passwd"}, "model", "tiny"),
        ({"model": "wan2.1-14b"}, "model", "tiny"),
        ({"lora": "/root/x.safetensors"}, "lora", "none"),
        ({"lora": {"name": "x", "path": "/x"}}, "lora", "path"),
        ({"input_reference": "/etc/passwd"}, "input_reference", "data URL"),
        ({"input_reference": "file:///etc/passwd"}, "input_reference", "data URL"),
        ({"input_reference": "https://example.org/a.png"}, "image_url", "fetches nothing"),
        ({"input_reference": "data:image/png;base64,###"}, "input_reference", "base64"),
        ({"input_reference": "data:image/png;base64,QUJDRA=="}, "input_reference", "input_reference"),
        ({"keyframes": [{"file": 0}]}, "keyframes", "counted from 0"),
        ({"keyframes": [{"latent": 0}]}, "keyframes", "one picture"),
        ({"cond_positions": "0"}, "cond_positions", "input_reference"),
        ({"priority": 1000}, "priority", "100"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(
    server: Served, fields: dict[str, Any], param: str | None, words: str
) -> None:
    error = server.refused(400, **fields)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"null", "application/json", 400),
        (b"[]", "application/json", 400),
        (b'"text"', "application/json", 400),
        (b"{", "application/json", 400),
        (b'{"prompt": NaN}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"", "application/json", 400),
        (b"prompt", "text/plain", 415),
        (b"", "", 415),
        (b"", "multipart/form-data", 400),
        (b"--x\r\n", "multipart/form-data; boundary=x", 400),
        (b"--x\r\n\r\nhello\r\n--x--\r\n", "multipart/form-data; boundary=x", 400),
        (b"a[b][c][d][e]=1", "application/x-www-form-urlencoded", 400),
        (b"keyframes=[1", "application/x-www-form-urlencoded", 400),
        (b"prompt=x&seed=1.5", "application/x-www-form-urlencoded", 400),
    ],
)
def test_bodies_that_are_not_what_they_say_are_refused(server: Served, body: bytes, kind: str, status: int) -> None:
    refusal(server.http.post("/v1/videos", content=body, headers={"content-type": kind}), status)


def test_errors_come_in_the_envelope_wherever_they_arise(server: Served) -> None:
    refusal(server.http.get("/nowhere"), 404)
    refusal(server.http.get("/v1/videos/video_unknown/content"), 404)
    refusal(server.http.get("/v1/models/other"), 404)
    not_allowed = server.http.put("/v1/videos", json={})
    refusal(not_allowed, 405)
    assert "POST" in not_allowed.headers["allow"]
    assert refusal(server.http.get("/v1/videos?limit=0"), 400)["param"] == "limit"
    assert refusal(server.http.get("/v1/videos?order=up"), 400)["param"] == "order"
    assert refusal(server.http.get("/v1/videos?after=video_unknown"), 400)["param"] == "after"


def test_an_unexpected_error_is_an_answer_in_the_envelope(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("secret details")

    monkeypatch.setattr(server.service.queue, "page", broken)
    error = refusal(server.http.get("/v1/videos"), 500)
    assert error["code"] == "internal_error"
    assert "secret" not in error["message"]


# ---- sent again ------------------------------------------------------------------------------------------------------


def test_a_key_is_one_job_however_often_it_is_sent(server: Served) -> None:
    def send(key: str, **fields: Any) -> httpx.Response:
        return server.http.post("/v1/videos", json={"prompt": "a duck", **fields}, headers={"Idempotency-Key": key})

    first = send("one").json()["id"]
    assert send("one").json()["id"] == first
    assert send("two").json()["id"] != first
    assert refusal(send("one", seed=3), 422)["code"] == "idempotency_key_reused"


def test_a_retried_create_is_the_same_job_and_a_repeated_one_is_not(server: Served) -> None:
    def send(retries: int, grey: int = 1) -> str:
        headers = {"x-stainless-retry-count": str(retries)}
        files = {"input_reference": ("a.png", png(grey=grey))}
        answer = server.http.post("/v1/videos", data={"prompt": "retried"}, files=files, headers=headers)
        return answer.json()["id"]

    first = send(0)
    assert send(1) == send(2) == first
    assert send(1, grey=2) != first
    assert send(0) != first


# ---- looking and following -------------------------------------------------------------------------------------------


def test_a_wave_is_watched_while_it_is_made(server: Served) -> None:
    server.executor.gate.clear()
    id = server.create(prompt="grow and wait", schedule="wave:1")["id"]
    seen = b""
    with server.http.stream("GET", f"/v1/videos/{id}/stream") as stream:
        assert stream.headers["content-type"] == "video/mp4"
        for data in stream.iter_bytes():
            seen += data
            if seen == b"part0part1":
                server.executor.gate.set()
    assert seen == b"part0part1"
    assert server.ended(id)["status"] == "completed"
    over = refusal(server.http.get(f"/v1/videos/{id}/stream"), 409)
    assert (over["code"], over["message"]) == ("not_running", f"{id} is completed: its content has all of it")
    server.executor.gate.clear()
    even = server.create(prompt="wait")["id"]
    assert refusal(server.http.get(f"/v1/videos/{even}/stream"), 409)["code"] == "not_a_wave"
    server.executor.gate.set()
    server.ended(even)
    server.executor.gate.clear()


def test_a_story_is_repeated_and_a_remix_has_one_prompt(server: Served) -> None:
    story = server.finished(prompt="", prompts="0s: a cat stands\n1s: a cat spins", num_frames=33, window=17, overlap=1)
    assert story["prompt"] == "a cat stands"
    assert server.job(story["id"]).request["prompts"] == ["0s: a cat stands", "1s: a cat spins"]
    remix = server.http.post(f"/v1/videos/{story['id']}/remix", json={"prompt": "a dog"}).json()
    assert (remix["prompt"], server.job(remix["id"]).request["prompts"]) == ("a dog", [])
    assert server.refused(400, prompts=["a", "0s: b"])["message"].startswith("prompt 1 of prompts has no time")
    extended = {"video": {"id": story["id"]}, "prompts": ["it jumps", "it runs"], "seconds": 2, "window": 17}
    longer = server.http.post("/v1/videos/extensions", json=extended).json()
    assert (longer["prompt"], server.job(longer["id"]).request["prompts"]) == ("it jumps", ["it jumps", "it runs"])


@pytest.mark.parametrize("text", ["[wide] a cat, red\n[near] a dog", '["[wide] a cat, red", "[near] a dog"]'])
def test_a_story_in_a_form_may_have_brackets(server: Served, text: str) -> None:
    fields = {"prompts": text, "num_frames": "33", "window": "17", "overlap": "1"}
    made = server.http.post("/v1/videos", data=fields).json()
    assert server.job(made["id"]).request["prompts"] == ["[wide] a cat, red", "[near] a dog"]


def test_a_story_beyond_its_limits_is_refused_by_its_length(server: Served) -> None:
    for prompts, message in (
        (["a"] * 1000, "prompts has a length of 1000: the limit is 256"),
        ("a\n" * 1000, "prompts has a length of 1000: the limit is 256"),
        (["a" * 10_001], "prompts[0] has a length of 10001: the limit is 10000"),
        ("a" * 100_001, "prompts has a length of 100001: the limit is 100000"),
    ):
        error = server.refused(400, prompts=prompts)
        assert (error["message"], error["param"]) == (message, "prompts")


def test_a_running_job_tells_how_far_it_is(server: Served) -> None:
    server.executor.gate.clear()
    id = server.create(prompt="wait")["id"]
    behind = server.create(prompt="wait", priority=-1)["id"]
    with server.http.stream("GET", f"/v1/videos/{id}/events", headers={"Last-Event-ID": "99"}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        seen = []
        for name, event in _events(stream):
            seen.append((name, event))
            if name == "preview":
                answer = server.http.get(f"/v1/videos/{id}")
                assert 250 <= int(answer.headers["openai-poll-after-ms"]) <= 5000
                video = answer.json()
                assert (video["status"], video["stage"], video["step"], video["steps"]) == (
                    "in_progress",
                    "denoise",
                    1,
                    2,
                )
                assert 0 < video["progress"] < 100
                assert server.http.get(f"/v1/videos/{behind}").json()["queue_position"] == 0
                server.executor.gate.set()
    videos = [event for name, event in seen if name == "video"]
    assert videos[-1]["status"] == "completed"
    assert videos[-1]["notes"] == ["as it was asked for"]
    assert [v["progress"] for v in videos] == sorted(v["progress"] for v in videos)
    assert base64.b64decode(next(e["image"] for n, e in seen if n == "preview").partition(",")[2])[8:12] == b"WEBP"
    assert seen[-1] == ("end", {"reason": "completed"})
    server.ended(behind)
    server.executor.gate.clear()


def _events(stream: httpx.Response) -> Iterator[tuple[str, Any]]:
    name = ""
    for line in stream.iter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])


def test_a_stream_ends_when_its_job_is_deleted(server: Served) -> None:
    id = server.create(prompt="wait")["id"]
    with server.http.stream("GET", f"/v1/videos/{id}/events") as stream:
        events = _events(stream)
        assert next(events)[0] == "video"
        httpx.delete(f"{server.url}/v1/videos/{id}")
        assert list(events)[-1] == ("end", {"reason": "deleted"})
    refusal(server.http.get("/v1/videos/video_unknown/events"), 404)


def test_parts_of_a_video_can_be_downloaded(server: Served) -> None:
    id = server.finished()["id"]
    path = f"/v1/videos/{id}/content"
    whole = server.http.get(path)
    assert whole.headers["content-type"] == "video/mp4"
    assert whole.headers["accept-ranges"] == "bytes"
    size = len(whole.content)
    for asked, start, end in (("bytes=0-99", 0, 100), ("bytes=100-", 100, size), ("bytes=-10", size - 10, size)):
        part = server.http.get(path, headers={"range": asked})
        assert part.status_code == 206
        assert part.content == whole.content[start:end]
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
    for asked in ("bytes=5-2", "lines=1-2", "bytes=0-1,4-5", "bytes=x"):
        assert server.http.get(path, headers={"range": asked}).content == whole.content
    refusal(server.http.get(path, headers={"range": f"bytes={size}-"}), 416)
    stale = server.http.get(path, headers={"range": "bytes=0-9", "if-range": '"other"'})
    assert stale.status_code == 200
    assert server.http.get(path, headers={"if-none-match": whole.headers["etag"]}).status_code == 304
    assert refusal(server.http.get(path, params={"variant": "poster"}), 400)["param"] == "variant"


def test_sync_answers_with_the_video(server: Served) -> None:
    answer = server.http.post("/v1/videos/sync", json={"prompt": "a duck"})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert json.loads(answer.headers["x-stage-durations"])["denoise"] == 1.0
    assert server.http.get(f"/v1/videos/{answer.headers['x-video-id']}").json()["inference_time_s"] == 1.7
    refusal(server.http.post("/v1/videos/sync", json={"prompt": "fail"}), 409)


def test_a_client_that_does_not_wait_for_sync_cancels_its_job(server: Served) -> None:
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/v1/videos/sync", json={"prompt": "wait for nobody"}, timeout=1.0)

    def is_cancelled() -> bool:
        [job], _ = server.service.queue.page(limit=1)
        return job.prompt == "wait for nobody" and job.status == "cancelled"

    wait_until(is_cancelled)


def test_models_health_ready_and_metrics(server: Served) -> None:
    [model] = server.http.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["defaults"]["num_frames"]) == ("tiny", "model", 17)
    assert server.http.get("/v1/models/tiny").json() == model
    assert server.http.get("/health").json()["status"] == "ok"
    server.finished()
    ready = server.http.get("/ready")
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
    server.service.queue.counts()
    figures = server.http.get("/metrics").text
    for name in ("pusa:num_requests_running", "pusa:num_requests_waiting", "pusa:e2e_request_latency_seconds"):
        assert name in figures
    assert "a duck" not in figures


def test_pages_need_nothing_from_elsewhere(server: Served) -> None:
    for path in ("/", "/docs"):
        page = server.http.get(path)
        assert page.headers["content-type"].startswith("text/html")
        assert "http://" not in page.text
        assert "https://" not in page.text
        assert "<script" not in page.text
    assert "/v1/videos/{id}/events" in server.http.get("/docs").text


def test_request_ids_go_in_and_out(server: Served) -> None:
    assert server.http.get("/health", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert server.http.get("/health", headers={"X-Request-ID": "a b\tc"}).headers["x-request-id"].startswith("req_")
    assert server.http.get("/nowhere").headers["x-request-id"]


# ---- start and end ---------------------------------------------------------------------------------------------------


def test_the_api_process_imports_no_torch() -> None:
    code = "import sys, pusa.server.app; print([m for m in ('torch', 'numpy', 'av') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
