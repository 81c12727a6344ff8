"""The transformer takes one timestep per latent frame, and stays a stock Wan transformer in every other respect."""

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _golden import TRANSFORMER_CASES
from diffusers import FirstBlockCacheConfig, WanTransformer3DModel
from diffusers.hooks import SeaCacheConfig
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from torch import Tensor
from transformer_checks import assert_cache_skips_work, assert_promoted_in_place, step_caches

from pusa.models.wan import PusaWanTransformer3DModel, PusaWanTransformerBlock

FRAMES, TOKENS_PER_FRAME = 5, 12
TOKENS = FRAMES * TOKENS_PER_FRAME
MULTI_FRAME = torch.tensor([[0.0, 937.5, 300.0, 937.5, 12.25]])  # [1, F]


@pytest.fixture
def stock(tiny_transformer: Callable[..., WanTransformer3DModel]) -> WanTransformer3DModel:
    return tiny_transformer()


@pytest.fixture
def model(tiny_transformer: Callable[..., WanTransformer3DModel]) -> PusaWanTransformer3DModel:
    """Ours, with the weights of `stock`."""
    return PusaWanTransformer3DModel.from_wan(tiny_transformer())


def inputs(batch: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 16, FRAMES, 6, 8, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, 7, 48, generator=generator).to(dtype),
    }


@torch.no_grad()
def velocity(model: torch.nn.Module, timestep: Tensor, **kwargs: Any) -> Tensor:
    return model(timestep=timestep, return_dict=False, **{**inputs(batch=timestep.shape[0]), **kwargs})[0]


def per_token(timestep: Tensor, tokens_per_frame: int = TOKENS_PER_FRAME) -> Tensor:
    return timestep.repeat_interleave(tokens_per_frame, dim=1)  # [B, F] -> [B, S]


def assert_same(ours: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """Equal but for the order of additions in a matrix product, which changes with its number of rows."""
    assert ours.dtype == expected.dtype
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


def add_lora(model: WanTransformer3DModel, name: str = "pusa", seed: int = 3, **config: Any) -> None:
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "ffn.net.2"], **config), name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f".lora_B.{name}." in key:  # starts as zeros, which would test nothing
            parameter.data.normal_(std=0.1, generator=generator)


# ---- the numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TRANSFORMER_CASES)
def test_matches_the_original(case: str, golden_tensors: Callable, golden_json: Callable) -> None:
    model = PusaWanTransformer3DModel(**golden_json("transformer/config")["diffusers_config"]).eval()
    model.load_state_dict(golden_tensors("transformer/weights_diffusers"))
    recorded = golden_tensors(f"transformer/case_{case}")
    ours = velocity(
        model,
        recorded["timestep"],
        hidden_states=recorded["latents"],
        encoder_hidden_states=recorded["context"],
    )
    tolerance = 2 * golden_json("transformer/parity")[case]["diffusers_2d_vs_ref_maxabs"]
    assert (ours - recorded["output"]).abs().max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_timestep_per_frame_equals_one_per_token(
    stock: WanTransformer3DModel, model: PusaWanTransformer3DModel, dtype: torch.dtype
) -> None:
    timestep = torch.cat([MULTI_FRAME, MULTI_FRAME.flip(1)])  # two different videos
    per_frame = velocity(model.to(dtype), timestep, **inputs(2, dtype=dtype))
    expected = velocity(stock.to(dtype), per_token(timestep), **inputs(2, dtype=dtype))
    assert_same(per_frame, expected, tolerance=1e-6 if dtype == torch.float32 else 0)


def test_production_precision_bf16_with_fp32_modulation(
    tiny_transformer: Callable[..., WanTransformer3DModel], tmp_path: Any
) -> None:
    tiny_transformer().save_pretrained(tmp_path)
    stock = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    model = PusaWanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert model.blocks[0].scale_shift_table.dtype == torch.float32
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    x = inputs(dtype=torch.bfloat16)
    assert torch.equal(velocity(model, MULTI_FRAME, **x), velocity(stock, per_token(MULTI_FRAME), **x))


def test_equal_timesteps_are_the_stock_scalar_path(
    stock: WanTransformer3DModel, model: PusaWanTransformer3DModel
) -> None:
    scalar = velocity(stock, torch.tensor([700.0]))
    per_frame = velocity(model, torch.full((1, FRAMES), 700.0))
    assert_same(per_frame, scalar)


@pytest.mark.parametrize("timestep", [torch.tensor([700.0, 20.0]), per_token(MULTI_FRAME)], ids=["scalar", "token"])
def test_stock_timesteps_take_the_stock_path(
    stock: WanTransformer3DModel, model: PusaWanTransformer3DModel, timestep: Tensor
) -> None:
    assert torch.equal(velocity(model, timestep), velocity(stock, timestep))


