"""Mochi's transformer takes one timestep per latent frame, and stays a stock one in every other respect."""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _golden import Golden, within
from _mochi_checks import CASES, transformer
from _mochi_checks import velocity as recorded_velocity
from diffusers import FirstBlockCacheConfig, MochiTransformer3DModel
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformer_checks import assert_cache_skips_work, assert_promoted_in_place, step_caches

from pusa import PusaMochiTransformer3DModel
from pusa.models.mochi.transformer import PusaMochiTransformerBlock

FRAMES, LENGTH, TEXT_DIM = 5, 7, 32
MULTI_FRAME = torch.tensor([[0.0, 937.5, 300.0, 937.5, 12.25]])  # [1, F]
CONFIG = {
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 3,
    "pooled_projection_dim": 24,
    "text_embed_dim": TEXT_DIM,
}


def make(seed: int = 0, **changes: Any) -> MochiTransformer3DModel:
    torch.manual_seed(seed)
    model = MochiTransformer3DModel(**{**CONFIG, **changes}).eval()
    nn.init.normal_(model.pos_frequencies)  # zeros otherwise, and all positions alike
    return model


@pytest.fixture
def stock() -> MochiTransformer3DModel:
    return make()


@pytest.fixture
def model() -> PusaMochiTransformer3DModel:
    """Make ours, with the weights of `stock`."""
    return PusaMochiTransformer3DModel.from_mochi(make())


@pytest.fixture
def recorded(golden: Path) -> Golden:
    return Golden(golden)


