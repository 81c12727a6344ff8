"""Load the settings of a server from the command line, the environment and a file."""

import difflib
import logging
import os
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pusa.fields import FieldSpec, explain, field_specs
from pusa.server.keys_file import read_keys
from pusa.server.settings import ServerSettings

PREFIX = "PUSA_"
CONFIG_VARIABLE = "PUSA_CONFIG"
_OTHER_VARIABLES = {CONFIG_VARIABLE, "PUSA_API_KEY", "PUSA_CACHE"}  # no settings: of this module, the client, caches

logger = logging.getLogger(__name__)


def load_settings(
    file: str | Path | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> ServerSettings:
    """Load the settings from all sources.

    Args:
        file: TOML; defaults to the file that PUSA_CONFIG names.
        environ: defaults to that of the process.
        options: of the command line, typed or as text; None and () stand for options left out.

    Raises:
        FileNotFoundError: the file, or `api_keys_file`, does not exist.
        ValueError: invalid settings, one line for each.
    """
    environ = os.environ if environ is None else environ
    file = file or environ.get(CONFIG_VARIABLE) or None
    values = _read_toml(Path(file)) if file else {}
    values |= _from_environment(environ)
    for name, value in (options or {}).items():
        if value is not None and value != ():
            values[name] = parse_option(name, value) if isinstance(value, str) else value
    keys_file = values.get("api_keys_file")
    if isinstance(keys_file, str):
        keys = values.get("api_keys") or ()
        values["api_keys"] = [*([keys] if isinstance(keys, str) else keys), *read_keys(Path(keys_file).expanduser())]
    try:
        return ServerSettings.model_validate(values)
    except ValidationError as error:
        raise ValueError(explain(error)) from error


def parse_option(name: str, text: str) -> Any:
    """Parse text of the environment or the command line for a field, as `FieldSpec.parse`; unknown ones stay text."""
    spec = _fields().get(name)
    return text.strip() if spec is None else spec.parse(text)


@cache
def _fields() -> dict[str, FieldSpec]:
    return {spec.name: spec for spec in field_specs(ServerSettings)}


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for variable, text in environ.items():
        name = variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX) or not text:
            continue
        if name in _fields():
            values[name] = parse_option(name, text)
        elif variable not in _OTHER_VARIABLES:
            for similar in difflib.get_close_matches(name, _fields(), n=1, cutoff=0.8):
                logger.warning("%s is unknown: did you mean %s%s?", variable, PREFIX, similar.upper())
    return values


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration {str(path)!r}: check the name, or leave it out")
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
