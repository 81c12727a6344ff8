"""List models by name: their parts, their defaults, what they need of a machine.

A folder with a ``pusa.json`` describes itself: the embedded model does, and so does any other of our own recipe. Other
folders are recognised by the shapes of their transformer. This module imports no torch; `pusa.loading` turns a name
into a pipeline.
"""

import difflib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pusa import added_models, resources
from pusa.defaults import TI2V_DEFAULTS, WAN_DEFAULTS, GenerationDefaults
from pusa.models import files
from pusa.models.sources import comfyui, configs
from pusa.models.sources.published import PublishedFile
from pusa.resources import DType, readable

if TYPE_CHECKING:
    from pusa.acceleration.decisions import Machine

MINI_FOLDER = Path(__file__).parent / "mini" / "weights"
CARD_FILE = "pusa.json"


@dataclass(frozen=True)
class LoraSource:
    """Pusa LoRA of a model: a Hub id or a folder, and the file of each expert."""

    source: str
    files: Mapping[str, str]

    def fetch(self, **hub: Any) -> dict[str, Path]:
        """Find the files on this machine, or download them.

        Args:
            hub: arguments of `huggingface_hub.hf_hub_download`.

        Returns:
            Expert -> path.
        """
        folder = Path(self.source)
        if folder.is_dir():
            return {expert: folder / name for expert, name in self.files.items()}
        from huggingface_hub import hf_hub_download

        return {expert: Path(hf_hub_download(self.source, name, **hub)) for expert, name in self.files.items()}


@dataclass(frozen=True)
class ZooModel:
    """One model.

    Attributes:
        transformer: values its transformer's configuration must have.
        hub_id, folder: one of them, or neither for "tiny", which `pusa.models.tiny` builds.
        parameters: component -> count.
        file_bytes: component -> size of its download.
        words: vocabulary of a model trained on no other words: kind -> groups of phrases of one meaning.
        family: the model of the zoo that a user's own folder or files were recognised as; None for the zoo's models.
        files: single files of the user's, by the part of a pipeline that they are.
        own_lora: LoRAs that the user has added with the model, as a request has them; they replace `lora`.
        published: single files of others, part -> storage ("bfloat16", "float16", "fp8") -> file.
        vae_config: values of its VAE's configuration, where neither a folder nor the latent channels tell them.
    """

    name: str
    title: str
    transformer: Mapping[str, Any]
    defaults: GenerationDefaults = WAN_DEFAULTS
    hub_id: str | None = None
    folder: Path | None = None
    parameters: Mapping[str, int] = field(default_factory=dict)
    file_bytes: Mapping[str, int] = field(default_factory=dict)
    lora: LoraSource | None = None
    words: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    family: str | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    own_lora: tuple[str, ...] = ()
    published: Mapping[str, Mapping[str, PublishedFile]] = field(default_factory=dict)
    vae_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """True for models of our own recipe, whose folder holds the Pusa LoRA too, and for "tiny"."""
        return self.hub_id is None and self.family is None

    @property
    def expand_timesteps(self) -> bool:
        """True for Wan2.2 TI2V-5B, trained with a time for each token: it follows a clean first frame by itself."""
        return self.transformer.get("in_channels") == 48

    @property
    def experts(self) -> int:
        return 2 if self.defaults.boundary_ratio is not None else 1

    @property
    def download_bytes(self) -> int:
        return sum(self.file_bytes.values())


