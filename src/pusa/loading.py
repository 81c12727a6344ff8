"""Turn a source into a pipeline.

A source is a name of `pusa.zoo`, a Hub id or a folder in diffusers layout, a folder as Wan publishes it, or ComfyUI's
folder of models; single files replace parts of it. Missing files, another architecture and too little disk or memory
are errors before anything large is downloaded or read.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, WanPipeline
from diffusers.utils import logging as diffusers_logging
from transformers import UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from pusa import resources, single_file_sources, zoo
from pusa.lora.sources import EXPERTS
from pusa.models import files, original, parts, tiny
from pusa.models.bases import WAN, Base, base_in, base_of, base_of_config
from pusa.models.files import COMPONENTS, MissingFilesError, WrongArchitectureError
from pusa.models.sources import file_parts
from pusa.models.streaming import Devices, LoadCounter, Progress, bytes_in_ram, device_of
from pusa.models.text_encoder import check_text_encoder, identity_of_files, identity_of_module
from pusa.models.vae import channels_last
from pusa.resources import DType, dtype_of
from pusa.single_file_sources import HUB_OPTIONS, FileSources
from pusa.zoo import ZooModel

_LEFT_TO_DIFFUSERS = (
    *("device_map", "quantization_config", "max_memory", "offload_folder", "offload_state_dict"),
    *("low_cpu_mem_usage", "disable_mmap", "custom_pipeline"),
)


def load_pipeline(
    cls: type,
    source: str | Path,
    *,
    torch_dtype: "DType | None" = None,
    dtype: "DType | None" = None,
    shift: float | None = None,
    device: Devices = "cpu",
    as_fp8: Collection[str] = (),
    progress: Progress | None = None,
    **kwargs: Any,
) -> Any:
    """Load a pipeline of class `cls` (a `WanPipeline`) from any source.

    Args:
        cls: the pipeline's class.
        source: a zoo name, a Hub id or folder in diffusers layout, or a folder as Wan publishes it.
        torch_dtype, dtype: one for all parts, or by component with a "default". None: bf16 with the VAE in fp32 from a
            billion parameters on, fp32 below; `pusa.resources.native_dtype` for models of our own recipe.
        shift: flow shift of the scheduler. None: the source's, or 5.
        device: where the weights go as they are read: one for all parts, or by component (the CPU for others).
        as_fp8: transformers whose linear layers are stored as fp8 (`pusa.models.fp8`) as they are read; those that
            diffusers has to read, and "tiny", stay as they are.
        progress: called with the bytes read so far and those of all, after each tensor.
        kwargs: components that replace the source's (``text_encoder=None`` leaves it out); ``files``, ``storage`` and
            ``keep_quantized`` (see `pusa.single_file_sources`); and whatever
            `diffusers.DiffusionPipeline.from_pretrained` takes.

    Returns:
        The pipeline, on `device`. `pusa.models.prompt_cache` tells encoders apart by its `text_encoder_identity`.

    Raises:
        ValueError: an unknown name, or WrongArchitectureError.
        FileNotFoundError: no such folder, or MissingFilesError, which lists every file.
        ResourcesError: not enough disk or memory.
    """
    dtype = torch_dtype if dtype is None else dtype
    is_planned = isinstance(device, Mapping) or bool(as_fp8)  # what is kept in RAM is less than all weights
    single_files = single_file_sources.take(source, kwargs, dtype, check_ram=not is_planned)
    given: dict[str, Any] = {"dtype": dtype, "shift": shift, "device": device, "as_fp8": as_fp8, "progress": progress}
    if single_files.files:
        return _load_with_files(cls, source, single_files, **given, **kwargs)
    identity: str | None
    is_encoder_given = kwargs.get("text_encoder") is not None
    if str(source) == "tiny":
        components = tiny.components(dtype=dtype or {})
        identity = identity_of_module(components["text_encoder"], components["tokenizer"])
        pipe = cls(**components | kwargs)
    else:
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        replaced = [name for name in COMPONENTS if name in kwargs]
        options = {name: kwargs[name] for name in ("variant", "use_safetensors") if name in kwargs}
        folder, revision = _fetch(source, skip=replaced, dtype=dtype, check_ram=not is_planned, **hub, **options)
        streams = kwargs.keys().isdisjoint(_LEFT_TO_DIFFUSERS)  # otherwise not bf16 or fp32, or not in RAM
        places: dict[str, Any] = {"device": device if streams else "cpu", "as_fp8": as_fp8 if streams else ()}
        _check_together(folder, kwargs)
        variant = kwargs.get("variant")
        dtype = _check_folder(folder, source, skip=replaced, dtype=dtype, check_ram=streams, variant=variant, **places)
        if files.is_original(folder):
            counter = _counter(progress, files.weight_files(folder, skip=replaced))
            loaded = original.load_components(
                folder, dtype=dtype, skip=replaced, device=device, counter=counter, as_fp8=as_fp8
            )
            pipe = cls(**loaded | kwargs)
        else:
            sources = parts.streamed_files(folder, skip=replaced, variant=variant) if streams else {}
            counter = _counter(progress, sources)
            loaded = {
                part: parts.load_part(
                    folder,
                    part,
                    paths,
                    dtype_of(part, dtype),
                    device=device_of(part, device),
                    counter=counter,
                    as_fp8=part in as_fp8,
                )
                for part, paths in sources.items()
            }
            model = zoo.find(source)
            with _no_progress_bars() if model is not None and model.is_ours else nullcontext():  # our own take a second
                pipe = _from_diffusers_folder(cls, folder, dtype, loaded, kwargs)
        identity = revision or _identity(folder)
    if shift is not None:
        pipe.scheduler = pipe.base.scheduler(shift)
    if not is_encoder_given:
        pipe.text_encoder_identity = identity
    return pipe


def _load_with_files(
    cls: type,
    source: str | Path,
    sources: FileSources,
    *,
    dtype: "DType | None",
    shift: float | None,
    device: Devices,
    as_fp8: Collection[str],
    progress: Progress | None,
    **kwargs: Any,
) -> Any:
    """Load a pipeline whose parts are single files; what they lack comes from the source, or from the Hub."""
    if str(source) == "tiny":
        config: dict[str, Any] = {"transformer": tiny.TRANSFORMER}
        loaded = sources.load(kwargs, dtype=dtype or torch.float32, config=config)
        return load_pipeline(cls, source, dtype=dtype, shift=shift, **(loaded | kwargs))
    model = zoo.find(source)
    tokenizer = None if "tokenizer" in kwargs else file_parts.tokenizer_in(sources.files)
    here = {name: kwargs[name] for name in COMPONENTS if name in kwargs}
    here |= dict.fromkeys(sources.files) | ({} if tokenizer is None else {"tokenizer": tokenizer})
    folder, revision = None, None
    if model is None or model.folder or not sources.has_all(here, model.experts):
        options = {name: kwargs[name] for name in (*HUB_OPTIONS, "variant", "use_safetensors") if name in kwargs}
        folder, revision = _fetch(_remainder(source), skip=list(here), dtype=dtype, **options)
    kwargs = {name: value for name, value in kwargs.items() if name not in HUB_OPTIONS}
    config, others = {}, {}
    if folder is not None and (model is None or model.is_ours):  # of no published size
        if missing := files.missing_files(folder, skip=here):
            raise MissingFilesError(f"{folder} is not complete; missing: {', '.join(missing)}")
        config, others = files.transformer_configs(folder), files.parameter_counts(folder, skip=here)
    dtype = dtype or sources.default_dtype(model, others)
    loaded = sources.load(kwargs, dtype=dtype, config=config, device=device, as_fp8=as_fp8)
    loaded |= {"tokenizer": tokenizer} if tokenizer is not None else {}
    if folder is None:
        assert model is not None
        base = base_of((loaded | kwargs).get("transformer"))
        scheduler = {"scheduler": base.scheduler(shift or model.defaults.shift)}
        ratios = {"boundary_ratio": model.defaults.boundary_ratio, "expand_timesteps": model.expand_timesteps}
        pipe = cls(**scheduler | ratios | loaded | kwargs)
    else:
        given: dict[str, Any] = {"dtype": dtype, "shift": shift, "device": device, "as_fp8": as_fp8}
        pipe = load_pipeline(cls, folder, progress=progress, **given, **(loaded | kwargs))
    if (loaded | kwargs).get("text_encoder") is None:
        file = sources.files.get("text_encoder")
        identity = revision or (_identity(folder) if folder else None)
        pipe.text_encoder_identity = identity_of_files([file]) if file else identity
    return pipe


def _from_diffusers_folder(
    cls: type, folder: Path, dtype: DType, loaded: Mapping[str, Any], kwargs: dict[str, Any]
) -> Any:
    """Let diffusers make the pipeline of the parts that are loaded or given; it loads the others itself."""
    base = _base_with(folder, {**loaded, **kwargs})
    scheduler = files.read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name")
    is_ours = hasattr(cls, "load_pusa")
    untold = is_ours and base is not WAN and all(kwargs.get(part, 0) is None for part in EXPERTS)  # by a transformer
    if untold or (is_ours and scheduler != base.libraries["scheduler"][1]):
        kwargs.setdefault("scheduler", base.scheduler())  # Wan's own are replaced without a word
    if not base.has_text:
        kwargs = {"text_encoder": None, "tokenizer": None} | kwargs
    pipe = DiffusionPipeline.from_pretrained.__func__(cls, folder, dtype=dtype, **loaded, **kwargs)
    if untold:
        pipe.base = base
    for part in parts.PARTS:
        if part not in loaded and part not in kwargs and getattr(pipe, part, None) is not None:
            _release_files(getattr(pipe, part))
    if "vae" not in kwargs and pipe.vae is not None and pipe.vae.dtype == torch.bfloat16:
        channels_last(pipe.vae)
    return pipe


def _counter(progress: Progress | None, weights: Mapping[str, Iterable[Path]]) -> LoadCounter | None:
    if progress is None:
        return None
    return LoadCounter(progress, sum(path.stat().st_size for paths in weights.values() for path in paths))


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _release_files(model: torch.nn.Module) -> None:
    """Copy the few weights that a model in bf16 or fp16 keeps in fp32: as views they keep their file mapped, whole."""
    plain = [p for p in model.parameters() if type(p) is torch.nn.Parameter and p.device.type == "cpu"]
    in_fp32 = [p for p in plain if p.dtype == torch.float32]
    if len(in_fp32) < len(plain):
        for parameter in in_fp32:
            parameter.data = parameter.data.clone()


def load_text_encoder(
    source: str | Path,
    *,
    dtype: "DType | None" = None,
    device: "torch.device | str" = "cpu",
    progress: Progress | None = None,
    **hub: Any,
) -> UMT5EncoderModel:
    """Load the text encoder alone, from any source of `load_pipeline`, with its arguments and errors.

    On the CPU, weights that are stored in the dtype stay on disk, mapped into memory: the encoder runs for a prompt or
    two and is dropped. `pusa.models.prompt_cache.encode_prompts` uses it for pipelines without a text encoder.
    """
    single_files = single_file_sources.take(source, hub, dtype, only="text_encoder")
    if single_files.files:
        count = sum(file_parts.parameter_counts(single_files.files).values())
        return single_files.load({}, dtype=dtype or resources.default_dtype(count))["text_encoder"]
    if str(source) == "tiny":
        return tiny.text_encoder(resources.dtype_of("text_encoder", dtype or {}))
    others = [name for name in COMPONENTS if name != "text_encoder"]
    folder, _ = _fetch(_remainder(source), skip=others, dtype=dtype, **hub)
    checked = _check_folder(folder, source, skip=others, dtype=dtype, device=device)
    encoder_dtype = resources.dtype_of("text_encoder", checked)
    options: dict[str, Any] = {"device": device, "keep_mapped": str(device) == "cpu"}
    if files.is_original(folder):
        counter = _counter(progress, files.weight_files(folder, skip=others))
        encoder = original.load_text_encoder(folder, encoder_dtype, counter=counter, **options)
    elif sources := parts.streamed_files(folder, skip=others):
        paths, counter = sources["text_encoder"], _counter(progress, sources)
        encoder = parts.load_part(folder, "text_encoder", paths, encoder_dtype, counter=counter, **options)
    else:
        encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=encoder_dtype)
    check_text_encoder(encoder)
    return encoder


def find_folder(source: str | Path) -> Path:
    """Find, or download, the folder of a whole model, and check it; raise as `load_pipeline`.

    Nothing large is read, and no memory is needed.
    """
    if str(source) == "tiny":
        raise ValueError("'tiny' has no files, as it is built in memory: give another model")
    model = zoo.find(source)
    if model is not None and model.weights:
        own = next(iter(model.weights.values()))
        raise ValueError(
            f"{model.name} is not one folder: {own.repository}/{own.name} stands beside the parts of {model.hub_id}; "
            "PusaPipeline.from_pretrained(...).save_pretrained(FOLDER) writes one"
        )
    folder, _ = _fetch(source, skip=(), dtype=None, check_ram=False)
    _check_folder(folder, source, skip=(), dtype=None, check_ram=False)
    return folder


def _remainder(source: str | Path) -> str | Path:
    """Name where the parts are that a source's own single files lack."""
    model = zoo.find(source)
    return model.hub_id if model is not None and model.files and model.hub_id else source


