"""Weights go from files to their place one by one: the stock loaders' numbers, no second copy, no mapped files."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from model_folders import write_original
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel

from pusa import PusaPipeline, loading
from pusa.models import streaming, tiny
from pusa.models.streaming import LoadCounter, sources_of
from pusa.models.tensors import open_tensors

STOCK = {"transformer": WanTransformer3DModel, "text_encoder": UMT5EncoderModel, "vae": AutoencoderKLWan}


@pytest.fixture
def diffusers_folder(tmp_path: Path) -> Path:
    PusaPipeline(**tiny.components()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def original_folder(tmp_path: Path) -> Path:
    return write_original(tmp_path / "wan", tiny.components())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["diffusers_folder", "original_folder"])
def test_every_part_is_what_the_stock_loader_makes(
    diffusers_folder: Path, layout: str, dtype: torch.dtype, request: Any
) -> None:
    pipe = PusaPipeline.from_pretrained(request.getfixturevalue(layout), dtype=dtype)
    for part, cls in STOCK.items():
        model = getattr(pipe, part)
        stock = cls.from_pretrained(diffusers_folder / part, torch_dtype=dtype)
        expected = stock.state_dict()
        assert model.state_dict().keys() == expected.keys()
        for name, value in model.state_dict().items():
            assert value.dtype == expected[name].dtype, (part, name)
            assert torch.equal(value, expected[name]), (part, name)
        assert model.dtype == stock.dtype
        assert not model.training
        assert all(
            p.requires_grad == q.requires_grad for p, q in zip(model.parameters(), stock.parameters(), strict=True)
        )
        assert not any(buffer.is_meta for buffer in model.buffers())
    assert pipe.text_encoder.config.dtype == dtype


@pytest.mark.parametrize("layout", ["diffusers_folder", "original_folder"])
def test_progress_counts_the_bytes_of_all_weights(layout: str, request: Any) -> None:
    folder = request.getfixturevalue(layout)
    told: list[tuple[int, int]] = []
    pipe = PusaPipeline.from_pretrained(folder, progress=lambda done, total: told.append((done, total)))
    size_bytes = sum(p.nbytes for part in STOCK for p in getattr(pipe, part).parameters())
    assert told == sorted(told)
    done, total = told[-1]
    assert done == size_bytes <= total
    assert total < 1.3 * size_bytes  # with the headers of these small files
    told.clear()
    loading.load_text_encoder(folder, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == sum(p.nbytes for p in pipe.text_encoder.parameters())


def mapped_files() -> str:
    gc.collect()
    return Path("/proc/self/maps").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["diffusers_folder", "original_folder"])
def test_no_file_of_a_pipeline_stays_mapped(layout: str, dtype: torch.dtype, request: Any) -> None:
    folder = request.getfixturevalue(layout)
    pipe = PusaPipeline.from_pretrained(folder, dtype=dtype)
    assert str(folder) not in mapped_files()
    assert pipe.transformer is not None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["diffusers_folder", "original_folder"])
def test_a_borrowed_text_encoder_is_mapped_and_not_copied(layout: str, request: Any) -> None:
    folder = request.getfixturevalue(layout)
    encoder = loading.load_text_encoder(folder, dtype=torch.float32)
    assert str(folder) in mapped_files()
    del encoder
    assert str(folder) not in mapped_files()


class OneAtATime:
    """Stands for an open file, and counts the tensors it has given that are still alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import weakref
        from contextlib import contextmanager

        self.most, self._alive = 0, weakref.WeakSet[Any]()

        @contextmanager
        def opened(path: Path) -> Any:
            with open_tensors(path) as get:
                yield lambda key: self._watched(get(key))

        monkeypatch.setattr(streaming, "open_tensors", opened)

    def _watched(self, tensor: torch.Tensor) -> torch.Tensor:
        self._alive.add(tensor)
        self.most = max(self.most, len(self._alive))
        return tensor


def test_one_tensor_of_the_file_is_held_at_a_time(diffusers_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = OneAtATime(monkeypatch)
    pipe = PusaPipeline.from_pretrained(diffusers_folder)
    assert watch.most == 1
    assert len(sources_of(pipe.transformer)) == len(pipe.transformer.state_dict())


def test_every_weight_knows_its_place_on_disk(original_folder: Path) -> None:
    pipe = PusaPipeline.from_pretrained(original_folder, dtype=torch.bfloat16)
    for part in STOCK:
        model = getattr(pipe, part)
        for name, parameter in model.named_parameters():
            assert torch.equal(sources_of(model)[name].read().to(parameter.dtype), parameter)


def test_weights_go_to_the_device_of_their_part(diffusers_folder: Path) -> None:
    pipe = PusaPipeline.from_pretrained(diffusers_folder, device={"transformer": "meta"})
    assert {p.device.type for p in pipe.transformer.parameters()} == {"meta"}
    assert {p.device.type for p in pipe.vae.parameters()} == {"cpu"}


@pytest.mark.parametrize("edit", ["both", "second"])
def test_tied_embeddings_are_one_tensor_under_either_name(diffusers_folder: Path, edit: str) -> None:
    path = diffusers_folder / "text_encoder/model.safetensors"
    tensors = load_file(path)
    shared = tensors["shared.weight"] if edit == "both" else tensors.pop("shared.weight")
    save_file(tensors | {"encoder.embed_tokens.weight": shared.clone()}, path, {"format": "pt"})
    encoder = loading.load_text_encoder(diffusers_folder)
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    assert torch.equal(encoder.shared.weight, shared)


def test_what_diffusers_alone_can_read_is_left_to_it(diffusers_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[Any] = []
    fill: Callable[..., None] = streaming.fill
    monkeypatch.setattr("pusa.models.parts.fill", lambda *a, **k: (filled.append(a), fill(*a, **k)))
    PusaPipeline.from_pretrained(diffusers_folder)
    assert len(filled) == 3
    pipe = PusaPipeline.from_pretrained(diffusers_folder, low_cpu_mem_usage=True)
    assert len(filled) == 3
    assert sources_of(pipe.transformer) == {}


def test_a_counter_never_passes_the_total() -> None:
    told: list[int] = []
    counter = LoadCounter(lambda done, _: told.append(done), 10)
    counter.add(7)
    counter.add(7)
    assert told == [7, 10]
