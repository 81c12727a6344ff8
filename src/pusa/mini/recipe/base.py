"""Train the text-to-video model and its text encoder (stage 2) on one timestep per clip or per latent frame."""

import math
import time
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from pusa.mini.recipe.clips import ClipCache, Sample
from pusa.mini.recipe.loop import fit, precision, spent_seconds
from pusa.mini.recipe.muon import BatchedMuon
from pusa.mini.world.world import captions, draw_scenes
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.scheduler import shifted
from pusa.training.config import ScheduleConfig
from pusa.training.distributed import connect_processes
from pusa.training.model import lr_factor, without

MAX_SEQUENCE_LENGTH = 64
SHIFT = 3.0
_TEXT_WIDTH = 128
_GPU_ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Learn a byte-pair encoding from captions: their words are one token each, any other text is spelt out."""
    core = Tokenizer(BPE(unk_token="<unk>"))
    core.normalizer = Lowercase()
    core.pre_tokenizer = ByteLevel(add_prefix_space=True)
    core.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=1200,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(captions(draw_scenes(20_000, 0)), trainer)
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


class TextToVideo(nn.Module):
    """Hold the transformer and the text encoder, which train together, and their tokenizer.

    Args:
        heads: of attention.
        layers: of the transformer.
        head_channels: 32 or 128, on which Wan's own code and diffusers split RoPE alike (they do not on 64).
        tokenizer: None: learn one from captions.
    """

    def __init__(
        self, *, heads: int, layers: int, head_channels: int = 32, tokenizer: PreTrainedTokenizerFast | None = None
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer or make_tokenizer()
        self.transformer = PusaWanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_channels,
            in_channels=16,
            out_channels=16,
            text_dim=_TEXT_WIDTH,
            freq_dim=256,
            ffn_dim=4 * head_channels * heads,
            num_layers=layers,
        )
        self.text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(self.tokenizer),
                d_model=_TEXT_WIDTH,
                d_kv=32,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
            )
        )

    def embed(self, texts: list[str], *, drop: float = 0.0) -> Tensor:
        """Embed prompts as the pipeline does: ``[B, 64, 128]``, zeros behind the text, some texts empty."""
        texts = [text if torch.rand(()) >= drop else "" for text in texts]
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_SEQUENCE_LENGTH, return_tensors="pt"
        ).input_ids
        return self.embed_tokens(tokens.to(self.text_encoder.device))

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Embed token ids ``[B, L]``, zeros behind the text: ``[B, 64, 128]``."""
        is_text = tokens != self.tokenizer.pad_token_id
        # A bias, since transformers reads a mask [B, L] to see if it is all true, and the host would wait for that.
        bias = torch.zeros(is_text.shape, device=tokens.device).masked_fill(~is_text, torch.finfo(torch.float32).min)
        bias = bias[:, None, None].expand(-1, 1, tokens.shape[1], -1)  # [B, 1, L, L]
        embeds = self.text_encoder(tokens, bias).last_hidden_state * is_text.unsqueeze(-1)
        return F.pad(embeds, (0, 0, 0, MAX_SEQUENCE_LENGTH - embeds.shape[1]))

    @classmethod
    def from_folder(cls, folder: Path) -> "TextToVideo":
        """Load the base of a model folder of this recipe, without its adapter, in fp32.

        Raises:
            FileNotFoundError: a part is missing.
        """
        config = PusaWanTransformer3DModel.load_config(folder / "transformer")
        base = cls(
            heads=config["num_attention_heads"],
            layers=config["num_layers"],
            head_channels=config["attention_head_dim"],
            tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        )
        base.transformer = PusaWanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
        base.text_encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32)
        return base

    def copy(self) -> "TextToVideo":
        """Copy weights and tokenizer into a base whose blocks are not compiled, on the CPU."""
        config = self.transformer.config
        base = TextToVideo(
            heads=config.num_attention_heads,
            layers=config.num_layers,
            head_channels=config.attention_head_dim,
            tokenizer=self.tokenizer,
        )
        base.load_state_dict(self.state_dict())
        return base.eval()

    @cached_property
    def empty_tokens(self) -> Tensor:
        """Return the token ids of the empty caption, ``[1]``: the end of a text."""
        return self.tokenizer("", return_tensors="pt").input_ids[0].to(self.text_encoder.device)


@dataclass(frozen=True)
class BaseObjective:
    """Choose timesteps, weights and captions for the training of the base.

    Attributes:
        vector_share: share of clips that draw a timestep for each latent frame (independent, as in Pusa V1.0 and
            FVDM); the others draw one.
        clean_start_share: share of those clips whose first latent frame is clean, as in image-to-video.
        thing_weight: the error where a thing is counts 1 + this many times as much as elsewhere.
        caption_dropout: share of clips without a caption.
    """

    vector_share: float = 0.0
    clean_start_share: float = 0.0
    thing_weight: float = 0.0
    caption_dropout: float = 0.1


