"""What a run reports while it goes on: the one shape for progress bars, event streams and scripts."""

import queue
import threading
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pusa.generate.prompt_hints import UnknownWord

if TYPE_CHECKING:
    from pusa.request import ResolvedRequest


@dataclass(frozen=True, kw_only=True)
class GenerationEvent:
    """One thing that happened.

    The `request` is ``resolved``: nothing is left open in it; a ``stage`` begins ("load", "denoise", "decode"); a
    ``step`` of it is done, the `step`-th of `steps`; a ``checkpoint`` at `path` has what `step` steps have made; a
    ``note`` tells a person what was decided, or which `unknown_words` the prompt has; a ``preview`` shows the video so
    far as `image` (PIL); ``done`` comes once for each file that was written, at `path`.
    """

    kind: Literal["resolved", "stage", "step", "checkpoint", "note", "preview", "done"]
    stage: str = ""
    step: int = 0
    steps: int = 0
    seconds_left: float | None = None
    path: Path | None = None
    message: str | None = None
    unknown_words: tuple[UnknownWord, ...] = ()
    request: "ResolvedRequest | None" = None
    image: Any = None

    def as_json(self) -> dict[str, Any]:
        """For a line of JSON: without the image and what is not set."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "image"}
        unset = (None, "", (), 0) if self.steps == 0 else (None, "", ())
        values = {name: value for name, value in values.items() if value not in unset}
        if self.path:
            values["path"] = str(self.path)
        if self.request:
            values["request"] = self.request.model_dump(mode="json")
        if self.unknown_words:
            values["unknown_words"] = [asdict(word) for word in self.unknown_words]
        return values


Report = Callable[[GenerationEvent], None]
Events = Generator[GenerationEvent, None, None]


class RunEnded(BaseException):
    """Unwinds a run that is to end; not an Exception, so that nothing on the way keeps it."""


def as_events(run: Callable[[Report], None]) -> Events:
    """Turn a function that reports into events: it runs in a thread, at most one event ahead of whoever takes them.

    Closing the events, or a `KeyboardInterrupt`, raises `RunEnded` inside the function at its next report. What it
    raises itself comes out here.
    """
    events: queue.Queue[GenerationEvent | BaseException | None] = queue.Queue(maxsize=1)
    ended = threading.Event()

    def report(event: GenerationEvent) -> None:
        if ended.is_set():
            raise RunEnded
        events.put(event)

    def work() -> None:
        try:
            run(report)
            events.put(None)
        except RunEnded:
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
