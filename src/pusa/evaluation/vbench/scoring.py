"""Score the videos of a run with VBench's own code: one process for each dimension, in the scorer's environment.

Results are in the run's folder, ``scores/DIMENSION/``: the suite's ``DIMENSION_eval_results.json`` as it is, a record
of what was scored, and the log. A dimension that was scored is not scored again while its videos are the same.
"""

import json
import queue
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from pusa.data.workers import usable_cores
from pusa.errors import first_line
from pusa.evaluation.runs import RunFolder
from pusa.evaluation.runs.files import read_json, write_json
from pusa.evaluation.runs.processes import cards as visible_cards
from pusa.evaluation.runs.processes import environments
from pusa.evaluation.vbench.environment import (
    DRIVER,
    check_suite,
    clean_variables,
    describe_missing,
    missing_weights,
    python_of,
)
from pusa.evaluation.vbench.items import check_videos
from pusa.evaluation.vbench.results import RESULTS_SUFFIX
from pusa.evaluation.vbench.scored import fingerprint_of, folder_of, items_of, log_of, parse_result, read_scored
from pusa.evaluation.vbench.suite import Suite, read_suite
from pusa.evaluation.vbench.totals import DIMENSIONS, check_dimensions
from pusa.events import Note, Report, Step

STAGE = "score"

_LOG_LINES = 12  # of a failed dimension that are shown
_NAMED = 5  # of the videos that have problems
_POLL_SECONDS = 0.2
_KILL_SECONDS = 10.0  # for a scorer to end by itself


@dataclass(frozen=True)
class Scorer:
    """Hold a program that scores one dimension, called as `driver.py` is: see its first lines.

    Attributes:
        command: the program, before those arguments.
        name: for records: results of another scorer are not taken for its own.
        needs_weights: it loads those of `pusa.evaluation.vbench.environment.WEIGHTS`.
    """

    command: tuple[str, ...]
    name: str
    needs_weights: bool = True

    @classmethod
    def in_environment(cls, environment: Path) -> "Scorer":
        """Make the scorer that runs the suite's code in an environment. Raises FileNotFoundError."""
        return cls((str(python_of(environment)), "-W", "ignore", str(DRIVER)), "vbench")

    @classmethod
    def from_command(cls, command: str) -> "Scorer":
        """Make a scorer from a command line of the user's. Raises ValueError and FileNotFoundError."""
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"the scorer's command cannot be read: {command} ({error})") from None
        if not words:
            raise ValueError("the scorer's command is empty")
        if shutil.which(words[0]) is None:
            raise FileNotFoundError(f"the scorer's program {words[0]} is not here, or cannot be run: give its path")
        return cls(tuple(words), command, needs_weights=False)


@dataclass
class ScoringSummary:
    """Hold what a call of `score` has done, dimensions by outcome; `failed` has the end of each log."""

    done: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


# ---- scoring ---------------------------------------------------------------------------------------------------------


def score(
    run: RunFolder,
    scorer: Scorer,
    *,
    suite: Path,
    weights: Path,
    dimensions: Sequence[str] | None = None,
    processes: int | None = None,
    cards: Sequence[str] | None = None,
    again: bool = False,
    stop: Callable[[], bool] = lambda: False,
    report: Report = lambda _: None,
) -> ScoringSummary:
    """Score the videos of a run, after every file of it was checked.

    Machines that share the run's folder may call it at once: each takes dimensions that no other one has begun.

    Args:
        suite: a checkout of VBench, the one that the run was prepared from.
        weights: folder with what `WEIGHTS` lists. It is all that the scorer loads: nothing is fetched.
        dimensions: None: all that the run has videos for.
        processes: that run side by side, each with a card; None: as many as there are cards, or one.
        cards: as CUDA_VISIBLE_DEVICES names them; None: all that are visible, empty: none.
        again: score what is done, too.
        stop: returns True when scoring must end; dimensions that are done stay.

    Returns:
        what was done. A dimension that fails is in it with the end of its log, and the others go on.

    Raises:
        ValueError: videos are missing or bad, the suite is another one, a dimension has no videos; there are fewer
            cards than processes.
        FileNotFoundError: the suite is no checkout, or weights are missing.
    """
    wanted = _wanted(run, dimensions)
    found = _check(run, scorer, suite, weights, wanted)
    summary = ScoringSummary()
    summary.kept = [dimension for dimension in wanted if not again and _is_scored(run, dimension, scorer)]
    waiting = [dimension for dimension in wanted if dimension not in summary.kept]
    waiting.sort(key=lambda dimension: -len(items_of(run, dimension)))  # what takes long begins first
    cards = visible_cards() if cards is None else cards
    slots = environments(processes or max(1, len(cards)), cards, usable_cores())
    device = "cuda" if cards else "cpu"
    with tempfile.TemporaryDirectory(prefix="pusa-vbench-") as work:
        job = _Job(run, scorer, found, suite.absolute(), weights.absolute(), device, Path(work), again)
        _Loop(job, waiting, slots, summary, report).run(stop)
    return summary


