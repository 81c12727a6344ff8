"""Clips, times and loss of the small model's base, and what they must not do: make the host wait."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from mini_counts import count_step
from mini_trials import table
from safetensors.torch import load_file
from torch import Tensor, nn
from world_samples import make_world

from pusa.mini.recipe.base import (
    BaseLoss,
    BaseObjective,
    BaseSchedule,
    TextToVideo,
    draw_times,
    held_out_losses,
    make_tokenizer,
    train_base,
)
from pusa.mini.recipe.clips import ClipCache, ClipPlan, cache_clips, draw_clips, latent_mask, load_latents, tokenise
from pusa.mini.recipe.vae import CONFIG
from pusa.mini.world.world import PHOTOGRAPH, TEXTURE, World, captions, draw_scenes
from pusa.zoo import MINI_FOLDER

CPU = torch.device("cpu")
PLAN = ClipPlan(clips=64, size=32, frames=9, things=4)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(**{**CONFIG, "base_dim": 8})


@pytest.fixture(scope="module")
def clips(world: World, vae: AutoencoderKLWan) -> ClipCache:
    return draw_clips(vae, world, PLAN)


@pytest.fixture(scope="module")
def tiny() -> TextToVideo:
    torch.manual_seed(0)
    return TextToVideo(heads=1, layers=1)


# ---- times -----------------------------------------------------------------------------------------------------------


def test_without_a_vectorised_share_a_clip_has_one_time() -> None:
    assert draw_times(8, 5, BaseObjective(), CPU).shape == (8,)


def test_a_share_of_clips_has_a_time_per_frame_and_some_of_those_start_clean() -> None:
    torch.manual_seed(0)
    sigma = draw_times(4000, 5, BaseObjective(vector_share=0.3, clean_start_share=0.5), CPU)
    is_vector = (sigma[:, 1:] != sigma[:, 1:2]).any(1)
    starts_clean = sigma[:, 0] == 0
    assert is_vector.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert starts_clean.float().mean().item() == pytest.approx(0.15, abs=0.02)
    assert not (starts_clean & ~is_vector).any()
    assert bool((sigma[:, 1:] > 0).all())


# ---- loss ------------------------------------------------------------------------------------------------------------


class Zero(nn.Module):
    """Says that nothing moves."""

    def forward(self, noisy: Tensor, times: Tensor, embeds: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (torch.zeros_like(noisy),)


def loss_with(tiny: TextToVideo, clips: ClipCache, objective: BaseObjective) -> float:
    """The loss of a transformer that answers nothing but zero, on latents that are zero where no thing is."""
    mask = torch.zeros_like(clips.mask)
    mask[:, :, :2] = 255
    latents = torch.zeros_like(clips.latents)
    latents[:, :, :, :2] = 3
    model = TextToVideo(heads=1, layers=1, tokenizer=tiny.tokenizer)
    known = ClipCache(latents, mask, clips.scenes)
    loss_fn = BaseLoss(model, None, known, BaseSchedule(batch_tokens=256, short_share=0.0), objective)
    model.transformer = Zero()
    return float(loss_fn(0, 0.0))


def test_the_error_on_things_counts_more_by_their_weight(tiny: TextToVideo, clips: ClipCache) -> None:
    # The target is noise - data: its square is 1 + 9 where things are (half of the latent pixels), 1 elsewhere.
    assert loss_with(tiny, clips, BaseObjective()) == pytest.approx(5.5, abs=0.2)
    assert loss_with(tiny, clips, BaseObjective(thing_weight=2.0)) == pytest.approx((3 * 10 + 1) / 4, abs=0.2)


def test_a_clean_frame_s_error_does_not_count(tiny: TextToVideo, clips: ClipCache) -> None:
    first_is_loud = ClipCache(clips.latents.clone(), clips.mask, clips.scenes)
    first_is_loud.latents[:, :, 1:] = 0
    first_is_loud.latents[:, :, 0] = 100
    model = TextToVideo(heads=1, layers=1, tokenizer=tiny.tokenizer)
    always = BaseObjective(vector_share=1.0, clean_start_share=1.0)
    loss_fn = BaseLoss(model, None, first_is_loud, BaseSchedule(batch_tokens=256, short_share=0.0), always)
    model.transformer = Zero()
    assert float(loss_fn(0, 0.0)) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_a_dropped_caption_is_embedded_as_the_empty_one(
    tiny: TextToVideo, clips: ClipCache, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = BaseSchedule(batch_tokens=64, short_share=0.0)
    seen: list[Tensor] = []
    loss_fn = BaseLoss(tiny, None, clips, schedule, BaseObjective(caption_dropout=dropout))
    embed = tiny.embed_tokens
    monkeypatch.setattr(tiny, "embed_tokens", lambda tokens: seen.append(tokens) or embed(tokens))
    loss_fn(0, 0.0)
    is_empty = (seen[0][:, 0] == tiny.empty_tokens[0]) & (seen[0][:, 1:] == 0).all(1)
    assert is_empty.float().mean() == dropout


def test_prompts_are_embedded_as_the_pipeline_does(tiny: TextToVideo) -> None:
    texts = ["a duck slides to the right under the sea", "", "a cat"]
    tokens = tiny.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = tiny.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        embeds = tiny.embed(texts)
    expected = states * tokens.attention_mask.unsqueeze(-1)
    torch.testing.assert_close(embeds[:, : expected.shape[1]], expected, atol=1e-5, rtol=1e-5)
    assert not embeds[:, expected.shape[1] :].any()


def test_a_step_runs_where_nothing_can_be_waited_for_and_muon_needs_few_launches(tiny: TextToVideo) -> None:
    step = {
        "tokenizer": tiny.tokenizer,
        "heads": 1,
        "layers": 2,
        "head_channels": 32,
        "size": 32,
        "batch_tokens": 72,
        "objective": BaseObjective(),
    }
    vector = BaseObjective(vector_share=0.3, clean_start_share=0.5, thing_weight=2.0)
    two, three = (count_step(**step | {"objective": vector, "layers": n, "batched": True}) for n in (2, 3))
    assert two["flops"] < three["flops"]
    assert two["Muon"] == three["Muon"] < 100
    if hasattr(torch.optim, "Muon"):
        assert count_step(**step, batched=False)["Muon"] > 5 * two["Muon"]


def test_the_counting_device_refuses_what_would_wait() -> None:
    with pytest.raises(RuntimeError, match="item"):
        float(torch.zeros((), device="meta"))


def test_held_out_losses_are_the_same_each_time_and_leave_the_random_state(tiny: TextToVideo, clips: ClipCache) -> None:
    before = torch.get_rng_state()
    first = held_out_losses(tiny, clips, batches=2)
    assert len(first) == 8
    assert first == held_out_losses(tiny, clips, batches=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_training_lowers_the_loss(tiny: TextToVideo, clips: ClipCache, tmp_path: Path) -> None:
    start = sum(held_out_losses(tiny, clips, batches=2))
    schedule = BaseSchedule(
        batch_tokens=192, steps=10, short_share=0.0, rate=2e-2, cool_from=0.5, ema_decay=0.5, compiled=False
    )
    model = TextToVideo(heads=1, layers=1, tokenizer=tiny.tokenizer)
    model.load_state_dict(tiny.state_dict())
    train_base(model, None, clips, tmp_path / "base.pt", schedule, BaseObjective(vector_share=0.3))
    assert sum(held_out_losses(model, clips, batches=2)) < start


def test_a_copy_answers_as_the_base_does(tiny: TextToVideo) -> None:
    copy = tiny.copy()
    x, times, embeds = torch.randn(1, 16, 2, 4, 4), torch.tensor([[0.0, 500.0]]), tiny.embed(["a duck"])
    with torch.no_grad():
        given, copied = (m.transformer(x, times, embeds, return_dict=False)[0] for m in (tiny.eval(), copy))
    assert torch.equal(given, copied)
    assert copy.transformer is not tiny.transformer


def test_the_trials_table_has_a_row_for_each_result(tmp_path: Path) -> None:
    for number in range(2):
        line = {"trial": f"trial {number}", "steps": 3, "core_minutes": 0.1, "loss": 0.25, "i2v_frames_1_4_db": 16.5}
        with (tmp_path / "trials.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    assert table(tmp_path / "trials.jsonl").splitlines() == [
        "| trial | steps | core minutes | loss | i2v frames 1 4 db |",
        "|---|---|---|---|---|",
        "| trial 0 | 3 | 0.1 | 0.2500 | 16.50 |",
        "| trial 1 | 3 | 0.1 | 0.2500 | 16.50 |",
    ]


def test_the_base_of_the_package_is_loaded_without_its_adapter_in_fp32() -> None:
    base = TextToVideo.from_folder(MINI_FOLDER)
    for name, module in (("transformer", base.transformer), ("text_encoder", base.text_encoder)):
        stored = load_file(next((MINI_FOLDER / name).glob("*.safetensors")))
        own = module.state_dict()
        assert {key: torch.equal(own[key], tensor.float()) for key, tensor in stored.items()} == dict.fromkeys(
            stored, True
        )
        assert all(p.dtype == torch.float32 for p in module.parameters())
    assert len(base.tokenizer) == base.text_encoder.config.vocab_size


# ---- clips -----------------------------------------------------------------------------------------------------------


def test_the_mask_is_the_share_of_a_latent_pixel_that_things_cover() -> None:
    alpha = torch.zeros(1, 1, 5, 16, 16)
    alpha[:, :, 0, :8, :8] = 1
    alpha[:, :, 1:3, 8:, 8:] = 1  # two of the four frames of latent frame 1
    mask = latent_mask(alpha)
    assert mask.shape == (1, 2, 2, 2)
    assert mask[0, 0].tolist() == [[255, 0], [0, 0]]
    assert mask[0, 1].tolist() == [[0, 0], [0, 128]]


def test_clips_in_files_are_those_in_memory_and_keep_their_scenes(
    world: World, vae: AutoencoderKLWan, clips: ClipCache, tmp_path: Path
) -> None:
    filed = cache_clips(vae, world, tmp_path, replace(PLAN, picture_share=None))
    torch.testing.assert_close(filed.latents.float(), clips.latents.float(), atol=0.1, rtol=0.05)
    assert torch.equal(filed.mask, clips.mask)
    assert captions(load_latents(tmp_path, things=1).scenes) == captions(clips.scenes)


def test_drawing_stops_at_its_deadline(world: World, vae: AutoencoderKLWan) -> None:
    late = draw_clips(vae, world, replace(PLAN, clips=64 * 10_000, size=16), deadline=0.0)
    assert 0 < len(late) < 64 * 10_000


def test_the_share_of_pictures_can_be_chosen() -> None:
    scenes = draw_scenes(4000, 0, picture_share=1 / 3)
    assert (scenes.place >= TEXTURE).float().mean().item() == pytest.approx(1 / 3, abs=0.03)
    assert ((scenes.place == PHOTOGRAPH).sum() / (scenes.place == TEXTURE).sum()).item() == pytest.approx(
        16 / 7, abs=0.4
    )
    usual = draw_scenes(4000, 0)
    assert torch.equal(usual.place, draw_scenes(4000, 0, picture_share=0.23).place)


def test_captions_become_the_tokens_of_the_tokenizer() -> None:
    tokenizer = make_tokenizer()
    texts = [*captions(draw_scenes(20, 3)), "", "xylophone"]
    tokens = tokenise(tokenizer, texts)
    expected = tokenizer(texts, padding=True, return_tensors="pt").input_ids
    assert torch.equal(tokens[:, : expected.shape[1]], expected)
    assert not tokens[:, expected.shape[1] :].any()
    with pytest.raises(ValueError, match=r"a caption has \d+ tokens, and only 4 are kept"):
        tokenise(tokenizer, texts, length=4)


def test_a_sample_has_clips_with_their_masks_and_captions(tiny: TextToVideo, clips: ClipCache) -> None:
    clips.tokenise_captions(tiny.tokenizer)
    torch.manual_seed(0)
    sample = clips.sample(16, 2)
    assert sample.latents.shape == (16, 16, 2, 4, 4)
    for latents, mask, tokens in zip(sample.latents, sample.mask, sample.tokens, strict=True):
        index = int((clips.latents[:, :, :2].float() == latents).flatten(1).all(1).nonzero()[0])
        assert torch.equal(mask, clips.mask[index, :2].float() / 255)
        assert (clips.tokens[index] == tokens).all(1).any()
