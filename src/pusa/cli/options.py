"""Define the command line's options from the request's fields, and build a request from their values."""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import click

from pusa.acceleration.attention import WORDS
from pusa.acceleration.decisions import QUANTIZE, WISHES, LoadOptions
from pusa.cli.files import FILE_OPTIONS, take_files
from pusa.fields import FieldSpec, field_specs
from pusa.numerals import parse_number, parse_numbers, parse_size
from pusa.provenance.options import MarkOptions
from pusa.request import FINAL_NOISE, ConditionSpec, GenerationRequest, Position, Task, parse_positions, prompt_lines

C = TypeVar("C", bound=Callable[..., Any])

_SPECIAL = {"task", "prompt", "width", "height"}
_FLAGS = {"negative_prompt": "--negative"}
_TYPES: dict[str, Any] = {"integer": click.INT, "number": click.FLOAT, "string": click.STRING, "list": click.STRING}
_REQUEST_FIELDS = {field.name: field for field in field_specs(GenerationRequest) if field.name not in _SPECIAL}
_CONDITION_FIELDS = {field.name: field for field in field_specs(ConditionSpec)}


def _option(field: FieldSpec) -> Callable[[C], C]:
    default = field.unset or (field.default if isinstance(field.default, str) else None)
    facts = [" ".join(filter(None, (field.range, field.unit))), f"default: {default}" if default else ""]
    if field.type == "list":
        facts.append("may be repeated")
    hint = "; ".join(filter(None, facts))
    flag = _FLAGS.get(field.name, "--" + field.name.replace("_", "-"))
    if field.type == "boolean":
        return click.option(flag, field.name, is_flag=True, default=None, help=field.help)
    return click.option(
        flag,
        field.name,
        type=click.Choice(field.choices) if field.choices else _TYPES[field.type],
        multiple=field.type == "list",
        help=f"{field.help} [{hint}]" if hint else field.help,
    )


def _apply(options: Sequence[Callable[[C], C]]) -> Callable[[C], C]:
    def decorate(command: C) -> C:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def request_options(*without: str) -> Callable[[C], C]:
    """Add an option for every field of a request to a command, save those named in `without`."""
    size = click.option(
        "--size",
        metavar="WIDTHxHEIGHT",
        help="Size in pixels, such as 832x480; rounded to multiples of 16, or of 32 for wan2.2-ti2v-5b. [default: the "
        "model's]",
    )
    return _apply([size, *(_option(field) for field in _REQUEST_FIELDS.values() if field.name not in without)])


image_options = _apply(
    [
        click.option("--image", metavar="FILE", type=click.Path(), help="The first frame."),
        click.option(
            "--keyframe",
            "keyframes",
            metavar="FILE@POSITION[:NOISE]",
            multiple=True,
            help="An image at a place: a latent frame (3), a frame (80f), seconds (1.5s) or last; negative counts from "
            "the end. With its own noise after a colon: cat.png@1.5s:0.3. [may be repeated]",
        ),
        _option(_CONDITION_FIELDS["fit"]),
        _option(_CONDITION_FIELDS["encode"]),
    ]
)
video_options = _apply(
    [
        click.option(
            "--video",
            metavar="FILE",
            type=click.Path(),
            help="A video to complete: its frames stay at their own places.",
        ),
        click.option(
            "--positions", metavar="LIST", help='Which latent frames of the video are kept: "0,1,2,3". [default: all]'
        ),
    ]
)
noise_option = click.option(
    "--noise",
    metavar="LIST",
    help="How far the model may depart from what is given: 0 keeps it exactly, 1 ignores it. One number, or one for "
    'each latent frame that is kept of a video: "0,0.3,0.4,0.5". [0..1; default: the preset\'s]',
)


final_options = _apply(
    [
        click.option(
            "--noise",
            type=click.FLOAT,
            help="How far the final may depart from the draft: 0 keeps it blurred, 1 ignores it. "
            f"[0..1; default: {FINAL_NOISE:g}]",
        ),
        click.option(
            "--size", metavar="WIDTHxHEIGHT", help="Size in pixels. [default: the model's, or twice the draft's]"
        ),
        click.option("--steps", type=click.INT, help="Denoising steps. [1..200; default: the model's times the noise]"),
    ]
)

