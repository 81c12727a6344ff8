"""Plan batches as a pure function of seed and step: a kill or another layout of processes loses nothing."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_samples import make_config, write_dataset

from pusa.data.dataset import LatentDataset
from pusa.training.batches import Batch, BatchPlan, Loader, Reader, generator_of, held_out_batches
from pusa.training.config import TrainConfig

BUCKETS = {(16, 3, 4, 6): list(range(8)), (16, 1, 4, 6): [8, 9]}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LatentDataset:
    return LatentDataset(write_dataset(tmp_path_factory.mktemp("data"), single_frames=4))


def config(**changes: Any) -> TrainConfig:
    return make_config(None, Path("unused"), **changes)


def batches(
    data: LatentDataset, config: TrainConfig, *, steps: int, data_rank: int = 0, data_parallel: int = 1, first: int = 0
) -> list[Batch]:
    reader, plan = Reader(data, config, (0.0, 1.0)), BatchPlan(data.buckets, config, data_parallel)
    with Loader(reader, plan, data_rank=data_rank, first_step=first, device=CPU) as loader:
        return [loader.next() for _ in range(steps * plan.accumulation)]


def tensors(batch: Batch) -> list[Tensor]:
    return [batch.latents, batch.noise, batch.sigmas, batch.embeds]


def are_equal(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for first, second in zip(one, other, strict=True)
        for a, b in zip(tensors(first), tensors(second), strict=True)
    )


def test_all_clips_are_seen_equally_often() -> None:
    plan = BatchPlan(BUCKETS, config(), data_parallel=1)
    seen = Counter(clip for step in range(3000) for clip in plan.step(step).clips)
    assert seen.keys() == set(range(10))
    for clips in BUCKETS.values():  # within a bucket exactly, but for the turn that is going on
        assert max(seen[c] for c in clips) - min(seen[c] for c in clips) <= 1
    assert min(seen.values()) == pytest.approx(600, rel=0.1)


def test_a_step_has_clips_of_one_shape_and_no_clip_twice_while_others_wait() -> None:
    plan = BatchPlan(BUCKETS, config(), data_parallel=2)
    for step in range(50):
        clips = plan.step(step).clips
        assert len(clips) == 4
        assert len({clip < 8 for clip in clips}) == 1
    large = BatchPlan({(16, 3, 4, 6): list(range(8))}, config(), data_parallel=4)
    assert all(sorted(large.step(step).clips) == list(range(8)) for step in range(20))


def test_batches_of_steps_can_be_read_in_any_order() -> None:
    steps = [0, 5000, 3, 1024, 1023, 5000]
    plan, other = BatchPlan(BUCKETS, config(), data_parallel=1), BatchPlan(BUCKETS, config(), data_parallel=1)
    expected = {step: other.step(step) for step in sorted(set(steps))}
    assert [plan.step(step) for step in steps] == [expected[step] for step in steps]


def test_another_seed_is_another_order() -> None:
    one, other = (BatchPlan(BUCKETS, config(seed=seed), data_parallel=1) for seed in range(2))
    assert [one.step(step) for step in range(9)] != [other.step(step) for step in range(9)]


def test_two_processes_see_what_one_with_two_passes_sees(data: LatentDataset) -> None:
    settings = config(batch_size=2, global_batch=8)
    alone = batches(data, settings, steps=3)
    first, second = (batches(data, settings, steps=3, data_rank=rank, data_parallel=2) for rank in range(2))
    together = [batch for pair in zip(first, second, strict=True) for batch in pair]
    assert are_equal(alone, together)


def test_going_on_at_a_step_gives_the_same_batches(data: LatentDataset) -> None:
    whole = batches(data, config(), steps=6)
    assert are_equal(whole[4:], batches(data, config(), steps=2, first=4))
    assert not are_equal(whole[:2], whole[4:])


def test_more_threads_change_nothing(data: LatentDataset) -> None:
    settings = config(data={"workers": 4, "prefetch": 8})
    assert are_equal(batches(data, config(), steps=6), batches(data, settings, steps=6))


def test_the_same_clip_gets_other_noise_at_another_step(data: LatentDataset) -> None:
    seen = batches(data, config(), steps=12)
    noises = torch.cat([batch.noise.flatten(1)[:, :8] for batch in seen])
    assert len(noises.unique(dim=0)) == 24


def test_clips_are_cut_to_the_chosen_lengths_and_batches_keep_their_number_of_frames(data: LatentDataset) -> None:
    settings = config(batch_frames=6, data={"lengths": [2, 3]})
    sizes = {tuple(batch.latents.shape) for batch in batches(data, settings, steps=60)}
    assert sizes == {(3, 16, 2, 4, 6), (2, 16, 3, 4, 6), (6, 16, 1, 4, 6)}
    clip = data.buckets[(16, 3, 4, 6)][0]
    batch = Reader(data, settings, (0.0, 1.0)).batch([clip], 2, [generator_of(0)], training=True, counted=1)
    assert torch.equal(batch.latents[0], data.latents(clip)[:, :2])  # the beginning: the VAE is causal


def test_captions_are_dropped_with_their_share_and_padded_with_zeros(data: LatentDataset) -> None:
    settings = config(objective={"caption_dropout": 0.5})
    embeds = torch.cat([batch.embeds for batch in batches(data, settings, steps=100)])
    assert embeds.shape[1:] == (8, 48)
    is_empty = (embeds[:, 0] == data.empty_embeds[0]).all(dim=1)
    assert is_empty.float().mean() == pytest.approx(0.5, abs=0.1)
    assert (embeds[is_empty, 1:] == 0).all()
    assert all((batch.embeds[:, 1] != 0).any() for batch in batches(data, config(), steps=20))  # none without


def test_held_out_clips_are_all_judged_at_levels_that_never_change(data: LatentDataset) -> None:
    settings = config(batch_size=3, report={"held_out_draws": 2})
    reader = Reader(data, settings, (0.0, 1.0))
    first, second = ([*held_out_batches(reader, data_rank=0, data_parallel=1)] for _ in range(2))
    assert are_equal(first, second)
    assert sum(batch.counted for batch in first) == 24
    halves = [[*held_out_batches(reader, data_rank=rank, data_parallel=2)] for rank in range(2)]
    assert [tuple(b.latents.shape) for b in halves[0]] == [tuple(b.latents.shape) for b in halves[1]]
    counted = [b.sigmas[: b.counted].sum() for half in halves for b in half]
    assert sum(counted) == pytest.approx(float(sum(b.sigmas[: b.counted].sum() for b in first)), rel=1e-5)


def test_reading_goes_on_while_the_model_works_and_waiting_is_measured(data: LatentDataset) -> None:
    class Slow(Reader):
        def batch(self, *args: Any, **kwargs: Any) -> Batch:
            time.sleep(0.05)
            return super().batch(*args, **kwargs)

    reader, plan = Slow(data, config(), (0.0, 1.0)), BatchPlan(data.buckets, config(), 1)
    with Loader(reader, plan, data_rank=0, first_step=0, device=CPU) as loader:
        for _ in range(4):
            loader.next()
        assert loader.waited_seconds >= 0.15  # nobody worked in between: all of it was waiting
        before = loader.waited_seconds
        for _ in range(4):
            time.sleep(0.2)
            loader.next()
        assert loader.waited_seconds - before < 0.1


def test_an_error_while_reading_is_raised_where_the_batch_was_wanted(data: LatentDataset) -> None:
    class Broken(Reader):
        def batch(self, *args: Any, **kwargs: Any) -> Batch:
            raise ValueError("shard-00003 is damaged")

    plan = BatchPlan(data.buckets, config(), 1)
    with (
        pytest.raises(ValueError, match="shard-00003 is damaged"),
        Loader(Broken(data, config(), (0.0, 1.0)), plan, data_rank=0, first_step=0, device=CPU) as loader,
    ):
        loader.next()
