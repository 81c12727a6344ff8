"""Track a known sprite through a video by template matching at all places, sizes and angles, without learning.

The score of a placement compares the sprite with the plain colour around it: 1 if the sprite explains all pixels
inside, 0 if it explains them no better. The motion of a track is the one whose path in the world fits best.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from pusa.mini.evaluation.probes import moments, resize
from pusa.mini.world.columns import Columns
from pusa.mini.world.edition import FIRST, MotionStyle
from pusa.mini.world.vocabulary import MOTIONS
from pusa.mini.world.world import camera_view, motion_path

SEARCHED_FRAMES = 9  # frames of a clip that are searched
_COARSE, _FINE = 24, 40  # pixels of the frames that are searched, first and then nearby
_CENTRE_STEP = 2  # coarse pixels between the centres that are tried, from edge to edge
_SCALES = (0.38, 0.48, 0.6, 0.75, 0.93, 1.15)  # half the sprite's width, in halves of the frame
_ANGLES = 12
_REFINEMENTS = ((0.08, 0.12, 0.2), (0.04, 0.06, 0.1), (0.02, 0.03, 0.05))  # spread of place, log scale and angle
_TRIES = 48
_RIM = 0.14  # of the sprite's width
_MARGIN = 0.2  # around the sprite, for the rim
_NOISE = 0.002  # variance that need not be explained
_LEAST_SHOWN = 0.4  # of the sprite's area
# How exactly each quantity of a track is expected to follow a path.
_PLACE_SPREAD, _SCALE_SPREAD, _ANGLE_SPREAD, _VISIBLE_SPREAD = 0.12, 0.12, 0.35, 0.25


@dataclass(frozen=True)
class Track(Columns):
    """Hold the placements of a thing in B clips at L moments, ``[B, L]`` each.

    Centre `x`, `y` and half size `scale` in halves of the frame, `angle` in radians, `score` in 0..1; `density` is how
    much of the squared difference from its surroundings the sprite explains, for its size.
    """

    x: Tensor
    y: Tensor
    scale: Tensor
    angle: Tensor
    score: Tensor
    density: Tensor


class Matcher:
    """Match sprites with frames.

    Args:
        sprites: ``[T, 4, S, S]``, RGB premultiplied by alpha, 0..1, as `pusa.mini.world.world.World` takes them.
    """

    def __init__(self, sprites: Tensor) -> None:
        # Sampled sparsely, fine detail would be noise: about one pixel of the frame for one of the sprite.
        self._coarse, self._fine = (_with_rim(resize(sprites[:, :4], size)) for size in (18, 30))
        self._width = 1 + 2 * _MARGIN

    @cached_property
    def distinctness(self) -> Tensor:
        """Measure how much each sprite changes when rotated, ``[T]`` in 0..1: a ball looks alike at all angles."""
        return torch.stack([self._distinctness(sprite) for sprite in self._fine])

    @torch.no_grad()
    def track(self, video: Tensor, thing: Tensor) -> Track:
        """Follow thing ``[B]`` through video ``[B, 3, F, H, W]`` in -1..1; each clip shows it one way round."""
        searched = video[:, :, moments(video.shape[2], SEARCHED_FRAMES)]
        frames = (searched.float().transpose(1, 2) + 1) / 2  # [B, L, 3, H, W]
        found = torch.empty(len(video), SEARCHED_FRAMES, 6)
        for index in thing.unique():
            chosen = (thing == index).nonzero().flatten()
            some = frames[chosen].flatten(0, 1)
            small, large = (resize(some, size) for size in (_COARSE, _FINE))
            scores, places = self._search(int(index), small)  # [2, N], [2, N, 4]
            mirrored = (
                scores.unflatten(1, (-1, SEARCHED_FRAMES)).sum(2).argmax(0).repeat_interleave(SEARCHED_FRAMES)
            )  # [N]
            best = self._refine(int(index), large, places[mirrored, torch.arange(len(some))], mirrored)
            found[chosen] = best.unflatten(0, (-1, SEARCHED_FRAMES))
        return Track(*found.unbind(-1))

    # ---- search ----

    def _search(self, thing: int, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Find the best gain and placement (x, y, scale, angle) on the coarse grid, unmirrored and mirrored.

        Returns [2, N] and [2, N, 4].
        """
        pixels = frames.flatten(2)  # [N, 3, P]
        squares = pixels.square().sum(1)  # [N, P]
        scores, places = [], []
        for mirror in (0, 1):
            best, best_place = torch.full((len(frames),), -math.inf), torch.zeros(len(frames), 4)
            for scale in _SCALES:
                place, drawn = self._everywhere(self._coarse[thing], scale, mirror)  # [K, 4], [K, 5, P]
                colour, alpha, rim = drawn[:, :3], drawn[:, 3], drawn[:, 4]  # [K, 3, P], [K, P]
                area = alpha.sum(1)[:, None]
                errors = _errors(
                    squares=alpha @ squares.T,
                    sprite_image=torch.einsum("kcp,ncp->kn", colour, pixels),
                    sprite_squares=_over_alpha(colour, alpha)[:, None],
                    alpha=area,
                    image=torch.einsum("kp,ncp->kcn", alpha, pixels),
                    around=torch.einsum("kp,ncp->kcn", rim / rim.sum(1, keepdim=True).clamp(min=1e-3), pixels),
                )
                full_area = self._coarse[thing, 3].mean() * (self._width * scale * _COARSE) ** 2
                gain = _gain(*errors, scale).masked_fill(area < _LEAST_SHOWN * full_area, -math.inf)  # [K, N]
                top, index = gain.max(0)
                better = top > best
                best, best_place = (
                    torch.where(better, top, best),
                    torch.where(better[:, None], place[index], best_place),
                )
            scores.append(best)
            places.append(best_place)
        return torch.stack(scores), torch.stack(places)

    def _everywhere(self, sprite: Tensor, scale: float, mirror: int) -> tuple[Tensor, Tensor]:
        """Draw the sprite at all centres and angles: placements ``[K, 4]`` and coarse pictures ``[K, 5, P]``."""
        turns = torch.arange(_ANGLES) / _ANGLES * 2 * math.pi
        middle = torch.stack([0 * turns, 0 * turns, torch.full_like(turns, scale), turns], dim=1)
        # Drawn once on a canvas of twice the frame's width; the frame, moved over it, sees it at other places.
        canvas = self._draw(sprite, middle, torch.full((_ANGLES,), mirror), 2 * _COARSE, reach=2.0)
        windows = canvas.unfold(2, _COARSE, _CENTRE_STEP).unfold(3, _COARSE, _CENTRE_STEP)  # [A, 5, Y, X, size, size]
        count = windows.shape[2]
        centres = torch.linspace(1, -1, count)
        y, x, turn = torch.meshgrid(centres, centres, turns, indexing="ij")
        place = torch.stack([x, y, torch.full_like(x, scale), turn], dim=-1).flatten(0, 2)
        return place, windows.permute(2, 3, 0, 1, 4, 5).flatten(0, 2).flatten(2)

    def _refine(self, thing: int, frames: Tensor, place: Tensor, mirrored: Tensor) -> Tensor:
        """Refine `place` ``[N, 4]`` by random steps of decreasing length: placement, score and density ``[N, 6]``."""
        generator = torch.Generator().manual_seed(0)
        count = len(frames)
        pixels = frames.flatten(2)[:, None]  # [N, 1, 3, P]
        score = density = torch.zeros(count)
        for spread in _REFINEMENTS:
            step = torch.randn(count, _TRIES, 4, generator=generator) * torch.tensor([spread[0], *spread])
            step[:, 0] = 0
            tried = place[:, None] + step
            tried[..., 2] = place[:, None, 2] * torch.exp(step[..., 2])
            sides = mirrored[:, None].expand(-1, _TRIES).flatten()
            drawn = self._draw(self._fine[thing], tried.flatten(0, 1), sides, _FINE)
            drawn = drawn.flatten(2).unflatten(0, (count, _TRIES))  # [N, K, 5, P]
            colour, alpha, rim = drawn[:, :, :3], drawn[:, :, 3], drawn[:, :, 4]
            plain = rim / rim.sum(2, keepdim=True).clamp(min=1e-3)
            area = alpha.sum(2)
            of_sprite, of_plain = _errors(
                squares=(alpha * pixels.square().sum(2)).sum(2),
                sprite_image=(colour * pixels).sum((2, 3)),
                sprite_squares=_over_alpha(colour, alpha),
                alpha=area,
                image=(alpha[:, :, None] * pixels).sum(3).transpose(1, 2),
                around=(plain[:, :, None] * pixels).sum(3).transpose(1, 2),
            )
            index = _gain(of_sprite, of_plain, tried[..., 2]).argmax(1)
            rows = torch.arange(count)
            place = tried[rows, index]
            sprite_error, plain_error = of_sprite[rows, index], of_plain[rows, index]
            score = (1 - sprite_error / (plain_error + 3 * _NOISE * area[rows, index]).clamp(min=1e-3)).clamp(min=0)
            density = (plain_error - sprite_error) / (_FINE * place[:, 2]).square()
        return torch.cat([place, score[:, None], density[:, None]], dim=1)

    def _draw(self, sprite: Tensor, place: Tensor, mirrored: Tensor, size: int, reach: float = 1.0) -> Tensor:
        """Draw the sprite and its rim at places ``[K, 4]``: ``[K, 5, size, size]``; angles and sides as in the world.

        The picture shows from -`reach` to `reach`, in halves of the frame.
        """
        axis = ((torch.arange(size) + 0.5) / size * 2 - 1) * reach
        x, y, scale, angle = (column[:, None, None] for column in place.unbind(1))
        dx, dy = axis - x, axis[:, None] - y  # [K, 1, size], [K, size, 1]
        cos, sin = torch.cos(angle), torch.sin(angle)
        side = torch.where(mirrored.bool(), -1.0, 1.0).view(-1, 1, 1)
        grid = torch.stack([side * (cos * dx + sin * dy), cos * dy - sin * dx], dim=-1) / (
            scale[..., None] * self._width
        )
        # One picture of many placements side by side, so that the sprite is not repeated.
        flat = grid.reshape(1, -1, size, 2)
        drawn = F.grid_sample(sprite[None], flat, padding_mode="zeros", align_corners=False)[0]
        return drawn.unflatten(1, (len(place), size)).transpose(0, 1)

    def _distinctness(self, sprite: Tensor) -> Tensor:
        """Compute 1 minus how well the sprite, rotated by 40 degrees or more, still fits itself."""
        turns = torch.tensor([(0.0, 0.0, 0.8, math.radians(angle)) for angle in range(40, 321, 20)])
        upright = self._draw(sprite, torch.tensor([(0.0, 0.0, 0.8, 0.0)]), torch.zeros(1), _FINE)[0]
        rotated = self._draw(sprite, turns, torch.zeros(len(turns)), _FINE)
        image = upright[:3] + 0.5 * (1 - upright[3])
        inside = upright[3] + upright[4]
        other = rotated[:, :3] + 0.5 * (1 - rotated[:, 3:4])
        error = (inside * (image - other).square()).sum((1, 2, 3))
        middle = (inside * image).sum((1, 2), keepdim=True) / inside.sum()
        return (error / (inside * (image - middle).square()).sum()).amin().clamp(0, 1)


