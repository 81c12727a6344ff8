"""Every format says that it was made with AI, to programs of others; signatures hold, and break when they must."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from media_samples import moving_gradient, write
from needs import needed_module
from provenance_samples import XMP_OF_A_PERSON, exiftool, ffprobe

from pusa import __version__, media
from pusa.cli import main
from pusa.provenance.certificates import new_certificate
from pusa.provenance.marks import read_marks
from pusa.provenance.options import MarkOptions
from pusa.provenance.xmp import COMPOSITE, GENERATED, SOURCE_TYPES, InputMark, Mark, read_packet, write_packet

FORMATS = ("clip.mp4", "clip.gif", "clip.webp", "frame.webp", "frame.png", "frames")
MARK = Mark(
    GENERATED,
    "pusa (mini)",
    __version__,
    tool=f"pusa {__version__}",
    prompt="a <cat> & Käse 🎬",
    inputs=(InputMark(COMPOSITE, "other", "2", "ab" * 32), InputMark("", sha256="cd" * 32)),
)


def written(path: Path, **options: Any) -> Path:
    return write(path, moving_gradient(1 if path.stem == "frame" else 5), **options)


def single_file(path: Path) -> Path:
    return path if path.is_file() else sorted(path.iterdir())[-1]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    needed_module("c2pa", "pip install 'pusa[c2pa]'")
    return new_certificate(tmp_path_factory.mktemp("certificate"), organization="Example Studio")


def sign(path: Path, certificate: dict[str, Path], **options: Any) -> None:
    from pusa.provenance.c2pa import Signer

    Signer(certificate["certificate"], certificate["key"]).sign(path, **{"source_type": GENERATED, **options})


# ---- XMP -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_exiftool_reads_the_mark_of_every_format(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, xmp=write_packet(MARK), metadata={"pusa": "0"})
    tags = exiftool(single_file(path))
    assert tags["XMP-iptcExt:DigitalSourceType"].endswith("trainedAlgorithmicMedia")
    assert tags["XMP-iptcExt:AISystemUsed"] == "pusa (mini)"
    assert str(tags["XMP-iptcExt:AISystemVersionUsed"]) == __version__
    assert tags["XMP-iptcExt:AIPromptInformation"] == MARK.prompt
    assert tags["XMP-xmp:CreatorTool"] == f"pusa {__version__}"
    assert tags["XMP-xmpMM:Ingredients"][0]["DocumentID"] == "urn:sha256:" + "ab" * 32


def test_ffprobe_reads_the_mark_of_an_mp4(tmp_path: Path) -> None:
    path = written(tmp_path / "clip.mp4", xmp=write_packet(MARK), metadata={"pusa": "0"})
    tags = ffprobe(path)
    assert tags["xmp"] == write_packet(MARK).decode()
    assert json.loads(tags["comment"]) == {"pusa": "0"}


@pytest.mark.parametrize("name", FORMATS)
def test_the_mark_is_read_back(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, xmp=write_packet(MARK))
    mark = read_marks(path).mark
    assert mark is not None
    assert (mark.source_type, mark.system, mark.version, mark.inputs) == (
        GENERATED,
        MARK.system,
        MARK.version,
        MARK.inputs,
    )
    assert media.read_metadata(path) is None


def test_a_packet_of_others_gives_only_how_a_file_was_made() -> None:
    assert read_packet(XMP_OF_A_PERSON) is None
    attribute = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description xmlns:I="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" I:DigitalSourceType="'
        + f"{SOURCE_TYPES}digitalCapture".encode()
        + b'"/></rdf:RDF></x:xmpmeta>'
    )
    assert read_packet(attribute) == Mark("digitalCapture")


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"no XML",
        b"<x:xmpmeta",
        b"<!DOCTYPE x [<!ENTITY a 'aaaa'>]><x>&a;</x>",
        "<!DOCTYPE x [<!ENTITY a 'aaaa'>]><x>&a;</x>".encode("utf-16"),
        b"<x>" + b" " * 2**20 + b"</x>",
        b"\xff\xfe\x00",
    ],
)
def test_packets_that_are_broken_or_expand_are_not_read(packet: bytes) -> None:
    assert read_packet(packet) is None


def test_invalid_values_of_a_foreign_comment_are_left_out(tmp_path: Path) -> None:
    foreign = {"pusa": 1, "digital_source_type": ["x"], "request": [], "input_marks": [{"system": 1}, "x"]}
    marks = read_marks(written(tmp_path / "clip.mp4", metadata=foreign))
    assert marks.mark == Mark(GENERATED, "pusa (unknown)", "unknown", tool="pusa unknown", inputs=(InputMark(""),))


# ---- C2PA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_a_signed_file_is_trusted_under_its_root_and_keeps_its_mark(
    name: str, tmp_path: Path, certificate: dict[str, Path]
) -> None:
    from pusa.provenance.c2pa import validate

    path = written(
        tmp_path / name,
        xmp=write_packet(MARK),
        metadata={"pusa": "0"},
        seal=lambda file: sign(file, certificate, system="pusa (mini)"),
    )
    assert validate(path, trust=certificate["root"]).state == "trusted"
    validation = validate(path)
    assert validation.state == "valid"
    (actions,) = [a["data"]["actions"] for a in validation.active["assertions"] if a["label"] == "c2pa.actions.v2"]
    assert actions[0]["action"] == "c2pa.created"
    assert actions[0]["digitalSourceType"] == f"{SOURCE_TYPES}{GENERATED}"
    assert actions[0]["softwareAgent"]["name"] == "pusa (mini)"
    marks = read_marks(path)
    assert marks.has_manifest
    assert marks.mark is not None
    assert marks.mark.system == "pusa (mini)"
    assert media.read_metadata(path) == {"pusa": "0"}
    assert exiftool(single_file(path))["XMP-iptcExt:AISystemUsed"] == "pusa (mini)"


def test_one_changed_byte_is_detected(tmp_path: Path, certificate: dict[str, Path]) -> None:
    from pusa.provenance.c2pa import validate

    path = written(tmp_path / "clip.mp4", xmp=write_packet(MARK), metadata={"pusa": "0"})
    sign(path, certificate)
    whole = path.read_bytes()
    for place in (whole.index(b"mdat") + 40, whole.index(b'{"pusa"') + 3):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        validation = validate(path, trust=certificate["root"])
        assert validation.state == "invalid"
        assert "mismatch" in validation.problems[0]


def test_a_foreign_root_is_not_trusted_and_an_unsigned_file_has_no_manifest(
    tmp_path: Path, certificate: dict[str, Path]
) -> None:
    from pusa.provenance.c2pa import validate

    path = written(tmp_path / "clip.mp4")
    assert validate(path).state == "none"
    sign(path, certificate)
    other = new_certificate(tmp_path / "other", organization="Somebody Else")
    assert validate(path, trust=other["root"]).state == "valid"


def test_the_manifest_of_an_input_is_kept(tmp_path: Path, certificate: dict[str, Path]) -> None:
    from pusa.provenance.c2pa import Ingredient, validate

    first, second = written(tmp_path / "first.mp4"), written(tmp_path / "second.mp4")
    sign(first, certificate, source_type="digitalCapture")
    ingredients = [
        Ingredient("first.mp4", "parentOf", "video/mp4", "ab", signed=first),
        Ingredient("photo.jpg", "inputTo", "image/jpeg", "cd" * 32),
    ]
    sign(second, certificate, source_type=COMPOSITE, ingredients=ingredients)
    validation = validate(second, trust=certificate["root"])
    assert validation.state == "trusted"
    assert len(validation.manifests["manifests"]) == 2
    named = {i["title"]: i for i in validation.active["ingredients"]}
    assert named["first.mp4"]["active_manifest"] in validation.manifests["manifests"]
    assert named["photo.jpg"]["instance_id"] == "urn:sha256:" + "cd" * 32
    (actions,) = [a["data"]["actions"] for a in validation.active["assertions"] if a["label"] == "c2pa.actions.v2"]
    assert [a["action"] for a in actions] == ["c2pa.opened", "c2pa.edited"]


def test_a_certificate_and_a_key_that_do_not_belong_together_are_refused(
    tmp_path: Path, certificate: dict[str, Path]
) -> None:
    other = new_certificate(tmp_path / "other", organization="Somebody Else")
    assert other["key"].stat().st_mode & 0o077 == 0
    with pytest.raises(ValueError, match="is not that of the certificate"):
        MarkOptions(sign_cert=str(certificate["certificate"]), sign_key=str(other["key"])).check()
    with pytest.raises(ValueError, match="sign_key is missing"):
        MarkOptions(sign_cert=str(certificate["certificate"])).check()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        MarkOptions(sign_cert="nowhere.pem", sign_key=str(other["key"])).check()
    with pytest.raises(ValueError, match="holds no private key"):
        MarkOptions(sign_cert=str(certificate["certificate"]), sign_key=str(certificate["root"])).check()
    with pytest.raises(FileExistsError, match="is there already"):
        new_certificate(tmp_path / "other", organization="Somebody Else")


def test_a_video_that_cannot_be_signed_is_kept_without_its_name(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise RuntimeError("the time stamp authority does not answer")

    with pytest.raises(RuntimeError, match=r"does not answer; the video is kept, unsigned, as .*clip\.unsigned\.mp4"):
        written(tmp_path / "clip.mp4", seal=fail)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.unsigned.mp4"]
    assert media.probe_video(tmp_path / "clip.unsigned.mp4").frames == 5


# ---- the command line ------------------------------------------------------------------------------------------------


def test_sign_show_and_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed_module("c2pa", "pip install 'pusa[c2pa]'")
    monkeypatch.chdir(tmp_path)

    def pusa(*words: str, code: int = 0) -> str:
        result = CliRunner().invoke(main, words)
        assert result.exit_code == code, result.output
        return result.output

    stored = {"pusa": "0.1", "digital_source_type": COMPOSITE, "model": "mini"}
    written(tmp_path / "clip.mp4", metadata=stored, xmp=write_packet(Mark(COMPOSITE, "pusa (mini)")))
    pusa("provenance", "new-cert", "cert", "--organization", "Example Studio")
    keys = ("--cert", "cert/certificate.pem", "--key", "cert/key.pem")
    assert "none" in pusa("provenance", "verify", "clip.mp4", code=1)
    assert "signing converts nothing" in pusa("provenance", "sign", "clip.mp4", *keys, "-o", "clip.gif", code=2)
    pusa("provenance", "sign", "clip.mp4", *keys, "-o", "signed.mp4")
    assert "trusted" in pusa("provenance", "verify", "signed.mp4", "--trust", "cert/root.pem")
    shown = json.loads(pusa("provenance", "show", "signed.mp4", "--json"))
    assert shown["content credentials"]["signed by"] == "Example Studio"
    assert shown["content credentials"]["digital source type"] == COMPOSITE
    assert "content credentials" in pusa("info", "signed.mp4")
    pusa("provenance", "sign", "signed.mp4", *keys)  # again: the earlier manifest is kept
    assert len(json.loads(pusa("provenance", "show", "signed.mp4", "--json"))["content credentials"]["inputs"]) == 1
    written(tmp_path / "plain.mp4")
    assert "give --source-type" in pusa("provenance", "sign", "plain.mp4", *keys, code=2)
    pusa("provenance", "sign", "plain.mp4", *keys, "--source-type", "digitalCapture")


def test_what_another_program_drops_is_said_and_written_again(
    tmp_path: Path, certificate: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import av

    stored = {"pusa": "0.1", "digital_source_type": COMPOSITE, "model": "mini"}
    path = written(tmp_path / "clip.mp4", metadata=stored, xmp=write_packet(Mark(COMPOSITE, "pusa (mini)")))
    copy = tmp_path / "copy.mp4"
    with av.open(str(path)) as source, av.open(str(copy), "w") as target:  # as `ffmpeg -c copy` does
        target.metadata.update(source.metadata)
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    marks = read_marks(copy)
    assert marks.is_packet_missing
    assert marks.mark is not None
    assert marks.mark.source_type == COMPOSITE
    assert "dropped by another program" in CliRunner().invoke(main, ["info", str(copy)]).output
    keys = ["--cert", str(certificate["certificate"]), "--key", str(certificate["key"])]
    result = CliRunner().invoke(main, ["provenance", "sign", str(copy), *keys])
    assert result.exit_code == 0, result.output
    assert not read_marks(copy).is_packet_missing
    assert exiftool(copy)["XMP-iptcExt:DigitalSourceType"].endswith(COMPOSITE)


def test_without_c2pa_signing_says_how_to_install_it(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['c2pa'] = None\n"
        "from pusa.cli import main\n"
        "main(['generate', 'a cat', '--model', 'tiny', '-o', 'x.mp4', '--sign-cert', 'a', '--sign-key', 'b'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'pusa[c2pa]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_frames_are_the_same_with_and_without_marks(tmp_path: Path) -> None:
    plain, marked = written(tmp_path / "a.mp4"), written(tmp_path / "b.mp4", xmp=write_packet(MARK), metadata={"x": 1})
    assert np.array_equal(media.read_video(plain), media.read_video(marked))
