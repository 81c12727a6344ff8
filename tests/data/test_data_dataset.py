"""Write and read datasets of clips, whatever interrupts the writer."""

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pusa.data.dataset import DatasetWriter, LatentDataset, caption_key

TEXT_LENGTH, TEXT_WIDTH = 8, 6
SIZE = {"fps": 16, "height": 32, "width": 48}


def noise(seed: int, frames: int = 2) -> Tensor:
    return torch.randn(4, frames, 4, 6, generator=torch.Generator().manual_seed(seed))


def embeds(caption: str) -> Tensor:
    """Make embeddings of one token per word, padded with zero rows."""
    rows = len(caption.split()) + 1
    values = torch.randn(rows, TEXT_WIDTH, generator=torch.Generator().manual_seed(len(caption)))
    return torch.cat([values, torch.zeros(TEXT_LENGTH - rows, TEXT_WIDTH)])


def opened(folder: Path, **options: Any) -> DatasetWriter:
    return DatasetWriter(folder, **{"model": "tiny", "max_sequence_length": TEXT_LENGTH, **options})


def write(folder: Path, clips: dict[str, str], *, seeds: dict[str, int] | None = None, **options: Any) -> Path:
    """Clips by id with their captions; those whose id begins with "long" have three latent frames."""
    with opened(folder, **options) as writer:
        fill(writer, clips, seeds=seeds)
    return folder


def fill(writer: DatasetWriter, clips: dict[str, str], *, seeds: dict[str, int] | None = None) -> None:
    for caption in {"", *clips.values()}:
        writer.add_prompt(caption, embeds(caption))
    for clip, caption in clips.items():
        frames = 3 if clip.startswith("long") else 2
        latents = noise((seeds or {}).get(clip, len(clip)), frames)
        writer.add(clip, latents, caption, **SIZE, frames=4 * frames - 3, source=f"{clip}.mp4", start_seconds=0.5)


CLIPS = {"b": "a fox", "long-a": "a cat sleeps", "a": "a fox", "ccc": "waves"}


# --- written and read


def test_what_is_written_is_read(tmp_path):
    data = LatentDataset(write(tmp_path / "d", CLIPS))
    assert len(data) == 4
    assert [clip.id for clip in data.clips] == ["a", "b", "ccc", "long-a"]
    assert data.buckets == {(4, 2, 4, 6): [0, 1, 2], (4, 3, 4, 6): [3]}
    latents = data.latents(3)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, noise(6, 3).bfloat16().float())
    assert data.max_sequence_length == TEXT_LENGTH
    clip = data.clips[3]
    assert (clip.frames, clip.height, clip.width, clip.fps, clip.start_seconds) == (9, 32, 48, 16.0, 0.5)
    assert (clip.caption, clip.prompt, clip.source) == ("a cat sleeps", caption_key("a cat sleeps"), "long-a.mp4")


def test_embeddings_come_without_padding_and_the_empty_caption_is_always_there(tmp_path):
    data = LatentDataset(write(tmp_path / "d", CLIPS))
    assert torch.equal(data.embeds(3), embeds("a cat sleeps")[:4])
    assert torch.equal(data.empty_embeds, embeds("")[:1])


def test_fp32_latents_are_kept_to_the_bit(tmp_path):
    data = LatentDataset(write(tmp_path / "d", {"a": "x"}, dtype=torch.float32))
    assert torch.equal(data.latents(0), noise(1))


def test_what_is_read_may_be_changed(tmp_path):
    data = LatentDataset(write(tmp_path / "d", {"a": "x"}, dtype=torch.float32))
    data.latents(0).zero_()
    data.embeds(0).zero_()
    assert torch.equal(data.latents(0), noise(1))
    assert data.embeds(0).any()


def test_the_layout_is_the_documented_one(tmp_path):
    folder = write(tmp_path / "d", CLIPS)
    facts = json.loads((folder / "dataset.json").read_text())
    assert (facts["format"], facts["version"], facts["model"]) == ("pusa-dataset", 1, "tiny")
    assert (facts["latent_channels"], facts["max_sequence_length"]) == (4, TEXT_LENGTH)
    lines = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == set(CLIPS)
    assert sorted(path.name for path in (folder / "latents").iterdir()) == [
        "4x2x4x6-00000.safetensors",
        "4x3x4x6-00000.safetensors",
    ]
    assert len(list((folder / "prompts").iterdir())) == 1


