"""`pusa eval vbench report` writes a page that needs no other file, and the same as JSON."""

import json
import re
import shlex
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command_line import pusa
from vbench_runs import made_run
from vbench_samples import make_suite
from vbench_scorer import value_of

from pusa.evaluation.runs import RunFolder
from pusa.evaluation.vbench.report import radar
from pusa.evaluation.vbench.scored import items_of
from pusa.evaluation.vbench.totals import DIMENSIONS

SCORER = Path(__file__).parents[2] / "support" / "vbench_scorer.py"
FOLDER = "a <b>run & more"


class Page(HTMLParser):
    """Collect the tags and images of a page, and check that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attributes)
        if tag == "img":
            self.images.append(values["src"] or "")
        assert not {name for name in values if name.startswith("on")}
        if tag not in ("meta", "img", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run in which all but camera motion is scored."""
    suite = make_suite(tmp_path / "VBench")
    run = made_run(tmp_path / FOLDER, suite)
    scored = ",".join(name for name in DIMENSIONS if name != "camera_motion")
    scorer = shlex.join([sys.executable, str(SCORER)])
    done = pusa(
        "eval", "vbench", "score", run.folder, "--suite", suite, "--scorer", scorer, "--dimensions", scored,
        "--processes", "2",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return run


def test_the_page_has_totals_radar_table_clips_and_settings(run: RunFolder) -> None:
    made = pusa("eval", "vbench", "report", run.folder, "--clips", "1")
    assert made.exit_code == 0, made.output
    text = (run.folder / "report.html").read_text()
    facts = json.loads((run.folder / "report.json").read_text())
    page = Page(text)

    assert "<b>run" not in text
    assert "a &lt;b&gt;run &amp; more" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert len(page.images) == 2 * 8
    assert all(image.startswith("data:image/jpeg;base64,") for image in page.images)
    assert "prefers-color-scheme: dark" in text

    low, high = facts["totals"]["total"]
    assert f"{(low + high) / 2:.2f} ± {(high - low) / 2:.2f}" in text
    assert facts["totals"]["missing"] == ["camera_motion"]
    assert "Wan-I2V (14B)" in text
    assert "not by VBench&#39;s code" in text  # the stand-in's scores compare with nothing
    subject = next(dimension for dimension in facts["dimensions"] if dimension["name"] == "i2v_subject")
    values = {item.name: value_of(run.video_of(item), "i2v_subject") for item in items_of(run, "i2v_subject")}
    assert subject["best"][0]["score"] == pytest.approx(100 * max(values.values()), abs=0.01)
    assert subject["worst"][0]["name"] == min(values, key=lambda name: values[name])
    assert facts["seeds"] == {item.name: item.request.seed for item in run.items}
    assert facts["settings"]["steps"] == 1


def test_the_report_tells_what_is_out_of_date(run: RunFolder) -> None:
    from vbench_runs import put_video

    put_video(run, run.items[0], 50)
    facts = json.loads(pusa("eval", "vbench", "report", run.folder, "--clips", "0", "--json").stdout)
    assert facts["notes"][0].startswith("the videos have changed since subject consistency, motion smoothness")
    assert "camera motion: videos are there, and no score yet" in facts["notes"]


def test_a_name_that_would_cost_a_file_is_refused(run: RunFolder) -> None:
    head = (run.folder / "run.json").read_text()
    for name, message in (
        ("run.html", "would replace the run's run.json"),
        ("page.json", "give one that ends in .html"),
    ):
        refused = pusa("eval", "vbench", "report", run.folder, "--out", run.folder / name)
        assert refused.exit_code == 2
        assert message in refused.stderr
        assert not (run.folder / "page.json").exists()
    assert (run.folder / "run.json").read_text() == head


def test_a_run_without_scores_has_no_report(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", make_suite(tmp_path / "VBench"), per_prompt=1)
    refused = pusa("eval", "vbench", "report", run.folder)
    assert refused.exit_code == 2
    assert "pusa eval vbench score" in refused.stderr
    assert not (run.folder / "report.html").exists()


def test_the_radar_spans_the_scores_shown_and_is_open_where_one_is_missing() -> None:
    low, high, own = 90.0, 98.0, 94.0
    published = [
        {"model": model, "scores": dict.fromkeys(DIMENSIONS, value), "remark": ""}
        for model, value in (("Pusa", low), ("Wan-I2V (14B)", high))
    ]
    scores = {name: own for name in DIMENSIONS if name != "i2v_subject"}
    drawn = radar({"name": "mine", "published": published, "totals": {"scores": scores}})
    shapes = {shape["model"]: shape for shape in drawn["shapes"]}

    assert shapes["Wan-I2V (14B)"]["area"] == drawn["rings"][-1]  # the highest on every axis
    assert shapes["Pusa"]["area"] == drawn["rings"][0]
    assert shapes["mine"]["area"] == ""
    assert len(shapes["mine"]["dots"]) == 8
    assert len(shapes["mine"]["lines"]) == 7
    x, y = shapes["mine"]["dots"][0]
    assert x == drawn["center"][0]  # the first axis goes up; the middle score lies on the middle ring
    assert f"{x},{y}" == drawn["rings"][2].split()[0]
