"""A watermark goes through the interface into every frame, is found again, and is loud where it is not possible."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from media_samples import moving_gradient, psnr, write
from needs import missing

from pusa import media
from pusa.cli import main
from pusa.conditions import fit_image
from pusa.demo import PICTURES
from pusa.events import Note
from pusa.generate import generate
from pusa.provenance.options import MarkOptions
from pusa.provenance.watermark import detect, embed_stream, load_watermarker, payload_of, payload_text, register
from pusa.request import GenerationRequest


class Checkers:
    """Embed 32 bits in the brightness of 32 blocks against their neighbours: registered by the public interface."""

    name, bits, min_pixels = "checkers", 32, 96

    def __init__(self, argument: str | None = None) -> None:
        self.argument = argument

    def embed(self, frames: np.ndarray, payload: np.ndarray) -> np.ndarray:
        assert len(payload) == self.bits
        marked = frames.astype(np.int64)
        for number, bit in enumerate(payload):
            left, right = self._blocks(frames.shape, number)
            marked[left] += 12 * (2 * int(bit) - 1)
            marked[right] -= 12 * (2 * int(bit) - 1)
        return marked.clip(0, 255).astype(np.uint8)

    def read(self, frames: np.ndarray) -> np.ndarray:
        blocks = [self._blocks(frames.shape, number) for number in range(self.bits)]
        scores = [frames[left].mean((1, 2, 3)) - frames[right].mean((1, 2, 3)) for left, right in blocks]
        return np.stack(scores, axis=1)

    @staticmethod
    def _blocks(shape: tuple[int, ...], number: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        height, width = shape[1] // 4, shape[2] // 16
        row, column = number // 8 * height, number % 8 * 2 * width
        rows = slice(row, row + height)
        return tuple((slice(None), rows, slice(c, c + width)) for c in (column, column + width))  # type: ignore[return-value]


register("checkers", Checkers)


def grey(frames: int) -> np.ndarray:
    return np.full((frames, 64, 96, 3), 128, np.uint8)


def test_a_registered_watermark_is_in_every_frame_and_is_found(tmp_path: Path) -> None:
    request = GenerationRequest(model="tiny", prompt="a cat", seed=0, steps=1)
    for name, marks in (("plain", None), ("marked", MarkOptions(watermark="checkers"))):
        notes = [e.message for e in generate(request, tmp_path / f"{name}.mp4", marks=marks) if isinstance(e, Note)]
        lost = "the watermark checkers is made for 96 pixels and more: at 96x64 it may not be found again"
        assert (lost in notes) == (name == "marked")
    frames = media.read_video(tmp_path / "marked.mp4")
    stored = media.read_metadata(tmp_path / "marked.mp4") or {}
    assert stored["watermark"]["name"] == "checkers"
    assert len(frames) == 17
    difference = frames.astype(np.int64) - media.read_video(tmp_path / "plain.mp4") + 128
    for frame in difference.clip(0, 255).astype(np.uint8):
        found = detect(frame[None], load_watermarker("checkers"))
        assert found.found
        assert found.identifier == stored["watermark"]["payload"]
    result = CliRunner().invoke(main, ["replay", str(tmp_path / "marked.mp4"), "-o", str(tmp_path / "again.mp4")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "marked.mp4").read_bytes()
    words = ["replay", str(tmp_path / "marked.mp4"), "--watermark", "none", "-o", str(tmp_path / "without.mp4")]
    assert CliRunner().invoke(main, words).exit_code == 0
    assert np.array_equal(media.read_video(tmp_path / "without.mp4"), media.read_video(tmp_path / "plain.mp4"))


def test_the_detector_finds_what_is_there_and_nothing_else(tmp_path: Path) -> None:
    marker, payload = Checkers(), payload_of("a request", 32)
    write(tmp_path / "marked.mp4", marker.embed(grey(8), payload))
    write(tmp_path / "plain.mp4", moving_gradient(8))
    found = detect(media.read_video(tmp_path / "marked.mp4"), marker, payload)
    assert found.found
    assert found.identifier == payload_text(payload)
    assert found.bit_accuracy == 1.0
    assert not detect(media.read_video(tmp_path / "plain.mp4"), marker).found
    words = ["provenance", "detect", "--watermark", "checkers"]
    assert CliRunner().invoke(main, [*words, str(tmp_path / "marked.mp4")]).exit_code == 0
    assert CliRunner().invoke(main, [*words, str(tmp_path / "plain.mp4")]).exit_code == 1


def test_embedding_streams_in_chunks_and_keeps_every_frame() -> None:
    sizes: list[int] = []

    class Recorder(Checkers):
        def embed(self, frames: np.ndarray, payload: np.ndarray) -> np.ndarray:
            sizes.append(len(frames))
            return super().embed(frames, payload)

    chunks = list(embed_stream((grey(1) for _ in range(37)), Recorder(), payload_of("x", 32)))
    assert sizes == [16, 16, 5]
    assert sum(map(len, chunks)) == 37


def test_a_watermark_that_is_not_possible_is_said_before_any_work(tmp_path: Path) -> None:
    def told(text: str) -> str:
        words = ["generate", "a cat", "--model", "tiny", "--watermark", text, "-o", str(tmp_path / "x.mp4")]
        result = CliRunner().invoke(main, words)
        assert result.exit_code in (1, 2)
        assert list(tmp_path.glob("*")) == []
        return result.output

    assert "rivagan, videoseal" in told("unknown")
    assert "videoseal needs its TorchScript file" in told("videoseal")
    assert "there is no such file" in told("videoseal:nowhere.jit")
    assert "takes no file" in told("rivagan:file")


def test_videoseal_is_called_as_its_torchscript_file_wants_it(tmp_path: Path) -> None:
    """A script with the methods of the original file; the file itself is not here."""

    class Stand(torch.nn.Module):
        def forward(self, imgs: torch.Tensor) -> torch.Tensor:
            return imgs

        @torch.jit.export
        def embed(self, imgs: torch.Tensor, msgs: torch.Tensor, is_video: bool = False) -> torch.Tensor:
            marked = imgs.clone()
            marked[:, 0, 0, :256] = msgs.expand(imgs.shape[0], 256)
            return marked

        @torch.jit.export
        def detect(self, imgs: torch.Tensor, is_video: bool = False) -> torch.Tensor:
            return torch.cat([torch.zeros(imgs.shape[0], 1), imgs[:, 0, 0, :256] - 0.5], dim=1)

    torch.jit.script(Stand()).save(str(tmp_path / "model.jit"))
    marker, payload = load_watermarker(f"videoseal:{tmp_path / 'model.jit'}"), payload_of("x", 256)
    frames = np.full((3, 16, 320, 3), 100, np.uint8)
    marked = marker.embed(frames, payload)
    assert (marked[:, 1:] == frames[:, 1:]).all()
    assert detect(marked, marker, payload).bit_accuracy == 1.0
    assert detect(marked, marker).found
    (tmp_path / "other.jit").write_bytes(b"no TorchScript")
    with pytest.raises(ValueError, match="is no TorchScript file"):
        load_watermarker(f"videoseal:{tmp_path / 'other.jit'}")


def test_rivagan_survives_compression_and_scaling(tmp_path: Path) -> None:
    try:
        marker, payload = load_watermarker("rivagan"), payload_of("a request", 32)
    except RuntimeError as error:
        missing("watermark", str(error))
    picture = np.asarray(fit_image(media.read_image(PICTURES / "rabbit.png"), 320, 192))
    frames = np.stack([picture, picture])
    marked = marker.embed(frames, payload)
    assert psnr(marked, frames) > 36
    write(tmp_path / "marked.mp4", marked, crf=23)
    found = detect(media.read_video(tmp_path / "marked.mp4"), marker, payload)
    assert found.found
    assert found.bit_accuracy == 1.0
    half = marked.reshape(2, 96, 2, 160, 2, 3).mean(axis=(2, 4)).round().astype(np.uint8)
    assert detect(half, marker).found
    assert not detect(frames, marker).found
