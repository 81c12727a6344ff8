"""Build a pipeline of the real classes at the smallest size, with random weights: it makes noise, in milliseconds.

It serves tests, and trying commands without a download. The same seed and torch version give the same weights.
"""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from pusa.models.streaming import weight_dtype
from pusa.resources import DType, dtype_of
from pusa.scheduler import PusaFlowMatchEulerScheduler

TEXT_DIM = 48
TRANSFORMER = {
    "num_attention_heads": 3,
    "attention_head_dim": 32,  # like 128 and unlike 64, split alike over t, h and w by diffusers and by Wan's code
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 256,
    "num_layers": 3,
}
VAE = {"base_dim": 8, "z_dim": 16}


def tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per byte of UTF-8; padding is 0 and the end of the text 1, as in UMT5's."""
    words = ["<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet())]
    core = Tokenizer(BPE(vocab={word: index for index, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = ByteLevelDecoder()
    core.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def text_encoder(dtype: torch.dtype = torch.float32) -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=259, d_model=TEXT_DIM, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return UMT5EncoderModel(config).to(dtype).eval()


def components(*, dtype: DType = torch.float32, seed: int = 0) -> dict[str, Any]:
    """Build the arguments of a `WanPipeline`, on the CPU; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        models = {"transformer": WanTransformer3DModel(**TRANSFORMER), "vae": AutoencoderKLWan(**VAE)}
    for part, model in models.items():
        for name, parameter in model.eval().named_parameters():
            parameter.data = parameter.to(weight_dtype(model, name, dtype_of(part, dtype)))
    return {
        **models,
        "tokenizer": tokenizer(),
        "text_encoder": text_encoder(dtype_of("text_encoder", dtype)),
        "scheduler": PusaFlowMatchEulerScheduler(),
    }
