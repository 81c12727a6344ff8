"""Prompt embeddings on disk: the text encoder works once per prompt."""

import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pusa import PusaPipeline, loading
from pusa.acceleration.decisions import PartPlan
from pusa.models.finite import NotFiniteError
from pusa.models.prompt_cache import PromptCache, PromptNotCachedError, encode_prompts, prompt_key
from pusa.models.text_encoder import identity_of_files, identity_of_module


@pytest.fixture
def pipe() -> PusaPipeline:
    return PusaPipeline.from_pretrained("tiny")


@pytest.fixture
def cache(tmp_path: Path) -> PromptCache:
    return PromptCache(tmp_path / "prompts")


def count_runs(pipe: PusaPipeline) -> list[int]:
    runs: list[int] = []
    pipe.text_encoder.register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_embeddings_are_those_of_the_pipeline_itself(pipe: PusaPipeline, cache: PromptCache) -> None:
    with torch.no_grad():
        expected = pipe.encode_prompt("a duck", "blurry", max_sequence_length=32)
    for _ in range(2):  # computed, then read
        embeds = encode_prompts(pipe, "a duck", "blurry", cache=cache, max_sequence_length=32)
        assert torch.equal(embeds[0], expected[0])
        assert torch.equal(embeds[1], expected[1])
        assert not embeds[0].requires_grad


def test_a_cached_prompt_does_not_run_the_text_encoder(pipe: PusaPipeline, cache: PromptCache) -> None:
    runs = count_runs(pipe)
    embeds, negative = encode_prompts(pipe, ["a duck", "a cow", "a duck"], "", cache=cache, max_sequence_length=32)
    assert embeds.shape == negative.shape == (3, 32, 48)
    assert torch.equal(embeds[0], embeds[2])
    assert len(runs) == 3  # two prompts and the empty text
    encode_prompts(pipe, ["a cow", "a duck"], None, cache=cache, max_sequence_length=32)
    encode_prompts(pipe, "  a\n duck ", cache=cache, max_sequence_length=32)  # Wan's cleaning makes it the same text
    assert len(runs) == 3
    encode_prompts(pipe, "a duck", cache=cache, max_sequence_length=16)
    assert len(runs) == 5


def test_a_pipeline_without_text_encoder_runs_from_the_cache(pipe: PusaPipeline, cache: PromptCache) -> None:
    embeds, negative = encode_prompts(pipe, "a duck", cache=cache, max_sequence_length=16)
    lean = PusaPipeline.from_pretrained("tiny", text_encoder=None)
    again, again_negative = encode_prompts(lean, "a duck", cache=cache, max_sequence_length=16)
    assert torch.equal(embeds, again)
    assert torch.equal(negative, again_negative)
    lean.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1, "output_type": "latent"}
    frames = lean(prompt_embeds=again, negative_prompt_embeds=again_negative, **options).frames
    assert frames.isfinite().all()
    with pytest.raises(
        PromptNotCachedError, match="'a goose' is not in the prompt cache and the pipeline has no text encoder"
    ):
        encode_prompts(lean, "a goose", cache=cache, max_sequence_length=16)


def test_the_text_encoder_is_borrowed_for_a_miss_only(cache: PromptCache) -> None:
    lean = PusaPipeline.from_pretrained("tiny", text_encoder=None)
    loads: list[str] = []

    def load() -> torch.nn.Module:
        loads.append("once")
        return loading.load_text_encoder("tiny")

    call = partial(encode_prompts, lean, cache=cache, max_sequence_length=16, load_text_encoder=load)
    embeds, _ = call("a duck", "blurry")
    assert torch.equal(call("a duck", "blurry")[0], embeds)
    assert loads == ["once"]
    assert lean.text_encoder is None


def plan(**options: Any) -> PartPlan:
    return PartPlan(**{"dtype": "float32", "storage": "float32", "device": "cpu", "when": "stay"} | options)


