"""The pipeline as a user of diffusers meets it, and the promises on conditions, resuming and decoding."""

import json
import logging
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from diffusers.callbacks import PipelineCallback
from PIL import Image

from pusa.conditions import PusaCondition
from pusa.models.vae import DecodeMemoryError
from pusa.models.wan import PusaWanTransformer3DModel
from pusa.pipeline import PusaPipeline
from pusa.scheduler import PusaFlowMatchEulerScheduler, wave_sigmas

CLIP = {"height": 32, "width": 48, "num_frames": 17, "num_inference_steps": 3, "max_sequence_length": 16}
SHAPE = (1, 16, 5, 4, 6)


@pytest.fixture(scope="module")
def pipe(tiny_pipeline) -> PusaPipeline:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: PusaPipeline, prompt: Any = "a cat", *, seed: int = 0, **changes: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, **{"output_type": "latent", **CLIP, **changes}).frames


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 48, 3), np.uint8))


def count_calls(pipe: PusaPipeline, monkeypatch: pytest.MonkeyPatch, name: str = "transformer") -> list[torch.Tensor]:
    """The timesteps of every forward pass from now on."""
    calls: list[torch.Tensor] = []
    model = getattr(pipe, name)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kw: calls.append(kw["timestep"]) or forward(**kw))
    return calls


def test_equal_timesteps_are_the_stock_pipeline(pipe):
    noise = torch.randn(SHAPE)
    stock = WanPipeline(**pipe.components)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    ours = call(pipe, latents=noise)
    sigmas = pipe.scheduler.sigmas[:-1].tolist()
    set_timesteps = stock.scheduler.set_timesteps
    stock.scheduler.set_timesteps = lambda n, device: set_timesteps(sigmas=sigmas, device=device)
    theirs = stock("a cat", latents=noise, guidance_scale=3.0, output_type="latent", **CLIP).frames
    assert (ours - theirs).abs().max() <= 1e-5 * (theirs.max() - theirs.min())


def test_noise_multiplier_0_keeps_latents_to_the_bit(pipe):
    z = torch.randn(16, 2, 4, 6)
    out = call(pipe, conditions=[PusaCondition(latents=z, latent_index=[0, 3])])
    assert torch.equal(out[0][:, [0, 3]], z)


def test_a_noisy_condition_is_between_kept_and_free(pipe):
    z = torch.randn(16, 1, 4, 6)

    def distance(m: float) -> float:
        out = call(pipe, conditions=[PusaCondition(latents=z, noise_multiplier=m)])
        return float((out[0][:, :1] - z).norm())

    kept, noisy, free = distance(0.0), distance(0.2), distance(1.0)
    assert kept == 0 < noisy < free
    assert torch.equal(call(pipe, conditions=[PusaCondition(latents=z, noise_multiplier=1.0)]), call(pipe))


def test_the_model_gets_a_timestep_for_each_frame(pipe, monkeypatch):
    calls = count_calls(pipe, monkeypatch)
    call(
        pipe, conditions=[PusaCondition(image=picture(), latent_index="last", noise_multiplier=0.5)], guidance_scale=1.0
    )
    base = pipe.scheduler.timesteps
    expected = torch.stack([base, base, base, base, 0.5 * base], 1)
    torch.testing.assert_close(torch.cat(calls), expected)


def test_guidance_1_makes_one_pass_a_step(pipe, monkeypatch):
    calls = count_calls(pipe, monkeypatch)
    call(pipe, guidance_scale=1.0)
    assert len(calls) == 3
    call(pipe, guidance_scale=3.0)
    assert len(calls) == 9


def test_a_negative_prompt_steers(pipe):
    assert not torch.equal(call(pipe), call(pipe, negative_prompt="a dog"))
    assert torch.equal(call(pipe, guidance_scale=1.0), call(pipe, guidance_scale=1.0, negative_prompt="a dog"))


def test_batches_equal_single_calls(pipe):
    prompts = ["a cat", "a dog"]
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    condition = PusaCondition(image=picture())
    together = pipe(prompts, conditions=[condition], generator=generators, output_type="latent", **CLIP).frames
    for row, (prompt, seed) in enumerate(zip(prompts, (0, 1), strict=True)):
        alone = call(pipe, prompt, seed=seed, conditions=[condition])
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=2e-5)