def _fetch(
    source: str | Path, *, skip: Collection[str], dtype: "DType | None", check_ram: bool = True, **options: Any
) -> tuple[Path, str | None]:
    """Return the folder that holds a source, after a download if necessary, and the download's Hub id and revision."""
    model = zoo.find(source)
    folder = model.folder if model and model.folder else Path(source).expanduser()
    if folder.is_dir():
        return folder, None
    hub_id = model.hub_id if model and model.hub_id else str(source)
    if Path(source).expanduser().is_file():
        raise ValueError(files.describe_single_file(Path(source).expanduser()))
    if "/" not in hub_id:
        zoo.get(hub_id)  # raises
    if hub_id.count("/") != 1 or hub_id.startswith((".", "~", "/")):
        raise FileNotFoundError(f"{source}: no such folder")
    from huggingface_hub.constants import HF_HUB_CACHE

    _check_hub(hub_id, {name: options[name] for name in HUB_OPTIONS if name in options and name != "proxies"})
    if model is not None:
        cache = Path(options.get("cache_dir") or HF_HUB_CACHE)
        zoo.check_resources(model, dtype=dtype, folder=cache, skip=skip, ram=check_ram)
    snapshot = Path(WanPipeline.download(hub_id, **options, **dict.fromkeys(skip)))
    return snapshot, f"{hub_id}@{snapshot.name}"


