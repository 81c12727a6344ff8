"""Define what the sampler, the conditions, the tasks, the server and the training need of a kind of base model.

A vectorised timestep belongs to a sampler and a broadcast, not to one network. What differs between networks, the shape
of their latents, the meaning of their timestep and of their output, their text encoder, is said once, in a `Base`.
Modules of this package import torch only inside methods: plans and the zoo read them too.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pusa.defaults import GenerationDefaults

if TYPE_CHECKING:
    from torch import Tensor

    from pusa.pipeline import PusaPipeline

Config = Mapping[str, Any]
LoraLayout = Literal["comfyui", "diffusers", "original"]  # of files, see `pusa.lora.layouts`


class Base(ABC):
    """Describe one kind of base model.

    Attributes:
        name: for messages.
        transformer_classes: names of the classes of its transformer: the stock one first, then ours.
        libraries: where the classes come from that a saved folder names: part -> (library, class).
        pipeline_class: that of a saved folder.
        foreign_options: arguments of `PusaPipeline` that a saved folder does not keep: Wan's, for others.
        defaults: values that a model of this kind runs with where nothing else is known of it.
        conditions_note: for a request with pictures or videos where no adapter is loaded: what the weights have to be
            to follow them; "" if all are.
        skips_frames: frames that do not move may leave a step; see `pusa.models.frame_skipping`.
        step_cache_obstacle: why no step can leave blocks out; "" if it can.
        text_encoder: the family of that encoder, as `pusa.models.single_file.families` names it.
        lora_targets: layers that a LoRA adapts, as published.
        training: fields of a training's configuration that this base has other defaults of than Wan, with their values.
        training_limits: fields of which it takes these values alone.
        predicts: what its transformer predicts, for messages.
        is_estimated: `pusa.training.flops` counts its passes.
        lora_layouts: of files with its LoRAs; the first one is written unless another is asked for.
    """

    name: ClassVar[str]
    transformer_classes: ClassVar[tuple[str, ...]]
    libraries: ClassVar[Mapping[str, tuple[str, str]]]
    pipeline_class: ClassVar[str]
    foreign_options: ClassVar[tuple[str, ...]] = ("transformer_2", "boundary_ratio", "expand_timesteps")
    defaults: ClassVar[GenerationDefaults]
    conditions_note: ClassVar[str] = ""
    skips_frames: ClassVar[bool] = False
    step_cache_obstacle: ClassVar[str] = ""
    text_encoder: ClassVar[str] = "umt5"
    lora_targets: ClassVar[tuple[str, ...]]
    training: ClassVar[Mapping[str, Any]] = {}
    training_limits: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    predicts: ClassVar[str] = "velocity"
    is_estimated: ClassVar[bool] = False
    lora_layouts: ClassVar[tuple[LoraLayout, ...]] = ("diffusers",)

    @property
    def has_text(self) -> bool:
        """Tell if it reads text, through a text encoder."""
        return self.defaults.has_text

    @property
    def prompt_parts(self) -> tuple[str, ...]:
        """List the parts of a pipeline that encode a prompt; a transformer knows its classes."""
        return ("tokenizer", "text_encoder") if self.has_text else ("transformer",)

    # ---- configurations --------------------------------------------------------------------------------------------

    @abstractmethod
    def check_config(self, config: Config, where: str) -> None:
        """Raise WrongArchitectureError for a transformer's configuration that cannot be a base."""

    def defaults_of(self, transformer: Config, vae: Config) -> GenerationDefaults:
        """Return the defaults of a model with these configurations of its parts; see `defaults`."""
        return self.defaults

    def channels(self, transformer: Config) -> int | None:
        """Read the latent channels from a transformer's configuration; None where it does not tell."""
        return transformer.get("in_channels")

    @abstractmethod
    def patch(self, transformer: Config) -> tuple[int, int, int]:
        """Read the latent frames, rows and columns to a token."""

    @abstractmethod
    def text_width(self, transformer: Config) -> int | None:
        """Read the channels of text that a transformer takes; None: it takes none."""

    def size_of(self, transformer: Config) -> tuple[int, int]:
        """Read the width and the number of blocks of a transformer."""
        return transformer["num_attention_heads"] * transformer["attention_head_dim"], transformer["num_layers"]

    def saved_index(self, index: dict[str, Any]) -> dict[str, Any]:
        """Rewrite the ``model_index.json`` of a saved folder, so that the published classes load it."""
        index = {name: value for name, value in index.items() if name not in self.foreign_options}
        libraries = {name: list(pair) for name, pair in self.libraries.items() if index.get(name, [None])[0]}
        return index | libraries | {"_class_name": self.pipeline_class}

    # ---- the network -----------------------------------------------------------------------------------------------

    @abstractmethod
    def adopt(self, transformer: Any) -> Any:
        """Turn a stock transformer into the class that takes a timestep per latent frame, in place."""

    def timesteps(self, scheduler: Any, step: int) -> "Tensor":
        """Return what the transformer takes as timesteps at a step of a scheduler: ``[B, F]``, fp32."""
        return scheduler.frame_timesteps(step)

    @abstractmethod
    def timesteps_of(self, sigmas: "Tensor") -> "Tensor":
        """Return what the transformer takes as timesteps at sigmas 0..1 of any shape, in training."""

    def text_inputs(self, embeds: "Tensor", like: "Tensor") -> dict[str, Any]:
        """Return the transformer's arguments for the embeddings of a prompt, ``[B, text, D]``.

        Args:
            like: the latents, for device and dtype.
        """
        return {"encoder_hidden_states": embeds.to(like)}

    def prediction(self, output: "Tensor", channels: int) -> "Tensor":
        """Return what the scheduler takes, of the transformer's output: ``[B, channels, F, h, w]``."""
        return output

    # ---- training --------------------------------------------------------------------------------------------------

    def training_sigmas(self, shift: float) -> "Tensor":
        """Return the sigmas that training draws from, each as likely: fp32 ``[n]``, falling."""
        import torch

        from pusa.scheduler import shifted

        return shifted(torch.linspace(1, 0, 1001)[:-1], shift)

    def add_noise(self, clean: "Tensor", noise: "Tensor", sigmas: "Tensor") -> "Tensor":
        """Mix each frame of ``clean`` with ``noise``, both ``[B, C, F, h, w]``, at its sigma, ``[B, F]``."""
        sigma = sigmas[:, None, :, None, None]
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: "Tensor", noise: "Tensor") -> "Tensor":
        """Return what `prediction` is to be, shaped like ``clean``: the velocity ``noise - clean``."""
        return noise - clean

    def further_loss(
        self, output: "Tensor", clean: "Tensor", noise: "Tensor", noisy: "Tensor", sigmas: "Tensor"
    ) -> "Tensor | float":
        """Return what the loss of each clip, ``[B]``, has besides the squared error of the prediction.

        Args:
            output: of the transformer.
            clean, noise, noisy: latents ``[B, C, F, h, w]``, with ``noisy`` of `add_noise` at ``sigmas [B, F]``.
        """
        return 0.0

    # ---- sampling --------------------------------------------------------------------------------------------------

    @abstractmethod
    def scheduler_for(self, scheduler: Any) -> Any:
        """Make the scheduler that samples this base, in place of any other; keep what it tells."""

    def scheduler(self, shift: float | None = None) -> Any:
        """Make a scheduler as published; with another flow shift if one is given."""
        from pusa.scheduler import PusaFlowMatchEulerScheduler

        return PusaFlowMatchEulerScheduler(**({} if shift is None else {"shift": shift}))

    def with_shift(self, scheduler: Any, shift: float) -> Any:
        """Return a scheduler as this one, with another flow shift. Raises ValueError if it can have none."""
        return type(scheduler).from_config(scheduler.config, shift=shift)

    # ---- text ------------------------------------------------------------------------------------------------------

    def encode_texts(self, pipe: "PusaPipeline", texts: Sequence[str], **options: Any) -> "Tensor":
        """Encode texts to embeddings ``[B, text, D]``, zero after the end of each text.

        Args:
            options: as in `diffusers.WanPipeline.encode_prompt`: max_sequence_length, device, dtype.
        """
        from diffusers import WanPipeline

        return WanPipeline._get_t5_prompt_embeds(pipe, list(texts), **options)

    def trimmed(self, embeds: "Tensor") -> "Tensor":
        """Cut embeddings ``[B, text, D]`` to what the transformer reads; called once for each call of a pipeline."""
        return embeds