@pytest.mark.parametrize("offload", ["none", "model", "leaves"])
def test_an_encoder_that_stays_is_loaded_once_and_computes_the_same_wherever_it_is(
    pipe: PusaPipeline, cache: PromptCache, tmp_path: Path, offload: Any
) -> None:
    lean = PusaPipeline.from_pretrained("tiny", text_encoder=None)
    loads: list[torch.nn.Module] = []

    def load() -> torch.nn.Module:
        loads.append(loading.load_text_encoder("tiny"))
        return loads[-1]

    call = partial(encode_prompts, lean, cache=cache, max_sequence_length=16, load_text_encoder=load, device="cpu:0")
    for prompt in ("a duck", "a goose"):
        embeds, negative = call(prompt, "blurry", plan=plan(offload=offload))
        expected = encode_prompts(pipe, prompt, "blurry", cache=PromptCache(tmp_path / "own"), max_sequence_length=16)
        assert torch.equal(embeds, expected[0])
        assert torch.equal(negative, expected[1])
    assert len(loads) == 1
    assert lean.text_encoder is None
    call("a cow", plan=plan(offload=offload, when="prompt"))  # another plan: read anew, and dropped
    call("a dog", plan=plan(offload=offload, when="prompt"))
    assert len(loads) == 3


def test_a_kept_encoder_ends_with_its_pipeline(cache: PromptCache) -> None:
    lean = PusaPipeline.from_pretrained("tiny", text_encoder=None)
    loaded: list[Any] = []

    def load() -> torch.nn.Module:
        encoder = loading.load_text_encoder("tiny")
        loaded.append(weakref.ref(encoder))
        return encoder

    options = {"cache": cache, "max_sequence_length": 16, "load_text_encoder": load}
    encode_prompts(lean, "a duck", plan=plan(when="prompt"), **options)
    gc.collect()
    assert loaded.pop()() is None
    encode_prompts(lean, "a goose", plan=plan(), **options)
    gc.collect()
    assert loaded[0]() is not None
    del lean
    gc.collect()
    assert loaded[0]() is None


def test_an_encoder_that_fails_is_not_kept(cache: PromptCache) -> None:
    lean = PusaPipeline.from_pretrained("tiny", text_encoder=None)
    loads: list[int] = []

    def load() -> torch.nn.Module:
        loads.append(1)
        encoder = loading.load_text_encoder("tiny")
        if len(loads) == 1:
            torch.nn.init.constant_(encoder.encoder.final_layer_norm.weight, float("nan"))
        return encoder

    options = {"cache": cache, "max_sequence_length": 16, "load_text_encoder": load, "plan": plan()}
    with pytest.raises(NotFiniteError):
        encode_prompts(lean, "a duck", **options)
    assert lean.text_encoder is None
    encode_prompts(lean, "a duck", **options)
    assert len(loads) == 2


def test_the_dtype_of_a_plan_is_that_of_the_embeddings(cache: PromptCache) -> None:
    lean = PusaPipeline.from_pretrained("tiny", text_encoder=None)
    load = partial(loading.load_text_encoder, "tiny")
    options = {"cache": cache, "max_sequence_length": 16, "load_text_encoder": load}
    embeds, _ = encode_prompts(lean, "a duck", plan=plan(dtype="bfloat16"), **options)
    assert embeds.dtype == torch.bfloat16
    assert encode_prompts(lean, "a duck", **options)[0].dtype == torch.float32


def test_progress_counts_the_loading_and_each_text_and_is_silent_for_cached_ones(cache: PromptCache) -> None:
    lean = PusaPipeline.from_pretrained("tiny", text_encoder=None)
    seen: list[tuple[int, int]] = []
    load = partial(loading.load_text_encoder, "tiny")
    options = {"cache": cache, "max_sequence_length": 16, "load_text_encoder": load}
    for _ in range(2):
        encode_prompts(lean, "a duck", "blurry", progress=lambda *pair: seen.append(pair), **options)
        assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    encode_prompts(lean, "a goose", guidance_scale=1.0, progress=lambda *pair: seen.append(pair), **options)
    assert seen[4:] == [(0, 2), (1, 2), (2, 2)]


