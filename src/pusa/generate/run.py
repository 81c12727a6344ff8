"""Make the video of a request: yield events while it runs and write the file.

The command line, the server's worker and the evaluation all call `generate`.
"""

import base64
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pusa import media, zoo
from pusa.acceleration.decisions import LoadOptions, Plan
from pusa.acceleration.ranks import RankError, Ranks
from pusa.events import Done, Events, Note, Report, Resolved, RunEnded, Stage, as_events, report_until_stopped
from pusa.generate import inputs, loras, prompt_hints, residents, sharing
from pusa.generate.checkpoint import DenoisingCheckpoint
from pusa.generate.inputs import Input
from pusa.generate.marks import ResultMarks, mark_decoded, mark_result
from pusa.generate.progress import Previews
from pusa.generate.tasks import OutputPlan, Tasks
from pusa.models.finite import check_decoded, is_finite
from pusa.models.vae import DecodeError, DecodeMemoryError, decode_chunks, decode_video, is_out_of_memory
from pusa.pipeline import PusaPipeline
from pusa.provenance.options import MarkOptions
from pusa.request import GenerationRequest, Metadata, ResolvedRequest, match_orientation, rounding_notes

_SECOND_EXPERT = ("alpha_2", "guidance_2")  # fields for the low-noise expert of Wan2.2
FADE_FRAMES = 8  # half a second at Wan's rate


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
        resolved, sources = _resolve(request, carried or {}, report)
        _check_output(output, resolved)  # reject what cannot be written or read before any work
        for note in inputs.check(sources):
            report(Note(note))
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
        writer = _writer(output, resolved, result_marks)
        max_sequence_length = zoo.defaults_of(resolved.model).max_sequence_length
        notes = [
            *resident.notes,
            *(loras.notes(resolved, resident.loras) if request.lora else ()),
            *loras.changes(made_with or {}, weights or {}),
            *_cut_notes(resolved, pipe.tokenizer, max_sequence_length),
        ]
        if missing := loras.missing_note(pipe, resolved):
            notes.append(missing)
        if request.alpha and not loras.has_pusa(pipe):
            notes.append(f"alpha {request.alpha:g} has no effect: no LoRA is loaded")
        if pipe.transformer_2 is None and (unused := [name for name in _SECOND_EXPERT if getattr(request, name)]):
            notes.append(f"no effect of {', '.join(unused)}: the model has one expert")
        for note in notes:
            report(Note(note))
        saved = None
        if checkpoint is not None:
            saved = DenoisingCheckpoint(
                checkpoint, resolved, every=checkpoint_every, seconds=checkpoint_seconds, weights=weights
            )
            if reason := saved.read():
                report(Note(reason))
        take_smaller_plan = sharing.smaller_plan(ranks, resident, report_or_stop)
        tasks = Tasks(
            resolved,
            result_marks.inputs,
            pipe,
            report_or_stop,
            max_sequence_length=max_sequence_length,
            previews=Previews(report_or_stop, every=preview_every, seconds=preview_seconds, decoder=preview_decoder),
            checkpoint=saved,
            take_smaller_plan=take_smaller_plan,
            text_encoder=resident.part("text_encoder"),
            device=device,
            load_text_encoder=partial(residents.load_text_encoder, resident, resolved.model),
        )
        _write(writer, tasks.plan(), pipe, result_marks, report_or_stop, stop, take_smaller_plan)
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
        request = GenerationRequest.model_validate(stored["request"])
        if model is not None:
            request = request.model_copy(update={"model": model})
        resolved = request.resolved(zoo.defaults_of(request.model))
        _check_output(output, resolved)
        result_marks = mark_decoded(stored, metadata or resolved.metadata, marks or MarkOptions())
        writer = _writer(output, resolved, result_marks)
        report(Stage("load"))
        resident = residents.vae_of(resolved, load or LoadOptions(), device)
        pipe = resident.prepare(resolved, plans, report)
        take_smaller_plan = partial(resident.take_smaller_plan, report=report_or_stop)
        _write(writer, OutputPlan([z]), pipe, result_marks, report_or_stop, stop, take_smaller_plan)
        report(Done({"video": output}))

    return as_events(run)


def _resolve(
    request: GenerationRequest, carried: Mapping[str, bytes], report: Report
) -> tuple[ResolvedRequest, list[Input]]:
    """Fill every field of the request and find its inputs; report what was rounded, and words the model lacks."""
    request = _with_available_model(request, report)
    defaults = zoo.defaults_of(request.model)
    first = request.conditions[0] if request.conditions else None
    size_of_first = partial(inputs.frame_size, first, carried) if first else None
    resolved = match_orientation(request, size_of_first, defaults).resolved(defaults)
    sources = [inputs.find(condition, carried) for condition in resolved.conditions]
    for note in rounding_notes(request, resolved, defaults.size_multiple):
        report(Note(note))
    if unknown := prompt_hints.unknown_words(request.prompt, request.model):
        hint = prompt_hints.hint(unknown, request.model)
        report(Note(hint, tuple(unknown)))
    return resolved.model_copy(update={"conditions": [source.condition for source in sources]}), sources


