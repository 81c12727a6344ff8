"""List models by name: their parts, their defaults, what they need of a machine.

A folder with a ``pusa.json`` describes itself: the embedded model does, and so does any other of our own recipe. This
module imports no torch; `pusa.loading` turns a name into a pipeline.
"""

import difflib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pusa import resources
from pusa.defaults import WAN_DEFAULTS, GenerationDefaults
from pusa.models import files
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
    vae_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def experts(self) -> int:
        return 2 if self.defaults.boundary_ratio is not None else 1

    @property
    def download_bytes(self) -> int:
        return sum(self.file_bytes.values())


# Counted from the published shapes. The Hub holds fp32, 4 bytes each, except Wan2.2's text encoder (bf16).
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
    defaults: GenerationDefaults = WAN_DEFAULTS,
    lora: LoraSource | None = None,
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
        ),
        _wan(
            "wan2.1-14b",
            "Wan2.1 text-to-video, 14 billion parameters, 480p and 720p: the base of Pusa V1.0",
            "Wan-AI/Wan2.1-T2V-14B-Diffusers",
            _WAN_14B,
            {"transformer": 14_288_491_584},
            lora=LoraSource("RaphaelLiu/PusaV1", {"transformer": "pusa_v1.pt"}),
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
        ),
    )
}


def get(name: str) -> ZooModel:
    """Look up a model by its name.

    Raises:
        ValueError: unknown name; the message has the nearest known one, and all of them.
    """
    if name in ZOO:
        return ZOO[name]
    near = difflib.get_close_matches(name.lower(), ZOO, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"no model is called {name!r}: {hint}known are {', '.join(ZOO)}; or give a Hub id or a folder")


def find(source: str | Path) -> ZooModel | None:
    """Find a model by its name, its Hub id or the folder whose ``pusa.json`` describes it; None for other sources."""
    named = next((model for model in ZOO.values() if str(source) in (model.name, model.hub_id)), None)
    folder = Path(os.path.expanduser(source))
    return named or read_folder(folder, folder.name)


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
    machine: "Machine | None" = None,
) -> None:
    """Check that disk, RAM and GPU memory suffice for a model.

    Args:
        dtype: as for `pusa.loading.load_pipeline`: all parts must fit into RAM in it. None: there must be a plan by
            which the model makes a clip of its default size.
        folder: download folder, whose disk must have room; None: the files are on this machine.
        skip: components that are not loaded. Without a transformer, the others must fit into RAM.
        machine: None: this one.

    Raises:
        ResourcesError: too little of one of them; the message has the need, the supply and a way out.
    """
    from pusa.acceleration.machine import machine as this_machine
    from pusa.acceleration.planning import plan

    total = sum(model.parameters.values())
    smaller = [
        other.name for other in ZOO.values() if other.name != "tiny" and sum(other.parameters.values()) < total
    ]
    otherwise = f", or take a smaller model ({', '.join(smaller)})" if smaller else ""
    if folder is not None:
        download = sum(size for part, size in model.file_bytes.items() if part not in skip)
        resources.check_disk(download - _cached_bytes(model, folder), folder, model.name, otherwise=otherwise)
    counts = {part: count for part, count in model.parameters.items() if part not in skip}
    if dtype is not None or "transformer" in skip:
        resources.check_ram(resources.weight_bytes(counts, dtype), model.name, otherwise=otherwise)
    elif problem := plan(replace(model, parameters=counts), machine=machine or this_machine()).problem:
        raise resources.ResourcesError(problem + otherwise)


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
