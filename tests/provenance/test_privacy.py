"""A result tells what it must and nothing about the person: planted personal data is looked for in every output."""

import base64
import getpass
import hashlib
import json
import shutil
import socket
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from media_samples import moving_gradient
from needs import needed_module
from PIL import Image
from provenance_samples import LATITUDE, PERSONAL, XMP_OF_A_PERSON, exiftool, personal_photograph, personal_video

from pusa import media
from pusa.cli import main
from pusa.generate import generate, load_latents, read_request
from pusa.models import vae as vae_module
from pusa.provenance.certificates import new_certificate
from pusa.provenance.marks import read_marks
from pusa.provenance.options import MarkOptions
from pusa.provenance.xmp import COMPOSITE, GENERATED
from pusa.request import METADATA, GenerationRequest

KEY = "planted-key-0123456789abcdef"
WIDTH, HEIGHT = 96, 64  # the defaults of "tiny"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person's folder with a photograph and a video, a LoRA's folder, a user's name and a key."""
    folder = tmp_path / "planted-folder" / "planted-user"
    folder.mkdir(parents=True)
    personal_photograph(folder / "photo.jpg")
    personal_video(folder / "holiday.mov", moving_gradient(24)[:, :64, :96])
    for name in ("USER", "LOGNAME"):
        monkeypatch.setenv(name, "planted-user")
    monkeypatch.setenv("PUSA_API_KEY", KEY)
    monkeypatch.setenv("PUSA_API_KEYS", KEY)
    monkeypatch.chdir(folder.parent)
    return folder


def run(output: Path, *, marks: MarkOptions | None = None, carried: Any = None, **asked: Any) -> list[str]:
    """Make a video; return the notes."""
    request = GenerationRequest.model_validate({"model": "tiny", "prompt": "a cat", "seed": 0, "steps": 1, **asked})
    events = list(generate(request, output, marks=marks, carried=carried))
    assert events[-1].kind == "done"
    return [event.message for event in events if event.kind == "note"]


def image(file: Path, noise: float = 0.2, **more: Any) -> dict[str, Any]:
    return {"kind": "image", "file": str(file), "noise": [noise], **more}


def video(file: Path, **more: Any) -> dict[str, Any]:
    return {"kind": "video", "file": str(file), "noise": [0.0], **more}


def searched_bytes(path: Path) -> bytes:
    """Return a file's bytes, its texts, and the bytes of the inputs that it carries."""
    content = path.read_bytes()
    try:
        stored = media.read_metadata(path) or {}
    except media.MediaError:
        stored = {}
    parts = [content, json.dumps(stored, ensure_ascii=False).encode()]
    parts += [base64.b64decode(text) for text in stored.get("inputs", {}).values()]
    parts += [zlib.decompress(part) for part in _compressed_texts(content)]
    return b"\n".join(parts)


def _compressed_texts(content: bytes) -> list[bytes]:
    """Return the compressed texts (zTXt) of a PNG."""
    found, at = [], 8
    while content.startswith(b"\x89PNG") and at < len(content):
        length, kind = int.from_bytes(content[at : at + 4], "big"), content[at + 4 : at + 8]
        if kind == b"zTXt":
            found.append(content[at + 8 : at + 8 + length].partition(b"\0")[2][1:])
        at += 12 + length
    return found


def assert_nothing_personal(folder: Path, *more: str) -> None:
    """Look for planted data in all files of a folder, in UTF-8 and UTF-16, by bytes and with exiftool."""
    words = [*PERSONAL, "planted-user", KEY, str(folder.parent), *more]
    words += [name for name in (socket.gethostname(), getpass.getuser()) if len(name) >= 8]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = searched_bytes(path).lower()
        for word in words:
            for encoding in ("utf-8", "utf-16-le", "utf-16-be"):
                assert word.lower().encode(encoding) not in content, f"{word} is in {path.name}"
        if path.suffix in (".mp4", ".png", ".webp", ".gif"):
            tags = {k: v for k, v in exiftool(path).items() if not k.startswith(("System:", "SourceFile", "ExifTool:"))}
            text = json.dumps(tags).lower()
            assert not [name for name in tags if "gps" in name.lower()]
            assert not [word for word in (*words, "48 deg", str(LATITUDE)[:6]) if word.lower() in text]


