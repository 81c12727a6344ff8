"""The waist: a request in, events while it runs, a file at the end.

The command line, the server's worker and the evaluation all go through `generate`. Every task is one shape: frames that
exist already, latents decoded as they are finished, frames that exist already.
"""

import base64
import hashlib
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pusa import long_video, media, zoo
from pusa.conditions import PusaCondition, fit_image
from pusa.events import GenerationEvent
from pusa.models.vae import DecodeMemoryError, decode_chunks, decode_video, is_out_of_memory
from pusa.pipeline import PusaPipeline
from pusa.positions import latent_frames
from pusa.request import ConditionSpec, GenerationRequest, rounding_notes
from pusa.scheduler import PusaFlowMatchEulerScheduler

logger = logging.getLogger(__name__)

Events = Generator[GenerationEvent, None, None]
Report = Callable[[GenerationEvent], None]

MAX_INPUT_BYTES_INSIDE = 2_000_000  # of all inputs of a video together, for it to carry them


def generate(
    request: GenerationRequest,
    output: Path,
    *,
    stop: Callable[[], bool] = lambda: False,
    pipeline: PusaPipeline | None = None,
    inputs: Mapping[str, bytes] | None = None,
    preview_every: int = 0,
) -> Events:
    """Make the video of a request.

    Args:
        request: what to make; what it leaves open is filled from the model's defaults.
        output: file to write; its suffix says the format, see `pusa.media.VideoWriter`.
        stop: asked between steps; True ends the run, and no file is left.
        pipeline: a loaded one; None loads the request's model and keeps it for the next request.
        inputs: contents by sha256, for conditions whose files may be gone (a replay).
        preview_every: a ``preview`` event after every so many steps (0: none).

    Yields:
        `GenerationEvent`; the last is ``done`` with the path, unless `stop` ended the run. Closing the generator ends
        the run, too.

    Raises:
        ValueError, FileNotFoundError: an input, a place or a size does not fit; before any denoising, where it can be
            known.
        DecodeMemoryError: decoding did not fit into memory; the latents are saved beside `output`, for `decode`.
    """

    def run(report: Report) -> None:
        job = _Job.prepare(request, report, stop, inputs or {}, preview_every)
        writer = job.writer(output)  # a name that cannot be written is told before any work
        job.load(pipeline)
        job.write(job.film(), writer)

    return _events_of(run)


def decode(latents: Path, output: Path, *, stop: Callable[[], bool] = lambda: False) -> Events:
    """Finish the video of latents that a run has saved because decoding failed. Yields and raises as `generate` does.

    Raises:
        ValueError: the file holds no latents of a run.
    """

    def run(report: Report) -> None:
        z, metadata = load_latents(latents)
        request = GenerationRequest.model_validate(metadata["request"])
        job = _Job(request, [], metadata, report, stop)
        writer = job.writer(output)
        report(GenerationEvent(kind="stage", stage="load"))
        parts = dict.fromkeys(("tokenizer", "text_encoder", "transformer", "transformer_2"))
        job.pipe = PusaPipeline.from_pretrained(request.model, **parts)
        job.write(_Film(pieces=[z]), writer)

    return _events_of(run)


def save_latents(path: Path, latents: Tensor, metadata: Mapping[str, Any]) -> None:
    """Normalised latents ``[B, C, F, h, w]`` and how they came about, as safetensors under a temporary name first."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({"latents": latents.detach().cpu().contiguous()}, temporary, {"pusa": json.dumps(metadata)})
    temporary.replace(path)


def load_latents(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """What `save_latents` wrote. Raises ValueError for any other file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not here")
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("latents"), json.loads((file.metadata() or {})["pusa"])
    except Exception as error:  # whatever the parser makes of a file that is not ours
        raise ValueError(f"{path} holds no latents saved by pusa: give the .latents.safetensors of a run") from error


def stored(metadata: Mapping[str, Any] | None) -> tuple[GenerationRequest, dict[str, bytes]]:
    """The request inside a file that `generate` wrote, and the inputs it carries, by sha256.

    Raises:
        ValueError: there is no request inside.
    """
    if not metadata or "request" not in metadata:
        raise ValueError("no request is stored inside: only videos made by pusa can be made again")
    contents = {digest: base64.b64decode(text) for digest, text in metadata.get("inputs", {}).items()}
    return GenerationRequest.model_validate(metadata["request"]), contents


# ---- from functions that report to events ----------------------------------------------------------------------------


