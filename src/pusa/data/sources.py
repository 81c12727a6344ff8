"""List the files and captions to prepare, from a folder, a table or the `datasets` library."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pusa.data.clips import Content
from pusa.data.format import DATASET_FILE

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".gif"})
PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
TABLE_SUFFIXES = frozenset({".csv", ".json", ".jsonl"})
CAPTIONS_FILE = "captions.json"
METADATA_FILES = ("metadata.csv", "metadata.jsonl")  # as `datasets` has them in folders of videos and pictures
FILE_COLUMNS = ("file_name", "file", "video", "image", "path", "filename", "video_path")
CAPTION_COLUMNS = ("caption", "prompt", "text", "description")

_NO_CAPTION = "has no caption: write one into a .txt file of the same name, or give --caption"
_TEXT_LIMIT_BYTES = 64 * 2**10  # of a caption's file; UMT5 reads 512 tokens of it


@dataclass(frozen=True)
class Item:
    """Hold one file and its caption. `name` is for messages; `read` returns the content of an item without a `path`."""

    name: str
    caption: str
    path: Path | None = None
    read: Callable[[], Content] | None = None

    def content(self) -> Content:
        if self.path is not None:
            return self.path
        assert self.read is not None
        return self.read()


@dataclass
class Listing:
    """Hold the items to prepare and those left out: (name, reason)."""

    items: list[Item] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, caption: str | None, **where: Any) -> None:
        text = " ".join(caption.split()) if caption else ""
        if text or caption == "":
            self.items.append(Item(name, text, **where))
        else:
            self.skipped.append((name, _NO_CAPTION))


def list_files(source: str | Path, *, captions: Path | None = None, caption: str | None = None) -> Listing:
    """List the files of a source in a fixed order.

    Args:
        source: a folder of videos and pictures (captions in ``NAME.txt`` beside each, in ``captions.json``, or in
            ``metadata.csv`` or ``.jsonl`` with ``file_name``), a CSV, JSON or JSONL table (a column for the file, one
            for the caption; files beside the table), a single file, or what the `datasets` library saves.
        captions: a table or ``captions.json`` that takes precedence over all others.
        caption: for files that have none, and may be empty; None: they are left out.

    Raises:
        FileNotFoundError, ValueError: there is no such source, or it holds nothing to prepare.
        RuntimeError: the `datasets` library is needed and not installed.
    """
    path = Path(source).expanduser()
    overrides = _captions(captions) if captions else {}
    if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
        listing = _from_table(path, overrides, caption)
    elif path.is_file() and path.suffix.lower() != ".parquet":
        listing = Listing()
        listing.add(path.name, _caption_of(path, path.name, overrides) or caption, path=path)
    elif path.is_dir() and not _is_saved_dataset(path):
        listing = _from_folder(path, overrides, caption)
    elif path.exists():
        listing = _from_datasets(path, caption)
    else:
        raise FileNotFoundError(f"{source} does not exist: give a folder, a table or a Hub id (owner/name)")
    if not (listing.items or listing.skipped):
        raise ValueError(f"{source} holds no videos or pictures")
    if not listing.items:
        name, reason = listing.skipped[0]
        raise ValueError(f"{source}: none of {len(listing.skipped)} files can be used; {name} {reason}")
    return listing


# ---- folders and tables ----------------------------------------------------------------------------------------------


def _from_folder(folder: Path, overrides: Mapping[str, str], default: str | None) -> Listing:
    table = next((folder / name for name in METADATA_FILES if (folder / name).is_file()), None)
    captions = {**_captions(folder / CAPTIONS_FILE), **(_captions(table) if table else {}), **overrides}
    listing = Listing()
    datasets = {file.parent for file in folder.rglob(DATASET_FILE)}  # skip pictures in datasets that pusa wrote
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if (
            hidden
            or not datasets.isdisjoint(path.parents)
            or path.suffix.lower() not in VIDEO_SUFFIXES | PICTURE_SUFFIXES
            or not path.is_file()
        ):
            continue
        name = path.relative_to(folder).as_posix()
        try:
            listing.add(name, _caption_of(path, name, captions) or default, path=path)
        except ValueError as error:
            listing.skipped.append((name, str(error)))
    return listing


def _caption_of(path: Path, name: str, captions: Mapping[str, str]) -> str | None:
    """Look a caption up by path, name or stem, then in a .txt file. Raises ValueError for a .txt that is no text."""
    for key in (name, path.name, Path(name).with_suffix("").as_posix(), path.stem):
        if key in captions:
            return captions[key]
    for beside in (path.with_suffix(".txt"), path.with_name(path.name + ".txt")):
        if beside.is_file():
            if beside.stat().st_size > _TEXT_LIMIT_BYTES:
                raise ValueError(f"{beside.name} has more than {_TEXT_LIMIT_BYTES >> 10} KiB: that is no caption")
            return _decoded(beside)
    return None


def _from_table(table: Path, overrides: Mapping[str, str], default: str | None) -> Listing:
    listing = Listing()
    for name, caption in _pairs(table):
        path = table.parent / name
        listing.add(name, _caption_of(path, name, overrides) or caption or default, path=path)
    return listing


def _captions(path: Path) -> dict[str, str]:
    """Read captions by file name from a table or a JSON object; {} if there is no such file."""
    return {name: caption for name, caption in _pairs(path) if caption} if path.is_file() else {}


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (file, caption) of each row; the caption may be empty."""
    rows = list(_rows(path))
    if not rows:
        raise ValueError(f"{path} has no rows")
    file_column, caption_column = (_column(rows[0], names) for names in (FILE_COLUMNS, CAPTION_COLUMNS))
    if file_column is None:
        raise ValueError(
            f"{path} has the columns {', '.join(map(str, rows[0]))}: one of {', '.join(FILE_COLUMNS)} must be there"
        )
    for number, row in enumerate(rows, start=1):
        name, caption = row.get(file_column), row.get(caption_column) if caption_column else ""
        if not isinstance(name, str) or not name:
            raise ValueError(f"{path}, row {number}: {file_column} is {name!r}, and not the name of a file")
        yield name, caption if isinstance(caption, str) else ""


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a file: one per line, the caption column of a table, or a JSON list of strings.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds no prompts.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give a file with a prompt in each line")
    if path.suffix.lower() not in TABLE_SUFFIXES:
        lines = _decoded(path).splitlines()
    else:
        rows = list(_rows(path))
        column = _column(rows[0], CAPTION_COLUMNS) if rows else CAPTION_COLUMNS[0]
        if column is None:
            raise ValueError(f"{path}: one of the columns {', '.join(CAPTION_COLUMNS)} must be there")
        lines = [str(row.get(column) or "") for row in rows]
    prompts = [" ".join(text.split()) for text in lines if text.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts: write one into each line")
    return prompts


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    text = _decoded(path)
    if path.suffix.lower() == ".csv":
        yield from csv.DictReader(io.StringIO(text, newline=""))
        return
    try:
        if path.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            rows = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if isinstance(rows, dict):  # {"clip.mp4": "what it shows"}
        rows = [{"file": name, "caption": caption} for name, caption in rows.items()]
    for row in rows:
        if isinstance(row, str):
            row = {"caption": row}
        if not isinstance(row, dict):
            raise ValueError(f"{path} holds {type(row).__name__}s: give objects with a file and a caption")
        yield row


def _column(row: Iterable[str], names: Iterable[str]) -> str | None:
    lower = {str(column).strip().lower(): column for column in reversed(list(row))}
    return next((lower[name] for name in names if name in lower), None)


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 (byte {error.start}): save it as UTF-8") from error


# ---- the Hub and `datasets` ------------------------------------------------------------------------------------------


def _is_saved_dataset(folder: Path) -> bool:
    """Detect a folder written by ``save_to_disk`` of `datasets`, or one of parquet files."""
    return (
        (folder / "state.json").is_file()
        or (folder / "dataset_dict.json").is_file()
        or any(True for _ in folder.glob("*.parquet"))
        or any(True for _ in (folder / "data").glob("*.parquet"))
    )


def download(source: str) -> Path:
    """Download a dataset from the Hub and return its folder.

    Raises:
        FileNotFoundError: there is no such dataset, or it cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(source, repo_type="dataset"))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{source} is no folder here and cannot be had from the Hub: check the name and the connection, or log in "
            "with `hf auth login` if it is private"
        ) from error


def _from_datasets(path: Path, default: str | None) -> Listing:
    """List rows with a video or image column, as bytes for pusa's readers: the library's decoders never run."""
    try:
        import datasets
    except ImportError as error:
        raise RuntimeError(
            f"{path} is read by the `datasets` library, which is not installed: pip install 'pusa[data]'"
        ) from error
    if path.is_dir() and not any(True for _ in path.rglob("*.parquet")):
        data = datasets.load_from_disk(str(path))
    else:
        files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
        data = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    splits = data if isinstance(data, dict) else {"": data}
    listing = Listing()
    for split, rows in splits.items():
        file_column = _column(rows.column_names, ("video", "image", *FILE_COLUMNS))
        caption_column = _column(rows.column_names, CAPTION_COLUMNS)
        if file_column is None:
            raise ValueError(
                f"{path} has the columns {', '.join(rows.column_names)}: a video or an image must be there"
            )
        feature = rows.features[file_column]
        if isinstance(feature, datasets.Video | datasets.Image):
            rows = rows.cast_column(file_column, type(feature)(decode=False))
        texts = rows[caption_column] if caption_column else [None] * len(rows)
        for number, text in enumerate(texts):
            read = _Row(rows, number, file_column, path if path.is_dir() else path.parent)
            listing.add(f"{split}{'/' if split else ''}{number:06d}", text or default, read=read)
    return listing


@dataclass(frozen=True)
class _Row:
    rows: Any
    number: int
    column: str
    folder: Path

    def __call__(self) -> Content:
        value = self.rows[self.number][self.column]
        if isinstance(value, Mapping):
            value = value["bytes"] if value.get("bytes") else value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise ValueError(f"row {self.number} holds no file")
        return self.folder / value  # an absolute path stays as it is
