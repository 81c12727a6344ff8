"""The recipe of the embedded model, all stages at a tiny size; discs and noise stand in for its pictures."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from world_samples import make_photographs, make_sprites

from pusa import PusaCondition, PusaPipeline
from pusa.evaluation.metrics import psnr
from pusa.lora.layouts import read_lora
from pusa.mini.recipe import card, recipe
from pusa.mini.recipe.base import BaseSchedule
from pusa.mini.recipe.loop import LossNotFiniteError, fit
from pusa.mini.world import pictures, world
from pusa.mini.world.world import captions, draw_scenes

BUDGET = dataclasses.replace(recipe.BUDGETS["rehearsal"], compiled=False)  # test_card.py compiles
CARD_BUDGET = card.CARD_BUDGETS["card-rehearsal"]


def cool_down(step: int, progress: float) -> float:
    return min(1.0, 2 - 2 * progress)


STRENGTH = {"best": 1.2, "factor": 1.2 / 1.4, "sweep": {"1": {"jump": 1.5}, "1.2": {"jump": 1.25}}}


@pytest.fixture(scope="module", autouse=True)
def _painted_once() -> Iterator[None]:
    """Keep the backgrounds, which take two seconds and are those of every world here."""
    painted: dict[tuple[object, int], torch.Tensor] = {}

    def keep(paint: Callable[[int, torch.Generator], torch.Tensor]) -> Callable[[int, torch.Generator], torch.Tensor]:
        def kept(count: int, generator: torch.Generator) -> torch.Tensor:
            if (paint, count) not in painted:
                painted[paint, count] = paint(count, generator)
            return painted[paint, count]

        return kept

    with pytest.MonkeyPatch.context() as patch:
        for name in ("paint_places", "paint_textures"):
            patch.setattr(world, name, keep(getattr(world, name)))
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "fetch", lambda cache: None)
        patch.setattr(pictures, "load_sprites", lambda cache: make_sprites())
        patch.setattr(pictures, "load_photographs", lambda cache: make_photographs())
        patch.setattr(recipe, "find_alpha", lambda *_, **__: STRENGTH)  # tried below
        recipe.run(folder, BUDGET, until="vae", device=torch.device("cpu"))
        assert not (folder / "base.safetensors").exists()
        recipe.run(folder, BUDGET, device=torch.device("cpu"))
    return folder


@pytest.mark.slow
def test_the_recipe_makes_a_folder_that_the_pipeline_loads_and_that_says_how_it_is_meant(work: Path) -> None:
    pipe = PusaPipeline.from_pretrained(work / "model")
    assert pipe.load_pusa(work / "model" / recipe.LORA_FILE, alpha=1.4) == 2 * 10
    latents = torch.zeros(16, 1, 8, 8)
    start = PusaCondition(latents=latents, latent_index=0)
    made = pipe(
        captions(draw_scenes(1, 0))[0],
        conditions=[start],
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=2,
        max_sequence_length=64,
        output_type="latent",
    ).frames
    assert torch.equal(made[0, :, 0].float(), latents[:, 0])
    card = json.loads((work / "model" / "pusa.json").read_text())
    assert card["defaults"]["width"] == 64
    assert card["words"]["things"] == [
        ["duck", "mallard"],
        ["fish", "tropical fish"],
        ["turtle", "tortoise"],
        ["octopus"],
    ]


@pytest.mark.slow
def test_latents_are_normalised_and_the_report_holds_what_was_measured(work: Path) -> None:
    vae = AutoencoderKLWan.from_pretrained(work / "vae")
    assert min(vae.config.latents_std) > 0
    assert vae.config.latents_std != [1.0] * 16
    report = json.loads((work / "report.json").read_text())
    assert report["vae"]["held_out_db"] > 5
    assert 0 < report["base"]["held_out_loss"] < 5
    assert report["budget"]["things"] == 4


@pytest.mark.slow
def test_the_adapter_is_scaled_so_that_alpha_1_4_is_the_best_strength_and_the_card_names_it(work: Path) -> None:
    trained = read_lora(work / "vta" / "adapter.safetensors").pairs
    shipped = read_lora(work / "model" / recipe.LORA_FILE).pairs
    assert trained.keys() == shipped.keys()
    for layer, (a, b) in trained.items():
        torch.testing.assert_close(
            1.4 * (shipped[layer][1].float() @ shipped[layer][0].float()), 1.2 * (b @ a), atol=1e-3, rtol=0.05
        )
    card = (work / "README.md").read_text()
    assert "scaled by 0.857, so that this is alpha 1.4" in card
    assert "CC-BY-4.0" in card
    assert (work / "curves.png").stat().st_size > 1000


@pytest.mark.slow
def test_finished_stages_are_not_done_again(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stand_in in (("load_sprites", make_sprites), ("load_photographs", make_photographs)):
        monkeypatch.setattr(pictures, name, lambda cache, make=stand_in: make())
    monkeypatch.setattr(pictures, "fetch", lambda cache: None)
    for stage in ("train_vae", "train_base", "train_vta"):
        monkeypatch.setattr(recipe, stage, lambda *_, **__: pytest.fail("trained again"))
    recipe.run(work, BUDGET, device=torch.device("cpu"))


@pytest.mark.slow
def test_on_a_card_a_failing_adapter_leaves_a_usable_base_and_the_next_stages_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(card, "train_vta", fail)
    budget = dataclasses.replace(CARD_BUDGET, schedule=dataclasses.replace(CARD_BUDGET.schedule, compiled=False))
    with pytest.raises(RuntimeError, match="the adapter: out of memory; strength: "):
        card.run(tmp_path, budget, make_sprites(), make_photographs(), device=torch.device("cpu"))
    assert (tmp_path / "sheets" / "text-to-video.jpg").stat().st_size > 1000
    pipe = PusaPipeline.from_pretrained(tmp_path / "model")
    made = pipe("a duck", height=16, width=16, num_frames=9, num_inference_steps=1, output_type="latent").frames
    assert made.isfinite().all()
    stages = {line["stage"]: line for line in map(json.loads, (tmp_path / "throughput.jsonl").open())}
    first = "clips, a first batch of each size"
    assert list(stages)[:5] == [first, "clips, held-out", "clips, small", "clips, full", "base"]
    base = stages["base"]
    assert base["steps"] >= 1
    assert base["flops_per_second"] == pytest.approx(base["flops"] / base["seconds"], rel=0.1)


def test_the_loop_takes_so_many_steps_and_says_the_mean_loss_since_the_last_line(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1, bias=False)

    def loss_fn(seed: int, progress: float) -> torch.Tensor:
        return model.weight.sum() * 0 + seed

    fit(loss_fn, model, [], steps=5, schedule=cool_down, checkpoint=tmp_path / "loop.pt")
    line = json.loads((tmp_path / "loop.jsonl").read_text())
    assert (line["step"], line["loss"]) == (5, 4.0)


def test_the_loop_goes_on_where_it_was_and_averages_the_weights(tmp_path: Path) -> None:
    target = torch.tensor([1.0, -2.0])
    seeds = []

    def train(**length: float) -> torch.nn.Linear:
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1, bias=False)

        def loss_fn(seed: int, progress: float) -> torch.Tensor:
            seeds.append(seed)
            return (model.weight[0] - target).square().sum()

        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        fit(
            loss_fn,
            model,
            [optimizer],
            **length,
            schedule=cool_down,
            checkpoint=tmp_path / "loop.pt",
            ema_decay=0.9,
        )
        return model

    train(steps=5)
    model = train(steps=200)
    assert seeds == list(range(200))
    torch.testing.assert_close(model.weight[0].detach(), target, atol=1e-2, rtol=0)
    spent = torch.load(tmp_path / "loop.pt", weights_only=True)["elapsed"]
    train(seconds=spent / 2)  # is over: the time of earlier calls counts
    assert seeds == list(range(200))
    train(seconds=spent + 0.05)
    assert seeds[200] == 200


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="the loss is nan at step 0: lower the learning rates"):
        fit(
            lambda seed, progress: model.weight.sum() * torch.nan,
            model,
            [],
            seconds=1,
            schedule=cool_down,
            checkpoint=tmp_path / "loop.pt",
        )


def test_psnr_is_20_db_at_a_tenth_of_the_range() -> None:
    video = torch.zeros(1, 3, 2, 4, 4)
    torch.testing.assert_close(psnr(video, video + 0.2), torch.full((1, 2), 20.0))


@pytest.mark.slow
@pytest.mark.parametrize("fails", [LossNotFiniteError("the loss is nan"), OSError("no compiler")])
def test_on_a_card_a_failing_base_goes_on_with_smaller_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Exception
) -> None:
    schedules = []

    def train_base(
        base: object, small: object, full: object, checkpoint: Path, schedule: BaseSchedule, _: object
    ) -> None:
        schedules.append(schedule)
        if len(schedules) == 1:
            raise fails
        (tmp_path / "base.jsonl").write_text('{"step": 1}\n')

    monkeypatch.setattr(card, "train_base", train_base)
    monkeypatch.setattr(card, "train_vta", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="the adapter: "):
        card.run(tmp_path, CARD_BUDGET, make_sprites(), make_photographs(), device=torch.device("cpu"))
    first, second = schedules
    assert second.rate == first.rate / 3
    assert (first.compiled, second.compiled) == (True, isinstance(fails, LossNotFiniteError))
    assert (tmp_path / "model" / "model_index.json").exists()
