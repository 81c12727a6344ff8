"""The paper's claims in small: equal budgets, measures with a known truth, and verdicts by fixed rules."""

import copy
import dataclasses
import json
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file, save_model
from world_samples import make_world

from pusa.cli.eval.mini import paper as command
from pusa.lora.layouts import write_lora
from pusa.mini.paper import claims as paper_claims
from pusa.mini.paper import points as paper_points
from pusa.mini.paper import report as paper_report
from pusa.mini.paper import run as paper
from pusa.mini.paper import training as paper_training
from pusa.mini.paper.package import fill_from_model
from pusa.mini.paper.points import Judge, Point
from pusa.mini.paper.report import BEGIN, END
from pusa.mini.paper.training import BATCH, REGIMES, Plan
from pusa.mini.recipe import base
from pusa.mini.recipe.clips import load_latents
from pusa.mini.recipe.folder import Sizes, write_folder
from pusa.mini.recipe.vae import CONFIG
from pusa.mini.world.vocabulary import MOTIONS
from pusa.mini.world.world import captions, draw_scenes
from pusa.training.batches import BatchPlan as Order

THINGS = 4
FRAMES, SIDE = 3, 4  # of latents: clips of 9 frames of 32 pixels
VERDICTS = {"agrees", "contradicts", "no difference", "not settled", "in part"}
PLAN = Plan(steps=4, clips=4, loss_clips=4, probe_steps=2, compiled=False)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return base.make_tokenizer()


@pytest.fixture(autouse=True)
def _one_tokenizer(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning it takes longer than all the rest."""
    monkeypatch.setattr(base, "make_tokenizer", lambda: tokenizer)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Make the folder that `pusa mini train --until base` leaves, with random weights and latents."""
    folder = tmp_path_factory.mktemp("mini")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "make_tokenizer", lambda: tokenizer)
        save_model(base.TextToVideo(heads=1, layers=1), str(folder / "base.safetensors"))
    AutoencoderKLWan(**{**CONFIG, "base_dim": 8}).save_pretrained(folder / "vae")
    for name, files in (("latents", 1), ("held_out", 3)):
        (folder / name).mkdir()
        for number in range(files):
            latents = torch.randn(64, 16, FRAMES, SIDE, SIDE).bfloat16()
            save_file({"latents": latents}, folder / name / f"{number:04d}.safetensors")
    (folder / "report.json").write_text(json.dumps({"budget": {"heads": 1, "layers": 1, "things": THINGS}}))
    return folder


@pytest.fixture
def judge(work: Path, tmp_path: Path) -> Judge:
    paper_points.train_probe(work, tmp_path, 1)
    return Judge(work, tmp_path, PLAN)


def write_adapter(path: Path, judge: Judge, layers: tuple[str, ...] = ("blocks.0.attn1.to_q",)) -> Path:
    generator = torch.Generator().manual_seed(1)
    pairs = {}
    for layer in layers:
        out, inside = judge.model.get_submodule(layer).weight.shape
        pairs[layer] = torch.randn(2, inside, generator=generator), torch.randn(out, 2, generator=generator)
    write_lora(path, pairs, {}, layout="comfyui", metadata={})
    return path


# ---- equal budgets ---------------------------------------------------------------------------------------------------


def test_trainings_differ_in_nothing_but_how_times_are_drawn(tmp_path: Path) -> None:
    configs = [paper_training.train_config(tmp_path, regime, 8, on_cpu=True) for regime in REGIMES]
    plain = [config.model_copy(update={"name": "", "objective": None}) for config in configs]
    assert all(config == plain[0] for config in plain)
    objectives = [config.objective.model_dump() for config in configs]
    same = [{k: v for k, v in o.items() if k not in ("times", "asynchronous")} for o in objectives]
    assert all(values == same[0] for values in same)
    assert len({json.dumps(o) for o in objectives}) == len(REGIMES)
    orders = [Order({(16, 3, 4, 4): range(64)}, config, 1) for config in configs]
    assert len({tuple(order.step(k).clips for k in range(8)) for order in orders}) == 1


