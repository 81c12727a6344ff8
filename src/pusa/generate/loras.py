"""Attach the LoRAs of a request to a pipeline, and tell which file got which strength on which expert."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pusa import zoo
from pusa.acceleration.needs import own_lora_ranks
from pusa.codes import CodedText
from pusa.errors import first_line
from pusa.fsutil import FileStat, fingerprint_of, sampled_fingerprint_of, stat_of
from pusa.lora.adapters import adapter_names
from pusa.lora.layouts import read_lora
from pusa.lora.placement import PlacedFile, Source, find_files, place_loras
from pusa.lora.sources import EXPERTS, NOISE_OF, parse_lora, public_name
from pusa.pipeline import PusaPipeline
from pusa.request import ResolvedRequest

Loras = list[dict[str, PlacedFile]]

FAST = "fast"
"""Name of the adapter that a request with `fast` adds."""


def attach(pipe: PusaPipeline, sources: Sequence[Source], layers: Literal["all", "fitting"]) -> Loras:
    """Attach LoRAs, the first as "pusa"; return their files by expert. Raises as `pusa.lora.load_pusa`."""
    experts = [name for name in EXPERTS if getattr(pipe, name) is not None]
    loras = place_loras(experts, sources)
    for number, files in enumerate(loras):
        strengths = {expert: 1.0 if file.strength is None else file.strength for expert, file in files.items()}
        name = "pusa" if number == 0 else f"lora_{number}"
        paths = {expert: file.path for expert, file in files.items()}
        pipe.load_pusa(paths, alpha=strengths, adapter_name=name, layers=layers)
    return loras


def check_files(sources: Iterable[str]) -> None:
    """Find, or download, the files of sources before a large model is loaded. Raises as `attach`."""
    for source in sources:
        for text in parse_lora(source).files.values():
            find_files(text)


def fast_lora(request: ResolvedRequest) -> zoo.LoraSource | None:
    """Return the 4-step LoRA that a request adds: none where LoRAs of its own replace all of the model's."""
    if not request.fast or request.lora:
        return None
    model = zoo.find(request.model)
    return model.fast_lora if model else None


def fetch_fast(request: ResolvedRequest) -> dict[str, PlacedFile]:
    """Find, or download, the files of the 4-step LoRA that a request adds: expert -> file; empty without one.

    Raises:
        FileNotFoundError: they are not here and cannot be downloaded.
    """
    lora = fast_lora(request)
    if lora is None:
        return {}
    try:
        files = lora.fetch()
    except Exception as error:  # its class depends on the Hub client's HTTP library
        names = " and ".join(f"{lora.source}/{name}" for name in lora.files.values())
        raise FileNotFoundError(
            f"the 4-step LoRA of {request.model} ({names}) is not on this machine and cannot be downloaded "
            f"({first_line(error)}): give it, after Pusa's, with --lora FILE --lora FILE, or leave --fast out"
        ) from error
    return {expert: PlacedFile(path, 1.0, "for few steps") for expert, path in files.items()}


def attach_fast(pipe: PusaPipeline, files: Mapping[str, PlacedFile]) -> None:
    """Attach the files of `fetch_fast` at strength 1. Raises as `pusa.lora.load_pusa`."""
    if files:
        pipe.load_pusa({expert: file.path for expert, file in files.items()}, alpha=1.0, adapter_name=FAST)


def ranks_of(request: ResolvedRequest) -> dict[str, int]:
    """Sum the ranks of a request's LoRAs by expert, for a plan; empty where the model's own Pusa LoRA is all."""
    model = zoo.find(request.model)
    sources = list(request.lora) or list(model.own_lora if model else ())
    ranks: dict[str, int] = {}
    if model and fast_lora(request):
        pusa = None if model.own_lora else model.lora  # the user's own are counted below
        ranks = own_lora_ranks(replace(model, lora=pusa), fast=True)
    for files in place_loras(EXPERTS[: model.experts] if model else EXPERTS, sources):
        for expert, file in files.items():
            found = read_lora(file.path, expert, shapes_only=True).ranks
            ranks[expert] = ranks.get(expert, 0) + max(found, default=0)
    return ranks


def has_pusa(pipe: PusaPipeline) -> bool:
    """Tell if an adapter follows the request's alpha."""
    return bool(_experts_with("pusa", pipe))


