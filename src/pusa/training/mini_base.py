"""Stage 2: the text-to-video model, with one time for the whole clip, and its text encoder, trained together."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Muon
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from pusa.models.vae import encode_video
from pusa.scheduler import shifted
from pusa.training.mini_loop import fit, rank, warm_then_cool, world_size
from pusa.training.world import Scenes, World, captions, draw_scenes

MAX_SEQUENCE_LENGTH = 64
SHIFT = 3.0
_SHARD_CLIPS = 64
_CAPTION_DROP = 0.1
_TEXT_WIDTH = 128
_SHORT_SHARE, _SMALL_SHARE = 0.25, 0.55  # of the time
_GPU_ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


class Latents:
    """Clips as normalised latents ``[N, 16, F, h, w]``, drawn and encoded once; captions are worded anew each time."""

    def __init__(self, latents: Tensor, scenes: Scenes) -> None:
        self.latents = latents
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.latents)

    def sample(self, count: int, frames: int) -> tuple[Tensor, list[str]]:
        """`count` random clips, the first `frames` latent frames (the VAE is causal: these are shorter clips)."""
        chosen = torch.randint(len(self.latents), (count,))
        scenes = self.scenes[chosen]
        scenes = Scenes(**{**vars(scenes), "wording": torch.randint(10_000, (count,))})
        return self.latents[chosen, :, :frames].float(), captions(scenes)


def cache_latents(
    vae: AutoencoderKLWan,
    world: World,
    folder: Path,
    *,
    clips: int,
    size: int,
    frames: int,
    things: int,
    held_out: bool = False,
) -> Latents:
    """Draw and encode clips into `folder`, 64 a file; processes share the work, and files that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = -(-clips // _SHARD_CLIPS)
    for shard in range(rank(), shards, world_size()):
        path = folder / f"{shard:04d}.safetensors"
        if path.exists():
            continue
        scenes, parts = _scenes_of(shard, things, held_out), []
        for first in range(0, _SHARD_CLIPS, 8):
            video, _ = world.render(scenes[first : first + 8], frames, size=size)
            with torch.autocast(world.device.type, torch.bfloat16):
                parts.append(encode_video(vae, video))
        save_file({"latents": torch.cat(parts).bfloat16().cpu().contiguous()}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    if dist.is_initialized():
        dist.barrier()
    return load_latents(folder, things=things, held_out=held_out, shards=shards)


def load_latents(folder: Path, *, things: int, held_out: bool = False, shards: int | None = None) -> Latents:
    """Clips that `cache_latents` has left in `folder`, called with the same arguments; all files if not only `shards`.

    Raises:
        FileNotFoundError: a file is missing.
    """
    count = len(list(folder.glob("*.safetensors"))) if shards is None else shards
    if not count:
        raise FileNotFoundError(f"{folder} holds no latents")
    latents = torch.cat([load_file(folder / f"{shard:04d}.safetensors")["latents"] for shard in range(count)])
    return Latents(latents, Scenes.cat([_scenes_of(shard, things, held_out) for shard in range(count)]))


def _scenes_of(shard: int, things: int, held_out: bool) -> Scenes:
    return draw_scenes(_SHARD_CLIPS, 1_000_000 + shard, things=things, held_out=held_out)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding learned from captions: their words are one token each, any other text is spelt out."""
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
    """Transformer and text encoder as they are trained together, and the tokenizer they share.

    Args:
        heads: of 32 channels each, on which Wan's own code and diffusers split RoPE alike (as on 128, not on 64).
        layers: of the transformer.
    """

    def __init__(self, *, heads: int, layers: int) -> None:
        super().__init__()
        self.tokenizer = make_tokenizer()
        self.transformer = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=32,
            in_channels=16,
            out_channels=16,
            text_dim=_TEXT_WIDTH,
            freq_dim=256,
            ffn_dim=4 * 32 * heads,
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
        """Prompt embeddings ``[B, 64, 128]`` as the pipeline makes them (zeros behind the text), some texts empty."""
        texts = [text if torch.rand(()) >= drop else "" for text in texts]
        tokens = self.tokenizer(
            texts, padding=True, truncation=True, max_length=MAX_SEQUENCE_LENGTH, return_tensors="pt"
        ).to(self.text_encoder.device)
        embeds = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        embeds = embeds * tokens.attention_mask.unsqueeze(-1)
        return F.pad(embeds, (0, 0, 0, MAX_SEQUENCE_LENGTH - embeds.shape[1]))


def velocity_loss(transformer: nn.Module, clean: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
    """Mean squared error of the velocity at `sigma`: ``[B]``, or one per latent frame ``[B, F]``, in 0..1."""
    noise = torch.randn_like(clean)
    level = sigma.view(len(clean), 1, -1, 1, 1)  # [B, 1, 1 or F, 1, 1]
    noisy = clean + level * (noise - clean)
    # For sequences this short the plain formula is the fastest attention on a CPU (a step takes 0.54 s, not 0.83).
    backends = [SDPBackend.MATH] if clean.device.type == "cpu" else list(_GPU_ATTENTION)
    with torch.autocast(clean.device.type, torch.bfloat16), sdpa_kernel(backends):
        velocity = transformer(noisy, 1000 * sigma, embeds, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - clean)


def train_base(
    model: TextToVideo,
    small: Latents,
    full: Latents,
    checkpoint: Path,
    *,
    seconds: float,
    batch_tokens: int,
    device: torch.device,
) -> None:
    """Train from scratch, or on from `checkpoint`, until `seconds` are spent.

    The first 55 % of the time goes to small clips, short ones first: every step is cheaper by the square of the size,
    and what is learned there carries over.

    Args:
        model: transformer and text encoder; moved to `device`.
        small: clips of the small size.
        full: clips of the size that the model is for.
        checkpoint: a file, written once a minute.
        seconds: of wall time.
        batch_tokens: per step and process.
        device: where to train.
    """
    model.to(device)
    model.transformer.compile_repeated_blocks(fullgraph=True)  # 1.4 times as fast, on a CPU too
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(matrix) for matrix in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        Muon(matrices, lr=2e-2, momentum=0.95, weight_decay=0.0, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def loss_of(seed: int, progress: float) -> Tensor:
        torch.manual_seed(seed)
        turn = seed // world_size()  # the same on every process, so that none waits for a longer clip
        data = small if progress < _SMALL_SHARE else full
        longest = data.latents.shape[2]
        shortest = (longest + 1) // 2
        frames = shortest if progress < _SHORT_SHARE or turn % 3 == 0 else longest
        tokens = frames * data.latents.shape[3] * data.latents.shape[4] // 4
        clean, texts = data.sample(max(1, batch_tokens // tokens), frames)
        sigma = shifted(torch.sigmoid(torch.randn(len(clean))), SHIFT)
        embeds = model.embed(texts, drop=_CAPTION_DROP)
        return velocity_loss(model.transformer, clean.to(device), sigma.to(device), embeds)

    fit(
        loss_of,
        model,
        optimizers,
        seconds=seconds,
        schedule=warm_then_cool(50, 0.65, floor=0.02),
        checkpoint=checkpoint,
        ema_decay=0.997,
    )


@torch.no_grad()
def held_out_loss(model: TextToVideo, data: Latents, *, batches: int = 16) -> float:
    """Velocity loss on clips that were not trained on, always at the same times and with the same noise."""
    device = next(model.parameters()).device
    total = 0.0
    with torch.random.fork_rng():
        for batch in range(batches):
            torch.manual_seed(batch)
            clean, texts = data.sample(8, data.latents.shape[2])
            sigma = shifted((torch.arange(8) + 0.5) / 8, SHIFT).to(device)
            total += float(velocity_loss(model.transformer, clean.to(device), sigma, model.embed(texts)))
    return total / batches
