"""Make the video of a request: yield events while it runs and write the file.

The command line, the server's worker and the evaluation all call `generate`.
"""

import base64
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pusa import media, resources, zoo
from pusa.events import Done, Events, Note, Report, Resolved, RunEnded, Stage, as_events, report_until_stopped
from pusa.generate import inputs, prompt_hints
from pusa.generate.checkpoint import DenoisingCheckpoint
from pusa.generate.inputs import Input
from pusa.generate.marks import ResultMarks, mark_decoded, mark_result
from pusa.generate.progress import Previews
from pusa.generate.tasks import OutputPlan, Tasks
from pusa.models.vae import DecodeMemoryError, decode_chunks, decode_video, is_out_of_memory
from pusa.pipeline import PusaPipeline
from pusa.provenance.options import MarkOptions
from pusa.request import GenerationRequest, Metadata, ResolvedRequest, match_orientation, rounding_notes
from pusa.scheduler import PusaFlowMatchEulerScheduler

FADE_FRAMES = 8  # half a second at Wan's rate


def generate(
    request: GenerationRequest,
    output: Path,
    *,
    stop: Callable[[], bool] = lambda: False,
    pipeline: PusaPipeline | None = None,
    carried: Mapping[str, bytes] | None = None,
    preview_every: int = 0,
    preview_seconds: float = 0.0,
    checkpoint: Path | None = None,
    checkpoint_every: int = 4,
    checkpoint_seconds: float = 0.0,
    marks: MarkOptions | None = None,
) -> Events:
    """Make the video of a request.

    Args:
        request: the request; the model's defaults fill the fields it leaves open.
        output: file to write; its suffix sets the format, see `pusa.media.VideoWriter`.
        stop: called between steps and between frames; True ends the run, and no file is left.
        pipeline: a loaded pipeline; None loads the request's model and keeps it for the next request.
        carried: contents by sha256, for conditions whose files may not exist any more (see `read_request`).
        preview_every: steps between two previews (0: none).
        preview_seconds: minimum time between two previews.
        checkpoint: file for the latents denoised so far (see `pusa.generate.checkpoint`), removed at the end. If it
            exists and belongs to the same request, the run resumes from it and makes the same video, byte for byte.
            A request without a seed differs each time: repeat the resolved request of the first run.
        checkpoint_every: steps between two writes of the checkpoint.
        checkpoint_seconds: minimum time between two writes; the last step of a window is always written.
        marks: a signature and a watermark, beside the metadata that the request asks for.

    Yields:
        Events, see `pusa.events`; the last is ``done`` with the path, unless `stop` ended the run. Closing the
        generator ends the run as well.

    Raises:
        ValueError, FileNotFoundError: a name, an input, a position or a size is invalid; before any denoising.
        RuntimeError: a signature or a watermark that `marks` asks for is not possible; before any denoising.
        DecodeMemoryError: decoding ran out of memory; the latents are saved beside `output`, for `decode`.
    """

    def run(report: Report) -> None:
        report_or_stop = report_until_stopped(report, stop)
        resolved, sources = _resolve(request, carried or {}, report)
        _check_output(output, resolved)  # reject what cannot be written or read before any work
        result_marks = mark_result(resolved, sources, marks or MarkOptions(), report)
        writer = _writer(output, resolved, result_marks)
        report(Resolved(resolved.model_dump(mode="json")))
        saved = None
        if checkpoint is not None:
            saved = DenoisingCheckpoint(checkpoint, resolved, every=checkpoint_every, seconds=checkpoint_seconds)
            if reason := saved.read():
                report(Note(reason))
        report(Stage("load"))
        pipe = _configure(pipeline or load_pipeline(resolved.model, tuple(request.lora)), resolved)
        if request.alpha and not _has_pusa(pipe):
            report(Note(f"alpha {request.alpha:g} has no effect: no LoRA is loaded"))
        tasks = Tasks(
            resolved,
            result_marks.inputs,
            pipe,
            report_or_stop,
            max_sequence_length=zoo.defaults_of(resolved.model).max_sequence_length,
            previews=Previews(report_or_stop, every=preview_every, seconds=preview_seconds),
            checkpoint=saved,
        )
        _write(writer, tasks.plan(), pipe, result_marks, report_or_stop, stop)
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        report(Done({"video": output}))

    return as_events(run)


