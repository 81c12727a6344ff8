"""The process that holds the model: it loads it once, runs one task after another and says how far it is.

It is a process of its own so that a crash or a kill for lack of memory takes neither the API nor a job with it. Its
standard input brings tasks, its standard output takes messages away, both pickled; when the input ends, whoever started
it is gone and it ends, too. What libraries print goes to standard error.

    python -m pusa.server.worker.engine_process MODULE:CLASS MODEL [LORA...]
"""

import importlib
import logging
import os
import pickle
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import psutil

from pusa.fsutil import is_full
from pusa.server.logs import configure_logging, log_context
from pusa.server.worker.messages import (
    Cancelled,
    CancelTask,
    Checkpoint,
    Done,
    Error,
    LoadFailed,
    Loading,
    Message,
    Note,
    Preview,
    Ready,
    Resolved,
    Stage,
    Step,
    Task,
)

logger = logging.getLogger(__name__)

PUSA_ENGINE = "pusa.server.worker.engine_process:PusaEngine"
_SAMPLE_SECONDS = 0.25  # between two looks at how much of a model is in memory
_MESSAGE_CHARACTERS = 500

ReportLoading = Callable[[str, float | None], None]


class Engine(Protocol):
    """What runs inside the process; made with the names of model and LoRAs. Tests and benchmarks bring their own."""

    def load(self, report: ReportLoading) -> str:
        """Get ready; says stages and percent (0..100 or None), and answers with the name of the model that is there."""

    def run(self, task: Task, is_cancelled: Callable[[], bool]) -> Iterator[Message]:
        """A task's messages, the last one of `Done` and `Cancelled`. What it raises becomes an `Error`."""


class PusaEngine:
    """`pusa.generate.generate` behind the messages of a task."""

    def __init__(self, model: str, *loras: str) -> None:
        self.model, self.loras = model, loras

    def load(self, report: ReportLoading) -> str:
        """The percentage is the share of the weights' bytes in memory; a download before that shows as 0."""
        report("importing", None)
        from pusa import zoo
        from pusa.generate import loaded

        self.model = zoo.with_fallback(self.model)  # as `generate` does; the job's notes say so
        with _reported(self.model, report):
            loaded(self.model, self.loras)
        return self.model

    def run(self, task: Task, is_cancelled: Callable[[], bool]) -> Iterator[Message]:
        from contextlib import closing

        from pusa.generate import generate
        from pusa.request import GenerationRequest

        request = with_files(task.request, {key: str(path) for key, path in task.inputs.items()})
        keys = [condition["file"] for condition in task.request["conditions"]]
        video = task.folder / "video.mp4"
        clock = _StageClock()
        events = generate(
            GenerationRequest.model_validate(request),
            video,
            stop=is_cancelled,
            preview_every=1 if task.preview_seconds else 0,
            preview_seconds=task.preview_seconds,
            checkpoint=task.checkpoint,
            checkpoint_every=task.checkpoint_every,
            checkpoint_seconds=task.checkpoint_seconds,
        )
        finished = False
        with closing(events):
            for event in events:
                if event.kind == "resolved" and event.request is not None:
                    resolved = event.request.model_dump(mode="json")
                    for condition, key in zip(resolved["conditions"], keys, strict=True):
                        condition["file"] = key
                    yield Resolved(resolved)
                elif event.kind == "stage":
                    clock.begin(event.stage)
                    yield Stage(event.stage)
                elif event.kind == "step":
                    yield Step(event.step, event.steps, event.seconds_left)
                elif event.kind == "checkpoint" and event.path is not None:
                    yield Checkpoint(event.path, event.step)
                elif event.kind == "note" and event.message:
                    yield Note(event.message)
                elif event.kind == "preview":
                    yield Preview(_webp(event.image))
                finished = finished or event.kind == "done"
        if not finished:
            yield Cancelled()
            return
        clock.begin("finish")
        yield Stage("finish")
        files = {"video": video} | _pictures_of(video, task.folder)
        yield Done(files, {**clock.end(), "peak_memory_mb": _peak_memory_mb()})


