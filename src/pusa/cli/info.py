"""Describe files and models for `pusa info` and `pusa models`."""

import json
import math
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pusa.cli.folders import describe_folder
from pusa.cli.options import find_file
from pusa.cli.run import MissingModelError

if TYPE_CHECKING:
    from pusa.models.single_file.recognition import SingleFile
    from pusa.zoo import ZooModel

_GROUPS_WITH_A_LINE_EACH = 30
_SAFETENSORS, _PICKLES = ".safetensors", (".pt", ".pth", ".bin", ".ckpt")


def describe(file: str) -> dict[str, Any]:
    """Return the facts about a file by their names.

    Raises:
        ValueError: the file is damaged or of an unknown kind.
        FileNotFoundError: there is no such file.
    """
    if Path(file).expanduser().is_dir():
        return describe_folder(Path(file).expanduser())
    path = find_file(file, "file")
    if path.suffix.lower() == ".gguf":
        return _describe_single_file(_recognise(path))
    if path.suffix.lower() == _SAFETENSORS:
        facts = _describe_tensors(path, *_read_safetensors(path))
        return _with_recognised_parts(facts, path) if "part" in facts else facts
    if path.suffix.lower() in _PICKLES:
        return _describe_tensors(path, *_read_pickle(path), {})
    return _describe_media(path)


# --- pictures and videos


def _describe_media(path: Path) -> dict[str, Any]:
    from pusa.media import MediaError, probe_image, probe_video, read_metadata
    from pusa.media.source import DEFAULT_LIMITS, open_source

    with open_source(path, limits=DEFAULT_LIMITS, what="file") as media:
        kind = media.kind
    if kind.holds == "other":
        raise MediaError(f"{media.name} is {kind.name}: info knows videos, pictures, LoRAs, checkpoints and latents")
    stored = read_metadata(path) or {}
    facts = asdict(probe_image(path) if kind.holds == "picture" else probe_video(path))
    size, notes = f"{facts.pop('width')}x{facts.pop('height')}", list(facts.pop("notes"))
    made_from = {**describe_marks(path), **({"request": stored["request"]} if "request" in stored else {})}
    return {"kind": kind.name, "size": size, **facts, **({"notes": notes} if notes else {}), **made_from}


def describe_marks(path: Path) -> dict[str, Any]:
    """Return what a picture or a video tells of itself, apart from its request, by name."""
    from pusa.media import read_tag_names
    from pusa.provenance.marks import read_marks

    marks = read_marks(path)
    mark = marks.mark
    request, carried, watermark = (_as_dict(marks.stored.get(name)) for name in ("request", "inputs", "watermark"))
    specs = [_as_dict(spec) for spec in request.get("conditions") or ()]
    names = {spec.get("sha256"): f"{spec.get('kind')} {spec.get('file')}" for spec in specs}
    facts = {
        "digital source type": mark and mark.source_type,
        "AI system": mark and f"{mark.system} {mark.version}".strip(),
        "marked inputs": [f"{i.source_type or 'content credentials'} {i.system}".strip() for i in mark.inputs]
        if mark
        else [],
        "XMP": "dropped by another program since: `pusa provenance sign` puts it back"
        if marks.is_packet_missing
        else None,
        "content credentials": "yes: see `pusa provenance verify`" if marks.has_manifest else None,
        "watermark": watermark.get("name"),
        "rounded weights": _rounded_weights(_as_dict(marks.stored.get("weights"))),
        "carries": [f"{names.get(sha, 'an input')}, {len(text) * 3 // 4000} kB" for sha, text in carried.items()],
        "other metadata": read_tag_names(path),
    }
    return {name: value for name, value in facts.items() if value}


def _rounded_weights(weights: dict[str, Any]) -> str | None:
    """Name the storage of transformers in fewer bits, and of parts that stay as their single files store them."""
    rounded = {"transformer": _as_dict(weights.get("model")).get("storage")}
    rounded |= {name: _as_dict(part).get("kept") for name, part in _as_dict(weights.get("parts")).items()}
    return ", ".join(f"{name}: {storage}" for name, storage in rounded.items() if storage) or None


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# --- weights and latents


