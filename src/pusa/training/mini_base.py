"""Stage 2: the text-to-video model, with one time for the whole clip, and its text encoder, trained together."""

from pathlib import Path

import torch
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
TRANSFORMER = {
    "num_attention_heads": 8,
    "attention_head_dim": 32,  # diffusers and Wan's own code split RoPE alike at 32 and 128, not at 64
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 128,
    "freq_dim": 256,
    "ffn_dim": 1024,
    "num_layers": 6,
}
_SHARD_CLIPS = 64
_FRAMES = 33
_CAPTION_DROP = 0.1
_BATCH_FRAMES = 80  # latent frames per step and process


class Latents:
    """Clips as normalised latents ``[N, 16, 9, 8, 8]``, drawn and encoded once; captions are worded anew each time."""

    def __init__(self, latents: Tensor, scenes: Scenes) -> None:
        self.latents = latents
        self.scenes = scenes

    def sample(self, count: int, frames: int) -> tuple[Tensor, list[str]]:
        """`count` random clips, the first `frames` latent frames (the VAE is causal: these are shorter clips)."""
        chosen = torch.randint(len(self.latents), (count,))
        columns = {name: column[chosen] for name, column in vars(self.scenes).items()}
        columns["wording"] = torch.randint(1000, (count,))
        return self.latents[chosen, :, :frames].float(), captions(Scenes(**columns))


def cache_latents(vae: AutoencoderKLWan, world: World, folder: Path, *, shards: int, held_out: bool = False) -> None:
    """Draw and encode `shards` times 64 clips of 33 frames into `folder`; processes share the work, shards are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(rank(), shards, world_size()):
        path = folder / f"{shard:03d}.safetensors"
        if path.exists():
            continue
        video, _ = world.render(_shard_scenes(shard, held_out), _FRAMES)
        with torch.autocast("cpu", torch.bfloat16):
            latents = torch.cat([encode_video(vae, part) for part in video.split(8)])
        save_file({"latents": latents.bfloat16().contiguous()}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)


def load_latents(folder: Path, *, held_out: bool = False) -> Latents:
    """All shards of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    parts = [_shard_scenes(int(path.stem), held_out) for path in files]
    scenes = Scenes(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})
    return Latents(torch.cat([load_file(path)["latents"] for path in files]), scenes)


def _shard_scenes(shard: int, held_out: bool) -> Scenes:
    return draw_scenes(_SHARD_CLIPS, 1_000_000 + shard, held_out=held_out)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding learned from captions: their words are one token each, any other text is spelt out."""
    core = Tokenizer(BPE(unk_token="<unk>"))
    core.normalizer = Lowercase()
    core.pre_tokenizer = ByteLevel(add_prefix_space=True)
    core.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=1000,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(captions(draw_scenes(20_000, 0)), trainer)
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


class TextToVideo(nn.Module):
    """Transformer and text encoder as they are trained together, and the tokenizer they share."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = make_tokenizer()
        self.transformer = WanTransformer3DModel(**TRANSFORMER)
        self.text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(self.tokenizer),
                d_model=TRANSFORMER["text_dim"],
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
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        embeds = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        embeds = embeds * tokens.attention_mask.unsqueeze(-1)
        return F.pad(embeds, (0, 0, 0, MAX_SEQUENCE_LENGTH - embeds.shape[1]))


def velocity_loss(transformer: nn.Module, clean: Tensor, sigma: Tensor, embeds: Tensor) -> Tensor:
    """Mean squared error of the velocity at `sigma`: ``[B]``, or one per latent frame ``[B, F]``, in 0..1."""
    noise = torch.randn_like(clean)
    level = sigma.view(len(clean), 1, -1, 1, 1)  # [B, 1, 1 or F, 1, 1]
    noisy = clean + level * (noise - clean)
    # For sequences this short the plain formula is the fastest attention on a CPU (a step takes 0.54 s, not 0.83).
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        velocity = transformer(noisy, 1000 * sigma, embeds, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - clean)


def train_base(data: Latents, checkpoint: Path, *, seconds: float) -> TextToVideo:
    """Train from scratch, or on from `checkpoint`, until `seconds` are spent."""
    torch.manual_seed(0)
    model = TextToVideo()
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(matrix) for matrix in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        Muon(matrices, lr=2e-2, momentum=0.95, weight_decay=0.0, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def loss_of(seed: int, progress: float) -> Tensor:
        torch.manual_seed(seed)
        frames = 9 if progress > 0.4 and seed // 2 % 2 else 5
        clean, texts = data.sample(_BATCH_FRAMES // frames, frames)
        sigma = shifted(torch.sigmoid(torch.randn(len(clean))), SHIFT)
        return velocity_loss(model.transformer, clean, sigma, model.embed(texts, drop=_CAPTION_DROP))

    fit(
        loss_of,
        model,
        optimizers,
        seconds=seconds,
        schedule=warm_then_cool(50, 0.65, floor=0.02),
        checkpoint=checkpoint,
        ema_decay=0.995,
    )
    return model