def with_files(request: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The same request with other names for its files; those without one stay."""
    conditions = [{**spec, "file": names.get(spec["file"], spec["file"])} for spec in request["conditions"]]
    return {**request, "conditions": conditions}


class _StageClock:
    """Seconds in each stage; a long video goes back and forth between denoising and decoding."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._stage, self._since = "load", time.monotonic()

    def begin(self, stage: str) -> None:
        now = time.monotonic()
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now

    def end(self) -> dict[str, float]:
        self.begin("")
        return {stage: round(seconds, 4) for stage, seconds in self._seconds.items()}


def _webp(image: Any) -> bytes:
    from io import BytesIO

    target = BytesIO()
    image.save(target, "WEBP", quality=80)
    return target.getvalue()


def _pictures_of(video: Path, folder: Path) -> dict[str, Path]:
    from pusa import media

    pictures = {
        "thumbnail": media.thumbnail(video),
        "spritesheet": media.sprite_sheet(video),
        "contact_sheet": media.contact_sheet(video),
    }
    files = {kind: folder / f"{kind}.webp" for kind in pictures}
    for kind, picture in pictures.items():
        picture.save(files[kind], "WEBP", quality=80)
    return files


# ---- memory ----------------------------------------------------------------------------------------------------------


class _reported:  # noqa: N801 (a context manager, used as a function)
    """Says how much of a model is in memory while it is being loaded."""

    def __init__(self, model: str, report: ReportLoading) -> None:
        self._expected_bytes = _bytes_in_memory(model)
        self._report = report
        self._process = psutil.Process()
        self._before_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="pusa-loading", daemon=True)

    def __enter__(self) -> None:
        self._before_bytes = self._process.memory_info().rss
        self._report("loading", 0.0 if self._expected_bytes else None)
        if self._expected_bytes:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        import torch

        on_host_bytes, told = 0, 0.0
        while not self._ended.wait(_SAMPLE_SECONDS):
            on_host_bytes = max(on_host_bytes, self._process.memory_info().rss - self._before_bytes)
            there_bytes, wanted_bytes = on_host_bytes, self._expected_bytes
            if torch.cuda.is_available():  # read into memory first, then copied to the GPU
                there_bytes += torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0
                wanted_bytes *= 2
            percent = min(99.0, float(100 * there_bytes // wanted_bytes))
            if percent > told:
                told = percent
                self._report("loading", percent)


def _bytes_in_memory(model: str) -> int:
    """What the weights of a model will take; 0 where that is not known."""
    from pusa import resources, zoo
    from pusa.models import files

    known = zoo.find(model)
    if known is not None and known.name == "tiny":
        return 0
    counts = dict(known.parameters) if known else {}
    if not counts and Path(model).is_dir():
        with suppress(ValueError, OSError):  # `load` will say what is wrong with it
            counts = files.parameter_counts(Path(model))
    if known is None or known.hub_id is not None:
        counts.pop("text_encoder", None)  # read for new prompts only
    return sum(resources.weight_bytes(counts).values())


def _peak_memory_mb() -> float:
    """Of the GPU in this process, or of the process where there is none; its highest so far."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    import resource

    per_unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kibibytes on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_unit, 1)


# ---- errors ----------------------------------------------------------------------------------------------------------


def error_of(error: BaseException, task: Task) -> Error:
    """What is told of an exception. Only mistakes in the request and a lack of memory are not worth another attempt."""
    text = _shown(error, task)
    if is_full(error):
        return Error("disk_full", "the worker's disk is full", retry=True)
    if isinstance(error, ValueError | FileNotFoundError):
        return Error("invalid_request", text, retry=False)
    if isinstance(error, MemoryError) or type(error).__name__ == "ResourcesError":
        return Error("out_of_memory", text or "not enough memory", retry=False)
    if isinstance(error, RuntimeError) and "torch" in sys.modules:
        from pusa.models.vae import DecodeMemoryError, is_out_of_memory

        if isinstance(error, DecodeMemoryError):
            latents = next(iter(task.folder.glob("*.latents.safetensors")), None)
            return Error("out_of_memory", "out of memory while decoding", retry=False, latents=latents)
        if is_out_of_memory(error):
            told = "out of memory: ask for a smaller size, fewer frames or a shorter window"
            return Error("out_of_memory", told, retry=False)
    return Error("internal_error", f"{type(error).__name__}: {text}" if text else type(error).__name__, retry=True)


def _shown(error: BaseException, task: Task) -> str:
    """An error's words without the machine's folders."""
    text = str(error)
    for key, path in task.inputs.items():
        text = text.replace(str(path), key.rpartition("/")[2])
    text = text.replace(f"{task.folder}{os.sep}", "")
    return text if len(text) <= _MESSAGE_CHARACTERS else text[: _MESSAGE_CHARACTERS - 3] + "..."


def is_ruinous(error: Error) -> bool:
    """Whether the process that met it may be left in a bad state, such as a GPU after a failed assertion."""
    return error.code == "internal_error"


def messages_of(engine: Engine, task: Task, is_cancelled: Callable[[], bool]) -> Iterator[Message]:
    """What an engine says of a task, and an `Error` for what it raises."""
    try:
        yield from engine.run(task, is_cancelled)
    except GeneratorExit:
        raise
    except BaseException as error:
        logger.exception("attempt %d of %s failed", task.attempt, task.job_id)
        told = error_of(error, task)
    else:
        return
    if told.code == "out_of_memory":
        _free_memory()
    yield told


def _free_memory() -> None:
    import gc

    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# ---- the process -----------------------------------------------------------------------------------------------------


def make_engine(target: str, model: str, *loras: str) -> Engine:
    """From ``module:name``, called with the model's name and those of LoRA files."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)(model, *loras)


class Inbox:
    """Commands for an engine: put in by whoever receives them, taken out between tasks and steps."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._cancelled = threading.Event()

    def put(self, command: Task | CancelTask) -> None:
        if isinstance(command, Task):
            self._cancelled.clear()
            self._tasks.put(command)
        else:
            self._cancelled.set()

    def next_task(self) -> Task:
        return self._tasks.get()

    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()


def work(engine: Engine, inbox: Inbox, send: Callable[[Any], None]) -> int:
    """Load, then run tasks for ever; returns, with an exit status, where the process is not to be used any longer."""
    try:
        send(Ready(engine.load(lambda stage, percent: send(Loading(stage, percent)))))
    except Exception as error:
        logger.exception("the model cannot be loaded")
        send(LoadFailed(f"{type(error).__name__}: {error}"))
        return 1
    while True:
        task = inbox.next_task()
        with log_context(job=task.job_id):
            for message in messages_of(engine, task, inbox.is_cancelled):
                send(message)
                if isinstance(message, Error) and is_ruinous(message):
                    return 1


def serve(engine: Engine, commands: BinaryIO, answers: BinaryIO) -> int:
    """`work` with two pipes; ends the process when the commands end."""
    inbox, write = Inbox(), threading.Lock()

    def send(message: Any) -> None:
        data = pickle.dumps(message)
        try:
            with write:
                answers.write(data)
                answers.flush()
        except BrokenPipeError:
            os._exit(0)  # as below

    def listen() -> None:
        while True:
            try:
                inbox.put(pickle.load(commands))
            except (EOFError, OSError, pickle.UnpicklingError):
                os._exit(0)  # nobody is left to work for, and a step may take minutes

    threading.Thread(target=listen, name="pusa-commands", daemon=True).start()
    return work(engine, inbox, send)


def main(target: str, model: str, *loras: str) -> None:
    """Take the pipes over, so that nobody else reads or writes them, and serve."""
    commands, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    configure_logging(os.environ.get("PUSA_LOG_FORMAT", "text"), os.environ.get("PUSA_LOG_LEVEL", "info"))  # type: ignore[arg-type]
    with suppress(OSError):  # where memory runs out, the kernel takes this process and not the one that has the jobs
        Path("/proc/self/oom_score_adj").write_text("500")
    os._exit(serve(make_engine(target, model, *loras), commands, answers))  # threads of libraries must not hold it up


if __name__ == "__main__":
    main(*sys.argv[1:])