def test_a_longer_budget_has_more_steps_and_more_clips_and_fills_its_time() -> None:
    def plan(minutes: float, processes: int = 2) -> Plan:
        speed = {"seconds_per_step": 0.3, "seconds_per_forward": 0.04, "compiled": True}
        return paper.make_plan(minutes, processes, **speed)

    short, long = plan(4), plan(24)
    assert short.steps < long.steps
    assert short.clips < long.clips
    assert plan(12, processes=1).steps < plan(12).steps
    for minutes in (8, 12, 24):
        chosen = plan(minutes)
        assert chosen.steps % paper_training.CURVE == chosen.clips % BATCH == 0
        measuring = 0.04 * sum(point.cost(chosen) for point in paper.points_of(chosen))
        spent = measuring + len(REGIMES) * chosen.steps * 0.3
        assert 0.4 * 120 * minutes < spent < 120 * minutes


def test_every_point_needs_an_adapter_that_some_training_leaves(tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, steps=8)
    kept = {paper_training.adapter_path(tmp_path, r, step) for r in REGIMES for step in (2, 4, 6, 8)}
    jobs = paper.jobs_of(tmp_path, tmp_path, plan, seconds_per_step=1.0, seconds_per_forward=0.1)
    assert len({job.result for job in jobs}) == len(jobs)
    assert {job.name for job in jobs if job.must} == {
        "references",
        "base",
        *(f"train {regime}" for regime in REGIMES),
        *(f"{regime} 8" for regime in REGIMES),
    }
    needed = {path for job in jobs for path in job.needs} - {paper_points.probe_path(tmp_path)}
    assert needed <= kept


# ---- measures --------------------------------------------------------------------------------------------------------


def test_clips_are_held_out_combinations_half_of_them_still_before_a_fixed_camera(work: Path, judge: Judge) -> None:
    clips = judge.clips
    scenes = load_latents(work / "held_out", things=THINGS, held_out=True).scenes
    assert clips.still.tolist() == [True, True, False, False]
    for latents, still in zip(clips.latents, clips.still, strict=True):
        data = load_latents(work / "held_out", things=THINGS, held_out=True).latents.float()
        index = int((data == latents).flatten(1).all(1).nonzero())
        assert scenes.camera[index] == 0
        assert (scenes.motion[index] == list(MOTIONS).index("still")) == still
        assert scenes.motion[index] != list(MOTIONS).index("fade")
    both = {tuple(z.flatten()[:4].tolist()) for z in clips.latents}
    assert both.isdisjoint(tuple(z.flatten()[:4].tolist()) for z in judge.loss_clips.latents)


def test_cached_latents_are_read_with_the_scenes_they_were_drawn_from(work: Path, tmp_path: Path) -> None:
    data = load_latents(work / "held_out", things=THINGS, held_out=True)
    drawn = [draw_scenes(64, 1_000_000 + shard, things=THINGS, held_out=True) for shard in range(3)]
    assert captions(data.scenes) == [text for scenes in drawn for text in captions(scenes)]
    with pytest.raises(FileNotFoundError, match="holds no latents"):
        load_latents(tmp_path, things=THINGS)


def test_likeness_and_change_have_known_values() -> None:
    real = torch.randn(2, 16, 4, 4, 4)
    torch.testing.assert_close(paper_points.likeness(real + 0.1, real), torch.full((2,), 20.0), atol=1e-3, rtol=0)
    assert paper_points.likeness(real, real).tolist() == [80.0, 80.0]
    frozen = real[:, :, :1].expand_as(real)
    assert paper_points.change(frozen).tolist() == [0.0, 0.0]
    steps = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(1, 16, 4, 4, 4)
    assert paper_points.change(0.5 * steps).tolist() == [0.5]


def test_the_conditioned_frame_is_kept_and_noise_lets_it_change(judge: Judge) -> None:
    def first(noise: float) -> list[float]:
        return judge.measure(Point("x", ("image",), steps=2, noise=noise))["image"]["first"]

    assert first(0.0) == [80.0] * 4
    assert max(first(0.2)) < 60
    assert max(first(1.0)) < min(first(0.2))


def test_without_an_image_nothing_of_the_clip_gets_in(judge: Judge) -> None:
    point = Point("x", ("text",), steps=2)
    made = judge.generate("text", point)
    judge.clips = dataclasses.replace(judge.clips, latents=torch.zeros_like(judge.clips.latents))
    assert torch.equal(judge.generate("text", point), made)
    assert not torch.equal(judge.generate("image", point), made)