def test_frames_of_one_token(stock: WanTransformer3DModel, model: PusaWanTransformer3DModel) -> None:
    x = inputs()["hidden_states"][..., :2, :2]  # 5 frames, 5 tokens
    ours = velocity(model, MULTI_FRAME, hidden_states=x)
    assert torch.equal(ours, velocity(stock, MULTI_FRAME, hidden_states=x))


def test_samples_of_a_batch_keep_their_timesteps(model: PusaWanTransformer3DModel) -> None:
    timestep = torch.cat([MULTI_FRAME, torch.full((1, FRAMES), 400.0)])
    together = velocity(model, timestep)
    for row in (0, 1):
        alone = {name: tensor[row : row + 1] for name, tensor in inputs(2).items()}
        torch.testing.assert_close(velocity(model, timestep[row : row + 1], **alone)[0], together[row])


def test_each_frame_follows_its_timestep(model: PusaWanTransformer3DModel) -> None:
    changed = MULTI_FRAME.clone()
    changed[0, 2] = 800.0
    difference = (velocity(model, changed) - velocity(model, MULTI_FRAME)).abs().amax(dim=(0, 1, 3, 4))  # [F]
    assert difference.argmax() == 2
    assert (difference > 0).all()  # the others see it through attention


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4), r"timestep of shape \[1, 4\]: .* per latent frame \[B, 5\] or per token \[B, 60\]"),
        ((1, 21), r"timestep of shape \[1, 21\]"),
        ((1, 5, 1), r"timestep of shape \[1, 5, 1\]"),
    ],
)
def test_any_other_timestep_is_refused(model: PusaWanTransformer3DModel, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        velocity(model, torch.full(shape, 500.0))


def test_returns_a_dataclass_or_a_tuple(model: PusaWanTransformer3DModel) -> None:
    for timestep in (torch.tensor([500.0]), MULTI_FRAME, per_token(MULTI_FRAME)):
        with torch.no_grad():
            output = model(timestep=timestep, **inputs())
        assert torch.equal(output.sample, velocity(model, timestep))


def test_a_patch_of_two_frames_has_one_time(tiny_transformer: Callable[..., WanTransformer3DModel]) -> None:
    stock = tiny_transformer(patch_size=(2, 2, 2))
    model = PusaWanTransformer3DModel.from_wan(copy.deepcopy(stock))
    x = torch.randn(1, 16, 4, 4, 6, generator=torch.Generator().manual_seed(0))  # 2 frames of 6 tokens
    timestep = torch.tensor([[0.0, 900.0]])
    ours = velocity(model, timestep, hidden_states=x)
    assert ours.shape == x.shape
    assert_same(ours, velocity(stock, per_token(timestep, 6), hidden_states=x))


def test_image_embeddings_of_wan_i2v_models(tiny_transformer: Callable[..., WanTransformer3DModel]) -> None:
    stock = tiny_transformer(image_dim=40, added_kv_proj_dim=96)
    model = PusaWanTransformer3DModel.from_wan(copy.deepcopy(stock))
    text = torch.randn(1, 512, 48, generator=torch.Generator().manual_seed(0))  # the length that stock assumes
    image = torch.randn(1, 257, 40, generator=torch.Generator().manual_seed(1))
    x = {"encoder_hidden_states": text, "encoder_hidden_states_image": image}
    assert_same(velocity(model, MULTI_FRAME, **x), velocity(stock, per_token(MULTI_FRAME), **x))


# ---- promotion, loading and saving ------------------------------------------------------------------------------


def test_promotion_is_in_place_and_copies_nothing(stock: WanTransformer3DModel) -> None:
    promote = PusaWanTransformer3DModel.from_wan
    assert_promoted_in_place(stock, promote, PusaWanTransformer3DModel, PusaWanTransformerBlock)


def test_weights_load_strictly_both_ways(tiny_transformer: Callable[..., WanTransformer3DModel]) -> None:
    stock, other = tiny_transformer(seed=0), tiny_transformer(seed=1)
    model = PusaWanTransformer3DModel.from_wan(tiny_transformer(seed=2))
    model.load_state_dict(stock.state_dict(), strict=True)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(velocity(model, torch.tensor([500.0])), velocity(other, torch.tensor([500.0])))


def test_promotion_refuses_other_objects(model: PusaWanTransformer3DModel) -> None:
    class Sharded(WanTransformer3DModel):
        pass

    wrong = [model.blocks, None, Sharded(num_layers=1, num_attention_heads=1, attention_head_dim=12, ffn_dim=8)]
    for value in wrong:
        with pytest.raises(TypeError, match=f"not {type(value).__name__}"):
            PusaWanTransformer3DModel.from_wan(value)


def hook_root(model: WanTransformer3DModel) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(model, ModelHook())


def hook_block(model: WanTransformer3DModel) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(model.blocks[1], ModelHook())


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda m: m.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"), "carries hooks"),
        (
            lambda m: m.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1),
            "carries hooks",
        ),
        (lambda m: m.enable_cache(FirstBlockCacheConfig()), "carries hooks"),
        (hook_root, "the model already carries hooks"),
        (hook_block, "block 1 already carries hooks"),
        (lambda m: m.compile_repeated_blocks(backend="eager"), "already compiled"),
        (lambda m: m.compile(backend="eager"), "the model is already compiled"),
    ],
    ids=["leaf offload", "block offload", "cache", "accelerate", "accelerate block", "compiled blocks", "compiled"],
)
def test_promotion_refuses_what_would_keep_the_old_forward(
    stock: WanTransformer3DModel, prepare: Callable[[WanTransformer3DModel], None], message: str
) -> None:
    prepare(stock)
    with pytest.raises(ValueError, match=message):
        PusaWanTransformer3DModel.from_wan(stock)
    assert type(stock) is WanTransformer3DModel


