"""Inspect a dataset: the page and contact sheet show its contents and its faults."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pusa import zoo
from pusa.data.dataset import DatasetWriter, LatentDataset
from pusa.data.inspect import histogram, inspect, measure, unknown_words

SHAPE = (16, 3, 4, 6)


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def still(seed: int) -> Tensor:
    z = noise(seed)
    z[:, 2:] = z[:, 1:2]
    return z


def smooth(seed: int) -> Tensor:
    return F.interpolate(noise(seed, (16, 3, 2, 2)), (4, 6), mode="bilinear")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight clips of noise, a still, a blurred one, a picture; a caption that is code; a duplicate and a bad file."""
    captions = ["", *(f"a fox number {number} in the snow" for number in range(9)), "<script>alert(1)</script>", "hm"]
    clips = {f"noise{number}.mp4": (noise(number), captions[1 + number]) for number in range(8)}
    clips |= {"still.mp4": (still(8), captions[9]), "soft.mp4": (smooth(9), captions[10])}
    clips["picture.png"] = (noise(10)[:, :1], captions[11])
    with DatasetWriter(tmp_path / "clips", model="tiny", max_sequence_length=6) as writer:
        for caption in captions:
            writer.add_prompt(caption, torch.ones(min(6, 1 + len(caption.split())), 48))
        for name, (latents, caption) in clips.items():
            frames = 4 * latents.shape[1] - 3
            start = 2.5 if name == "still.mp4" else 0.0
            clip = {"source": name, "start_seconds": start}
            writer.add(name, latents, caption, fps=16, height=32, width=48, frames=frames, **clip)
    entries = [
        {"source": "bad <b>.mp4", "reason": "is cut short"},
        {"source": "copy.mp4", "reason": "has the same content as noise1.mp4", "duplicate_of": "noise1.mp4"},
    ]
    (tmp_path / "clips" / "skipped.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n")
    return tmp_path / "clips"


def shown(folder: Path, page: Path, **options: Any) -> tuple[str, list[Any]]:
    events = list(inspect(folder, page, **options))
    return page.read_text(), events