def _check_folder(
    folder: Path,
    source: str | Path,
    *,
    skip: Collection[str],
    dtype: "DType | None",
    check_ram: bool = True,
    device: Devices = "cpu",
    as_fp8: Collection[str] = (),
    variant: str | None = None,
) -> DType:
    """Check files, architecture and memory for a folder before it is read; return the dtype to load it in."""
    missing = files.missing_files(folder, skip=skip)
    if missing:
        raise MissingFilesError(f"{folder} is not complete; missing: {', '.join(missing)}")
    model = zoo.find(source)
    _check_architecture(folder, model, skip=skip)
    if not files.is_original(folder):  # the original's parts are checked as they are mapped
        parts.check_checkpoints(folder, skip=skip, variant=variant)
    counts = files.parameter_counts(folder, skip=skip)
    if dtype is None:
        is_ours = model is not None and model.is_ours
        dtype = resources.native_dtype() if is_ours else resources.default_dtype(sum(counts.values()))
    if check_ram:
        weights = resources.weight_bytes(counts, dtype)
        resources.check_ram(bytes_in_ram(weights, device, as_fp8), str(source))
    return dtype


def _check_together(folder: Path, kwargs: Mapping[str, Any]) -> None:
    """Check the configurations of a folder's parts, and of those that replace them, against each other."""
    if files.is_original(folder):
        return
    index = files.read_json(folder / "model_index.json")
    configs: dict[str, Any] = {}
    for part in parts.PARTS:
        if part in kwargs:
            config = getattr(kwargs[part], "config", None)
        else:
            config = files.read_json(folder / part / "config.json") if (index.get(part) or [None])[0] else None
        if config:
            configs[part] = config
    boundary = kwargs.get("boundary_ratio", index.get("boundary_ratio"))
    parts.check_together(configs, boundary, _base_with(folder, kwargs))
    if boundary is not None and "transformer" in configs and "transformer_2" not in {**configs, **kwargs}:
        raise ValueError(
            f"{folder.name} has boundary_ratio={boundary:g} and no transformer_2 to take over there: add its folder, "
            "or give boundary_ratio=None to run one transformer alone"
        )


