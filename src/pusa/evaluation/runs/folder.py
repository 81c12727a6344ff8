"""Keep a run in a folder that several processes and machines may share: its items, and what has been made of them.

Machines may see the folder at different places, and it may be moved: ``items.jsonl`` names files in it from there on.
"""

import errno
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from pusa.evaluation.runs import files
from pusa.evaluation.runs.checks import expect, problem_of
from pusa.evaluation.runs.items import SUFFIX, Item
from pusa.fsutil import flush, is_full, sha256_of

FORMAT = 1
_HERE = f"<run>{os.sep}"  # begins the path of a file in the folder of the run

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """Hold what is known of a video that has been made.

    Attributes:
        seconds: that it took, with everything that is not done once for all.
        attempts: how often it was tried until it was there.
        worker: host and process that made it.
        sha256: of the file.
        request_sha256: of the resolved request, see `pusa.evaluation.runs.checks.request_hash`.
        size_bytes, mtime_ns: of the file; while it has them, its content is not read again.
    """

    name: str
    seed: int
    seconds: float
    attempts: int
    worker: str
    sha256: str
    request_sha256: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Failure:
    """Hold why an item could not be made, the last time of so many `attempts`."""

    name: str
    error: str
    attempts: int


@dataclass(frozen=True)
class Problem:
    """Hold what is wrong with a video of a run."""

    name: str
    problem: str


class RunFolder:
    """Hold the items of a run and find what is made. `create` and `open` make one.

    Attributes:
        suite: kind of measurement: "vbench", "physics-iq", "fidelity", "sweep", ...
        settings: what all of its videos have in common, as JSON.
        videos: folder that holds finished videos and nothing else.
        parts: folder for what is being made.
    """

    def __init__(self, folder: Path, suite: str, settings: Mapping[str, Any], items: Sequence[Item]) -> None:
        self.folder, self.suite, self.settings, self.items = folder, suite, dict(settings), list(items)
        self.videos, self.parts, self.claims = folder / "videos", folder / "parts", folder / "claims"
        self._records, self._failures = folder / "records", folder / "failures"
        self._places = (self.videos, self.parts, self.claims, self._records, self._failures)
        self._same_content: set[tuple[str, int, int]] = set()

    @classmethod
    def create(cls, folder: Path, suite: str, settings: Mapping[str, Any], items: Sequence[Item]) -> "RunFolder":
        """Make the folder of a run, or open it if it is there with the same settings and items.

        Several machines may call it at once.

        Raises:
            ValueError: there are no items, or two of one name; the folder holds another run, and the message names the
                first difference, or videos of no run; it cannot be written.
            OSError: the disk is full.
        """
        if not items:
            raise ValueError("a run needs an item")
        names = set[str]()
        for item in items:
            if item.name in names:
                raise ValueError(f"{item.name!r} is the name of two items: their videos would have one file")
            names.add(item.name)
        settings = files.canonical(dict(settings))
        if not (folder / "run.json").exists():
            try:
                _write_run(folder, suite, settings, items)
            except OSError as error:
                if is_full(error):
                    raise
                raise ValueError(f"{folder} cannot be written ({error.strerror}): give another folder") from error
        run = cls.open(folder, suite)
        if found := files.difference(run.settings, settings):
            raise ValueError(
                f"{folder} holds a run with other settings ({found}): give another folder, or its settings"
            )
        for number, (before, after) in enumerate(zip(run.items, items, strict=False), start=1):
            if found := files.difference(_stored(before, folder), _stored(after, folder)):
                raise ValueError(f"{folder} holds a run with other items (item {number}: {found}): give another folder")
        if len(run.items) != len(items):
            raise ValueError(
                f"{folder} holds a run of {len(run.items)} items and not {len(items)}: give another folder"
            )
        return run

    @classmethod
    def open(cls, folder: Path, suite: str | None = None) -> "RunFolder":
        """Open the folder of a run.

        Args:
            suite: kind of measurement that the run must be of.

        Raises:
            FileNotFoundError: it is no folder of a run.
            ValueError: it is of another suite or of a newer version, or damaged.
        """
        path = folder / "run.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no run of an evaluation: it has no run.json")
        head = files.read_json(path)
        if head is None or not isinstance(head.get("settings"), dict) or "suite" not in head:
            raise ValueError(f"{path} is damaged: begin in another folder")
        if head.get("format") != FORMAT:
            raise ValueError(f"{folder} is a run of format {head.get('format')}, and this version reads {FORMAT}")
        if suite is not None and head["suite"] != suite:
            raise ValueError(f"{folder} holds a run of {head['suite']} and not of {suite}: give another folder")
        try:
            lines = (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()
            items = [Item.from_json(_replace(json.loads(line), _HERE, _beginning(folder))) for line in lines]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / 'items.jsonl'} is damaged ({error}): begin in another folder") from error
        if len(items) != head.get("items"):
            raise ValueError(
                f"{folder / 'items.jsonl'} is damaged: it has {len(items)} items, and {path} counts "
                f"{head.get('items')}: begin in another folder"
            )
        run = cls(folder, head["suite"], head["settings"], items)
        for place in run._places:
            with suppress(OSError):  # it may be looked at where it cannot be written
                place.mkdir(exist_ok=True)
        return run

    @cached_property
    def id(self) -> str:
        """Name the run by 24 hexadecimal digits: a hash of its suite, settings and items, wherever it is."""
        items = [_stored(item, self.folder) for item in self.items]
        return files.hash_of([self.suite, files.canonical(self.settings), items])[:24]

    # ---- what is made ------------------------------------------------------------------------------------------------

    def video_of(self, item: Item) -> Path:
        """Return the path that an item's video has or will have."""
        return self.videos / f"{item.name}{SUFFIX}"

    def record_of(self, item: Item) -> Record | None:
        """Read what is known of an item's video; None if it was never made."""
        return _read(Record, self._record_path(item))

    def is_made(self, item: Item) -> bool:
        """Tell if an item's video is there, with the content that it was made with."""
        record = self.record_of(item)
        if record is None:
            return False
        try:
            status = self.video_of(item).stat()
        except FileNotFoundError:
            return False
        if status.st_size != record.size_bytes:
            return False
        stamp = (item.id, status.st_size, status.st_mtime_ns)
        if status.st_mtime_ns != record.mtime_ns and stamp not in self._same_content:  # a copy, or another video
            if sha256_of(self.video_of(item)) != record.sha256:
                return False
            self._same_content.add(stamp)
        return True

    def missing(self) -> list[Item]:
        """List the items whose videos are not made, or not whole any more."""
        return [item for item in self.items if not self.is_made(item)]

    def failures(self) -> list[Failure]:
        """List the items that failed when they were last tried."""
        return [found for item in self.items if (found := self.failure_of(item)) and not self.is_made(item)]

    def failure_of(self, item: Item) -> Failure | None:
        """Read why an item failed when it was last tried; None if it did not, or was made since."""
        return _read(Failure, self._failure_path(item))

    def problems(self, *, decode: bool = False) -> list[Problem]:
        """Check every video: that it is there, opens, is the one that was made, and has its frames, fps and size.

        Args:
            decode: read every frame, which takes about a second for a hundred large ones.
        """
        found = []
        for item in self.items:
            record, video = self.record_of(item), self.video_of(item)
            problem = problem_of(video, expect(item.request, item.cut), decode=decode)
            if problem is None and record is None:
                problem = "it has no record: it was not made here"
            elif problem is None and record is not None and sha256_of(video) != record.sha256:
                problem = "it is not the file that was made"
            if problem is not None:
                found.append(Problem(item.name, problem))
        return found

    # ---- what makes it calls these -----------------------------------------------------------------------------------

    def check_places(self) -> None:
        """Raise PermissionError unless videos and what belongs to them can be written, before any work."""
        for place in self._places:
            if not os.access(place, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))

    def commit(self, item: Item, part: Path, *, seconds: float, worker: str) -> Record:
        """Put a finished video in its place, and what is known of it. Raises OSError."""
        flush(part)
        status, failure = part.stat(), self.failure_of(item)
        seed = item.request.seed
        assert seed is not None
        record = Record(
            name=item.name,
            seed=seed,
            seconds=round(seconds, 3),
            attempts=1 + (failure.attempts if failure else 0),
            worker=worker,
            sha256=sha256_of(part),
            request_sha256=expect(item.request).request_sha256,
            size_bytes=status.st_size,
            mtime_ns=status.st_mtime_ns,
        )
        files.write_json(self._record_path(item), asdict(record))
        os.replace(part, self.video_of(item))  # last: a video that is there has a record
        self._failure_path(item).unlink(missing_ok=True)
        return record

    def fail(self, item: Item, error: str) -> Failure:
        """Count a failed attempt, and keep its error."""
        before = self.failure_of(item)
        failure = Failure(item.name, error, 1 + (before.attempts if before else 0))
        files.write_json(self._failure_path(item), asdict(failure))
        return failure

    def forget_failures(self) -> None:
        """Let items that have failed be tried again, as often as any other."""
        for item in self.items:
            self._failure_path(item).unlink(missing_ok=True)

    def _record_path(self, item: Item) -> Path:
        return self._records / f"{item.id}.json"

    def _failure_path(self, item: Item) -> Path:
        return self._failures / f"{item.id}.json"


