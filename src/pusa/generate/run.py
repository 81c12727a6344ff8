"""Make the video of a request: yield events while it runs and write the file.

The command line, the server's worker and the evaluation all call `generate`.
"""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from pusa import zoo
from pusa.acceleration import step_cache
from pusa.acceleration.decisions import LoadOptions, Plan
from pusa.acceleration.ranks import Ranks
from pusa.codes import CodedText
from pusa.defaults import GenerationDefaults
from pusa.events import Done, Events, Note, Report, Resolved, Stage, as_events, report_until_stopped
from pusa.generate import inputs, loras, prompt_hints, residents, sharing
from pusa.generate.checkpoint import DenoisingCheckpoint
from pusa.generate.growing import growing_video
from pusa.generate.inputs import Input
from pusa.generate.marks import mark_decoded, mark_result
from pusa.generate.output import check_output, load_latents, open_writer, write_output
from pusa.generate.progress import Previews
from pusa.generate.tasks import OutputPlan, Tasks
from pusa.models.finite import is_finite
from pusa.models.frame_skipping import frame_obstacle
from pusa.pipeline import PusaPipeline
from pusa.provenance.options import MarkOptions
from pusa.request import (
    GenerationRequest,
    Metadata,
    ResolvedRequest,
    match_orientation,
    rounding_notes,
    stored_request,
)

_SECOND_EXPERT = ("alpha_2", "guidance_2")  # fields for the low-noise expert of Wan2.2


def generate(
    request: GenerationRequest,
    output: Path,
    *,
    stop: Callable[[], bool] = lambda: False,
    pipeline: PusaPipeline | None = None,
    carried: Mapping[str, bytes] | None = None,
    made_with: Mapping[str, Any] | None = None,
    preview_every: int = 0,
    preview_seconds: float = 0.0,
    preview_decoder: Path | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 4,
    checkpoint_seconds: float = 0.0,
    marks: MarkOptions | None = None,
    load: LoadOptions | None = None,
    plans: Sequence[Plan] | None = None,
    device: str = "cuda",
    ranks: Ranks | None = None,
    growing: Path | None = None,
) -> Events:
    """Make the video of a request.

    Where memory runs out, the next smaller plan takes over from the last step: nothing that was done is lost, and with
    exact weights the video is the same.

    Args:
        request: the request; the model's defaults fill the fields it leaves open. A `ResolvedRequest` has none.
        output: file to write; its suffix sets the format, see `pusa.media.VideoWriter`.
        stop: called between steps and between frames; True ends the run, and no file is left.
        pipeline: a loaded pipeline; None loads the request's model and keeps it for the next request.
        carried: contents by sha256, for conditions whose files may not exist any more (see `read_request`).
        made_with: ``weights`` in the metadata of a video that is made again; a note tells which of them have changed.
        preview_every: steps between two previews (0: none).
        preview_seconds: minimum time between two previews.
        preview_decoder: file of a tiny decoder for sharper ones, see `pusa.models.tiny_decoder`.
        checkpoint: file for the latents denoised so far (see `pusa.generate.checkpoint`), removed at the end. If it
            exists and belongs to the same request, the run resumes from it and makes the same video, byte for byte.
            A request without a seed differs each time: repeat the resolved request of the first run.
        checkpoint_every: steps between two writes of the checkpoint.
        checkpoint_seconds: minimum time between two writes; the last step of a window is always written.
        marks: a signature and a watermark, beside the metadata that the request asks for.
        load: how the model is to be loaded: its memory, and if its weights are quantised.
        plans: how the model runs, best first, and what takes over where memory runs out. None: the plans of
            `pusa.acceleration.plans` for this machine.
        device: the accelerator that plans mean by "cuda".
        ranks: share the denoising; this process is rank 0, and the others run `pusa.generate.follower.follow`.
        growing: an .mp4 to watch a video in that is made piece by piece, as it grows; it is gone at the end.

    Yields:
        Events, see `pusa.events`; the last is ``done`` with the path, unless `stop` ended the run. Closing the
        generator ends the run as well.

    Raises:
        ValueError, FileNotFoundError: a name, an input, a position or a size is invalid; before any denoising.
        NotFiniteError: a part of the model has computed NaN or infinity; the message names it.
        DecodeError: decoding or writing failed; the latents are saved beside `output`, for `decode`, and the message
            names the file. DecodeMemoryError: because memory ran out. RankError: a rank has failed; no file is left.
        torch.OutOfMemoryError: memory ran out before, with the smallest plan as well. ResourcesError: no plan fits.
        RuntimeError: a signature or a watermark that `marks` asks for is not possible; before any denoising.
    """
    stop, watched = sharing.watch(ranks, stop, pipeline)

    def run(report: Report) -> None:
        report_or_stop = report_until_stopped(report, stop)
        resolved, sources, defaults = _resolve(request, carried or {}, report)
        check_output(output, resolved)  # reject what cannot be written or read before any work
        for note in inputs.check(sources):
            report(Note.of(note))
        result_marks = mark_result(resolved, sources, marks or MarkOptions(), report)
        report(Resolved(resolved.model_dump(mode="json")))
        report(Stage("load"))
        options = sharing.request_model(ranks, resolved, load or LoadOptions())
        resident = (
            residents.Resident(pipeline, [])
            if pipeline
            else residents.resident_of(resolved, options, device=device, is_planned=plans is not None)
        )
        pipe = resident.prepare(resolved, plans, report)
        sharing.share(ranks, pipe, resolved, resident.plan)
        weights = None
        if pipeline is None:
            weights = residents.weights_of(resident, resolved.model)
            result_marks = result_marks.with_weights(weights)
        writer = open_writer(output, resolved, result_marks)
        for text in _notes(request, resolved, defaults, resident, pipe, made_with or {}, weights or {}):
            report(Note.of(text))
        saved = None
        if checkpoint is not None:
            saved = DenoisingCheckpoint(
                checkpoint,
                resolved,
                every=step_cache.resumable_every(resolved.step_cache, checkpoint_every),
                seconds=checkpoint_seconds,
                weights=weights,
            )
            if reason := saved.read():
                report(Note.of(reason))
        take_smaller_plan = sharing.smaller_plan(ranks, resident, report_or_stop)
        tasks = Tasks(
            resolved,
            result_marks.inputs,
            pipe,
            report_or_stop,
            max_sequence_length=defaults.max_sequence_length,
            previews=Previews(report_or_stop, every=preview_every, seconds=preview_seconds, decoder=preview_decoder),
            checkpoint=saved,
            take_smaller_plan=take_smaller_plan,
            text_encoder=resident.part("text_encoder"),
            device=device,
            load_text_encoder=partial(residents.load_text_encoder, resident, resolved.model),
            computes_all=lambda: resident.plan is not None and resident.plan.computes_all,
        )
        part = growing_video(growing, resolved, result_marks.metadata, report)
        write_output(writer, tasks.plan(), pipe, result_marks, report_or_stop, stop, tasks.take_smaller_plan, part)
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        report(Done({"video": output}))

    return as_events(watched(run))


