"""Run one dimension of VBench-I2V in the scorer's own environment. Imports nothing of pusa: that is not there.

    python driver.py --suite CHECKOUT --check
    python driver.py --suite CHECKOUT --dimension NAME --videos FOLDER --info FILE --images FOLDER --ratio 16-9
                     --weights FOLDER --device cuda --work FOLDER --out FILE

Writes progress to stdout as lines of JSON, ``{"done": 3, "total": 1230}``; whatever the suite prints goes to stderr.
The suite runs as it is, except that its models come from the folder of weights alone: it would fetch some of them from
the network even in its local mode (DINO's and CoTracker's through `torch.hub`, DreamSim's from its own server).
"""

import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

I2V_DIMENSIONS = ("i2v_subject", "i2v_background", "camera_motion")
QUALITY_DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
DREAMSIM_FOLDER = "dreamsim_model"  # below the folder of weights; the suite's other folders there are its own

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "openai-clip",
    "pyiqa",
    "dreamsim",
    "decord",
    "opencv-python",
    "numpy",
    "transformers",
)
_NO_PROXY = "http://127.0.0.1:9"  # nothing listens there, so that every download fails at once


def main() -> None:
    """Check the environment, or score one dimension."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--check", action="store_true", help="import each dimension and print what fails")
    parser.add_argument("--dimension", choices=I2V_DIMENSIONS + QUALITY_DIMENSIONS)
    parser.add_argument("--ratio")
    parser.add_argument("--device", default="cuda")
    for name in ("videos", "info", "images", "weights", "work", "out"):
        parser.add_argument(f"--{name}", type=lambda text: Path(text).absolute())
    arguments = parser.parse_args()
    lines = _take_stdout()
    sys.path[0] = str(arguments.suite.absolute())  # in place of this file's folder, whose names are not for others
    _close_network()
    if arguments.check:
        _check(lines)
    else:
        _score(arguments, lines)


def _take_stdout():
    """Return stdout for our own lines, and send to stderr what the suite and its programs print."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return lines


def _close_network() -> None:
    for name in ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy"):
        os.environ[name] = os.environ[name.upper()] = _NO_PROXY
    for name in ("no_proxy", "NO_PROXY"):
        os.environ.pop(name, None)
    os.environ["HF_HUB_OFFLINE"] = "1"


# ---- check -----------------------------------------------------------------------------------------------------------


def _check(lines) -> None:
    """Print a line for each dimension, with the error of its import or null, and one with versions."""
    os.environ.setdefault("VBENCH_CACHE_DIR", tempfile.gettempdir())
    for dimension in I2V_DIMENSIONS + QUALITY_DIMENSIONS:
        error = None
        try:
            importlib.import_module(_module_of(dimension))
        except Exception as found:  # whatever a package raises when it does not fit
            error = f"{type(found).__name__}: {found}"
        print(json.dumps({"dimension": dimension, "error": error}), file=lines)
    versions: dict[str, Any] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    torch = sys.modules.get("torch")
    cuda = torch is not None and torch.cuda.is_available()
    print(json.dumps({"python": sys.version.split()[0], "versions": versions, "cuda": cuda}), file=lines)


def _module_of(dimension: str) -> str:
    return f"{'vbench2_beta_i2v' if dimension in I2V_DIMENSIONS else 'vbench'}.{dimension}"


# ---- score -----------------------------------------------------------------------------------------------------------


def _score(arguments: argparse.Namespace, lines) -> None:
    os.environ["VBENCH_CACHE_DIR"] = str(arguments.weights)  # the suite reads it when it is imported
    _count_videos(lines)
    _load_locally(arguments.weights)
    if arguments.dimension == "i2v_background":
        _give_dreamsim(arguments.weights / DREAMSIM_FOLDER, arguments.device)
    _enter(arguments.work, arguments.images, arguments.ratio)

    from vbench2_beta_i2v import VBenchI2V

    VBenchI2V(arguments.device, str(arguments.info), str(arguments.work)).evaluate(
        videos_path=str(arguments.videos),
        name=arguments.dimension,
        dimension_list=[arguments.dimension],
        local=True,
        resolution=arguments.ratio,
    )
    os.replace(arguments.work / f"{arguments.dimension}_eval_results.json", arguments.out)


def _count_videos(lines) -> None:
    """Report each step of the suite's loop over videos, the only one that it shows a bar for."""
    import tqdm

    class CountedBar(tqdm.tqdm):
        def __iter__(self):
            for done, item in enumerate(super().__iter__(), start=1):
                yield item
                print(json.dumps({"done": done, "total": self.total}), file=lines)

    tqdm.tqdm = CountedBar


def _load_locally(weights: Path) -> None:
    """Make `torch.hub` take repositories and weights from the folders of weights in place of the network."""
    import torch

    load_from_hub = torch.hub.load

    def find(name: str) -> Path:
        found = sorted(weights.glob(f"*/{name}"))
        if not found:
            raise FileNotFoundError(f"{weights} has no */{name}: pusa eval vbench setup tells where it comes from")
        return found[0]

    def load(repo_or_dir, model, *args, source="github", **options):
        if source == "github":
            repository, _, branch = repo_or_dir.partition(":")
            repo_or_dir = find(f"{repository.replace('/', '_')}_{branch or 'main'}")
        return load_from_hub(str(repo_or_dir), model, *args, source="local", **options)

    def load_weights(url, model_dir=None, map_location=None, **options):
        return torch.load(find(url.rsplit("/", 1)[-1]), map_location=map_location, weights_only=True)

    hub: Any = torch.hub
    hub.load, hub.load_state_dict_from_url = load, load_weights


def _give_dreamsim(folder: Path, device: str) -> None:
    """Make DreamSim load from a folder to a device; the suite leaves both to its defaults, ./models and CUDA."""
    import dreamsim

    dreamsim.dreamsim = functools.partial(dreamsim.dreamsim, cache_dir=str(folder), device=device)


def _enter(work: Path, images: Path, ratio: str) -> None:
    """Change to a folder that has the images where the suite looks for them, below the working directory."""
    link = work / "vbench2_beta_i2v" / "data" / "crop" / ratio
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(images, target_is_directory=True)
    os.chdir(work)


if __name__ == "__main__":
    main()