def _is_scored(run: RunFolder, dimension: str, scorer: Scorer) -> bool:
    found = read_scored(run, dimension)
    return found is not None and found.is_current and found.scorer == scorer.name


def _wanted(run: RunFolder, dimensions: Sequence[str] | None) -> list[str]:
    there = [name for name in DIMENSIONS if items_of(run, name)]
    check_dimensions(dimensions or ())
    for name in dimensions or ():
        if name not in there:
            raise ValueError(f"the run has no videos for {name}: it has {', '.join(there)}")
    return [name for name in there if dimensions is None or name in dimensions]


def _check(run: RunFolder, scorer: Scorer, suite: Path, weights: Path, dimensions: Sequence[str]) -> Suite:
    """Raise if something is missing that would end the scoring, or distort it; return the suite."""
    found = read_suite(suite)
    if scorer.needs_weights:
        check_suite(suite)
    if found.sha256 != run.settings["suite_sha256"]:
        raise ValueError(f"{suite} has other prompts than those that {run.folder} was prepared from")
    if scorer.needs_weights and (missing := missing_weights(weights, dimensions)):
        first = "; ".join(line.strip() for line in describe_missing(weights, missing[:1]))
        more = f"; and {len(missing) - 1} more: pusa eval vbench setup lists them" if len(missing) > 1 else ""
        raise FileNotFoundError(first + more)
    if problems := check_videos(run):
        names = "; ".join(f"{problem.name}: {problem.problem}" for problem in problems[:_NAMED])
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise ValueError(f"{len(problems)} of {len(run.items)} videos cannot be scored: {names}{more}")
    return found


@dataclass(frozen=True)
class _Job:
    """Hold what all processes of a scoring share."""

    run: RunFolder
    scorer: Scorer
    prompts: Suite
    suite: Path
    weights: Path
    device: str
    work: Path
    again: bool

    def info(self) -> list[dict[str, Any]]:
        """Write the suite's list of prompts, reduced to those of the run: it warns of each that has no videos."""
        texts = {item.labels["prompt"] for item in self.run.items}
        return [
            {"prompt_en": prompt.text, "dimension": list(prompt.dimensions), "image_name": prompt.image}
            for prompt in self.prompts.prompts
            if prompt.text in texts
        ]

    def arguments(self, dimension: str, work: Path) -> list[str]:
        ratio = self.run.settings["ratio"]
        values = {
            "suite": self.suite,
            "dimension": dimension,
            "videos": self.run.videos.absolute(),
            "info": work / "info.json",
            "images": self.prompts.data.absolute() / "crop" / ratio,
            "ratio": ratio,
            "weights": self.weights,
            "device": self.device,
            "work": work,
            "out": work / "result.json",
        }
        return [text for name, value in values.items() for text in (f"--{name}", str(value))]


