"""Make the video of one item: `Maker` is the interface, `LocalMaker` runs the model in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pusa.acceleration.decisions import LoadOptions
from pusa.evaluation.runs.items import Item
from pusa.evaluation.runs.progress import NotesOnce
from pusa.events import Report

_CHECKPOINT_SECONDS = 60.0  # between two checkpoints: shorter videos are made again


class Maker(Protocol):
    """Make videos one after another. One thread uses a maker.

    A maker may also have a method ``is_ready() -> bool``, which is called before an item is claimed: False while it
    cannot make any, as while its machine is away; an exception if it never will. And it may have an attribute
    ``survives_crashes = True`` if the model runs elsewhere: the death of this process then says nothing of an item.
    """

    def make(self, item: Item, output: Path, stop: Callable[[], bool]) -> None:
        """Make the video of an item.

        Args:
            output: the .mp4 to write. Its folder is there, is this attempt's own, and is removed with all that is in
                it; its parent is the same for every attempt.
            stop: True once the work must end; the maker returns soon and need not leave a file.

        Raises:
            Exception: the video could not be made; the message is for people.
        """


class LocalMaker:
    """Make videos in this process; the model stays loaded from one item to the next.

    Prompt embeddings are kept on disk, see `pusa.models.prompt_cache`. A video that takes minutes goes on from its last
    checkpoint if the process dies.

    Args:
        load: how the model is loaded.
        report: called with how the model runs and with notes, each once.

    Attributes:
        notes: passes them on.
    """

    def __init__(self, load: LoadOptions | None = None, *, report: Report | None = None) -> None:
        self._load, self.notes = load, NotesOnce(report)

    def make(self, item: Item, output: Path, stop: Callable[[], bool]) -> None:
        from pusa.generate import generate

        checkpoint = output.parent.with_name(f"{item.id}.safetensors")
        for event in generate(
            item.request,
            output,
            stop=stop,
            load=self._load,
            checkpoint=checkpoint,
            checkpoint_seconds=_CHECKPOINT_SECONDS,
        ):
            self.notes(event)