def test_without_guidance_there_is_no_negative_prompt(pipe: PusaPipeline, cache: PromptCache) -> None:
    runs = count_runs(pipe)
    embeds, negative = encode_prompts(pipe, "a duck", "blurry", cache=cache, guidance_scale=1.0, max_sequence_length=16)
    assert negative is None
    assert len(runs) == len(embeds) == 1
    with pytest.raises(ValueError, match="2 negative prompts for 1 prompts"):
        encode_prompts(pipe, "a duck", ["a", "b"], cache=cache)


def test_padding_is_not_stored_and_precision_is(cache: PromptCache) -> None:
    embeds = torch.zeros(512, 8, dtype=torch.bfloat16)
    embeds[:5] = torch.randn(5, 8)
    embeds[2] = 0  # inside the text, so it stays
    cache.put("key", embeds)
    (path,) = cache.folder.iterdir()
    assert load_file(path)["prompt_embeds"].shape == (5, 8)
    assert cache.get("key").dtype == torch.bfloat16
    assert torch.equal(cache.get("key"), embeds)
    cache.put("empty", torch.zeros(4, 8))
    assert torch.equal(cache.get("empty"), torch.zeros(4, 8))
    assert cache.get("unknown") is None


def test_what_an_embedding_depends_on_is_in_its_key() -> None:
    options = {"max_sequence_length": 512, "dtype": torch.bfloat16}
    base = prompt_key("encoder", "salt & pepper", **options)
    assert base == prompt_key("encoder", " salt &amp;\tpepper", **options)
    others = {
        prompt_key("other", "salt & pepper", **options),
        prompt_key("encoder", "Salt & pepper", **options),
        prompt_key("encoder", "salt & pepper", **options | {"max_sequence_length": 256}),
        prompt_key("encoder", "salt & pepper", **options | {"dtype": torch.float32}),
    }
    assert len(others | {base}) == 5


def test_two_text_encoders_are_never_mixed_up(pipe: PusaPipeline, tmp_path: Path) -> None:
    first = identity_of_module(pipe.text_encoder, pipe.tokenizer)
    assert first == identity_of_module(loading.load_text_encoder("tiny"), pipe.tokenizer)
    with torch.no_grad():
        pipe.text_encoder.encoder.final_layer_norm.weight.mul_(2)
    assert identity_of_module(pipe.text_encoder, pipe.tokenizer) != first

    pipe.save_pretrained(tmp_path / "a")
    parts = [tmp_path / "a/text_encoder", tmp_path / "a/tokenizer"]
    before = identity_of_files(parts)
    assert before == loading.load_pipeline(PusaPipeline, tmp_path / "a", text_encoder=None).text_encoder_identity
    weights = parts[0] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1  # same names, same sizes, same header
    weights.write_bytes(data)
    assert identity_of_files(parts) != before


def test_a_text_encoder_of_the_caller_shares_no_cache_with_the_folder(pipe: PusaPipeline, cache: PromptCache) -> None:
    encode_prompts(pipe, "a duck", cache=cache, max_sequence_length=16)
    encoder = loading.load_text_encoder("tiny")
    with torch.no_grad():
        encoder.encoder.final_layer_norm.weight.mul_(2)
    other = PusaPipeline.from_pretrained("tiny", text_encoder=encoder)
    runs = count_runs(other)
    encode_prompts(other, "a duck", cache=cache, max_sequence_length=16)
    assert len(runs) == 2


def test_a_damaged_entry_is_computed_again(
    pipe: PusaPipeline, cache: PromptCache, caplog: pytest.LogCaptureFixture
) -> None:
    embeds, _ = encode_prompts(pipe, "a duck", cache=cache, max_sequence_length=16, guidance_scale=1)
    (path,) = cache.folder.iterdir()
    path.write_bytes(b"oops")
    again, _ = encode_prompts(pipe, "a duck", cache=cache, max_sequence_length=16, guidance_scale=1)
    assert torch.equal(again, embeds)
    assert "damaged" in caplog.text
    assert path.stat().st_size > 4


def test_a_failed_write_leaves_nothing_behind(cache: PromptCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("pusa.models.prompt_cache.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        cache.put("key", torch.ones(2, 2))
    assert list(cache.folder.iterdir()) == []