class _Process:
    """Run a scorer for one dimension, and send each line of its progress to a queue; None is the last one."""

    def __init__(
        self, job: _Job, dimension: str, slot: Mapping[str, str], lines: "queue.Queue[tuple[_Process, str | None]]"
    ) -> None:
        self.job, self.dimension, self.slot = job, dimension, slot
        self.done, self.total = 0, len(items_of(job.run, dimension))
        self.started = time.monotonic()
        self._fingerprint = fingerprint_of(job.run, dimension, job.scorer.name)  # of the videos as they are now
        self._open = ExitStack()
        try:
            folder = folder_of(job.run, dimension)
            folder.mkdir(parents=True, exist_ok=True)
            self._open.enter_context(FileLock(folder / ".lock", blocking=False))
            self.work = job.work / dimension
            self.work.mkdir()
            (self.work / "info.json").write_text(json.dumps(job.info(), ensure_ascii=False), encoding="utf-8")
            log = self._open.enter_context(log_of(job.run, dimension).open("wb"))
            self._process = subprocess.Popen(
                [*job.scorer.command, *job.arguments(dimension, self.work)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**clean_variables(), **slot},
                start_new_session=True,  # Ctrl-C is ours to handle
            )
        except BaseException:
            self._open.close()
            raise
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout, lines), daemon=True).start()

    def _read(self, stdout: IO[str], lines: "queue.Queue[tuple[_Process, str | None]]") -> None:
        for line in stdout:
            lines.put((self, line))
        self._process.wait()
        lines.put((self, None))

    def count(self, line: str) -> bool:
        """Read a line of progress; False if it is none."""
        try:
            self.done = min(self.total, int(json.loads(line)["done"]))
        except (ValueError, KeyError, TypeError):
            return False
        return True

    def seconds_of_video(self) -> float | None:
        """Return the mean time of a video so far."""
        return (time.monotonic() - self.started) / self.done if self.done else None

    def finish(self) -> str | None:
        """Check the result and put it into the run's folder; return what is wrong with it, with the end of the log."""
        run, dimension, code = self.job.run, self.dimension, self._process.returncode
        try:
            if code != 0:
                raise ValueError(f"the scorer ended with exit code {code}")
            result = read_json(self.work / "result.json")
            if result is None:
                raise ValueError("the scorer has written no result")
            scored, videos = parse_result(result, dimension)
            names = {item.name for item in items_of(run, dimension)}
            if names != videos.keys():
                raise ValueError(f"the scorer has scored {len(names & videos.keys())} of {len(names)} videos")
        except ValueError as error:
            return f"{first_line(error)}; end of {log_of(run, dimension)}:\n{_end_of(log_of(run, dimension))}"
        finally:
            self._open.close()
        folder, scorer = folder_of(run, dimension), self.job.scorer.name
        (folder / "record.json").unlink(missing_ok=True)  # none is better than that of another result
        write_json(folder / f"{dimension}{RESULTS_SUFFIX}", result)
        record = {
            "dimension": dimension,
            "score": scored,
            "videos": len(videos),
            "seconds": round(time.monotonic() - self.started, 1),
            "scorer": scorer,
            "device": self.job.device,
            "fingerprint": self._fingerprint,
        }
        write_json(folder / "record.json", record)
        return None

    def end(self) -> None:
        """End the process, and forget what it has done."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            self._process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._open.close()


class _Loop:
    """Keep as many processes at work as there are slots, until all dimensions are scored or it must stop."""

    def __init__(
        self,
        job: _Job,
        waiting: Sequence[str],
        slots: Sequence[Mapping[str, str]],
        summary: ScoringSummary,
        report: Report,
    ) -> None:
        self._job, self._waiting, self._free = job, list(waiting), list(slots)
        self._summary, self._report = summary, report
        self._lines: queue.Queue[tuple[_Process, str | None]] = queue.Queue()
        self._running: list[_Process] = []
        self._videos = {dimension: len(items_of(job.run, dimension)) for dimension in waiting}
        self._video_seconds: list[float] = []  # of dimensions that are done
        self._slots = len(slots)

    def run(self, stop: Callable[[], bool]) -> None:
        try:
            while not stop():
                while self._free and self._waiting:
                    self._start(self._waiting.pop(0))
                if not self._running:
                    return
                with suppress(queue.Empty):
                    process, line = self._lines.get(timeout=_POLL_SECONDS)
                    if line is None:
                        self._finish(process)
                    elif process.count(line):
                        self._report(self._step())
        finally:
            for process in self._running:
                process.end()

    def _start(self, dimension: str) -> None:
        if not self._job.again and _is_scored(self._job.run, dimension, self._job.scorer):  # by another machine
            self._summary.kept.append(dimension)
            del self._videos[dimension]
            return
        slot = self._free.pop()
        try:
            process = _Process(self._job, dimension, slot, self._lines)
        except Timeout:
            self._free.append(slot)
            self._summary.elsewhere.append(dimension)
            del self._videos[dimension]
            self._report(Note(f"{dimension} is being scored by another process: left to it"))
            return
        except OSError as error:
            self._free.append(slot)
            self._fail(dimension, f"the scorer does not start: {first_line(error)}")
            return
        self._running.append(process)
        self._report(Note(f"{dimension}: scoring {process.total:,} videos"))

    def _finish(self, process: _Process) -> None:
        self._running.remove(process)
        self._free.append(process.slot)
        seconds = process.seconds_of_video()
        if (problem := process.finish()) is not None:
            self._fail(process.dimension, problem)
            return
        if seconds is not None:
            self._video_seconds.append(seconds)
        self._summary.done.append(process.dimension)
        scored = read_scored(self._job.run, process.dimension)
        assert scored is not None
        self._report(Note(f"{process.dimension}: {100 * scored.score:.2f}"))

    def _fail(self, dimension: str, problem: str) -> None:
        self._summary.failed[dimension] = problem
        self._report(Note(f"{dimension} failed: {problem}"))

    def _step(self) -> Step:
        ended = sum(self._videos[name] for name in (*self._summary.done, *self._summary.failed))
        done = ended + sum(process.done for process in self._running)
        return Step(done, sum(self._videos.values()), self._seconds_left(), STAGE)

    def _seconds_left(self) -> float | None:
        """Estimate from the speed of each dimension at work; those that wait get the mean speed."""
        known = [seconds for process in self._running if (seconds := process.seconds_of_video()) is not None]
        if not known and not self._video_seconds:
            return None
        mean = sum(known + self._video_seconds) / len(known + self._video_seconds)
        running = [(process.total - process.done) * (process.seconds_of_video() or mean) for process in self._running]
        waiting = sum(self._videos[dimension] for dimension in self._waiting) * mean
        return round(max([*running, (sum(running) + waiting) / self._slots]), 1)


def _end_of(log: Path) -> str:
    """Return the last lines of a log; of a progress bar, only its last state."""
    with suppress(OSError):
        text = log.read_bytes().decode(errors="replace")
        lines = [line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n")]
        return "\n".join([line for line in lines if line][-_LOG_LINES:])
    return ""
