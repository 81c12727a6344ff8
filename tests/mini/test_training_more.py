"""The embedded model trained further: a world of its own, clips drawn on the way, and going on after a kill."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKLWan
from filelock import FileLock
from torch import Tensor, nn
from world_samples import make_photographs, make_sprites

from pusa import zoo
from pusa.cli import main
from pusa.mini.recipe.base import TextToVideo
from pusa.mini.recipe.clips import ClipPlan
from pusa.mini.recipe.folder import write_folder
from pusa.mini.recipe.loop import fit, load_averages
from pusa.mini.recipe.more import CHECKPOINT, MORE_BUDGETS, MoreBudget, rate_factor, run
from pusa.mini.recipe.pool import FILE_CLIPS, ClipPool, PoolPlan, newest_clips
from pusa.mini.recipe.vae import CONFIG
from pusa.mini.world.edition import EDITIONS, FIRST, SECOND, edition_of
from pusa.mini.world.vocabulary import MOTIONS, THINGS
from pusa.mini.world.world import World, draw_scenes

BUDGET = replace(MORE_BUDGETS["more-rehearsal"], heads=1, layers=1)
PLAN = PoolPlan(ClipPlan(clips=0, size=32, frames=5, things=20, edition=SECOND), first=2, every=3, most=4)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in the layout of the package's."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("start")
    vae = AutoencoderKLWan(**{**CONFIG, "base_dim": 8})
    write_folder(folder, vae, TextToVideo(heads=1, layers=1), replace(BUDGET, edition=FIRST, things=32))
    return folder


@pytest.fixture(scope="module")
def pool(start: Path, tmp_path_factory: pytest.TempPathFactory) -> ClipPool:
    vae = AutoencoderKLWan.from_pretrained(start / "vae")
    world = World(make_sprites(), make_photographs(), variants=2, edition=SECOND)
    tokenizer = TextToVideo.from_folder(start).tokenizer
    return ClipPool(vae, world, tmp_path_factory.mktemp("pool"), PLAN, tokenizer)


def more(work: Path, start: Path, budget: MoreBudget = BUDGET, until: str = "base") -> None:
    run(work, budget, make_sprites()[: SECOND.sprites], make_photographs(), until=until, start=start)


# ---- the world of the second edition ---------------------------------------------------------------------------------


def test_scenes_of_an_edition_show_its_things_and_places_only() -> None:
    for held_out in (False, True):
        scenes = draw_scenes(3000, 0, held_out=held_out, edition=SECOND)
        assert set(scenes.thing.tolist()) - {-1} == set(SECOND.things)
        assert set(scenes.place[scenes.place < 12].tolist()) == set(SECOND.places)
        assert bool((scenes.second == -1).all())


def test_a_third_of_the_second_edition_s_scenes_are_pictures() -> None:
    scenes = draw_scenes(6000, 0, edition=SECOND)
    assert (scenes.place >= 12).float().mean().item() == pytest.approx(1 / 3, abs=0.03)


def test_things_of_the_second_edition_are_larger_turn_less_and_stay_in_the_frame() -> None:
    assert 16 <= len(SECOND.things) <= 24
    assert SECOND.things == tuple(sorted(SECOND.things))
    covers = []
    for edition in (FIRST, SECOND):
        world = World(make_sprites(), make_photographs(), variants=2, motion_frames=8, edition=edition)
        scenes = draw_scenes(400, 1, edition=SECOND)
        is_plain = (scenes.thing >= 0) & (scenes.camera == 0) & (scenes.motion != list(MOTIONS).index("near"))
        alpha = world.render(scenes[is_plain][:40], 9, size=32)[1]
        covers.append(alpha.mean())
        edge = torch.stack([alpha[..., 0, :], alpha[..., -1, :], alpha[..., :, 0], alpha[..., :, -1]]).mean()
    assert covers[1] > 1.1 * covers[0]
    assert edge < 0.25
    assert SECOND.style.spin < FIRST.style.spin


def test_pictures_of_half_the_resolution_show_the_same() -> None:
    world = World(make_sprites(), make_photographs(), variants=2, edition=SECOND)
    scenes = draw_scenes(20, 3, edition=SECOND)
    scenes = scenes[scenes.place < 12]
    video, half = (some.render(scenes, 1, size=32)[0] for some in (world, world.half()))
    assert (video - half).abs().mean() < 0.1
    assert world.half().sprites.shape[-1] == world.sprites.shape[-1] // 2


# ---- the words of a model folder -------------------------------------------------------------------------------------


def test_the_package_s_model_keeps_the_words_and_the_world_that_it_was_trained_on() -> None:
    edition, words = edition_of(zoo.MINI_FOLDER), zoo.ZOO["mini"].words
    assert edition.words(len(words["things"]))["things"] == [list(group) for group in words["things"]]
    assert [list(group) for group in words["places"]] == edition.words(1)["places"]


def test_a_model_folder_names_its_world_and_lists_its_words(start: Path, tmp_path: Path) -> None:
    vae, base = AutoencoderKLWan.from_pretrained(start / "vae"), TextToVideo.from_folder(start)
    write_folder(tmp_path / "model", vae, base, BUDGET)
    entry = zoo.find(tmp_path / "model")
    assert entry is not None
    assert edition_of(tmp_path / "model") is SECOND
    assert [group[0] for group in entry.words["things"]] == [THINGS[index][1] for index in SECOND.things]
    assert ["at night", "in the moonlight"] not in [list(group) for group in entry.words["places"]]
    card = tmp_path / "model" / "pusa.json"
    card.write_text(card.read_text().replace('"second"', '"ninth"'))
    with pytest.raises(ValueError) as error:
        edition_of(tmp_path / "model")
    assert str(error.value) == f"{tmp_path / 'model'} knows the world 'ninth', and this version has first, second"
    assert list(EDITIONS) == ["first", "second"]


# ---- clips drawn on the way ------------------------------------------------------------------------------------------


def test_a_pool_keeps_the_newest_half_of_what_was_drawn() -> None:
    assert list(PLAN.files(0)) == [0, 1]
    assert list(PLAN.files(3)) == [1, 2]
    assert list(PLAN.files(3, processes=2)) == [2, 3]
    assert list(PLAN.files(18)) == [4, 5, 6, 7]
    assert list(PLAN.files(90)) == [28, 29, 30, 31]


def test_a_pool_draws_anew_what_is_missing_and_forgets_what_is_old(pool: ClipPool) -> None:
    pool.advance(0)
    first = pool.folder / "000001.safetensors"
    written = first.read_bytes()
    first.unlink()
    again = ClipPool(pool.vae, pool.world, pool.folder, PLAN, pool.tokenizer)
    again.advance(0)
    assert first.read_bytes() == written
    sample = again.sample(50)
    assert sample.latents.shape == (50, 16, 2, 4, 4)
    assert len(sample.latents.flatten(1).unique(dim=0)) > FILE_CLIPS
    again.advance(75)
    kept = sorted(int(path.stem) for path in pool.folder.glob("*.safetensors"))
    assert kept == [23, 24, 25, 26]
    assert len(newest_clips(pool.folder, 20)) == 20


# ---- training --------------------------------------------------------------------------------------------------------


def test_the_rate_rises_and_then_falls_slowly() -> None:
    rates = [rate_factor(step, MORE_BUDGETS["more"]) for step in (0, 99, 3000, 9000, 90_000)]
    assert rates == pytest.approx([0.01, 0.98, 0.707, 0.5, 0.18], abs=0.01)


def test_training_begins_with_the_model_it_is_given_and_writes_one(start: Path, tmp_path: Path) -> None:
    budget = replace(BUDGET, steps=1, rate=0.0, publish_seconds=3600.0)
    more(tmp_path, start, budget)
    trained, given = (TextToVideo.from_folder(folder).state_dict() for folder in (tmp_path / "model", start))
    assert trained.keys() == given.keys()
    assert all(torch.equal(trained[name], given[name]) for name in given)
    entry = json.loads((tmp_path / "progress.jsonl").read_text())
    assert entry["step"] == 1
    assert 0 < entry["held_out_loss"] < 5
    assert 0 < entry["held_out_picture_loss"] < 5


def test_after_an_interruption_training_ends_with_the_same_weights(start: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more(whole, start)
    more(broken, start, replace(BUDGET, steps=3))
    for path in (broken / "clips").glob("*.safetensors"):
        path.unlink()
    more(broken, start)
    ends = []
    for work in (whole, broken):
        base = TextToVideo.from_folder(start)
        assert load_averages(work / CHECKPOINT, base) == BUDGET.steps
        ends.append(base.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    given = TextToVideo.from_folder(start).state_dict()
    assert any(not torch.equal(ends[0][name], given[name]) for name in given)


def test_two_trainings_do_not_share_a_folder(start: Path, tmp_path: Path) -> None:
    with FileLock(tmp_path / "lock"), pytest.raises(RuntimeError) as error:
        more(tmp_path, start)
    assert str(error.value) == f"another process trains in {tmp_path}: stop it first, or wait for it"


def test_the_command_names_the_stages_that_there_are(tmp_path: Path) -> None:
    arguments = ["mini", "train", str(tmp_path), "--budget", "more", "--until", "vae"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "--budget more has no stage vae: --until base trains the base" in result.output


def test_without_a_base_there_is_nothing_to_complete(start: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no base: `pusa mini train .* --until base` trains it"):
        more(tmp_path, start, until="export")


@pytest.mark.slow
def test_the_model_is_completed_with_an_adapter_and_sheets(start: Path, tmp_path: Path) -> None:
    more(tmp_path, start, replace(BUDGET, steps=1))
    more(tmp_path, start, until="export")
    entry = zoo.find(tmp_path / "model")
    assert entry is not None
    assert entry.lora is not None
    assert (tmp_path / "sheets" / "text-to-video.jpg").stat().st_size > 1000
    assert "scaled by" in (tmp_path / "README.md").read_text()


def test_the_loop_publishes_the_averaged_weights_and_goes_on_with_its_own(tmp_path: Path) -> None:
    def trained(publish: Callable[[int], None] | None, name: str) -> Tensor:
        torch.manual_seed(0)
        model.load_state_dict({"weight": torch.ones(1, 1)})
        fit(
            lambda seed, progress: model(torch.ones(1, 1)).square().sum(),
            model,
            [torch.optim.SGD(model.parameters(), lr=0.1)],
            steps=4,
            schedule=lambda step, progress: 1.0,
            checkpoint=tmp_path / name,
            ema_decay=0.5,
            publish=publish,
            publish_seconds=-1.0,
        )
        return torch.load(tmp_path / name, weights_only=True)["parameters"]["weight"]

    model, seen = nn.Linear(1, 1, bias=False), []
    quiet = trained(None, "quiet.pt")
    assert torch.equal(trained(lambda step: seen.append((step, float(model.weight.detach()))), "loud.pt"), quiet)
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    assert all(weight > float(quiet) for _, weight in seen[-2:])
