"""Run the process that holds the model: load it once, then run one task after another and report progress.

A process of its own keeps a crash, or a kill for lack of memory, from ending the API or losing a job. It reads tasks
from standard input and writes messages to standard output, both pickled, and ends when its input ends, as its parent
has ended then. The output of libraries goes to standard error.

    python -m pusa.server.worker.engine_start PARENT MODULE:CLASS MODEL [LORA...]

A group of ranks is as many of these processes; RANK and WORLD_SIZE tell each which one it is.
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
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from pusa.acceleration.decisions import LoadOptions, Machine
from pusa.codes import code_of, values_of
from pusa.events import Done, Resolved, Stage
from pusa.fsutil import is_full
from pusa.models.files import DamagedFileError, MissingFilesError, WrongArchitectureError
from pusa.provenance.options import MarkOptions
from pusa.server.logs import configure_logging, log_context
from pusa.server.worker import engine_ranks
from pusa.server.worker.messages import (
    Alive,
    Cancelled,
    CancelTask,
    Error,
    LoadFailed,
    Loading,
    MachineFound,
    Message,
    ModelReady,
    Task,
)

if TYPE_CHECKING:
    from pusa.acceleration.ranks import Ranks

logger = logging.getLogger(__name__)

LOAD_WORDS = ("memory", "quantize", "attention", "compile")  # fields of LoadOptions that are settings of the server
PUSA_ENGINE = "pusa.server.worker.engine_process:PusaEngine"
_MESSAGE_CHARACTERS = 500
_ALIVE_SECONDS = 1.0

ReportLoading = Callable[[str, float | None], None]


class Engine(Protocol):
    """Load a model and run tasks with it. A factory makes it from the names of model and LoRAs, see `make_engine`."""

    def load(self, report: ReportLoading) -> str:
        """Load the model, report stages with percent (0..100 or None), and return the name of the loaded model."""

    def run(self, task: Task, is_cancelled: Callable[[], bool]) -> Iterator[Message]:
        """Yield a task's messages; the last is `Done` or `Cancelled`. An exception becomes an `Error`."""


class PusaEngine:
    """Run tasks with `pusa.generate.generate`; in a group of ranks, as its first rank or as one that follows it.

    PUSA_MEMORY, PUSA_GPUS and the others, as in the server's settings, tell how the model is loaded.
    """

    def __init__(self, model: str, *loras: str) -> None:
        self.model, self.loras = model, loras
        words: dict[str, Any] = {name: os.environ.get(f"PUSA_{name.upper()}") for name in LOAD_WORDS}
        gpus = int(os.environ.get("PUSA_GPUS") or 0) or None
        self.load_options = LoadOptions(gpus=gpus, **{name: word for name, word in words.items() if word})
        self._ranks: Ranks | None = None

    def find_machine(self) -> Machine:
        """Measure what this process may use of its machine, before the model is loaded."""
        from pusa.acceleration.machine import machine

        return machine()

    def load(self, report: ReportLoading) -> str:
        """Load the model; the percentage is the share of its weights that is read, and 0 during a download."""
        report("importing", None)
        from pusa import zoo
        from pusa.generate import load_pipeline

        self.model = zoo.with_fallback(self.model)  # as `generate` does; the job's notes say so
        report("loading", 0.0)
        progress = percent_of(report)
        self._ranks = engine_ranks.join_group()
        if self._ranks is None:
            load_pipeline(self.model, self.loras, load=self.load_options, progress=progress)
        else:
            engine_ranks.load_shared(self._ranks, self.model, self.loras, self.load_options, progress)
        return self.model

    def run(self, task: Task, is_cancelled: Callable[[], bool]) -> Iterator[Message]:
        if self._ranks is not None and not self._ranks.is_main:
            yield from engine_ranks.follow_task(self._ranks)
            return
        from contextlib import closing

        from pusa.generate import generate
        from pusa.request import is_wave, stored_request

        with engine_ranks.released_on_error(self._ranks):
            _check_marks(task.marks)
            request = rename_files(task.request, {key: str(path) for key, path in task.inputs.items()})
            checked = stored_request(request)
        keys = [condition["file"] for condition in task.request["conditions"]]
        video = task.folder / "video.mp4"
        growing = task.folder / "growing.mp4" if is_wave(checked.schedule) else None
        if growing is not None:
            growing.unlink(missing_ok=True)  # of a process that was killed
        clock = _StageClock()
        events = generate(
            checked,
            video,
            stop=is_cancelled,
            preview_every=1 if task.preview_seconds else 0,
            preview_seconds=task.preview_seconds,
            preview_decoder=task.preview_decoder,
            checkpoint=task.checkpoint,
            checkpoint_every=task.checkpoint_every,
            checkpoint_seconds=task.checkpoint_seconds,
            marks=task.marks,
            load=self.load_options,
            ranks=self._ranks,
            growing=growing,
        )
        is_done = False
        with closing(events):
            for event in events:
                match event:
                    case Resolved(resolved):
                        for condition, key in zip(resolved["conditions"], keys, strict=True):
                            condition["file"] = key
                    case Stage(stage):
                        clock.begin(stage)
                    case Done():
                        is_done = True  # the worker's `Done` names more files
                        continue
                yield event
        if not is_done:
            yield Cancelled()
            return
        clock.begin("finish")
        yield Stage("finish")
        files = {"video": video} | _make_pictures(video, task.folder)
        yield Done(files, {**clock.end(), "peak_memory_mb": _peak_memory_mb()})


