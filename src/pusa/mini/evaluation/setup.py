"""Load a model of the small world for evaluation: its pipeline, the world, probes, templates and real clips."""

import copy
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pusa import zoo
from pusa.conditions import PusaCondition
from pusa.evaluation.metrics import Figure, frechet_distance, mean, rate
from pusa.lora.adapters import adapter_names
from pusa.media import to_uint8
from pusa.media.previews import Strip
from pusa.mini.evaluation.probes import (
    DIRECTIONS,
    MOTION_FRAMES,
    FrameProbe,
    MotionProbe,
    Predictions,
    Probes,
    train_probes,
)
from pusa.mini.evaluation.templates import Matcher, Track, direction_of, motion_of
from pusa.mini.world import pictures
from pusa.mini.world.columns import Columns
from pusa.mini.world.edition import FIRST, edition_of
from pusa.mini.world.scenery import PLACES
from pusa.mini.world.vocabulary import CAMERAS, MOTIONS
from pusa.mini.world.world import Scenes, World, draw_scenes
from pusa.models.vae import decode_video, encode_video
from pusa.pipeline import PusaPipeline

logger = logging.getLogger(__name__)

BATCH = 4  # clips at once: more gain nothing on a CPU
_PRINCIPAL = 8  # features that the Frechet distance compares; few, because samples are few
REFERENCE_CLIPS = 256


@dataclass(frozen=True)
class Clips(Columns):
    """Real clips: their scenes, pixels, latents and reconstructions by the VAE."""

    scenes: Scenes
    video: Tensor  # [B, 3, F, H, W] in -1..1, in steps of one grey level
    latents: Tensor  # [B, C, f, h, w]
    rebuilt: Tensor  # as video


Row = dict[str, Figure]
Table = dict[str, Row]


@dataclass
class Part:
    """Hold the results of a part of the evaluation: tables by title, and rows of a contact sheet."""

    tables: dict[str, Table] = field(default_factory=dict)
    strips: list[Strip] = field(default_factory=list)

    def show(self, labels: Iterable[str], video: Tensor, held: Sequence[int] = ()) -> None:
        """Add clips ``[B, 3, F, H, W]`` to the sheet; `held` are the frames that the model was given."""
        for label, clip in zip(labels, video, strict=False):
            self.strips.append(Strip(label, to_uint8(clip[None]), held=held))


def share(clips: int, part: float) -> int:
    """Return a part of the number of clips, at least 2."""
    return max(2, round(part * clips))


