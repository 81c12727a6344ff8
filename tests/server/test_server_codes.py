"""Every code of an error or a note is in the list, has the values of its text, and a text in every language.

``PYTHONPATH=tests/support python tests/server/test_server_codes.py`` writes the tables of docs/codes.md anew.
"""

import ast
import json
import pickle
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_samples import Served, clip, png, refusal, serving
from paths import ROOT
from pydantic import ValidationError

import pusa
from pusa.codes import ERRORS, NOTES, CodedError, CodedText, code_of, detail_of, plain, values_of
from pusa.defaults import WAN_DEFAULTS
from pusa.events import Note
from pusa.media import MediaError
from pusa.request import GenerationRequest, rounding_notes
from pusa.server.errors import _CODES, ServiceError
from pusa.server.http.validation import validation_error

PACKAGE = Path(pusa.__file__).parent
WEB = PACKAGE / "server" / "studio" / "web"
LANGUAGES = [path.stem for path in sorted((WEB / "locales").glob("*.json"))]
PAGE = ROOT / "docs" / "codes.md"
START = "<!-- tables: written by `PYTHONPATH=tests/support python tests/server/test_server_codes.py` -->\n"
PLACE_OF_CODE = {"ServiceError": 1, "CodedError": 0, "CodedText": 0, "Error": 0, "invalid_value": 2, "MediaError": 1}
COMMANDS = ("cli", "evaluation", "data", "training")  # for the command line alone
OF_THE_PAGE = {"connection", "fields", "formats"}  # what the page itself says


def coded_calls() -> Iterator[tuple[str, str, ast.Call, str]]:
    """Yield the name of each call that makes an error or a note, its code, the call and its place."""
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in COMMANDS:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            code = given.get("code")
            if name in PLACE_OF_CODE and code is None and len(node.args) > PLACE_OF_CODE[name]:
                code = node.args[PLACE_OF_CODE[name]]
            place = f"{path.name}:{node.lineno}"
            for one in (code.body, code.orelse) if isinstance(code, ast.IfExp) else (code,):
                if name in (*PLACE_OF_CODE, "Note") and isinstance(one, ast.Constant):
                    yield name, str(one.value), node, place


def test_every_code_is_in_the_list() -> None:
    found: dict[str, set[str]] = {"errors": set(), "notes": set()}
    for name, code, _, place in coded_calls():
        kind = "notes" if name in ("CodedText", "Note") else "errors"
        assert code in (NOTES if kind == "notes" else ERRORS), f"{place}: {code}"
        found[kind].add(code)
    assert found["notes"] == set(NOTES)
    elsewhere = {"cancelled", "storage_error", "too_many_connections", *_CODES.values()}
    by_pydantic = {"below_minimum", "above_maximum", "not_a_choice", "too_long", "empty_value"}
    of_answers = {"disk_full", "internal_error", "storage_unavailable", "invalid_request", "file_breaks_reader"}
    of_loading = {"model_not_loaded", "model_too_large", "model_files_missing"}
    of_limits = {"too_many_pixels", "too_many_frames", "too_many_steps"}
    assert set(ERRORS) <= found["errors"] | elsewhere | by_pydantic | of_answers | of_loading | of_limits


