"""`pusa eval vbench score` runs a scorer for each dimension, keeps what is done, and lets none spoil the others."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
from command_line import pusa
from vbench_runs import made_run, put_video
from vbench_samples import BACKGROUND, make_suite
from vbench_scorer import value_of

from pusa.evaluation.runs import RunFolder
from pusa.evaluation.vbench.environment import DRIVER
from pusa.evaluation.vbench.scored import items_of, parse_result, read_scored
from pusa.evaluation.vbench.scoring import Scorer, score
from pusa.evaluation.vbench.totals import DIMENSIONS
from pusa.events import Event, Note, Step

SCORER = Path(__file__).parents[2] / "support" / "vbench_scorer.py"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return made_run(tmp_path / "run", make_suite(tmp_path / "VBench"))


def command(*options: object) -> str:
    return shlex.join([sys.executable, str(SCORER), *map(str, options)])


def calls(file: Path) -> list[str]:
    """Return the dimensions that the scorer was called for, and forget them."""
    found = [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []
    file.unlink(missing_ok=True)
    return found


def test_all_dimensions_are_scored_once_and_again_only_where_a_video_changed(run: RunFolder, tmp_path: Path) -> None:
    arguments = ("eval", "vbench", "score", run.folder, "--suite", tmp_path / "VBench", "--processes", "2")
    scorer = ("--scorer", command("--calls", tmp_path / "calls"))

    first = pusa(*arguments, *scorer)
    assert first.exit_code == 0, first.output
    assert sorted(calls(tmp_path / "calls")) == sorted(DIMENSIONS)
    totals = json.loads(pusa("eval", "vbench", "total", run.folder, "--json").stdout)
    assert totals["scores"] == {
        name: pytest.approx(100 * fmean(value_of(run.video_of(item), name) for item in items_of(run, name)), abs=1e-3)
        for name in DIMENSIONS
    }
    scored = read_scored(run, "imaging_quality")
    assert scored is not None
    assert scored.score == pytest.approx(fmean(scored.videos.values()), abs=1e-6)  # both 0..1

    assert pusa(*arguments, *scorer).exit_code == 0
    assert calls(tmp_path / "calls") == []
    changed = next(item for item in run.items if item.name == f"{BACKGROUND}-1")
    put_video(run, changed, 99)
    assert pusa(*arguments, *scorer).exit_code == 0
    assert sorted(calls(tmp_path / "calls")) == sorted(changed.labels["dimensions"])


def test_a_failed_dimension_shows_its_log_and_the_others_go_on(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "fail").write_text("dynamic_degree")
    arguments = ("eval", "vbench", "score", run.folder, "--suite", tmp_path / "VBench", "--scorer")
    arguments += (command("--calls", tmp_path / "calls", "--fail", tmp_path / "fail"),)

    failed = pusa(*arguments)
    assert failed.exit_code == 1
    assert "CUDA out of memory <b>in dynamic_degree</b>" in failed.stderr
    assert "50%|####| 1/2" not in failed.stderr  # only the last state of a bar
    assert "8 scored, 1 failed" in failed.stderr
    assert json.loads(pusa("eval", "vbench", "total", run.folder, "--json").stdout)["missing"] == ["dynamic_degree"]

    calls(tmp_path / "calls")
    (tmp_path / "fail").unlink()
    assert pusa(*arguments).exit_code == 0
    assert calls(tmp_path / "calls") == ["dynamic_degree"]

    (tmp_path / "fail").write_text("dynamic_degree")
    assert pusa(*arguments, "--again", "--dimensions", "dynamic_degree").exit_code == 1
    assert json.loads(pusa("eval", "vbench", "total", run.folder, "--json").stdout)["missing"] == []  # what was is kept


def test_a_scorer_that_cannot_run_is_told(run: RunFolder, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/no/such/interpreter\n")
    broken.chmod(0o755)
    arguments = ("eval", "vbench", "score", run.folder, "--suite", tmp_path / "VBench", "--dimensions", "i2v_subject")
    for scorer, code, message in (
        ("python 'scorer.py", 2, "the scorer's command cannot be read: python 'scorer.py (No closing quotation)"),
        ("/no/such/program x", 2, "the scorer's program /no/such/program is not here"),
        (str(broken), 1, "i2v_subject failed: the scorer does not start: "),
    ):
        refused = pusa(*arguments, "--scorer", scorer)
        assert refused.exit_code == code
        assert message in refused.stderr


def test_a_score_that_is_no_number_is_refused() -> None:
    result = {"i2v_subject": [0.5, [{"video_path": "a cat-0.mp4", "video_results": float("nan")}]]}
    with pytest.raises(ValueError, match="i2v_subject=nan of a cat-0 is no score"):
        parse_result(result, "i2v_subject")


def test_nothing_is_scored_before_all_videos_are_sound(run: RunFolder, tmp_path: Path) -> None:
    arguments = ("eval", "vbench", "score", run.folder, "--scorer", command("--calls", tmp_path / "calls"), "--suite")
    run.video_of(run.items[3]).write_bytes(b"no video")
    (run.videos / "notes.txt").write_text("mine")
    refused = pusa(*arguments, tmp_path / "VBench")
    assert refused.exit_code == 2
    assert f"2 of {len(run.items)} videos cannot be scored: {run.items[3].name}: it does not open" in refused.stderr
    assert "notes.txt: it is no video of the run" in refused.stderr

    (run.videos / "notes.txt").unlink()
    put_video(run, run.items[3], 3)
    other = make_suite(tmp_path / "Other")
    info = other / "vbench2_beta_i2v" / "vbench2_i2v_full_info.json"
    info.write_text(info.read_text().replace("a red cat", "a black cat"))
    refused = pusa(*arguments, other)
    assert refused.exit_code == 2
    assert "has other prompts" in refused.stderr
    assert calls(tmp_path / "calls") == []


def test_a_result_that_lacks_a_video_is_refused(run: RunFolder, tmp_path: Path) -> None:
    scorer = Scorer.from_command(command("--leave-out-one", "i2v_subject"))
    summary = score(
        run, scorer, suite=tmp_path / "VBench", weights=tmp_path, dimensions=["i2v_subject"], processes=1, cards=[]
    )
    assert summary.done == []
    assert "scored 3 of 4 videos" in summary.failed["i2v_subject"]
    assert read_scored(run, "i2v_subject") is None


def test_stopping_ends_the_scorers_and_the_next_call_goes_on(run: RunFolder, tmp_path: Path) -> None:
    events: list[Event] = []
    wanted = ["aesthetic_quality", "i2v_subject", "i2v_background"]
    options = ("--calls", tmp_path / "calls", "--wait-for", tmp_path / "go")
    scorer = Scorer.from_command(command(*options))
    shared = {"suite": tmp_path / "VBench", "weights": tmp_path, "dimensions": wanted, "cards": ["0", "1"]}

    def stop() -> bool:
        return sum(isinstance(event, Step) for event in events) == 2  # both scorers wait after their first video

    summary = score(run, scorer, stop=stop, report=events.append, **shared)
    assert (summary.done, summary.failed) == ([], {})
    lines = (tmp_path / "calls").read_text().splitlines()
    assert {line.split()[1] for line in lines} == {"0", "1"}  # each has a card of its own
    assert set(calls(tmp_path / "calls")) == {"aesthetic_quality", "i2v_subject"}  # the longest first

    (tmp_path / "go").touch()
    assert sorted(score(run, scorer, report=events.append, **shared).done) == sorted(wanted)
    steps = [event for event in events if isinstance(event, Step)]
    assert (steps[-1].step, steps[-1].steps) == (12, 12)
    assert all(step.seconds_left is not None for step in steps)
    assert any(isinstance(event, Note) and event.message.startswith("i2v_subject: ") for event in events)


SUITE = """
import json, os, subprocess
from pathlib import Path
import torch
from tqdm import tqdm

