"""The page as it is served, and the routes that its scripts ask: without a browser."""

import hashlib
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("gradio")

from fastapi.testclient import TestClient
from pusa.server.studio.mounting import SCRIPTS, STYLES
from pusa.server.studio.routes import ASSETS
from studio_samples import settings_of

from pusa.request import GenerationRequest
from pusa.server.app import create_app
from pusa.server.jobs.queue import NewJob
from pusa.server.studio import examples

KEY, OTHER_KEY = "a-key-of-somebody", "a-key-of-another"


def app_in(folder: Path, **changes: object):
    """Without workers: jobs stay as the test leaves them."""
    return create_app(settings_of(folder, workers=0, **changes))


@contextmanager
def client_of(app):
    with TestClient(app, base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    return app_in(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def client(app):
    with client_of(app) as client:
        yield client


def submit(app, owner: str = "", **fields: object):
    request = GenerationRequest.model_validate({"prompt": "a duck", "seed": 3, **fields})
    job, _ = app.state.service.queue.submit(
        NewJob(
            owner=owner,
            request=request.model_dump(mode="json"),
            model="mini",
            prompt=request.prompt,
            seconds="2.06",
            size="96x96",
        )
    )
    return job


def finish(app, video: bytes = b"0123456789"):
    """Let the oldest job end with this as its video."""
    service = app.state.service
    job = service.queue.claim("worker", lease_seconds=60)
    keys = {"video": f"results/{job.id}/1/video.mp4", "thumbnail": f"results/{job.id}/1/thumbnail.webp"}
    for key in keys.values():
        service.files.put_bytes(key, video)
    service.queue.finish(job, results=keys, timings={})
    return job


def test_the_page_loads_its_parts_from_this_server_and_forbids_all_others(client):
    answer = client.get("/")
    head = answer.text.partition("</head>")[0]
    assert answer.status_code == 200
    for name in (*SCRIPTS, *STYLES):
        assert f"studio/assets/{name}?" in head
        assert client.get(f"/studio/assets/{name}").status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert head.index("window.pusa =") < head.index("studio/assets/common.js")


def test_only_files_that_are_meant_to_be_fetched_are(client):
    assert client.get("/studio/assets/penguin.png").status_code == 200
    assert client.get("/studio/assets/..%2Fforms.py").status_code == 404
    assert client.get("/studio/assets/forms.py").status_code == 404
    assert client.get(f"/gradio_api/file={Path(__file__)}").status_code in (403, 404)


def test_the_api_stays_where_it_is(client):
    assert client.get("/v1/videos").json()["object"] == "list"
    assert client.get("/health").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert not [path for path in paths if path.startswith(("/studio", "/gradio"))]


def test_the_page_reveals_nothing_about_this_machine(client):
    config = client.get("/config").json()
    text = json.dumps(config)
    assert config["analytics_enabled"] is False
    assert str(Path.home()) not in text
    assert str(ASSETS) not in text


def test_the_state_of_a_job_without_paths_and_keys(app, client):
    job = submit(app)
    state = client.get(f"/studio/state?job={job.id}").json()
    assert state["model"]["name"] == "mini"
    assert state["model"]["ready"] is False
    assert (state["job"]["status"], state["job"]["position"]) == ("queued", 0)
    assert state["job"]["settings"]["seed"] == 3
    assert "inputs/" not in json.dumps(state)
    assert client.get("/studio/state?job=video_nothing").json()["job"] is None
    assert client.get("/studio/state?job=" + "video_" + "0" * 32).json()["job"] is None
    assert client.post(f"/studio/jobs/{job.id}/cancel").json()["status"] == "cancelled"
    app.state.service.queue.delete(job.id)


def test_a_finished_video_is_played_from_any_place_in_it(app, client):
    submit(app)
    job = finish(app)
    whole = client.get(f"/studio/media/{job.id}/video")
    part = client.get(f"/studio/media/{job.id}/video", headers={"range": "bytes=2-4"})
    assert whole.content == b"0123456789"
    assert (part.status_code, part.content) == (206, b"234")
    assert client.get(f"/studio/media/{job.id}/spritesheet").status_code == 400
    assert client.get(f"/studio/media/{job.id}/preview").status_code == 204
    again = client.post(f"/studio/jobs/{job.id}/again").json()
    varied = client.post(f"/studio/jobs/{job.id}/again?vary_seed=true").json()
    queue = app.state.service.queue
    assert queue.get(again["id"]).request["seed"] == 3
    assert queue.get(varied["id"]).request["seed"] != 3
    assert queue.get(again["id"]).source == "studio"
    listed = client.get("/studio/jobs").json()
    assert [card["id"] for card in listed["jobs"]] == [varied["id"], again["id"], job.id]
    assert client.post(f"/studio/jobs/{job.id}/delete").status_code == 200
    assert client.get(f"/studio/media/{job.id}/video").status_code == 404
    for card in (again, varied):
        queue.delete(card["id"])


def test_the_gallery_comes_in_pages(app, client):
    jobs = [submit(app) for _ in range(30)]
    first = client.get("/studio/jobs").json()
    rest = client.get(f"/studio/jobs?after={first['jobs'][-1]['id']}").json()
    assert (len(first["jobs"]), first["more"]) == (24, True)
    assert (len(rest["jobs"]), rest["more"]) == (6, False)
    for job in jobs:
        app.state.service.queue.delete(job.id)


def test_words_are_looked_up(client):
    found = client.get("/studio/words", params={"prompt": "a yacht at the beach"}).json()
    assert [one["word"] for one in found] == ["yacht"]
    assert "sailboat" in found[0]["nearest"]


def test_with_keys_each_client_sees_only_its_jobs(tmp_path):
    app = app_in(tmp_path, api_keys=[KEY, OTHER_KEY])
    with client_of(app) as client:
        assert client.get("/").status_code == 401
        assert client.get("/studio/jobs").status_code == 401
        mine, other = ({"authorization": f"Bearer {key}"} for key in (KEY, OTHER_KEY))
        assert client.get("/", headers=mine).status_code == 200
        job = submit(app, hashlib.sha256(KEY.encode()).hexdigest())
        assert len(client.get("/studio/jobs", headers=mine).json()["jobs"]) == 1
        assert client.get("/studio/jobs", headers=other).json()["jobs"] == []
        assert client.get(f"/studio/state?job={job.id}", headers=other).json()["job"] is None
        assert client.post(f"/studio/jobs/{job.id}/cancel", headers=other).status_code == 404


def test_pages_of_others_may_not_act_here(app, client):
    job = submit(app)
    evil = {"origin": "http://evil.example"}
    assert client.post(f"/studio/jobs/{job.id}/cancel", headers=evil).status_code == 403
    assert app.state.service.queue.get(job.id).status == "queued"
    app.state.service.queue.delete(job.id)


def test_the_studio_loads_no_torch():
    code = "import sys, pusa.server.studio.mounting; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    from click.testing import CliRunner

    from pusa.cli import studio as cli_studio

    monkeypatch.setattr(cli_studio.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(cli_studio.studio, ["--no-browser"])
    assert "pip install 'pusa[studio]'" in str(result.exception)


def test_a_server_that_is_there_already_is_opened(monkeypatch, tmp_path):
    import threading

    import uvicorn
    from click.testing import CliRunner
    from ports import free_port

    from pusa.cli import studio as cli_studio

    opened: list[str] = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("webbrowser.open", opened.append)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app_in(tmp_path, studio=False), port=port, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    cli_studio.open_when_ready(f"http://127.0.0.1:{port}/")  # returns when it answers
    result = CliRunner().invoke(cli_studio.studio, ["--port", str(port), "--data", str(tmp_path)])
    server.should_exit = True
    thread.join(20)
    assert result.exit_code == 0
    assert opened == [f"http://127.0.0.1:{port}/"] * 2


def test_every_file_of_the_page_is_in_the_package():
    folder = Path(examples.__file__).parent
    names = {path.name for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {"fr.json", "zh.json", "en.json", "favicon.svg", "apple.mp4", "timeline.js"} <= names
    assert not [name for name in names if name.endswith(".pyi")], "Gradio wrote a stub beside a subclass"