def words(page: str) -> str:
    return " ".join(re.sub(r"<style.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL).split())


# --- measures


def test_motion_is_nothing_for_a_still_and_about_one_for_noise():
    assert measure(still(1)).motion == 0
    assert measure(noise(1, (16, 9, 16, 16))).motion == pytest.approx(1.128, abs=0.02)
    assert measure(noise(1)[:, :1]).motion is None
    assert (measure(noise(1)[:, :2]).motion or 0) > 1


def test_detail_falls_with_every_blur_and_not_with_contrast():
    sharp = noise(2, (16, 3, 32, 32))
    once = F.avg_pool2d(F.pad(sharp, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    twice = F.avg_pool2d(F.pad(once, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    details = [measure(z).detail for z in (sharp, once, twice)]
    assert details[0] > 2 * details[1] > 4 * details[2] > 0
    assert measure(0.1 * sharp + 3).detail == pytest.approx(details[0], rel=1e-3)


def test_a_histogram_counts_all_values():
    bars = histogram("Length", "seconds", [1, 1, 2, 5], "")["bars"]
    assert [bar["label"] for bar in bars] == ["1: 2", "2: 1", "3: 0", "4: 0", "5: 1"]
    assert [bar["height"] for bar in bars] == [100, 50, 0, 0, 50]
    assert len(histogram("Motion", "", [0.1, 0.2, 0.35], "")["bars"]) == 24
    assert histogram("Same", "", [2.06, 2.06], "")["bars"] == [{"height": 100, "label": "2.06: 2"}]
    assert histogram("None", "", [], "") == {}


# --- the page and the sheet


def test_the_page_shows_what_is_in_the_dataset(folder, tmp_path):
    page, events = shown(folder, tmp_path / "look.html")
    text = words(page)
    assert "11 clips, 1 of them pictures" in text
    assert "1 / 1 duplicates / left out" in text
    assert "48 x 32 9 10" in text  # a bucket: size, frames, clips
    assert "copy.mp4 is noise1.mp4" in text
    assert "fox 9" in text
    assert page.count("<figure") == 11
    assert "still.mp4 at 2.50 s: 9 frames, motion 0.00" in text
    assert [event.path for event in events if event.kind == "done"] == [tmp_path / "look.html", tmp_path / "look.png"]


def test_what_is_worth_a_look_is_named(folder, tmp_path):
    text = words(shown(folder, tmp_path / "look.html", clips=0)[0])
    assert re.search(r"1 clip hardly moves, compared with the others\W+still\.mp4", text)
    assert re.search(r"1 clip is blurred, compared with the others\W+soft\.mp4", text)
    assert re.search(r"9 captions fill all 6 tokens", text)
    assert "fewer than three words" in text
    assert "fill no batch" in text


def test_captions_and_names_are_text_and_nothing_else(folder, tmp_path):
    page, _ = shown(folder, tmp_path / "look.html")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "bad &lt;b&gt;.mp4" in page


def test_the_page_needs_no_other_file(folder, tmp_path):
    page, _ = shown(folder, tmp_path / "look.html")
    assert set(re.findall(r'(?:src|href)="([^",]*)', page)) == {"data:image/jpeg;base64"}
    assert "http" not in page.replace("http-equiv", "")


def test_the_sheet_has_a_strip_for_each_clip_from_still_to_lively(folder, tmp_path):
    page, _ = shown(folder, tmp_path / "look.html", clips=3, frames=2)
    sheet = Image.open(tmp_path / "look.png")
    height = 20 + 240 * 32 // 48 + 6  # a line of text, two frames of 240 pixels side by side, a gap
    assert sheet.size == (2 * (240 + 6) + 6, 6 + 20 + 3 * height)
    motions = [float(value) for value in re.findall(r"motion (\d\.\d\d),", page)]
    assert motions == sorted(motions)
    assert len(motions) == 2  # the third is a picture


def test_without_a_model_there_is_a_page_without_pictures(folder, tmp_path):
    facts = folder / "dataset.json"
    facts.write_text(facts.read_text().replace('"tiny"', '"gone"'))
    page, events = shown(folder, tmp_path / "look.html")
    assert "<figure" not in page
    assert "11 clips" in words(page)
    assert "no pictures" in next(event.message for event in events if event.kind == "note")
    assert not (tmp_path / "look.png").exists()
    assert shown(folder, tmp_path / "again.html", model="tiny")[0].count("<figure") == 11


def test_what_cannot_be_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="clips=-1"):
        inspect(folder, tmp_path / "look.html", clips=-1)
    with pytest.raises(FileNotFoundError, match="make it first"):
        list(inspect(folder, tmp_path / "nowhere" / "look.html"))
    with pytest.raises(FileNotFoundError, match="holds no dataset"):
        list(inspect(tmp_path / "nowhere", tmp_path / "look.html"))


@pytest.mark.skipif("mini" not in zoo.ZOO, reason="the package lacks its weights")
def test_words_that_the_embedded_model_does_not_know_are_listed(tmp_path):
    with DatasetWriter(tmp_path / "clips", model="mini", max_sequence_length=8) as writer:
        for number, caption in enumerate(["a cat spins", "a wombat spins", "a wombat on a trampoline"]):
            writer.add_prompt(caption, torch.randn(3, 8))
            writer.add(f"clip-{number}", noise(number), caption, fps=16, width=48, height=32, frames=17)
        writer.add_prompt("", torch.randn(1, 8))
    assert unknown_words(LatentDataset(tmp_path / "clips")) == [("wombat", 2), ("trampoline", 1)]
    page, events = shown(tmp_path / "clips", tmp_path / "look.html", clips=0)
    notes = [event.message for event in events if event.kind == "note"]
    assert any("wombat (2), trampoline (1)" in note and "pusa models show mini" in note for note in notes)
    assert "Words that mini does not know" in page


def test_a_model_that_reads_any_text_has_no_unknown_words(folder):
    assert unknown_words(LatentDataset(folder)) == []