def decode(
    latents: Path,
    output: Path,
    *,
    stop: Callable[[], bool] = lambda: False,
    model: str | None = None,
    metadata: Metadata | None = None,
    marks: MarkOptions | None = None,
    load: LoadOptions | None = None,
    plans: Sequence[Plan] | None = None,
    device: str = "cuda",
) -> Events:
    """Decode latents that a run has saved because decoding failed; yields and raises as `generate` does.

    The video lacks the frames of an input video that the run extends or joins.

    Args:
        model: its source, where that of the run was a folder, of which the latents hold the name only.
        metadata: how much the file tells; None takes the request's.
        load, plans, device: as for `generate`; only the VAE is loaded.

    Raises:
        ValueError: the file holds no latents of a run.
    """

    def run(report: Report) -> None:
        report_or_stop = report_until_stopped(report, stop)
        z, stored = load_latents(latents)
        if not is_finite(z):
            raise ValueError(f"{latents} holds NaN or infinity: denoise the video again")
        request = stored_request(stored["request"])
        if model is not None:
            request = request.model_copy(update={"model": model})
        resolved = request.resolved(zoo.defaults_of(request.model))
        check_output(output, resolved)
        result_marks = mark_decoded(stored, metadata or resolved.metadata, marks or MarkOptions())
        writer = open_writer(output, resolved, result_marks)
        report(Stage("load"))
        resident = residents.vae_of(resolved, load or LoadOptions(), device)
        pipe = resident.prepare(resolved, plans, report)
        take_smaller_plan = partial(resident.take_smaller_plan, report=report_or_stop)
        write_output(writer, OutputPlan([z]), pipe, result_marks, report_or_stop, stop, take_smaller_plan)
        report(Done({"video": output}))

    return as_events(run)


