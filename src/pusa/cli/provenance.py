"""Run `pusa provenance`: sign files, and show and verify what files say about how they were made."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pusa.cli.groups import Group, json_option
from pusa.cli.options import find_file
from pusa.cli.root import FAILED, print_facts

if TYPE_CHECKING:
    from pusa.provenance.c2pa import Validation

_SOURCE_TYPES = (
    "trainedAlgorithmicMedia",
    "compositeWithTrainedAlgorithmicMedia",
    "digitalCapture",
    "digitalCreation",
    "humanEdits",
)
_file = click.argument("file", metavar="FILE", type=click.Path())


@click.group(cls=Group)
def provenance() -> None:
    """Sign videos and pictures (C2PA), and read what they say about how they were made.

    \b
    A certificate:  pusa provenance new-cert certificate --organization "Example Studio"
    Sign:           pusa provenance sign video.mp4 --cert certificate/certificate.pem --key certificate/key.pem
    Check:          pusa provenance verify video.mp4 --trust certificate/root.pem
    """


@provenance.command("new-cert")
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path))
@click.option("--organization", metavar="NAME", required=True, help="The name that is shown as the signer.")
@click.option("--days", type=click.IntRange(1, 36500), default=3650, show_default=True, help="Until it expires.")
@json_option
def new_cert(folder: Path, organization: str, days: int, as_json: bool) -> None:
    """Make a certificate of one's own to sign with, in FOLDER.

    Writes certificate.pem and key.pem to sign with, and root.pem for those who want to check. Programs of others call
    it unknown unless they are given root.pem.
    """
    from pusa.provenance.certificates import new_certificate

    try:
        paths = new_certificate(folder, organization=organization, days=days)
    except FileExistsError as error:
        raise ValueError(str(error)) from error
    print_facts({name: str(path) for name, path in paths.items()}, as_json)


@provenance.command()
@_file
@click.option("--cert", metavar="FILE", envvar="PUSA_SIGN_CERT", required=True, type=click.Path(), help="Certificate.")
@click.option(
    "--key", metavar="FILE", envvar="PUSA_SIGN_KEY", required=True, type=click.Path(), help="Its private key."
)
@click.option("--timestamp-url", metavar="URL", envvar="PUSA_TIMESTAMP_URL", help="Time stamp authority.")
@click.option("--source-type", type=click.Choice(_SOURCE_TYPES), help="How it was made. [default: what FILE says]")
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="Copy to sign. [default: FILE itself]"
)
@json_option
def sign(
    file: str,
    cert: str,
    key: str,
    timestamp_url: str | None,
    source_type: str | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Sign FILE, as the last thing that is done to it.

    A manifest that FILE has is kept as that of its parent. XMP that another program has dropped from an mp4 of pusa is
    written again.
    """
    from pusa.media.encoders import append_mp4_xmp
    from pusa.provenance.c2pa import Ingredient, content_type_of
    from pusa.provenance.marks import read_marks
    from pusa.provenance.options import MarkOptions
    from pusa.provenance.xmp import write_packet

    path = find_file(file, "file")
    if output is not None and output.suffix.lower() != path.suffix.lower():
        raise ValueError(f"-o {str(output)!r}: signing converts nothing; give a name that ends in {path.suffix}")
    signer = MarkOptions(sign_cert=cert, sign_key=key, timestamp_url=timestamp_url).signer()
    assert signer is not None
    marks, content_type = read_marks(path), content_type_of(path)
    how = source_type or (marks.mark and marks.mark.source_type)
    if not how:
        raise ValueError(f"{path} does not say how it was made: give --source-type")
    target = output or path
    working = target.with_name(f".{target.name}.tmp")
    try:
        shutil.copyfile(path, working)
        if marks.is_packet_missing and marks.mark and content_type == "video/mp4":
            append_mp4_xmp(working, write_packet(marks.mark))
            click.echo("the XMP that another program has dropped is written again", err=True)
        elif marks.is_packet_missing:
            click.echo("another program has dropped the XMP; only that of an mp4 can be written again", err=True)
        parents = [Ingredient(path.name, "parentOf", content_type, "", signed=path)] if marks.has_manifest else []
        system = marks.mark.system if marks.mark else ""
        signer.sign(working, source_type=how, system=system, ingredients=parents)
        working.replace(target)
    finally:
        working.unlink(missing_ok=True)
    print_facts({"signed": str(target), "digital source type": how}, as_json)