def test_loads_stock_folders_and_saves_them(
    stock: WanTransformer3DModel, model: PusaWanTransformer3DModel, tmp_path: Any
) -> None:
    stock.save_pretrained(tmp_path / "stock")
    loaded = PusaWanTransformer3DModel.from_pretrained(tmp_path / "stock")
    assert type(loaded) is PusaWanTransformer3DModel
    expected = velocity(model, MULTI_FRAME)
    assert torch.equal(velocity(loaded, MULTI_FRAME), expected)

    loaded.save_pretrained(tmp_path / "ours")
    assert '"_class_name": "WanTransformer3DModel"' in (tmp_path / "ours/config.json").read_text()
    again = WanTransformer3DModel.from_pretrained(tmp_path / "ours")
    assert type(again) is WanTransformer3DModel
    assert_same(velocity(again, per_token(MULTI_FRAME)), expected)


def test_loads_files_with_original_keys(
    golden: Any, golden_tensors: Callable, golden_json: Callable, tmp_path: Any
) -> None:
    WanTransformer3DModel(**golden_json("transformer/config")["diffusers_config"]).save_config(tmp_path)
    shutil.copy(golden / "transformer/weights_original.safetensors", tmp_path)
    model = PusaWanTransformer3DModel.from_single_file(
        str(tmp_path / "weights_original.safetensors"), config=str(tmp_path)
    )
    assert type(model) is PusaWanTransformer3DModel
    expected = golden_tensors("transformer/weights_diffusers")
    assert model.state_dict().keys() == expected.keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, expected[name]), name


# ---- everything that diffusers does to a Wan transformer ---------------------------------------------------------


def test_lora_scales_at_run_time(model: PusaWanTransformer3DModel) -> None:
    base = velocity(model, MULTI_FRAME)
    add_lora(model)
    strong = velocity(model, MULTI_FRAME)
    assert not torch.allclose(strong, base, atol=1e-3)

    model.set_adapters(["pusa"], [0.0])
    assert torch.equal(velocity(model, MULTI_FRAME), base)

    layer = model.blocks[0].ffn.net[2]
    merged = copy.deepcopy(layer.base_layer)
    model.set_adapters(["pusa"], [1.4])
    merged.weight.data += 1.4 * layer.lora_B["pusa"].weight @ layer.lora_A["pusa"].weight
    x = torch.randn(2, merged.in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), merged(x), rtol=1e-5, atol=1e-5)

    model.set_adapters(["pusa"], [1.0])
    assert torch.equal(velocity(model, MULTI_FRAME), strong)


def test_lora_files_load_and_add_up(model: PusaWanTransformer3DModel, golden_tensors: Callable) -> None:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("attn1.to_q.weight")}
    generator = torch.Generator().manual_seed(0)
    for name, scale in (("pusa", 0.1), ("lightning", 0.2)):
        weights = {}
        for key, (out_features, in_features) in shapes.items():
            stem = "transformer." + key.removesuffix(".weight")
            weights[f"{stem}.lora_A.weight"] = torch.randn(4, in_features, generator=generator) * scale
            weights[f"{stem}.lora_B.weight"] = torch.randn(out_features, 4, generator=generator) * scale
        model.load_lora_adapter(weights, adapter_name=name)
    alone = []
    for name in ("pusa", "lightning"):
        model.set_adapters([name], [1.0])
        alone.append(velocity(model, MULTI_FRAME))
    model.set_adapters(["pusa", "lightning"], [1.0, 1.0])
    both = velocity(model, MULTI_FRAME)
    assert not torch.allclose(both, alone[0])
    assert not torch.allclose(both, alone[1])
    q = model.blocks[0].attn1.to_q
    x = torch.randn(2, q.in_features, generator=generator)
    expected = q.base_layer(x) + sum(q.lora_B[n](q.lora_A[n](x)) for n in ("pusa", "lightning"))
    torch.testing.assert_close(q(x), expected)


