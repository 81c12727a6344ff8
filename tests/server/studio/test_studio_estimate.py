"""The line above the button: what the video of the form would need, before it is queued."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio")

from pusa.server.studio.actions import Actions
from pusa.server.studio.files.uploads import VisitorFiles
from pusa.server.studio.forms import Form, FormDefaults
from server_samples import open_all
from studio_samples import settings_of

from pusa.acceleration.decisions import LoadOptions, Machine, PartPlan, Plan
from pusa.server.plans import Size, machine_as_json
from pusa.server.service import VideoService

FIELDS = ("timeline", *Form.__dataclass_fields__)


def plan(model: str, size: Size, machine: Machine, options: LoadOptions, guidance: float) -> list[Plan]:
    """Plan by a rule of this test: up to 128 pixels work."""
    problem = "" if size[0] <= 128 else f"{size[0]} pixels need too much: ask for 128"
    parts = {"transformer": PartPlan("float32", "float32", "cpu")}
    return [Plan(model, options.memory, parts, ram_peak_bytes=1000 * size[0] * size[1], problem=problem)]


@pytest.fixture
def actions(tmp_path: Path) -> Iterator[Actions]:
    settings = settings_of(tmp_path / "data", model="tiny", workers=0, lease_seconds=3600.0)
    queue, files = open_all(settings)
    service = VideoService(settings, queue, files, plan)
    found = Actions(service, FormDefaults.of("tiny"), VisitorFiles(tmp_path / "cache"))
    found.parts = {name: name for name in FIELDS}
    yield found
    service.close()
    queue.close()


def drawn(actions: Actions, **fields: Any) -> Any:
    return actions.redraw({"timeline": {"asked": 3}, "tab": "tab_image", **fields})


def test_nothing_is_said_while_no_worker_has_published_its_machine(actions: Actions) -> None:
    answer = drawn(actions)
    assert (answer["asked"], answer["estimate"]) == (3, None)


def test_the_line_follows_the_fields_and_needs_no_inputs(actions: Actions) -> None:
    machine = machine_as_json(Machine(ram_bytes=10**10))
    actions.service.queue.record_worker("elsewhere", {"ready": True, "machine": machine})
    fields = {"size": "96x64", "frames": 17, "steps": 4, "guidance": 3.0}
    assert drawn(actions, **fields)["estimate"] == {
        "plan": "tiny: transformer on the CPU in float32",
        "problem": False,
        "gpu_bytes": 0,
        "ram_bytes": 6_144_000,
        "seconds": None,
    }
    assert drawn(actions, **{**fields, "size": "128x64"})["estimate"]["ram_bytes"] == 8_192_000
    assert drawn(actions, tab="tab_video", mode="extend", **{**fields, "frames": 33})["estimate"]["problem"] is False
    refused = drawn(actions, **{**fields, "size": "256x64"})["estimate"]
    assert (refused["plan"], refused["problem"]) == ("256 pixels need too much: ask for 128", True)
    assert drawn(actions, size="blue")["estimate"] is None
    halved = drawn(actions, **{**fields, "size": "256x192", "draft": True})["estimate"]
    assert (halved["problem"], halved["ram_bytes"]) == (False, 1000 * 128 * 96)