def _check_marks(marks: MarkOptions) -> None:
    """Raise RuntimeError, without the operator's paths, if this machine cannot sign or watermark."""
    try:
        marks.check()
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        raise RuntimeError("results cannot be signed or watermarked on this worker: its log says why") from error


def rename_files(request: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Return the request with new names for its files; a file that `names` lacks keeps its name."""
    conditions = [{**spec, "file": names.get(spec["file"], spec["file"])} for spec in request["conditions"]]
    return {**request, "conditions": conditions}


class _StageClock:
    """Measure the seconds in each stage; a long video alternates between denoising and decoding."""

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


def _make_pictures(video: Path, folder: Path) -> dict[str, Path]:
    from pusa import media

    pictures = {
        "thumbnail": media.thumbnail(video),
        "spritesheet": media.sprite_sheet(video),
        "contact_sheet": media.contact_sheet(video),
    }
    files = {kind: folder / f"{kind}.webp" for kind in pictures}
    xmp = media.read_xmp(video)  # pictures of the video say the same
    for kind, picture in pictures.items():
        picture.save(files[kind], "WEBP", quality=80, **({"xmp": xmp} if xmp else {}))
    return files


# ---- memory ----------------------------------------------------------------------------------------------------------


def percent_of(report: ReportLoading) -> Callable[[int, int], None]:
    """Turn bytes read, and those of all, into reports of whole percents: at most 99, before the model is ready."""
    reported = 0

    def progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal reported
        percent = min(99, 100 * done_bytes // max(1, total_bytes))
        if percent > reported:
            reported = percent
            report("loading", float(percent))

    return progress


def _peak_memory_mb() -> float:
    """Return this process's peak memory (MB): of the GPU, or of the host if there is no GPU."""
    import torch

    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    import resource

    per_unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kibibytes on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / per_unit, 1)


# ---- errors ----------------------------------------------------------------------------------------------------------


def error_message(error: BaseException, task: Task) -> Error:
    """Convert an exception to an `Error`. Only a faulty request and a lack of memory rule out another attempt."""
    text = _without_paths(error, task)
    if is_full(error):
        return Error("disk_full", "the worker's disk is full", retry=True)
    if isinstance(error, DamagedFileError | MissingFilesError | WrongArchitectureError):  # of the operator's model
        return Error("internal_error", text, retry=False)
    if isinstance(error, ValueError | FileNotFoundError):
        return Error(code_of(error, "invalid_request"), text, retry=False, values=_values_of(error, task))
    if isinstance(error, MemoryError) or type(error).__name__ == "ResourcesError":
        return Error("out_of_memory", text or "not enough memory", retry=False)
    if isinstance(error, RuntimeError) and "torch" in sys.modules:
        from pusa.acceleration.ranks import RankError
        from pusa.models.finite import NotFiniteError
        from pusa.models.vae import DecodeError, DecodeMemoryError, is_out_of_memory

        if isinstance(error, DecodeError):
            latents = next(iter(task.folder.glob("*.latents.safetensors")), None)
            if isinstance(error, DecodeMemoryError):
                return Error("out_of_memory", "out of memory while decoding", retry=False, latents=latents)
            if error.__cause__ is not None and is_full(error.__cause__):
                return Error("disk_full", "the worker's disk is full", retry=True, latents=latents)
            return Error("internal_error", text.partition("; the denoised latents")[0], retry=False, latents=latents)
        if isinstance(error, NotFiniteError):  # the same weights would do it again
            return Error("internal_error", text, retry=False)
        if is_out_of_memory(error) or (isinstance(error, RankError) and "out of memory" in text):
            advice = "out of memory: ask for a smaller size, fewer frames or a shorter window"
            return Error("out_of_memory", advice, retry=False)
    return Error("internal_error", f"{type(error).__name__}: {text}" if text else type(error).__name__, retry=True)


