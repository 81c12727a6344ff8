"""Make and check the environment that VBench's own code runs in, and find the weights that it needs.

It is a Python of its own: the suite needs NumPy 1 and timm 1.0.12, which cannot be installed beside diffusers' current
releases. Its packages are pinned in `scorer_requirements.txt`.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pusa.errors import first_line
from pusa.evaluation.vbench.totals import DIMENSIONS
from pusa.fsutil import sha256_of
from pusa.resources import free_disk_bytes, readable

DRIVER = Path(__file__).with_name("driver.py")
REQUIREMENTS = Path(__file__).with_name("scorer_requirements.txt")
PYTHONS = ("3.11", "3.10")
"""Versions of Python that all pinned packages have wheels for."""

_MARK = "pusa-scorer.json"  # in an environment that was installed to its end
_NEEDED_BYTES = 9 * 10**9  # 5.5 GB installed with CUDA, and downloads of 3 GB before
_CHECK_SECONDS = 900  # importing torch from a cold network disk is slow

Say = Callable[[str], None]


# ---- the environment -------------------------------------------------------------------------------------------------


def python_of(environment: Path) -> Path:
    """Return the interpreter of an environment. Raises FileNotFoundError if there is none."""
    for name in ("bin/python", "Scripts/python.exe"):
        if (environment / name).exists():
            return (environment / name).absolute()  # not resolved: a link's target would not find the packages
    raise FileNotFoundError(f"{environment} has no Python: make it with pusa eval vbench setup {environment}")


def clean_variables() -> dict[str, str]:
    """Return this process's environment variables without those that concern its own Python and its packages."""
    return {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }


def make_environment(
    folder: Path, *, python: str | None = None, requirements: Path = REQUIREMENTS, say: Say = lambda _: None
) -> Path:
    """Make the scorer's environment, or leave it as it is if it was made from the same list; return its interpreter.

    pip takes its settings from the environment as usual: PIP_EXTRA_INDEX_URL chooses a torch for another CUDA.

    Args:
        folder: of the environment. One that was not finished is installed to its end.
        python: interpreter to make it with. None: the first of this one, python3.11, python3.10 that is 3.10 or 3.11,
            or what uv fetches.
        requirements: list of packages.

    Raises:
        FileNotFoundError: there is no Python 3.10 or 3.11.
        ValueError: the folder holds something else or is this environment, or the disk is too small.
        RuntimeError: a package cannot be installed.
    """
    mark = {"requirements_sha256": sha256_of(requirements)}
    if _read_mark(folder).items() >= mark.items():
        say(f"{folder} is installed")
        return python_of(folder)
    if folder.resolve() == Path(sys.prefix).resolve():
        raise ValueError(f"{folder} is pusa's own environment, whose packages are others: give a new folder")
    is_begun = (folder / "pyvenv.cfg").exists()
    if folder.exists() and not is_begun and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is no environment: give a new folder")
    if (free := free_disk_bytes(folder)) < _NEEDED_BYTES and requirements == REQUIREMENTS:
        needed = readable(_NEEDED_BYTES)
        raise ValueError(f"{folder}: {readable(free)} are free and {needed} are needed: give one on another disk")
    uv = shutil.which("uv")
    if not is_begun:
        _create(folder, python, uv, say)
    interpreter = python_of(folder)
    version = _version_of(str(interpreter))
    if version not in PYTHONS:
        raise ValueError(
            f"{folder} has Python {version}, and the scorer needs {' or '.join(PYTHONS)}: give a new folder"
        )
    say(f"installing the packages of {requirements.name} for Python {version}: several minutes")
    install = [uv, "pip", "install", "--python", str(interpreter)] if uv else [str(interpreter), "-m", "pip", "install"]
    done = subprocess.run(
        [*install, "-r", str(requirements)], stdout=sys.stderr.fileno(), check=False, env=clean_variables()
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"the packages of {requirements.name} could not all be installed (see above); run the command again to go "
            f"on, or install them yourself: {interpreter} -m pip install -r {requirements}"
        )
    (folder / _MARK).write_text(json.dumps({**mark, "python": version}) + "\n", encoding="utf-8")
    return interpreter


def _create(folder: Path, python: str | None, uv: str | None, say: Say) -> None:
    candidates = [python] if python else [sys.executable, *(f"python{version}" for version in PYTHONS)]
    versions = {candidate: _version_of(candidate) for candidate in candidates}
    chosen = next((candidate for candidate, version in versions.items() if version in PYTHONS), None)
    if chosen is None and python is not None:
        raise ValueError(f"{python} is {versions[python] or 'no Python'}: the scorer needs {' or '.join(PYTHONS)}")
    if chosen is None and uv is None:
        raise FileNotFoundError(f"no Python {' or '.join(PYTHONS)} is here: install one, or uv, or give --python PATH")
    say(f"making {folder} with {chosen or f'uv and Python {PYTHONS[0]}'}")
    if uv:
        command = [uv, "venv", "--quiet", "--python", chosen or PYTHONS[0], str(folder)]
    else:
        command = [str(chosen), "-m", "venv", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_variables())
        if done.returncode != 0:
            raise RuntimeError(f"{folder} could not be made: {_last_line(done.stderr or done.stdout)}")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # it has a Python without pip: no call could go on there
        raise


