"""A run says what it converted or left out of its inputs, and where it cut a long prompt."""

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from color_samples import CHART, TO_P3, chart_pixels, chart_video, linear, srgb
from media_samples import picture_bytes
from PIL import Image
from pydantic import ValidationError

from pusa.events import Note
from pusa.generate import generate
from pusa.generate.prompt_hints import cut_note, unknown_words
from pusa.models.tiny import tokenizer
from pusa.request import ConditionSpec, GenerationRequest, explain


def notes_of(output: Path, **request: Any) -> list[str]:
    events = generate(GenerationRequest(model="tiny", seed=0, steps=1, frames=5, **request), output)
    return [event.message for event in events if isinstance(event, Note)]


def with_sound(video: bytes) -> bytes:
    """The same video beside a silent sound track."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(buffer, "w", format="mp4") as output:
        pictures = output.add_stream_from_template(source.streams.video[0])
        sound = output.add_stream("aac", rate=44_100)
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = pictures
                output.mux(packet)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44_100
        output.mux(sound.encode(silence))
        output.mux(sound.encode(None))
    return buffer.getvalue()


def test_a_run_tells_what_it_made_of_its_inputs(tmp_path: Path) -> None:
    wide = srgb((linear(CHART) @ TO_P3.T).clip(0, 1))
    clip = with_sound(chart_video(wide, matrix=1, colorspace=1, color_primaries=12, color_trc=1))
    (tmp_path / "clip.mp4").write_bytes(clip)
    picture = Image.fromarray(chart_pixels(CHART / 255, 160, 96, depth=8))
    picture.putalpha(100)
    (tmp_path / "start.png").write_bytes(picture_bytes(picture, "PNG"))
    conditions = [
        ConditionSpec(kind="video", file=str(tmp_path / "clip.mp4"), positions=[0]),
        ConditionSpec(file=str(tmp_path / "start.png"), positions=[1]),
    ]
    notes = notes_of(tmp_path / "out.mp4", prompt="a cat", conditions=conditions)
    assert notes[-1].startswith("no Pusa LoRA is loaded")
    assert notes[:-1] == [
        "clip.mp4: its colours were converted from P3 to sRGB",
        "clip.mp4: its sound is left out",
        "start.png: its transparency is shown on white",
    ]


def test_a_run_tells_where_it_cuts_a_long_prompt(tmp_path: Path) -> None:
    """The tiny model has a token per byte, and 64 of them with the mark of the end."""
    text = "a cat walks " * 5 + "to the end of the street"
    assert notes_of(tmp_path / "out.mp4", prompt=text, guidance=1.0) == [
        "the prompt has 85 tokens, the limit is 64: it is cut before 'the end of the street'; shorten it to keep that"
    ]
    assert notes_of(tmp_path / "out.mp4", prompt=text[:63], guidance=1.0) == []
    (note,) = notes_of(tmp_path / "out.mp4", prompt="a cat", negative_prompt=text, guidance=3.0)
    assert note.startswith("the negative prompt has 85 tokens")


def test_a_language_without_blanks_is_cut_at_a_character() -> None:
    note = cut_note("prompt", "一只鸭子" * 40, tokenizer(), 64)
    assert note is not None
    assert note.startswith("the prompt has 481 tokens, the limit is 64: it is cut before '一只鸭子一只鸭子")
    assert len(note) < 160


def test_hints_look_only_at_what_is_read() -> None:
    text = "a cat slides to the right under the sea, " * 9 + "and a xylograph explodes"
    assert unknown_words(text, "mini") == []
    assert [one.word for one in unknown_words("a xylograph, " + text, "mini")] == ["xylograph"]


@pytest.mark.parametrize(
    ("name", "way_out"), [("seed", "leave it out: one is drawn"), ("steps", "leave it out: the model's")]
)
def test_minus_one_is_told_to_leave_the_field_out(name: str, way_out: str) -> None:
    with pytest.raises(ValidationError) as refused:
        GenerationRequest(prompt="a cat", **{name: -1})
    assert way_out in explain(refused.value)
