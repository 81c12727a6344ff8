"""Tell families of models by the names and shapes of their tensors. Imports no torch."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from pusa.models.files import WrongArchitectureError
from pusa.models.mochi import layout as mochi_layout

# Signs of Wan transformers that are no text-to-video models: start of a name -> family, title. The first counts.
_SIGNS = (
    (("vace_patch_embedding.", "vace_blocks."), "vace", "a VACE model"),
    (("casual_audio_encoder.", "audio_injector."), "s2v", "an S2V (speech-to-video) model"),
    (("face_adapter.", "pose_patch_embedding.", "motion_encoder."), "animate", "an Animate model"),
    (("multitalk_audio_proj.",), "multitalk", "a MultiTalk model"),
    (("audio_proj.",), "humo", "a HuMo model"),
    (("blocks.0.cam_encoder.",), "recammaster", "a ReCamMaster model"),
    (("ref_adapter.",), "lynx", "a Lynx model"),
    (("control_adapter.",), "fun_camera", "a Fun camera control model"),
    (("ref_conv.",), "fun_control", "a Fun control model"),
)
_TEXT_TO_VIDEO = "Pusa needs a text-to-video base (T2V, or TI2V-5B), which it conditions by its timesteps"
_PLAIN_T5_VOCABULARY = 32128
NO_PART = "no part of a Wan or Mochi model"


class Shapes(dict[str, tuple[int, ...]]):
    """Map the names of a component's tensors, without prefix, to their shapes."""

    def begins(self, *starts: str) -> bool:
        return any(name.startswith(starts) for name in self)

    def size(self, name: str, axis: int) -> int | None:
        shape = self.get(name, ())
        return shape[axis] if -len(shape) <= axis < len(shape) else None

    def count(self, pattern: str) -> int:
        """Count the blocks whose number a pattern's group finds."""
        found = (re.match(pattern, name) for name in self)
        return len({match[1] for match in found if match})


@dataclass(frozen=True)
class Family:
    """Describe a component and its kind, as `recognition.Part` does; `problem` says why the kind is refused."""

    component: Literal["transformer", "text_encoder", "vae"] | None
    name: str
    title: str
    names: str = "wan"
    in_channels: int | None = None
    out_channels: int | None = None
    width: int | None = None
    layers: int | None = None
    text_width: int | None = None
    problem: str = ""

    @property
    def noun(self) -> str:
        return noun_of(self.component or "model")


def noun_of(component: str) -> str:
    """Name a component for people."""
    return {"text_encoder": "text encoder", "vae": "VAE"}.get(component, component)


def family_of(shapes: Shapes) -> Family:
    """Recognise a component by the names of its tensors."""
    if shapes.begins("decoder.middle.", "decoder.mid_block.", "decoder.upsamples.", "encoder.downsamples."):
        return _vae(shapes)
    if shapes.begins("enc.blk.", "encoder.block.", "blocks.0.pos_embedding.", "token_embedding."):
        return _text_encoder(shapes)
    if names := mochi_layout.layout_of(shapes):
        return _mochi(shapes, names)
    if shapes.begins(
        "head.modulation", "patch_embedding.", "blocks.0.modulation", "vace_blocks.", "condition_embedder."
    ):
        return _transformer(shapes)
    some = ", ".join(sorted(shapes)[:3])
    return Family(None, "unknown", NO_PART, problem=f"{NO_PART} (tensors such as {some})")


def _mochi(shapes: Shapes, names: str) -> Family:
    title = "Mochi's transformer"
    try:
        config = mochi_layout.config_from_keys(shapes, names)
    except WrongArchitectureError as error:
        return Family("transformer", "mochi", title, names, problem=f"{title}, and not whole: {error}")
    return Family(
        "transformer",
        "mochi",
        title,
        names,
        config["in_channels"],
        config["out_channels"],
        config["num_attention_heads"] * config["attention_head_dim"],
        config["num_layers"],
        config["text_embed_dim"],
    )


