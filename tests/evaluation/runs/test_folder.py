"""Run folders: settings, items, and what counts as made."""

import os
import shutil
from pathlib import Path

import pytest
from run_samples import GreyMaker, make_items, make_run, write_grey

from pusa.evaluation.runs import Item, RunFolder, make_videos, seed_of
from pusa.request import ConditionSpec, GenerationRequest


def test_seeds_and_ids_are_the_same_everywhere() -> None:
    assert seed_of(0, "a cat", 1) == 1312451541
    assert seed_of(1, "a cat", 1) != seed_of(0, "a cat", 1) != seed_of(0, "a cat", 2)
    assert make_items(1)[0].id == "0229f82cbf4316ac"


def test_an_item_needs_a_seed_and_a_name_of_a_file() -> None:
    with pytest.raises(ValueError, match="no seed"):
        Item("a cat", GenerationRequest(prompt="a cat"))
    for name in ("", "a/b", ".hidden", "x" * 252):
        with pytest.raises(ValueError, match=r"name of a file|bytes"):
            Item(name, GenerationRequest(prompt="a cat", seed=0))


def test_a_run_is_opened_again_with_the_same_settings_only(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    again = make_run(tmp_path / "run")
    assert (again.suite, again.settings, again.id) == ("sample", {"steps": 4}, run.id)
    assert again.items == make_items(3)

    with pytest.raises(ValueError, match="steps is 4 there and 10 here"):
        RunFolder.create(tmp_path / "run", "sample", {"steps": 10}, make_items(3))
    with pytest.raises(ValueError, match="3 items and not 4"):
        RunFolder.create(tmp_path / "run", "sample", {"steps": 4}, make_items(4))
    with pytest.raises(ValueError, match="item 1: name is"):
        RunFolder.create(tmp_path / "run", "sample", {"steps": 4}, make_items(3)[::-1])
    with pytest.raises(ValueError, match="a run of sample and not of vbench"):
        RunFolder.open(tmp_path / "run", "vbench")
    with pytest.raises(FileNotFoundError, match=r"no run\.json"):
        RunFolder.open(tmp_path)
    with pytest.raises(ValueError, match="two items"):
        RunFolder.create(tmp_path / "other", "sample", {}, [*make_items(1), *make_items(1)])


def test_only_the_video_that_was_made_counts(tmp_path: Path) -> None:
    """Damaged, cut and foreign videos are made again; a copied folder is not."""
    run = make_run(tmp_path / "run")
    make_videos(run, GreyMaker())
    first, second, third = run.items
    assert not run.missing()
    assert not run.problems()

    run.video_of(first).write_bytes(run.video_of(first).read_bytes()[:-40])
    write_grey(second, run.video_of(second), fps=8)
    run.video_of(third).unlink()
    assert run.missing() == run.items
    found = {problem.name: problem.problem for problem in run.problems()}
    assert "does not open" in found["clip 0"]
    assert found["clip 1"] == "it has 8 fps and not 16"
    assert found["clip 2"] == "it is missing"

    summary = make_videos(run, maker := GreyMaker())
    assert maker.made == ["clip 0", "clip 1", "clip 2"]
    assert summary.made_here == summary.made == 3
    assert not run.problems(decode=True)
    shutil.copytree(run.folder, tmp_path / "copy", copy_function=shutil.copy)  # other times
    os.utime(tmp_path / "copy" / "videos" / "clip 0.mp4", (0, 0))
    assert not RunFolder.open(tmp_path / "copy").missing()


def test_a_run_that_is_moved_goes_on_with_the_files_in_it(tmp_path: Path) -> None:
    """Machines that share it may see it at different places; files elsewhere stay where they are."""

    def items(place: Path) -> list[Item]:
        inside, outside = place / "inputs" / "ä cat.png", tmp_path / "dog.png"
        conditions = [ConditionSpec(file=str(inside)), ConditionSpec(file=str(outside), positions=["last"])]
        return [Item("clip", GenerationRequest(prompt="a cat", seed=0, conditions=conditions), {"real": str(inside)})]

    before, after = tmp_path / "run", tmp_path / "moved here"
    run = RunFolder.create(before, "sample", {}, items(before))
    assert run.items == items(before)
    before.rename(after)
    moved = RunFolder.open(after)
    assert moved.items == items(after) == RunFolder.create(after, "sample", {}, items(after)).items
    assert moved.id == run.id  # by which a server knows its jobs


def test_a_list_of_items_that_is_cut_is_no_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lines = (run.folder / "items.jsonl").read_text().splitlines(keepends=True)
    (run.folder / "items.jsonl").write_text("".join(lines[:2]))
    with pytest.raises(ValueError, match=r"items.jsonl is damaged: it has 2 items, and .* counts 3"):
        RunFolder.open(run.folder)


def test_a_run_needs_a_folder_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written \(.*\): give another folder"):
        make_run(tmp_path / "file" / "run")


def test_what_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "holiday.mp4").write_bytes(b"mine")
    with pytest.raises(ValueError, match="give a new folder"):
        make_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["videos"]
