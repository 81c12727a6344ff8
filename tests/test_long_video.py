"""Long videos: windows that cover, chains that continue latents, a wave that never ends."""

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pusa.conditions import PusaCondition
from pusa.long_video import Span, advance_by, chain, roll, rolling_table, spans
from pusa.scheduler import PusaFlowMatchEulerScheduler, shifted


@given(st.integers(2, 30), st.integers(1, 400), st.data())
def test_spans_cover_every_latent_frame_once_in_full_windows(window, total, data):
    overlap = data.draw(st.integers(1, window - 1))
    covered = spans(total, window, overlap)
    assert covered[0] == Span(0, min(window, total), 0)
    made = [frame for s in covered for frame in range(s.start + s.overlap, s.start + s.length)]
    assert made == list(range(total))
    assert all(s.length == window and s.overlap >= overlap for s in covered[1:])


def test_windows_that_never_advance_are_refused():
    with pytest.raises(ValueError, match=r"overlap=5 is outside 1\.\.4"):
        spans(20, 5, 5)


def test_each_window_starts_with_the_latents_of_the_one_before():
    seen: list[tuple[Span, list[PusaCondition]]] = []

    def denoise(span: Span, known: list[PusaCondition]) -> Tensor:
        seen.append((span, known))
        return torch.arange(span.start, span.start + span.length).float().view(1, 1, -1, 1, 1).expand(1, 2, -1, 3, 4)

    later = PusaCondition(latents=torch.zeros(2, 1, 3, 4), latent_index=7)
    video = torch.cat(list(chain(spans(11, 5, 2), denoise, [later])), dim=2)
    assert video[0, 0, :, 0, 0].tolist() == list(range(11))
    assert [len(known) for _, known in seen] == [0, 2, 1]  # the second window makes frame 7, so it gets the condition
    moved, tail = seen[1][1]
    assert moved.latent_index == 4
    assert tail.latents[0, :, 0, 0].tolist() == [3, 4]


def test_chaining_asks_for_a_window_only_when_its_piece_is_taken():
    windows = []

    def denoise(span: Span, _: list[PusaCondition]) -> Tensor:
        windows.append(span)
        return torch.zeros(1, 2, span.length, 3, 4)

    list(islice(chain(spans(10**6, 21, 4), denoise), 3))
    assert len(windows) == 3


@pytest.mark.parametrize(
    "place", [{"latent_index": "last"}, {"latent_index": -1}, {"frame_index": 40}, {"seconds": 2.5}]
)
def test_positions_in_a_long_video_may_have_any_unit(place):
    known: list[int] = []

    def denoise(span: Span, conditions: list[PusaCondition]) -> Tensor:
        known.append(len(conditions))
        return torch.zeros(1, 2, span.length, 3, 4)

    list(chain(spans(11, 5, 2), denoise, [PusaCondition(latents=torch.zeros(2, 1, 3, 4), **place)]))
    assert known == [0, 1, 2]


@pytest.mark.parametrize(
    ("index", "message"),
    [(11, "latent_index=11: this video has 11 latent frames"), (4, r"latent frames 4..5 are not made by one window")],
)
def test_places_that_no_window_makes_are_refused_before_any_work(index, message):
    condition = PusaCondition(latents=torch.zeros(2, 2, 3, 4), latent_index=index)
    with pytest.raises(ValueError, match=message):
        chain(spans(11, 5, 2), lambda *_: pytest.fail("a window was made"), [condition])


def test_a_turn_of_the_wave_takes_every_frame_to_where_the_next_one_was():
    table = rolling_table(4, 3, history=2)
    assert table.shape == (4, 6)
    assert table[:, :2].abs().max() == 0
    assert table[-1, 2] == 0
    assert table[0, -1] == 1
    torch.testing.assert_close(table[-1, 3:], table[0, 2:-1])
    assert (table.diff(dim=0) <= 0).all()


def test_an_endless_wave_ends_each_frame_at_its_data():
    """With the exact velocity of a known video the wave must reproduce it, frame after frame."""
    data = torch.randn(1, 2, 40, 3, 4, generator=torch.Generator().manual_seed(0))
    noises = torch.Generator().manual_seed(1)
    turns = 0

    def advance(latents: Tensor, table: Tensor) -> Tensor:
        nonlocal turns
        target = data[:, :, turns : turns + latents.shape[2]]
        for sigma, after in zip(table[:-1].view(-1, 1, 1, 6, 1, 1), table[1:].view(-1, 1, 1, 6, 1, 1), strict=True):
            velocity = torch.where(sigma > 0, (latents - target) / sigma.clamp(min=1e-9), 0)
            latents = latents + (after - sigma) * velocity
        turns += 1
        return latents

    wave = roll(
        advance, data[:, :, :6], lambda: torch.randn(1, 2, 1, 3, 4, generator=noises), window=4, steps_per_frame=2
    )
    frames = torch.cat(list(islice(wave, 30)), dim=2)
    torch.testing.assert_close(frames, data[:, :, 2:32], rtol=0, atol=1e-5)


def test_a_wave_needs_history():
    with pytest.raises(ValueError, match=r"window=5 leaves no history in 5 latent frames: give 1\.\.4"):
        next(
            roll(
                lambda z, _: z,
                torch.zeros(1, 2, 5, 3, 4),
                lambda: torch.zeros(1, 2, 1, 3, 4),
                window=5,
                steps_per_frame=1,
            )
        )


def test_a_pipeline_rolls_on_without_touching_history(tiny_pipeline):
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(1, 16, 5, 4, 6, generator=generator)
    seen = []

    def watch(p, step, timestep, tensors):
        seen.append(p.scheduler.frame_timesteps(step)[0])
        return {}

    call = {"prompt": "a cat", "height": 32, "width": 48, "guidance_scale": 1.0, "max_sequence_length": 16}
    advance = advance_by(pipe, **call, callback_on_step_end=watch)
    wave = roll(advance, first, lambda: torch.randn(1, 16, 1, 4, 6, generator=generator), window=3, steps_per_frame=2)
    frames = list(islice(wave, 4))
    assert all(frame.shape == (1, 16, 1, 4, 6) for frame in frames)
    assert not torch.equal(frames[0], frames[1])
    assert len(seen) == 4 * 2
    grid = 1000 * shifted(torch.tensor([1, 2, 3, 4, 5, 6]) / 6, 5.0)
    torch.testing.assert_close(seen[0], torch.cat([torch.zeros(2), grid[[1, 3, 5]]]))
    assert isinstance(pipe.scheduler, PusaFlowMatchEulerScheduler)
