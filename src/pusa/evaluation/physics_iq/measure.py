"""Score the videos of a run, scene by scene; what is scored is kept, and the same call goes on with the rest."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pusa.data.workers import Failure, Workers
from pusa.evaluation.physics_iq.clips import read_clip, scored_size
from pusa.evaluation.physics_iq.dataset import Dataset, Scene
from pusa.evaluation.physics_iq.scores import SceneScores, score_scene
from pusa.evaluation.runs import Item, RunFolder
from pusa.evaluation.runs.files import read_json, write_json
from pusa.events import Report, Step

STAGE = "score"


@dataclass(frozen=True)
class ScoredItem:
    """Hold an item of a run, its scene and its scores."""

    item: Item
    scene: Scene
    scores: SceneScores


@dataclass(frozen=True)
class _Work:
    """Hold the files of a scene: the video that was made, and both takes with the masks that the download has.

    Attributes:
        kept: file for its scores.
        made_of: what they are computed from: the hash of the video, and the names of what is real.
    """

    made: Path
    takes: tuple[Path, Path]
    masks: tuple[Path | None, Path | None]
    fps: int
    kept: Path
    made_of: list[str]


def score_run(
    run: RunFolder,
    dataset: Dataset,
    *,
    partial_run: bool = False,
    processes: int = 1,
    stop: Callable[[], bool] = lambda: False,
    report: Report = lambda event: None,
) -> list[ScoredItem]:
    """Score every video of a run against both takes of its scene.

    Scores are kept in the run's folder ``scores``, and used again as long as the video is the same.

    Args:
        partial_run: score what is made, where videos are missing.
        processes: that share the scenes.
        stop: called after each scene; True ends the call, with the scores so far.
        report: called with a ``Step`` of the stage "score" for each scene.

    Raises:
        FileNotFoundError: videos are not made yet, or files of the download are missing.
        ValueError: a video is not what was asked for; or a file cannot be read or is too short, after the scores of
            all other scenes are kept. Its name is in the message.
    """
    scenes = {scene.number: scene for scene in dataset.scenes}
    missing = {item.name for item in run.missing()}
    items = [item for item in run.items if item.name not in missing]
    if missing and not (items and partial_run):
        hint = "make them first, or score those that are there with --partial" if items else "make them first"
        raise FileNotFoundError(f"{len(missing)} of {len(run.items)} videos of {run.folder} are not made: {hint}")
    if bad := [problem for problem in run.problems() if problem.name not in missing]:
        raise ValueError(f"{bad[0].name}.mp4: {bad[0].problem} ({len(bad)} such videos); delete and make them again")
    work = [_work(run, item, scenes, dataset) for item in items]
    scores = _score_all(work, processes, stop, report)
    found = [(item, one) for item, one in zip(items, scores, strict=True) if one is not None]
    return [ScoredItem(item, scenes[item.labels["number"]], one) for item, one in found]


def _work(run: RunFolder, item: Item, scenes: dict[str, Scene], dataset: Dataset) -> _Work:
    scene, fps = scenes.get(item.labels["number"]), int(run.settings["fps"])
    takes = [None if scene is None else dataset.testing(scene, take, fps) for take in (1, 2)]
    if scene is None or takes[0] is None or takes[1] is None:
        raise FileNotFoundError(f"{item.name}: its testing videos, take 1 and take 2, are not in {dataset.root}")
    masks = (dataset.masks(scene, 1, fps), dataset.masks(scene, 2, fps))
    record = run.record_of(item)
    assert record is not None  # or the video would count as missing
    return _Work(
        run.video_of(item),
        (takes[0], takes[1]),
        masks,
        fps,
        run.folder / "scores" / f"{item.id}.json",
        [record.sha256, *(path.name for path in (*takes, *masks) if path is not None)],
    )


def _score_all(
    work: Sequence[_Work], processes: int, stop: Callable[[], bool], report: Report
) -> list[SceneScores | None]:
    """Score what is not scored yet, and keep it; None: stopped before it was."""
    scores = [_kept(one) for one in work]
    left = [(index, one) for index, one in enumerate(work) if scores[index] is None]
    failed: list[str] = []
    start = time.monotonic()
    with Workers(_score, processes if processes > 1 else 0) as workers, closing(workers.run(left)) as results:
        for done, ((index, one), result) in enumerate(results, start=1):
            if isinstance(result, Failure):
                failed.append(f"{one.made.stem}: {result.reason}")
            else:
                scores[index] = result
                write_json(one.kept, {"made_of": one.made_of, "scores": result.as_json()})
            seconds_left = (time.monotonic() - start) / done * (len(left) - done)
            report(Step(len(work) - len(left) + done, len(work), round(seconds_left, 1), STAGE))
            if stop():
                break
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(work)} scenes could not be scored, such as {failed[0]}; the scores of the others "
            "are kept"
        )
    return scores


def _score(task: tuple[int, _Work]) -> Iterator[SceneScores]:
    _, work = task
    read = partial(read_clip, fps=work.fps, size=scored_size(work.takes[0]))
    take_1, take_2 = (read(*pair) for pair in zip(work.takes, work.masks, strict=True))
    yield score_scene(read(work.made, None), take_1, take_2)


def _kept(work: _Work) -> SceneScores | None:
    stored = read_json(work.kept)
    if stored is None or stored.get("made_of") != work.made_of:
        return None
    try:
        return SceneScores.of_json(stored.get("scores"))
    except ValueError:  # of another version, or damaged
        return None