def draw_times(clips: int, frames: int, objective: BaseObjective, device: torch.device) -> Tensor:
    """Draw sigma in 0..1, logit-normal and shifted: ``[clips, frames]``, or ``[clips]`` where no clip is vectorised."""
    sigma = shifted(torch.sigmoid(torch.randn(clips, frames, device=device)), SHIFT)
    if not objective.vector_share:
        return sigma[:, 0]
    is_vector = torch.rand(clips, 1, device=device) < objective.vector_share
    starts_clean = torch.rand(clips, 1, device=device) < objective.clean_start_share
    is_first = torch.arange(frames, device=device) == 0
    with_clean_start = torch.where(starts_clean & is_first, 0.0, sigma)
    return torch.where(is_vector, with_clean_start, sigma[:, :1])


def velocity_errors(transformer: nn.Module, clean: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
    """Compute the squared error of the velocity, averaged over channels: ``[B, F, h, w]``.

    Args:
        transformer: takes one timestep per clip or per latent frame.
        clean: normalised latents ``[B, 16, F, h, w]``.
        sigma: ``[B]``, or one per latent frame ``[B, F]``, in 0..1.
        embeds: prompt embeddings ``[B, 64, 128]``.
    """
    noise = torch.randn_like(clean)
    frame_sigma = sigma.view(len(clean), 1, -1, 1, 1)  # [B, 1, 1 or F, 1, 1]
    noisy = clean + frame_sigma * (noise - clean)
    # For sequences this short the plain formula is the fastest attention on a CPU (a step takes 0.54 s, not 0.83).
    backends = [SDPBackend.MATH] if clean.device.type == "cpu" else list(_GPU_ATTENTION)
    with precision(clean.device), sdpa_kernel(backends):
        velocity = transformer(noisy, 1000 * sigma, embeds, return_dict=False)[0]
    return (velocity.float() - (noise - clean)).square().mean(1)


@dataclass(frozen=True)
class BaseSchedule:
    """Choose length, batches and learning rates for the training of the base.

    Attributes:
        seconds: wall time in all, or
        steps: number of steps, or
        deadline: end in `time.monotonic` time; compiling does not count into the progress.
        batch_tokens: tokens per step and process.
        small_batch_tokens: the same for small clips; None: as many.
        small_share: share of the time for small clips: a step is cheaper by the square of the size, and what it
            teaches carries over.
        short_share: share of the time, at first, for the first half of each clip; afterwards a third of the steps.
        rate: learning rate of Muon.
        adam_rate: learning rate of AdamW, for parameters that are no matrices; None: a fifth of `rate`.
        warm_steps: steps over which rates rise.
        cool_from: share of the time after which rates fall.
        ema_decay: decay of the moving average that the base ends with.
        compiled: compile blocks: 1.4 times as fast, on a CPU too, after a minute or less.
        compiler: backend of `torch.compile`.
    """

    batch_tokens: int
    seconds: float | None = None
    steps: int | None = None
    deadline: float | None = None
    small_batch_tokens: int | None = None
    small_share: float = 0.55
    short_share: float = 0.25
    rate: float = 1e-2
    adam_rate: float | None = None
    warm_steps: int = 50
    cool_from: float = 0.65
    ema_decay: float = 0.997
    compiled: bool = True
    compiler: str = "inductor"


def train_base(
    model: TextToVideo,
    small: ClipCache | None,
    full: ClipCache,
    checkpoint: Path,
    schedule: BaseSchedule,
    objective: BaseObjective,
) -> None:
    """Train the base, or continue from `checkpoint`.

    Args:
        model: transformer and text encoder, on the device of the clips.
        small: clips of the small size; None: train on full ones only.
        full: clips of the size that the model is for.
        checkpoint: a file, which the training writes once a minute.
    """
    if schedule.compiled:
        # Few shapes are worth a graph each; with short clips there are four.
        dynamic = None if schedule.short_share else False
        model.transformer.compile_repeated_blocks(fullgraph=True, dynamic=dynamic, backend=schedule.compiler)
    loss_fn = BaseLoss(model, small, full, schedule, objective)
    optimizers = make_optimizers(model, schedule.rate, schedule.adam_rate)
    rates = ScheduleConfig(warmup_steps=schedule.warm_steps, cooldown_share=1 - schedule.cool_from, floor=0.02)
    seconds = math.inf if schedule.seconds is None else schedule.seconds
    if schedule.deadline is not None:
        loss_fn.warm_up()
        seconds = spent_seconds(checkpoint) + max(1.0, schedule.deadline - time.monotonic())
    fit(
        loss_fn,
        model,
        optimizers,
        seconds=seconds,
        steps=schedule.steps,
        schedule=partial(lr_factor, rates),
        checkpoint=checkpoint,
        ema_decay=schedule.ema_decay,
    )


def make_optimizers(model: TextToVideo, rate: float, adam_rate: float | None = None) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices of the blocks, and AdamW, at a fifth of its rate unless given, for all the rest."""
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    rest = without(model.parameters(), matrices)
    return [
        BatchedMuon(matrices, lr=rate),
        torch.optim.AdamW(rest, lr=adam_rate or rate / 5, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


class BaseLoss:
    """Compute the loss of a step from its seed and the progress in 0..1, without waiting for the device.

    Args:
        model, small, full, schedule, objective: as for `train_base`.
        is_tokenised: True if the clips have their captions as tokens already.
    """

    def __init__(
        self,
        model: TextToVideo,
        small: ClipCache | None,
        full: ClipCache,
        schedule: BaseSchedule,
        objective: BaseObjective,
        *,
        is_tokenised: bool = False,
    ) -> None:
        self.model, self.full, self.schedule, self.objective = model, full, schedule, objective
        self.processes = connect_processes().world
        self.small = small or full
        self.small_share = schedule.small_share if small is not None else 0.0
        for clips in {id(self.small): self.small, id(full): full}.values():
            if not is_tokenised:
                clips.tokenise_captions(model.tokenizer)

    def __call__(self, seed: int, progress: float) -> Tensor:
        torch.manual_seed(seed)
        data = self.small if progress < self.small_share else self.full
        step = seed // self.processes  # the same on every process, so that none waits for a longer clip
        longest = data.latents.shape[2]
        is_short = self.schedule.short_share > 0 and (progress < self.schedule.short_share or step % 3 == 0)
        frames = (longest + 1) // 2 if is_short else longest
        return self.batch_loss(data, frames)

    def warm_up(self) -> None:
        """Compile for every shape by one forward and backward pass each, without a step."""
        for data in (self.small, self.full):
            longest = data.latents.shape[2]
            for frames in {longest, (longest + 1) // 2 if self.schedule.short_share else longest}:
                self.batch_loss(data, frames).backward()
        self.model.zero_grad()

    def batch_loss(self, data: ClipCache, frames: int) -> Tensor:
        """Compute the loss of a batch of random clips of `data`, cut to their first `frames` latent frames."""
        tokens = frames * data.latents.shape[3] * data.latents.shape[4] // 4
        batch_tokens = self.schedule.batch_tokens
        if data is not self.full:
            batch_tokens = self.schedule.small_batch_tokens or batch_tokens
        return sample_loss(self.model, data.sample(max(1, batch_tokens // tokens), frames), self.objective)


def sample_loss(model: TextToVideo, clips: Sample, objective: BaseObjective) -> Tensor:
    """Compute the loss of a batch of clips with random timesteps and noise, without waiting for the device."""
    clean, device = clips.latents, clips.latents.device
    sigma = draw_times(len(clean), clean.shape[2], objective, device)
    is_dropped = torch.rand(len(clean), 1, device=device) < objective.caption_dropout
    no_caption = F.pad(model.empty_tokens, (0, clips.tokens.shape[1] - len(model.empty_tokens)))
    embeds = model.embed_tokens(torch.where(is_dropped, no_caption, clips.tokens))
    weight = 1 + objective.thing_weight * clips.mask
    # A clean frame holds nothing of its noise, so nothing can be learned from its error.
    weight = weight * (sigma > 0).view(len(sigma), -1, 1, 1)
    errors = velocity_errors(model.transformer, clean, sigma, embeds)
    return (weight * errors).mean() / weight.mean()


@torch.no_grad()
def held_out_loss(model: TextToVideo, data: ClipCache, *, batches: int = 16) -> float:
    """Measure the velocity loss on held-out clips, one timestep per clip, always with the same timesteps and noise."""
    return sum(held_out_losses(model, data, batches=batches)) / 8


@torch.no_grad()
def held_out_picture_loss(model: TextToVideo, data: ClipCache, *, batches: int = 16) -> float:
    """Measure the loss of image-to-video without captions: the first latent frame clean, the others equally noisy."""
    device = next(model.parameters()).device
    total = 0.0
    with torch.random.fork_rng():
        for batch in range(batches):
            torch.manual_seed(batch)
            chosen = torch.randint(len(data), (8,))
            clean = data.latents[chosen].float().to(device)
            sigma = shifted((torch.arange(8) + 0.5) / 8, SHIFT).to(device)[:, None].repeat(1, clean.shape[2])
            sigma[:, 0] = 0
            total += float(velocity_errors(model.transformer, clean, sigma, model.embed([""] * 8))[:, 1:].mean())
    return total / batches


@torch.no_grad()
def held_out_losses(model: TextToVideo, data: ClipCache, *, batches: int = 16) -> list[float]:
    """Measure `held_out_loss` at each of its eight sigmas, from the lowest to the highest."""
    device = next(model.parameters()).device
    totals = torch.zeros(8)
    with torch.random.fork_rng():
        for batch in range(batches):
            torch.manual_seed(batch)
            chosen = torch.randint(len(data), (8,))
            texts = captions(replace(data.scenes[chosen], wording=torch.randint(10_000, (8,))))
            sigma = shifted((torch.arange(8) + 0.5) / 8, SHIFT).to(device)
            clean = data.latents[chosen].float().to(device)
            errors = velocity_errors(model.transformer, clean, sigma, model.embed(texts))
            totals += errors.mean(dim=(1, 2, 3)).cpu()
    return (totals / batches).tolist()