def test_without_a_caption_the_caption_does_not_matter(judge: Judge) -> None:
    point = Point("x", ("image",), steps=2)
    made = judge.generate("image", point), judge.generate("caption", point)
    judge.clips = dataclasses.replace(judge.clips, embeds=judge.clips.embeds.flip(0))
    assert torch.equal(judge.generate("image", point), made[0])
    assert not torch.equal(judge.generate("caption", point), made[1])


def test_an_adapter_is_added_at_its_alpha_and_taken_out_exactly(judge: Judge, tmp_path: Path) -> None:
    weight = judge.model.get_submodule("blocks.0.attn1.to_q").weight
    before = weight.detach().clone()
    path = write_adapter(tmp_path / "a.safetensors", judge)
    judge.adapt(path, 0.5)
    half = weight - before
    judge.adapt(path, 1.0)
    torch.testing.assert_close(weight - before, 2 * half)
    assert half.abs().max() > 0.1
    judge.adapt(None, 1.0)
    assert torch.equal(weight, before)


def test_moved_weights_are_grouped_by_the_kind_of_their_layer(judge: Judge, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a.safetensors", judge, ("blocks.0.attn1.to_q", "blocks.0.ffn.net.2"))
    found = paper_points.relative_weight_changes(judge.base, path)
    assert found["cross-attention"] == 0
    weight = judge.model.get_submodule("blocks.0.attn1.to_q").weight.detach().clone()
    judge.adapt(path, 1.0)
    moved = judge.model.get_submodule("blocks.0.attn1.to_q").weight - weight
    assert found["self-attention"] == pytest.approx(float(moved.norm() / weight.norm()), rel=1e-4)


# ---- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "verdict"),
    [
        (0.5, 0.2, "agrees"),
        (-0.5, 0.2, "contradicts"),
        (0.4, 0.2, "not settled"),  # two standard errors are too few for 8 clips: Student's t is 2.36
        (0.05, 0.02, "no difference"),
        (0.15, 0.01, "agrees"),
        (0.15, None, "not settled"),
    ],
)
def test_a_claim_is_settled_by_the_interval_of_the_difference(value: float, error: float | None, verdict: str) -> None:
    assert paper_claims.verdict_of({"value": value, "n": 8, "error": error}, margin=0.1) == verdict


@pytest.mark.parametrize(
    ("value", "error", "verdict"),
    [(0.1, 0.05, "agrees"), (-0.1, 0.05, "agrees"), (0.9, 0.1, "contradicts"), (0.2, 0.2, "not settled")],
)
def test_equality_is_claimed_within_a_tolerance(value: float, error: float, verdict: str) -> None:
    assert paper_claims.verdict_of_equality({"value": value, "n": 8, "error": error}, 0.3) == verdict


@pytest.mark.parametrize(
    ("rise", "error", "verdict"),
    [(-0.9, 0.1, "agrees"), (0.1, 0.05, "agrees"), (0.9, 0.1, "contradicts"), (0.3, 0.1, "not settled")],
)
def test_what_is_kept_may_become_better(rise: float, error: float, verdict: str) -> None:
    assert paper_claims.verdict_of_keeping({"value": rise, "n": 8, "error": error}, 0.3) == verdict


@pytest.mark.parametrize(("clips", "quantile"), [(3, 4.303), (4, 3.182), (8, 2.365), (16, 2.131), (32, 2.040)])
def test_intervals_are_those_of_students_t(clips: int, quantile: float) -> None:
    low, high = paper_claims.interval({"value": 1.0, "n": clips, "error": 1.0})
    assert high - 1 == pytest.approx(quantile, rel=0.04)
    assert low + high == pytest.approx(2)


def point(likeness: list[float], loss: list[float], change: list[float]) -> dict[str, dict[str, list[float]]]:
    figures = {"likeness": likeness, "change": change, "jump": [1.0] * 4, "first": [80.0] * 4, "kept": [1.0] * 4}
    return {"image": figures, "caption": figures, "losses": {"image, no caption": loss, "text": loss}}


