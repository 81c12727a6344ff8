"""Write the small files of a run, which several machines may share."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pusa.fsutil import flush


def canonical(value: Any) -> Any:
    """Return a value as it is read back from JSON, with tuples as lists. Raises TypeError."""
    return json.loads(json.dumps(value))


def hash_of(value: Any) -> str:
    """Hash JSON, whatever the order of its names; return hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def part_of(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path` that no other process uses; it is removed at the end."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that `path` holds all of it or what it held before. Makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it holds all of its text or what it held before, even after a loss of power."""
    with part_of(path) as part:
        part.write_text(text, encoding="utf-8")
        flush(part)
        os.replace(part, path)


def write_new(path: Path, text: str) -> bool:
    """Write a file that is not there yet, with all of its text at once; False if another process was first."""
    with part_of(path) as part:
        part.write_text(text, encoding="utf-8")
        flush(part)
        try:
            os.link(part, path)  # fails if `path` is there; a rename would replace it
        except FileExistsError:
            return part.stat().st_nlink > 1  # a network disk whose answer was lost has asked twice
        except OSError:  # a file system without links
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(text)
            except FileExistsError:
                return False
    return True


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def difference(before: Any, after: Any, name: str = "") -> str | None:
    """Describe the first place where two JSON values differ: ``steps is 4 there and 10 here``; None if nowhere."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys((*before, *after)):
            if found := difference(before.get(key), after.get(key), f"{name}.{key}" if name else key):
                return found
        return None
    return None if before == after else f"{name} is {_short(before)} there and {_short(after)} here"


def _short(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