def _version_of(python: str) -> str | None:
    """Return the version of an interpreter, ``3.11``; None if it does not run."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, check=False, timeout=60, env=clean_variables()
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _read_mark(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# ---- what runs in it -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EnvironmentCheck:
    """Hold what an environment can run.

    Attributes:
        python: its version.
        versions: of its main packages; None: it cannot be imported.
        errors: why the module of a dimension cannot be imported; None: it can.
        has_cuda: torch sees a CUDA device.
    """

    python: str
    versions: Mapping[str, str | None]
    errors: Mapping[str, str | None]
    has_cuda: bool

    @property
    def ready(self) -> list[str]:
        """List the dimensions whose code can be imported."""
        return [name for name, error in self.errors.items() if error is None]


def check_environment(environment: Path, suite: Path) -> EnvironmentCheck:
    """Import each dimension's module of the suite in an environment. Takes about a minute.

    Raises:
        FileNotFoundError: there is no environment, or the suite is no checkout.
        RuntimeError: the interpreter does not run, or says nothing for 15 minutes.
    """
    check_suite(suite)
    command = [str(python_of(environment)), "-W", "ignore", str(DRIVER), "--suite", str(suite), "--check"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_CHECK_SECONDS, env=clean_variables()
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} has imported nothing for {_CHECK_SECONDS} s: try it by hand") from None
    except OSError as error:
        raise RuntimeError(f"{command[0]} does not run: {first_line(error)}") from None
    try:
        *dimensions, last = [json.loads(line) for line in done.stdout.splitlines()]
        errors = {line["dimension"]: line["error"] for line in dimensions}
    except (ValueError, KeyError, TypeError):
        raise RuntimeError(f"{command[0]} cannot import the suite: {_last_line(done.stderr)}") from None
    return EnvironmentCheck(
        last["python"], last["versions"], {name: errors[name] for name in DIMENSIONS}, bool(last["cuda"])
    )


def check_suite(suite: Path) -> None:
    """Raise FileNotFoundError if a folder is no checkout of VBench."""
    for name in ("vbench/__init__.py", "vbench2_beta_i2v/__init__.py"):
        if not (suite / name).is_file():
            raise FileNotFoundError(
                f"{suite} has no {name}: give a checkout of https://github.com/Vchitect/VBench "
                "(the package on PyPI lacks files that the dimensions need)"
            )


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.strip().splitlines()) if line.strip()), "it said nothing")


# ---- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """Describe a file or folder of weights.

    Attributes:
        path: below the folder of weights.
        source: where it comes from.
        dimensions: that need it.
        unpack_in: folder below that of weights where the source, an archive, is unpacked; empty: it is none.
    """

    path: str
    source: str
    dimensions: tuple[str, ...]
    unpack_in: str = ""


_DINO = ("i2v_subject", "subject_consistency", "i2v_background")
_DREAMSIM = (
    "https://github.com/ssundaram21/dreamsim/releases/download/v0.2.0-checkpoints/dreamsim_ensemble_checkpoint.zip"
)
_CLIP = "https://openaipublic.azureedge.net/clip/models"

WEIGHTS: tuple[Weights, ...] = (
    Weights("dino_model/facebookresearch_dino_main", "git clone https://github.com/facebookresearch/dino", _DINO),
    Weights(
        "dino_model/dino_vitbase16_pretrain.pth",
        "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        _DINO,
    ),
    *(
        Weights(f"dreamsim_model/{name}", _DREAMSIM, ("i2v_background",), "dreamsim_model")
        for name in (
            "dino_vitb16_pretrain.pth",
            "open_clip_vitb16_pretrain.pth.tar",
            "clip_vitb16_pretrain.pth.tar",
            "ensemble_lora",
        )
    ),
    Weights(
        "cotracker_model/facebookresearch_co-tracker_main",
        "git clone https://github.com/facebookresearch/co-tracker",
        ("camera_motion",),
    ),
    Weights(
        "cotracker_model/cotracker2.pth",
        "https://huggingface.co/facebook/cotracker/resolve/main/cotracker2.pth",
        ("camera_motion",),
    ),
    Weights(
        "clip_model/ViT-B-32.pt",
        f"{_CLIP}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        ("background_consistency",),
    ),
    Weights(
        "clip_model/ViT-L-14.pt",
        f"{_CLIP}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
        ("aesthetic_quality",),
    ),
    Weights(
        "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
        "https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/sa_0_4_vit_l_14_linear.pth",
        ("aesthetic_quality",),
    ),
    Weights(
        "amt_model/amt-s.pth", "https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth", ("motion_smoothness",)
    ),
    Weights(
        "raft_model/models/raft-things.pth",
        "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip",
        ("dynamic_degree",),
        "raft_model",
    ),
    Weights(
        "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
        "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
        ("imaging_quality",),
    ),
)
"""Weights of the nine dimensions in the layout of the suite's cache; the folders of DreamSim and CoTracker are ours."""


def default_weights_folder() -> Path:
    """Name the folder of the suite's cache: that of VBENCH_CACHE_DIR, or ``~/.cache/vbench``."""
    return Path(os.environ.get("VBENCH_CACHE_DIR", "~/.cache/vbench")).expanduser()


def missing_weights(folder: Path, dimensions: Collection[str] = tuple(DIMENSIONS)) -> list[Weights]:
    """List what some dimensions need and a folder lacks; an empty file or folder counts as missing."""
    return [
        weights
        for weights in WEIGHTS
        if set(weights.dimensions) & set(dimensions) and not _is_there(folder / weights.path)
    ]


def _is_there(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size > 0


def describe_missing(folder: Path, missing: Collection[Weights]) -> Iterator[str]:
    """Format missing weights for people, line by line: where each is looked for, and where it comes from."""
    for weights in missing:
        yield f"{folder / weights.path} is missing, for {', '.join(weights.dimensions)}"
        how = f"unpack in {folder / weights.unpack_in}: " if weights.unpack_in else ""
        yield f"  {how}{weights.source}"