class _Ended(BaseException):
    """Unwinds a run that nobody waits for any more; not an Exception, so that nothing on the way keeps it."""


def _events_of(run: Callable[[Report], None]) -> Events:
    """Run in a thread; what it reports comes out one by one, and it waits until each has been taken."""
    events: queue.Queue[GenerationEvent | BaseException | None] = queue.Queue(maxsize=1)
    ended = threading.Event()

    def report(event: GenerationEvent) -> None:
        if ended.is_set():
            raise _Ended
        events.put(event)

    def work() -> None:
        try:
            run(report)
            events.put(None)
        except _Ended:
            events.put(None)
        except BaseException as error:
            events.put(error)

    worker = threading.Thread(target=work, name="pusa-generate", daemon=True)
    worker.start()
    wait_seconds: float | None = None
    try:
        while (event := events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    except KeyboardInterrupt:
        wait_seconds = 2.0  # enough to take half a file away, not to finish a step
        raise
    finally:
        ended.set()
        while worker.is_alive():
            try:
                events.get_nowait()  # lets a waiting `put` return, so that the next report ends the run
            except queue.Empty:
                worker.join(0.02 if wait_seconds is None else wait_seconds)
                if wait_seconds is not None:
                    break


# ---- a job -----------------------------------------------------------------------------------------------------------


@dataclass
class _Film:
    """What the file shows: `before`, the decoded `pieces` without `skip` and `drop` frames at their ends, `after`."""

    pieces: Iterable[Tensor]  # normalised latents [1, C, n, h, w], one stream
    before: Iterable[np.ndarray] = ()  # uint8 [H, W, 3]
    skip: int = 0
    drop: int = 0
    after: Iterable[np.ndarray] = ()


@dataclass
class _Input:
    spec: ConditionSpec
    source: Path | BytesIO
    sha256: str


class _Job:
    """One request on its way to a file."""

    pipe: PusaPipeline

    def __init__(
        self,
        request: GenerationRequest,  # resolved
        inputs: list[_Input],
        metadata: dict[str, Any],
        report: Report,
        stop: Callable[[], bool],
        preview_every: int = 0,
    ) -> None:
        self.request, self.inputs, self.metadata = request, inputs, metadata
        self.report, self.stop, self.preview_every = report, stop, preview_every
        self.max_sequence_length = _defaults(request.model).max_sequence_length
        self.generator = torch.Generator().manual_seed(request.seed or 0)
        self.steps_in_all = self.steps_done = 0
        self.started = 0.0

    @classmethod
    def prepare(
        cls,
        asked: GenerationRequest,
        report: Report,
        stop: Callable[[], bool],
        contents: Mapping[str, bytes],
        preview_every: int,
    ) -> "_Job":
        """Find the inputs and fill what the request leaves open; nothing heavy is loaded."""
        defaults = _defaults(asked.model)
        found = [_found(spec, contents) for spec in asked.conditions]
        asked = _turned(asked, found, defaults)
        request = asked.resolved(defaults)
        specs = [s.model_copy(update={"sha256": f.sha256}) for s, f in zip(request.conditions, found, strict=True)]
        inputs = [_Input(spec, f.source, f.sha256) for spec, f in zip(specs, found, strict=True)]
        request = request.model_copy(update={"conditions": specs})
        for note in rounding_notes(asked, request):
            report(GenerationEvent(kind="note", message=note))
        metadata = {
            "pusa": version("pusa"),
            "request": request.model_dump(mode="json"),
            "inputs": _carried(inputs),
        }
        return cls(request, inputs, metadata, report, stop, preview_every)

    def load(self, pipeline: PusaPipeline | None) -> None:
        request = self.request
        self.report(GenerationEvent(kind="stage", stage="load"))
        self.pipe = pipe = pipeline or _loaded(request.model, tuple(request.lora))
        pipe.scheduler = PusaFlowMatchEulerScheduler(shift=request.shift)
        if "pusa" in {name for names in pipe.get_list_adapters().values() for name in names}:
            second = {} if pipe.transformer_2 is None else {"transformer_2": request.alpha_2 or request.alpha}
            pipe.set_alpha({"transformer": request.alpha} | second)

    # ---- tasks ----

    def film(self) -> _Film:
        return getattr(self, f"_{self.request.task}")()

    def _generate(self) -> _Film:
        return _Film(pieces=self._chain(latent_frames(self.request.frames), self._conditions()))

    def _extend(self) -> _Film:
        """The end of the video is the beginning of the window; the file shows the video itself up to its end."""
        (given,) = self.inputs
        tail = self._read(given, last_frames=self.request.overlap)
        self._check_length(given, len(tail), self.request.overlap)
        known = PusaCondition(video=tail, latent_index=0, noise_multiplier=self._noise(given), fit=given.spec.fit)
        pieces = self._chain(latent_frames(self.request.frames), [known])
        return _Film(pieces=pieces, before=self._frames(given), skip=self.request.overlap)

    def _transition(self) -> _Film:
        """The end of the first video and the beginning of the second are the two ends of one window."""
        first, second = self.inputs
        if self.request.frames > self.request.window:
            raise ValueError(
                f"frames={self.request.frames}: a transition is made at once; give at most window={self.request.window}"
            )
        kept = latent_frames(self.request.overlap)
        tail = self._read(first, last_frames=self.request.overlap)
        head = self._read(second, max_frames=4 * kept)  # at later places each latent frame holds four frames
        self._check_length(first, len(tail), self.request.overlap)
        self._check_length(second, len(head), 4 * kept)
        latents = self._denoise(
            self.request.frames,
            [
                PusaCondition(video=tail, latent_index=0, noise_multiplier=self._noise(first), fit=first.spec.fit),
                self._ending(head, self._noise(second), second.spec.fit),
            ],
        )
        return _Film(
            pieces=[latents],
            before=self._frames(first),
            skip=self.request.overlap,
            drop=4 * kept,
            after=self._frames(second),
        )

    def _loop(self) -> _Film:
        """A clip, and a bridge from its end to its beginning; the bridge goes on in the clip's latents."""
        request = self.request
        kept = latent_frames(request.overlap)
        bridge_frames = latent_frames(request.window) - 2 * kept
        clip_frames = latent_frames(request.frames) - bridge_frames
        if clip_frames <= kept:
            raise ValueError(
                f"overlap={request.overlap} leaves too little for a loop of {request.frames} frames: "
                "give a smaller overlap or more frames"
            )

        def pieces() -> Iterator[Tensor]:
            head, tail = None, None
            for piece in self._chain(clip_frames, self._conditions(), later_steps=request.steps):
                head = piece[:, :, : kept + 1] if head is None else head
                tail = piece if tail is None else torch.cat([tail, piece], 2)[:, :, -kept:]
                yield piece
            assert head is not None
            assert tail is not None
            beginning = media.to_uint8(decode_video(self.pipe.vae, head))[: 4 * kept]
            known = [PusaCondition(latents=tail[0, :, -kept:], latent_index=0), self._ending(beginning, 0.0, "crop")]
            bridge = self._denoise(request.window, known, counted=True)
            yield bridge[:, :, kept:-kept]

        return _Film(pieces=pieces())

    def _ending(self, frames: np.ndarray, noise: Any, fit: Any) -> PusaCondition:
        """Frames that follow the window's free part: four to a latent frame, as at any place but the first."""
        return PusaCondition(
            video=frames, latent_index=-(len(frames) // 4), noise_multiplier=noise, encode="repeat", fit=fit
        )

    # ---- what is known ----

    def _conditions(self) -> list[PusaCondition]:
        return [self._condition(given) for given in self.inputs]

    def _condition(self, given: _Input) -> PusaCondition:
        spec, request = given.spec, self.request
        places = [p.latent_index(request.frames, request.fps) for p in spec.positions]
        shared = {"noise_multiplier": self._noise(given), "encode": spec.encode, "fit": spec.fit}
        if spec.kind == "image":
            image = media.read_image(given.source)
            return PusaCondition(image=image, latent_index=places[0], **shared)
        frames = self._read(given, max_frames=4 * max(places) + 1 if places else request.frames)
        return PusaCondition(video=frames, latent_index=places or 0, **shared)

    def _noise(self, given: _Input) -> list[float]:
        assert given.spec.noise is not None
        return given.spec.noise

    def _read(self, given: _Input, **part: int) -> np.ndarray:
        size = (self.request.width, self.request.height)
        return media.read_video(_rewound(given.source), fps=self.request.fps, fit=size, **part)

    def _frames(self, given: _Input) -> Iterator[np.ndarray]:
        """The whole video, as it appears in the file."""
        width, height = self.request.width, self.request.height
        source = _rewound(given.source)
        for frame in media.iter_video(source, fps=self.request.fps, fit=(width, height)):
            yield np.asarray(fit_image(frame, width, height, given.spec.fit))

    def _check_length(self, given: _Input, frames: int, needed: int) -> None:
        if frames < needed:
            raise ValueError(
                f"{given.spec.file} has {frames} frames at {self.request.fps:g} fps, {needed} are taken over: "
                "give a longer video or a smaller overlap"
            )

    # ---- denoising ----

    def _chain(self, total: int, conditions: list[PusaCondition], later_steps: int = 0) -> Iterable[Tensor]:
        window, overlap = latent_frames(self.request.window), latent_frames(self.request.overlap)
        if total <= window:
            return [self._denoise(total * 4 - 3, conditions, later_steps=later_steps)]
        covered = long_video.spans(total, window, overlap)
        self.steps_in_all = len(covered) * self.request.steps + later_steps
        return long_video.chain(
            covered, lambda s, known: self._denoise(s.length * 4 - 3, known, counted=True), conditions
        )

    def _denoise(
        self, frames: int, conditions: list[PusaCondition], *, counted: bool = False, later_steps: int = 0
    ) -> Tensor:
        """One window's latents ``[1, C, F, h, w]``. `counted`: its steps are in `steps_in_all` already."""
        request = self.request
        if not counted:
            self.steps_in_all = request.steps + later_steps
        if self.steps_done == 0:
            self.report(GenerationEvent(kind="stage", stage="denoise"))
            self.started = time.monotonic()
        return self.pipe(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            conditions=conditions,
            height=request.height,
            width=request.width,
            num_frames=frames,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            guidance_scale_2=None if self.pipe.config.boundary_ratio is None else request.guidance_2,
            generator=self.generator,
            output_type="latent",
            callback_on_step_end=self._after_step,
            callback_on_step_end_tensor_inputs=["denoised"],
            max_sequence_length=self.max_sequence_length,
            fps=request.fps,
        ).frames

    def _after_step(
        self, pipe: PusaPipeline, step: int, timestep: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Any]:
        self.check_stop()
        self.steps_done += 1
        per_step = (time.monotonic() - self.started) / self.steps_done
        self.report(
            GenerationEvent(
                kind="step",
                stage="denoise",
                step=self.steps_done,
                steps=self.steps_in_all,
                seconds_left=per_step * (self.steps_in_all - self.steps_done),
            )
        )
        if self.preview_every and self.steps_done % self.preview_every == 0:
            middle = tensors["denoised"].shape[2] // 2
            frame = media.to_uint8(decode_video(pipe.vae, tensors["denoised"][:1, :, middle : middle + 1]))
            self.report(GenerationEvent(kind="preview", stage="denoise", image=Image.fromarray(frame[0])))
        return {}

    def check_stop(self) -> None:
        if self.stop():
            raise _Ended

    # ---- the file ----

    def writer(self, output: Path) -> media.VideoWriter:
        request = self.request
        assert request.width
        assert request.height
        assert request.fps
        return media.VideoWriter(
            output, width=request.width, height=request.height, fps=request.fps, metadata=self.metadata
        )

    def write(self, film: _Film, writer: media.VideoWriter) -> None:
        """Decode and encode at once: no more than a chunk of frames is held."""
        saved = writer.path.with_suffix(".latents.safetensors")
        with writer, closing(self._shown(film, saved)) as chunks:
            for chunk in chunks:
                self.check_stop()
                writer.write(chunk)
        saved.unlink(missing_ok=True)
        self.report(GenerationEvent(kind="done", path=writer.path))

    def _shown(self, film: _Film, saved: Path) -> Generator[np.ndarray, None, None]:
        """uint8 chunks ``[n, H, W, 3]`` of the whole film."""
        yield from (frame[None] for frame in film.before)
        held: list[np.ndarray] = []  # the last frames, as long as they may have to be dropped
        to_skip = film.skip
        for chunk in self._decoded(film.pieces, saved):
            held.extend(chunk[to_skip:])
            to_skip = max(to_skip - len(chunk), 0)
            ready = len(held) - film.drop
            if ready > 0:
                yield np.stack(held[:ready])
                del held[:ready]
        yield from (frame[None] for frame in film.after)

    def _decoded(self, pieces: Iterable[Tensor], saved: Path) -> Iterator[np.ndarray]:
        """Frames of each piece as soon as it is denoised; latents that do not fit into memory are saved, not lost."""
        piece = torch.empty(0)
        frames_shown = 0

        def taken() -> Iterator[Tensor]:
            nonlocal piece, frames_shown
            for piece in pieces:
                frames_shown = 0
                self.report(GenerationEvent(kind="stage", stage="decode"))
                yield piece

        try:
            for chunk in decode_chunks(self.pipe.vae, taken()):
                yield media.to_uint8(chunk)
                frames_shown += chunk.shape[2]
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        save_latents(saved, piece, self.metadata)
        if not isinstance(pieces, list):  # later pieces would need the stream that has just broken
            raise DecodeMemoryError(_SAVED.format(saved=saved), piece)
        try:
            frames = decode_video(self.pipe.vae, piece)
        except DecodeMemoryError as error:
            raise DecodeMemoryError(_SAVED.format(saved=saved), piece) from error
        yield media.to_uint8(frames[:, :, frames_shown:])


_SAVED = "out of memory while decoding; the denoised latents are in {saved}: finish with `pusa decode {saved}`"


def _found(spec: ConditionSpec, contents: Mapping[str, bytes]) -> _Input:
    """The file of a condition, or its content carried by the video that is made again."""
    path = Path(spec.file)
    if spec.sha256 in contents:
        assert spec.sha256 is not None
        return _Input(spec, BytesIO(contents[spec.sha256]), spec.sha256)
    if not path.is_file():
        raise FileNotFoundError(f"{spec.file} is not here: the {spec.kind} is needed")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if spec.sha256 not in (None, digest):
        raise ValueError(f"{spec.file} has changed: the video was made from one with sha256 {spec.sha256[:12]}...")
    return _Input(spec, path, digest)


def _rewound(source: Path | BytesIO) -> Path | BytesIO:
    return BytesIO(source.getvalue()) if isinstance(source, BytesIO) else source


def _carried(inputs: list[_Input]) -> dict[str, str]:
    """Small inputs travel inside the video, so that it can be made again anywhere; the smallest first."""
    carried: dict[str, str] = {}
    room = MAX_INPUT_BYTES_INSIDE
    for size, given in sorted(((_size(i.source), i) for i in inputs), key=lambda pair: pair[0]):
        if size > room:
            break
        if given.sha256 not in carried:
            content = given.source.read_bytes() if isinstance(given.source, Path) else given.source.getvalue()
            carried[given.sha256] = base64.b64encode(content).decode()
            room -= size
    return carried


def _size(source: Path | BytesIO) -> int:
    return source.stat().st_size if isinstance(source, Path) else len(source.getvalue())


def _turned(request: GenerationRequest, inputs: list[_Input], defaults: zoo.GenerationDefaults) -> GenerationRequest:
    """An upright first input makes an upright video, where no size is asked for."""
    if request.width or request.height or not inputs or defaults.width == defaults.height:
        return request
    source = _rewound(inputs[0].source)
    if inputs[0].spec.kind == "image":
        width, height = media.read_image(source).size
    else:
        info = media.probe_video(source)
        width, height = info.width, info.height
    if (width > height) == (defaults.width > defaults.height) or width == height:
        return request
    return request.model_copy(update={"width": defaults.height, "height": defaults.width})


def _defaults(model: str) -> zoo.GenerationDefaults:
    known = zoo.find(model)
    return known.defaults if known else zoo.GenerationDefaults()


_resident: dict[tuple[str, tuple[str, ...]], PusaPipeline] = {}  # the last one used: models are large


def _loaded(model: str, loras: tuple[str, ...]) -> PusaPipeline:
    """The pipeline on its device, with its adapters."""
    key = model, loras
    if key not in _resident:
        _resident.clear()
        _resident[key] = _load(model, loras)
    return _resident[key]


def _load(model: str, loras: tuple[str, ...]) -> PusaPipeline:
    pipe = PusaPipeline.from_pretrained(model)
    known = zoo.find(model)
    sources: list[Any] = list(loras) or ([known.lora.fetch()] if known and known.lora else [])
    for number, source in enumerate(sources):
        pipe.load_pusa(source, alpha=1.0, adapter_name="pusa" if number == 0 else f"lora_{number}")
    pipe.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        needed_bytes = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
        free_bytes, _ = torch.cuda.mem_get_info()
        if needed_bytes < 0.8 * free_bytes:  # the rest is for activations
            pipe.to("cuda")
        else:
            pipe.enable_model_cpu_offload()
    return pipe