# ---- nothing personal ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", METADATA)
def test_no_output_tells_about_the_person(metadata: str, home: Path, tmp_path: Path) -> None:
    needed_module("c2pa", "pip install 'pusa[c2pa]'")
    certificate = new_certificate(tmp_path / "certificate", organization="Example Studio")
    marks = MarkOptions(sign_cert=str(certificate["certificate"]), sign_key=str(certificate["key"]))
    out = tmp_path / "out"
    out.mkdir()
    photo, film = home / "photo.jpg", home / "holiday.mov"
    relative = Path("planted-user") / "photo.jpg"
    for name in ("clip.mp4", "clip.gif", "clip.webp", "frames"):
        run(out / name, frames=5, metadata=metadata, marks=marks, conditions=[image(photo)])
    run(out / "relative.mp4", frames=5, metadata=metadata, conditions=[image(relative)])
    run(out / "frame.png", frames=1, metadata=metadata, marks=marks, conditions=[image(photo)])
    run(out / "longer.mp4", task="extend", metadata=metadata, marks=marks, conditions=[video(film)])
    run(out / "joined.mp4", task="transition", metadata=metadata, marks=marks, conditions=[video(film), video(film)])
    run(out / "completed.mp4", metadata=metadata, conditions=[video(film, positions=[0])])
    assert_nothing_personal(out)


def test_the_planted_data_is_found_where_it_is(home: Path) -> None:
    with pytest.raises(AssertionError, match="PLANTED"):
        assert_nothing_personal(home)


def test_a_copy_holds_no_more_of_a_photograph_than_the_video_shows(home: Path, tmp_path: Path) -> None:
    run(tmp_path / "out.mp4", conditions=[image(home / "photo.jpg")])
    _, carried = read_request(media.read_metadata(tmp_path / "out.mp4"))
    ((sha256, content),) = carried.items()
    assert hashlib.sha256(content).hexdigest() == sha256
    copy = media.read_image(_file(tmp_path / "copy", content))
    assert copy.size == (WIDTH, HEIGHT)
    assert media.read_tag_names(_file(tmp_path / "copy", content)) == []


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_folders_of_models_and_loras_are_left_out(home: Path, tmp_path: Path) -> None:
    from pusa import zoo

    (home / "my-model").mkdir()
    (home / "my.safetensors").touch()
    for path in (home / "my-model", home / "my.safetensors", Path("planted-user") / "my-model"):
        assert zoo.public_name(str(path)) == path.name
    for name in ("mini", "Wan-AI/Wan2.1-T2V-14B-Diffusers", "owner/lora"):
        assert zoo.public_name(name) == name


