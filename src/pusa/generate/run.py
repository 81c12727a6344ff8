"""The waist: a request in, events while it runs, a file at the end.

The command line, the server's worker and the evaluation all go through `generate`.
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

from pusa import __version__, media, resources, zoo
from pusa.events import Events, GenerationEvent, Report, RunEnded, as_events
from pusa.generate import inputs
from pusa.generate import prompt_hints as words
from pusa.generate.checkpoint import Checkpoint
from pusa.generate.tasks import Film, Tasks
from pusa.models.vae import DecodeMemoryError, decode_chunks, decode_video, is_out_of_memory
from pusa.pipeline import PusaPipeline
from pusa.request import GenerationRequest, ResolvedRequest, match_orientation, rounding_notes
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
) -> Events:
    """Make the video of a request.

    Args:
        request: what to make; what it leaves open is filled from the model's defaults.
        output: file to write; its suffix says the format, see `pusa.media.VideoWriter`.
        stop: asked between steps and between frames; True ends the run, and no file is left.
        pipeline: a loaded one; None loads the request's model and keeps it for the next request.
        carried: contents by sha256, for conditions whose files may be gone (see `stored`).
        preview_every: a ``preview`` event after every so many steps (0: none).
        preview_seconds: least time between two of them.
        checkpoint: a file that has, while the video is being made, what was denoised so far (see
            `pusa.generate.checkpoint`). If it is there already and of the same request, the run goes on from it and its
            video is the same to the byte.
            A request without a seed is another one each time: give the ``resolved`` one of the first run.
        checkpoint_every: steps between two writes of it.
        checkpoint_seconds: least time between two of them; what the last step of a window has made is always written.

    Yields:
        `GenerationEvent`; the last is ``done`` with the path, unless `stop` ended the run. Closing the generator ends
        the run, too.

    Raises:
        ValueError, FileNotFoundError: a name, an input, a place or a size does not fit; before any denoising.
        DecodeMemoryError: decoding did not fit into memory; the latents are saved beside `output`, for `decode`.
    """

    def run(report: Report) -> None:
        report_or_stop = _stopping(report, stop)
        asked = _with_a_model_that_is_here(request, report)
        defaults = zoo.defaults_of(asked.model)
        given = [inputs.find(spec, carried or {}) for spec in asked.conditions]
        resolved = match_orientation(asked, given[0].size if given else None, defaults).resolved(defaults)
        for note in rounding_notes(asked, resolved):
            report(GenerationEvent(kind="note", message=note))
        if unknown := words.unknown_words(asked.prompt, asked.model):
            told = words.hint(unknown, asked.model)
            report(GenerationEvent(kind="note", message=told, unknown_words=tuple(unknown)))
        specs = [s.model_copy(update={"sha256": i.sha256}) for s, i in zip(resolved.conditions, given, strict=True)]
        resolved = resolved.model_copy(update={"conditions": specs})
        given = [inputs.Input(spec, i.content, i.sha256) for spec, i in zip(specs, given, strict=True)]
        metadata = {
            "pusa": __version__,
            "request": inputs.without_folders(resolved).model_dump(mode="json"),
            "inputs": inputs.carried_inside(given),
        }
        writer = _writer(output, resolved, metadata)  # what cannot be written or read is told before any work
        inputs.check(given)
        report(GenerationEvent(kind="resolved", request=resolved))
        kept = None
        if checkpoint is not None:
            kept = Checkpoint(checkpoint, resolved, every=checkpoint_every, seconds=checkpoint_seconds)
            if left_aside := kept.read():
                report(GenerationEvent(kind="note", message=left_aside))
        report(GenerationEvent(kind="stage", stage="load"))
        pipe = _prepared(pipeline or loaded(asked.model, tuple(asked.lora)), resolved)
        if asked.alpha and not _has_pusa(pipe):
            report(GenerationEvent(kind="note", message=f"alpha {asked.alpha:g} has no effect: no LoRA is loaded"))
        tasks = Tasks(
            resolved,
            given,
            pipe,
            report_or_stop,
            max_sequence_length=defaults.max_sequence_length,
            preview_every=preview_every,
            preview_seconds=preview_seconds,
            checkpoint=kept,
        )
        _write(writer, tasks.film(), pipe, metadata, report_or_stop, stop)
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        report(GenerationEvent(kind="done", path=output))

    return as_events(run)


def decode(latents: Path, output: Path, *, stop: Callable[[], bool] = lambda: False) -> Events:
    """Finish the video of latents that a run has saved because decoding failed; yields and raises as `generate` does.

    What a run would have shown before and after them (the video that was extended) is not part of it.

    Raises:
        ValueError: the file holds no latents of a run.
    """

    def run(report: Report) -> None:
        report_or_stop = _stopping(report, stop)
        z, metadata = load_latents(latents)
        request = GenerationRequest.model_validate(metadata["request"])
        writer = _writer(output, request.resolved(zoo.defaults_of(request.model)), metadata)
        report(GenerationEvent(kind="stage", stage="load"))
        unused = dict.fromkeys(("tokenizer", "text_encoder", "transformer", "transformer_2"))
        pipe = PusaPipeline.from_pretrained(request.model, **unused)
        if torch.cuda.is_available():
            pipe.vae.to("cuda")
        _write(writer, Film([z]), pipe, metadata, report_or_stop, stop)
        report(GenerationEvent(kind="done", path=output))

    return as_events(run)


def _end_if(stop: Callable[[], bool]) -> None:
    if stop():
        raise RunEnded


def _stopping(report: Report, stop: Callable[[], bool]) -> Report:
    def report_or_stop(event: GenerationEvent) -> None:
        _end_if(stop)
        report(event)

    return report_or_stop


def stored(metadata: Mapping[str, Any] | None) -> tuple[GenerationRequest, dict[str, bytes]]:
    """The request inside a file that `generate` wrote (`pusa.media.read_metadata`), and the inputs it carries.

    Raises:
        ValueError: there is no request inside.
    """
    if not metadata or "request" not in metadata:
        raise ValueError("no request is stored inside: only videos made by pusa can be made again")
    carried = {sha256: base64.b64decode(text) for sha256, text in metadata.get("inputs", {}).items()}
    return GenerationRequest.model_validate(metadata["request"]), carried


def save_latents(path: Path, latents: Tensor, metadata: Mapping[str, Any]) -> None:
    """Normalised latents ``[B, C, F, h, w]`` and how they came about, as safetensors; complete or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({"latents": latents.detach().cpu().contiguous()}, temporary, {"pusa": json.dumps(metadata)})
    temporary.replace(path)


