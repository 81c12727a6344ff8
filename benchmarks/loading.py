"""Load full-size parts from each layout with pusa and with the stock loader, and print seconds and memory.

    python benchmarks/loading.py --tiny                  # a rehearsal, in a minute
    python benchmarks/loading.py                         # 1.3B transformer and UMT5-XXL: 23 GB of disk, 14 GB of RAM
    python benchmarks/loading.py --only transformer      # one of them

Weights are random. Each load runs in a process of its own, with the files in the page cache: seconds are those of the
loader, without the disk. "Touched" are the seconds of reading a byte of every page of the weights afterwards: a mapped
model is read only then.
Anonymous memory is sampled every 20 ms, less what the process had before; mapped file pages, which the kernel may drop
at any time, are not in it. A case that needs more memory than is free is skipped.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from _common import WAN_1_3B, table
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from pusa.models import files, original, parts
from pusa.models.streaming import fill
from pusa.models.tensors import load_tensors

BF16 = torch.bfloat16
TRANSFORMER_TINY = WAN_1_3B | {"num_attention_heads": 2, "ffn_dim": 512, "num_layers": 2, "text_dim": 256}
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
UMT5_TINY = {"vocab_size": 1000, "d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 4}
SHARD_BYTES = 2 * 10**9


# ---- files -----------------------------------------------------------------------------------------------------------


def random_tensors(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield a random tensor for each weight of a model on the meta device."""
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    for name, value in model.state_dict().items():
        if name != "encoder.embed_tokens.weight":
            repeats = -(-value.numel() // block.numel())
            yield name, block.repeat(repeats)[: value.numel()].view(value.shape).contiguous()


def write_shards(tensors: Iterator[tuple[str, Tensor]], folder: Path, stem: str) -> None:
    """Write tensors as shards of at most `SHARD_BYTES`, with an index."""
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    number = 1

    def flush() -> None:
        nonlocal shard, number
        name = f"{stem}-{number:05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard, number = {}, number + 1

    for name, value in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + value.nbytes > SHARD_BYTES:
            flush()
        shard[name] = value
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


@contextmanager
def mapped_tensors(model: torch.nn.Module, dtype: torch.dtype, folder: Path) -> Iterator[dict[str, Tensor]]:
    """Yield random tensors for all weights of a model, mapped from files that are removed again."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        write_shards(random_tensors(model, dtype), Path(scratch), "model")
        yield {key: t for path in Path(scratch).glob("*.safetensors") for key, t in load_tensors(path).items()}


def empty_transformer(tiny: bool) -> WanTransformer3DModel:
    with init_empty_weights():
        return WanTransformer3DModel(**(TRANSFORMER_TINY if tiny else WAN_1_3B))


def empty_text_encoder(tiny: bool) -> UMT5EncoderModel:
    with init_empty_weights():
        return UMT5EncoderModel(UMT5Config(**(UMT5_TINY if tiny else UMT5_XXL)))


def write_diffusers_transformer(folder: Path, tiny: bool, dtype: torch.dtype) -> None:
    part = folder / "transformer"
    part.mkdir()
    model = empty_transformer(tiny)
    model.save_config(part)
    write_shards(random_tensors(model, dtype), part, "diffusion_pytorch_model")
    (folder / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "WanTransformer3DModel"]}))


def write_original_transformer(folder: Path, tiny: bool) -> None:
    with mapped_tensors(empty_transformer(tiny), torch.float32, folder) as tensors:
        save_file(original.transformer_to_original(tensors), folder / "diffusion_pytorch_model.safetensors")


def write_diffusers_text_encoder(folder: Path, tiny: bool) -> None:
    part = folder / "text_encoder"
    part.mkdir()
    model = empty_text_encoder(tiny)
    model.config.save_pretrained(part)
    write_shards(random_tensors(model, BF16), part, "model")
    (folder / "model_index.json").write_text(json.dumps({"text_encoder": ["transformers", "UMT5EncoderModel"]}))


def write_original_text_encoder(folder: Path, tiny: bool) -> None:
    with mapped_tensors(empty_text_encoder(tiny), BF16, folder) as tensors:
        torch.save(original.text_encoder_to_original(tensors), folder / f"{files.ORIGINAL_TEXT_ENCODER}.pth")


# ---- loaders ---------------------------------------------------------------------------------------------------------


def pusa_diffusers(folder: Path, part: str) -> Any:
    model, weights = parts.empty_part(folder, part, parts.streamed_files(folder)[part])
    fill(model, weights, BF16, keep_mapped=part == "text_encoder")
    return model


def stock_original_text_encoder(folder: Path) -> Any:
    """Hand a mapped state dict to transformers, which has no loader for Wan's pickle."""
    tensors = load_tensors(folder / f"{files.ORIGINAL_TEXT_ENCODER}.pth")
    config = original.text_encoder_config_from_keys({key: list(value.shape) for key, value in tensors.items()})
    state = original.text_encoder_to_transformers(tensors)
    return UMT5EncoderModel.from_pretrained(None, config=config, state_dict=state, dtype=BF16)


def stock_original_transformer(folder: Path) -> Any:
    config = folder / "config"
    original.empty_transformer(folder).save_config(config)
    path = folder / "diffusion_pytorch_model.safetensors"
    return WanTransformer3DModel.from_single_file(str(path), config=str(config), torch_dtype=BF16)


Loader = Callable[[Path], Any]
Case = tuple[str, Callable[[Path, bool], None], Loader, Loader, int]
CASES: dict[str, Case] = {  # name -> what it is, writer, pusa's loader, the stock one, bytes held
    "transformer-diffusers-fp32": (
        "1.3B, diffusers, fp32 to bf16",
        lambda folder, tiny: write_diffusers_transformer(folder, tiny, torch.float32),
        lambda folder: pusa_diffusers(folder, "transformer"),
        lambda folder: WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=BF16),
        9 * 10**9,
    ),
    "transformer-diffusers-bf16": (
        "1.3B, diffusers, bf16 (converted)",
        lambda folder, tiny: write_diffusers_transformer(folder, tiny, BF16),
        lambda folder: pusa_diffusers(folder, "transformer"),
        lambda folder: WanTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=BF16),
        6 * 10**9,
    ),
    "transformer-original-fp32": (
        "1.3B, Wan's own, fp32 to bf16",
        write_original_transformer,
        lambda folder: original.load_transformer(folder, BF16),
        stock_original_transformer,
        9 * 10**9,
    ),
    "text-diffusers-bf16": (
        "UMT5-XXL, diffusers, bf16",
        write_diffusers_text_encoder,
        lambda folder: pusa_diffusers(folder, "text_encoder"),
        lambda folder: UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=BF16),
        13 * 10**9,
    ),
    "text-original-bf16": (
        "UMT5-XXL, Wan's own .pth, bf16",
        write_original_text_encoder,
        lambda folder: original.load_text_encoder(folder, BF16, keep_mapped=True),
        stock_original_text_encoder,
        13 * 10**9,
    ),
}


