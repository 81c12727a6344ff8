"""The operator says how much results tell and how they are marked; a client may ask for less, never for more."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_samples import InstantExecutor, NearProber
from needs import needed_module
from provenance_samples import PERSONAL, exiftool, personal_photograph
from server_samples import open_all, quick_settings, wait_until

from pusa import media
from pusa.events import Done
from pusa.generate import inputs
from pusa.pipeline import PusaPipeline
from pusa.provenance.certificates import new_certificate
from pusa.provenance.marks import read_marks
from pusa.provenance.options import MarkOptions
from pusa.request import METADATA, GenerationRequest
from pusa.server.errors import ServiceError
from pusa.server.http.schemas import CreateVideo
from pusa.server.http.to_request import build_request
from pusa.server.jobs.queue import Job
from pusa.server.service import VideoService
from pusa.server.settings import ServerSettings
from pusa.server.worker.engine_process import make_engine, run_task
from pusa.server.worker.messages import Task
from pusa.server.worker.worker import Worker
from pusa.zoo import defaults_of


def make(folder: Path, **changes: Any) -> VideoService:
    settings = quick_settings(folder, model="tiny", min_free_bytes=0, **changes)
    service = VideoService(settings, *open_all(settings))
    service.submitter.prober = NearProber(service.submitter.prober.limits)
    return service


def create(service: VideoService, **asked: Any) -> Job:
    return asyncio.run(service.create({"prompt": "a duck", **asked}, {}))


# ---- the operator's setting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", METADATA)
@pytest.mark.parametrize("asked", [None, *METADATA])
def test_a_client_may_ask_for_less_and_not_for_more(allowed: Any, asked: Any, tmp_path: Path) -> None:
    service = make(tmp_path, metadata=allowed)
    fields = {} if asked is None else {"metadata": asked}
    if asked is not None and METADATA.index(asked) < METADATA.index(allowed):
        with pytest.raises(ServiceError, match=f"metadata={asked} tells more than this server allows") as refused:
            create(service, **fields)
        assert (refused.value.status, refused.value.param) == (400, "metadata")
    else:
        assert create(service, **fields).request["metadata"] == (asked or allowed)


def test_an_operator_who_must_mark_refuses_off(tmp_path: Path) -> None:
    service = make(tmp_path, require_mark=True)
    with pytest.raises(ServiceError, match="metadata=off is not offered here"):
        create(service, metadata="off")
    assert create(service, metadata="minimal").request["metadata"] == "minimal"
    assert service.settings.metadata_choices == ["full", "minimal"]
    assert service.settings.limit_metadata("off") == "minimal"  # of a job that was accepted before
    with pytest.raises(ValueError, match="require_mark and metadata=off exclude each other"):
        ServerSettings(require_mark=True, metadata="off")
    with pytest.raises(ValueError, match="sign_key is missing"):
        ServerSettings(sign_cert="certificate.pem")


def test_jobs_of_before_follow_the_setting_of_now(tmp_path: Path) -> None:
    """Jobs in the queue, and jobs made once more, when the operator has come to allow less."""
    job = create(make(tmp_path), metadata="full")
    stricter = make(tmp_path, metadata="minimal", sign_cert="c.pem", sign_key="k.pem")
    again = asyncio.run(stricter.rerun(job.id))
    assert again.request["metadata"] == "minimal"
    executor = InstantExecutor(tmp_path / "executor")
    stop = threading.Event()
    worker = threading.Thread(
        target=Worker(stricter.settings, stricter.queue, stricter.files, executor).run, args=(stop,)
    )
    worker.start()
    wait_until(lambda: stricter.queue.counts()["completed"] == 2)
    stop.set()
    worker.join()
    assert [task.request["metadata"] for task in executor.tasks] == ["minimal", "minimal"]
    assert {task.marks for task in executor.tasks} == {MarkOptions(sign_cert="c.pem", sign_key="k.pem")}


def test_the_api_passes_the_choice_on() -> None:
    body = CreateVideo(prompt="a duck", metadata="minimal")
    assert build_request(body, defaults=defaults_of("tiny"))["metadata"] == "minimal"
    assert "metadata" not in build_request(CreateVideo(prompt="a duck"), defaults=defaults_of("tiny"))


def test_a_server_that_cannot_sign_does_not_start(tmp_path: Path) -> None:
    from pusa.cli.serve import load_settings_from

    options = {"data": str(tmp_path), "sign_cert": "nowhere.pem", "sign_key": "nowhere.pem"}
    needed_module("c2pa", "pip install 'pusa[c2pa]'")
    with pytest.raises(FileNotFoundError, match=r"certificate 'nowhere\.pem' does not exist"):
        load_settings_from(None, options)


# ---- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", METADATA)
def test_results_name_no_path_of_the_server_and_nothing_of_the_client(metadata: str, tmp_path: Path) -> None:
    needed_module("c2pa", "pip install 'pusa[c2pa]'")
    from pusa.provenance.c2pa import validate

    server = tmp_path / "planted-folder"
    model = server / "my-model"
    PusaPipeline.from_pretrained("tiny").save_pretrained(model)
    certificate = new_certificate(server / "certificate", organization="Example Studio")
    scratch = server / "scratch"
    scratch.mkdir()
    key = "inputs/video_1/0.jpg"
    upload = personal_photograph(server / "0.jpg")
    request = {
        **{"model": str(model), "prompt": "a cat", "steps": 1, "frames": 5, "seed": 0, "width": 96, "height": 64},
        "conditions": [{"kind": "image", "file": key, "positions": [0], "noise": [0.2]}],
        "metadata": metadata,
    }
    marks = MarkOptions(sign_cert=str(certificate["certificate"]), sign_key=str(certificate["key"]))
    task = Task(job_id="video_1", attempt=1, request=request, folder=scratch, inputs={key: upload}, marks=marks)
    engine = make_engine("pusa.server.worker.engine_process:PusaEngine", str(model))
    *_, done = run_task(engine, task, lambda: False)
    assert isinstance(done, Done), done
    for path in done.files.values():
        content = path.read_bytes() + json.dumps(media.read_metadata(path)).encode()
        assert not [word for word in (*PERSONAL, str(tmp_path)) if word.encode() in content]
        mark = read_marks(path).mark
        assert (mark and mark.system) == (None if metadata == "off" else "pusa (my-model)")
    assert validate(done.files["video"], trust=certificate["root"]).state == "trusted"
    if metadata != "off":
        for kind in ("thumbnail", "spritesheet", "contact_sheet"):
            assert exiftool(done.files[kind])["XMP-iptcExt:AISystemUsed"] == "pusa (my-model)"


def test_a_stored_request_names_loras_and_models_without_their_folders(tmp_path: Path) -> None:
    lora = tmp_path / "planted-folder" / "style.safetensors"
    lora.parent.mkdir()
    lora.touch()
    request = GenerationRequest(prompt="a duck", model="tiny", lora=[str(lora), "owner/lora"])
    stored = inputs.without_folders(request.resolved(defaults_of("tiny")))
    assert stored.lora == ["style.safetensors", "owner/lora"]


def test_previews_hold_pixels_alone(tmp_path: Path) -> None:
    from pusa.generate import generate

    photograph = personal_photograph(tmp_path / "photo.jpg")
    spec = {"kind": "image", "file": str(photograph), "noise": [0.2]}
    request = GenerationRequest.model_validate(
        {"model": "tiny", "prompt": "a cat", "steps": 2, "frames": 5, "conditions": [spec]}
    )
    previews = [e for e in generate(request, tmp_path / "out.mp4", preview_every=1) if e.kind == "preview"]
    assert previews
    for preview in previews:
        assert not [word for word in PERSONAL if word.encode() in preview.image]
        assert np.asarray(media.read_image(preview.image)).size