class Evaluator:
    """Generate, draw and classify clips for all parts of the evaluation.

    Args:
        pipe: the model, its adapter attached if it has one.
        model: its name or folder, which gives its size, length and other defaults (`pusa.zoo.defaults_of`).
        world: draws the real clips; one motion takes as many frames as a clip has.
        probes: trained to tell the model's things apart, or more.

    Raises:
        ValueError: the model's frames are no squares, as the world's are.
    """

    def __init__(self, pipe: PusaPipeline, model: str | Path, world: World, probes: Probes) -> None:
        self.pipe, self.model, self.world, self.probes = pipe, str(model), world, probes
        self.defaults, self.things = zoo.defaults_of(model), probes.things
        self.known = sum(index < self.things for index in world.edition.things)  # the model knows so many of them
        if self.defaults.width != self.defaults.height:
            size = f"{self.defaults.width}x{self.defaults.height}"
            raise ValueError(f"{model}: {size} pixels; the small world is square, and so must its model's frames be")
        self.matcher = Matcher(world.sprites[: self.things])
        pipe.set_progress_bar_config(disable=True)

    @property
    def has_adapter(self) -> bool:
        return "pusa" in adapter_names(self.pipe.transformer)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Switch the adapter off within the context, which gives the base model bit for bit."""
        self.pipe.set_alpha(0.0)
        try:
            yield
        finally:
            self.pipe.set_alpha(self.defaults.alpha)

    # ---- real clips ----

    def scenes(
        self, count: int, seed: int, *, held_out: bool = False, motions: Sequence[str] = tuple(MOTIONS)
    ) -> Scenes:
        """Draw scenes of single things in places, all `motions` equally often, the camera moving in half of them.

        Args:
            held_out: True: combinations that training never drew; False: those it may have drawn.
        """
        parts: list[Scenes] = []
        wanted = [list(MOTIONS).index(motion) for motion in motions]
        edition = self.world.edition
        drawn = draw_scenes(100 * count, seed, things=self.known, held_out=held_out, edition=edition)
        drawn = drawn[(drawn.second < 0) & (drawn.thing >= 0) & (drawn.place < len(PLACES))]
        for number in range(count):
            of_motion = (drawn.motion == wanted[number % len(wanted)]).nonzero().flatten()
            index = int(of_motion[number // len(wanted)])
            parts.append(drawn[index : index + 1])
        scenes = Scenes.cat(parts)
        moving = torch.arange(count) % 2 == 1
        turn = torch.randperm(count, generator=torch.Generator().manual_seed(seed)) % (len(CAMERAS) - 1) + 1
        return Scenes(**{**vars(scenes), "camera": torch.where(moving, turn, 0)})

    def real(self, scenes: Scenes, *, world: World | None = None) -> Clips:
        """Draw clips, encode them and decode their latents."""
        video, latents = self.draw(scenes, world=world)
        return Clips(scenes, video, latents, self.decode(latents))

    def draw(self, scenes: Scenes, *, world: World | None = None) -> tuple[Tensor, Tensor]:
        """Draw clips ``[B, 3, F, H, W]`` in steps of one grey level and encode them to latents ``[B, C, f, h, w]``."""
        world = world or self.world
        videos, latents = [], []
        for first in range(0, len(scenes), BATCH):
            video, _ = world.render(scenes[first : first + BATCH], self.defaults.num_frames, size=self.defaults.width)
            video = (video * 127.5 + 127.5).round() / 127.5 - 1
            videos.append(video)
            latents.append(encode_video(self.pipe.vae, video))
        return torch.cat(videos), torch.cat(latents)

    # ---- the model ----

    def denoise(
        self,
        prompts: Sequence[str],
        conditions: Sequence[Sequence[PusaCondition]] | None = None,
        *,
        steps: int | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> Tensor:
        """Generate latents of a clip per prompt, ``[B, C, f, h, w]``; its noise depends on its index and `seed`.

        With all prompts empty, both passes of guidance are equal: leaving it out halves the time for the same clip.

        Args:
            settings: arguments of the pipeline, in place of the model's own size, steps and guidance.
        """
        d = self.defaults
        guided = any(prompts) or bool(d.negative_prompt)
        arguments: dict[str, Any] = {
            "negative_prompt": d.negative_prompt,
            "height": d.height,
            "width": d.width,
            "num_frames": d.num_frames,
            "num_inference_steps": steps or d.steps,
            "guidance_scale": d.guidance if guided else 1.0,
            "max_sequence_length": d.max_sequence_length,
            "fps": d.fps,
        } | settings
        latents = []
        for first in range(0, len(prompts), BATCH):
            chosen = slice(first, min(first + BATCH, len(prompts)))
            condition_arguments: dict[str, Any] = (
                {} if conditions is None else {"conditions": [list(some) for some in conditions[chosen]]}
            )
            latents.append(
                self.pipe(
                    list(prompts[chosen]),
                    generator=[torch.Generator().manual_seed(seed + i) for i in range(chosen.start, chosen.stop)],
                    output_type="latent",
                    **arguments,
                    **condition_arguments,
                ).frames.float()
            )
        return torch.cat(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to video ``[B, 3, F, H, W]`` in -1..1."""
        return torch.cat([decode_video(self.pipe.vae, some).float() for some in latents.split(BATCH)])

    def digest(self) -> str:
        """Hash the weights of the transformer."""
        return _digest(self.pipe.transformer)

    # ---- judgement ----

    def classify(self, video: Tensor) -> Predictions:
        return Predictions.cat([self.probes.classify(some) for some in video.split(16)])

    def thing_in(self, frames: Tensor) -> Tensor:
        """Classify the thing in frames ``[B, 3, n, H, W]``, averaged over n: ``[B]``."""
        _, things, _ = self.probes.classify_frames(frames.transpose(1, 2).flatten(0, 1).float())
        return things.unflatten(0, (len(frames), -1)).mean(1).argmax(1)

    def caption_figures(self, scenes: Scenes, video: Tensor) -> dict[str, Figure]:
        """Measure how many clips show what their captions say, by the probes and by the track of the named sprite."""
        predictions = self.classify(video)
        track = self.matcher.track(video, scenes.thing)
        directed = torch.isin(scenes.motion, DIRECTIONS)
        by_track = direction_of(track, scenes.camera, self.world.edition.style)
        return {
            **self.probe_figures(scenes, predictions),
            **self.track_figures(scenes, track),
            "direction by track": rate((by_track == scenes.motion)[directed]),
            "Frechet": self.frechet(predictions.features),
        }

    def track_figures(self, scenes: Scenes, track: Track) -> dict[str, Figure]:
        """Measure how well the named sprites were found, and how many clips move as captioned; without probes."""
        by_track = motion_of(track, scenes.camera, self.matcher.distinctness[scenes.thing], self.world.edition.style)
        return {
            "sprite match": mean(self.sprite_match(track)),
            "motion by track": rate(by_track == scenes.motion),
        }

    @staticmethod
    def probe_figures(scenes: Scenes, predictions: Predictions) -> dict[str, Figure]:
        """Measure how often the predictions of the probes agree with the captions."""
        directed, moving = torch.isin(scenes.motion, DIRECTIONS), scenes.camera > 0
        return {
            "thing": rate(predictions.thing == scenes.thing),
            "motion": rate(predictions.motion == scenes.motion),
            "direction": rate((predictions.direction == scenes.motion)[directed]),
            "place": rate(predictions.place == scenes.place),
            "camera": rate((predictions.camera == scenes.camera)[moving]),
        }

    def chance(self) -> dict[str, Figure]:
        """Return the figures that guessing would reach."""
        motion, direction = {"value": 1 / len(MOTIONS)}, {"value": 1 / len(DIRECTIONS)}
        return {
            "thing": {"value": 1 / self.known},
            "motion": motion,
            "direction": direction,
            "place": {"value": 1 / len(PLACES)},
            "camera": {"value": 1 / len(CAMERAS)},
            "motion by track": motion,
            "direction by track": direction,
        }

    @staticmethod
    def sprite_match(track: Track) -> Tensor:
        """Average the score of the three best moments, ``[B]``: a thing may fade, or leave."""
        return track.score.topk(3, dim=1).values.mean(1)

    @cached_property
    def _reference(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compute features of real clips in their principal directions, their mean and these directions."""
        coarse = copy.copy(self.world)
        coarse.motion_frames = MOTION_FRAMES - 1  # the same moments, drawn without the frames between them
        scenes = self.scenes(REFERENCE_CLIPS, seed=31)
        predictions = [
            self.classify(
                coarse.render(scenes[first : first + 16], MOTION_FRAMES, size=self.defaults.width)[0]
            ).features
            for first in range(0, len(scenes), 16)
        ]
        features = torch.cat(predictions)
        middle = features.mean(0)
        _, _, directions = torch.linalg.svd(features - middle, full_matrices=False)
        directions = directions[:_PRINCIPAL].T  # [D, 8]
        return (features - middle) @ directions, middle, directions

    def frechet(self, features: Tensor) -> Figure:
        """Compute the Frechet distance from real clips, by features ``[B, D]`` in eight principal directions."""
        if len(features) < 2:
            return {"value": None, "n": len(features)}
        reference, middle, directions = self._reference
        return {"value": frechet_distance((features - middle) @ directions, reference), "n": len(features)}


def image_of(video: Tensor, frame: int) -> Tensor:
    """Return a frame of ``[3, F, H, W]`` in -1..1 as a picture for `PusaCondition`, ``[3, H, W]`` in 0..1."""
    return ((video[:, frame] + 1) / 2).clamp(0, 1)


# ---- loading ---------------------------------------------------------------------------------------------------------


def load_evaluator(model: str | Path, cache: Path, out: Path | None) -> Evaluator:
    """Load a model of the small world, and train its probes or read them from `out`.

    Args:
        model: the embedded model's name, or a folder with a ``pusa.json`` of our recipe.
        cache: the folder of the world's pictures, which are downloaded if missing (`pusa.mini.world.pictures.fetch`).
        out: the folder that keeps ``probes.safetensors``; None: for figures that need no probes, which stay untrained.

    Raises:
        ValueError: the model does not say which things of the small world it knows, or its frames are no squares.
        FileNotFoundError, RuntimeError: pictures cannot be fetched.
    """
    entry = zoo.find(model)
    if entry is None or not entry.words.get("things"):
        raise ValueError(
            f"{str(model)!r} does not list the small world's things (words in pusa.json): only the embedded model and "
            "folders that its recipe has made can be evaluated here"
        )
    defaults = entry.defaults
    pictures.fetch(cache)
    pipe = PusaPipeline.from_pretrained(model)
    if entry.lora is not None and "pusa" not in adapter_names(pipe.transformer):
        pipe.load_pusa(entry.lora.fetch(), alpha=defaults.alpha)
    if "pusa" in adapter_names(pipe.transformer):
        pipe.set_alpha(defaults.alpha)
    edition = FIRST if entry.folder is None else edition_of(entry.folder)
    world = World(
        pictures.load_sprites(cache),
        pictures.load_photographs(cache),
        motion_frames=defaults.num_frames - 1,
        edition=edition,
    )
    things = edition.span(len(entry.words["things"]))
    if out is None:
        probes = Probes(FrameProbe(things), MotionProbe(), things)
    else:
        probes = probes_for(pipe, world, things=things, size=defaults.width, file=out / "probes.safetensors")
    return Evaluator(pipe, model, world, probes)


def probes_for(pipe: PusaPipeline, world: World, *, things: int, size: int, file: Path, **training: Any) -> Probes:
    """Load the probes in `file` if they were trained for this VAE and world; else train and save them there.

    `training` goes to `train_probes`.
    """
    wanted = (
        f"4 {world.edition.name} {things} things, {size} pixels, {world.motion_frames} frames, "
        f"VAE {_digest(pipe.vae)}, {training}"
    )
    probes = Probes.load(file, wanted)
    if probes is None:
        logger.info("training the probes")
        probes = train_probes(world, pipe.vae, things=things, size=size, **training)
        file.parent.mkdir(parents=True, exist_ok=True)
        probes.save(file, wanted)
    return probes


def _digest(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in module.state_dict().values():
        digest.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
