"""Prepare a dataset from videos with captions, whatever is wrong with them and whenever it stops."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from media_samples import grey_levels, write
from PIL import Image

from pusa.conditions import pixels
from pusa.data import prepare as preparing
from pusa.data import sources
from pusa.data.clips import Cut, clip_starts, cut, frames_at, nearest_size
from pusa.data.dataset import ClipInfo, LatentDataset
from pusa.data.encoding import ClipEncoder
from pusa.data.prepare import ClipSettings, prepare
from pusa.media import read_video
from pusa.pipeline import PusaPipeline

SETTINGS = ClipSettings(model="tiny", sizes=((32, 32), (48, 32)), frames=(5, 9), fps=16)


def moving(seed: int, frames: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """uint8 [F, H, W, 3]: a texture that wanders, another one for each seed."""
    width, height = size
    texture = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    texture = np.kron(texture, np.ones((4, 4, 1), np.uint8))
    return np.stack([np.roll(texture, number, axis=1) for number in range(frames)])


def film(folder: Path, name: str, caption: str | None, pixels: np.ndarray, fps: float = 16) -> Path:
    path = write(folder / name, pixels, fps=fps, lossless=True)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def made(
    source: Path, output: Path, settings: ClipSettings = SETTINGS, *, workers: int = 0, **more: Any
) -> tuple[LatentDataset, list[str]]:
    """The dataset, and the notes of the run."""
    events = list(prepare(source, output, settings, workers=workers, **more))
    assert (events[-1].kind, events[-1].path) == ("done", output)
    return LatentDataset(output), [event.message or "" for event in events if event.kind == "note"]


def skipped(output: Path) -> dict[str, str]:
    lines = (output / "skipped.jsonl").read_text().splitlines()
    return {entry["source"]: entry["reason"] for entry in map(json.loads, lines)}


def by_source(data: LatentDataset) -> dict[str, tuple[int, ClipInfo]]:
    return {clip.source: (index, clip) for index, clip in enumerate(data.clips)}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos, one of them wide, a picture, and all that can be wrong with a file."""
    folder = tmp_path_factory.mktemp("videos")
    film(folder, "a.mp4", "a fox", moving(1, 12))
    (folder / "deeper").mkdir()
    film(folder / "deeper", "b.mp4", "a  wide\nfox", moving(2, 6, (96, 64)))
    film(folder, "c.mp4", "a fox", moving(3, 7))
    Image.fromarray(moving(4, 1, (40, 32))[0]).save(folder / "d.png")
    (folder / "d.txt").write_text("a picture")
    (folder / "e copy.mp4").write_bytes((folder / "a.mp4").read_bytes())
    (folder / "e copy.txt").write_text("another name")
    half = (folder / "c.mp4").read_bytes()
    (folder / "half.mp4").write_bytes(half[: len(half) // 2])
    (folder / "half.txt").write_text("cut short")
    (folder / "page.mp4").write_text("<html>not found</html>")
    (folder / "page.txt").write_text("no video")
    film(folder, "short.mp4", "too short", moving(5, 3))
    film(folder, "silent.mp4", None, moving(6, 9))
    (folder / ".hidden.mp4").write_bytes(half)
    return folder


@pytest.fixture(scope="module")
def prepared(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LatentDataset, list[str]]:
    output = tmp_path_factory.mktemp("prepared") / "clips"
    return output, *made(videos, output)


# --- what comes out


def test_clips_are_what_the_pipeline_would_encode(videos, prepared):
    data = prepared[1]
    pipe = PusaPipeline.from_pretrained("tiny")
    index, clip = by_source(data)["a.mp4"]
    frames = read_video(videos / "a.mp4", fps=16, max_frames=9)
    latents = pipe.encode_frames(pixels([Image.fromarray(frame) for frame in frames]))[0]
    assert torch.equal(data.latents(index), latents.bfloat16().float())
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt(["a fox"], do_classifier_free_guidance=False, max_sequence_length=64)
    rows = data.embeds(index).shape[0]
    assert torch.allclose(data.embeds(index), embeds[0, :rows], atol=1e-5)
    assert not embeds[0, rows:].any()
    assert (clip.frames, clip.width, clip.height, clip.fps, clip.caption) == (9, 32, 32, 16.0, "a fox")
    assert len(clip.sha256) == 64


def test_each_clip_goes_to_the_bucket_that_fits_it(prepared):
    shapes = {name: (clip.width, clip.height, clip.frames) for name, (_, clip) in by_source(prepared[1]).items()}
    assert shapes == {
        "a.mp4": (32, 32, 9),
        "c.mp4": (32, 32, 5),
        "d.png": (32, 32, 1),
        "deeper/b.mp4": (48, 32, 5),
    }
    assert set(prepared[1].buckets) == {(16, 3, 4, 4), (16, 2, 4, 4), (16, 1, 4, 4), (16, 2, 4, 6)}


def test_what_cannot_be_used_is_listed_with_the_reason(prepared):
    output, _, notes = prepared
    reasons = skipped(output)
    assert list(reasons) == ["e copy.mp4", "half.mp4", "page.mp4", "short.mp4", "silent.mp4"]
    assert reasons["e copy.mp4"] == "has the same content as a.mp4"
    assert reasons["half.mp4"].startswith("is cut short")
    assert reasons["page.mp4"].startswith("is a web page, not a video")
    assert reasons["short.mp4"].startswith("is too short (3 frames at 16 fps, the shortest clip has 5): give a smaller")
    assert "has no caption" in reasons["silent.mp4"]
    assert notes[-1].startswith("3 clips of 1 s and 1 picture (32x32x1: 1, ")
    assert "left out: 1 duplicate and 4 files" in notes[-1]


def test_a_reason_that_many_share_is_in_the_summary(tmp_path):
    film(tmp_path, "a.mp4", "a fox", moving(1, 9))
    for number in range(3):
        film(tmp_path, f"short{number}.mp4", "a fox", moving(2 + number, 2 + number))
    notes = made(tmp_path, tmp_path / "clips")[1]
    assert notes[-1].startswith("1 clip of 1 s (")
    assert notes[-1].endswith("skipped.jsonl; 3 of them: is too short: give a smaller --frames as well")


def test_a_caption_is_encoded_once_and_its_white_space_does_not_count(prepared):
    data = prepared[1]
    assert by_source(data)["deeper/b.mp4"][1].caption == "a wide fox"
    assert len({clip.prompt for clip in data.clips}) == 3
    assert data.empty_embeds.shape[0] == 1


def test_several_processes_make_the_same_dataset(videos, prepared, tmp_path):
    output, data, _ = prepared
    other, _ = made(videos, tmp_path / "clips", workers=2)
    assert other.hash == data.hash
    assert all(torch.equal(other.latents(i), data.latents(i)) for i in range(len(data)))
    assert skipped(tmp_path / "clips") == skipped(output)


def test_several_devices_keep_the_order(tiny_vae):
    """Two copies of the VAE stand for two GPUs."""
    encoder = ClipEncoder(tiny_vae(), [torch.device("cpu")] * 2)
    clips = [moving(seed, 5) for seed in range(5)]
    taken = []

    def given() -> Iterator[tuple[int, np.ndarray]]:
        for number, clip in enumerate(clips):
            taken.append(number)
            yield number, clip

    results = encoder.encode_all(given())
    first = next(results)
    assert len(taken) <= 3
    numbers, latents = zip(first, *results, strict=True)
    assert numbers == (0, 1, 2, 3, 4)
    alone = ClipEncoder(tiny_vae(), [torch.device("cpu")])
    assert all(torch.equal(z, alone.encode(clip)) for z, clip in zip(latents, clips, strict=True))


# --- stopped and run again


def test_what_was_done_is_not_done_again(videos, tmp_path, monkeypatch):
    source, output = tmp_path / "videos", tmp_path / "clips"
    source.mkdir()
    film(source, "a.mp4", "a fox", moving(1, 9))
    made(source, output)
    monkeypatch.setattr(preparing, "load_vae", lambda _: pytest.fail("nothing is to be encoded"))
    made(source, output)
    (source / "a.txt").write_text("a red fox")
    assert made(source, output)[0].clips[0].caption == "a red fox"
    monkeypatch.undo()
    film(source, "b.mp4", "a wolf", moving(2, 9))
    assert len(made(source, output)[0]) == 2


def test_a_stop_keeps_what_is_done(videos, prepared, tmp_path):
    output = tmp_path / "clips"
    stopped = Event()
    for event in prepare(videos, output, SETTINGS, workers=0, stop=stopped.is_set):
        assert event.kind != "done"
        if event.kind == "step" and event.stage == "encode clips":
            stopped.set()
    assert 0 < len(LatentDataset(output)) < len(prepared[1])
    assert made(videos, output)[0].hash == prepared[1].hash


KILLED = """
import os, signal, sys
from functools import partial
from pathlib import Path
import torch
from pusa.data import writer as dataset_writer, prepare as preparing
from pusa.data.encoding import ClipEncoder
from pusa.data.prepare import ClipSettings, prepare

torch.set_num_threads(1)
source, output = map(Path, sys.argv[1:])
settings = ClipSettings(model="tiny", sizes=((32, 32), (48, 32)), frames=(5, 9), fps=16)
preparing.DatasetWriter = partial(preparing.DatasetWriter, flush_seconds=0)  # every clip is a file of its own
rename = dataset_writer.rename_flushed

def run(kill_at):
    count = 0
    def renamed(part, path):
        nonlocal count
        count += 1
        if count == kill_at // 2 and kill_at % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(part, path)
        if count == kill_at // 2:
            os.kill(os.getpid(), signal.SIGKILL)
    dataset_writer.rename_flushed = renamed
    for event in prepare(source, output, settings, workers=0):
        pass
    os._exit(0)

for attempt in range(2, 100, 3):
    child = os.fork()
    if child == 0:
        run(attempt)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        print(os.waitstatus_to_exitcode(status), attempt // 3)
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_before_and_after_every_file_it_makes_the_same_dataset(videos, prepared, tmp_path):
    output = tmp_path / "clips"
    result = subprocess.run(
        [sys.executable, "-c", KILLED, str(videos), str(output)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    code, kills = map(int, result.stdout.split())
    assert code == 0, result.stderr
    assert kills > 3
    data = LatentDataset(output)
    assert data.hash == prepared[1].hash
    assert all(torch.equal(data.latents(i), prepared[1].latents(i)) for i in range(len(data)))
    assert all(torch.equal(data.embeds(i), prepared[1].embeds(i)) for i in range(len(data)))


def test_a_folder_is_not_mixed_with_other_settings(videos, prepared):
    changed = ClipSettings(model="tiny", sizes=SETTINGS.sizes, frames=SETTINGS.frames, fps=8)
    with pytest.raises(ValueError, match=r"was begun with fps=16\.0, not 8\.0"):
        made(videos, prepared[0], changed)


def test_a_bucket_is_added_and_what_is_there_is_not_encoded_again(tmp_path):
    source, output = tmp_path / "videos", tmp_path / "clips"
    source.mkdir()
    film(source, "a.mp4", "a fox", moving(1, 12))
    film(source, "b.mp4", "a boat", moving(2, 6))
    small = ClipSettings(model="tiny", sizes=((32, 32),), frames=(5,), fps=16)
    before, _ = made(source, output, small)
    shards = {path.name: path.read_bytes() for path in (output / "latents").iterdir()}
    (source / "a.txt").write_text("a red fox")
    large = ClipSettings(model="tiny", sizes=((48, 32),), frames=(5, 9), fps=16)
    events = list(prepare(source, output, large, workers=0))
    steps = [event for event in events if event.kind == "step" and event.stage == "encode clips"]
    assert [event.step for event in steps][-1] == 2  # one new clip of each video
    data = LatentDataset(output)
    assert sorted((clip.source, clip.width, clip.frames) for clip in data.clips) == [
        ("a.mp4", 32, 5),
        ("a.mp4", 48, 9),
        ("b.mp4", 32, 5),
        ("b.mp4", 48, 5),
    ]
    assert {clip.caption for clip in data.clips if clip.source == "a.mp4"} == {"a red fox"}  # in both buckets
    for name, content in shards.items():
        assert (output / "latents" / name).read_bytes() == content
    assert {clip.id for clip in before.clips} < {clip.id for clip in data.clips}
    assert data.facts.settings["sizes"] == [[32, 32], [48, 32]]
    assert data.facts.settings["frames"] == [5, 9]
    again, _ = made(source, output, large)
    assert again.hash == data.hash


# --- which frames


def levels(task: Cut) -> dict[int, list[int]]:
    return {clip.start: [int(frame[16, 16, 0]) for frame in clip.pixels] for clip in cut(task)}


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    """40 frames at 16 fps; frame k has the grey level 5 k."""
    return write(tmp_path / "grey.mp4", grey_levels([5 * number for number in range(40)]), fps=16, lossless=True)


def test_clips_are_cut_one_after_the_other_or_every_so_often(grey):
    def task(*starts: int) -> Cut:
        return Cut(0, grey, "video", (32, 32), 5, 16.0, starts)

    whole = {start: [5 * (start + i) for i in range(5)] for start in (0, 3, 5, 35)}
    assert levels(task(0, 3, 5, 35)) == whole  # the first three overlap
    assert levels(task(35)) == {35: whole[35]}  # as after a stop


def test_another_frame_rate_takes_the_nearest_frames(grey):
    assert levels(Cut(0, grey, "video", (32, 32), 5, 8.0, (0, 5))) == {
        0: [0, 10, 20, 30, 40],
        5: [50, 60, 70, 80, 90],
    }


def test_a_clip_is_the_same_wherever_decoding_begins(tmp_path):
    path = write(tmp_path / "thirty.mp4", grey_levels(list(range(0, 250, 5))), fps=30, lossless=True)
    for fps in (16.0, 23.976, 30.0):
        starts = tuple(range(0, 20, 5))
        together = levels(Cut(0, path, "video", (32, 32), 5, fps, starts))
        assert together == {start: levels(Cut(0, path, "video", (32, 32), 5, fps, (start,)))[start] for start in starts}


def test_a_video_that_ends_early_gives_the_clips_that_are_whole(grey):
    clips = cut(Cut(0, grey, "video", (32, 32), 9, 16.0, (0, 30, 36)))
    assert [next(clips).start, next(clips).start] == [0, 30]
    with pytest.raises(ValueError, match=r"ends after 40 frames at 16 fps, .* 1 clips are not whole"):
        next(clips)


def test_the_middle_is_cut_out_and_nothing_is_stretched(tmp_path):
    pixels = np.zeros((5, 64, 160, 3), np.uint8)
    pixels[:, :, 48:112] = 200  # the middle 64 columns
    path = write(tmp_path / "wide.mp4", pixels, fps=16, lossless=True)
    [clip] = cut(Cut(0, path, "video", (32, 32), 5, 16.0, (0,)))
    assert clip.pixels.shape == (5, 32, 32, 3)
    assert clip.pixels[:, :, 2:-2].min() > 190
    [clip] = cut(Cut(0, path, "video", (160, 128), 5, 16.0, (0,)))  # enlarged
    assert clip.pixels.shape == (5, 128, 160, 3)


def test_long_videos_make_several_clips(tmp_path):
    film(tmp_path, "long.mp4", "a long walk", moving(1, 40))
    settings = ClipSettings(model="tiny", sizes=((32, 32),), frames=(5,), fps=16, clips_per_video=None)
    data, _ = made(tmp_path, tmp_path / "all", settings)
    assert sorted(clip.start_seconds for clip in data.clips) == [number * 5 / 16 for number in range(8)]
    spaced = ClipSettings(model="tiny", sizes=((32, 32),), frames=(5,), fps=16, clips_per_video=2, stride_seconds=1.0)
    data, _ = made(tmp_path / "long.mp4", tmp_path / "two", spaced, caption="a long walk")
    assert sorted(clip.start_seconds for clip in data.clips) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("size", "chosen"),
    [((1920, 1080), (1280, 720)), ((848, 480), (832, 480)), ((1080, 1920), (480, 832)), ((1000, 1000), (624, 624))],
)
def test_the_size_needs_little_cutting_and_no_enlarging(size, chosen):
    assert nearest_size(*size, [(832, 480), (1280, 720), (480, 832), (624, 624)]) == chosen


def test_starts_fill_the_video_and_no_more():
    assert clip_starts(17, 5, 16, clips=None, stride_seconds=None) == [0, 5, 10]
    assert clip_starts(17, 5, 16, clips=2, stride_seconds=0.25) == [0, 4]
    assert clip_starts(4, 5, 16, clips=None, stride_seconds=None) == []
    assert frames_at(81 / 16, 16) == 81
    assert frames_at(80.05 / 16, 16) == 80


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": ((830, 480),)}, "size 830x480: sides are multiples of 16; give 832x480"),
        ({"frames": (80,)}, r"frames=80: a clip has 4n \+ 1 frames; give 81"),
        ({"fps": 0.0}, "fps=0.0 is not above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ClipSettings(model="tiny", **settings)


def test_sizes_follow_from_the_model():
    settings = ClipSettings(model="wan2.1-14b").resolved()
    assert settings.sizes == ((480, 832), (624, 624), (832, 480))
    assert (settings.frames, settings.fps) == ((81,), 16.0)


# --- where captions come from


def captions(listing: sources.Listing) -> dict[str, str]:
    return {item.name: item.caption for item in listing.items}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4", "c.png"):
        (folder / name).write_bytes(b"x")
    return folder


def test_captions_lie_beside_the_files_or_in_tables(files):
    (files / "a.txt").write_text("\ufeffbeside a")
    (files / "b.mp4.txt").write_text("beside b")
    assert captions(sources.list_files(files)) == {"a.mp4": "beside a", "b.mp4": "beside b"}
    (files / "captions.json").write_text(json.dumps({"b.mp4": "in json", "c": "by its stem"}))
    assert captions(sources.list_files(files)) == {"a.mp4": "beside a", "b.mp4": "in json", "c.png": "by its stem"}
    (files / "metadata.csv").write_text('file_name,text\na.mp4,"in csv, quoted"\n')
    assert captions(sources.list_files(files))["a.mp4"] == "in csv, quoted"
    own = files / "own.jsonl"
    own.write_text('{"file": "a.mp4", "caption": "given\\u2028apart"}\n')
    assert captions(sources.list_files(files, captions=own))["a.mp4"] == "given apart"
    assert captions(sources.list_files(files, caption="for the rest"))["c.png"] == "by its stem"


def test_files_without_a_caption_are_left_out_or_get_the_default(files):
    (files / "a.txt").write_text("beside a")
    listing = sources.list_files(files)
    assert [name for name, _ in listing.skipped] == ["b.mp4", "c.png"]
    assert captions(sources.list_files(files, caption="waves"))["c.png"] == "waves"


def test_datasets_in_the_folder_are_no_data(files):
    (files / "clips" / "deeper").mkdir(parents=True)
    (files / "clips" / "dataset.json").write_text("{}")
    (files / "clips" / "deeper" / "sheet.png").write_bytes(b"x")
    assert set(captions(sources.list_files(files, caption="waves"))) == {"a.mp4", "b.mp4", "c.png"}


@pytest.mark.parametrize("columns", [("video", "prompt"), ("file_name", "text"), ("File", "Caption")])
@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
def test_tables_name_files_beside_them(files, suffix, columns):
    rows = [dict(zip(columns, row, strict=True)) for row in (("b.mp4", "two"), ("a.mp4", "one, or\nmore"))]
    table = files / f"table.{suffix}"
    if suffix == "csv":
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    else:
        table.write_text(json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows)))
    listing = sources.list_files(table)
    assert captions(listing) == {"b.mp4": "two", "a.mp4": "one, or more"}
    assert listing.items[0].path == files / "b.mp4"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "film,words\na.mp4,x\n", "has the columns film, words: one of"),
        ("t.jsonl", "{not json}", "is no JSON"),
        ("t.json", "[1, 2]", "holds ints"),
        ("t.csv", "file,caption\n", "has no rows"),
        ("t.jsonl", '{"file": 3, "caption": "x"}', "row 1: file is 3"),
    ],
)
def test_tables_that_say_nothing_are_refused(files, name, text, message):
    (files / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        sources.list_files(files / name)


def test_missing_sources_are_an_error_that_names_them(tmp_path, files):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        sources.list_files(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no videos"):
        sources.list_files(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"none of 3 files can be used; a\.mp4 has no caption"):
        sources.list_files(files)


def test_prompts_come_from_lines_or_tables(tmp_path):
    lines, table = tmp_path / "prompts.txt", tmp_path / "prompts.csv"
    lines.write_text("a fox\n\n  two   foxes \n")
    table.write_text("prompt\na fox\ntwo foxes\n")
    assert sources.read_prompts(lines) == sources.read_prompts(table) == ["a fox", "two foxes"]
    lines.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        sources.read_prompts(lines)


# --- the original's data, the Hub, `datasets`


@pytest.fixture
def original(prepared: Any, tmp_path: Path) -> Path:
    """A dataset in the layout of the original's training set, from this model's encoders."""
    data, folder = prepared[1], tmp_path / "original"
    (folder / "train").mkdir(parents=True)
    lines = ["file_name,text"]
    for index in range(2):
        padded = torch.zeros(64, 48)
        padded[: data.embeds(index).shape[0]] = data.embeds(index)
        content = {"latents": data.latents(index).bfloat16(), "prompt_emb": {"context": padded[None]}, "image_emb": {}}
        torch.save(content, folder / "train" / f"v{index}.mp4.tensors.pth")
        lines.append(f"v{index}.mp4,{data.clips[index].caption}")
    (folder / "metadata.csv").write_text("\n".join([*lines, "gone.mp4,not here"]) + "\n")
    return folder


def test_the_originals_data_is_taken_over(original, prepared, tmp_path):
    data, _ = made(original, tmp_path / "clips", ClipSettings(model="tiny"))
    assert [clip.source for clip in data.clips] == ["v0.mp4", "v1.mp4"]
    for index in range(2):
        assert torch.equal(data.latents(index), prepared[1].latents(index))
        assert torch.equal(data.embeds(index), prepared[1].embeds(index))
    assert torch.equal(data.empty_embeds, prepared[1].empty_embeds)
    assert "is missing" in skipped(tmp_path / "clips")["gone.mp4"]
    with pytest.raises(ValueError, match="holds latents"):
        made(original, tmp_path / "other", SETTINGS)


def test_data_of_another_text_encoder_is_not_taken_over(original, tmp_path):
    path = original / "train" / "v0.mp4.tensors.pth"
    content = torch.load(path, weights_only=True)
    content["prompt_emb"]["context"] = content["prompt_emb"]["context"].roll(1, dims=-1)
    torch.save(content, path)
    with pytest.raises(ValueError, match="not from this model's text encoder"):
        made(original, tmp_path / "clips", ClipSettings(model="tiny"))


def test_a_dataset_of_the_hub_is_downloaded_first(original, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, path in enumerate(sorted(original.rglob("*.*"))):  # the Hub's cache holds links
        blob = tmp_path / f"blob{number}"
        path.rename(blob)
        path.symlink_to(blob)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.append((name, options)) or str(original)
    )
    events = list(prepare("owner/name", tmp_path / "clips", ClipSettings(model="tiny"), workers=0))
    assert asked == [("owner/name", {"repo_type": "dataset"})]
    assert events[-1].kind == "done"
    assert len(LatentDataset(tmp_path / "clips")) == 2


def test_an_unreachable_hub_is_an_error_that_names_the_repository(monkeypatch, tmp_path):
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError, match="owner/name is no folder here and cannot be had from the Hub"):
        list(prepare("owner/name", tmp_path / "clips", ClipSettings(model="tiny"), workers=0))


def test_what_the_datasets_library_saves_is_read(videos, prepared, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the optional `datasets` library is not installed: pusa[data]")
    rows = {"video": [(videos / "a.mp4").read_bytes(), b"no video"], "caption": ["a fox", "nothing"]}
    data = datasets.Dataset.from_dict({**rows, "video": [{"bytes": b, "path": None} for b in rows["video"]]})
    data.cast_column("video", datasets.Video(decode=False)).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "tables").mkdir()
    data.to_parquet(str(tmp_path / "tables" / "train.parquet"))
    index = by_source(prepared[1])["a.mp4"][0]
    for name in ("saved", "tables"):
        found, _ = made(tmp_path / name, tmp_path / f"{name}-clips")
        assert torch.equal(found.latents(0), prepared[1].latents(index))
        assert "000001" in skipped(tmp_path / f"{name}-clips")


def test_without_the_datasets_library_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match=r"pip install 'pusa\[data\]'"):
        sources.list_files(tmp_path)
