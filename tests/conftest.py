"""Fixtures shared by all tests: where the recorded numbers and real inputs are, and tiny seeded components.

The components are those of diffusers and transformers at toy sizes with random weights, made anew at each call and
equal for equal seeds. The `make_*` functions are for other processes; tests use the fixtures that return them.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from paths import SHARED

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # processes of pytest-xdist share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

if TYPE_CHECKING:  # at run time where it is needed: the process that hands out the tests needs none of it
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from torch import Tensor
    from transformers import T5Tokenizer, UMT5EncoderModel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first and small ones last: a file is one process's, and no other waits for it then."""
    tests = Counter(item.path for item in items)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (-slow[item.path], -tests[item.path], item.path))


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Keep what tests import, a million objects, out of all collections of garbage: the code asks for hundreds."""
    gc.disable()
    try:
        if session.config.getoption("dist", "no") == "no":  # this process runs tests: what libraries log comes before
            importlib.import_module("components")
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests and their processes cache and add out of the user's folders; a test may set others."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("PUSA_CACHE", "PUSA_HOME"):
            patch.setenv(variable, str(tmp_path_factory.mktemp(variable.lower())))
        yield


def _folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{folder.name}/ (recorded data beside the repository) is not here; set PUSA_SHARED to its parent")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Tensors recorded from the original implementation."""
    return _folder("golden")


@pytest.fixture(scope="session")
def inputs() -> Path:
    """Real images and a real video."""
    return _folder("inputs")


@pytest.fixture(scope="session")
def golden_tensors(golden: Path) -> Callable[[str], dict[str, Tensor]]:
    """``golden_tensors("vae/case_5frames")``: the tensors of that file."""
    from safetensors.torch import load_file

    return lambda name: load_file(golden / f"{name}.safetensors")


@pytest.fixture(scope="session")
def golden_json(golden: Path) -> Callable[[str], Any]:
    """``golden_json("vae/parity")``: the contents of that file."""
    return lambda name: json.loads((golden / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def tiny_transformer() -> Callable[..., WanTransformer3DModel]:
    """``tiny_transformer(seed=0, **config)``, see `make_transformer`."""
    from components import make_transformer

    return make_transformer


@pytest.fixture(scope="session")
def tiny_vae() -> Callable[..., AutoencoderKLWan]:
    """``tiny_vae(seed=0, **config)``, see `make_vae`."""
    from components import make_vae

    return make_vae


@pytest.fixture(scope="session")
def tiny_wan22_vae() -> Callable[..., AutoencoderKLWan]:
    """``tiny_wan22_vae(seed=0)``, see `make_wan22_vae`."""
    from components import make_wan22_vae

    return make_wan22_vae


@pytest.fixture(scope="session")
def tiny_text_encoder() -> Callable[..., UMT5EncoderModel]:
    """``tiny_text_encoder(seed=0)``, see `make_text_encoder`."""
    from components import make_text_encoder

    return make_text_encoder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[[], T5Tokenizer]:
    """``tiny_tokenizer()``, see `make_tokenizer`."""
    from components import make_tokenizer

    return make_tokenizer


@pytest.fixture(scope="session")
def tiny_pipeline() -> Callable[..., Any]:
    """``tiny_pipeline(experts=1)``: a whole `PusaPipeline` with random weights; two experts change over at 0.875.

    Other components can be given by name (``tiny_pipeline(vae=...)``).
    """

    def make(experts: int = 1, **components: Any) -> Any:
        from components import make_text_encoder, make_tokenizer, make_transformer, make_vae
        from diffusers import UniPCMultistepScheduler

        from pusa.pipeline import PusaPipeline

        parts: dict[str, Any] = {
            "tokenizer": make_tokenizer(),
            "text_encoder": make_text_encoder(),
            "vae": make_vae(),
            "scheduler": UniPCMultistepScheduler(  # what Wan's repositories ship
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
            ),
            "transformer": make_transformer(),
        }
        if experts == 2:
            parts |= {"transformer_2": make_transformer(seed=1), "boundary_ratio": 0.875}
        pipeline = PusaPipeline(**(parts | components))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture(scope="session")
def mini() -> Any:
    """The embedded model as its users get it, shared by all tests: leave it as it was."""
    from pusa import PusaPipeline, zoo

    if "mini" not in zoo.ZOO:
        pytest.skip("the weights of the embedded model are not in src/pusa/mini/weights")
    pipeline = PusaPipeline.from_pretrained("mini")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---- LoRA; see lora_samples.py -------------------------------------------------------------------------------------


@pytest.fixture
def transformer(tiny_transformer: Callable[..., WanTransformer3DModel]) -> WanTransformer3DModel:
    """The tiny transformer as Pusa's, to attach a LoRA to."""
    from pusa.models.wan import PusaWanTransformer3DModel

    return PusaWanTransformer3DModel.from_wan(tiny_transformer())


@pytest.fixture
def pairs(transformer: WanTransformer3DModel) -> dict[str, tuple[Tensor, Tensor]]:
    """A LoRA for `transformer`: A and B by module."""
    from lora_samples import make_pairs

    return make_pairs(transformer)


@pytest.fixture
def experts(tiny_transformer: Callable[..., WanTransformer3DModel]) -> SimpleNamespace:
    """A stand-in for a pipeline with two transformers."""
    from lora_samples import pipe

    from pusa.models.wan import PusaWanTransformer3DModel

    return pipe(*(PusaWanTransformer3DModel.from_wan(tiny_transformer(seed=seed)) for seed in range(2)))


@pytest.fixture
def noise_pair(tmp_path: Path, transformer: WanTransformer3DModel, pairs: dict[str, tuple[Tensor, Tensor]]) -> Path:
    """Wan2.2 files as they are named on the Hub."""
    from lora_samples import comfyui, make_pairs, write

    folder = tmp_path / "pair"
    folder.mkdir()
    write(folder / "low_noise_pusa.safetensors", comfyui(make_pairs(transformer, rank=3, seed=5)))
    write(folder / "high_noise_pusa.safetensors", comfyui(pairs))
    return folder


# ---- The server; see needs.py --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Any]:
    """A real PostgreSQL of this session's own (`needs.PostgreSQL`)."""
    from needs import postgresql

    with postgresql() as server:
        yield server


@pytest.fixture
def postgresql_url(postgresql: Any) -> str:
    """The URL of an empty database on it."""
    return postgresql.new_database()


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    """Remove handlers that a test has added, whose output was captured and is closed, and restore levels."""
    root = logging.getLogger()
    loggers = [root, *map(logging.getLogger, ("pusa", "uvicorn", "uvicorn.error", "uvicorn.access"))]
    before, levels = list(root.handlers), [logger.level for logger in loggers]
    yield
    for handler in list(root.handlers):
        if handler not in before and not type(handler).__module__.startswith("_pytest"):
            root.removeHandler(handler)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