class VBenchI2V:
    def __init__(self, device, full_info_dir, output_path):
        self.info, self.output = json.loads(Path(full_info_dir).read_text()), Path(output_path)

    def evaluate(self, videos_path, name, dimension_list, local, resolution):
        print("loading")
        os.system("echo from a program")
        model = torch.hub.load(repo_or_dir="owner/net", model="net", source="github")
        weight = torch.hub.load_state_dict_from_url("https://example.com/models/net.pth", map_location="cpu")["weight"]
        videos = []
        for entry in tqdm(self.info):
            image = Path(f"vbench2_beta_i2v/data/crop/{resolution}/{entry['image_name']}").read_text()
            path = f"{videos_path}/{entry['prompt_en']}-0.mp4"
            videos.append({"video_path": path, "video_results": model() * float(weight) * len(image)})
        result = {name: [0.5, videos], "proxy": os.environ["https_proxy"], "cache": os.environ["VBENCH_CACHE_DIR"]}
        (self.output / f"{name}_eval_results.json").write_text(json.dumps(result))
"""


def test_the_driver_runs_the_suite_with_local_models_and_counts_its_videos(tmp_path: Path) -> None:
    import torch

    package, weights = tmp_path / "VBench" / "vbench2_beta_i2v", tmp_path / "weights"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(SUITE)
    (weights / "net_model" / "owner_net_main").mkdir(parents=True)
    (weights / "net_model" / "owner_net_main" / "hubconf.py").write_text("def net():\n    return lambda: 0.5\n")
    torch.save({"weight": torch.tensor(0.25)}, weights / "net_model" / "net.pth")
    for name in ("images", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "images" / "a.png").write_text("four")
    (tmp_path / "info.json").write_text(json.dumps([{"prompt_en": name, "image_name": "a.png"} for name in "xyz"]))
    values = {"dimension": "i2v_subject", "ratio": "16-9", "device": "cpu", "suite": tmp_path / "VBench"}
    places = {name: tmp_path / name for name in ("videos", "images", "weights", "work")}
    files = {"info": tmp_path / "info.json", "out": tmp_path / "out.json"}
    options = [str(word) for name, value in {**values, **places, **files}.items() for word in (f"--{name}", value)]

    done = subprocess.run(
        [sys.executable, DRIVER, *options], capture_output=True, text=True, check=False, env=os.environ
    )

    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{"done": n, "total": 3} for n in (1, 2, 3)]
    assert "loading" in done.stderr
    assert "from a program" in done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert [video["video_results"] for video in result["i2v_subject"][1]] == [0.5] * 3
    assert result["proxy"].startswith("http://127.0.0.1")
    assert result["cache"] == str(weights)
