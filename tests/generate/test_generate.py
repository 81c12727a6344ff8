"""Every task from files to a file, with the random-weight model: right size, length and rate, kept frames, replay."""

import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d, WanEncoder3d
from media_samples import psnr
from memory_faults import run_out_of_memory
from PIL import Image
from small_models import make_smaller

from pusa import loading, media, zoo
from pusa.conditions import fit_image, pixels
from pusa.events import Event, Stage, Step
from pusa.generate import decode, generate, load_latents, read_request, save_latents
from pusa.generate.output import output_frames
from pusa.generate.tasks import OutputPlan
from pusa.models import vae as vae_module
from pusa.pipeline import PusaPipeline
from pusa.request import GenerationRequest
from pusa.scheduler import PusaFlowMatchEulerScheduler

FRAMES, WIDTH, HEIGHT = 17, 48, 32  # the defaults of "tiny" here


@pytest.fixture(autouse=True)
def _small_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    make_smaller(monkeypatch, "tiny", width=WIDTH, height=HEIGHT)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Three pictures and two short videos of a user."""
    rng = np.random.default_rng(0)
    found = {}
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(rng.integers(0, 256, (80, 120, 3), np.uint8)).save(tmp_path / name)
        found[name[0]] = str(tmp_path / name)
    for name, frames in (("one.mp4", 24), ("two.mp4", 20)):
        ramp = np.linspace(0, 255, WIDTH, dtype=np.uint8)
        video = np.stack(
            [np.broadcast_to(np.roll(ramp, 2 * i)[None, :, None], (HEIGHT, WIDTH, 3)) for i in range(frames)]
        )
        with media.VideoWriter(tmp_path / name, width=WIDTH, height=HEIGHT) as writer:
            writer.write(np.ascontiguousarray(video))
        found[name[:3]] = str(tmp_path / name)
    return found


def run(output: Path, **asked: Any) -> list[Event]:
    options = {
        key: asked.pop(key)
        for key in ("stop", "pipeline", "carried", "preview_every", "preview_decoder")
        if key in asked
    }
    request = GenerationRequest(**{"model": "tiny", "prompt": "a cat", "seed": 0, "steps": 2, **asked})
    events = list(generate(request, output, **options))
    assert events[-1].kind == "done"
    assert events[-1].path == output
    return events


def frames_of(path: Path) -> np.ndarray:
    return media.read_video(path)


def image(file: str, position: str | int = 0, noise: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"kind": "image", "file": file, "positions": [position], "noise": [noise], **more}


def video(file: str, **more: Any) -> dict[str, Any]:
    return {"kind": "video", "file": file, "noise": [0.0], **more}


# ---- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "frames"),
    [
        ({}, 17),
        ({"conditions": ["a"]}, 17),
        ({"conditions": ["a", "b:last"]}, 17),
        ({"conditions": ["a", "b:0.5s", "c:last"]}, 17),
        ({"conditions": ["one"]}, 17),
        ({"task": "extend", "conditions": ["one"]}, 24 + 17 - 5),
        ({"task": "transition", "conditions": ["one", "two"]}, 24 + (17 - 5 - 8) + 20),
        ({"task": "loop"}, 17),
        ({"frames": 49}, 49),
        ({"task": "extend", "conditions": ["one"], "frames": 33}, 24 + 33 - 5),
        ({"frames": 5, "width": 64, "height": 48, "fps": 24.0}, 5),
    ],
)
def test_each_task_makes_a_video_of_the_right_size_length_and_rate(asked, frames, files, tmp_path):
    conditions = []
    for text in asked.pop("conditions", []):
        name, _, position = text.partition(":")
        conditions.append(image(files[name], position or 0) if len(name) == 1 else video(files[name]))
    run(tmp_path / "out.mp4", conditions=conditions, **asked)
    info = media.probe_video(tmp_path / "out.mp4")
    assert (info.width, info.height) == (asked.get("width", WIDTH), asked.get("height", HEIGHT))
    assert info.frames == frames == len(frames_of(tmp_path / "out.mp4"))
    assert info.fps == asked.get("fps", 16.0)


def test_a_kept_first_frame_is_the_reconstruction_of_the_vae(files, tmp_path):
    pipe = PusaPipeline.from_pretrained("tiny")
    run(tmp_path / "out.png", frames=1, conditions=[image(files["a"])])
    given = fit_image(Image.open(files["a"]), WIDTH, HEIGHT)
    own = media.to_uint8(vae_module.decode_video(pipe.vae, pipe.encode_frames(pixels([given]))))[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), own)


def test_extension_and_transition_show_the_input_videos_unchanged(files, tmp_path):
    one, two = frames_of(Path(files["one"])), frames_of(Path(files["two"]))
    run(tmp_path / "longer.mp4", task="extend", conditions=[video(files["one"])])
    assert psnr(frames_of(tmp_path / "longer.mp4")[:24], one) > 40
    run(tmp_path / "joined.mp4", task="transition", conditions=[video(files["one"]), video(files["two"])])
    joined = frames_of(tmp_path / "joined.mp4")
    assert psnr(joined[:24], one) > 40
    assert psnr(joined[-20:], two) > 40


def test_an_upright_picture_makes_an_upright_video_and_an_explicit_size_wins(files, tmp_path):
    Image.new("RGB", (40, 90), "red").save(tmp_path / "tall.png")
    run(tmp_path / "tall.mp4", conditions=[image(str(tmp_path / "tall.png"))])
    info = media.probe_video(tmp_path / "tall.mp4")
    assert (info.width, info.height) == (HEIGHT, WIDTH)
    run(tmp_path / "wide.mp4", conditions=[image(str(tmp_path / "tall.png"))], width=96, height=48)
    info = media.probe_video(tmp_path / "wide.mp4")
    assert (info.width, info.height) == (96, 48)


def test_kept_frames_of_real_media_are_the_reconstruction_of_the_vae(inputs, tmp_path):
    pipe = PusaPipeline.from_pretrained("tiny")

    def own(frames: list[Any]) -> np.ndarray:
        fitted = [fit_image(frame, WIDTH, HEIGHT) for frame in frames]
        return media.to_uint8(vae_module.decode_video(pipe.vae, pipe.encode_frames(pixels(fitted))))

    def shown(folder: Path, count: int) -> np.ndarray:
        return np.stack([np.asarray(Image.open(folder / f"{i:04d}.png")) for i in range(count)])

    run(tmp_path / "image", conditions=[image(str(inputs / "input_image.jpg"))])
    assert np.array_equal(shown(tmp_path / "image", 1), own([media.read_image(inputs / "input_image.jpg")]))
    run(tmp_path / "video", conditions=[video(str(inputs / "input_video.mp4"), positions=[0, 1, 2, 3])])
    first = media.read_video(inputs / "input_video.mp4", fps=16, fit=(WIDTH, HEIGHT), max_frames=13)
    assert np.array_equal(shown(tmp_path / "video", 13), own(list(first)))


@pytest.mark.slow
def test_every_task_on_real_pictures_and_a_real_video(inputs, tmp_path):
    start, end, clip = (str(inputs / name) for name in ("start_frame.jpg", "end_frame.jpg", "input_video.mp4"))
    whole = len(media.read_video(Path(clip), fps=16, fit=(WIDTH, HEIGHT)))
    tasks: list[tuple[dict[str, Any], int]] = [
        ({"conditions": [image(str(inputs / "input_image.jpg"))]}, 17),
        ({"conditions": [image(start), image(end, "last", 0.5)]}, 17),
        ({"conditions": [video(clip, positions=[0, 1, 2, 3], noise=[0.0, 0.3, 0.4, 0.5])]}, 17),
        ({"task": "extend", "conditions": [video(clip)]}, whole + 12),
        ({"task": "transition", "conditions": [video(clip), video(clip)]}, 2 * whole + 4),
    ]
    for number, (asked, frames) in enumerate(tasks):
        output = tmp_path / f"{number}.mp4"
        run(output, **asked)
        info = media.probe_video(output)
        assert (info.width, info.height, info.fps, info.frames) == (WIDTH, HEIGHT, 16.0, frames)


def test_differences_at_joints_fade_out_instead_of_jumping():
    def grey(*values: int) -> list[np.ndarray]:
        return [np.full((2, 2, 3), value, np.uint8) for value in values]

    def shown(plan: OutputPlan, *decoded: int) -> list[int]:
        return [int(frame[0, 0, 0, 0]) for frame in output_frames(plan, [np.stack(grey(*decoded))])]

    extension = shown(OutputPlan([], before=grey(100, 100), skip=2), 10, 10, *[10] * 12)
    assert extension == [100, 100, 90, 80, 70, 60, 50, 40, 30, 20, 10, 10, 10, 10]
    transition = shown(OutputPlan([], before=grey(10), skip=1, drop=2, after=grey(100, 101)), 10, *[10] * 10, 10, 10)
    assert transition == [10, 10, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 101]
    loop = shown(OutputPlan([], drop=2), 100, *[10] * 10, 10, 10)
    assert loop == [100, 10, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert shown(OutputPlan([]), 1, 2, 3) == [1, 2, 3]


# ---- the same again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["image", "extend", "loop", "long"])
def test_a_video_is_made_again_from_itself(task, files, tmp_path):
    asked: dict[str, Any] = {
        "image": {"conditions": [image(files["a"], noise=0.2)], "preset": "creative"},
        "extend": {"task": "extend", "conditions": [video(files["one"])]},
        "loop": {"task": "loop"},
        "long": {"frames": 33},
    }[task]
    first, again = tmp_path / "first.mp4", tmp_path / "again.mp4"
    run(first, **{**asked, "seed": None})
    for file in files.values():
        Path(file).unlink()  # small inputs travel inside
    request, carried = read_request(media.read_metadata(first))
    list(generate(request, again, carried=carried))
    assert np.array_equal(frames_of(first), frames_of(again))


def test_the_stored_request_is_complete_and_names_no_folder(files, tmp_path):
    run(tmp_path / "out.mp4", conditions=[image(files["a"])], seed=None)
    request, _ = read_request(media.read_metadata(tmp_path / "out.mp4"))
    assert request.seed is not None
    assert (request.width, request.height, request.frames, request.steps) == (WIDTH, HEIGHT, FRAMES, 2)
    assert request.conditions[0].file == "a.png"
    assert len(request.conditions[0].sha256 or "") == 64


def test_a_missing_or_changed_input_is_named(files, tmp_path, monkeypatch):
    monkeypatch.setattr("pusa.generate.inputs.MAX_EMBEDDED_BYTES", 0)
    run(tmp_path / "out.mp4", conditions=[image(files["a"])])
    request, carried = read_request(media.read_metadata(tmp_path / "out.mp4"))
    assert carried == {}
    monkeypatch.chdir(tmp_path)
    shutil.copy(files["b"], "a.png")
    with pytest.raises(ValueError, match=r"a\.png has changed: the video was made from a file with sha256"):
        list(generate(request, tmp_path / "again.mp4"))
    Path("a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png is not here: this image is needed"):
        list(generate(request, tmp_path / "again.mp4"))


def test_a_video_that_is_not_ours_cannot_be_made_again(files):
    with pytest.raises(ValueError, match="no request is stored inside"):
        read_request(media.read_metadata(Path(files["one"])))


def test_the_text_encoder_is_read_for_new_prompts_only(tmp_path, monkeypatch):
    PusaPipeline.from_pretrained("tiny").save_pretrained(tmp_path / "model")
    monkeypatch.setenv("PUSA_CACHE", str(tmp_path / "cache"))
    reads = []
    load = loading.load_text_encoder
    monkeypatch.setattr(
        "pusa.loading.load_text_encoder", lambda *given, **more: reads.append(given) or load(*given, **more)
    )
    clip = {"model": str(tmp_path / "model"), "width": WIDTH, "height": HEIGHT, "frames": 5, "negative_prompt": ""}
    run(tmp_path / "a.mp4", **clip)
    run(tmp_path / "b.mp4", **clip)
    assert len(reads) == 1
    assert np.array_equal(frames_of(tmp_path / "a.mp4"), frames_of(tmp_path / "b.mp4"))
    events = run(tmp_path / "c.mp4", prompt="a dog", **clip)
    assert len(reads) == 2
    shown = [event for event in events if getattr(event, "stage", "") == "encode"]  # loading is the first step of two
    assert shown == [Stage("encode", 2), Step(1, 2, stage="encode"), Step(2, 2, stage="encode")]


# ---- progress, stopping, failing -------------------------------------------------------------------------------------


def test_progress_counts_every_step_of_every_window_and_ends_at_zero_seconds(tmp_path):
    events = run(tmp_path / "out.mp4", frames=49)
    steps = [(e.step, e.steps) for e in events if e.kind == "step"]
    assert steps == [(k + 1, len(steps)) for k in range(len(steps))]
    assert len(steps) == 2 * 4  # 13 latent frames: windows of 5 that share 2
    assert [e.seconds_left for e in events if e.kind == "step"][-1] == 0
    assert [e.stage for e in events if e.kind == "stage"][:3] == ["load", "encode", "denoise"]


def test_previews_show_the_video_so_far_and_leave_the_vae_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("PUSA_CACHE", str(tmp_path / "cache"))
    pipe = PusaPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    used: list[str] = []
    for name in ("encoder", "decoder"):
        getattr(pipe.vae, name).register_forward_hook(lambda *_, name=name: used.append(name))
    previews: list[Image.Image] = []
    request = GenerationRequest(model="tiny", prompt="a cat", steps=2)
    for event in generate(request, tmp_path / "out.mp4", pipeline=pipe, preview_every=1):
        if event.kind == "stage" and event.stage == "denoise":
            assert set(used) == {"encoder"}  # a map is fitted before
            used.clear()
        if event.kind == "preview":
            previews.append(Image.open(BytesIO(event.image)))
            assert not used
    assert [p.size for p in previews] == [(WIDTH, HEIGHT)] * 2
    assert len(list((tmp_path / "cache" / "previews").iterdir())) == 1


def test_a_preview_decoder_that_is_none_costs_the_previews_and_not_the_video(tmp_path):
    options = {"preview_every": 1, "preview_decoder": tmp_path / "taew2_1.safetensors"}
    events = run(tmp_path / "out.mp4", **options)
    assert not [e for e in events if e.kind == "preview"]
    assert [e.message for e in events if e.kind == "note"] == [f"no previews: {options['preview_decoder']} is not here"]


def test_stopping_leaves_no_file(tmp_path):
    seen: list[Event] = []
    request = GenerationRequest(model="tiny", prompt="a cat", steps=5)
    for event in generate(request, tmp_path / "out.mp4", stop=lambda: any(e.kind == "step" for e in seen)):
        seen.append(event)
    assert seen[-1].kind == "step"
    assert seen[-1].step < 5
    assert list(tmp_path.iterdir()) == []


def test_stopping_works_while_frames_are_written(tmp_path):
    stages: list[str] = []
    request = GenerationRequest(model="tiny", prompt="a cat", steps=1)
    for event in generate(request, tmp_path / "out.mp4", stop=lambda: "decode" in stages):
        stages.append(getattr(event, "stage", ""))
    assert stages[-1] == "decode"
    assert list(tmp_path.iterdir()) == []


def test_closing_the_events_ends_the_run(tmp_path):
    events = generate(GenerationRequest(model="tiny", prompt="a cat", frames=401), tmp_path / "out.mp4")
    for event in events:
        if event.kind == "step" and event.step == 3:
            break
    events.close()
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_name_is_refused_before_any_work(tmp_path):
    for name, message in (("out.avi", "give .mp4"), ("no/such/out.mp4", "no/such"), ("out.png", "holds one picture")):
        events = generate(GenerationRequest(model="tiny", prompt="a cat"), tmp_path / name)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            assert next(events).stage == "load"


def test_too_short_a_video_says_how_much_is_needed(files, tmp_path):
    with pytest.raises(ValueError, match=r"one\.mp4 has 24 frames at 16 fps, 29 are taken over"):
        run(tmp_path / "out.mp4", task="extend", conditions=[video(files["one"])], overlap=29, frames=49, window=49)


def test_without_a_trained_model_the_random_one_says_what_it_is(tmp_path):
    if "mini" in zoo.ZOO:
        pytest.skip("the trained model is in the package")
    events = run(tmp_path / "out.mp4", model="mini")
    assert "'tiny' makes noise instead" in next(e.message for e in events if e.kind == "note")
    assert read_request(media.read_metadata(tmp_path / "out.mp4"))[0].model == "tiny"


def test_out_of_memory_in_decoding_falls_back_to_tiles(tmp_path, monkeypatch):
    run(tmp_path / "whole.mp4")
    calls = 0

    def short(_: Any, pieces: Any) -> Any:
        nonlocal calls
        pieces = iter(pieces)
        calls += next(pieces).shape[0]
        raise torch.OutOfMemoryError("out of memory")
        yield

    monkeypatch.setattr("pusa.generate.output.decode_chunks", short)
    run(tmp_path / "tiled.mp4")
    assert calls == 1
    assert np.array_equal(frames_of(tmp_path / "whole.mp4"), frames_of(tmp_path / "tiled.mp4"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiled.mp4", "whole.mp4"]


def test_latents_that_cannot_be_decoded_are_saved_and_decoded_later(tmp_path, monkeypatch):
    run(tmp_path / "whole.mp4")

    def short(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("diffusers.models.autoencoders.autoencoder_kl_wan.WanDecoder3d.forward", short)
        with pytest.raises(vae_module.DecodeMemoryError, match=r"pusa decode .*out\.latents\.safetensors"):
            run(tmp_path / "out.mp4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.latents.safetensors", "whole.mp4"]
    list(decode(tmp_path / "out.latents.safetensors", tmp_path / "out.mp4"))
    assert np.array_equal(frames_of(tmp_path / "out.mp4"), frames_of(tmp_path / "whole.mp4"))


def test_a_long_video_that_cannot_be_decoded_keeps_all_that_was_denoised(tmp_path, monkeypatch):
    run_out_of_memory(monkeypatch, WanDecoder3d, "forward", call=7)
    with pytest.raises(vae_module.DecodeMemoryError):
        run(tmp_path / "out.mp4", frames=49)
    latents, _ = load_latents(tmp_path / "out.latents.safetensors")
    assert latents.shape[2] == 8  # two windows of 5 that share 2


def test_out_of_memory_in_denoising_is_not_taken_for_decoding(tmp_path, monkeypatch):
    run_out_of_memory(monkeypatch, PusaFlowMatchEulerScheduler, "set_timesteps", call=2)
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path / "out.mp4", frames=49)
    assert list(tmp_path.iterdir()) == []


def test_what_no_part_of_a_task_can_hold_is_refused_before_denoising(files, tmp_path, monkeypatch):
    monkeypatch.setattr(PusaFlowMatchEulerScheduler, "step", lambda *_: pytest.fail("denoised"))
    with pytest.raises(ValueError, match=r"latent frame 12 of this loop is in the bridge .* give a place in 0\.\.11"):
        run(tmp_path / "out.mp4", task="loop", frames=49, conditions=[image(files["a"], "last")])
    damaged = Path(files["two"]).read_bytes()
    Path(files["two"]).write_bytes(damaged[: len(damaged) * 6 // 10] + bytes(len(damaged) * 4 // 10))
    with pytest.raises(media.MediaError):
        run(tmp_path / "out.mp4", task="transition", conditions=[video(files["one"]), video(files["two"])])
    with pytest.raises(ValueError, match="frames=33: a transition is made at once; give at most window=17"):
        run(tmp_path / "out.mp4", task="transition", frames=33, conditions=[video(files["one"])] * 2)


def test_previews_that_do_not_fit_are_given_up_not_the_video(tmp_path, monkeypatch):
    monkeypatch.setenv("PUSA_CACHE", str(tmp_path / "cache"))  # no map is there yet
    run_out_of_memory(monkeypatch, WanEncoder3d, "forward", call=1)
    events = run(tmp_path / "out.mp4", preview_every=1)
    assert [e.message for e in events if e.kind == "note"] == ["no previews: there is no memory for them"]


def test_a_pipeline_argument_keeps_its_solver_and_a_useless_alpha_is_noted(tmp_path):
    pipe = PusaPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = PusaFlowMatchEulerScheduler(solver_order=2)
    events = run(tmp_path / "out.mp4", pipeline=pipe, alpha=2.0, shift=3.0, guidance_2=2.0)
    assert (pipe.scheduler.config.solver_order, pipe.scheduler.config.shift) == (2, 3.0)
    notes = [e.message for e in events if e.kind == "note"]
    assert "alpha 2 has no effect: no LoRA is loaded" in notes
    assert "no effect of guidance_2: the model has one expert" in notes


def test_decoding_can_be_stopped(tmp_path):
    request = GenerationRequest(model="tiny", prompt="a cat", seed=0)
    save_latents(tmp_path / "z.safetensors", torch.zeros(1, 16, 5, 8, 12), {"request": request.model_dump(mode="json")})
    events = list(decode(tmp_path / "z.safetensors", tmp_path / "out.mp4", stop=lambda: True))
    assert "done" not in [e.kind for e in events]
    assert [p.name for p in tmp_path.iterdir()] == ["z.safetensors"]


def test_other_errors_in_decoding_are_not_hidden(tmp_path, monkeypatch):
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("diffusers.models.autoencoders.autoencoder_kl_wan.WanDecoder3d.forward", broken)
    with pytest.raises(RuntimeError, match=r"shapes do not match; the denoised latents are in .*out\.latents"):
        run(tmp_path / "out.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["out.latents.safetensors"]


def test_saved_latents_are_exact_and_other_files_are_refused(tmp_path):
    z = torch.randn(1, 16, 3, 4, 6)
    save_latents(tmp_path / "z.safetensors", z, {"request": {"prompt": "a cat"}})
    loaded, metadata = load_latents(tmp_path / "z.safetensors")
    assert torch.equal(loaded, z)
    assert metadata["request"]["prompt"] == "a cat"
    (tmp_path / "other.safetensors").write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match="holds no latents saved by pusa"):
        load_latents(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        load_latents(tmp_path / "gone.safetensors")
