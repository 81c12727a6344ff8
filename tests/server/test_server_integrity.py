"""A damaged file is said and made again; it is never sent, nor gone on from."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_samples import png, refusal, serving
from server_samples import House, quick_settings, submit, uninterrupted, video_of, wait_until

from pusa.server.jobs.integrity import FileIntegrity
from pusa.server.jobs.queue import FileDigest, Job


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(quick_settings(tmp_path))
    yield house
    house.dismiss()
    house.queue.close()


def damage(path: Path, *, cut: bool = False) -> None:
    """Flip one bit in the middle of a file, or cut it in half; its time of writing stays."""
    content = bytearray(path.read_bytes())
    if cut:
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


def waiting_with_checkpoint(house: House) -> Job:
    """A job whose worker stopped after some steps."""
    job = submit(house.queue, steps=6, step_seconds=0.02, at_step=4, then="hang")
    house.hire()
    wait_until(lambda: house.job(job).checkpoint_step >= 4)
    house.dismiss()
    house._stops.clear(), house._threads.clear()
    waiting = house.job(job)
    assert (waiting.status, waiting.checkpoint_step) == ("queued", 4)
    return waiting


@pytest.mark.parametrize("cut", [False, True], ids=["one bit", "half"])
def test_a_damaged_checkpoint_is_not_gone_on_from(house, cut):
    job = waiting_with_checkpoint(house)
    damage(house.files.local(job.checkpoint), cut=cut)
    house.hire()
    done = house.ended(job)
    assert done.status == "completed"
    assert "its checkpoint of step 4 was damaged: it was made again from the beginning" in done.notes
    expected = uninterrupted(house, steps=6, step_seconds=0.02, at_step=4, then="hang")
    assert video_of(house, done) == expected


def test_a_checkpoint_that_is_gone_is_said_too(house):
    job = waiting_with_checkpoint(house)
    house.files.delete(job.checkpoint)
    house.hire()
    assert "its checkpoint of step 4 was gone: it was made again from the beginning" in house.ended(job).notes


def test_an_intact_checkpoint_is_gone_on_from_without_a_word(house):
    job = waiting_with_checkpoint(house)
    house.hire()
    done = house.ended(job)
    assert not [note for note in done.notes if "checkpoint" in note]


def test_the_row_of_a_job_says_what_its_files_are(house):
    job = submit(house.queue, steps=2)
    house.hire()
    done = house.ended(job)
    for key in done.results.values():
        content = house.files.get_bytes(key)
        assert house.queue.digest(done.id, key) == FileDigest(len(content), hashlib.sha256(content).hexdigest())


def test_a_file_is_read_once_until_it_is_written_again(house, monkeypatch):
    job = submit(house.queue, steps=2)
    house.hire()
    key = house.ended(job).results["video"]
    checked = FileIntegrity(house.queue, house.files)
    opened = []
    opens = house.files.open
    monkeypatch.setattr(house.files, "open", lambda key: opened.append(key) or opens(key))
    assert [checked.is_intact(job.id, key) for _ in range(3)] == [True] * 3
    assert opened == [key]
    damage(house.files.local(key))
    assert not checked.is_intact(job.id, key)
    assert len(opened) == 2
    assert not checked.is_intact(job.id, key)  # said every time
    with pytest.raises(FileNotFoundError):
        checked.is_intact(job.id, "results/none.mp4")


@pytest.mark.parametrize("cut", [False, True], ids=["one bit", "half"])
@pytest.mark.parametrize("variant", ["video", "thumbnail"])
def test_a_damaged_result_is_said_and_made_again(tmp_path, cut, variant):
    with serving(tmp_path) as server:
        video = server.finished(seed=5)
        whole = server.http.get(f"/v1/videos/{video['id']}/content").content
        damage(server.service.files.local(server.job(video["id"]).results[variant]), cut=cut)
        path = f"/v1/videos/{video['id']}/content?variant={variant}"
        error = refusal(server.http.get(path), 409)
        assert error["code"] == "file_damaged"
        assert "was damaged on the server's disk and is made again: wait until it is completed" in error["message"]
        again = server.ended(video["id"])
        assert again["status"] == "completed"
        assert again["seed"] == 5
        assert "a file of it was damaged on the server's disk, so it was made again" in again["notes"]
        assert server.http.get(path).status_code == 200
        assert server.http.get(f"/v1/videos/{video['id']}/content").content == whole


def test_a_damaged_input_fails_the_job_and_is_not_used_for_another(tmp_path):
    with serving(tmp_path, workers=0) as server:
        form = {"prompt": "a duck"}
        id = server.http.post("/v1/videos", data=form, files={"input_reference": ("a.png", png())}).json()["id"]
        damage(server.service.files.local(server.job(id).inputs[0]))
        error = refusal(server.http.post(f"/v1/videos/{id}/remix", json={"prompt": "a goose"}), 409)
        assert error["code"] == "file_damaged"
        assert f"an input of {id} is damaged on the server's disk: send it anew" in error["message"]
    with serving(tmp_path) as server:
        failed = server.ended(id)
        assert failed["error"]["code"] == "input_damaged"