def _write_run(folder: Path, suite: str, settings: Mapping[str, Any], items: Sequence[Item]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "videos").is_dir() and any((folder / "videos").iterdir()):
        raise ValueError(f"{folder / 'videos'} has files, and {folder} is no run: give a new folder")
    lines = "".join(json.dumps(_stored(item, folder), ensure_ascii=False) + "\n" for item in items)
    files.write_whole(folder / "items.jsonl", lines)
    head = {"format": FORMAT, "suite": suite, "items": len(items), "settings": settings}
    files.write_new(folder / "run.json", json.dumps(head, ensure_ascii=False, indent=1) + "\n")


def _stored(item: Item, folder: Path) -> Any:
    """Convert an item to JSON, the same wherever the folder is."""
    return _replace(files.canonical(item.as_json()), _beginning(folder), _HERE)


def _beginning(folder: Path) -> str:
    return f"{folder.absolute()}{os.sep}"


def _replace(value: Any, before: str, after: str) -> Any:
    """Replace the beginning of every text in a JSON value that begins with `before`."""
    if isinstance(value, str):
        return after + value.removeprefix(before) if value.startswith(before) else value
    if isinstance(value, list):
        return [_replace(one, before, after) for one in value]
    if isinstance(value, dict):
        return {name: _replace(one, before, after) for name, one in value.items()}
    return value


def _read(kind: type[T], path: Path) -> T | None:
    """Read a record; None if it is missing or damaged."""
    values = files.read_json(path)
    if values is None:
        return None
    try:
        return kind(**values)
    except TypeError:
        return None