def _with_rim(sprites: Tensor) -> Tensor:
    """Add a margin to sprites ``[T, 4, S, S]``, and the rim around each as a fifth channel."""
    pad, reach = round(_MARGIN * sprites.shape[-1]), round(_RIM * sprites.shape[-1])
    padded = F.pad(sprites, (pad, pad, pad, pad))
    around = F.max_pool2d(padded[:, 3:], 2 * reach + 1, stride=1, padding=reach)
    return torch.cat([padded, (around - padded[:, 3:]).clamp(min=0)], dim=1)


def _over_alpha(colour: Tensor, alpha: Tensor) -> Tensor:
    """Sum alpha times colour squared, of colours that are premultiplied by alpha: ``[..., 3, P]`` to ``[...]``."""
    return (colour.square().sum(-2) / alpha.clamp(min=1e-3)).sum(-1)


def _gain(of_sprite: Tensor, of_plain: Tensor, scale: Tensor | float) -> Tensor:
    """Rate placements by the squared error that they explain, relative to their size.

    Not the ratio of the errors: a part of a plain sprite is explained as well as all of it, but stands out less from
    what is around it.
    """
    return (of_plain - 1.5 * of_sprite) / scale**2


def _errors(
    *, squares: Tensor, sprite_image: Tensor, sprite_squares: Tensor, alpha: Tensor, image: Tensor, around: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute squared errors inside the sprite: of the sprite, and of the plain colour around it.

    All are sums over pixels, ``[K, N]`` of K placements in N frames or the other way round: alpha times the image
    squared, the sprite times the image, alpha times the sprite squared, alpha, and with colours ``[K, 3, N]`` alpha
    times the image, and the mean of the image over the rim.
    """
    of_sprite = squares - 2 * sprite_image + sprite_squares
    of_plain = squares - (2 * around * image - around.square() * alpha.unsqueeze(1)).sum(1)
    return of_sprite, of_plain


# ---- from tracks to motions ------------------------------------------------------------------------------------------


def motion_of(track: Track, camera: Tensor, distinctness: Tensor, style: MotionStyle = FIRST.style) -> Tensor:
    """Classify the motion whose path fits each track best, ``[B]`` indices into `MOTIONS`.

    Args:
        track: of `Matcher.track`.
        camera: what the camera does, ``[B]`` indices into `CAMERAS`; the thing's own motion is what remains.
        distinctness: ``[B]``, of the things (`Matcher.distinctness`): weights of the angle, which a ball has none of.
        style: of the world's edition.
    """
    return _misfits(track, camera, distinctness, style).argmin(dim=1)


def direction_of(track: Track, camera: Tensor, style: MotionStyle = FIRST.style) -> Tensor:
    """Classify the direction in which the thing moves furthest in the world: ``[B]`` indices into `MOTIONS`."""
    x, y, _ = _in_the_world(track, camera, style)
    third = SEARCHED_FRAMES // 3
    dx, dy = (values[:, -third:].mean(1) - values[:, :third].mean(1) for values in (x, y))
    names = list(MOTIONS)
    left, right, up, down = (names.index(name) for name in ("left", "right", "up", "down"))
    return torch.where(
        dx.abs() > dy.abs(),
        torch.where(dx < 0, left, right),
        torch.where(dy < 0, up, down),
    )


def _in_the_world(track: Track, camera: Tensor, style: MotionStyle) -> tuple[Tensor, Tensor, Tensor]:
    """Compute centre and log half size without the camera's motion."""
    pan, zoom = camera_view(camera, torch.linspace(0, 1, SEARCHED_FRAMES), style)
    return track.x * zoom + pan, track.y * zoom, (track.scale * zoom).log()


def _misfits(track: Track, camera: Tensor, distinctness: Tensor, style: MotionStyle) -> Tensor:
    """Compute the mean squared distance from the nearest path of each motion, in spreads: ``[B, len(MOTIONS)]``."""
    phases = 16
    times = torch.linspace(0, 1, SEARCHED_FRAMES)
    x, y, size = (values[:, None, None] for values in _in_the_world(track, camera, style))  # [B, 1, 1, L]
    jitter = torch.full((len(MOTIONS), phases, 20), 0.5)
    jitter[:, :, 8] = torch.arange(phases) / phases  # the speed of some motions, the phase of others
    motion = torch.arange(len(MOTIONS)).repeat_interleave(phases)
    paths = motion_path(motion, times, jitter.flatten(0, 1).unsqueeze(-1), style)
    px, py, pscale, pangle, popacity = (
        values.expand(-1, SEARCHED_FRAMES).unflatten(0, (len(MOTIONS), phases)) for values in paths
    )
    best = track.density.topk(3, dim=1).values.mean(1, keepdim=True).clamp(min=1e-4)
    visible = (track.density / best).clamp(0, 1)[:, None, None]
    trusted = ((visible - 0.3) / 0.4).clamp(0.02, 1)  # where the thing is lost, its place means nothing

    def misfit(seen: Tensor, expected: Tensor, spread: float) -> Tensor:
        off = seen - expected
        off = off - (trusted * off).sum(-1, keepdim=True) / trusted.sum(-1, keepdim=True)  # where it starts is free
        return (trusted * off.square()).sum(-1) / trusted.sum(-1) / spread**2  # [B, M, phases]

    angle_error = track.angle[:, None, None] - pangle
    angle_error = torch.atan2(torch.sin(angle_error), torch.cos(angle_error)).square()
    angle = (trusted * angle_error).sum(-1) / trusted.sum(-1) / _ANGLE_SPREAD**2
    # A sprite of opacity o differs from its surroundings by o^2, and the image from the sprite by (1 - o)^2.
    faded = (visible - (2 * popacity - 1).clamp(min=0)).square().mean(-1) / _VISIBLE_SPREAD**2
    total = (
        misfit(x, px, _PLACE_SPREAD)
        + misfit(y, py, _PLACE_SPREAD)
        + misfit(size, pscale.log(), _SCALE_SPREAD)
        + distinctness[:, None, None] * angle
        + faded
    )
    return total.amin(dim=2)