def set_alphas(pipe: PusaPipeline, request: ResolvedRequest, loras: Loras) -> None:
    """Set the first LoRA, or the model's own, to the request's alphas, save where its source has a strength.

    A 4-step LoRA acts for requests with `fast` alone.
    """
    wanted = alphas(request, loras)
    if experts := _experts_with("pusa", pipe):
        pipe.set_alpha({expert: wanted[expert] for expert in experts})
    if _experts_with(FAST, pipe):
        pipe.set_alpha(1.0 if fast_lora(request) else 0.0, adapter_name=FAST)


def notes(request: ResolvedRequest, loras: Loras) -> Iterator[CodedText]:
    """Write a line for each file: its strength, its expert, and what of it was left out."""
    wanted = alphas(request, loras)
    for number, files in enumerate(loras):
        for expert, file in files.items():
            strength = file.strength if file.strength is not None else wanted[expert] if number == 0 else 1.0
            noise = f"the {NOISE_OF[expert]}-noise expert ({expert})"
            place = noise if len(files) > 1 or expert != "transformer" or file.reason == "by its name" else expert
            left_out: tuple[str, ...] = ()
            if request.lora_layers == "fitting":
                left_out = read_lora(file.path, expert, shapes_only=True).without_image_layers().left_out
            message = (
                f"LoRA {file.path.name}: strength {strength:g} on {place}"
                + (f", {file.reason}" if file.reason else "")
                + (f"; {len(left_out)} image-to-video layers are left out ({left_out[0]}, ...)" if left_out else "")
            )
            values = {"name": file.path.name, "strength": strength, "expert": NOISE_OF[expert], "left": len(left_out)}
            yield CodedText("lora_used", message, **values)


def fast_notes(request: ResolvedRequest, files: Mapping[str, PlacedFile]) -> Iterator[str]:
    """Write what makes few steps enough for a request with `fast`: the files of `fetch_fast`, or LoRAs of its own."""
    if not request.fast:
        return
    if files:
        for note in notes(request, [dict(files)]):
            yield CodedText("fast_lora_used", f"4-step {note.removesuffix(', for few steps')}", **note.values)
    elif request.lora and (model := zoo.find(request.model)) and model.fast_lora:
        yield CodedText(
            "fast_lora_replaced",
            "the LoRAs of the request replace the model's 4-step LoRA, too: one of them has to be made for few steps",
        )


def own_files(entry: zoo.ZooModel) -> tuple[list[str | dict[str, Path]], list[str]]:
    """Find, or download, the Pusa LoRA of a model, and write notes about a model that was recognised.

    Returns:
        A source for `attach`, if there is one, and the notes. A recognised folder does without a LoRA that cannot be
        fetched; for a name of the zoo that is an error, as a name asks for all of the model.
    """
    if entry.is_ours:
        return [], []  # in the folder, and attached with it
    if entry.own_lora:
        names = " and ".join(map(public_name, entry.own_lora))
        told = f"{entry.name} is a {entry.family}: its defaults and its own LoRA ({names}) apply"
        return list(entry.own_lora), [_recognised(entry, told)]
    told = f"{entry.name} is recognised as {entry.family}" if entry.family else ""
    if entry.lora is None:
        return [], [_recognised(entry, f"{told}: its defaults apply")] if told else []
    try:
        source = entry.lora.fetch()
    except Exception as error:  # its class depends on the Hub client's HTTP library
        if not told:
            raise
        message = (
            f"{told}: its defaults apply, but its Pusa LoRA ({entry.lora.source}) is not here and cannot be "
            f"downloaded ({first_line(error)})"
        )
        return [], [CodedText("pusa_lora_missing", message, name=entry.name, family=entry.family)]
    message = f"{told}: its defaults and its Pusa LoRA ({entry.lora.source}) apply"
    return [source], [_recognised(entry, message)] if told else []


def _recognised(entry: zoo.ZooModel, message: str) -> CodedText:
    return CodedText("model_recognised", message, name=entry.name, family=entry.family)


def missing_note(pipe: PusaPipeline, request: ResolvedRequest) -> str | None:
    """Write a line if a request has conditions and no LoRA makes the model follow them.

    Wan2.2 TI2V-5B (`expand_timesteps`) is trained to follow a first frame that is clean, and needs no LoRA for it.
    """
    if has_pusa(pipe) or not (request.conditions or request.task != "generate"):
        return None
    if not pipe.config.expand_timesteps:
        model = zoo.find(request.model)
        note = pipe.base.conditions_note
        return None if (model is not None and model.weights) or not note else CodedText("conditions_not_followed", note)
    specs, clip = request.conditions, (request.frames, request.fps, request.frames_per_latent)
    places = {place.latent_index(*clip) for spec in specs for place in spec.positions}
    is_first_frame = request.task == "generate" and [spec.kind for spec in specs] == ["image"] and places == {0}
    if is_first_frame and request.frames <= request.window:
        return None
    return CodedText(
        "no_pusa_lora",
        "no Pusa LoRA is loaded: this model follows an image at the first frame, and will not follow other places "
        "well; --lora FILE adds one",
    )