@pytest.mark.parametrize(
    "timestep", [torch.tensor([500.0]), MULTI_FRAME, per_token(MULTI_FRAME)], ids=["scalar", "frame", "token"]
)
def test_attention_kwargs_scale_the_adapters_of_one_call(model: PusaWanTransformer3DModel, timestep: Tensor) -> None:
    add_lora(model)
    full = velocity(model, timestep)
    scaled = velocity(model, timestep, attention_kwargs={"scale": 0.5})
    assert torch.equal(velocity(model, timestep), full)  # restored
    model.set_adapters(["pusa"], [0.5])
    assert torch.equal(velocity(model, timestep), scaled)
    assert not torch.equal(full, scaled)


@pytest.mark.parametrize("offload", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}], ids=str)
def test_group_offload(model: PusaWanTransformer3DModel, offload: dict[str, str]) -> None:
    expected = velocity(model, MULTI_FRAME)
    if offload["offload_type"] == "block_level":
        offload = {**offload, "num_blocks_per_group": 1}  # type: ignore[dict-item]
    model.enable_group_offload(torch.device("cpu"), **offload)
    assert hasattr(model.blocks[1], "_diffusers_hook")
    assert torch.equal(velocity(model, MULTI_FRAME), expected)


def test_layerwise_casting_to_fp8(stock: WanTransformer3DModel, model: PusaWanTransformer3DModel) -> None:
    full = velocity(model, MULTI_FRAME)
    for each in (stock, model):
        each.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    rounded = velocity(model, MULTI_FRAME)
    assert_same(rounded, velocity(stock, per_token(MULTI_FRAME)))
    assert not torch.equal(rounded, full)
    assert (rounded - full).norm() < 0.1 * full.norm()


def test_promotion_after_layerwise_casting(stock: WanTransformer3DModel) -> None:
    stock.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    expected = velocity(stock, per_token(MULTI_FRAME))
    assert_same(velocity(PusaWanTransformer3DModel.from_wan(stock), MULTI_FRAME), expected)


def test_gradient_checkpointing_changes_nothing(model: PusaWanTransformer3DModel) -> None:
    def loss_and_gradients() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        loss = model(timestep=MULTI_FRAME, return_dict=False, **inputs())[0].square().mean()
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, gradients = loss_and_gradients()
    calls: list[None] = []
    handle = model.blocks[0].attn1.to_q.register_forward_hook(lambda *_: calls.append(None))
    model.enable_gradient_checkpointing()
    checkpointed_loss, checkpointed = loss_and_gradients()
    handle.remove()
    assert len(calls) == 2  # once forward, once again backward
    assert torch.equal(loss, checkpointed_loss)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, checkpointed[name]), name


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_blocks_run_one_graph_at_all_timesteps(model: PusaWanTransformer3DModel, backend: str) -> None:
    steps = [MULTI_FRAME * scale for scale in (1.0, 0.8, 0.5, 0.1)]
    expected = [velocity(model, timestep) for timestep in steps]
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    for timestep, output in zip(steps, expected, strict=True):
        assert torch.equal(velocity(model, timestep), output)
    assert counters["stats"]["unique_graphs"] == 1  # for all blocks and all steps
    velocity(model, torch.tensor([500.0]))
    assert counters["stats"]["unique_graphs"] == 2  # the scalar path is another
    torch._dynamo.reset()


CACHES = step_caches("blocks") | {"SeaCache": SeaCacheConfig(threshold=10.0)}


@pytest.mark.parametrize("name", CACHES)
def test_caches_skip_work_between_steps(model: PusaWanTransformer3DModel, name: str) -> None:
    assert_cache_skips_work(model, CACHES[name], MULTI_FRAME, velocity)


def test_attention_backends_can_be_chosen(model: PusaWanTransformer3DModel) -> None:
    expected = velocity(model, MULTI_FRAME)
    with attention_backend("native"):  # and back to what it was before: diffusers keeps one for the process, too
        model.set_attention_backend("_native_math")
        torch.testing.assert_close(velocity(model, MULTI_FRAME), expected, rtol=1e-4, atol=1e-5)
