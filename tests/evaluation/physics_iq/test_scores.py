"""The Physics-IQ score: what its formula says of known clips, and what the benchmark's own evaluator computed."""

from pathlib import Path

import numpy as np
import physics_iq_samples as samples
import pytest

from pusa.evaluation.physics_iq.clips import Clip, read_clip, scored_size
from pusa.evaluation.physics_iq.dataset import Dataset
from pusa.evaluation.physics_iq.masks import motion_masks
from pusa.evaluation.physics_iq.scores import SceneScores, means, overlap, score_scene, total

FPS = 8
# By the benchmark's evaluator (e457754, OpenCV 5.0) on the clips of `physics_iq_samples`, with lossless masks.
EVALUATOR_TAKE_1 = {
    "mse": [0.015233259345404804, 0.013327498664148152, 0.011344855511561036],
    "spatial_iou": [0.24050632911392406, 0.2996742671009772, 0.3939393939393939],
    "spatiotemporal_iou": [0.11289231142486507, 0.08449419505942207, 0.08582545312709594],
    "weighted_spatial_iou": [0.17404129793510323, 0.2323008849557522, 0.30402181322426725],
}
EVALUATOR_TAKE_2 = {
    "mse": [0.014892920944839716, 0.012891108100302518, 0.010864124132785946],
    "spatial_iou": [0.267515923566879, 0.33876221498371334, 0.40310077519379844],
    "spatiotemporal_iou": [0.13254558549268586, 0.11517963849534943, 0.12762636071396652],
    "weighted_spatial_iou": [0.2058727569331158, 0.27269831156419233, 0.34375],
}
EVALUATOR_VARIANCE = {
    "mse": [0.0029068434014334343, 0.003530679055256769, 0.0037905312492512167],
    "spatial_iou": [0.8846153846153846, 0.8709677419354839, 0.967741935483871],
    "spatiotemporal_iou": [0.41787669383096687, 0.3978748310685893, 0.39900853042233714],
    "weighted_spatial_iou": [0.8196417541692405, 0.8178879310344828, 0.8380077369439071],
}
EVALUATOR_SCORE = 27.78


def clip(take: int, view: int = 0) -> Clip:
    frames = np.stack(list(samples.frames(0, view, take, FPS, 5 * FPS, 3.0)))
    return Clip(frames, np.stack(list(motion_masks(frames))))


def test_figures_are_those_of_the_benchmarks_evaluator(tmp_path: Path) -> None:
    dataset = Dataset.open(samples.make_download(tmp_path, fps=FPS))
    scenes = []
    for view, scene in enumerate(dataset.scenes):
        take_1, take_2 = dataset.testing(scene, 1, FPS), dataset.testing(scene, 2, FPS)
        assert take_1 is not None
        assert take_2 is not None
        samples.write_generated(tmp_path / "made.mp4", view, FPS)
        size = scored_size(take_1)
        made, *takes = (read_clip(path, None, fps=FPS, size=size) for path in (tmp_path / "made.mp4", take_1, take_2))
        scenes.append(score_scene(made, *takes))
    for name, compared in (("take_1", EVALUATOR_TAKE_1), ("take_2", EVALUATOR_TAKE_2)):
        for measure, values in compared.items():
            ours = [np.mean(getattr(getattr(scene, name), measure)) for scene in scenes]
            assert ours == pytest.approx(values, abs=1e-8)
    for measure, values in EVALUATOR_VARIANCE.items():
        ours = [np.mean(getattr(scene.between_takes, measure)) for scene in scenes]
        assert ours == pytest.approx(values, abs=1e-8)
    assert total(scenes).physics_iq == EVALUATOR_SCORE
    assert SceneScores.of_json(scenes[0].as_json()) == scenes[0]


def test_another_take_scores_100_and_a_copy_no_more() -> None:
    take_1, take_2 = clip(1), clip(2)
    other = total([score_scene(take_2, take_1, take_2)])
    assert other.physics_iq == pytest.approx(100, abs=0.02)  # the evaluator's roundings
    assert score_scene(take_2, take_1, take_2).shortfall == pytest.approx(0, abs=1e-6)
    copy = total([score_scene(take_1, take_1, take_2)])
    assert copy.physics_iq == 100
    assert copy.take_1 == {"mse": 0, "spatial_iou": 1, "spatiotemporal_iou": 1, "weighted_spatial_iou": 1}


def test_a_still_clip_scores_the_frames_in_which_nothing_moves() -> None:
    take_1, take_2 = clip(1), clip(2)
    still = Clip(np.repeat(take_1.frames[:1], len(take_1.frames), axis=0), np.zeros_like(take_1.masks))
    score = total([score_scene(still, take_1, take_2)])
    at_rest = float(np.mean([not mask.any() for mask in take_1.masks]))
    assert 0 < at_rest < 0.2
    assert score.take_1["spatial_iou"] == score.take_1["weighted_spatial_iou"] == 0
    assert score.take_1["spatiotemporal_iou"] == pytest.approx(at_rest)
    error = np.mean(((still.frames / 255.0) - (take_1.frames / 255.0)) ** 2)
    variance = score.physical_variance
    wanted = at_rest / variance["spatiotemporal_iou"] / 3 - (error - variance["mse"])
    assert score.physics_iq == pytest.approx(100 * wanted, abs=0.02)


def test_scenes_without_common_motion_have_no_score() -> None:
    take_1, take_2 = clip(1), clip(2)
    nothing = Clip(take_2.frames, np.zeros_like(take_2.masks))
    assert total([score_scene(take_1, take_1, nothing)]).physics_iq is None
    assert overlap(nothing.masks, nothing.masks) == 1
    with pytest.raises(ValueError, match="no scene has been scored"):
        total([])
    with pytest.raises(ValueError, match="cannot be compared"):
        score_scene(Clip(take_1.frames[1:], take_1.masks[1:]), take_1, take_2)
    assert means(score_scene(take_1, take_1, take_2).take_1)["spatial_iou"] == 1
