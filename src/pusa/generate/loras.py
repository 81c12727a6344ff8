"""Attach the LoRAs of a request to a pipeline, and tell which file got which strength on which expert."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pusa import zoo
from pusa.fsutil import FileStat, fingerprint_of, sampled_fingerprint_of, stat_of
from pusa.lora.adapters import adapter_names
from pusa.lora.layouts import read_lora
from pusa.lora.placement import PlacedFile, Source, find_files, place_loras
from pusa.lora.sources import EXPERTS, NOISE_OF, parse_lora, public_name
from pusa.pipeline import PusaPipeline
from pusa.request import ResolvedRequest

Loras = list[dict[str, PlacedFile]]


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


def ranks_of(request: ResolvedRequest) -> dict[str, int]:
    """Sum the ranks of a request's LoRAs by expert, for a plan; empty where the model's own is taken."""
    model = zoo.find(request.model)
    sources = list(request.lora) or list(model.own_lora if model else ())
    ranks: dict[str, int] = {}
    for files in place_loras(EXPERTS[: model.experts] if model else EXPERTS, sources):
        for expert, file in files.items():
            found = read_lora(file.path, expert, shapes_only=True).ranks
            ranks[expert] = ranks.get(expert, 0) + max(found, default=0)
    return ranks


def has_pusa(pipe: PusaPipeline) -> bool:
    """Tell if an adapter follows the request's alpha."""
    return bool(_experts_with_pusa(pipe))


def set_alphas(pipe: PusaPipeline, request: ResolvedRequest, loras: Loras) -> None:
    """Set the first LoRA, or the model's own, to the request's alphas, save where its source has a strength."""
    wanted = alphas(request, loras)
    if experts := _experts_with_pusa(pipe):
        pipe.set_alpha({expert: wanted[expert] for expert in experts})


def notes(request: ResolvedRequest, loras: Loras) -> Iterator[str]:
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
            yield (
                f"LoRA {file.path.name}: strength {strength:g} on {place}"
                + (f", {file.reason}" if file.reason else "")
                + (f"; {len(left_out)} image-to-video layers are left out ({left_out[0]}, ...)" if left_out else "")
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
        return list(entry.own_lora), [told]
    told = f"{entry.name} is recognised as {entry.family}" if entry.family else ""
    if entry.lora is None:
        return [], [f"{told}: its defaults apply"] if told else []
    try:
        source = entry.lora.fetch()
    except Exception as error:  # its class depends on the Hub client's HTTP library
        if not told:
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return [], [
            f"{told}: its defaults apply, but its Pusa LoRA ({entry.lora.source}) is not here and cannot be "
            f"downloaded ({reason})"
        ]
    return [source], [f"{told}: its defaults and its Pusa LoRA ({entry.lora.source}) apply"] if told else []


def missing_note(pipe: PusaPipeline, request: ResolvedRequest) -> str | None:
    """Write a line if a request has conditions and no LoRA makes the model follow them.

    Wan2.2 TI2V-5B (`expand_timesteps`) is trained to follow a first frame that is clean, and needs no LoRA for it.
    """
    if has_pusa(pipe) or not (request.conditions or request.task != "generate"):
        return None
    if not pipe.config.expand_timesteps:
        return (
            "no Pusa LoRA is loaded: unless one is merged into these weights, images and videos will not be followed "
            "well; --lora FILE adds one"
        )
    specs = request.conditions
    places = {place.latent_index(request.frames, request.fps) for spec in specs for place in spec.positions}
    is_first_frame = request.task == "generate" and [spec.kind for spec in specs] == ["image"] and places == {0}
    if is_first_frame and request.frames <= request.window:
        return None
    return (
        "no Pusa LoRA is loaded: this model follows an image at the first frame, and will not follow other places "
        "well; --lora FILE adds one"
    )


def alphas(request: ResolvedRequest, loras: Loras) -> dict[str, float]:
    """Return the alpha of the first LoRA, or of the model's own, by expert."""
    asked = {"transformer": request.alpha, "transformer_2": request.alpha_2 or request.alpha}
    first = loras[0] if loras else {}
    return asked | {expert: file.strength for expert, file in first.items() if file.strength is not None}


def _experts_with_pusa(pipe: PusaPipeline) -> list[str]:
    models = {name: getattr(pipe, name) for name in EXPERTS}
    return [name for name, model in models.items() if model is not None and "pusa" in adapter_names(model)]


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
