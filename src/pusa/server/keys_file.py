"""Read API keys from a file, and check their lengths."""

from collections.abc import Sequence
from pathlib import Path

from pusa.fields import shown

MIN_KEY_LENGTH = 16


def read_keys(path: Path) -> list[str]:
    """Read a file with one API key a line; # begins a comment.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no key, or one that is too short.
    """
    if not path.is_file():
        raise FileNotFoundError(f"api_keys_file={shown(str(path))} is not there: check its name and who may read it")
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    keys = [line for line in lines if line]
    if not keys:
        raise ValueError(f"api_keys_file={shown(str(path))} holds no key: write one a line")
    check_key_lengths(keys)
    return keys


def check_key_lengths(keys: Sequence[str]) -> None:
    """Raise ValueError for a key that is too short; the message must not contain it."""
    short = [len(key) for key in keys if len(key) < MIN_KEY_LENGTH]
    if short:
        raise ValueError(
            f"an API key has {short[0]} characters and needs {MIN_KEY_LENGTH}: "
            "`python -c 'import secrets; print(secrets.token_urlsafe(32))'` makes one"
        )