mark_options = _apply(
    [
        click.option(
            "--sign-cert",
            metavar="FILE",
            envvar="PUSA_SIGN_CERT",
            type=click.Path(),
            help="Sign the video (C2PA) with this certificate; `pusa provenance new-cert` makes one.",
        ),
        click.option(
            "--sign-key",
            metavar="FILE",
            envvar="PUSA_SIGN_KEY",
            type=click.Path(),
            help="The certificate's private key.",
        ),
        click.option(
            "--timestamp-url",
            metavar="URL",
            envvar="PUSA_TIMESTAMP_URL",
            help="Time stamp authority, so that the signature outlives its certificate. [default: none is asked]",
        ),
        click.option(
            "--watermark",
            metavar="NAME[:FILE]",
            help="Embed a watermark in the pixels: rivagan, or videoseal:FILE. [default: none]",
        ),
    ]
)


load_options = _apply(
    [
        *FILE_OPTIONS,
        click.option(
            "--memory",
            type=click.Choice(WISHES),
            help="How the model shares this machine's GPU memory: balanced takes exact weights unless they cannot run "
            "here, fastest rounds them where that is faster, smallest takes the least memory. [default: balanced]",
        ),
        click.option(
            "--quantize",
            type=click.Choice(QUANTIZE),
            help="How the transformer's weights are stored: fp8 and int8 halve them and change the video a little; "
            "none keeps them exact. [default: auto, by --memory]",
        ),
        click.option(
            "--attention",
            metavar="|".join(WORDS[:4]) + "|...",
            help="What computes attention: torch itself, or another library that is installed; an unknown name lists "
            "them. [default: auto, the fastest that is here]",
        ),
        click.option(
            "--compile",
            "compile_",
            is_flag=True,
            help="Compile the model: each step is faster, the first one of a new size a minute or two longer, once.",
        ),
    ]
)


add_options = _apply(FILE_OPTIONS)


def take_load_options(options: dict[str, Any]) -> LoadOptions:
    """Remove the values of `load_options` from `options`. Raises FileNotFoundError for a file that is missing."""
    given = {name: options.pop(name) for name in ("memory", "quantize", "attention")} | take_files(options)
    given["compile"] = "always" if options.pop("compile_") else None
    return LoadOptions(**{name: value for name, value in given.items() if value is not None})


def metadata_option(default: str) -> Callable[[C], C]:
    """Add ``--metadata`` to a command that takes its request from a file, where `default` is its help's default."""
    field = _REQUEST_FIELDS["metadata"]
    return click.option("--metadata", type=click.Choice(field.choices), help=f"{field.help} [default: {default}]")


def take_mark_options(options: dict[str, Any]) -> MarkOptions:
    """Remove the values of `mark_options` from `options`, and check them. Raises as `MarkOptions.check` does."""
    names = [field.name for field in fields(MarkOptions)]
    marks = MarkOptions(**{name: options.pop(name) for name in names})
    marks.check()
    return marks


def build_request(task: Task, *, size: str | None, **options: Any) -> GenerationRequest:
    """Validate the values of options as a request. Raises ValueError, pydantic's ValidationError included."""
    if size is not None:
        options["width"], options["height"] = parse_size(size, "--size")
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    lists["prompts"] = [line for text in lists.get("prompts") or [] for line in read_prompts(text)]
    values: dict[str, Any] = {name: value for name, value in lists.items() if value not in (None, [])}
    return GenerationRequest(task=task, **values)


def read_prompts(text: str) -> list[str]:
    """Return the prompt that a value of ``--prompts`` is, or the lines of its file (``@story.txt``).

    Raises FileNotFoundError or ValueError for a file that is missing, no text or empty.
    """
    if not text.startswith("@"):
        return [text]
    try:
        prompts = prompt_lines(Path(text[1:]).read_text(encoding="utf-8-sig"))  # editors of Windows write a mark first
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {text[:80]!r} is no text in UTF-8") from None
    except OSError as error:
        raise FileNotFoundError(f"--prompts {text[:80]!r} cannot be read: {error.strerror}") from None
    if not prompts:
        raise ValueError(f"--prompts {text[:80]!r} is an empty file: write a line for each prompt")
    return prompts


def parse_noise(text: str | None) -> list[float] | None:
    """Parse the value of ``--noise``. Raises ValueError."""
    if text is None:
        return None
    try:
        return parse_numbers(text)
    except ValueError:
        raise ValueError(
            f"--noise {text[:80]!r} is not understood: write a number, or several with commas: 0,0.3,0.4"
        ) from None