@pytest.mark.parametrize("caption", ["two\nlines", "a\u2028b\u0085c", "émigré 狐狸 🦊", '"quoted" \\ back', "x" * 5000])
def test_any_caption_survives(tmp_path, caption):
    folder = tmp_path / "d"
    with opened(folder) as writer:
        writer.add_prompt("", embeds(""))
        writer.add_prompt(caption, embeds("a fox"))
        writer.add("a", noise(1), caption, **SIZE, frames=5)
    data = LatentDataset(folder)
    assert data.clips[0].caption == caption
    assert torch.equal(data.embeds(0), embeds("a fox")[:3])


def test_shards_are_cut_at_their_size(tmp_path):
    folder = write(tmp_path / "d", {str(number): "x" for number in range(5)}, shard_bytes=2 * noise(0).numel() * 2)
    assert len(list((folder / "latents").iterdir())) == 3
    data = LatentDataset(folder)
    assert all(torch.equal(data.latents(i), noise(1).bfloat16().float()) for i in range(5))


# --- order, identity, parts of it


def test_the_hash_is_that_of_the_clips_and_not_of_their_files(tmp_path):
    one = LatentDataset(write(tmp_path / "one", CLIPS))
    backwards = dict(reversed(CLIPS.items()))
    other = LatentDataset(write(tmp_path / "other", backwards, shard_bytes=1))
    changed = LatentDataset(write(tmp_path / "changed", {**CLIPS, "a": "a wolf"}))
    assert one.hash == other.hash
    assert changed.hash != one.hash
    assert [clip.id for clip in one.clips] == [clip.id for clip in other.clips]


def test_a_split_depends_on_ids_and_seed_alone(tmp_path):
    clips = {f"{number:03d}": "x" for number in range(40)}
    data = LatentDataset(write(tmp_path / "d", clips))
    train, held_out = data.split(0.1, seed=3)
    ids = [{clip.id for clip in part.clips} for part in (train, held_out)]
    assert len(held_out) == 4
    assert ids[0] | ids[1] == set(clips)
    assert not ids[0] & ids[1]
    again = LatentDataset(write(tmp_path / "e", dict(reversed(clips.items())))).split(0.1, seed=3)
    assert [{clip.id for clip in part.clips} for part in again] == ids
    assert {clip.id for clip in data.split(0.1, seed=4)[1].clips} != ids[1]
    assert torch.equal(held_out.latents(0), noise(3).bfloat16().float())
    assert sum(map(len, held_out.buckets.values())) == 4


def test_a_small_share_still_holds_one_clip_out_and_none_holds_none(tmp_path):
    data = LatentDataset(write(tmp_path / "d", CLIPS))
    assert [len(part) for part in data.split(0.01)] == [3, 1]
    assert [len(part) for part in data.split(0.0)] == [4, 0]
    with pytest.raises(ValueError, match=r"held_out_share=0\.9 of 4 clips leaves none"):
        data.split(0.9)
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        data.split(1.0)


def test_folders_are_joined_and_a_clip_counts_once(tmp_path, caplog):
    one, other = write(tmp_path / "one", {"a": "x", "b": "y"}), write(tmp_path / "other", {"b": "y", "c": "z"})
    data = LatentDataset([one, other])
    assert [clip.id for clip in data.clips] == ["a", "b", "c"]
    assert "once is enough" in caplog.text
    assert torch.equal(data.embeds(2), embeds("z")[:2])
    assert data.folders == [one, other]


def test_a_folder_of_parts_is_one_dataset(tmp_path):
    write(tmp_path / "all" / "part-1-of-2", {"a": "x"})
    write(tmp_path / "all" / "part-2-of-2", {"b": "y"})
    assert [clip.id for clip in LatentDataset(tmp_path / "all").clips] == ["a", "b"]


@pytest.mark.parametrize("name", ["vae", "text_encoder", "max_sequence_length"])
def test_folders_of_other_encoders_are_not_joined(tmp_path, name):
    values = (TEXT_LENGTH, TEXT_LENGTH + 1) if name == "max_sequence_length" else ("one", "two")
    folders = [write(tmp_path / str(i), {str(i): "x"}, **{name: value}) for i, value in enumerate(values)]
    with pytest.raises(ValueError, match=f"cannot be joined: {name} is"):
        LatentDataset(folders)


def test_a_dataset_goes_to_other_processes_and_threads(tmp_path):
    data = LatentDataset(write(tmp_path / "d", {f"{number:03d}": "x" for number in range(20)}, shard_bytes=1))
    expected = [data.latents(i) for i in range(20)]
    copied = pickle.loads(pickle.dumps(data))
    assert copied.hash == data.hash
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(copied.latents, range(20)), expected))


# --- stops and damage


