"""Waves: every frame takes its own steps, a window moves along with those that move, and early frames come first."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pusa.scheduler import PusaFlowMatchEulerScheduler, turn_sigmas, wave_sigmas
from pusa.waves import Wave, least_delay

GRID = PusaFlowMatchEulerScheduler().base_sigmas


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.integers(2, 14), st.data())
def test_the_turns_of_a_window_are_the_table_of_the_whole_video(total, steps, delay, window, data):
    history = data.draw(st.integers(1, window - 1))
    kept = frozenset(data.draw(st.sets(st.integers(0, total - 1), max_size=4)))
    wave = Wave(total, steps, delay, kept)
    try:
        turns = wave.turns(window, history)
    except ValueError:
        assert total > window
        assert -(-steps // delay) + len(kept) >= window
        return
    whole = turn_sigmas(wave, wave.turns(total, 0)[0], GRID(wave.steps))
    done = shown = 0
    for turn in turns:
        assert turn.first == done
        assert turn.start <= shown  # no frame is left out
        before, shown = shown, wave.finished_in(turn, turn.last)
        assert shown >= before
        done = turn.last
        columns = slice(turn.start, turn.start + turn.length)
        rows = whole[turn.first : turn.last + 1]
        assert torch.equal(turn_sigmas(wave, turn, GRID(wave.steps)), rows[:, columns])
        outside = torch.cat([rows[:, : turn.start], rows[:, turn.start + turn.length :]], 1)
        assert torch.equal(outside, outside[:1].expand_as(outside))  # nothing moves outside of the window
    assert shown == total
    assert done == wave.total_steps or not wave.starts
    assert not bool(whole[-1].any())
    assert all(turn.length == min(window, total) for turn in turns)


def test_kept_frames_neither_move_nor_delay_others():
    wave = Wave(5, 2, 3, frozenset({0, 2}))
    table = turn_sigmas(wave, wave.turns(5, 0)[0], GRID(wave.steps))
    assert torch.equal(table[:, [1, 3, 4]], wave_sigmas(3, 2, delay=3))
    assert not bool(table[:, [0, 2]].any())
    assert [wave.finished(step) for step in range(9)] == [1, 1, 3, 3, 3, 4, 4, 4, 5]


def test_a_wave_that_leaves_its_window_no_room_names_the_least_delay():
    with pytest.raises(ValueError, match="moves 10 latent frames at once, too many for a window of 9: give a longer"):
        Wave(20, 10, 1).turns(9, 2)
    assert least_delay(10, 9, 2) == 2
    assert len(Wave(20, 10, 2).turns(9, 2)) > 1
    with pytest.raises(ValueError, match="no room for a wave"):
        least_delay(10, 3, 2)
