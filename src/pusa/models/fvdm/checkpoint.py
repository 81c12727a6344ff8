"""Read FVDM and Latte checkpoints, and write them once as a folder in diffusers layout.

Both have the same weights; only Latte numbers its blocks in one list, spatial and temporal in turn. Files are read as
tensors alone: no code in them runs.
"""

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pusa.fsutil import check_new_folder, replacing_folder
from pusa.models.fvdm.transformer import SIZES, FVDMTransformer3DModel
from pusa.models.tensors import UnsafeFileError

_WRAPPERS = "module.", "_orig_mod."  # of DistributedDataParallel and torch.compile
_HEADS = {(depth, hidden_size): heads for depth, hidden_size, heads in SIZES.values()}


def convert_checkpoint(
    path: Path, folder: Path, *, num_heads: int | None = None, input_size: tuple[int, int] | None = None
) -> Path:
    """Write a checkpoint as a folder for `FVDMTransformer3DModel.from_pretrained`: safetensors and configuration.

    Args:
        path: a ``.pt`` or ``.safetensors`` file; the moving average ("ema") is taken, where it holds one.
        folder: appears when it is whole; one that exists must be empty.
        num_heads, input_size: as in `config_from_shapes`.

    Returns:
        The folder.

    Raises:
        ValueError: the folder is not empty; and as `load_checkpoint`.
        FileNotFoundError: there is no such file.
    """
    check_new_folder(folder)
    model = load_checkpoint(path, num_heads=num_heads, input_size=input_size)
    with replacing_folder(folder) as part:
        model.save_pretrained(part)
    return folder


def load_checkpoint(
    path: Path, *, num_heads: int | None = None, input_size: tuple[int, int] | None = None
) -> FVDMTransformer3DModel:
    """Load a checkpoint, in its own dtype, on the CPU; arguments as in `convert_checkpoint`.

    Raises:
        UnsafeFileError: the file holds more than tensors.
        ValueError: it is damaged, of another network, or its shapes leave something open.
        FileNotFoundError: there is no such file.
    """
    state = read_checkpoint(path)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    config = config_from_shapes(shapes, num_heads=num_heads, input_size=input_size)
    with torch.device("meta"):
        model = FVDMTransformer3DModel(**config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = sorted(name for name in {*shapes, *expected} if shapes.get(name) != expected.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{path}: {name} has shape {shapes.get(name, 'none')} and not {expected.get(name, 'none')}, as FVDM's "
            f"network would have ({len(wrong)} tensors differ): get the checkpoint again, or one of FVDM or Latte"
        )
    model.load_state_dict(state, assign=True)
    return model.eval()


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the weights of an FVDM or Latte checkpoint under the names of `FVDMTransformer3DModel`, mapped from disk.

    Raises:
        As `load_checkpoint`.
    """
    state = _read_file(path)
    for key in ("ema", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path} holds no state dict, alone or as 'ema' or 'model': give a checkpoint of FVDM or Latte"
        )
    found = {_name(key): value for key, value in state.items()}
    if "text_embedding_projection.1.weight" in found:
        raise ValueError(f"{path} was trained with text: give a checkpoint without conditions, or one with classes")
    ranks = {"x_embedder.proj.weight": 4, "pos_embed": 3, "temp_embed": 3, "final_layer.linear.weight": 2}
    if any(name not in found or found[name].ndim != rank for name, rank in ranks.items()):
        raise ValueError(
            f"{path} is no checkpoint of FVDM or Latte: it begins with {', '.join(sorted(found)[:3])}, and lacks one "
            f"of {', '.join(ranks)} (Latte's text-to-video model is another network): give one of theirs"
        )
    return found


def _read_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: give the path of a checkpoint (.pt or .safetensors)")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UnsafeFileError(
            f"{path} holds more than tensors, or is no PyTorch file, and was not loaded, because that could run code: "
            "in the program that wrote it, save the weights alone, torch.save({'ema': ema.state_dict()}, ...)"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or no checkpoint at all: get it again") from error


def _name(key: str) -> str:
    """Strip what wrappers put before a name, and number Latte's blocks as FVDM does."""
    while key.startswith(_WRAPPERS):
        key = key.partition(".")[2]
    first, _, rest = key.partition(".")
    number, _, name = rest.partition(".")
    if first == "blocks" and number.isdecimal():
        return f"{('blocks_spatial', 'blocks_temp')[int(number) % 2]}.{int(number) // 2}.{name}"
    return key


def config_from_shapes(
    shapes: Mapping[str, Sequence[int]], *, num_heads: int | None = None, input_size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Derive the arguments of `FVDMTransformer3DModel` from the shapes of its weights, by name.

    Args:
        num_heads: attention heads, which no shape tells; None: those of the paper's size with this depth and width.
        input_size: latent height and width; None: they are equal.

    Raises:
        ValueError: an argument is needed, or contradicts the shapes.
    """
    hidden_size, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    depth = 2 * len({name.split(".")[1] for name in shapes if name.startswith("blocks_spatial.")})
    heads = num_heads or _HEADS.get((depth, hidden_size))
    if heads is None:
        raise ValueError(
            f"depth {depth} and width {hidden_size} are no size of FVDM's ({', '.join(SIZES)}), and no shape tells the "
            "number of attention heads: give num_heads"
        )
    places = shapes["pos_embed"][1]
    height, width = input_size or (isqrt(places) * patch_size,) * 2
    if (height // patch_size) * (width // patch_size) != places:
        raise ValueError(
            f"pos_embed has {places} places, and {height} x {width} latents in patches of {patch_size} have "
            f"{(height // patch_size) * (width // patch_size)}: give input_size, the height and width it was trained at"
        )
    channels = shapes["final_layer.linear.weight"][0] // patch_size**2
    if channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"the network has {in_channels} channels in and {channels} out: FVDM's has {in_channels} (noise) or "
            f"{2 * in_channels} (noise and variance) out"
        )
    table = shapes.get("y_embedder.embedding_table.weight")
    first_layer = shapes.get("blocks_spatial.0.mlp.fc1.weight", (4 * hidden_size,))
    return {
        "input_size": height if height == width else (height, width),
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": first_layer[0] / hidden_size,
        "num_frames": shapes["temp_embed"][1],
        "num_classes": None if table is None else table[0] - 1,  # the last row is for no class
        "learn_sigma": channels == 2 * in_channels,
    }