def _resolve(
    request: GenerationRequest, carried: Mapping[str, bytes], report: Report
) -> tuple[ResolvedRequest, list[Input], GenerationDefaults]:
    """Fill every field of the request and find its inputs; report what was rounded, and words the model lacks.

    Returns:
        The request, its inputs and the defaults of its model.
    """
    request = _with_available_model(request, report)
    defaults = zoo.defaults_of(request.model)
    first = request.conditions[0] if request.conditions else None
    size_of_first = partial(inputs.frame_size, first, carried) if first else None
    resolved = match_orientation(request, size_of_first, defaults).resolved(defaults)
    sources = [inputs.find(condition, carried) for condition in resolved.conditions]
    for note in rounding_notes(request, resolved, defaults.size_multiple):
        report(Note.of(note))
    texts = resolved.place_prompts().texts
    words = (word for text in texts for word in prompt_hints.unknown_words(text, request.model))
    if unknown := list(dict.fromkeys(words)):
        hint = prompt_hints.hint(unknown, request.model)
        report(Note.of(hint, tuple(unknown)))
    return resolved.model_copy(update={"conditions": [source.condition for source in sources]}), sources, defaults


def _with_available_model(request: GenerationRequest, report: Report) -> GenerationRequest:
    model = zoo.with_fallback(request.model)
    if model == request.model:
        return request
    message = f"the weights of {request.model!r} are missing from this installation: {model!r} makes noise instead"
    report(Note(message, code="weights_missing", values={"model": request.model, "used": model}))
    return request.model_copy(update={"model": model})


def _notes(
    request: GenerationRequest,
    resolved: ResolvedRequest,
    defaults: GenerationDefaults,
    resident: residents.Resident,
    pipe: PusaPipeline,
    made_with: Mapping[str, Any],
    weights: Mapping[str, Any],
) -> Iterator[str]:
    """Yield what the loaded model has to say to a request: changed weights, fields without effect, cut prompts."""
    yield from resident.notes
    if request.lora:
        yield from loras.notes(resolved, resident.loras)
    yield from loras.fast_notes(resolved, resident.fast)
    yield from loras.changes(made_with, weights)
    if pipe.base.has_text:
        yield from _cut_notes(resolved, pipe.tokenizer, defaults.max_sequence_length)
    if missing := loras.missing_note(pipe, resolved):
        yield missing
    if request.alpha and not loras.has_pusa(pipe):
        yield CodedText(
            "alpha_unused", f"alpha {request.alpha:g} has no effect: no LoRA is loaded", alpha=request.alpha
        )
    if pipe.transformer_2 is None and (unused := [name for name in _SECOND_EXPERT if getattr(request, name)]):
        yield CodedText("second_expert_unused", f"no effect of {', '.join(unused)}: the model has one expert")
    can_skip = pipe.base.skips_frames and not resolved.exact and resolved.still_frames
    if can_skip and (obstacle := frame_obstacle(pipe)):
        yield CodedText("computes_all", f"every frame is computed at every step: {obstacle}", reason=obstacle)


def _cut_notes(request: ResolvedRequest, tokenizer: Any, max_sequence_length: int) -> Iterator[str]:
    numbered = {
        f"prompt {number} of prompts": text for number, text in enumerate(request.place_prompts().texts, start=1)
    }
    texts = (numbered if request.prompts else {"prompt": request.prompt}) | (
        {"negative prompt": request.negative_prompt} if request.guidance > 1 else {}
    )
    for name, text in texts.items():
        if note := prompt_hints.cut_note(name, prompt_clean(text), tokenizer, max_sequence_length):
            yield note


def read_request(metadata: Mapping[str, Any] | None) -> tuple[GenerationRequest, dict[str, bytes]]:
    """Read the request and the embedded inputs (by sha256) from the metadata of a file that `generate` wrote.

    Args:
        metadata: see `pusa.media.read_metadata`.

    Raises:
        ValueError: the metadata holds no request.
    """
    if metadata and "pusa" in metadata and "request" not in metadata:
        raise ValueError("it was made with metadata=minimal, so no request is stored inside: it cannot be made again")
    if not metadata or "request" not in metadata:
        raise ValueError("no request is stored inside: only videos made by pusa can be made again")
    carried = {sha256: base64.b64decode(text) for sha256, text in metadata.get("inputs", {}).items()}
    request = {"exact": True, **metadata["request"]}  # older versions computed every frame at every step
    return stored_request(request), carried