def _with_available_model(request: GenerationRequest, report: Report) -> GenerationRequest:
    model = zoo.with_fallback(request.model)
    if model == request.model:
        return request
    message = f"the weights of {request.model!r} are missing from this installation: {model!r} makes noise instead"
    report(Note(message))
    return request.model_copy(update={"model": model})


def _cut_notes(request: ResolvedRequest, tokenizer: Any, max_sequence_length: int) -> Iterator[str]:
    texts = {"prompt": request.prompt} | ({"negative prompt": request.negative_prompt} if request.guidance > 1 else {})
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
    take_smaller_plan: Callable[[str], bool],
) -> None:
    """Decode and write the video chunk by chunk, so that memory does not grow with its length."""
    saved = writer.path.with_suffix(".latents.safetensors")
    existed = saved.exists()
    with TemporaryFile() as file:  # on disk, so that memory does not grow with the video
        pieces = _Pieces(plan.pieces, file, report)
        decoded = _decoded(pieces, pipe, lambda z: save_latents(saved, z, marks.for_latents), take_smaller_plan)
        try:
            with writer:
                for frames in marks.embed(output_frames(plan, decoded)):
                    if stop():
                        raise RunEnded
                    writer.write(frames)
        except Exception as error:  # no fault of decoding or writing may cost hours of denoising
            is_denoising = pieces.is_denoising and not isinstance(error, DecodeError)
            if not pieces.denoised or is_denoising or isinstance(error, RankError):
                raise
            latents = pieces.read_back()
            try:
                save_latents(saved, latents, marks.for_latents)
            except OSError:  # a full disk
                raise error from None
            kind = DecodeMemoryError if isinstance(error, DecodeMemoryError) else DecodeError
            reason = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
            message = f"{reason}; the denoised latents are in {saved}: finish with `pusa decode {saved}`"
            raise kind(message, latents) from error
    if not existed:
        saved.unlink(missing_ok=True)


class _Pieces:
    """Iterate over pieces of latents as they are denoised, and keep them in a file.

    Attributes:
        denoised: how many pieces there have been.
        is_denoising: the next piece is being made, so that an error is not one of decoding.
        are_all_denoised: no piece is left to make.
    """

    def __init__(self, pieces: Iterable[Tensor], file: IO[bytes], report: Report) -> None:
        self._pieces, self._file, self._report = iter(pieces), file, report
        self.denoised, self.is_denoising = 0, False
        self.are_all_denoised = isinstance(pieces, list)
        self._count = len(pieces) if isinstance(pieces, list) else 0

    def __length_hint__(self) -> int:
        """Return how many pieces there are; 0 if it is not known: `decode_chunks` keeps nothing after the last."""
        return 1 if self.denoised and self.are_all_denoised else self._count  # one, once they are read back

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the pieces that there have been, from the file, and then new ones as they are denoised."""
        if self.denoised:
            yield self.read_back()
        self.is_denoising = True
        for piece in self._pieces:
            self.is_denoising = False
            np.save(self._file, piece.cpu().numpy())
            self.denoised += 1
            self._report(Stage("decode"))
            yield piece
            self.is_denoising = True
        self.is_denoising = False

    def read_back(self) -> Tensor:
        """Return all pieces so far as one, ``[1, C, F, h, w]``."""
        end = self._file.tell()
        self._file.seek(0)
        pieces = []
        while self._file.tell() < end:
            pieces.append(torch.from_numpy(np.load(self._file)))
        return torch.cat(pieces, dim=2)


def output_frames(plan: OutputPlan, decoded: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
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
    pieces: _Pieces, pipe: PusaPipeline, save: Callable[[Tensor], None], take_smaller_plan: Callable[[str], bool]
) -> Iterator[np.ndarray]:
    """Yield the frames of each piece as soon as it is denoised.

    If decoding runs out of memory, save the latents, and decode them again by smaller plans; without one, in ways that
    need less.
    """
    frames_shown = 0
    while True:
        frames_decoded = 0
        try:
            for chunk in decode_chunks(pipe.vae, pieces):
                new = chunk[:, :, max(0, frames_shown - frames_decoded) :]
                frames_decoded += chunk.shape[2]
                if new.shape[2]:
                    yield media.to_uint8(check_decoded(new))
                    frames_shown = frames_decoded
            return
        except RuntimeError as error:
            if pieces.is_denoising or not is_out_of_memory(error):
                raise
        latents = pieces.read_back()
        save(latents)
        if not take_smaller_plan("decoding"):
            break
    if not pieces.are_all_denoised:
        raise DecodeMemoryError("out of memory while decoding", latents)
    try:
        frames = decode_video(pipe.vae, latents)
    except DecodeMemoryError as error:
        raise DecodeMemoryError("out of memory while decoding", latents) from error
    yield media.to_uint8(check_decoded(frames[:, :, frames_shown:]))