def decode(
    latents: Path,
    output: Path,
    *,
    stop: Callable[[], bool] = lambda: False,
    model: str | None = None,
    metadata: Metadata | None = None,
    marks: MarkOptions | None = None,
) -> Events:
    """Decode latents that a run has saved because decoding failed; yields and raises as `generate` does.

    The video lacks the frames of an input video that the run extends or joins.

    Args:
        model: its source, where that of the run was a folder, of which the latents hold the name only.
        metadata: how much the file tells; None takes the request's.

    Raises:
        ValueError: the file holds no latents of a run.
    """

    def run(report: Report) -> None:
        report_or_stop = report_until_stopped(report, stop)
        z, stored = load_latents(latents)
        request = GenerationRequest.model_validate(stored["request"])
        if model is not None:
            request = request.model_copy(update={"model": model})
        resolved = request.resolved(zoo.defaults_of(request.model))
        result_marks = mark_decoded(stored, metadata or resolved.metadata, marks or MarkOptions())
        writer = _writer(output, resolved, result_marks)
        report(Stage("load"))
        unused = dict.fromkeys(("tokenizer", "text_encoder", "transformer", "transformer_2"))
        pipe = PusaPipeline.from_pretrained(request.model, **unused)
        if torch.cuda.is_available():
            pipe.vae.to("cuda")
        _write(writer, OutputPlan([z]), pipe, result_marks, report_or_stop, stop)
        report(Done({"video": output}))

    return as_events(run)


def _resolve(
    request: GenerationRequest, carried: Mapping[str, bytes], report: Report
) -> tuple[ResolvedRequest, list[Input]]:
    """Find the inputs and fill every field of the request; report what was rounded, and words the model lacks."""
    request = _with_available_model(request, report)
    defaults = zoo.defaults_of(request.model)
    sources = [inputs.find(spec, carried) for spec in request.conditions]
    resolved = match_orientation(request, sources[0].size if sources else None, defaults).resolved(defaults)
    for note in rounding_notes(request, resolved):
        report(Note(note))
    if unknown := prompt_hints.unknown_words(request.prompt, request.model):
        hint = prompt_hints.hint(unknown, request.model)
        report(Note(hint, tuple(unknown)))
    specs = [s.model_copy(update={"sha256": i.sha256}) for s, i in zip(resolved.conditions, sources, strict=True)]
    resolved = resolved.model_copy(update={"conditions": specs})
    return resolved, [Input(spec, i.content, i.sha256) for spec, i in zip(specs, sources, strict=True)]


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
    return GenerationRequest.model_validate(metadata["request"]), carried


def save_latents(path: Path, latents: Tensor, metadata: Mapping[str, Any]) -> None:
    """Save normalised latents ``[B, C, F, h, w]`` with their metadata as safetensors, atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({"latents": latents.detach().cpu().contiguous()}, temporary, {"pusa": json.dumps(metadata)})
    temporary.replace(path)


def load_latents(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Read the latents and the metadata that `save_latents` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not here")
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("latents"), json.loads((file.metadata() or {})["pusa"])
    except Exception as error:  # the parser raises errors of any type for other files
        raise ValueError(f"{path} holds no latents saved by pusa: give the .latents.safetensors of a run") from error


# ---- models ----------------------------------------------------------------------------------------------------------

_resident: dict[tuple[str, tuple[str, ...]], PusaPipeline] = {}  # only the last one: models are large


def _with_available_model(request: GenerationRequest, report: Report) -> GenerationRequest:
    model = zoo.with_fallback(request.model)
    if model == request.model:
        return request
    message = f"the weights of {request.model!r} are missing from this installation: {model!r} makes noise instead"
    report(Note(message))
    return request.model_copy(update={"model": model})


def load_pipeline(model: str, loras: tuple[str, ...] = ()) -> PusaPipeline:
    """Load a pipeline with its adapters to its device, or return it if it was the last one loaded."""
    key = model, loras
    if key not in _resident:
        _resident.clear()
        _resident[key] = _load(model, loras)
    return _resident[key]


def _load(model: str, loras: tuple[str, ...]) -> PusaPipeline:
    entry = zoo.find(model)
    in_package = entry is not None and entry.hub_id is None
    # In other models the text encoder is the largest part after the transformer: load it for new prompts only.
    pipe = PusaPipeline.from_pretrained(model, **({} if in_package else {"text_encoder": None}))
    sources: list[Any] = list(loras)
    if not sources and entry and entry.lora and not _has_pusa(pipe):
        sources = [entry.lora.fetch()]
    for number, source in enumerate(sources):
        pipe.load_pusa(source, alpha=1.0, adapter_name="pusa" if number == 0 else f"lora_{number}")
    pipe.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        sizes_bytes = [sum(p.numel() * p.element_size() for p in module.parameters()) for module in modules]
        if sum(sizes_bytes) < 0.8 * resources.gpu_memory_bytes():  # leave room for activations
            pipe.to("cuda")
        else:
            resources.check_gpu(max(sizes_bytes), model)
            pipe.enable_model_cpu_offload()
    return pipe


def _configure(pipe: PusaPipeline, request: ResolvedRequest) -> PusaPipeline:
    pipe.scheduler = PusaFlowMatchEulerScheduler.from_config(pipe.scheduler.config, shift=request.shift)
    if _has_pusa(pipe):
        second = {} if pipe.transformer_2 is None else {"transformer_2": request.alpha_2 or request.alpha}
        pipe.set_alpha({"transformer": request.alpha, **second})
    return pipe


def _has_pusa(pipe: PusaPipeline) -> bool:
    return any("pusa" in names for names in pipe.get_list_adapters().values())


# ---- the file --------------------------------------------------------------------------------------------------------


def _check_output(output: Path, request: ResolvedRequest) -> None:
    """Raise ValueError, FileNotFoundError or MediaError if this video cannot be written under this name."""
    if (
        output.suffix.lower() == ".png"
        and "%" not in output.name
        and (request.frames > 1 or request.task != "generate")
    ):
        raise ValueError(f"{output} holds one picture: give a folder, %04d.png or .mp4 for a video")
    media.VideoWriter(output, width=request.width, height=request.height, fps=request.fps)


def _writer(output: Path, request: ResolvedRequest, marks: ResultMarks) -> media.VideoWriter:
    _check_output(output, request)
    return media.VideoWriter(
        output,
        width=request.width,
        height=request.height,
        fps=request.fps,
        metadata=marks.metadata,
        xmp=marks.xmp,
        seal=marks.seal,
    )


def _write(
    writer: media.VideoWriter,
    plan: OutputPlan,
    pipe: PusaPipeline,
    marks: ResultMarks,
    report: Report,
    stop: Callable[[], bool],
) -> None:
    """Decode and write the video chunk by chunk, so that memory does not grow with its length."""
    saved = writer.path.with_suffix(".latents.safetensors")
    existed = saved.exists()
    with writer:
        for frames in marks.embed(_output_frames(plan, _decoded(plan.pieces, pipe, saved, marks.for_latents, report))):
            if stop():
                raise RunEnded
            writer.write(frames)
    if not existed:
        saved.unlink(missing_ok=True)


def _output_frames(plan: OutputPlan, decoded: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the frames of the output, uint8 ``[1, H, W, 3]``, without a jump where parts join.

    The skipped and dropped frames show the same moments as frames of the neighbouring part, but decoded by the VAE (and
    not quite equal, if conditioned with noise). The difference at a joint fades out over the generated frames.
    """
    outside = None
    for outside in plan.before:
        yield outside[None]
    generated = _fade_in(outside, plan.skip, (frame for chunk in decoded for frame in chunk))
    first, held = None, deque[np.ndarray]()
    for frame in generated:
        first = frame if first is None else first
        held.append(frame)
        if not plan.drop or len(held) > plan.drop + FADE_FRAMES:
            yield held.popleft()[None]
    after = iter(plan.after)
    outside = next(after, first)  # a loop continues with its own first frame
    fading = len(held) - plan.drop
    if plan.drop and outside is not None:
        difference = outside - held[fading].astype(np.float32)
        for number in range(fading):
            yield _add(held[number], difference * ((number + 1) / (fading + 1)))[None]
        if plan.after:
            yield outside[None]
    for frame in after:
        yield frame[None]


