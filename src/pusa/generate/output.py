"""Write the video of a run: decode its latents as they are denoised, join its parts, and lose nothing if that fails."""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pusa import media
from pusa.acceleration.ranks import RankError
from pusa.events import Frames, Report, RunEnded, Stage
from pusa.generate.marks import ResultMarks
from pusa.generate.tasks import OutputPlan
from pusa.models.finite import check_decoded
from pusa.models.vae import DecodeError, DecodeMemoryError, decode_chunks, decode_video, is_out_of_memory
from pusa.pipeline import PusaPipeline
from pusa.request import ResolvedRequest

FADE_FRAMES = 8  # half a second at Wan's rate


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


def check_output(output: Path, request: ResolvedRequest) -> None:
    """Raise ValueError, FileNotFoundError or MediaError if this video cannot be written under this name."""
    if (
        output.suffix.lower() == ".png"
        and "%" not in output.name
        and (request.frames > 1 or request.task != "generate")
    ):
        raise ValueError(f"{output} holds one picture: give a folder, %04d.png or .mp4 for a video")
    media.VideoWriter(output, width=request.width, height=request.height, fps=request.fps)


def open_writer(output: Path, request: ResolvedRequest, marks: ResultMarks) -> media.VideoWriter:
    """Make the writer of a request's video, with what the file tells of itself."""
    return media.VideoWriter(
        output,
        width=request.width,
        height=request.height,
        fps=request.fps,
        crf=request.crf,
        metadata=marks.metadata,
        xmp=marks.xmp,
        seal=marks.seal,
    )


def write_output(
    writer: media.VideoWriter,
    plan: OutputPlan,
    pipe: PusaPipeline,
    marks: ResultMarks,
    report: Report,
    stop: Callable[[], bool],
    take_smaller_plan: Callable[[str], bool],
    growing: media.GrowingVideo | None = None,
) -> None:
    """Decode and write the video chunk by chunk, so that memory does not grow with its length."""
    saved = writer.path.with_suffix(".latents.safetensors")
    existed = saved.exists()
    with TemporaryFile() as file:  # on disk, so that memory does not grow with the video
        path = None if growing is None else growing.path
        pieces = _Pieces(plan.pieces, file, report, lambda: report(Frames(writer.frames_written, plan.frames, path)))
        decoded = _decoded(pieces, pipe, lambda z: save_latents(saved, z, marks.for_latents), take_smaller_plan)
        try:
            with writer, growing or nullcontext():
                for frames in marks.embed(output_frames(plan, decoded)):
                    if stop():
                        raise RunEnded
                    writer.write(frames)
                    if growing is not None:
                        growing.write(frames)
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

    Args:
        consumed: called when the frames of a piece are written, unless it is the only one.

    Attributes:
        denoised: how many pieces there have been.
        is_denoising: the next piece is being made, so that an error is not one of decoding.
        are_all_denoised: no piece is left to make.
    """

    def __init__(
        self, pieces: Iterable[Tensor], file: IO[bytes], report: Report, consumed: Callable[[], None] = lambda: None
    ) -> None:
        self._pieces, self._file, self._report, self._consumed = iter(pieces), file, report, consumed
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
            if not self.are_all_denoised:
                self._consumed()
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
