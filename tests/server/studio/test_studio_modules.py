"""The parts of the page that need no browser: tests of JavaScript by node, and the texts in all languages."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pusa.media import source
from pusa.server.studio.page import LANGUAGES, WEB

SCRIPTS = [path for path in sorted(WEB.rglob("*.js")) if "vendor" not in path.parts]
JS_TESTS = sorted((Path(__file__).parent / "js").glob("*.js"))
SECTIONS = "app|shell|form|fields|timeline|result|gallery|errors|notes"
_KEY = re.compile(rf"""["']((?:{SECTIONS})(?:\.[a-z_0-9]+)+)["']""")
_BUILT_KEY = re.compile(rf"""`((?:{SECTIONS})\.[a-z_0-9.]*\$\{{[^`]*)`""")
_EXPORT = re.compile(r"^export (?:async )?(?:function\*?|const|let|class) (\w+)", re.MULTILINE)
_NAME = re.compile(r"[a-z_0-9]+")


def test_the_tests_of_the_pages_own_language_pass() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: the tests in tests/server/studio/js are not run")
    files = [str(path) for path in JS_TESTS if path.name.endswith(".test.js")]
    ended = subprocess.run([node, "--test", *files], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout[-6000:]


def texts(language: str) -> dict[str, str]:
    found: dict[str, str] = {}

    def walk(node: dict[str, Any], path: str) -> None:
        for name, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{path}{name}.")
            else:
                found[f"{path}{name}"] = value

    walk(json.loads((WEB / "locales" / f"{language}.json").read_text(encoding="utf-8")), "")
    return found


def values_of(text: str) -> set[str]:
    """Return the names of a message's values, also of those inside the choices of another one."""
    found, depth = set(), 0
    for place, letter in enumerate(text):
        if letter == "{":
            if depth % 2 == 0 and (name := _NAME.match(text, place + 1)):
                found.add(name[0])
            depth += 1
        elif letter == "}":
            depth -= 1
    return found


@pytest.mark.parametrize("language", [name for name in LANGUAGES if name != "en"])
def test_every_text_is_there_in_every_language_with_the_same_values(language: str) -> None:
    english, other = texts("en"), texts(language)
    assert sorted(other) == sorted(english)
    for key, text in english.items():
        assert bool(other[key].strip()) == bool(text), key
        assert values_of(other[key]) <= values_of(text), key


def test_parts_name_the_texts_that_are_there_and_no_others_are_there() -> None:
    written = {path: path.read_text(encoding="utf-8") for path in SCRIPTS}
    english = texts("en")
    sections = {key.rpartition(".")[0] for key in english}
    named = {(key, path.name) for path, text in written.items() for key in _KEY.findall(text)}
    assert len(named) > 100
    assert sorted(pair for pair in named if pair[0] not in english.keys() | sections) == []
    built = {re.sub(r"\$\{[^}]*\}", "*", key) for text in written.values() for key in _BUILT_KEY.findall(text)}
    built |= {f"{key}.*" for key, _ in named if key in sections}
    patterns = [re.compile(re.escape(key).replace(r"\*", "[a-z_0-9]+")) for key in built]
    assert [pattern.pattern for pattern in patterns if not any(map(pattern.fullmatch, english))] == []
    unused = english.keys() - {key for key, _ in named} - {"name"}  # of the language: the server reads it
    unused -= {key for key in english if key.startswith(("errors.", "notes."))}  # see test_server_codes.py
    assert sorted(key for key in unused if not any(pattern.fullmatch(key) for pattern in patterns)) == []


def test_parts_export_what_other_parts_or_tests_import() -> None:
    written = {path: path.read_text(encoding="utf-8") for path in (*SCRIPTS, *JS_TESTS)}
    unused = [
        f"{path.name}: {name}"
        for path in SCRIPTS
        for name in _EXPORT.findall(written[path])
        if not any(re.search(rf"\b{name}\b", text) for other, text in written.items() if other != path)
    ]
    assert unused == []


def test_every_format_that_a_file_may_have_has_a_name_in_every_language() -> None:
    names = {re.sub(r"\W+", "_", kind.name.lower()).rstrip("_") for _, kind in source._SIGNATURES}
    missing = {f"errors.formats.{name}" for name in names} - set(texts("en"))
    assert not missing


def test_parts_take_libraries_from_one_place() -> None:
    direct = [path.name for path in SCRIPTS if re.search(r'from "(?:preact|htm|@preact)', path.read_text("utf-8"))]
    assert direct == ["dom.js"]


def test_no_part_is_too_long_to_be_read_at_once() -> None:
    long = {path.name: count for path in SCRIPTS if (count := path.read_text("utf-8").count("\n")) > 400}
    assert long == {}
