"""Resolve requests for each base: what they may leave out, what they get by default, and what they cannot have."""

from dataclasses import replace
from typing import Any

import pytest
from bases import BASES, TinyBase
from studied_bases import Studied

from pusa.models.bases import BASES as ALL_BASES
from pusa.models.bases import FVDMBase, MochiBase, defaults_in
from pusa.request import GenerationRequest, ResolvedRequest

MOCHI, FVDM = MochiBase.defaults, FVDMBase.defaults
CLASSES = replace(FVDM, classes=5)


def resolved(defaults: Any, **asked: Any) -> ResolvedRequest:
    return GenerationRequest(model="a model", **asked).resolved(defaults)


def test_every_base_has_a_tiny_model_in_these_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    assert len({base.name.partition("-")[0] for base in BASES}) >= len(ALL_BASES)


def test_a_folder_tells_its_defaults(studied: Studied) -> None:
    base: TinyBase = studied.base
    found = defaults_in(studied.folder)
    assert found == studied.pipe.defaults
    assert found.frames_per_latent == base.factor == studied.pipe.vae_scale_factor_temporal
    assert found.has_text == studied.pipe.base.has_text
    if not found.has_text:
        assert (found.width, found.height, found.num_frames, found.longest_window) == (64, 64, 16, 16)
        assert found.classes == (studied.pipe.transformer.config.num_classes or 0)
        assert found.guidance == (7 if found.classes else 1)


def test_a_prompt_is_needed_where_it_is_text_and_a_class_elsewhere() -> None:
    with pytest.raises(ValueError, match="the prompt is empty: say what the video shows, or give an image or a video"):
        resolved(MOCHI, prompt=" ")
    assert resolved(FVDM).prompt == ""
    with pytest.raises(ValueError, match="prompt='a cat': this model knows neither text nor classes"):
        resolved(FVDM, prompt="a cat")
    assert [resolved(CLASSES, prompt=text).prompt for text in ("", "4")] == ["", "4"]
    for asked in ({"prompt": "5"}, {"prompt": "a cat"}, {"prompts": ["1", "-1"]}, {"negative_prompt": "blur"}):
        with pytest.raises(ValueError, match=r"is the number of a class, 0\.\.4, or empty"):
            resolved(CLASSES, **asked)


def test_fvdm_keeps_what_is_given_as_it_is_unless_asked_otherwise() -> None:
    """Keep them because it was trained without noise multipliers."""
    given = [{"file": "a.png"}, {"kind": "video", "file": "a.mp4", "positions": [3, 4]}]
    assert [spec.noise for spec in resolved(FVDM, conditions=given).conditions] == [[0.0], [0.0, 0.0]]
    assert resolved(FVDM, conditions=given[:1], preset="creative").conditions[0].noise == [0.4]


def test_a_sampler_without_a_shift_and_a_model_without_words_take_neither_shift_nor_guidance() -> None:
    with pytest.raises(ValueError, match="shift=5: this model samples at evenly spaced timesteps: leave the shift out"):
        resolved(FVDM, shift=5)
    with pytest.raises(ValueError, match="guidance=3: this model reads no prompt, so that nothing can guide it"):
        resolved(FVDM, guidance=3)
    assert resolved(CLASSES, prompt="1", guidance=3, shift=1).guidance == 3
    assert resolved(MOCHI, prompt="a cat", shift=5).shift == 5


def test_a_long_fvdm_is_made_in_chunks_of_16_frames_of_which_8_are_context() -> None:
    """Make chunks as published; refuse a larger one, which the network has no positions for, before any work."""
    long = resolved(FVDM, frames=128)
    assert (long.window, long.overlap) == (16, 8)
    assert 16 + 14 * (16 - 8) == 128  # 15 chunks
    with pytest.raises(ValueError, match="window=32: this model makes at most 16 frames at once: leave the window out"):
        resolved(FVDM, frames=64, window=32)
    assert resolved(FVDM, frames=12, window=32).window == 12
    two_sides = [
        resolved(FVDM, task=task, conditions=[{"kind": "video", "file": "a.mp4"}] * count).overlap
        for task, count in (("transition", 2), ("loop", 0))
    ]
    assert two_sides == [7, 7]  # two frames are left to make
    assert resolved(MOCHI, prompt="a cat", frames=325).overlap == 19  # 4 latent frames, as V0.5's extension
