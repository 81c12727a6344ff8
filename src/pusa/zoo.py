"""Models by name: where their parts come from, what they need, and how they become a pipeline.

A source is a name of the `ZOO`, a Hub id or a folder in diffusers layout, or a folder as Wan publishes it. Whatever can
be known to fail (files, architecture, disk, memory) is said before anything large is downloaded or read.

A folder with a ``pusa.json`` says itself how it is meant to be used (`described`): so the embedded model does, and any
other that our own recipe has made.

Torch is imported where it is needed: names, defaults and sizes are there at once.
"""

import difflib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pusa import resources
from pusa.models import files
from pusa.models.files import COMPONENTS, MissingFilesError, WrongArchitectureError
from pusa.resources import DType, readable

if TYPE_CHECKING:
    import torch
    from transformers import UMT5EncoderModel


WAN_NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards"
)
"""Wan's default negative prompt in English, as its model cards give it."""

MINI_FOLDER = Path(__file__).parent / "mini" / "weights"
CARD_FILE = "pusa.json"

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
# A forward pass has about 26 bytes per token and channel alive at once, whatever the number of blocks: 47.0 MB were
# measured at dim 512 and 3,528 tokens in bf16.
_ACTIVATION_BYTES = 26


@dataclass(frozen=True)
class GenerationDefaults:
    """What a model is run with unless the user says otherwise. `alpha` is the Pusa adapter's, one or per expert.

    `encode` is for images at later places, see `PusaCondition`: Wan's follow the original; small VAEs in the style of
    Wan2.2 show a lone frame badly there (docs/keyframe_encoding.md).
    """

    width: int = 832
    height: int = 480
    num_frames: int = 81
    fps: float = 16.0
    steps: int = 10
    guidance: float = 3.0
    shift: float = 5.0
    alpha: float | Mapping[str, float] = 1.4
    max_sequence_length: int = 512
    negative_prompt: str = WAN_NEGATIVE_PROMPT
    encode: Literal["single", "repeat"] = "single"
    boundary_ratio: float | None = None


@dataclass(frozen=True)
class Adapter:
    """Where the Pusa LoRA of a model is: a Hub id or a folder, and the file of each expert."""

    source: str
    files: Mapping[str, str]

    def fetch(self, **hub: Any) -> dict[str, Path]:
        """The files on this machine, downloaded if need be: expert -> path. `hub`: as for `hf_hub_download`."""
        folder = Path(self.source)
        if folder.is_dir():
            return {expert: folder / name for expert, name in self.files.items()}
        from huggingface_hub import hf_hub_download

        return {expert: Path(hf_hub_download(self.source, name, **hub)) for expert, name in self.files.items()}