def _base_with(folder: Path, replaced: Mapping[str, Any]) -> Base:
    """Find the base of a folder whose transformer may be replaced."""
    given = replaced.get("transformer") or replaced.get("transformer_2")
    return base_in(folder) if given is None else base_of(given)


def _check_hub(hub_id: str, options: Mapping[str, Any]) -> None:
    """Check layout and architecture by the two small files that show them, before the large ones are downloaded."""
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
    _check_config(config, zoo.find(hub_id), hub_id)


def _check_architecture(folder: Path, model: ZooModel | None, *, skip: Collection[str]) -> None:
    if files.is_original(folder):
        for component, place in files.original_experts(folder).items():
            if component not in skip:
                original.empty_transformer(place)
    else:
        for component in ("transformer", "transformer_2"):
            if component in files.diffusers_components(folder) and component not in skip:
                config = files.read_json(folder / component / "config.json")
                _check_config(config, model, f"{folder.name}/{component}")


def _check_config(config: Mapping[str, Any], model: ZooModel | None, where: str) -> None:
    base_of_config(config, where)
    for name, value in (model.transformer if model else {}).items():
        if name in config and config[name] != value:
            raise WrongArchitectureError(f"{where} has {name}={config[name]!r}, and not {value!r} as expected")


def _identity(folder: Path) -> str | None:
    """Hash the text encoder and tokenizer in a folder; None if one of them is not there."""
    if files.is_original(folder):
        places = [files.original_weights(folder, files.ORIGINAL_TEXT_ENCODER), folder / files.ORIGINAL_TOKENIZER]
    else:
        places = [folder / "text_encoder", folder / "tokenizer"]
    return identity_of_files(places) if all(place.exists() for place in places) else None