def inputs(batch: int = 1, lengths: list[int] | None = None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Make latents and prompts, of which all or the first `lengths` tokens of each sample are no padding."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(batch, 12, FRAMES, 6, 8, generator=generator)
    text = torch.randn(batch, LENGTH, TEXT_DIM, generator=generator)
    for row, length in enumerate(lengths or []):
        text[row, length:] = 0
    return {"hidden_states": latents.to(dtype), "encoder_hidden_states": text.to(dtype)}


def mask_of(text: Tensor) -> Tensor:
    return text.ne(0).any(-1)


@torch.no_grad()
def velocity(model: nn.Module, timestep: Tensor, **kwargs: Any) -> Tensor:
    return model(timestep=timestep, return_dict=False, **{**inputs(batch=timestep.shape[0]), **kwargs})[0]


@torch.no_grad()
def stock_velocity(model: nn.Module, timestep: Tensor, **kwargs: Any) -> Tensor:
    kwargs = {**inputs(batch=timestep.shape[0]), **kwargs}
    return velocity(model, timestep, encoder_attention_mask=mask_of(kwargs["encoder_hidden_states"]), **kwargs)


def assert_same(ours: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Find them equal but for the order of additions."""
    assert ours.dtype == expected.dtype
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


# ---- the numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_padding_may_be_given_as_a_mask_as_zeros_or_not_at_all(recorded: Golden, case: str) -> None:
    data = recorded.tensors(f"mochi/transformer/case_{case}")
    model, mask = transformer(recorded), data["text_mask"]
    error = recorded.json("mochi/transformer/parity")[case]["perframe_diffusers_vs_ref_maxabs"]
    limit = within(error, data["output"])
    assert (recorded_velocity(model, data) - data["output"]).abs().max() <= limit
    zeros = data["text_features"] * mask.unsqueeze(-1)
    call = {"hidden_states": data["latents"], "timestep": data["timestep"]}
    assert (velocity(model, encoder_hidden_states=zeros, **call) - data["output"]).abs().max() <= limit
    if len(zeros) == 1:
        trimmed = zeros[:, : int(mask.sum())]
        assert (velocity(model, encoder_hidden_states=trimmed, **call) - data["output"]).abs().max() <= limit


def test_every_stage_is_the_originals(recorded: Golden) -> None:
    model = transformer(recorded)
    data = recorded.tensors("mochi/transformer/case_multi_frame")
    expected = recorded.tensors("mochi/transformer/case_multi_frame_activations")
    found: dict[str, Tensor] = {}

    def keep(*names: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found.update(zip(names, output if isinstance(output, tuple) else (output,), strict=True))

        return hook

    model.time_embed.time_proj.register_forward_hook(keep("sinusoid_cos_then_sin"))
    model.time_embed.timestep_embedder.register_forward_hook(keep("time_embedding"))
    model.time_embed.pooler.register_forward_hook(keep("text_pool"))
    model.time_embed.register_forward_hook(keep("conditioning_per_frame", "text_projection"))
    model.rope.register_forward_hook(keep("rope_cos", "rope_sin"))
    model.proj_out.register_forward_hook(keep("final_tokens"))
    for number, block in enumerate(model.transformer_blocks):
        block.norm1.linear.register_forward_hook(keep(f"block_{number}_mod_x"))
        last = block.context_pre_only
        (block.norm1_context.linear_1 if last else block.norm1_context.linear).register_forward_hook(
            keep(f"block_{number}_mod_y")
        )
        block.register_forward_hook(keep(f"block_{number}_out_visual", f"block_{number}_out_text"))
    model.transformer_blocks[0].attn1.register_forward_hook(keep("block_0_attention_visual", "block_0_attention_text"))
    recorded_velocity(model, data)
    compared = 0
    for name, ours in found.items():
        if name not in expected:
            continue
        theirs, ours = expected[name], ours.reshape(expected[name].shape)
        if name.endswith("_text"):  # padded tokens hold anything
            theirs, ours = theirs[:, : int(data["text_mask"].sum())], ours[:, : int(data["text_mask"].sum())]
        assert (ours - theirs).abs().max() <= within(2e-6, theirs), name
        compared += 1
    assert compared >= 20


def test_equal_timesteps_are_stock(stock: MochiTransformer3DModel, model: PusaMochiTransformer3DModel) -> None:
    expected = stock_velocity(stock, torch.tensor([700.0]))
    assert_same(velocity(model, torch.tensor([700.0])), expected)
    assert_same(velocity(model, torch.full((1, FRAMES), 700.0)), expected)
    uneven = inputs(2, [3, LENGTH])
    expected = stock_velocity(stock, torch.tensor([700.0, 20.5]), **uneven)
    assert_same(velocity(model, torch.tensor([700.0, 20.5]), **uneven), expected)
    assert_same(velocity(model, torch.tensor([[700.0], [20.5]]).expand(2, FRAMES), **uneven), expected)


def test_bf16_is_as_near_to_fp32_as_stock(model: PusaMochiTransformer3DModel, stock: MochiTransformer3DModel) -> None:
    exact = velocity(model, torch.full((1, FRAMES), 701.5))
    ours = velocity(model.bfloat16(), torch.full((1, FRAMES), 701.5), **inputs(dtype=torch.bfloat16))
    theirs = stock_velocity(stock.bfloat16(), torch.tensor([701.5]), **inputs(dtype=torch.bfloat16))
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()
    assert (ours - exact).norm() < 0.02 * exact.norm()


def test_each_frame_follows_its_timestep_and_each_sample_its_own(model: PusaMochiTransformer3DModel) -> None:
    changed = MULTI_FRAME.clone()
    changed[0, 2] = 800.0
    difference = (velocity(model, changed) - velocity(model, MULTI_FRAME)).abs().amax(dim=(0, 1, 3, 4))  # [F]
    assert difference.argmax() == 2
    assert (difference > 0).all()  # the others see it through attention, and through the text
    timestep, uneven = torch.cat([MULTI_FRAME, changed]), inputs(2, [LENGTH, 3])
    together = velocity(model, timestep, **uneven)
    for row in (0, 1):
        alone = {name: tensor[row : row + 1] for name, tensor in uneven.items()}
        assert_same(velocity(model, timestep[row : row + 1], **alone)[0], together[row])


def test_padding_is_found_again_when_a_prompt_has_changed(model: PusaMochiTransformer3DModel) -> None:
    text = inputs()["encoder_hidden_states"]
    full = velocity(model, MULTI_FRAME, encoder_hidden_states=text)
    text[:, 3:] = 0
    expected = velocity(model, MULTI_FRAME, encoder_hidden_states=text[:, :3].clone())
    assert_same(velocity(model, MULTI_FRAME, encoder_hidden_states=text), expected)
    assert not torch.allclose(full, expected)
    with torch.inference_mode():
        assert_same(velocity(model, MULTI_FRAME, encoder_hidden_states=text.clone()), expected)


def test_a_model_that_has_run_can_be_copied_and_sent(model: PusaMochiTransformer3DModel) -> None:
    text = inputs(1, [3])["encoder_hidden_states"]
    expected = velocity(model, MULTI_FRAME, encoder_hidden_states=text)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(velocity(other, MULTI_FRAME, encoder_hidden_states=text), expected)


def test_an_empty_prompt_takes_no_part(model: PusaMochiTransformer3DModel) -> None:
    none = velocity(model, MULTI_FRAME, encoder_hidden_states=torch.zeros(1, 0, TEXT_DIM))
    assert none.isfinite().all()
    assert_same(velocity(model, MULTI_FRAME, encoder_hidden_states=torch.zeros(1, LENGTH, TEXT_DIM)), none)


@pytest.mark.parametrize("shape", [(1, 4), (1, 60), (1, 5, 1), ()])
def test_any_other_timestep_is_refused(model: PusaMochiTransformer3DModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"timestep of shape .* per sample \[B\], or per latent frame \[B, 5\]"):
        model(**inputs(), timestep=torch.full(shape, 500.0))


# ---- promotion, loading and saving ------------------------------------------------------------------------------


def test_promotion_is_in_place_and_copies_nothing(stock: MochiTransformer3DModel) -> None:
    promote = PusaMochiTransformer3DModel.from_mochi
    assert_promoted_in_place(stock, promote, PusaMochiTransformer3DModel, PusaMochiTransformerBlock)
    make(seed=1).load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(make(seed=1).state_dict(), strict=True)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda m: m.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"), "carries hooks"),
        (lambda m: m.enable_cache(FirstBlockCacheConfig()), "carries hooks"),
        (lambda m: m.transformer_blocks[1].compile(backend="eager"), "block 1 is already compiled"),
    ],
    ids=["offload", "cache", "compiled"],
)
def test_promotion_refuses_what_would_keep_the_old_forward(
    stock: MochiTransformer3DModel, prepare: Callable[[MochiTransformer3DModel], None], message: str
) -> None:
    prepare(stock)
    with pytest.raises(ValueError, match=message):
        PusaMochiTransformer3DModel.from_mochi(stock)
    assert type(stock) is MochiTransformer3DModel
    with pytest.raises(TypeError, match="from_mochi takes a diffusers MochiTransformer3DModel, not ModuleList"):
        PusaMochiTransformer3DModel.from_mochi(stock.transformer_blocks)


def test_loads_stock_folders_and_saves_them(stock: MochiTransformer3DModel, tmp_path: Path) -> None:
    stock.save_pretrained(tmp_path / "stock")
    model = PusaMochiTransformer3DModel.from_pretrained(tmp_path / "stock")
    assert type(model) is PusaMochiTransformer3DModel
    model.save_pretrained(tmp_path / "ours")
    again = MochiTransformer3DModel.from_pretrained(tmp_path / "ours")
    assert type(again) is MochiTransformer3DModel
    assert torch.equal(stock_velocity(again, torch.tensor([9.0])), stock_velocity(stock, torch.tensor([9.0])))


# ---- everything that diffusers does to a transformer --------------------------------------------------------------


def test_lora_adapters_and_their_scale_in_one_call(model: PusaMochiTransformer3DModel) -> None:
    base = velocity(model, MULTI_FRAME)
    targets = ["to_q", "add_k_proj", "ff.net.2", "norm1.linear"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets), "pusa")
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if ".lora_B.pusa." in key:  # starts as zeros, which would test nothing
            parameter.data.normal_(std=0.1, generator=generator)
    strong = velocity(model, MULTI_FRAME)
    assert not torch.allclose(strong, base, atol=1e-3)
    halved = velocity(model, MULTI_FRAME, attention_kwargs={"scale": 0.5})
    model.set_adapters(["pusa"], [0.5])
    assert torch.equal(velocity(model, MULTI_FRAME), halved)
    model.set_adapters(["pusa"], [0.0])
    assert torch.equal(velocity(model, MULTI_FRAME), base)


def test_attention_backends_can_be_chosen(model: PusaMochiTransformer3DModel) -> None:
    padded = inputs(1, [3])
    expected, padded_expected = velocity(model, MULTI_FRAME), velocity(model, MULTI_FRAME, **padded)
    with attention_backend("native"):  # and back to what it was before: diffusers keeps one for the process, too
        model.set_attention_backend("_native_math")
        assert model.blocks[0].attn1.processor._attention_backend == "_native_math"
        assert_same(velocity(model, MULTI_FRAME), expected, tolerance=1e-5)
        model.set_attention_backend("_native_flash")  # takes no mask: padded prompts go another way
        assert_same(velocity(model, MULTI_FRAME, **padded), padded_expected)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(model: PusaMochiTransformer3DModel, kind: str) -> None:
    expected = velocity(model, MULTI_FRAME)
    size = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(torch.device("cpu"), offload_type=kind, **size)
    assert torch.equal(velocity(model, MULTI_FRAME), expected)


def test_layerwise_casting_to_fp8(model: PusaMochiTransformer3DModel) -> None:
    full = velocity(model, MULTI_FRAME)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    rounded = velocity(model, MULTI_FRAME)
    assert 0 < (rounded - full).norm() < 0.1 * full.norm()


def test_gradient_checkpointing_changes_nothing(model: PusaMochiTransformer3DModel) -> None:
    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(timestep=MULTI_FRAME, return_dict=False, **inputs())[0].square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.enable_gradient_checkpointing()
    checkpointed = gradients()
    assert plain.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(gradient, checkpointed[name]) for name, gradient in plain.items())


CACHES = step_caches("transformer_blocks")


@pytest.mark.parametrize("name", CACHES)
def test_caches_skip_work_between_steps(model: PusaMochiTransformer3DModel, name: str) -> None:
    assert_cache_skips_work(model, CACHES[name], MULTI_FRAME, velocity)


@pytest.fixture
def no_graph_breaks() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    assert not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.usefixtures("no_graph_breaks")
def test_compiled_blocks_have_a_graph_for_all_steps_and_one_for_the_last_block(
    model: PusaMochiTransformer3DModel,
) -> None:
    steps = [MULTI_FRAME * scale for scale in (1.0, 0.8, 0.1)]
    expected = [velocity(model, timestep) for timestep in steps]
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    for timestep, output in zip(steps, expected, strict=True):
        assert torch.equal(velocity(model, timestep), output)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.usefixtures("no_graph_breaks")
def test_compiled_blocks_never_read_a_value(model: PusaMochiTransformer3DModel) -> None:
    model.to("meta").compile_repeated_blocks(fullgraph=True, backend="eager")
    x = {name: tensor.to("meta") for name, tensor in inputs(2, [3, LENGTH]).items()}
    times = MULTI_FRAME.expand(2, -1).to("meta")
    assert velocity(model, times, **x).is_meta
    assert velocity(model, times, encoder_attention_mask=torch.ones(2, LENGTH, device="meta"), **x).is_meta


def test_every_frame_is_computed_and_it_says_why(model: PusaMochiTransformer3DModel) -> None:
    assert "text tokens attend to all frames" in model.frame_obstacle