def make_results(tmp_path: Path, points: dict[str, Any]) -> paper_claims.Results:
    (tmp_path / "points").mkdir()
    real = point([80.0] * 4, [], [1.0, 1.0, 1.0, 1.0])
    reference = {"image": real["image"], "text": {"thing": [1.0] * 4, "place": [1.0] * 4, "change": [1.0] * 4}}
    content = {"still": [True, True, True, False], "real": reference, "frozen": reference}
    (tmp_path / "points" / "references.json").write_text(json.dumps(content))
    for name, measured in points.items():
        path = paper.result_path(tmp_path, name)
        path.write_text(json.dumps({"point": {"name": name}, "measured": measured}))
    return paper_claims.Results(tmp_path, PLAN)


def test_claims_are_judged_clip_by_clip_and_the_better_is_the_likelier_or_the_one_of_less_loss(tmp_path: Path) -> None:
    base = point([1.0, 2.0, 3.0, 4.0], [0.5, 0.7, 0.9, 1.1], [2.0, 2.0, 2.0, 2.0])
    better = point([2.0, 3.1, 3.9, 5.0], [0.4, 0.61, 0.8, 1.0], [1.0, 1.0, 1.0, 1.0])
    results = make_results(tmp_path, {"base": base, "independent 4": better, "p 0.8 4": copy.deepcopy(better)})
    findings = paper_claims.judge_claims(results, {"independent": {}, "image-to-video": {}})
    cured = [finding for finding in findings if "adaptation cures it" in finding.claim]
    assert [finding.verdict for finding in cured] == ["agrees"] * 3
    assert "without caption" in cured[0].compared
    assert cured[0].found.startswith("+1.000 ±0.058")  # of the three still clips
    against = [finding for finding in findings if "p 0.8" in finding.compared]
    assert {finding.verdict for finding in against} == {"no difference"}
    kept = next(finding for finding in findings if "Text-to-video is kept" in finding.claim)
    assert kept.verdict == "agrees"
    assert not [finding for finding in findings if "inference steps" in finding.claim]  # nothing was measured


def test_cells_say_what_kind_of_uncertainty_they_have(tmp_path: Path) -> None:
    base = point([1.0, 2.0, 3.0, 4.0], [0.5, 0.7, 0.9, 1.1], [2.0] * 4)
    better = point([2.0, 3.1, 3.9, 5.0], [0.4, 0.61, 0.8, 1.0], [1.0] * 4)
    tables = paper_report.make_tables(
        make_results(tmp_path, {"base": base, "independent 4": better}), {regime: {} for regime in REGIMES}
    )
    rows = {row[0]: row[1:] for row in tables["Image-to-video without a caption"]}
    assert rows["independent"] == ["3.00 ±0.55", "1.00 ±0.00", "1.00 (0.51-1.00)", "1.00"]
    assert rows["p 0.8"] == ["not measured"] * 4
    assert rows["real clips"][0] == ""  # like itself, which says nothing
    losses = {row[0]: row[1] for row in tables["Held-out losses"]}
    assert losses["no adaptation"] == "0.8000"
    assert losses["independent"] == "0.7025 (-0.0975 ±0.0025)"


def test_how_far_weights_moved_is_judged_by_fixed_factors(tmp_path: Path) -> None:
    kinds = ("self-attention", "cross-attention", "feed-forward")
    ours, theirs = dict(zip(kinds, (0.4, 0.1, 0.1), strict=True)), dict(zip(kinds, (0.4, 0.4, 0.4), strict=True))
    results = make_results(tmp_path, {})
    findings = paper_claims.judge_claims(results, {"independent": {"4": ours}, "image-to-video": {"4": theirs}})
    assert [(finding.found, finding.verdict) for finding in findings] == [
        ("4.00 times as far", "agrees"),
        ("1.63 times as far", "contradicts"),
    ]


# ---- the whole run ---------------------------------------------------------------------------------------------------


def one_thread(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1)


@pytest.fixture(scope="module")
def finished(work: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> tuple[Path, Path, dict[str, Any]]:
    """A run in threads of this process: with no time at first, and then with enough."""
    out, page = tmp_path_factory.mktemp("paper"), tmp_path_factory.mktemp("docs") / "small.md"
    page.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe end.\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "make_tokenizer", lambda: tokenizer)
        patch.setattr(paper_training, "seconds_per_training_step", lambda *_, **__: 10.0)
        patch.setattr(Judge, "seconds_per_forward", lambda _: 0.01)
        lines: list[str] = []
        options = {"processes": 1, "page": page, "say": lines.append, "start_pool": one_thread}
        report = paper.run(work, out, minutes=0.05, steps=4, clips=8, **options)
        assert "noise 0.2" in report["left_out"]
        assert "not measured" not in str(report["tables"]["Held-out losses"])  # the ends of all trainings are there
        assert lines[-1].endswith("the same command goes on with it")
        report = paper.run(work, out, minutes=30, **options)
    return out, page, report


