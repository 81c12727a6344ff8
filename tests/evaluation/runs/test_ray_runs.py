"""Runs on a Ray cluster of two nodes with addresses of the loopback only."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from needs import needed_module
from run_samples import make_fake_items
from server_process import FAKE_ENGINE
from server_samples import wait_until

needed_module("ray", "pip install 'pusa[ray]'")

from fake_engine import FakeEngine  # noqa: E402 (after the check for ray)
from ray_cluster import Machines, running_machines  # noqa: E402

from pusa.evaluation.runs import Item, RunFolder, make_videos  # noqa: E402
from pusa.evaluation.runs.ray import ray_makers  # noqa: E402
from pusa.events import Event, Note  # noqa: E402
from pusa.server.worker.messages import Task  # noqa: E402


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    with running_machines() as found:
        found.add(places=1)
        found.add(places=1)
        yield found


def options(**more: Any) -> dict[str, Any]:
    return {"target": FAKE_ENGINE, "gpus": 0, "resources": {"video": 1}, **more}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_node_that_is_killed_in_the_middle_costs_nothing(machines: Machines, tmp_path: Path) -> None:
    """No video is lost and none is made twice; the other node makes what the dead one had."""
    run = RunFolder.create(tmp_path / "run", "sample", {}, make_fake_items(10, steps=20, step_seconds=0.08))
    notes: list[str] = []
    kept: list[str] = []
    is_killed = False

    def watch(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.message)
            kept.extend(path.stem for path in run.parts.glob("*.safetensors"))

    def pull_the_plug() -> bool:
        nonlocal is_killed
        if not is_killed and len(list(run.videos.iterdir())) >= 3 and are_in_the_middle(run, 2):
            is_killed = True
            machines.pull_the_plug()
        return False  # the run goes on

    with ray_makers(None, run, 2, **options(checkpoint_seconds=0.0)) as makers:
        wait_until(lambda: all(maker.is_ready() for maker in makers), 150)  # actors of a busy machine are slow to start
        summary = make_videos(run, makers, stop=pull_the_plug, report=watch, poll_seconds=0.1)
    assert (summary.made, summary.made_here, summary.failed) == (10, 10, ())
    assert is_killed
    attempts = {item.name: record.attempts for item in run.items if (record := run.record_of(item))}
    (again,) = [name for name, count in attempts.items() if count > 1]
    assert attempts[again] == 2  # of the one that the node was making, and of no other
    assert len([note for note in notes if note.startswith(f"{again}:")]) == 1
    assert next(item.id for item in run.items if item.name == again) in kept  # it went on from its checkpoint
    assert not list(run.parts.iterdir())
    assert not run.problems(decode=True)
    for item in run.items:
        if item.name in (again, "clip 9"):
            assert run.video_of(item).read_bytes() == uninterrupted(tmp_path / item.id, item)


def are_in_the_middle(run: RunFolder, videos: int) -> bool:
    """Tell if so many videos have a checkpoint, and none of them is near its last step, the 20th."""
    try:
        steps = [json.loads(path.read_bytes())["step"] for path in run.parts.glob("*.safetensors")]
    except FileNotFoundError:  # one was made in between
        return False
    return len(steps) == videos and max(steps) <= 12


def uninterrupted(folder: Path, item: Item) -> bytes:
    """Make the video of an item by the fake engine in this process."""
    folder.mkdir()
    request = item.request.model_dump(mode="json")
    for _ in FakeEngine("fake").run(Task(job_id="x", attempt=1, request=request, folder=folder), lambda: False):
        pass
    return (folder / "video.mp4").read_bytes()
