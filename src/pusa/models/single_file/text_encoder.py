"""Name and configure UMT5 encoders in single files, and take the tokenizer out of them."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from tokenizers.models import Unigram

from pusa.models import original
from pusa.models.original import EMBEDDING, TIED_COPY, KeyTable
from pusa.models.single_file.recognition import SingleFile

Value = TypeVar("Value")

_DECODER = re.compile(r"^(?:decoder\.|lm_head\.|dec\.|output\.)")  # of whole UMT5 models; only the encoder is used
_LLAMA = {
    "attn_norm": "0.layer_norm",
    "attn_q": "0.SelfAttention.q",
    "attn_k": "0.SelfAttention.k",
    "attn_v": "0.SelfAttention.v",
    "attn_o": "0.SelfAttention.o",
    "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    "ffn_norm": "1.layer_norm",
    "ffn_gate": "1.DenseReluDense.wi_0",
    "ffn_up": "1.DenseReluDense.wi_1",
    "ffn_down": "1.DenseReluDense.wo",
}
LLAMA_NAMES = KeyTable(
    "a UMT5 encoder",
    [
        ("token_embd.{p}", "shared.{p}"),
        ("enc.output_norm.{p}", "encoder.final_layer_norm.{p}"),
        *(
            (f"enc.blk.{{n}}.{name}.{{p}}", f"encoder.block.{{n}}.layer.{other}.{{p}}")
            for name, other in _LLAMA.items()
        ),
    ],
)
# Without repeated blanks, which pipelines take out of prompts.
_SAMPLES = ("a cat walks on grass, realistic", "Ein Zug fährt über die Brücke.", "一只猫在草地上行走", "12.5% 🎈")


def to_transformers(tensors: Mapping[str, Value], names: str) -> dict[str, Value]:
    """Rename the tensors of an encoder to transformers' names, without those of a decoder.

    Args:
        names: whose they are: "wan", "llama.cpp" or "hf".

    Raises:
        WrongArchitectureError: tensors of another model.
    """
    encoder = {name: value for name, value in tensors.items() if not _DECODER.search(name)}
    if names == "wan":
        return original.text_encoder_to_transformers(encoder)
    if names == "llama.cpp":
        return LLAMA_NAMES.to_diffusers(encoder)
    if EMBEDDING not in encoder and TIED_COPY in encoder:
        encoder[EMBEDDING] = encoder[TIED_COPY]
    return original.text_encoder_to_transformers(original.text_encoder_to_original(encoder))


def text_encoder_config(shapes: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """Derive a `UMT5Config` from shapes by transformers' names; `overrides` come from the caller."""
    config = original.text_encoder_config_from_keys(original.text_encoder_to_original(shapes))
    for name, value in overrides.items():
        setattr(config, name, value)
    return config


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def write_tokenizer(file: SingleFile, folder: Path) -> Path:
    """Write the sentencepiece model inside a text encoder's file to ``spiece.model`` in a folder.

    Returns:
        Its path; transformers' `T5Tokenizer.from_pretrained` reads the folder.

    Raises:
        ValueError: the file holds none.
    """
    if file.spiece_model is None:
        raise ValueError(f"{file.path.name} holds no tokenizer (no tensor spiece_model): take google/umt5-xxl's")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spiece.model"
    path.write_bytes(file.header.read(file.spiece_model))
    return path


def load_tokenizer(file: SingleFile) -> tuple[Any | None, str]:
    """Load the tokenizer inside a text encoder's file.

    Returns:
        The tokenizer and "", or None and why there is none. One that splits texts in another way than its own
        sentencepiece model is none.
    """
    import sentencepiece
    from transformers import T5Tokenizer

    if file.spiece_model is None:
        return None, f"{file.path.name} holds no tokenizer that can be read: take google/umt5-xxl's"
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = write_tokenizer(file, Path(folder))
            own = sentencepiece.SentencePieceProcessor(model_file=str(path))
            tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True, extra_ids=0)
        _fall_back_to_bytes(tokenizer, own)
        differs = [text for text in _SAMPLES if tokenizer(text).input_ids != [*own.encode(text), own.eos_id()]]
    except Exception as error:  # each of the libraries raises its own
        why = str(error).partition(" from ")[0]
        return None, f"the tokenizer in {file.path.name} cannot be read ({why}): take google/umt5-xxl's"
    if differs:
        return None, f"transformers reads the tokenizer in {file.path.name} wrongly: take google/umt5-xxl's"
    return tokenizer, ""


def _fall_back_to_bytes(tokenizer: Any, own: Any) -> None:
    """Encode characters that the vocabulary lacks as bytes, if it has them: transformers makes them unknown tokens."""
    if any(own.is_byte(index) for index in range(own.vocab_size())):
        pieces = [(own.id_to_piece(index), own.get_score(index)) for index in range(own.vocab_size())]
        tokenizer.backend_tokenizer.model = Unigram(pieces, unk_id=own.unk_id(), byte_fallback=True)