def test_a_run_measures_and_reports_everything(finished: tuple[Path, Path, dict[str, Any]]) -> None:
    out, _, report = finished
    assert report["left_out"] == []
    assert report == json.loads((out / "paper.json").read_text())
    assert (report["plan"]["steps"], report["plan"]["clips"]) == (4, 8)
    rows = [row for table in report["tables"].values() for row in table if "not measured" in row]
    assert [row[0] for row in rows] == ["50"]  # with captions, 50 steps would cost more than all the others
    assert {finding["verdict"] for finding in report["claims"]} <= VERDICTS
    assert len(report["claims"]) == 29
    assert set(report["moved"]) == set(REGIMES)
    text = paper_report.as_text(report)
    assert "How far weights moved" in text


def test_the_page_gets_tables_and_plots_between_its_marks(finished: tuple[Path, Path, dict[str, Any]]) -> None:
    _, page, report = finished
    text = page.read_text()
    assert text.startswith("# Title")
    assert text.endswith("The end.\n")
    assert "old" not in text
    for title in report["tables"]:
        assert f"### {title}\n" in text
    for name in ("curves", "sweeps"):
        assert f"(small/{name}.svg)" in text
        assert ET.fromstring((page.parent / "small" / f"{name}.svg").read_text()).tag.endswith("svg")