def _values_of(error: BaseException, task: Task) -> dict[str, Any]:
    """Return the values of an exception's text without this machine's paths."""
    values = values_of(error)
    return {name: _without_paths(value, task) if isinstance(value, str) else value for name, value in values.items()}


def _without_paths(error: BaseException | str, task: Task) -> str:
    """Return an exception's message, or a text, without this machine's paths."""
    text = str(error)
    for key, path in task.inputs.items():
        text = text.replace(str(path), key.rpartition("/")[2])
    text = text.replace(f"{task.folder}{os.sep}", "")
    return text if len(text) <= _MESSAGE_CHARACTERS else text[: _MESSAGE_CHARACTERS - 3] + "..."


def is_fatal(error: Error) -> bool:
    """Return True if an error may leave its process in a bad state, as a failed assertion leaves a GPU."""
    return error.code == "internal_error"


def run_task(engine: Engine, task: Task, is_cancelled: Callable[[], bool]) -> Iterator[Message]:
    """Yield an engine's messages of a task, and an `Error` for an exception."""
    try:
        yield from engine.run(task, is_cancelled)
    except GeneratorExit:
        raise
    except BaseException as error:
        logger.exception("attempt %d of %s failed", task.attempt, task.job_id)
        message = error_message(error, task)
    else:
        return
    if message.code == "out_of_memory":
        _free_memory()
    yield message


def _free_memory() -> None:
    import gc

    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# ---- the process -----------------------------------------------------------------------------------------------------


def make_engine(target: str, model: str, *loras: str) -> Engine:
    """Make the engine ``module:name`` with the model's name and those of LoRA files."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)(model, *loras)


class Inbox:
    """Hold the commands for an engine, which looks at them between tasks and between steps."""

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
    """Load the model, then run tasks; return an exit status when the process must not run another one."""

    def report(stage: str, percent: float | None) -> None:
        send(Loading(stage, percent))

    try:
        if isinstance(engine, PusaEngine) and engine_ranks.world_size() == 1:  # a rank among others must touch no card
            report("importing", None)  # torch, for the cards
            send(MachineFound(engine.find_machine()))
        send(ModelReady(engine.load(report)))
    except Exception as error:
        logger.exception("the model cannot be loaded")
        send(LoadFailed(f"{type(error).__name__}: {error}", _code_of_failure(error)))
        return 1
    while True:
        task = inbox.next_task()
        with log_context(job=task.job_id):
            for message in run_task(engine, task, inbox.is_cancelled):
                send(message)
                if isinstance(message, Error) and is_fatal(message):
                    return 1


def _code_of_failure(error: Exception) -> str:
    """Tell apart why a model cannot be loaded, as far as an operator does something else about it."""
    from pusa.resources import ResourcesError  # measures the machine, for which the server has no use

    if isinstance(error, ResourcesError | MemoryError):
        return "model_too_large"
    return "model_files_missing" if isinstance(error, FileNotFoundError | MissingFilesError) else "model_not_loaded"


def serve(engine: Engine, commands: BinaryIO, answers: BinaryIO) -> int:
    """Run `work` with two pipes; end the process when the commands end."""
    inbox, write = Inbox(), threading.Lock()

    def send(message: Any) -> None:
        data = pickle.dumps(message)
        try:
            with write:
                answers.write(data)
                answers.flush()
        except BrokenPipeError:
            os._exit(0)  # the parent has ended

    def listen() -> None:
        while True:
            try:
                inbox.put(pickle.load(commands))
            except (EOFError, OSError, pickle.UnpicklingError):
                os._exit(0)  # the parent has ended, and a step may take minutes

    def show_life() -> None:
        while True:
            send(Alive())
            time.sleep(_ALIVE_SECONDS)

    threading.Thread(target=listen, name="pusa-commands", daemon=True).start()
    threading.Thread(target=show_life, name="pusa-alive", daemon=True).start()
    return work(engine, inbox, send)


def main(target: str, model: str, *loras: str) -> None:
    """Take over standard input and output, so that libraries cannot use them, and serve."""
    commands, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    configure_logging(os.environ.get("PUSA_LOG_FORMAT", "text"), os.environ.get("PUSA_LOG_LEVEL", "info"))  # type: ignore[arg-type]
    with suppress(OSError):  # if memory runs out, the kernel must kill this process, not the worker
        Path("/proc/self/oom_score_adj").write_text("500")
    os._exit(serve(make_engine(target, model, *loras), commands, answers))  # do not wait for threads of libraries