def _transformer(shapes: Shapes) -> Family:
    is_diffusers = shapes.begins("condition_embedder.")
    head = "proj_out.weight" if is_diffusers else "head.head.weight"
    text = "condition_embedder.text_embedder.linear_1.weight" if is_diffusers else "text_embedding.0.weight"
    in_channels = shapes.size("patch_embedding.weight", 1)
    rows = shapes.size(head, 0)
    patch = shapes.get("patch_embedding.weight", ())
    patch_values = patch[2] * patch[3] * patch[4] if len(patch) == 5 else 4
    width = shapes.size("patch_embedding.bias", 0) or shapes.size("head.modulation", -1)
    if len(patch) != 5 and width and patch:  # some GGUF files have it in fewer dimensions
        in_channels = math.prod(patch) // (width * patch_values)
    out_channels = rows // patch_values if rows else None
    name, title = _transformer_kind(shapes, in_channels, out_channels)
    is_known = name in ("t2v", "ti2v")
    return Family(
        "transformer",
        name,
        title,
        "diffusers" if is_diffusers else "wan",
        in_channels,
        out_channels,
        width,
        shapes.count(r"blocks\.(\d+)\."),
        shapes.size(text, 1),
        "" if is_known else f"{title}{_channels(in_channels, out_channels)}: {_TEXT_TO_VIDEO}",
    )


def _channels(in_channels: int | None, out_channels: int | None) -> str:
    known = in_channels is not None and out_channels is not None
    return f" ({in_channels} input channels for {out_channels} latent ones)" if known else ""


def _transformer_kind(shapes: Shapes, in_channels: int | None, out_channels: int | None) -> tuple[str, str]:
    for starts, name, title in _SIGNS:
        if shapes.begins(*starts):
            if name == "vace" and "patch_embedding.weight" not in shapes:
                return "vace_module", "a VACE module without its model"
            return name, title
    takes_images = shapes.begins("img_emb.", "condition_embedder.image_embedder.") or any(
        ".k_img." in name or ".add_k_proj." in name for name in shapes
    )
    if (in_channels, out_channels) == (48, 16) or in_channels == 52:
        return "fun_control", "a Fun control model"
    if takes_images or in_channels == 36:
        if shapes.begins("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"):
            return "flf2v", "a first-and-last-frame (FLF2V) image-to-video model"
        return "i2v", "an image-to-video model"
    if not shapes.begins("text_embedding.", "condition_embedder.text_embedder."):
        return "remover", "a MiniMax-Remover model, or another without text"
    if in_channels == out_channels == 48:
        return "ti2v", "Wan2.2's TI2V-5B transformer"
    if in_channels == out_channels == 16:
        return "t2v", "a Wan text-to-video transformer"
    return "unknown", "a Wan transformer of an unknown kind"


def _text_encoder(shapes: Shapes) -> Family:
    if shapes.begins("enc.blk.", "token_embd."):
        names, embedding, layer = "llama.cpp", "token_embd.weight", r"enc\.blk\.(\d+)\."
        bias = r"enc\.blk\.(\d+)\.attn_rel_b\."
    elif shapes.begins("token_embedding.", "blocks.0.pos_embedding."):
        names, embedding, layer = "wan", "token_embedding.weight", r"blocks\.(\d+)\."
        bias = r"blocks\.(\d+)\.pos_embedding\."
    else:
        names, embedding, layer = "hf", "shared.weight", r"encoder\.block\.(\d+)\."
        bias = r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\."
        embedding = embedding if embedding in shapes else "encoder.embed_tokens.weight"
    layers, biases = shapes.count(layer), shapes.count(bias)
    vocabulary = shapes.size(embedding, 0)
    is_plain = (biases == 1 < layers) or vocabulary == _PLAIN_T5_VOCABULARY
    return Family(
        "text_encoder",
        "t5" if is_plain else "umt5",
        "a T5 v1.1 encoder (not UMT5)" if is_plain else "the UMT5 text encoder",
        names,
        width=shapes.size(embedding, 1),
        layers=layers,
        problem=(
            f"a T5 v1.1 encoder (not UMT5): {biases} of its {layers} blocks have a bias of positions, and all of "
            "UMT5's have. Take umt5_xxl, with which Wan reads prompts; Mochi's encoder comes from its folder"
            if is_plain
            else ""
        ),
    )


def _vae(shapes: Shapes) -> Family:
    is_diffusers = shapes.begins("decoder.mid_block.")
    channels = shapes.size("post_quant_conv.weight" if is_diffusers else "conv2.weight", 0)
    is_residual = shapes.begins("decoder.upsamples.0.upsamples.", "decoder.up_blocks.0.upsampler.") or channels == 48
    name, title = ("wan2.2-vae", "the Wan2.2 VAE") if is_residual else ("wan2.1-vae", "the Wan2.1 VAE")
    problem = "" if channels in (16, 48) else f"a VAE of {channels} latent channels: Wan2.1's has 16, Wan2.2's has 48"
    if not shapes.begins("conv2.", "post_quant_conv."):
        name, title, problem = "unknown", "a VAE that is not Wan's", "a VAE that is not Wan's"
    return Family("vae", name, title, "diffusers" if is_diffusers else "wan", channels, channels, problem=problem)