def test_a_writer_goes_on_where_it_was(tmp_path):
    write(tmp_path / "d", {"a": "x"})
    with opened(tmp_path / "d") as writer:
        assert "a" in writer
        assert writer.has_prompt("x")
        assert torch.equal(writer.embeds("x"), embeds("x")[:2])
        fill(writer, {"b": "y"})
    assert len(LatentDataset(tmp_path / "d")) == 2


def test_what_was_added_before_an_error_is_kept(tmp_path):
    def interrupted() -> None:
        with opened(tmp_path / "d") as writer:
            fill(writer, {"a": "x"})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(LatentDataset(tmp_path / "d")) == 1


@pytest.mark.parametrize("lost", ["all", "last line", "half a line"])
def test_a_shard_that_the_manifest_does_not_know_yet_is_taken_up(tmp_path, lost):
    folder = write(tmp_path / "d", CLIPS)
    before = LatentDataset(folder).hash
    manifest = folder / "clips.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    kept = {"all": [], "last line": lines[:-1], "half a line": [*lines[:-1], lines[-1][:30]]}[lost]
    manifest.write_text("".join(kept))
    (folder / "latents" / ".4x2x4x6-00009.safetensors.part").write_bytes(b"half a shard")
    opened(folder).close()
    assert LatentDataset(folder).hash == before
    assert not list(folder.rglob("*.part"))


def test_a_clip_is_on_the_disk_in_time(tmp_path):
    writer = opened(tmp_path / "d", flush_seconds=0)
    fill(writer, {"a": "x"})
    assert [clip.id for clip in LatentDataset(tmp_path / "d").clips] == ["a"]
    assert torch.equal(LatentDataset(tmp_path / "d").embeds(0), embeds("x")[:2])
    writer.close()


def test_another_caption_leaves_the_latents_alone(tmp_path):
    folder = write(tmp_path / "d", {"a": "x", "b": "y"})
    with opened(folder) as writer:
        writer.add_prompt("better words", embeds("better words"))
        writer.recaption("a", "better words")
        writer.recaption("b", "y")  # the same: nothing to write
    assert (folder / "clips.jsonl").read_text().count("\n") == 3
    data = LatentDataset(folder)
    assert [clip.caption for clip in data.clips] == ["better words", "y"]
    assert torch.equal(data.embeds(0), embeds("better words")[:3])
    assert torch.equal(data.latents(0), noise(1).bfloat16().float())


def test_one_process_writes_at_a_time(tmp_path):
    writer = opened(tmp_path / "d")
    with pytest.raises(ValueError, match="is being written by another process"):
        opened(tmp_path / "d")
    writer.add_prompt("", embeds(""))
    writer.close()
    opened(tmp_path / "d").close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "mini"}, "was begun with model='tiny', not 'mini'"),
        ({"settings": {"fps": 24}}, "was begun with fps=16, not 24"),
        ({"dtype": torch.float32}, "was begun with dtype='bfloat16'"),
        ({"vae": "another"}, "was begun with another vae"),
    ],
)
def test_a_folder_goes_on_as_it_was_begun(tmp_path, options, message):
    write(tmp_path / "d", {"a": "x"}, vae="one", settings={"fps": 16})
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "d", **{"settings": {"fps": 16}, **options})
    opened(tmp_path / "d").close()  # and the folder is free again


def test_a_dataset_without_all_its_prompts_is_not_finished(tmp_path):
    writer = opened(tmp_path / "d")
    writer.add_prompt("", embeds(""))
    writer.add("a", noise(1), "a fox", **SIZE, frames=5)
    with pytest.raises(ValueError, match="captions without embeddings: 1"):
        writer.close()
    with pytest.raises(ValueError, match="no embeddings of 'a fox'"):
        LatentDataset(tmp_path / "d").embeds(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": torch.full((4, 2, 4, 6), torch.nan)}, "hold NaN"),
        ({"latents": torch.zeros(4, 2, 4)}, r"shape \[4, 2, 4\]"),
        ({"latents": torch.zeros(5, 2, 4, 6)}, "5 latent channels, the dataset has 4"),
        ({"clip_id": "a"}, "'a' is taken"),
        ({"fps": 0}, "no clip"),
    ],
)
def test_a_clip_that_cannot_be_is_refused(tmp_path, changes, message):
    writer = opened(tmp_path / "d")
    fill(writer, {"a": "x"})
    with pytest.raises(ValueError, match=message):
        writer.add(**{"clip_id": "b", "latents": noise(1), "caption": "x", **SIZE, "frames": 5, **changes})
    writer.close()