def test_every_prompt_may_have_different_conditions(pipe):
    a, b = torch.randn(2, 16, 1, 4, 6)
    out = call(
        pipe,
        ["a cat", "a dog"],
        conditions=[[PusaCondition(latents=a)], [PusaCondition(latents=b, latent_index=4)]],
        num_videos_per_prompt=2,
    )
    assert out.shape == (4, *SHAPE[1:])
    assert torch.equal(out[0][:, :1], a)
    assert torch.equal(out[1][:, :1], a)
    assert torch.equal(out[2][:, 4:], b)
    with pytest.raises(ValueError, match="1 lists of conditions for 2 prompts"):
        call(pipe, ["a cat", "a dog"], conditions=[[PusaCondition(latents=a)]])


def test_embeddings_give_the_same_video_as_their_prompt(pipe):
    with torch.no_grad():
        positive, negative = pipe.encode_prompt("a cat", "", max_sequence_length=16)
    given = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    assert torch.equal(call(pipe, None, **given), call(pipe))
    assert torch.equal(call(pipe, None, num_videos_per_prompt=2, **given), call(pipe, num_videos_per_prompt=2))


@pytest.mark.parametrize("reached", [1, 2, 3])
def test_denoising_goes_on_from_saved_latents_to_the_same_bit(pipe, reached):
    saved: dict[int, torch.Tensor] = {}

    def save(_: Any, step: int, __: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        saved[step + 1] = tensors["latents"].clone()
        return {}

    conditions = [PusaCondition(image=picture(), noise_multiplier=0.2)]
    whole = call(pipe, conditions=conditions, callback_on_step_end=save)
    assert torch.equal(call(pipe, conditions=conditions, latents=saved[reached], start_step=reached), whole)


def test_interrupt_ends_between_steps(pipe, monkeypatch):
    calls = count_calls(pipe, monkeypatch)

    def stop(pipeline: PusaPipeline, step: int, *_: Any) -> dict[str, Any]:
        pipeline._interrupt = step == 1
        return {}

    call(pipe, guidance_scale=1.0, callback_on_step_end=stop)
    assert len(calls) == 2


def test_a_callback_sees_and_changes_latents_and_sees_what_is_expected(pipe):
    denoised: list[torch.Tensor] = []

    def zero(_: Any, __: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert timestep.ndim == 0
        denoised.append(tensors["denoised"])
        return {"latents": torch.zeros_like(tensors["latents"])} if len(denoised) == 3 else {}

    inputs = ["latents", "denoised"]
    out = call(pipe, callback_on_step_end=zero, callback_on_step_end_tensor_inputs=inputs)
    assert out.abs().max() == 0
    torch.testing.assert_close(denoised[-1], call(pipe), rtol=0, atol=1e-5)  # the last step walks down to sigma 0


def test_a_callback_may_return_every_tensor_it_received(pipe):
    given = []

    def callback(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        given.append(sorted(tensors))
        return tensors

    inputs = ["latents", "denoised", "prompt_embeds", "negative_prompt_embeds"]
    out = call(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs)
    assert torch.equal(out, call(pipe))
    assert given == [sorted(inputs)] * 3


def test_callbacks_of_diffusers_work(pipe, monkeypatch):
    class NoGuidanceFromStep2(PipelineCallback):
        tensor_inputs: ClassVar[list[str]] = ["latents"]

        def callback_fn(self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                pipeline._guidance_scale = 0.0
            return tensors

    calls = count_calls(pipe, monkeypatch)
    call(pipe, callback_on_step_end=NoGuidanceFromStep2(cutoff_step_index=1, cutoff_step_ratio=None))
    assert len(calls) == 2 + 2 + 1


def test_a_wave_finishes_early_frames_while_later_ones_are_noise(pipe):
    table = wave_sigmas(5, 3, delay=2)
    finished: dict[int, torch.Tensor] = {}

    def watch(p: PusaPipeline, step: int, _: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        count = p.scheduler.finished_frames(step)
        if count:
            finished.setdefault(count, tensors["latents"][:, :, :count].clone())
        return {}

    out = call(pipe, frame_sigmas=table, callback_on_step_end=watch)
    assert sorted(finished) == [1, 2, 3, 4, 5]
    for count, latents in finished.items():
        assert torch.equal(latents, out[:, :, :count])  # decodable long before the end
    with pytest.raises(ValueError, match="frame_sigmas has 4 latent frames, this video has 5"):
        call(pipe, frame_sigmas=wave_sigmas(4, 3))


def test_wan22_changes_experts_by_the_base_noise_level(tiny_pipeline, monkeypatch):
    pipe = tiny_pipeline(experts=2)
    pipe.set_progress_bar_config(disable=True)
    high, low = (count_calls(pipe, monkeypatch, name) for name in ("transformer", "transformer_2"))
    z = torch.randn(16, 1, 4, 6)
    out = call(pipe, num_inference_steps=10, guidance_scale=1.0, conditions=[PusaCondition(latents=z)])
    assert (len(high), len(low)) == (5, 5)  # Pusa's shift 5 and boundary 0.875; the kept frame's 0 does not count
    assert torch.equal(out[0][:, :1], z)
    strong = call(pipe, num_inference_steps=10, guidance_scale=3.0, guidance_scale_2=1.5)
    assert not torch.equal(strong, call(pipe, num_inference_steps=10, guidance_scale=3.0))


def test_a_wave_across_the_boundary_of_two_experts_is_refused(tiny_pipeline):
    pipe = tiny_pipeline(experts=2)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="both sides of the boundary"):
        call(pipe, frame_sigmas=wave_sigmas(5, 4, delay=1))
    assert call(pipe, frame_sigmas=wave_sigmas(5, 4, delay=0)).shape == SHAPE


def test_each_expert_has_a_guidance_scale(tiny_pipeline, monkeypatch):
    pipe = tiny_pipeline(experts=2)
    pipe.set_progress_bar_config(disable=True)
    high, low = (count_calls(pipe, monkeypatch, name) for name in ("transformer", "transformer_2"))
    call(pipe, num_inference_steps=10, guidance_scale=1.0, guidance_scale_2=3.0)
    assert (len(high), len(low)) == (5, 10)
    call(pipe, num_inference_steps=10, guidance_scale=3.0, guidance_scale_2=1.0)
    assert (len(high), len(low)) == (15, 15)


def test_guidance_is_for_a_range_of_the_steps(pipe, monkeypatch):
    calls = count_calls(pipe, monkeypatch)
    plain = call(pipe, num_inference_steps=4, guidance_scale=3.0)
    assert len(calls) == 8
    assert torch.equal(plain, call(pipe, num_inference_steps=4, guidance_scale=3.0, guidance_start=0, guidance_stop=1))
    for (start, stop), passes in {(0, 0.25): 5, (0.25, 0.5): 5, (0.5, 1): 6, (0.5, 0.5): 4, (0, 0.3): 5}.items():
        calls.clear()
        part = call(pipe, num_inference_steps=4, guidance_scale=3.0, guidance_start=start, guidance_stop=stop)
        assert len(calls) == passes
        assert not torch.equal(part, plain)
    never = call(pipe, num_inference_steps=4, guidance_scale=3.0, guidance_stop=0)
    assert torch.equal(never, call(pipe, num_inference_steps=4, guidance_scale=1.0))
    with pytest.raises(ValueError, match=r"guidance_start=0\.5 and guidance_stop=0\.2 are no range"):
        call(pipe, guidance_start=0.5, guidance_stop=0.2)


def test_output_types(pipe):
    array = call(pipe, output_type="np")
    assert array.shape == (1, 17, 32, 48, 3)
    assert array.min() >= 0
    assert array.max() <= 1
    tensor = call(pipe, output_type="pt")
    assert tensor.shape == (1, 17, 3, 32, 48)
    np.testing.assert_allclose(tensor.permute(0, 1, 3, 4, 2).numpy(), array, atol=1e-6)
    (images,) = call(pipe, output_type="pil")
    assert len(images) == 17
    assert images[0].size == (48, 32)
    assert call(pipe).shape == SHAPE
    with pytest.raises(ValueError, match="output_type='mp4' is none of"):
        call(pipe, output_type="mp4")


def test_streamed_frames_equal_those_decoded_at_once(pipe):
    latents = call(pipe)
    chunks = list(pipe.decode_stream(latents))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4, 4, 4]
    frames = (torch.cat(chunks, 2)[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1).numpy()
    assert np.array_equal(frames, pipe.decode(latents)[0])


def test_latents_survive_when_decoding_runs_out_of_memory(pipe, monkeypatch):
    def out_of_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    expected = call(pipe)
    with monkeypatch.context() as patch:
        patch.setattr(pipe.vae.decoder, "forward", out_of_memory)
        with pytest.raises(DecodeMemoryError) as error:
            call(pipe, output_type="np")
    assert torch.equal(error.value.latents, expected)
    assert pipe.decode(error.value.latents).shape == (1, 17, 32, 48, 3)


@pytest.mark.parametrize(
    ("asked", "shape", "said"),
    [
        ({"num_frames": 16}, (1, 16, 5, 4, 6), "num_frames=16 becomes 17: it must be 4n + 1"),
        ({"num_frames": 18}, (1, 16, 5, 4, 6), "num_frames=18 becomes 17"),
        ({"num_frames": 2}, (1, 16, 1, 4, 6), "num_frames=2 becomes 1"),
        ({"height": 39, "width": 41}, (1, 16, 5, 4, 6), "height=39 becomes 32: it must be a multiple of 16"),
        ({"height": 3}, (1, 16, 5, 2, 6), "height=3 becomes 16"),
    ],
)
def test_sizes_are_rounded_with_a_warning(pipe, asked, shape, said, caplog):
    with caplog.at_level(logging.WARNING, logger="pusa"):
        assert call(pipe, **asked).shape == shape
    assert said in caplog.text


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_frames": 0}, "num_frames=0 is below 1"),
        (
            {"latents": torch.zeros(1, 16, 4, 4, 6)},
            "latents of shape [1, 16, 4, 4, 6]: this call needs [1, 16, 5, 4, 6]",
        ),
        ({"start_step": 1}, "start_step=1 needs the latents"),
        ({"start_step": 4, "latents": torch.zeros(SHAPE)}, "start_step=4 is outside 0..3"),
        ({"guidance_scale_2": 2.0}, "guidance_scale_2"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt=0 is below 1"),
        ({"frame_sigmas": torch.ones(4, 3, 5)}, "frame_sigmas is for 3 videos, this call makes 1"),
        ({"frame_sigmas": wave_sigmas(5, 4, delay=0)[1:]}, "starts below 1 where nothing is known"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 is below 1"),
        ({"conditions": [PusaCondition(image=picture(), latent_index=5)]}, "latent_index=5: this video has 5"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(pipe, asked, message):
    with pytest.raises(ValueError) as error:
        call(pipe, **asked)
    assert message in str(error.value)


def test_stock_components_are_promoted_in_place(tiny_transformer, tiny_vae, tiny_text_encoder, tiny_tokenizer):
    transformer = tiny_transformer()
    parts = {"tokenizer": tiny_tokenizer(), "text_encoder": tiny_text_encoder(), "vae": tiny_vae()}
    pipe = PusaPipeline(**parts, transformer=transformer, scheduler=UniPCMultistepScheduler(flow_shift=3.0))
    assert pipe.transformer is transformer
    assert isinstance(transformer, PusaWanTransformer3DModel)
    assert isinstance(pipe.scheduler, PusaFlowMatchEulerScheduler)
    assert pipe.scheduler.config.shift == 5.0  # the original's, whatever UniPC used
    kept = PusaPipeline(**parts, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0))
    assert kept.scheduler.config.shift == 7.0


def test_a_saved_folder_loads_here_and_in_plain_diffusers(pipe, tmp_path):
    expected = call(pipe)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "WanPipeline"
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    again = PusaPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.scheduler.config.shift == pipe.scheduler.config.shift
    assert torch.equal(call(again), expected)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is WanPipeline


def test_from_pipe_takes_over_the_parts_of_a_stock_pipeline(pipe, tiny_transformer):
    stock = WanPipeline(**{**pipe.components, "transformer": tiny_transformer()})
    ours = PusaPipeline.from_pipe(stock)
    assert ours.transformer is stock.transformer
    assert isinstance(ours.transformer, PusaWanTransformer3DModel)
    assert PusaPipeline.from_pipe(ours).transformer is ours.transformer