@provenance.command()
@_file
@json_option
def show(file: str, as_json: bool) -> None:
    """Show what FILE says about how it was made: XMP, content credentials, watermark."""
    from pusa.cli.info import describe_marks

    path = Path(file) if Path(file).is_dir() else find_file(file, "file")
    facts = describe_marks(path)
    if "content credentials" in facts:
        from pusa.provenance.c2pa import validate

        facts["content credentials"] = _describe(validate(path))
    print_facts(facts or {"marks": "none: which proves nothing, as marks can be removed"}, as_json)


@provenance.command()
@_file
@click.option("--trust", metavar="ROOT", type=click.Path(path_type=Path), help="PEM file of roots that are trusted.")
@json_option
def verify(file: str, trust: Path | None, as_json: bool) -> int:
    """Check the content credentials (C2PA) of FILE.

    Exit code 0 if it has not been changed since it was signed (with --trust: under one of these roots), 1 otherwise.
    """
    from pusa.provenance.c2pa import validate

    path = Path(file) if Path(file).is_dir() else find_file(file, "file")
    validation = validate(path, trust=trust)
    print_facts(_describe(validation), as_json)
    return 0 if validation.state in (("trusted",) if trust else ("valid", "trusted")) else FAILED


@provenance.command()
@_file
@click.option(
    "--watermark", metavar="NAME[:FILE]", required=True, help="Which to look for: rivagan, or videoseal:FILE."
)
@json_option
def detect(file: str, watermark: str, as_json: bool) -> int:
    """Look for a watermark in the pixels of FILE.

    Exit code 0 if there is one of pusa, 1 if not. To find none proves nothing: it may be damaged.
    """
    import numpy as np

    from pusa.media import read_image, read_metadata, read_video
    from pusa.media.source import DEFAULT_LIMITS, open_source
    from pusa.provenance.watermark import detect as search
    from pusa.provenance.watermark import load_watermarker

    path = find_file(file, "file")
    watermarker = load_watermarker(watermark)
    with open_source(path, limits=DEFAULT_LIMITS, what="file") as media:
        is_picture = media.kind.holds == "picture"
    frames = np.asarray(read_image(path).convert("RGB"))[None] if is_picture else read_video(path)
    detection = search(frames, watermarker)
    stored = ((read_metadata(path) or {}).get("watermark") or {}).get("payload")
    facts = {**asdict(detection), "identifier in the metadata": stored}
    print_facts({name: value for name, value in facts.items() if value is not None}, as_json)
    return 0 if detection.found else FAILED


def _describe(validation: "Validation") -> dict[str, Any]:
    """Return the facts of a check: its state, who signed, how the file was made and from what."""
    active = validation.active
    signature = active.get("signature_info", {})
    actions: Sequence[dict[str, Any]] = next(
        (a["data"]["actions"] for a in active.get("assertions", ()) if a["label"].startswith("c2pa.actions")), ()
    )
    types = [a["digitalSourceType"].rpartition("/")[2] for a in actions if "digitalSourceType" in a]
    generators = [g.get("name", "") for g in active.get("claim_generator_info", ())]
    facts = {
        "state": validation.state,
        "signed by": signature.get("issuer"),
        "at": signature.get("time"),
        "with": ", ".join(generators),
        "digital source type": ", ".join(types),
        "inputs": [_describe_ingredient(i) for i in active.get("ingredients", ())],
        "problems": list(validation.problems),
    }
    return {name: value for name, value in facts.items() if value}


def _describe_ingredient(ingredient: dict[str, Any]) -> str:
    has_manifest = "with content credentials" if ingredient.get("active_manifest") else "without content credentials"
    return f"{ingredient.get('title', 'an input')} ({ingredient.get('relationship')}), {has_manifest}"
