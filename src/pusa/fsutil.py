"""Flush, replace and hash files, tell if they changed, and recognise a full disk."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota error


def is_full(error: BaseException) -> bool:
    """Tell if an error means that the disk, or the quota on it, is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk (folders on POSIX only: other file systems do it themselves)."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path` to write to, and rename it in the end: `path` never holds half a file."""
    part = path.with_name(f".{path.name}.part")
    yield part
    part.replace(path)


def check_new_folder(folder: Path) -> None:
    """Raise ValueError if a folder to be written is there already, and not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: give a new folder")


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `folder`, which becomes `folder` at the end, or is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        if folder.exists():
            folder.rmdir()  # empty, or this raises
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    flush(folder.parent)


def cache_folder() -> Path:
    """Name the folder for what can be made again: that of PUSA_CACHE, or ``~/.cache/pusa``."""
    return Path(os.environ.get("PUSA_CACHE", "~/.cache/pusa")).expanduser()


def private_folder(path: Path) -> Path:
    """Create a folder that only this user may enter, with its parents, and close an existing one of this user."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if os.name == "posix" and status.st_uid == os.geteuid() and status.st_mode & 0o077:
        with suppress(PermissionError):  # file systems without modes
            path.chmod(status.st_mode & 0o700)
    return path


def private_opener(path: str, flags: int) -> int:
    """Open a file for `open(..., opener=private_opener)`; a new one may be read by this user alone."""
    return os.open(path, flags, 0o600)


def sha256_of(path: Path) -> str:
    """Hash a file's content; return hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


FileStat = tuple[str, int, int, int, int]

_MODEL_SUFFIXES = {".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".json", ".model", ".txt"}
_WHOLE_BYTES = 1 << 28  # larger files of a folder are hashed at samples
_SAMPLE_BYTES, _SAMPLES = 1 << 16, 256


def stat_of(path: Path) -> tuple[FileStat, ...]:
    """List path, inode, size and times of a file, or of a model folder's files; empty if there is none.

    Any write to a file, or another one in its place, changes the list.
    """
    found = [path]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in _MODEL_SUFFIXES)
    stats = [(file, file.stat()) for file in found if file.is_file()]
    return tuple((str(file), s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file, s in stats)


_hashes: dict[tuple[FileStat, ...], str] = {}  # of files as they were


def fingerprint_of(path: Path) -> str:
    """Hash a file (its SHA-256) or a model folder; return hexadecimal digits.

    In a folder, files count with their names, and those above 256 MB by 256 samples of 64 KiB: a model of 60 GB takes
    seconds. What has not changed since the last call is not read again.
    """
    stats = stat_of(path)
    if stats not in _hashes:
        _hashes[stats] = _hash_folder(path, stats) if path.is_dir() else sha256_of(path)
    return _hashes[stats]


def sampled_fingerprint_of(path: Path) -> str:
    """Hash a file's content as `fingerprint_of` does in a folder: above 256 MB by samples."""
    digest = hashlib.sha256()
    _hash_content(digest, path, path.stat().st_size)
    return digest.hexdigest()


def samples_of(path: Path, count: int) -> Iterator[bytes]:
    """Read so many pieces of 64 KiB of a file, from its beginning to its end."""
    last = max(0, path.stat().st_size - _SAMPLE_BYTES)
    with path.open("rb") as file:
        for number in range(count):
            file.seek(last * number // (count - 1))
            yield file.read(_SAMPLE_BYTES)


def _hash_folder(folder: Path, stats: Iterable[FileStat]) -> str:
    digest = hashlib.sha256()
    for name, _, size_bytes, *_ in stats:
        file = Path(name)
        digest.update(f"{file.relative_to(folder).as_posix()}:{size_bytes};".encode())
        _hash_content(digest, file, size_bytes)
    return digest.hexdigest()


def _hash_content(digest: "hashlib._Hash", file: Path, size_bytes: int) -> None:
    if size_bytes <= _WHOLE_BYTES:
        digest.update(sha256_of(file).encode())
        return
    for sample in samples_of(file, _SAMPLES):
        digest.update(sample)