@pytest.mark.parametrize("metadata", METADATA)
def test_latents_that_wait_for_decoding_tell_no_more(
    metadata: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d

    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    out = tmp_path / "out"
    out.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(WanDecoder3d, "forward", fail)
        with pytest.raises(vae_module.DecodeMemoryError):
            run(out / "clip.mp4", metadata=metadata, conditions=[image(home / "photo.jpg", noise=0.0)])
    _, stored = load_latents(out / "clip.latents.safetensors")
    assert bool(stored["inputs"]) == (metadata == "full")
    assert_nothing_personal(out)
    result = CliRunner().invoke(main, ["decode", str(out / "clip.latents.safetensors"), "-o", str(out / "clip.mp4")])
    assert result.exit_code == 0, result.output
    marks = read_marks(out / "clip.mp4")
    assert (marks.mark and marks.mark.source_type) == (None if metadata == "off" else COMPOSITE)
    assert ("request" in marks.stored) == (metadata == "full")
    assert_nothing_personal(out)


# ---- what each setting tells -----------------------------------------------------------------------------------------


def test_full_minimal_and_off(home: Path, tmp_path: Path) -> None:
    told = {}
    for metadata in METADATA:
        path = tmp_path / f"{metadata}.mp4"
        run(path, metadata=metadata, frames=5, prompt="a secret wish", conditions=[image(home / "photo.jpg")])
        told[metadata] = read_marks(path)
        assert (b"secret wish" in path.read_bytes()) == (metadata == "full")
    assert told["full"].stored["request"]["conditions"][0]["file"] == "photo.jpg"
    assert told["minimal"].stored.keys() == {"pusa", "model", "digital_source_type"}
    assert told["minimal"].mark is not None
    assert told["minimal"].mark.system == "pusa (tiny)"
    assert told["off"].mark is None
    assert told["off"].stored == {}
    with pytest.raises(ValueError, match="metadata=minimal, so no request is stored inside"):
        read_request(told["minimal"].stored)


def test_info_shows_what_a_file_tells(home: Path, tmp_path: Path) -> None:
    run(tmp_path / "out.mp4", frames=5, conditions=[image(home / "photo.jpg")])
    facts = json.loads(CliRunner().invoke(main, ["info", str(tmp_path / "out.mp4"), "--json"]).output)
    assert facts["digital source type"] == GENERATED
    assert facts["AI system"].startswith("pusa (tiny) ")
    assert facts["carries"][0].startswith("image photo.jpg, ")
    assert "other metadata" not in facts
    facts = json.loads(CliRunner().invoke(main, ["info", str(home / "photo.jpg"), "--json"]).output)
    assert {"Make", "Model", "GPSInfo", "UserComment"} <= set(facts["other metadata"])


# ---- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["crop", "letterbox", "stretch"])
def test_a_replay_equals_the_video_of_a_photograph_to_the_bit(fit: str, home: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first.mp4", tmp_path / "again.mp4"
    pictures = [image(home / "photo.jpg", fit=fit), image(home / "photo.jpg", fit=fit, positions=["last"])]
    run(first, conditions=pictures)
    shutil.rmtree(home)
    request, carried = read_request(media.read_metadata(first))
    assert len(carried) == 1
    list(generate(request, again, carried=carried))
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("task", ["complete", "extend", "transition", "loop"])
def test_a_replay_equals_the_video_of_a_video_to_the_bit(task: str, home: Path, tmp_path: Path) -> None:
    film = video(home / "holiday.mov")
    asked: dict[str, Any] = {
        "complete": {"conditions": [{**film, "positions": [0, 2]}]},
        "extend": {"task": "extend", "conditions": [film]},
        "transition": {"task": "transition", "conditions": [film, film]},
        "loop": {"task": "loop", "conditions": [image(home / "photo.jpg")]},
    }[task]
    first, again = tmp_path / "first.mp4", tmp_path / "again.mp4"
    run(first, **asked, fps=12.5)
    shutil.rmtree(home)
    request, carried = read_request(media.read_metadata(first))
    list(generate(request, again, carried=carried))
    assert first.read_bytes() == again.read_bytes()


def test_a_video_with_the_photograph_itself_inside_still_replays(home: Path, tmp_path: Path) -> None:
    """Files made before copies were: the bytes of the input, its folder, no `metadata` in the request."""
    run(tmp_path / "new.mp4", conditions=[image(home / "photo.jpg")])
    content = (home / "photo.jpg").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    request = read_request(media.read_metadata(tmp_path / "new.mp4"))[0].model_dump(mode="json")
    del request["metadata"]
    request["conditions"][0] |= {"sha256": sha256, "file": "planted-user/photo.jpg"}
    old = {"pusa": "0.1.0", "request": request, "inputs": {sha256: base64.b64encode(content).decode()}}
    with media.VideoWriter(tmp_path / "old.mp4", width=WIDTH, height=HEIGHT, metadata=old) as writer:
        writer.write(media.read_video(tmp_path / "new.mp4"))
    shutil.rmtree(home)
    result = CliRunner().invoke(main, ["replay", str(tmp_path / "old.mp4"), "-o", str(tmp_path / "again.mp4")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "new.mp4").read_bytes()
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "again.mp4").rename(out / "again.mp4")
    assert_nothing_personal(out)


def test_replay_can_tell_less(home: Path, tmp_path: Path) -> None:
    run(tmp_path / "first.mp4", frames=5)
    words = ["replay", str(tmp_path / "first.mp4"), "--metadata", "minimal", "-o", str(tmp_path / "again.mp4")]
    assert CliRunner().invoke(main, words).exit_code == 0
    assert "request" not in read_marks(tmp_path / "again.mp4").stored
    assert np.array_equal(media.read_video(tmp_path / "first.mp4"), media.read_video(tmp_path / "again.mp4"))


# ---- marks of inputs -------------------------------------------------------------------------------------------------


def test_extending_a_marked_video_keeps_its_mark_and_names_it(home: Path, tmp_path: Path) -> None:
    first, longer, again = (tmp_path / f"{name}.mp4" for name in ("first", "longer", "again"))
    run(first, metadata="minimal")
    sha256 = hashlib.sha256(first.read_bytes()).hexdigest()
    run(longer, task="extend", conditions=[video(first)])
    marks = read_marks(longer)
    assert marks.mark is not None
    assert marks.mark.source_type == GENERATED  # all that it shows was made by the model
    assert [(i.source_type, i.system, i.sha256) for i in marks.mark.inputs] == [(GENERATED, "pusa (tiny)", sha256)]
    first.unlink()
    request, carried = read_request(media.read_metadata(longer))
    list(generate(request, again, carried=carried))
    assert again.read_bytes() == longer.read_bytes()


@pytest.mark.parametrize(
    ("noise", "expected"), [(0.0, COMPOSITE), (0.2, GENERATED)], ids=["kept exactly", "changed by the model"]
)
def test_real_footage_that_is_shown_makes_a_composite(noise: float, expected: str, home: Path, tmp_path: Path) -> None:
    run(tmp_path / "out.mp4", frames=5, conditions=[image(home / "photo.jpg", noise)])
    mark = read_marks(tmp_path / "out.mp4").mark
    assert mark is not None
    assert mark.source_type == expected
    run(tmp_path / "longer.mp4", task="extend", conditions=[video(home / "holiday.mov")])
    mark = read_marks(tmp_path / "longer.mp4").mark
    assert mark is not None
    assert mark.source_type == COMPOSITE


def test_credentials_of_an_input_are_kept_by_a_signature_and_missed_aloud_without(home: Path, tmp_path: Path) -> None:
    needed_module("c2pa", "pip install 'pusa[c2pa]'")
    from pusa.provenance.c2pa import Signer, validate

    certificate = new_certificate(tmp_path / "certificate", organization="Example Studio")
    marks = MarkOptions(sign_cert=str(certificate["certificate"]), sign_key=str(certificate["key"]))
    film = home / "holiday.mov"
    film.write_bytes(film.read_bytes().replace(XMP_OF_A_PERSON, b" " * len(XMP_OF_A_PERSON)))
    Signer(certificate["certificate"], certificate["key"]).sign(film, source_type="digitalCapture")
    notes = run(tmp_path / "unsigned.mp4", task="extend", conditions=[video(film)])
    assert (
        "holiday.mov carries content credentials (C2PA): the video names it, and keeps them only if it is signed"
        in notes
    )
    notes = run(tmp_path / "silent.mp4", task="extend", conditions=[video(film)], metadata="off")
    assert any("with metadata=off the video does not name them" in note for note in notes)
    assert not [
        n for n in run(tmp_path / "signed.mp4", task="extend", conditions=[video(film)], marks=marks) if "C2PA" in n
    ]
    validation = validate(tmp_path / "signed.mp4", trust=certificate["root"])
    assert validation.state == "trusted"
    (ingredient,) = validation.active["ingredients"]
    assert (ingredient["title"], ingredient["relationship"]) == ("holiday.mov", "parentOf")
    assert ingredient["active_manifest"] in validation.manifests["manifests"]


def test_an_upright_photograph_is_carried_upright(home: Path, tmp_path: Path) -> None:
    run(tmp_path / "out.mp4", frames=5, width=96, height=64, conditions=[image(home / "photo.jpg")])
    _, carried = read_request(media.read_metadata(tmp_path / "out.mp4"))
    (content,) = carried.values()
    from pusa.conditions import fit_image

    expected = fit_image(media.read_image(home / "photo.jpg"), 96, 64)
    assert np.array_equal(np.asarray(Image.open(_file(tmp_path / "copy.webp", content))), np.asarray(expected))