def _read_safetensors(path: Path) -> tuple[dict[str, list[int]], list[str], dict[str, str]]:
    """Return shapes by name, dtypes and the header's metadata, without reading a tensor."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            dtypes = {part.get_dtype() for part in parts.values()}
            return {name: part.get_shape() for name, part in parts.items()}, sorted(dtypes), file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): download or copy it again") from error


def _read_pickle(path: Path) -> tuple[dict[str, list[int]], list[str]]:
    """Return shapes by name and dtypes; unpickle tensors only, never code."""
    import pickle
    import zipfile

    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged or holds code beside tensors, and was not loaded: ask for a safetensors file"
        ) from error
    for wrapper in ("state_dict", "model_state", "module", "model"):
        state = state[wrapper] if isinstance(state, dict) and isinstance(state.get(wrapper), dict) else state
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    return {name: list(tensor.shape) for name, tensor in tensors.items()}, sorted(dtypes)


def _describe_tensors(
    path: Path, shapes: dict[str, list[int]], dtypes: list[str], metadata: dict[str, str]
) -> dict[str, Any]:
    if not shapes:
        raise ValueError(f"{path} holds no tensors: it is neither a checkpoint nor a LoRA")
    if any("lora_" in name or name.endswith((".diff", ".diff_b")) for name in shapes):
        return _describe_lora(path)
    facts: dict[str, Any] = {"kind": "a checkpoint"}
    if set(shapes) == {"latents"}:
        facts = {"kind": "saved latents", "shape": shapes["latents"]}
    else:
        parameters = sum(math.prod(shape) for shape in shapes.values())
        facts |= {"part": _guessed_part(shapes), "parameters": f"{parameters:,}", "tensors": len(shapes)}
    facts |= {"dtype": ", ".join(dtypes)}
    if "pusa" in metadata:
        facts["request"] = json.loads(metadata["pusa"]).get("request")
    return facts


def _recognise(path: Path) -> "SingleFile":
    from pusa.models.single_file.recognition import recognise

    return recognise(path)


def _describe_single_file(file: "SingleFile") -> dict[str, Any]:
    from pusa.models.sources.file_set import describe
    from pusa.zoo import families

    problems = [part.problem for part in file.parts if part.problem]
    return {"kind": "a checkpoint", "holds": describe(file, families()), "cannot be used": "; ".join(problems)}


def _with_recognised_parts(facts: dict[str, Any], path: Path) -> dict[str, Any]:
    """Name the part as the commands that load a single file do: prefixes, other families, several parts in one."""
    file = _recognise(path)
    if not any(part.component for part in file.parts):
        return facts
    return {**_describe_single_file(file), **{name: value for name, value in facts.items() if name != "part"}}


def _describe_lora(path: Path) -> dict[str, Any]:
    from pusa.lora.layouts import describe_lora

    lora = describe_lora(path)
    ranks = ", ".join(map(str, lora.ranks))
    extras = [name for name in ("alpha", "diff", "diff_b") if getattr(lora, f"has_{name}")]
    return {
        "kind": "a LoRA",
        "for": str(lora.model),
        "layout": lora.layout,
        "layers": lora.layers,
        "rank": ranks,
        "dtype": lora.dtype,
        "also holds": ", ".join(extras) or "nothing else",
    }


def _guessed_part(shapes: dict[str, list[int]]) -> str:
    """Name the part of a model that a state dict is, in either layout."""
    from pusa.models import original
    from pusa.models.files import WrongArchitectureError
    from pusa.zoo import ZOO

    if "token_embedding.weight" in shapes or "shared.weight" in shapes:
        return "text encoder (UMT5)"
    if any(name.startswith("decoder.") for name in shapes):
        return "VAE"
    if "patch_embedding.weight" not in shapes:
        return "unknown"
    stock = "condition_embedder.time_proj.weight" in shapes
    layout = "diffusers layout" if stock else "original layout"
    try:
        config = original.config_from_keys(original.transformer_to_original(shapes) if stock else shapes)
    except WrongArchitectureError as error:
        return f"transformer, {layout}: {error}"
    names = [m.name for m in ZOO.values() if all(config.get(k, v) == v for k, v in m.transformer.items())]
    return f"transformer, {layout}, {config['num_layers']} blocks; fits {' or '.join(names) or 'no model of the zoo'}"


# --- models


def check_model(source: str) -> None:
    """Raise MissingModelError for a source that is neither in the zoo, nor a folder, nor a possible name of the Hub."""
    from pusa import zoo

    is_listed = source == "mini" or zoo.find(source) is not None  # for mini, `generate` knows what to do
    path = Path(source).expanduser()
    if path.is_file() or (not is_listed and not path.is_dir() and source.count("/") != 1):
        find_model(source)


def find_model(name: str) -> "ZooModel":
    from pusa import zoo
    from pusa.models import files

    if Path(name).expanduser().is_file():
        raise ValueError(files.describe_single_file(Path(name).expanduser()))
    try:
        return zoo.find(name) or zoo.in_folder(Path(name).expanduser()) or zoo.get(name)
    except ValueError as error:
        raise MissingModelError(str(error)) from error


def list_models() -> dict[str, dict[str, Any]]:
    """Name -> what it is, what it takes to download, and how it would run on this machine."""
    from pusa.zoo import describe_fit, get, names

    listed = {}
    for name in names():
        try:
            model = get(name)
        except ValueError as error:  # of one that was added
            listed[name] = {"about": str(error)}
            continue
        download = "those parts that were not added" if model.family else _gigabytes(model.download_bytes)
        listed[name] = {"about": model.title, "download": download, "here": describe_fit(model)}
    return listed


def describe_model(name: str) -> dict[str, Any]:
    """Return the facts about one model by their names."""
    from pusa.zoo import ZOO, describe_fit, find, names

    folder = Path(name).expanduser()
    facts = {} if name in names() or not folder.is_dir() else describe_folder(folder)
    if "to choose" in facts:
        return facts
    model = find(name) if facts else find_model(name)
    if model is None:
        return facts
    defaults = {
        name: dict(v) if name == "alpha" and not isinstance(v, float) else v
        for name, v in vars(model.defaults).items()
        if name != "fast"
    }
    return {
        "name": model.name,
        "about": model.title,
        "from": model.hub_id or ("this package" if model.name in ZOO else str(model.folder)),
        "single files": {part: str(path) for part, path in model.files.items()} or None,
        **({"download": _gigabytes(model.download_bytes)} if model.family is None else {}),
        **facts,
        "parameters": {part: f"{count:,}" for part, count in model.parameters.items()},
        "own weights": {part: f"{file.repository}/{file.name}" for part, file in model.weights.items()} or None,
        "smaller files": _smaller_files(model) or None,
        "Pusa LoRA": _lora_source(model),
        "fast": _fast_mode(model),
        "words": f"{sum(map(len, model.words.values()))} groups: see --words" if model.words else None,
        "here": describe_fit(model),
        "defaults": {name: value for name, value in defaults.items() if value is not None},
    }


def _smaller_files(model: "ZooModel") -> dict[str, list[str]]:
    """List single files that are taken instead of the repository's own where a plan has no use for fp32."""
    return {
        part: [
            f"{file.repository}/{file.name.rpartition('/')[2]} ({_gigabytes(file.size_bytes)})"
            for file in choices.values()
            if file.size_bytes < model.file_bytes.get(part, 0)
        ]
        for part, choices in model.published.items()
        if part not in model.files and model.hub_id
    }