def test_every_code_comes_with_the_values_of_its_text() -> None:
    for name, code, call, place in coded_calls():
        if name not in ("CodedError", "CodedText", "MediaError") or any(k.arg is None for k in call.keywords):
            continue
        values = {keyword.arg for keyword in call.keywords} - {"code", "message"}
        told_later = {"name"} if code.startswith(("input_", "invalid_file")) or name == "MediaError" else set()
        wanted = set({**ERRORS, **NOTES}[code]) - told_later
        assert wanted <= values, f"{place}: {code} lacks {wanted - values}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_code_has_a_text_in_every_language(language: str, tmp_path: Path) -> None:
    locale = json.loads((WEB / "locales" / f"{language}.json").read_text(encoding="utf-8"))
    for section, codes in (("errors", ERRORS), ("notes", NOTES)):
        assert set(locale[section]) - OF_THE_PAGE == set(codes)
    if (node := shutil.which("node")) is None:
        pytest.skip("texts are formatted by node")
    texts = [
        {"text": locale[section][code], "values": {**dict.fromkeys(names, 3), "message": "!"}, "code": code}
        for section, codes in (("errors", ERRORS), ("notes", NOTES))
        for code, names in codes.items()
    ]
    script = tmp_path / "format.mjs"
    module = (WEB / "vendor" / "intl-messageformat.js").as_uri()
    script.write_text(
        f"import {{ IntlMessageFormat }} from {json.dumps(module)};\n"
        f"for (const one of {json.dumps(texts)}) {{\n"
        f"  try {{ new IntlMessageFormat(one.text, {json.dumps(language)}).format(one.values); }}\n"
        "  catch (error) { console.log(`${one.code}: ${error.message}`); }\n"
        "}\n"
    )
    done = subprocess.run([node, str(script)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_errors_and_texts_keep_their_codes_on_their_way() -> None:
    for error in (CodedError("no_shift", "no", a=1), MediaError("a: empty", "file_empty", name="a")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
        assert (code_of(again), values_of(again)) == (code_of(error), values_of(error))
    text = CodedText("input_sound", "a: its sound is left out", name="a")
    assert detail_of(text) == {"code": "input_sound", "values": {"name": "a"}, "message": str(text)}
    assert detail_of("as it is") == {"code": "", "values": {}, "message": "as it is"}
    assert Note.of(text) == Note(str(text), code="input_sound", values={"name": "a"})
    assert code_of(ValueError("?"), "invalid_value") == "invalid_value"


def test_rounded_values_tell_what_they_were() -> None:
    request = GenerationRequest(prompt="a duck", width=100, frames=10)
    notes = rounding_notes(request, request.resolved(WAN_DEFAULTS))
    assert [(code_of(note), values_of(note)) for note in notes] == [
        ("side_rounded", {"field": "width", "before": 100, "after": 96, "multiple": 16}),
        ("length_rounded", {"field": "frames", "before": 10, "after": 9, "multiple": 4}),
    ]


@pytest.mark.parametrize(
    ("fields", "code", "values"),
    [
        ({"steps": 0}, "below_minimum", {"field": "num_inference_steps", "value": 0, "minimum": 1}),
        ({"guidance": 99.0}, "above_maximum", {"field": "guidance_scale", "value": 99.0, "maximum": 20}),
        ({"steps": 1.5}, "not_a_whole_number", {"field": "num_inference_steps", "value": 1.5}),
        ({"fps": "fast"}, "not_a_number", {"field": "fps", "value": "fast"}),
        ({"speed": 1}, "unknown_parameter", {"field": "speed"}),
        ({"schedule": "soon"}, "schedule_unknown", {"value": "soon"}),
        ({"prompts": ["0s: a", "b"]}, "prompts_time_missing", {"number": 2}),
        ({"task": "extend"}, "task_videos", {"task": "extend", "needed": 1, "given": 0}),
        ({"prompt": ""}, "prompt_missing", {}),
    ],
)
def test_refused_values_of_a_request_have_codes(fields: dict[str, Any], code: str, values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        GenerationRequest.model_validate({"prompt": "a duck", **fields})
    error = validation_error(refused.value)
    assert (error.code, error.values) == (code, values)


def test_choices_are_listed() -> None:
    with pytest.raises(ValidationError) as refused:
        GenerationRequest.model_validate({"prompt": "a duck", "preset": "wild"})
    error = validation_error(refused.value)
    assert (error.code, error.values["field"], error.values["value"]) == ("not_a_choice", "preset", "wild")
    assert "creative" in error.values["choices"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("codes"), max_steps=60) as served:
        yield served


def test_the_api_tells_codes_and_values(server: Served, tmp_path: Path) -> None:
    files = {"input_reference": ("a.png", png(), "image/png")}
    answer = server.http.post("/v1/videos", data={"prompt": "a", "cond_positions": "99"}, files=files)
    error = refusal(answer, 400)
    assert (error["code"], error["values"]["value"], error["values"]["last"]) == ("position_outside", "99", "4")
    error = server.refused(400, num_inference_steps=61)
    assert (error["code"], error["values"]["limit"]) == ("too_many_steps", 60)
    files = {"input_reference": ("a.mp4", clip(tmp_path).read_bytes()[:900], "video/mp4")}
    error = refusal(server.http.post("/v1/videos", data={"prompt": "a"}, files=files), 400)
    assert (error["code"], error["values"]["name"]) == ("file_cut_short", "a.mp4")
    error = refusal(server.http.get(f"/v1/videos/video_{'0' * 32}"), 404)
    assert (error["code"], error["values"]) == ("video_not_found", {})


def test_a_job_keeps_the_codes_of_its_notes_and_of_its_error(server: Served) -> None:
    job = server.job(server.finished()["id"])
    assert job.notes == ("as it was asked for",)
    assert job.note_details == ({"code": "", "values": {}, "message": "as it was asked for"},)
    failed = server.job(server.finished(prompt="fail")["id"])
    assert (failed.error_code, failed.error_values) == ("out_of_memory", {})


def test_values_are_plain_json_for_every_program() -> None:
    values = {"a": "\ud800\0b", "n": 10**5000, "f": float("inf"), "list": [{"x": (1, 2.5)}], "none": None}
    assert plain(values) == {
        "a": "?b",
        "n": "a number of 16610 bits",
        "f": "inf",
        "list": [{"x": [1, 2.5]}],
        "none": None,
    }


def test_values_never_replace_those_of_another_error() -> None:
    first, second = ServiceError(400, "a", "b"), ServiceError(400, "a", "b")
    first.values["x"] = 1
    assert second.values == {}


def tables() -> str:
    english = json.loads((WEB / "locales" / "en.json").read_text(encoding="utf-8"))
    lines = []
    for title, section, codes in (("Errors", "errors", ERRORS), ("Notes", "notes", NOTES)):
        lines += [f"## {title}", "", "| code | values | text |", "|---|---|---|"]
        for code, names in codes.items():
            values = ", ".join(f"`{name}`" for name in names)
            lines.append(f"| `{code}` | {values} | {english[section][code]} |")
        lines.append("")
    return "\n".join(lines)


def test_the_tables_of_codes_are_those_of_the_program() -> None:
    written = PAGE.read_text(encoding="utf-8").partition(START)[2]
    assert written == tables(), "run `PYTHONPATH=tests/support python tests/server/test_server_codes.py`"


if __name__ == "__main__":
    before, start, _ = PAGE.read_text(encoding="utf-8").partition(START)
    PAGE.write_text(before + start + tables(), encoding="utf-8")