def test_what_is_finished_is_not_done_again(
    finished: tuple[Path, Path, dict[str, Any]], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, report = finished
    for name in ("measure", "references", "seconds_per_forward"):
        monkeypatch.setattr(Judge, name, lambda *_: pytest.fail("measured again"))
    for name in ("train_regime", "seconds_per_training_step"):
        monkeypatch.setattr(paper_training, name, lambda *_, **__: pytest.fail("trained again"))
    assert paper.run(work, out, minutes=0.1, say=lambda line: None, start_pool=one_thread) == report


def test_results_of_two_bases_or_sizes_are_not_mixed(
    finished: tuple[Path, Path, dict[str, Any]], work: Path, tmp_path: Path
) -> None:
    (tmp_path / "base.safetensors").write_bytes(b"another one")
    with pytest.raises(ValueError, match="holds results of another base: name another folder with --out"):
        paper.run(tmp_path, finished[0], say=lambda line: None)
    with pytest.raises(ValueError, match=r"clips=12: .* holds results of 8 clips: name another folder with --out"):
        paper.run(work, finished[0], clips=12, say=lambda line: None)


def test_what_cannot_work_is_refused_before_any_work(work: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no base\.safetensors"):
        paper.run(tmp_path, say=lambda line: None)
    for name in ("steps", "clips"):
        with pytest.raises(ValueError, match=f"{name}=6 is no multiple of 4"):
            paper.run(work, tmp_path / "out", **{name: 6}, say=lambda line: None)  # type: ignore[arg-type]
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ValueError, match=r"page\.md needs the lines"):
        paper.run(work, tmp_path / "out", page=page, say=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_the_command_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def stand_in(*args: Any, **options: Any) -> dict[str, Any]:
        asked.append((args, options))
        return {"claims": [], "tables": {"Table": [["a", "b"], ["1", "2"]]}}

    monkeypatch.setattr(paper, "run", stand_in)
    result = CliRunner().invoke(command, ["mini", "--minutes", "3", "--processes", "1", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (args, options) = asked[0]
    assert args == (Path("mini"), tmp_path)
    assert (options["minutes"], options["processes"], options["page"]) == (3.0, 1, None)
    assert "Table\na  b\n1  2" in result.output


@pytest.mark.slow
def test_two_processes_share_the_work(work: Path, tmp_path: Path) -> None:
    report = paper.run(work, tmp_path, minutes=0.05, say=lambda line: None)  # what must run, however late it is
    assert report["plan"]["clips"] >= BATCH


def test_a_working_folder_is_filled_from_a_finished_model(tmp_path: Path, tokenizer: Any) -> None:
    model, folder = tmp_path / "model", tmp_path / "work"
    sizes = Sizes(size=32, small_size=32, frames=9, things=THINGS, heads=1, layers=1, clips=64, small_clips=0)
    text_to_video = sizes.make_base(tokenizer)
    write_folder(model, AutoencoderKLWan(**{**CONFIG, "base_dim": 8}), text_to_video, sizes)
    lines: list[str] = []
    fill_from_model(model, folder, lambda frames: make_world(), clips=64, held_out=64, say=lines.append)
    loaded = paper_training.load_base(folder)
    for name, tensor in text_to_video.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16().to(tensor.dtype)), name
    clips = paper_training.load_latents(folder / "latents", things=THINGS)
    assert clips.latents.shape == (64, 16, FRAMES, SIDE, SIDE)
    assert lines == [
        "drawing and encoding 64 clips, and 64 to judge by",
        "latents: 64 of 64 clips",
        "held_out: 64 of 64 clips",
    ]
    held = paper_training.load_latents(folder / "held_out", things=THINGS, held_out=True)
    assert not torch.equal(held.latents, clips.latents)
    before = (folder / "latents" / "0000.safetensors").stat().st_mtime_ns
    fill_from_model(model, folder, lambda frames: make_world(), clips=64, held_out=64, say=lines.append)  # goes on
    assert (folder / "latents" / "0000.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds the base of"):
        fill_from_model("mini", folder, lambda frames: make_world())
    with pytest.raises(ValueError, match=r"wan2\.1-1\.3b is none of the small world"):
        fill_from_model("wan2.1-1.3b", tmp_path / "other", lambda frames: make_world())


def at(likeness: float) -> dict[str, Any]:
    return point([likeness, likeness + 0.1, likeness - 0.1, likeness], [0.5] * 4, [1.0] * 4)


def test_distributions_are_compared_at_the_best_alpha_of_each(tmp_path: Path) -> None:
    likeness = {
        "independent 4": 2.2,
        "alpha 1.4": 3.9,
        "alpha 2": 6.4,
        "alpha 3": 7.5,  # not measured for the other: it does not count
        "image-to-video 4": 3.7,
        "image-to-video alpha 1.4": 5.6,
        "image-to-video alpha 2": 5.5,
    }
    results = make_results(tmp_path, {name: at(value) for name, value in likeness.items()})
    assert results.best_alphas(("independent", "image-to-video"), "image") == [2.0, 1.4]
    findings = paper_claims.judge_claims(results, {"independent": {}, "image-to-video": {}})
    [first, *_] = [finding for finding in findings if "far worse" in finding.claim]
    assert first.compared == "alpha 2 against image-to-video alpha 1.4: likeness without caption, dB"
    assert first.claim.endswith("each at its best alpha")
    assert first.found.startswith("+0.800")
    assert first.verdict == "agrees"


def test_several_seeds_are_judged_by_their_trainings(tmp_path: Path) -> None:
    gains = (0.5, 1.0, 1.5)
    outs = []
    for number, gain in enumerate(gains):
        outs.append(tmp_path / f"seed-{number}")
        outs[-1].mkdir()
        make_results(outs[-1], {"base": at(1.0), "independent 4": at(1.0 + gain)})
    results = paper_claims.SeveralSeeds(outs, [PLAN] * 3)
    gain = results.gain("independent 4", "base", "image", "likeness")
    assert gain is not None
    assert gain["value"] == pytest.approx(1.0)
    assert gain["n"] == 3
    assert gain["error"] == pytest.approx(0.5 / 3**0.5)
    findings = paper_claims.judge_claims(results, {"independent": {}, "image-to-video": {}})
    cured = next(finding for finding in findings if "adaptation cures it" in finding.claim)
    assert cured.verdict == "not settled"  # 1.0 +- 4.3 * 0.29, although each training's clips agree
    assert results.figure("base", "image", "likeness") == results.runs[0].figure("base", "image", "likeness")


def test_a_seed_changes_the_training_and_has_a_folder_of_its_own(tmp_path: Path) -> None:
    configs = [paper_training.train_config(tmp_path, "p 0.5", 8, on_cpu=True, seed=seed) for seed in (0, 1)]
    assert [config.seed for config in configs] == [0, 1]
    with pytest.raises(ValueError, match="seeds 1, 1: give each one once"):
        paper.run_seeds(tmp_path, seeds=(1, 1), minutes=1)