def _fade_in(outside: np.ndarray | None, skip: int, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the frames after the first `skip`, fading out the difference of the last skipped one to `outside`."""
    difference: Any = 0.0
    for number, frame in enumerate(frames, start=1 - skip):
        if number == 0 and outside is not None:
            difference = outside - frame.astype(np.float32)
        if number >= 1:
            yield _add(frame, difference * (1 - number / (FADE_FRAMES + 1))) if number <= FADE_FRAMES else frame


def _add(frame: np.ndarray, difference: Any) -> np.ndarray:
    return (frame + difference).round().clip(0, 255).astype(np.uint8)


def _decoded(
    pieces: Iterable[Tensor], pipe: PusaPipeline, saved: Path, metadata: dict[str, Any], report: Report
) -> Iterator[np.ndarray]:
    """Yield the frames of each piece as soon as it is denoised; save the latents if decoding runs out of memory."""
    frames_shown = 0
    is_decoding = False

    with TemporaryFile() as denoised:  # on disk, so that memory does not grow with the video

        def read_pieces() -> Iterator[Tensor]:
            nonlocal is_decoding
            for piece in pieces:
                np.save(denoised, piece.cpu().numpy())
                report(Stage("decode"))
                is_decoding = True
                yield piece
                is_decoding = False

        try:
            for chunk in decode_chunks(pipe.vae, read_pieces()):
                yield media.to_uint8(chunk)
                frames_shown += chunk.shape[2]
            return
        except RuntimeError as error:
            if not is_decoding or not is_out_of_memory(error):
                raise
        latents = torch.cat(list(_read_back(denoised)), dim=2)
    save_latents(saved, latents, metadata)
    message = f"out of memory while decoding; the denoised latents are in {saved}: finish with `pusa decode {saved}`"
    if not isinstance(pieces, list):  # the remaining pieces are not denoised yet
        raise DecodeMemoryError(message, latents)
    try:
        frames = decode_video(pipe.vae, latents)
    except DecodeMemoryError as error:
        raise DecodeMemoryError(message, latents) from error
    yield media.to_uint8(frames[:, :, frames_shown:])


def _read_back(file: IO[bytes]) -> Iterator[Tensor]:
    end = file.tell()
    file.seek(0)
    while file.tell() < end:
        yield torch.from_numpy(np.load(file))