def load_latents(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """What `save_latents` wrote.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not here")
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("latents"), json.loads((file.metadata() or {})["pusa"])
    except Exception as error:  # whatever the parser makes of a file that is not ours
        raise ValueError(f"{path} holds no latents saved by pusa: give the .latents.safetensors of a run") from error


# ---- models ----------------------------------------------------------------------------------------------------------

_resident: dict[tuple[str, tuple[str, ...]], PusaPipeline] = {}  # the last one used: models are large


def _with_a_model_that_is_here(request: GenerationRequest, report: Report) -> GenerationRequest:
    model = zoo.with_fallback(request.model)
    if model == request.model:
        return request
    told = f"the weights of {request.model!r} are missing from this installation: {model!r} makes noise instead"
    report(GenerationEvent(kind="note", message=told))
    return request.model_copy(update={"model": model})


def loaded(model: str, loras: tuple[str, ...] = ()) -> PusaPipeline:
    """The pipeline on its device, with its adapters; kept for the next request until another one is asked for."""
    key = model, loras
    if key not in _resident:
        _resident.clear()
        _resident[key] = _load(model, loras)
    return _resident[key]


def _load(model: str, loras: tuple[str, ...]) -> PusaPipeline:
    known = zoo.find(model)
    in_package = known is not None and known.hub_id is None
    # Elsewhere the text encoder is by far the largest part after the transformer: it is read for new prompts only.
    pipe = PusaPipeline.from_pretrained(model, **({} if in_package else {"text_encoder": None}))
    sources: list[Any] = list(loras)
    if not sources and known and known.lora and not _has_pusa(pipe):
        sources = [known.lora.fetch()]
    for number, source in enumerate(sources):
        pipe.load_pusa(source, alpha=1.0, adapter_name="pusa" if number == 0 else f"lora_{number}")
    pipe.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        sizes_bytes = [sum(p.numel() * p.element_size() for p in module.parameters()) for module in modules]
        if sum(sizes_bytes) < 0.8 * resources.gpu_memory_bytes():  # the rest is for activations
            pipe.to("cuda")
        else:
            resources.check_gpu(max(sizes_bytes), model)
            pipe.enable_model_cpu_offload()
    return pipe


def _prepared(pipe: PusaPipeline, request: ResolvedRequest) -> PusaPipeline:
    pipe.scheduler = PusaFlowMatchEulerScheduler.from_config(pipe.scheduler.config, shift=request.shift)
    if _has_pusa(pipe):
        second = {} if pipe.transformer_2 is None else {"transformer_2": request.alpha_2 or request.alpha}
        pipe.set_alpha({"transformer": request.alpha, **second})
    return pipe


def _has_pusa(pipe: PusaPipeline) -> bool:
    return any("pusa" in names for names in pipe.get_list_adapters().values())


# ---- the file --------------------------------------------------------------------------------------------------------


def _writer(output: Path, request: ResolvedRequest, metadata: dict[str, Any]) -> media.VideoWriter:
    if (
        output.suffix.lower() == ".png"
        and "%" not in output.name
        and (request.frames > 1 or request.task != "generate")
    ):
        raise ValueError(f"{output} holds one picture: give a folder, %04d.png or .mp4 for a video")
    return media.VideoWriter(output, width=request.width, height=request.height, fps=request.fps, metadata=metadata)


def _write(
    writer: media.VideoWriter,
    film: Film,
    pipe: PusaPipeline,
    metadata: dict[str, Any],
    report: Report,
    stop: Callable[[], bool],
) -> None:
    """Decode and encode at once: no more than a chunk of frames is held."""
    saved = writer.path.with_suffix(".latents.safetensors")
    was_there = saved.exists()
    with writer:
        for frame in _shown(film, _decoded(film.pieces, pipe, saved, metadata, report)):
            _end_if(stop)
            writer.write(frame)
    if not was_there:
        saved.unlink(missing_ok=True)


def _shown(film: Film, decoded: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """uint8 frames ``[1, H, W, 3]`` of the whole film, without a jump at its joints.

    The frames that are skipped and dropped show the same moments as their neighbours outside, but through the VAE (and
    not quite the same, if they were held with noise). What they differ by at a joint fades out over the free frames.
    """
    outside = None
    for outside in film.before:
        yield outside[None]
    free = _faded_in(outside, film.skip, (frame for chunk in decoded for frame in chunk))
    first, held = None, deque[np.ndarray]()
    for frame in free:
        first = frame if first is None else first
        held.append(frame)
        if not film.drop or len(held) > film.drop + FADE_FRAMES:
            yield held.popleft()[None]
    after = iter(film.after)
    outside = next(after, first)  # a loop goes on with its own first frame
    fading = len(held) - film.drop
    if film.drop and outside is not None:
        difference = outside - held[fading].astype(np.float32)
        for number in range(fading):
            yield _moved(held[number], difference * ((number + 1) / (fading + 1)))[None]
        if film.after:
            yield outside[None]
    for frame in after:
        yield frame[None]


def _faded_in(outside: np.ndarray | None, skip: int, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames after the first `skip`, of which the last shows what `outside` shows."""
    difference: Any = 0.0
    for number, frame in enumerate(frames, start=1 - skip):
        if number == 0 and outside is not None:
            difference = outside - frame.astype(np.float32)
        if number >= 1:
            yield _moved(frame, difference * (1 - number / (FADE_FRAMES + 1))) if number <= FADE_FRAMES else frame


def _moved(frame: np.ndarray, difference: Any) -> np.ndarray:
    return (frame + difference).round().clip(0, 255).astype(np.uint8)


def _decoded(
    pieces: Iterable[Tensor], pipe: PusaPipeline, saved: Path, metadata: dict[str, Any], report: Report
) -> Iterator[np.ndarray]:
    """Frames of each piece as soon as it is denoised; latents that do not fit into memory are saved, not lost."""
    frames_shown = 0
    is_decoding = False

    with TemporaryFile() as denoised:  # on disk, so that memory does not grow with the video

        def taken() -> Iterator[Tensor]:
            nonlocal is_decoding
            for piece in pieces:
                np.save(denoised, piece.cpu().numpy())
                report(GenerationEvent(kind="stage", stage="decode"))
                is_decoding = True
                yield piece
                is_decoding = False

        try:
            for chunk in decode_chunks(pipe.vae, taken()):
                yield media.to_uint8(chunk)
                frames_shown += chunk.shape[2]
            return
        except RuntimeError as error:
            if not is_decoding or not is_out_of_memory(error):
                raise
        latents = torch.cat(list(_read_back(denoised)), dim=2)
    save_latents(saved, latents, metadata)
    told = f"out of memory while decoding; the denoised latents are in {saved}: finish with `pusa decode {saved}`"
    if not isinstance(pieces, list):  # the rest is not denoised yet
        raise DecodeMemoryError(told, latents)
    try:
        frames = decode_video(pipe.vae, latents)
    except DecodeMemoryError as error:
        raise DecodeMemoryError(told, latents) from error
    yield media.to_uint8(frames[:, :, frames_shown:])


def _read_back(file: IO[bytes]) -> Iterator[Tensor]:
    end = file.tell()
    file.seek(0)
    while file.tell() < end:
        yield torch.from_numpy(np.load(file))