def parse_keyframe(text: str) -> tuple[str, Position, list[float] | None]:
    """Parse ``FILE@POSITION[:NOISE]``. The last @ divides, so that a file's name may hold @ and colons.

    Raises ValueError.
    """
    file, at, place = text.rpartition("@")
    position, colon, noise = place.partition(":")
    try:
        if not (file and at):
            raise ValueError("no @POSITION after the file")
        return file, Position.parse(position), [parse_number(noise)] if colon else None
    except ValueError as error:
        raise ValueError(
            f"--keyframe {text[:80]!r} is not understood ({error}); write FILE@POSITION[:NOISE], such as "
            "cat.png@last:0.2"
        ) from None


def build_conditions(
    *,
    image: str | None = None,
    keyframes: Sequence[str] = (),
    videos: Sequence[str] = (),
    positions: str | None = None,
    noise: str | None = None,
    **image_fields: Any,
) -> list[dict[str, Any]]:
    """Build the conditions of a request: `noise` holds for those without their own, a list of them for the videos.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a text is not understood, or an option has no condition to hold for.
    """
    numbers = parse_noise(noise)
    if numbers and len(numbers) > 1 and not videos:
        raise ValueError(f"--noise {noise!r} has {len(numbers)} numbers and no video to hold them for: give one number")
    if numbers and not (image or keyframes or videos):
        raise ValueError(
            f"--noise {noise!r} is for an image or a video: add --image, --keyframe or --video, or leave it out"
        )
    if positions is not None and not videos:
        raise ValueError(
            f"--positions {positions!r} are those of a video: add --video FILE, or use --keyframe FILE@POSITION"
        )
    shared = numbers if numbers and len(numbers) == 1 else None
    images = [parse_keyframe(text) for text in ([f"{image}@0"] if image else []) + list(keyframes)]
    conditions = [
        condition("image", file, positions=[position], noise=image_noise or shared, **image_fields)
        for file, position, image_noise in images
    ]
    places = parse_positions(positions) if positions is not None else None
    return conditions + [condition("video", file, positions=places, noise=numbers, **image_fields) for file in videos]


def condition(kind: str, file: str, **values: Any) -> dict[str, Any]:
    """Build one condition of a request without the values that are None. Raises FileNotFoundError."""
    find_file(file, kind)
    return {"kind": kind, "file": file, **{name: value for name, value in values.items() if value is not None}}


def find_file(file: str, kind: str) -> Path:
    """Return the path of an existing file. Raises FileNotFoundError."""
    path = Path(file)
    if "\0" in file or not path.exists():
        raise FileNotFoundError(f"{kind} {file!r} does not exist: check the name and the folder")
    if not path.is_file():
        raise FileNotFoundError(f"{kind} {file!r} is not a file: give a single {kind}")
    return path


def with_files_found(request: GenerationRequest, carried: Collection[str], beside: Path) -> GenerationRequest:
    """Point a stored request to its files: `carried` by sha256, at their old paths, or in the folder `beside`.

    Raises FileNotFoundError for a file in none of these.
    """
    found = []
    for spec in request.conditions:
        near = beside / Path(spec.file).name
        if spec.sha256 not in carried and not Path(spec.file).is_file():
            spec = spec.model_copy(update={"file": str(near if near.is_file() else find_file(spec.file, spec.kind))})
        found.append(spec)
    return request.model_copy(update={"conditions": found})


def output_path(output: str | None, name: str) -> Path:
    """Return the path to write to: `output`, or else a free name in the current folder made from `name`.

    Raises ValueError or FileNotFoundError for a path that cannot be written.
    """
    if output is None:
        stem = re.sub(r"[\W_]+", "-", name.lower()).strip("-")[:40].strip("-") or "video"
        candidates = (Path(f"{stem}{suffix}.mp4") for suffix in ("", *(f"-{n}" for n in range(2, 10_000))))
        return next(path for path in candidates if not path.exists())

    if output == "-":
        raise ValueError("-o - is no file: a video needs a name, such as out.mp4, as its end is written into its start")
    from pusa.media import VideoWriter

    return VideoWriter(output, width=16, height=16).path  # checks the format, and writes nothing before it is entered
