"""Draw and encode clips while a model trains on them, so that it sees each only a few times.

Clips are kept in files of 16. Which files a step may draw from depends on the number of the step alone, so that
training which continues after an interruption sees the same clips.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from transformers import PreTrainedTokenizerFast

from pusa.mini.recipe.clips import ClipCache, ClipPlan, Sample, encode_scenes, read_clips, write_clips
from pusa.mini.world.world import Scenes, World
from pusa.training.distributed import connect_processes

FILE_CLIPS = 16
_SPARE_FILES = 16
_SEED = 20_000_000  # apart from those of `ClipPlan.scenes`


@dataclass(frozen=True)
class PoolPlan:
    """Set how fast a pool grows and what it keeps.

    Attributes:
        clips: size, frames and kind of clips; their number is not used.
        first: files at the first step.
        every: steps between two new files of each process.
        most: files that are kept at most.
    """

    clips: ClipPlan
    first: int
    every: int
    most: int

    def files(self, step: int, processes: int = 1) -> range:
        """List the files from which step number `step` draws: the newest half, but no fewer than at first."""
        drawn = self.first + step // self.every * processes
        kept = min(max(drawn // 2, self.first), self.most)
        return range(drawn - kept, drawn)

    def scenes(self, number: int) -> Scenes:
        """Draw the scenes of a file, always the same."""
        return self.clips.draw(FILE_CLIPS, _SEED + number)


class ClipPool:
    """Keep the clips of `plan` in a folder.

    Args:
        vae: on the CPU, as the world is.
        tokenizer: of the captions.
    """

    def __init__(
        self, vae: AutoencoderKLWan, world: World, folder: Path, plan: PoolPlan, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self.vae, self.world, self.folder, self.plan, self.tokenizer = vae, world, folder, plan, tokenizer
        self.processes = connect_processes()
        self._clips: OrderedDict[int, ClipCache] = OrderedDict()
        folder.mkdir(parents=True, exist_ok=True)

    def advance(self, step: int) -> None:
        """Bring the files to those of a step, which is the same in all processes; each encodes its share."""
        wanted = self.plan.files(step, self.processes.world)
        if self._clips and (next(iter(self._clips)), next(reversed(self._clips))) == (wanted[0], wanted[-1]):
            return
        for number in wanted:
            path = self._path(number)
            if number % self.processes.world == self.processes.rank and not path.exists():
                scenes = self.plan.scenes(number)
                write_clips(path, encode_scenes(self.vae, self.world, self.plan.clips, scenes, batch=8))
        self.processes.wait()
        for number in wanted:
            if number not in self._clips:
                self._clips[number] = read_clips(self._path(number))
                self._clips[number].tokenise_captions(self.tokenizer)
        for number in [number for number in self._clips if number not in wanted]:
            del self._clips[number]
        # After a crash training goes on some steps before this one: what these draw from stays.
        for path in self.folder.glob("[0-9]*.safetensors") if self.processes.is_main else ():
            if int(path.stem) < wanted[0] - _SPARE_FILES:
                path.unlink()

    def sample(self, count: int) -> Sample:
        """Draw `count` random clips of full length."""
        numbers = list(self._clips)
        chosen = torch.randint(len(numbers) * FILE_CLIPS, (count,)).tolist()
        single = [self._clips[numbers[i // FILE_CLIPS]].take(torch.tensor([i % FILE_CLIPS])) for i in chosen]
        return Sample(*(torch.cat(column) for column in zip(*(vars(s).values() for s in single), strict=True)))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"


def newest_clips(folder: Path, count: int) -> ClipCache:
    """Read the newest `count` clips of a pool's folder, or all there are.

    Raises:
        FileNotFoundError: there are none.
    """
    paths = sorted(folder.glob("[0-9]*.safetensors"))[-math.ceil(count / FILE_CLIPS) :]
    if not paths:
        raise FileNotFoundError(f"{folder} holds no clips")
    return ClipCache.cat([read_clips(path) for path in paths]).first(count)