@dataclass(frozen=True)
class ZooModel:
    """One model. `parameters` and `file_bytes` go by component; `file_bytes` is what its download is.

    `words` is the vocabulary of a model that knows no other: by kind, groups of phrases that mean the same.
    """

    name: str
    title: str
    transformer: Mapping[str, Any]
    defaults: GenerationDefaults = GenerationDefaults()
    hub_id: str | None = None
    folder: Path | None = None
    parameters: Mapping[str, int] = field(default_factory=dict)
    file_bytes: Mapping[str, int] = field(default_factory=dict)
    lora: Adapter | None = None
    words: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)

    @property
    def experts(self) -> int:
        return 2 if self.defaults.boundary_ratio is not None else 1

    @property
    def download_bytes(self) -> int:
        return sum(self.file_bytes.values())

    @property
    def resident_bytes(self) -> int:
        """All parts in memory at the default dtypes: bf16 (2 bytes) with the VAE in fp32, or fp32 for small models."""
        return sum(resources.weight_bytes(self.parameters).values())

    @property
    def activation_bytes(self) -> int:
        """Working memory of one forward pass at the default size, beside the weights."""
        size = self.defaults
        latent_frames = (size.num_frames - 1) // 4 + 1
        tokens = latent_frames * (size.height // 16) * (size.width // 16)
        width = self.transformer["num_attention_heads"] * self.transformer["attention_head_dim"]
        return tokens * width * _ACTIVATION_BYTES


# Parameters follow from the published shapes. The Hub holds fp32, 4 bytes each, but for Wan2.2's text encoder (bf16).
_TEXT_ENCODER_PARAMETERS = 5_680_910_336
_VAE_PARAMETERS = 126_892_531
_WAN = {"attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256}
_WAN_1B = {**_WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
_WAN_14B = {**_WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}


def _wan(
    name: str,
    title: str,
    hub_id: str,
    transformer: Mapping[str, Any],
    experts: Mapping[str, int],
    *,
    text_encoder_itemsize: int = 4,
    defaults: GenerationDefaults = GenerationDefaults(),
    lora: Adapter | None = None,
) -> ZooModel:
    parameters = {"text_encoder": _TEXT_ENCODER_PARAMETERS, **experts, "vae": _VAE_PARAMETERS}
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
    )


def described(folder: Path, name: str) -> ZooModel | None:
    """The model in a folder whose ``pusa.json`` says how it is meant to be used; None without such a file.

    Raises:
        ValueError: the file does not say what it should.
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
            lora=Adapter(str(folder), card["lora"]) if "lora" in card else None,
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
        *filter(None, [described(MINI_FOLDER, "mini")]),
        ZooModel(
            name="tiny",
            title="random weights, for tests: makes noise",
            # `pusa.models.tiny` builds it
            transformer={"num_attention_heads": 3, "attention_head_dim": 32, "num_layers": 3},
            defaults=GenerationDefaults(
                width=96, height=64, num_frames=17, steps=4, max_sequence_length=64, negative_prompt=""
            ),
            parameters={"text_encoder": 65_152, "transformer": 473_536, "vae": 924_491},
        ),
        _wan(
            "wan2.1-1.3b",
            "Wan2.1 text-to-video, 1.3 billion parameters, 480p; no Pusa adapter is published",
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            _WAN_1B,
            {"transformer": 1_418_996_800},
        ),
        _wan(
            "wan2.1-14b",
            "Wan2.1 text-to-video, 14 billion parameters, 480p and 720p: the base of Pusa V1.0",
            "Wan-AI/Wan2.1-T2V-14B-Diffusers",
            _WAN_14B,
            {"transformer": 14_288_491_584},
            lora=Adapter("RaphaelLiu/PusaV1", {"transformer": "pusa_v1.pt"}),
        ),
        _wan(
            "wan2.2-a14b",
            "Wan2.2 text-to-video, two experts of 14 billion parameters, for high and for low noise",
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            _WAN_14B,
            {"transformer": 14_288_491_584, "transformer_2": 14_288_491_584},
            text_encoder_itemsize=2,
            defaults=GenerationDefaults(alpha={"transformer": 1.5, "transformer_2": 1.4}, boundary_ratio=0.875),
            lora=Adapter(
                "RaphaelLiu/Pusa-Wan2.2-V1",
                {"transformer": "high_noise_pusa.safetensors", "transformer_2": "low_noise_pusa.safetensors"},
            ),
        ),
    )
}


def get(name: str) -> ZooModel:
    """A model by its name.

    Raises:
        ValueError: no such name; the error lists those there are, the nearest first.
    """
    if name in ZOO:
        return ZOO[name]
    near = difflib.get_close_matches(name.lower(), ZOO, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"no model is called {name!r}: {hint}known are {', '.join(ZOO)}; or give a Hub id or a folder")


def find(source: str | Path) -> ZooModel | None:
    """The zoo's model behind a name or a Hub id, or the one that a folder's ``pusa.json`` describes."""
    known = next((model for model in ZOO.values() if str(source) in (model.name, model.hub_id)), None)
    folder = Path(os.path.expanduser(source))
    return known or described(folder, folder.name)


def or_stand_in(source: str) -> str:
    """The same source; "tiny" for "mini" where an installation lacks its weights."""
    return "tiny" if source == "mini" and "mini" not in ZOO else source


def defaults_of(source: str | Path) -> GenerationDefaults:
    """The defaults of a model that `find` knows, or of its stand-in; Wan's for any other source."""
    model = find(or_stand_in(str(source)))
    return model.defaults if model else GenerationDefaults()


# ---- resources -----------------------------------------------------------------------------------------------------


def check_resources(
    model: ZooModel,
    *,
    device: "str | torch.device | None" = None,
    dtype: "DType | None" = None,
    folder: Path | None = None,
    skip: Collection[str] = (),
) -> None:
    """Refuse early what cannot work.

    Args:
        model: of the zoo.
        device: a CUDA device must hold the largest part and one forward pass; None or CPU: only RAM is looked at.
        dtype: as for `load_pipeline`; None: the default.
        folder: where its files are to be downloaded; None: they are here.
        skip: components that are not loaded.

    Raises:
        ResourcesError: too little disk, RAM or GPU memory: what is needed, what there is, and the way out.
    """
    smaller = [
        other.name for other in ZOO.values() if other.name != "tiny" and other.resident_bytes < model.resident_bytes
    ]
    otherwise = f", or take a smaller model ({', '.join(smaller)})" if smaller else ""
    if folder is not None:
        download = sum(size for part, size in model.file_bytes.items() if part not in skip)
        resources.check_disk(download - _cached_bytes(model, folder), folder, model.name, otherwise=otherwise)
    counts = {part: count for part, count in model.parameters.items() if part not in skip}
    weights = resources.weight_bytes(counts, dtype)
    resources.check_ram(weights, model.name, otherwise=otherwise)
    if device is not None and str(device).startswith("cuda"):
        resources.check_gpu(max(weights.values()) + model.activation_bytes, model.name, otherwise=otherwise)


def _cached_bytes(model: ZooModel, cache: Path) -> int:
    from huggingface_hub.file_download import repo_folder_name

    blobs = cache / repo_folder_name(repo_id=str(model.hub_id), repo_type="model") / "blobs"
    return sum(path.stat().st_size for path in blobs.iterdir()) if blobs.is_dir() else 0


def fits(model: ZooModel) -> str:
    """One line for people: what the model needs, what this machine has free, and how it would run here."""
    gpu_need = max(resources.weight_bytes(model.parameters).values()) + model.activation_bytes
    ram_need = model.resident_bytes + resources.RESERVE_BYTES
    gpu, ram = resources.gpu_memory_bytes(), resources.free_memory_bytes()
    if gpu >= model.resident_bytes + model.activation_bytes:
        verdict = "yes"
    elif ram < ram_need + (0 if gpu else model.activation_bytes):
        verdict = "no"
    elif gpu >= gpu_need:
        verdict = "yes, with model offloading"
    elif gpu:
        verdict = "with group offloading or quantisation"
    else:
        verdict = "yes" if model.resident_bytes < resources.GB else "on the CPU only, very slowly"
    here = f"{readable(gpu)} and {readable(ram)}" if gpu else f"no GPU, {readable(ram)} of RAM"
    return f"needs {readable(gpu_need)} of GPU memory and {readable(ram_need)} of RAM; here {here}: {verdict}"


# ---- loading -------------------------------------------------------------------------------------------------------


def check_text_encoder(text_encoder: "UMT5EncoderModel") -> None:
    """Refuse a UMT5 encoder whose token embedding is not the one that was loaded.

    Raises:
        RuntimeError: ``encoder.embed_tokens`` is not tied to ``shared``, as with transformers 5.0 (issue 43992): every
            prompt would become noise.
    """
    if text_encoder.encoder.embed_tokens.weight is not text_encoder.shared.weight:
        raise RuntimeError(
            "the text encoder's embeddings are not tied (encoder.embed_tokens is not shared), so prompts would be "
            "garbage: upgrade transformers (its issue 43992) and load again"
        )


def load_pipeline(
    cls: type,
    source: str | Path,
    *,
    torch_dtype: "DType | None" = None,
    dtype: "DType | None" = None,
    shift: float | None = None,
    **kwargs: Any,
) -> Any:
    """Make a pipeline of class `cls` (a `WanPipeline`) from any source.

    Args:
        cls: the pipeline's class.
        source: a zoo name, a Hub id or folder in diffusers layout, or a folder as Wan publishes it.
        torch_dtype, dtype: one for all parts, or by component with a "default". None: bf16 with the VAE in fp32 from a
            billion parameters on, fp32 below; `pusa.resources.native_dtype` for what our recipe made.
        shift: flow shift of the sampler. None: what the source says, or 5.
        kwargs: components that replace the source's (``text_encoder=None`` leaves it out), and whatever
            `diffusers.DiffusionPipeline.from_pretrained` takes.

    Returns:
        The pipeline, on the CPU. Its `text_encoder_identity` keeps `pusa.models.prompt_cache` from mixing up encoders.

    Raises:
        ValueError: an unknown name, or WrongArchitectureError.
        FileNotFoundError: no such folder, or MissingFilesError, which names every file.
        ResourcesError: not enough disk or memory.
    """
    import torch
    from diffusers import DiffusionPipeline

    from pusa.models import original, tiny
    from pusa.models.prompt_cache import identity_of_module
    from pusa.models.vae import channels_last
    from pusa.scheduler import PusaFlowMatchEulerScheduler

    dtype = torch_dtype if dtype is None else dtype
    if shift is not None:
        kwargs["scheduler"] = PusaFlowMatchEulerScheduler(shift=shift)
    identity: str | None
    if str(source) == "tiny":
        parts = tiny.components(dtype=dtype or {})
        identity = identity_of_module(parts["text_encoder"], parts["tokenizer"])
        pipe = cls(**parts | kwargs)
    else:
        hub = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
        passed = [name for name in COMPONENTS if name in kwargs]
        options = {name: kwargs[name] for name in ("variant", "use_safetensors") if name in kwargs}
        folder, revision = _fetch(source, skip=passed, dtype=dtype, **hub, **options)
        elsewhere = not kwargs.keys().isdisjoint(("device_map", "quantization_config"))  # not as bf16 or fp32 in RAM
        dtype = _checked(folder, source, skip=passed, dtype=dtype, check_ram=not elsewhere)
        if files.is_original(folder):
            pipe = cls(**original.load_components(folder, dtype=dtype, skip=passed) | kwargs)
        else:
            model = find(source)
            with _without_bars() if model is not None and model.folder else nullcontext():  # it takes a second
                pipe = DiffusionPipeline.from_pretrained.__func__(cls, folder, dtype=dtype, **kwargs)
            if "vae" not in kwargs and pipe.vae is not None and pipe.vae.dtype == torch.bfloat16:
                channels_last(pipe.vae)
        identity = revision or _identity(folder)
    if kwargs.get("text_encoder") is None:
        pipe.text_encoder_identity = identity
    return pipe


@contextmanager
def _without_bars() -> Iterator[None]:
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [library for library in (of_diffusers, of_transformers) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def load_text_encoder(source: str | Path, *, dtype: "DType | None" = None, **hub: Any) -> "UMT5EncoderModel":
    """The text encoder alone, from any source of `load_pipeline`: for `pusa.models.prompt_cache.encode_prompts`."""
    from transformers import UMT5EncoderModel

    from pusa.models import original, tiny

    if str(source) == "tiny":
        return tiny.text_encoder(resources.dtype_of("text_encoder", dtype or {}))
    rest = [name for name in COMPONENTS if name != "text_encoder"]
    folder, _ = _fetch(source, skip=rest, dtype=dtype, **hub)
    one = resources.dtype_of("text_encoder", _checked(folder, source, skip=rest, dtype=dtype))
    if files.is_original(folder):
        encoder = original.load_text_encoder(folder, one)
    else:
        encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=one)
    check_text_encoder(encoder)
    return encoder


def _fetch(
    source: str | Path, *, skip: Collection[str], dtype: "DType | None", **options: Any
) -> tuple[Path, str | None]:
    """The folder that holds a source, downloaded if need be, and for a download its Hub id and revision."""
    model = find(source)
    folder = model.folder if model and model.folder else Path(source).expanduser()
    if folder.is_dir():
        return folder, None
    hub_id = model.hub_id if model and model.hub_id else str(source)
    if "/" not in hub_id:
        get(hub_id)  # raises
    if hub_id.count("/") != 1 or hub_id.startswith((".", "~", "/")):
        raise FileNotFoundError(f"{source}: no such folder")
    from diffusers import WanPipeline
    from huggingface_hub.constants import HF_HUB_CACHE

    _check_hub(hub_id, {name: options[name] for name in _HUB_OPTIONS if name in options and name != "proxies"})
    if model is not None:
        cache = Path(options.get("cache_dir") or HF_HUB_CACHE)
        check_resources(model, dtype=dtype, folder=cache, skip=skip)
    snapshot = Path(WanPipeline.download(hub_id, **options, **dict.fromkeys(skip)))
    return snapshot, f"{hub_id}@{snapshot.name}"


def _checked(
    folder: Path,
    source: str | Path,
    *,
    skip: Collection[str],
    dtype: "DType | None",
    check_ram: bool = True,
) -> "DType":
    """Look at everything that can be wrong with a folder before loading it; the dtype it is to be loaded in."""
    missing = files.missing_files(folder, skip=skip)
    if missing:
        raise MissingFilesError(f"{folder} is not complete; missing: {', '.join(missing)}")
    model = find(source)
    _check_architecture(folder, model, skip=skip)
    counts = files.parameter_counts(folder, skip=skip)
    if dtype is None:
        ours = model is not None and model.folder is not None
        dtype = resources.native_dtype() if ours else resources.default_dtype(sum(counts.values()))
    if check_ram:
        resources.check_ram(resources.weight_bytes(counts, dtype), str(source))
    return dtype


def _check_hub(hub_id: str, options: Mapping[str, Any]) -> None:
    """Fetch the two small files that tell layout and architecture, before the large ones."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(hub_id, "model_index.json", **options)
        config = files.read_json(Path(hf_hub_download(hub_id, "transformer/config.json", **options)))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{hub_id} is not in the local cache and cannot be downloaded (offline, or the Hub does not answer): "
            "give a folder with its files, or download it once"
        ) from error
    except EntryNotFoundError as error:
        raise WrongArchitectureError(
            f"{hub_id} is no video model in diffusers layout (no model_index.json or transformer/config.json): "
            "take the repository called ...-Diffusers, or download this one and give the folder"
        ) from error
    _check_config(config, find(hub_id), hub_id)


def _check_architecture(folder: Path, model: ZooModel | None, *, skip: Collection[str]) -> None:
    if files.is_original(folder):
        from pusa.models.original import transformer_config

        for component, place in files.original_experts(folder).items():
            if component not in skip:
                transformer_config(place)
    else:
        for component in ("transformer", "transformer_2"):
            if component in files.diffusers_components(folder) and component not in skip:
                config = files.read_json(folder / component / "config.json")
                _check_config(config, model, f"{folder.name}/{component}")


def _check_config(config: Mapping[str, Any], model: ZooModel | None, where: str) -> None:
    files.check_text_to_video(config, where)
    for name, value in (model.transformer if model else {}).items():
        if name in config and config[name] != value:
            raise WrongArchitectureError(f"{where} has {name}={config[name]!r}, and not {value!r} as expected")


def _identity(folder: Path) -> str | None:
    """Of the text encoder and tokenizer in a folder; None if the former is not there."""
    from pusa.models.prompt_cache import identity_of_files

    if files.is_original(folder):
        parts = [files.original_weights(folder, files.ORIGINAL_TEXT_ENCODER), folder / files.ORIGINAL_TOKENIZER]
    else:
        parts = [folder / "text_encoder", folder / "tokenizer"]
    return identity_of_files(parts) if all(part.exists() for part in parts) else None
