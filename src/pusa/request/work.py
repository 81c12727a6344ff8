"""Count the work that a request is: tokens, windows and steps."""

from pusa.positions import latent_frames, spans
from pusa.request.generation import ResolvedRequest
from pusa.waves import wave_steps


def tokens_of(request: ResolvedRequest, pixels: int) -> int:
    """Count the tokens of a request's clip, or of a window of it, where one stands for `pixels` squared."""
    frames = latent_frames(min(request.frames, request.window), request.frames_per_latent)
    return frames * (request.height // pixels) * (request.width // pixels)


def windows_of(request: ResolvedRequest) -> int:
    """Count the windows that a request's video is denoised in; a loop's last one is its bridge."""
    factor, total = request.frames_per_latent, request.clip_length
    window, overlap = latent_frames(request.window, factor), latent_frames(request.overlap, factor)
    return (1 if request.bridge_length else 0) + (len(spans(total, window, overlap)) if total > window else 1)


def steps_of(request: ResolvedRequest) -> int:
    """Count the denoising steps of a request's video; a wave has fewer for each frame that it keeps."""
    if request.delay is None:
        return request.steps * windows_of(request)
    lengths = filter(None, (request.clip_length, request.bridge_length))
    return sum(wave_steps(length, request.steps, request.delay) for length in lengths)