# ---- measurements ----------------------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def measure(load: Loader, folder: Path) -> dict[str, float]:
    """Load once; return seconds and GB."""
    before = most = anonymous_bytes()
    ended = threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.02):
            most = max(most, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    model = load(folder)
    seconds = time.perf_counter() - began
    for parameter in model.parameters():
        parameter.detach().flatten().view(torch.uint8)[::4096].sum()
    touched = time.perf_counter() - began - seconds
    ended.set()
    watcher.join()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    held = anonymous_bytes() - before
    return {
        "seconds": seconds,
        "touched_seconds": touched,
        "weights_gb": weights / 1e9,
        "anonymous_peak_gb": (max(most, before + held) - before) / 1e9,
        "anonymous_held_gb": held / 1e9,
    }


def read_once(folder: Path) -> None:
    """Bring all files of a folder into the page cache."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def run_case(name: str, scratch: Path, tiny: bool) -> Iterator[dict[str, Any]]:
    """Write the files of a case, load them with both loaders, and remove them."""
    title, write, *_, need = CASES[name]
    folder = scratch / name
    folder.mkdir()
    try:
        write(folder, tiny)
        for loader in ("pusa", "stock"):
            if not tiny and psutil.virtual_memory().available < need:
                yield {"case": name, "title": title, "loader": loader, "skipped": f"less than {need / 1e9:.0f} GB free"}
                continue
            read_once(folder)
            command = [sys.executable, __file__, "--child", name, "--loader", loader, "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name} with {loader} failed: {done.stderr.strip().splitlines()[-1:]}")
            yield {"case": name, "title": title, "loader": loader} | json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small models, to rehearse")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--scratch", type=Path, help="folder for the files [default: the system's temporary one]")
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--loader", choices=("pusa", "stock"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        ours, stock = CASES[options.child][2:4]
        print(json.dumps(measure(ours if options.loader == "pusa" else stock, options.folder)))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="pusa-loading-", dir=options.scratch) as scratch:
        for name in (name for name in CASES if options.only in name):
            for record in run_case(name, Path(scratch), options.tiny):
                print(json.dumps(record), flush=True)
                numbers = ("seconds", "touched_seconds", "weights_gb", "anonymous_peak_gb", "anonymous_held_gb")
                cells = [f"{record[key]:.2f}" for key in numbers] if "seconds" in record else [record["skipped"]] * 5
                rows.append([record["title"], record["loader"], *cells])
    columns = ["case", "loader", "seconds", "touched", "weights GB", "anonymous GB, peak", "held"]
    print(table(columns, rows))


if __name__ == "__main__":
    main()