def _lora_source(model: "ZooModel") -> str:
    if model.own_lora:
        return ", ".join(model.own_lora)
    if model.lora is None:
        return "none"
    return "part of it" if model.is_ours else model.lora.source


def _fast_mode(model: "ZooModel") -> str | None:
    """Describe what --fast does; None for a model without it."""
    fast, lora = model.defaults.fast, model.fast_lora
    if fast is None:
        return None
    beside = f", with {lora.source} ({_gigabytes(lora.file_bytes)})" if lora else ", without a LoRA made for it"
    return f"{fast.steps} steps, guidance {fast.guidance:g}{beside}"


def words_of_model(name: str) -> dict[str, list[list[str]]]:
    """Return the groups of phrases that mean the same, by kind.

    Raises:
        ValueError: the model has no such list.
    """
    model = find_model(name)
    if not model.words:
        raise ValueError(f"{name} comes without a list of words: write what you like")
    return {kind: [list(group) for group in groups] for kind, groups in model.words.items()}


def words_as_text(words: dict[str, list[list[str]]]) -> str:
    """Format words for people: synonyms in brackets, a line for each group, or one paragraph for many groups."""
    lines: list[str] = []
    for kind, groups in words.items():
        shown = [first + (f" ({', '.join(others)})" if others else "") for first, *others in groups]
        paragraph = len(groups) > _GROUPS_WITH_A_LINE_EACH
        lines += [kind, *(textwrap.wrap(", ".join(shown), 100) if paragraph else shown), ""]
    return "\n".join(line if line in (*words, "") else f"  {line}" for line in lines[:-1])


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count else "none"
