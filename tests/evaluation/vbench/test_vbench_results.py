"""Scores are read from VBench's files and from plain JSON, and `pusa eval vbench total` computes the totals of them."""

import json
from pathlib import Path

import pytest
from command_line import pusa

from pusa.evaluation.vbench.published import ROWS
from pusa.evaluation.vbench.results import read_scores
from pusa.evaluation.vbench.totals import DIMENSIONS

PUSA = next(row for row in ROWS if row.is_full_set and row.model == "Pusa")


def write(path: Path, values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path


def write_as_vbench(folder: Path, names: list[str]) -> None:
    """Write a file for each dimension as VBench does; that of camera motion has a third element."""
    for name in names:
        entry = [PUSA.scores[name] / 100, [{"video_path": "a-0.mp4", "video_results": 0.5}]]
        write(folder / f"{name}_eval_results.json", {name: entry + ([{}] if name == "camera_motion" else [])})
        write(folder / f"{name}_full_info.json", [])  # a list of videos, beside each


def test_files_of_vbench_fractions_and_percents_are_the_same(tmp_path: Path) -> None:
    write_as_vbench(tmp_path / "run" / "scores", list(DIMENSIONS))
    fractions = write(tmp_path / "fractions.json", {name: score / 100 for name, score in PUSA.scores.items()})
    percents = write(tmp_path / "percents.json", dict(PUSA.scores))

    for paths in ([tmp_path / "run"], [fractions], [percents], [percents, tmp_path / "run"]):
        scores = read_scores(paths)
        assert list(scores) == list(DIMENSIONS)
        assert scores == pytest.approx(dict(PUSA.scores))


def test_total_of_a_whole_run_and_of_one_without_camera(tmp_path: Path) -> None:
    write_as_vbench(tmp_path, list(DIMENSIONS))
    whole = pusa("eval", "vbench", "total", tmp_path)
    assert whole.stdout.splitlines()[-1].split() == ["total", "87.32", "87.32", "86.86"]

    (tmp_path / "camera_motion_eval_results.json").unlink()
    shown = pusa("eval", "vbench", "total", tmp_path)
    assert shown.stdout.splitlines()[-2].split() == ["total", "86.62..89.00", "87.32", "86.86"]
    assert shown.stdout.splitlines()[-1] == "camera_motion is missing: the total is 87.81 within 1.19 points"
    facts = json.loads(pusa("eval", "vbench", "total", tmp_path, "--json").stdout)
    assert facts["missing"] == ["camera_motion"]
    assert facts["total"] == pytest.approx([86.62, 89.0], abs=0.005)
    assert facts["quality"][0] == facts["quality"][1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5], "holds no scores: write {dimension: score}"),
        ({"i2v_subjekt": 0.5}, "'i2v_subjekt' is no dimension of VBench-I2V that counts"),
        ({"i2v_subject": [97.6, []]}, "i2v_subject=97.6 is no score in 0..1"),
        ({"i2v_subject": "0.97"}, "i2v_subject='0.97' is no score in 0..100"),
        ({"i2v_subject": 0.97, "dynamic_degree": 52.6}, "i2v_subject=0.97 beside scores above 1"),
    ],
)
def test_what_is_no_score_is_refused(tmp_path: Path, values: object, message: str) -> None:
    file = write(tmp_path / "scores.json", values)

    with pytest.raises(ValueError) as error:
        read_scores([file])

    assert str(error.value).startswith(str(file))
    assert message in str(error.value)


def test_missing_and_disagreeing_files_are_refused(tmp_path: Path) -> None:
    first, second = (write(tmp_path / f"{n}.json", {"i2v_subject": n / 100}) for n in (96, 97))

    with pytest.raises(ValueError) as disagreement:
        read_scores([first, second])
    with pytest.raises(FileNotFoundError) as empty:
        read_scores([tmp_path])

    assert str(disagreement.value) == (
        f"i2v_subject is 96.0000 in {first} and 97.0000 in {second}: leave out what is older"
    )
    assert str(empty.value) == f"{tmp_path} has no *_eval_results.json: score it first, or give a file"
