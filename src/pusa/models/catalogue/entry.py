"""Define what the catalogue says about a model: where it is, what it is made of, and how it runs by default."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pusa.defaults import WAN_DEFAULTS, GenerationDefaults
from pusa.models.sources.published import PublishedFile


@dataclass(frozen=True)
class LoraSource:
    """Name a LoRA of a model: a Hub id or a folder, and the file of each expert.

    Attributes:
        rank: of its matrices, for plans; None: see `pusa.acceleration.needs`.
        file_bytes: size of its download, all experts together; 0: unknown.
    """

    source: str
    files: Mapping[str, str]
    rank: int | None = None
    file_bytes: int = 0

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
    """Describe one model.

    Attributes:
        transformer: values its transformer's configuration must have.
        hub_id, folder: one of them, or neither for "tiny", which `pusa.models.tiny` builds.
        fast_lora: the 4-step LoRA that a request with `fast` adds at strength 1, beside Pusa's.
        parameters: component -> count.
        file_bytes: component -> size of its download.
        words: vocabulary of a model trained on no other words: kind -> groups of phrases of one meaning.
        family: the model of the zoo that a user's own folder or files were recognised as; None for the zoo's models.
        files: single files of the user's, by the part of a pipeline that they are.
        own_lora: LoRAs that the user has added with the model, as a request has them; they replace `lora`.
        published: single files of others, part -> storage ("bfloat16", "float16", "fp8") -> file.
        weights: single files of a model's own weights, part -> file, which replace those of `hub_id`, its base.
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
    fast_lora: LoraSource | None = None
    words: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    family: str | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    own_lora: tuple[str, ...] = ()
    published: Mapping[str, Mapping[str, PublishedFile]] = field(default_factory=dict)
    vae_config: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, PublishedFile] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """Tell if it is "tiny" or of our own recipe, whose folders hold the Pusa LoRA too."""
        return self.hub_id is None and self.family is None

    @property
    def expand_timesteps(self) -> bool:
        """Tell if it is Wan2.2 TI2V-5B, trained with a time for each token: it follows a clean first frame as it is."""
        return self.transformer.get("in_channels") == 48

    @property
    def experts(self) -> int:
        return 2 if self.defaults.boundary_ratio is not None else 1

    @property
    def download_bytes(self) -> int:
        return sum(self.file_bytes.values())