# Counted from the published shapes. The Hub holds fp32, 4 bytes each, except Wan2.2's text encoder (bf16).
_TEXT_ENCODER_PARAMETERS = 5_680_910_336
_VAE_PARAMETERS, _WAN22_VAE_PARAMETERS = 126_892_531, 704_688_668
_WAN = {"attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256}
_WAN_1B = {**_WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_WAN_14B = {**_WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
_WAN_5B = {
    **_WAN,
    "in_channels": 48,
    "out_channels": 48,
    "num_attention_heads": 24,
    "ffn_dim": 14336,
    "num_layers": 30,
}


_COMFY_WAN21, _COMFY_WAN22 = "Comfy-Org/Wan_2.1_ComfyUI_repackaged", "Comfy-Org/Wan_2.2_ComfyUI_Repackaged"
_PUBLISHED_TEXT_ENCODER = {
    "float16": PublishedFile(
        _COMFY_WAN21, "split_files/text_encoders/umt5_xxl_fp16.safetensors", 2 * _TEXT_ENCODER_PARAMETERS
    ),
    "fp8": PublishedFile(
        _COMFY_WAN21,
        "split_files/text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        _TEXT_ENCODER_PARAMETERS + 256_384 * 4096,  # its embedding stays in fp16
    ),
}
_ITEMSIZES = {"bfloat16": 2, "float16": 2, "fp8": 1}


def _published(repository: str, parameters: int, **names: str) -> dict[str, PublishedFile]:
    """List the single files of a transformer: storage -> name without folder and suffix."""
    return {
        storage: PublishedFile(
            repository, f"split_files/diffusion_models/{name}.safetensors", _ITEMSIZES[storage] * parameters
        )
        for storage, name in names.items()
    }


def _wan(
    name: str,
    title: str,
    hub_id: str,
    transformer: Mapping[str, Any],
    experts: Mapping[str, int],
    *,
    text_encoder_itemsize: int = 4,
    vae: int = _VAE_PARAMETERS,
    defaults: GenerationDefaults = WAN_DEFAULTS,
    lora: LoraSource | None = None,
    published: Mapping[str, Mapping[str, PublishedFile]],
) -> ZooModel:
    parameters = {"text_encoder": _TEXT_ENCODER_PARAMETERS, **experts, "vae": vae}
    file_bytes = {part: 4 * count for part, count in parameters.items()}
    file_bytes["text_encoder"] = text_encoder_itemsize * _TEXT_ENCODER_PARAMETERS
    return ZooModel(
        name=name,
        title=title,
        transformer=transformer,
        defaults=defaults,
        hub_id=hub_id,
        parameters=parameters,
        file_bytes=file_bytes,
        lora=lora,
        published={"text_encoder": _PUBLISHED_TEXT_ENCODER, **published},
    )


def read_folder(folder: Path, name: str) -> ZooModel | None:
    """Read the model that a folder's ``pusa.json`` describes; None without such a file.

    Raises:
        ValueError: the file lacks an entry, or has an unknown one.
    """
    if not os.path.isfile(folder / CARD_FILE):
        return None
    card = files.read_json(folder / CARD_FILE)
    try:
        return ZooModel(
            name=name,
            title=card["title"],
            transformer=files.read_json(folder / "transformer" / "config.json"),
            defaults=GenerationDefaults(**card["defaults"]),
            folder=folder,
            parameters=files.parameter_counts(folder),
            lora=LoraSource(str(folder), card["lora"]) if "lora" in card else None,
            words={
                kind: [[group] if isinstance(group, str) else group for group in groups]
                for kind, groups in card.get("words", {}).items()
            },
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / CARD_FILE} does not describe a model ({error}): make it anew") from error


ZOO: dict[str, ZooModel] = {
    model.name: model
    for model in (
        *filter(None, [read_folder(MINI_FOLDER, "mini")]),
        ZooModel(
            name="tiny",
            title="random weights, for tests: makes noise",
            # `pusa.models.tiny` builds it
            transformer={"num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 3},
            defaults=GenerationDefaults(
                width=96, height=64, num_frames=17, steps=4, max_sequence_length=64, negative_prompt=""
            ),
            parameters={"text_encoder": 65_152, "transformer": 473_536, "vae": 924_491},
            vae_config={"base_dim": 8},
        ),
        _wan(
            "wan2.1-1.3b",
            "Wan2.1 text-to-video, 1.3 billion parameters, 480p; no Pusa adapter is published",
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            _WAN_1B,
            {"transformer": 1_418_996_800},
            published={
                "transformer": _published(_COMFY_WAN21, 1_418_996_800, bfloat16="wan2.1_t2v_1.3B_bf16"),
            },
        ),
        _wan(
            "wan2.1-14b",
            "Wan2.1 text-to-video, 14 billion parameters, 480p and 720p: the base of Pusa V1.0",
            "Wan-AI/Wan2.1-T2V-14B-Diffusers",
            _WAN_14B,
            {"transformer": 14_288_491_584},
            lora=LoraSource("RaphaelLiu/PusaV1", {"transformer": "pusa_v1.pt"}),
            published={
                "transformer": _published(
                    _COMFY_WAN21, 14_288_491_584, bfloat16="wan2.1_t2v_14B_bf16", fp8="wan2.1_t2v_14B_fp8_scaled"
                ),
            },
        ),
        _wan(
            "wan2.2-a14b",
            "Wan2.2 text-to-video, two experts of 14 billion parameters, for high and for low noise",
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            _WAN_14B,
            {"transformer": 14_288_491_584, "transformer_2": 14_288_491_584},
            text_encoder_itemsize=2,
            defaults=GenerationDefaults(alpha={"transformer": 1.5, "transformer_2": 1.4}, boundary_ratio=0.875),
            lora=LoraSource(
                "RaphaelLiu/Pusa-Wan2.2-V1",
                {"transformer": "high_noise_pusa.safetensors", "transformer_2": "low_noise_pusa.safetensors"},
            ),
            published={
                part: _published(
                    _COMFY_WAN22,
                    14_288_491_584,
                    float16=f"wan2.2_t2v_{noise}_noise_14B_fp16",
                    fp8=f"wan2.2_t2v_{noise}_noise_14B_fp8_scaled",
                )
                for part, noise in (("transformer", "high"), ("transformer_2", "low"))
            },
        ),
        _wan(
            "wan2.2-ti2v-5b",
            "Wan2.2 text- and image-to-video, 5 billion parameters, 720p at 24 fps: follows an image at the first "
            "frame as it is; no Pusa adapter for other places is published",
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            _WAN_5B,
            {"transformer": 4_999_787_712},
            text_encoder_itemsize=2,
            vae=_WAN22_VAE_PARAMETERS,
            defaults=TI2V_DEFAULTS,
            published={"transformer": _published(_COMFY_WAN22, 4_999_787_712, float16="wan2.2_ti2v_5B_fp16")},
        ),
    )
}


def get(name: str) -> ZooModel:
    """Look up a model by its name.

    Raises:
        ValueError: unknown name; the message has the nearest known one, and all of them.
    """
    if model := ZOO.get(name) or _added(name):
        return model
    near = difflib.get_close_matches(name.lower(), names(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"no model is called {name!r}: {hint}known are {', '.join(names())}; or give a Hub id or a folder")


def names() -> list[str]:
    """List the names of all models: those of the zoo, and those that the user has added."""
    return [*ZOO, *(name for name in added_models.names() if name not in ZOO)]


def families() -> dict[str, tuple[Mapping[str, Any], int]]:
    """Return the published models that a user's files may be, for `pusa.models.sources.file_set`."""
    return {model.name: (model.transformer, model.experts) for model in ZOO.values() if model.hub_id is not None}


def _added(name: str) -> ZooModel | None:
    added = added_models.read(name)
    if added is None:
        return None
    if added.family not in families():
        raise ValueError(f"model {name} was added as {added.family}, which is unknown here: remove it and add it anew")
    family = ZOO[added.family]
    return replace(
        family,
        name=name,
        title=f"added: {family.title}",
        hub_id=None if added.folder else family.hub_id,
        folder=added.folder,
        family=family.name,
        files=added.files,
        own_lora=added.lora,
    )


def find(source: str | Path) -> ZooModel | None:
    """Find a model by its name, its Hub id or its folder; None for other sources.

    A folder is described by its ``pusa.json``, or recognised by its content (see `recognise`).

    Raises:
        ValueError: a folder, or a model that was added, is described badly; or a ComfyUI folder has no model, or
            several (the message lists them).
    """
    named = next((model for model in ZOO.values() if str(source) in (model.name, model.hub_id)), None)
    folder = Path(os.path.expanduser(source))
    return named or _added(str(source)) or read_folder(folder, folder.name) or recognise(folder)


def recognise(folder: Path) -> ZooModel | None:
    """Recognise a folder as a model of the zoo, whose defaults and LoRA it gets.

    It is a model in diffusers' or Wan's own layout, or ComfyUI's folder of models. Every value of the transformer's
    configuration has to be that of the zoo's model: narrower ones are None. Raises ValueError as `find`.
    """
    if not folder.is_dir():
        return None
    if place := comfyui.models_folder(folder):
        return _in_comfyui(place)
    found = configs.folder_config(folder)
    family = None if found is None else family_of(*found)
    if family is None:
        return None
    name = Path(os.path.abspath(folder)).name
    return replace(
        family, name=name, title=f"recognised: {family.title}", hub_id=None, folder=folder, family=family.name
    )


def _in_comfyui(folder: Path) -> ZooModel:
    choice = comfyui.choose(comfyui.scan(folder), families())
    family = ZOO[choice.family]
    return replace(
        family,
        name=f"comfyui-{family.name}",
        title=f"in ComfyUI: {family.title}",
        family=family.name,
        files=choice.files,
        own_lora=choice.own_lora,
    )


def family_of(config: Mapping[str, Any], experts: int = 1) -> ZooModel | None:
    """Find the published model with this configuration of its transformer and this number of them."""
    published = (model for model in ZOO.values() if model.hub_id is not None and model.experts == experts)
    return next((model for model in published if configs.fits(config, model.transformer)), None)


def public_name(source: str) -> str:
    """Name a model or a LoRA for others: without the folders of this machine, a name of the zoo or the Hub as it is."""
    path = Path(source).expanduser()
    is_local = path.is_absolute() or source.startswith((".", "~")) or path.exists()
    return Path(os.path.abspath(path)).name if is_local else source


def with_fallback(source: str) -> str:
    """Replace "mini" by "tiny" where an installation lacks its weights; return other sources unchanged."""
    return "tiny" if source == "mini" and "mini" not in ZOO else source


def defaults_of(source: str | Path) -> GenerationDefaults:
    """Return the defaults of the model that `find` returns for a source, after `with_fallback`; else Wan's."""
    model = find(with_fallback(str(source)))
    return model.defaults if model else WAN_DEFAULTS


# ---- resources -----------------------------------------------------------------------------------------------------


def check_resources(
    model: ZooModel,
    *,
    dtype: "DType | None" = None,
    folder: Path | None = None,
    skip: Collection[str] = (),
    ram: bool = True,
    machine: "Machine | None" = None,
) -> None:
    """Check that disk, RAM and GPU memory suffice for a model.

    Args:
        dtype: as for `pusa.loading.load_pipeline`: all parts must fit into RAM in it. None: there must be a plan by
            which the model makes a clip of its default size.
        folder: download folder, whose disk must have room; None: the files are on this machine.
        skip: components that are not loaded. Without a transformer, the others must fit into RAM.
        ram: False: the model is downloaded and not held in memory.
        machine: None: this one.

    Raises:
        ResourcesError: too little of one of them; the message has the need, the supply and a way out.
    """
    from pusa.acceleration.machine import machine as this_machine
    from pusa.acceleration.planning import plan

    total = sum(model.parameters.values())
    smaller = [other.name for other in ZOO.values() if other.name != "tiny" and sum(other.parameters.values()) < total]
    otherwise = f", or take a smaller model ({', '.join(smaller)})" if smaller else ""
    if folder is not None:
        download = sum(size for part, size in model.file_bytes.items() if part not in skip)
        resources.check_disk(download - _cached_bytes(model, folder), folder, model.name, otherwise=otherwise)
    counts = {part: count for part, count in model.parameters.items() if part not in skip}
    if not ram:
        return
    if dtype is not None or "transformer" in skip:
        resources.check_ram(resources.weight_bytes(counts, dtype), model.name, otherwise=otherwise)
    elif problem := plan(replace(model, parameters=counts), machine=machine or this_machine()).problem:
        said = problem.removesuffix(", or take a smaller model") if smaller else problem
        raise resources.ResourcesError(said + otherwise)


def _cached_bytes(model: ZooModel, cache: Path) -> int:
    from huggingface_hub.file_download import repo_folder_name

    blobs = cache / repo_folder_name(repo_id=str(model.hub_id), repo_type="model") / "blobs"
    return sum(path.stat().st_size for path in blobs.iterdir()) if blobs.is_dir() else 0


def describe_fit(model: ZooModel, machine: "Machine | None" = None) -> str:
    """Describe in one line how a model would make a clip of its default size on a machine (None: this one)."""
    from pusa.acceleration.machine import machine as this_machine
    from pusa.acceleration.planning import plan

    machine = machine or this_machine()
    found = plan(model, machine=machine)
    if found.problem:
        return f"no: {found.problem}"
    memory = f"{readable(found.ram_peak_bytes)} of {readable(machine.ram_bytes)} of RAM"
    if found.peak_bytes:
        memory = f"{readable(found.peak_bytes)} of {readable(machine.cards[0].memory_bytes)} of GPU memory, {memory}"
    slow = next((f"; {note}" for note in found.notes if note.startswith("very slow")), "")
    return f"yes: {found.summary.partition(': ')[2]}; {memory}{slow}"


def is_hub_id(source: str | Path) -> bool:
    """Detect names of the form ``owner/name``, which may be a model or a dataset on the Hub."""
    return isinstance(source, str) and source.count("/") == 1 and not source.startswith((".", "/", "~"))