def alphas(request: ResolvedRequest, loras: Loras) -> dict[str, float]:
    """Return the alpha of the first LoRA, or of the model's own, by expert."""
    asked = {"transformer": request.alpha, "transformer_2": request.alpha_2 or request.alpha}
    first = loras[0] if loras else {}
    return asked | {expert: file.strength for expert, file in first.items() if file.strength is not None}


def _experts_with(adapter: str, pipe: PusaPipeline) -> list[str]:
    models = {name: getattr(pipe, name) for name in EXPERTS}
    return [name for name, model in models.items() if model is not None and adapter in adapter_names(model)]


# ---- files that change -----------------------------------------------------------------------------------------------


def stats_of(model: Path | None, sources: Iterable[str], files: Iterable[Path] = ()) -> tuple[FileStat, ...]:
    """List what tells if the files of a model and its LoRAs have changed; nothing for those on the Hub."""
    texts = [text for source in sources for text in parse_lora(source).files.values()]
    paths = [*([model] if model else []), *files, *(Path(text).expanduser() for text in texts)]
    return tuple(stat for path in paths for stat in stat_of(path))


def hashes(source: str, folder: Path | None, loras: Loras, parts: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """Hash the weights a video is made with: the model's folder, or else its Hub id and revision, and each LoRA.

    Single files of `parts` of the model count with their names and a hash of their content, large ones by samples.
    """
    files = [{"file": file.path.name, "sha256": fingerprint_of(file.path)} for lora in loras for file in lora.values()]
    found = {"model": {"sha256": fingerprint_of(folder)} if folder else {"source": source}, "lora": files}
    if parts:
        found["parts"] = {
            part: {"file": path.name, "sha256": sampled_fingerprint_of(path)} for part, path in parts.items()
        }
    return found


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Write a line for each model or LoRA that is another one than `hashes` returned before."""
    old, new = (weights.get("model", {}) for weights in (before, now))
    for key, name in (("sha256", "sha256 "), ("source", "")):
        if key in old and key in new and old[key] != new[key]:
            was, is_now = (weights[key][:12] + "..." if name else weights[key] for weights in (old, new))
            yield f"the model is another one than this video was made with ({name}{is_now}, was {was})"
    was_stored, is_stored = (weights.get("storage", "none") for weights in (old, new))
    if old and was_stored != is_stored:
        yield (
            f"this video was made with --quantize {was_stored}, and its weights are rounded in another way now: give "
            "it for equal frames"
        )
    if old and old.get("computes_all", False) != new.get("computes_all", False):
        yield (
            "this video was made with every frame computed at every step, for lack of memory: give --exact for equal "
            "frames"
            if "computes_all" in old
            else "every frame is computed at every step now, for lack of memory: small differences are likely"
        )
    for key, option in (("compiled", "--compile"), ("attention", "--attention")):
        if old and old.get(key) != new.get(key):
            was, is_now = (_with(option, weights.get(key)) for weights in (old, new))
            yield f"this video was made {was} and is made {is_now} now: small differences are likely"
    old_parts, new_parts = before.get("parts", {}), now.get("parts", {})
    for part in sorted({*old_parts, *new_parts} if before else ()):
        old, new = old_parts.get(part, {}), new_parts.get(part, {})
        if old.get("sha256") != new.get("sha256"):
            yield (
                f"the {part} comes from {new.get('file', 'the model')}, and this video was made with "
                + (f"{old['file']}: give it with --{part.replace('_', '-')}" if old else "the model's own")
            )
        elif old.get("kept") != new.get("kept"):
            was, is_now = (f"as {entry['kept']}" if "kept" in entry else "as full weights" for entry in (old, new))
            yield f"this video was made with {old['file']} {was} and is made {is_now} now: small differences are likely"
    old_files, new_files = before.get("lora", []), now.get("lora", [])
    for was, file in zip(old_files, new_files, strict=False):
        if was["sha256"] != file["sha256"]:
            yield (
                f"LoRA {file['file']} is another one than this video was made with (sha256 {file['sha256'][:12]}..., "
                f"was {was['sha256'][:12]}...)"
            )


def _with(option: str, value: str | bool | None) -> str:
    """Say if an option was given, and its value."""
    if not value:
        return f"without {option}"
    return f"with {option}" + (f" {value}" if isinstance(value, str) else "")