def test_damage_is_an_error_that_names_the_file(tmp_path):
    folder = write(tmp_path / "d", CLIPS)
    shard = folder / "latents" / "4x2x4x6-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"00000\.safetensors is damaged"):
        LatentDataset(folder).latents(0)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"00000\.safetensors is missing"):
        LatentDataset(folder).latents(0)
    (folder / "clips.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1"):
        LatentDataset(folder)


def test_a_folder_without_a_dataset_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no dataset"):
        LatentDataset(tmp_path)
    write(tmp_path / "d", {"a": "x"})
    facts = tmp_path / "d" / "dataset.json"
    facts.write_text(facts.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="version 2; this pusa reads"):
        LatentDataset(tmp_path / "d")


# --- the original's layout


def original(folder: Path, names: dict[str, Any], captions: dict[str, str]) -> Path:
    """Write a file as the original's data_process does."""
    (folder / "train").mkdir(parents=True)
    rows = "".join(f'{name},"{caption}"\n' for name, caption in captions.items())
    (folder / "metadata.csv").write_text("file_name,text\n" + rows)
    for name, content in names.items():
        torch.save(content, folder / "train" / f"{name}.tensors.pth")
    return folder


def cached(seed: int, caption: str) -> dict[str, Any]:
    return {"latents": noise(seed).bfloat16(), "prompt_emb": {"context": embeds(caption)[None]}, "image_emb": {}}


def test_the_originals_training_data_is_read_as_it_is(tmp_path):
    captions = {"one.mp4": "a fox, running", "two.mp4": "waves"}
    contents = {"one.mp4": cached(1, "a fox"), "two.mp4": cached(2, "waves")}
    contents["two.mp4"]["latents"] = contents["two.mp4"]["latents"][None]  # a batch of one
    folder = original(tmp_path / "original", contents, captions)
    for data in (LatentDataset.from_original(folder), LatentDataset(folder)):
        assert [clip.caption for clip in data.clips] == ["a fox, running", "waves"]
        assert data.buckets == {(4, 2, 4, 6): [0, 1]}
        assert (data.clips[0].frames, data.clips[0].height, data.clips[0].width) == (5, 32, 48)
        assert torch.equal(data.latents(1), noise(2).bfloat16().float())
        assert torch.equal(data.embeds(0), embeds("a fox")[:3])
        assert data.max_sequence_length == TEXT_LENGTH
        assert len(data.hash) == 64
        with pytest.raises(ValueError, match="no embeddings of the empty caption"):
            _ = data.empty_embeds
    given = LatentDataset.from_original(folder, empty_embeds=embeds("")[:1])
    assert torch.equal(given.empty_embeds, embeds("")[:1])


def test_lists_in_folders_of_the_folder_are_found(tmp_path):
    for name in ("one", "two"):
        original(tmp_path / "o" / name, {"v.mp4": cached(1, "x")}, {"v.mp4": name})
    assert {clip.id: clip.caption for clip in LatentDataset(tmp_path / "o").clips} == {
        "one/v.mp4": "one",
        "two/v.mp4": "two",
    }


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_of_tensors_does_not_run(tmp_path, caplog):
    contents = {"one.mp4": cached(1, "a fox"), "bomb.mp4": {"latents": Bomb(tmp_path / "exploded")}}
    folder = original(tmp_path / "original", contents, {"one.mp4": "a fox", "bomb.mp4": "boom"})
    data = LatentDataset.from_original(folder)
    assert [clip.id for clip in data.clips] == ["one.mp4"]
    assert "bomb.mp4 is left out" in caplog.text
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"prompt_emb": {"context": embeds("x")}}, "holds no 'latents'"),
        ({"latents": noise(1)}, "holds no 'prompt_emb.context'"),
        ({"latents": noise(1)[0], "prompt_emb": {"context": embeds("x")}}, "has the shape [2, 4, 6]"),
        ([noise(1)], "holds no 'latents'"),
    ],
)
def test_files_of_other_tensors_are_left_out_with_the_reason(tmp_path, caplog, content, message):
    folder = original(tmp_path / "o", {"one.mp4": cached(1, "x"), "two.mp4": content}, {"one.mp4": "x", "two.mp4": "y"})
    assert len(LatentDataset(folder)) == 1
    assert message in caplog.text


def test_names_that_lead_out_of_the_folder_are_not_followed(tmp_path, caplog):
    original(tmp_path / "secret", {"x.mp4": cached(1, "x")}, {"x.mp4": "x"})
    folder = original(tmp_path / "o", {"one.mp4": cached(1, "x")}, {"one.mp4": "x", "../../secret/train/x.mp4": "y"})
    assert [clip.id for clip in LatentDataset(folder).clips] == ["one.mp4"]
    assert "is outside of" in caplog.text
