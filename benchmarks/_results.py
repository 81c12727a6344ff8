"""Gather the results of a training run on a card in a few files of limited size, and rebuild them.

    python benchmarks/_results.py WORK OUT          # gather, on the card
    python benchmarks/carry.py unpack OUT FOLDER    # rebuild it at home, checking every hash

Only so many files of so many bytes come back from the card. The model, the pictures, the records and the logs are
taken; checkpoints and caches stay. Small files go into ``results.tar``, the large ones lie beside it, cut where they
are too large. The standard library is enough here.
"""

import hashlib
import io
import json
import re
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

PART_BYTES = 14_000_000
MOST_FILES = 8
MOST_BYTES = 64 * 2**20
ARCHIVE = "results.tar"
_MANIFEST = "manifest.json"
_RECORDS = {".jpg", ".jpeg", ".png", ".json", ".jsonl", ".log", ".txt", ".md", ".csv"}
_LARGEST_RECORD = 4_000_000


def gather(work: Path, out: Path) -> list[str]:
    """Put what `work` holds into `out`, where logs may lie already.

    Returns:
        What is wrong with the result, empty if nothing: too many files or bytes, or no model. All is written anyway.
    """
    chosen, left_out = _choose(work)
    inside, beside = _split(work, chosen)
    manifest = {}
    for path in beside:
        manifest[path] = _facts(work / path) | {"files": _write_parts(work / path, path, out)}
    manifest |= {path: _facts(work / path) for path in inside}
    text = json.dumps({"files": manifest, "left_out": left_out}, indent=1)
    with tarfile.open(out / ARCHIVE, "w") as archive:
        _add(archive, _MANIFEST, text.encode())
        for path in inside:
            _add(archive, f"files/{path}", (work / path).read_bytes())
    return _complaints(out, has_model=any(path.startswith("model/") for path in chosen))


def _choose(work: Path) -> tuple[list[str], dict[str, int]]:
    """The files to take, the smallest first, and the bytes of each that stays."""
    sizes = {path.relative_to(work).as_posix(): path.stat().st_size for path in work.rglob("*") if path.is_file()}
    chosen = [path for path, size in sizes.items() if path.startswith("model/") or _is_record(path, size)]
    return sorted(chosen, key=lambda path: (sizes[path], path)), {p: s for p, s in sizes.items() if p not in chosen}


def _is_record(path: str, size: int) -> bool:
    of_dataset = path.startswith("dataset/")  # latents and captions that the adapter was trained on
    return Path(path).suffix.lower() in _RECORDS and size <= _LARGEST_RECORD and not of_dataset


def _split(work: Path, chosen: list[str]) -> tuple[list[str], list[str]]:
    """Those that fit into one archive, and those that go beside it."""
    total, inside = 20_480, []  # of tar's own
    for path in chosen:
        total += (work / path).stat().st_size + 2048 + 400  # padded, behind a header; an entry of the manifest
        if total > PART_BYTES:
            break
        inside.append(path)
    return inside, chosen[len(inside) :]


def _facts(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def _write_parts(source: Path, path: str, out: Path) -> list[str]:
    """Copy a file, cut into parts if it is too large, under names without folders; returns the names."""
    flat = re.sub(r"[^A-Za-z0-9._-]", "_", path.replace("/", "."))
    content = source.read_bytes()
    parts = [content[first : first + PART_BYTES] for first in range(0, max(1, len(content)), PART_BYTES)]
    names = [flat] if len(parts) == 1 else [f"{flat}.part{number}" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        if (out / name).exists():
            raise FileExistsError(f"{out / name} is there already: give an empty folder")
        (out / name).write_bytes(part)
    return names


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _complaints(out: Path, *, has_model: bool) -> list[str]:
    sizes = {path.name: path.stat().st_size for path in out.iterdir() if path.is_file()}
    found = []
    if not has_model:
        found.append("there is no model among the results: the recipe did not come so far, see its log")
    if len(sizes) > MOST_FILES:
        found.append(f"{len(sizes)} files, and {MOST_FILES} may come back: {', '.join(sorted(sizes))}")
    if sum(sizes.values()) > MOST_BYTES:
        found.append(f"{sum(sizes.values())} bytes together, and {MOST_BYTES} may come back: a smaller model is needed")
    found += [f"{name} has {size} bytes, of {PART_BYTES}" for name, size in sorted(sizes.items()) if size > PART_BYTES]
    return found


def unpack(out: Path, target: Path) -> dict[str, int]:
    """Rebuild in `target` what `gather` has put into `out`.

    Returns:
        The files that stayed on the card, with their bytes.

    Raises:
        FileNotFoundError: a part is missing. FileExistsError: `target` holds something. ValueError: a part is damaged.
    """
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty: give another folder")
    archive = out / ARCHIVE
    if not archive.is_file():
        raise FileNotFoundError(f"{archive} is not there: {out} does not hold the results of a training run on a card")
    try:
        with tarfile.open(archive) as tar:
            contents = {entry.name: _content(tar, entry) for entry in tar if entry.isfile()}
        manifest = json.loads(contents[_MANIFEST])
    except (tarfile.TarError, KeyError, ValueError) as error:
        raise ValueError(f"{archive} is damaged ({error}): copy it from the card again") from None
    for path, content in _rebuilt(out, manifest["files"], contents):
        file = (target / path).resolve()
        if not file.is_relative_to(target.resolve()):
            raise ValueError(f"{archive} is damaged: {path!r} would lie outside of {target}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return manifest["left_out"]


def _content(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(entry)
    assert file is not None  # it is a file
    return file.read()


def _rebuilt(out: Path, files: Mapping[str, dict], contents: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    for path, facts in files.items():
        if "files" in facts:
            lacking = [name for name in facts["files"] if not (out / name).is_file()]
            if lacking:
                raise FileNotFoundError(f"{out} lacks {', '.join(lacking)}, which {path} is made of")
            content = b"".join((out / name).read_bytes() for name in facts["files"])
        else:
            content = contents.get(f"files/{path}", b"")
        if len(content) != facts["bytes"] or hashlib.sha256(content).hexdigest() != facts["sha256"]:
            raise ValueError(f"{path} is damaged (its hash is another): copy the results from the card again")
        yield path, content


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/_results.py WORK OUT")
    work, out = Path(sys.argv[1]), Path(sys.argv[2])
    complaints = gather(work, out)
    for path in sorted(out.iterdir()):
        print(f"{path.stat().st_size:>12,}  {path.name}")
    if complaints:
        sys.exit("\n".join(f"results: {complaint}" for complaint in complaints))


if __name__ == "__main__":
    main()
