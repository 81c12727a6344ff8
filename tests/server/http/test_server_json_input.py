"""JSON from strangers, and numbers in it: refused before it costs anything, by every door."""

import base64
import json
import socket
import tracemalloc
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from api_samples import Served, png, refusal, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pusa import fields
from pusa.request import GenerationRequest, explain
from pusa.server.errors import ServiceError
from pusa.server.http import json_input, to_request
from pusa.server.http.body import parse_brackets, parse_urlencoded
from pusa.server.http.json_input import MAX_DEPTH, MAX_PLAIN_BYTES, MAX_VALUES, BodyBudget, parse_json

PICTURE = base64.b64encode(png()).decode()
LONG = base64.b64encode(bytes(range(256)) * 20_000).decode()  # more than six million characters
MANY = MAX_VALUES + 1
TOO_MUCH = {
    "empty lists": b"[" + b"[]," * MANY + b"[]]",
    "empty objects": b"[" + b"{}," * MANY + b"{}]",
    "numbers": b"[" + b"1," * MANY + b"1]",
    "texts": b"[" + b'"",' * MANY + b'""]',
    "names": b"{" + b",".join(b'"%d":1' % n for n in range(MANY)) + b"}",
    "quotation marks in a text": b'{"prompt": "' + b'\\"' * MANY + b'"}',
    "a long name": b'{"' + b"A" * (MAX_PLAIN_BYTES + 1) + b'" \n: 1}',
    "a long name inside": b'[{"a": {"data:image/png;base64,' + b"A" * (MAX_PLAIN_BYTES + 1) + b'":1}}]',
    "no JSON": b"," * (MANY + 1),
    "blanks": b" " * (MAX_PLAIN_BYTES + 1) + b"{}",
    "a long text": b'{"prompt": "' + b"a " * 100 + "ä".encode() * MAX_PLAIN_BYTES + b'"}',
    "a text of backslashes": b'{"prompt": "' + b"\\\\" * MAX_PLAIN_BYTES + b'"}',
    "a text of escapes": b'{"prompt": "' + b"\\u4e00" * (MAX_PLAIN_BYTES // 4) + b'"}',
    "a data URL without base64": b'{"input_reference": "data:image/png,' + b"%41" * MAX_PLAIN_BYTES + b'"}',
    "a long number": b'{"seed": ' + b"1" * (MAX_PLAIN_BYTES + 1) + b"}",
    "backslashes before the end": b'["' + b"\\" * (2 * MAX_PLAIN_BYTES) + b'"]',
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_too_much_is_refused_before_anything_is_built(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was built")

    monkeypatch.setattr(json_input.json, "loads", build)
    tracemalloc.start()
    try:
        with pytest.raises(ServiceError) as refused:
            parse_json(TOO_MUCH[what], BodyBudget(), "the body")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert refused.value.status in (400, 413)
    assert "limit" in refused.value.message
    assert peak < 3 * len(TOO_MUCH[what]) + 2**20


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 10**6])
@pytest.mark.parametrize("sign", [b"[", b'{"a":'])
def test_deep_nesting_is_refused(depth: int, sign: bytes) -> None:
    with pytest.raises(ServiceError, match="nested") as refused:
        parse_json(sign * depth, BodyBudget(), "the body")
    assert refused.value.status == 400


@pytest.mark.parametrize("body", [b'{"a": 1e999}', b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": ' + b"5" * 5000 + b"}"])
def test_what_is_no_finite_number_is_refused(body: bytes) -> None:
    with pytest.raises(ServiceError, match="number") as refused:
        parse_json(body, BodyBudget(), "the body")
    assert refused.value.status == 400
    assert "not JSON" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [LONG, f"data:image/png;base64,{LONG}", LONG.replace("/", "\\/"), f"data:image\\/png;base64,{LONG}", "a b" * 99],
)
def test_a_file_in_base64_is_no_text(text: str) -> None:
    budget = BodyBudget()
    value = parse_json(b'{"input_reference": "' + text.encode() + b'", "n": [1, 2.5, true]}', budget, "the body")
    assert value == {"input_reference": text.replace("\\/", "/"), "n": [1, 2.5, True]}
    assert budget.plain_bytes > MAX_PLAIN_BYTES - 1000
    assert budget.values >= MAX_VALUES - 20


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=30,
)


@settings(max_examples=200, deadline=None)
@given(JSON, st.sampled_from([None, 1]), st.booleans())
def test_what_is_small_is_read_as_json_reads_it(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        assert parse_json(text.encode("utf-8", "replace"), BodyBudget(), "it") == json.loads(
            text.encode("utf-8", "replace").decode()
        )


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.text('[]{},:"\\1a ', max_size=40).map(str.encode))
def test_whatever_comes_is_a_value_or_a_refusal(data: bytes) -> None:
    try:
        json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        with pytest.raises(ServiceError) as refused:
            parse_json(data, BodyBudget(), "it")
        assert refused.value.status == 400


def test_a_long_name_is_compared_with_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields.difflib, "get_close_matches", lambda word, *_, **__: [f"{len(word)} characters"])
    for length, is_compared in ((100, True), (101, False), (100_000, False)):
        with pytest.raises(ValidationError) as refused:
            GenerationRequest.model_validate({"prompt": "x", "a" * length: 1})
        told = explain(refused.value)
        assert ("did you mean" in told) == is_compared
        assert len(told) < 600


def test_a_form_has_one_budget_for_all_its_fields() -> None:
    part = json.dumps([0] * (MAX_VALUES // 4))
    assert len(parse_brackets([("a", part)])["a"]) == MAX_VALUES // 4
    with pytest.raises(ServiceError, match="values"):
        parse_brackets([(f"a{number}", part) for number in range(5)])
    with pytest.raises(ServiceError, match="MiB"):
        parse_brackets([(f"a{number}", "two, words " * 30_000) for number in range(4)])


# ---- over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("json")) as served:
        yield served


ROUTES = ("/v1/videos", "/v1/videos/extensions", "/v1/videos/edits", f"/v1/videos/video_{'0' * 32}/remix")


@pytest.mark.parametrize("what", ["empty lists", "names", "a long text", "a text of escapes"])
@pytest.mark.parametrize("path", ROUTES)
def test_a_body_of_too_many_values_is_refused(server: Served, path: str, what: str) -> None:
    body = TOO_MUCH[what]
    answer = server.http.post(path, content=body, headers={"content-type": "application/json"})
    assert refusal(answer, answer.status_code)["code"] in ("invalid_body", "too_large")
    for field in ("extra_params", "keyframes", "a"):
        answer = server.http.post(path, data={}, files={field: (None, body), "prompt": (None, "a duck")})
        assert refusal(answer, answer.status_code)["code"] in ("invalid_body", "too_large")
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("value", ["%41" * 500_000, "wo.rd+" * 300_000, "[" + "[]," * MANY + "[]]"])
def test_a_plain_form_of_too_much_is_refused(server: Served, value: str) -> None:
    kind = {"content-type": "application/x-www-form-urlencoded"}
    answer = server.http.post("/v1/videos", content=f"prompt=a&keyframes={value}", headers=kind)
    assert refusal(answer, answer.status_code)["code"] in ("invalid_body", "too_large")


@pytest.mark.parametrize("name", ["a" * 100_000, "\ud800", "\0"])
def test_a_name_that_is_none_is_shortened_in_the_refusal(server: Served, name: str) -> None:
    for path in ROUTES:
        answer = server.http.post(
            path, content=json.dumps({"prompt": "a duck", name: 1}), headers={"content-type": "application/json"}
        )
        error = refusal(answer, answer.status_code)
        assert error["code"] in ("unknown_parameter", "invalid_value", "not_found")
        assert len(answer.text) < 1500


@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "size", "input_reference", "user"])
def test_half_a_character_is_no_error_of_ours(server: Served, field: str) -> None:
    body = json.dumps({"prompt": "a duck", field: "\ud800"})
    answer = server.http.post("/v1/videos", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400), answer.text


@pytest.mark.parametrize("value", [b"+" * 2 * MAX_PLAIN_BYTES, b"a+%20/" * MAX_PLAIN_BYTES])
def test_a_plain_form_of_blanks_is_refused_before_it_is_decoded(value: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was decoded")

    monkeypatch.setattr("pusa.server.http.body.parse_qsl", decode)
    with pytest.raises(ServiceError, match="limit") as refused:
        parse_urlencoded(bytearray(b"model=mini&prompt=" + value))
    assert refused.value.status == 413


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(1, 12), st.sampled_from(["", "\n", " \r\n", "\f\v"]), st.booleans())
def test_base64_is_decoded_in_pieces_of_any_size(content: bytes, piece: int, blank: str, is_url_safe: bool) -> None:
    text = (base64.urlsafe_b64encode if is_url_safe else base64.b64encode)(content).decode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_request, "PIECE_BYTES", piece)
        for given_text in (text, text.rstrip("="), blank.join(text), blank.join(text.rstrip("=")) + blank):
            assert to_request.decode_base64(given_text, "image_b64") == content


@pytest.mark.parametrize("piece", range(1, 12))
@pytest.mark.parametrize("text", ["QUI=QUJD", "QQ==QUJD", "=QUJD", "Q=UJD", "QUJD#", "QUJDQ", "QUJDä", "QU\0JD"])
def test_what_is_no_base64_is_refused_in_pieces_of_any_size(
    text: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_request, "PIECE_BYTES", piece)
    with pytest.raises(ServiceError, match="image_b64 is not base64"):
        to_request.decode_base64(text, "image_b64")


def test_base64_in_a_plain_form_may_have_plus_signs() -> None:
    text = base64.b64encode(bytes(range(256)) * 20_000)
    assert b"+" in text
    assert parse_urlencoded(bytearray(b"a=" + text))["a"] == text.decode().replace("+", " ")
    assert parse_urlencoded(bytearray(b"a=" + quote(text).encode()))["a"] == text.decode()


def test_a_picture_in_a_plain_form_is_taken(server: Served) -> None:
    form = {"prompt": "a duck", "input_reference": f"data:image/png;base64,{PICTURE}"}
    assert server.http.post("/v1/videos", data=form).status_code == 200


def test_a_large_picture_in_base64_is_looked_at(server: Served) -> None:
    answer = server.http.post("/v1/videos", json={"prompt": "a duck", "input_reference": LONG})
    assert "no data URL" in refusal(answer, 400)["message"]
    answer = server.http.post(
        "/v1/videos", json={"prompt": "a duck", "input_reference": f"data:image/png;base64,{LONG}"}
    )
    assert refusal(answer, 400)["code"] == "not_a_picture"


def test_a_part_of_a_form_with_long_headers_is_refused(server: Served) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\nX: ' + b"y" * 100_000 + b"\r\n\r\na\r\n--x--\r\n"
    answer = server.http.post("/v1/videos", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert refusal(answer, 400)["code"] == "invalid_body"


NUMBERS = ["²", "٣", "5" * 5000, "1_0", "nan", "inf", "1e999", "½"]


@pytest.mark.parametrize("text", NUMBERS)
def test_a_header_that_is_no_number_is_no_error_of_ours(server: Served, text: str) -> None:
    for name in ("x-stainless-retry-count", "range", "if-range", "last-event-id", "idempotency-key"):
        value = f"bytes={text}-" if name == "range" else text[:200]
        headers = [(name, value.encode("utf-8")), (name, value.encode("latin-1", "replace"))]
        for header in headers:
            answer = server.http.post("/v1/videos", json={"prompt": "a duck"}, headers=[header])
            assert answer.status_code in (200, 400, 422), answer.text
    id = server.create()["id"]
    server.ended(id)
    for value in (f"bytes={text}-{text}", f"bytes=-{text}", f"bytes=0-{text}"):
        answer = server.http.get(f"/v1/videos/{id}/content", headers=[(b"range", value.encode("utf-8"))])
        assert answer.status_code in (200, 206, 416)


FIELDS = (
    "seconds", "size", "width", "num_frames", "fps", "seed", "num_inference_steps", "guidance_scale", "flow_shift",
    "lora_alpha", "window", "overlap", "noise_multiplier", "noise_multipliers", "cond_positions", "priority",
    "keyframes[0][frame]", "keyframes[0][time]", "keyframes[0][latent]", "keyframes[0][file]", "keyframes[0][noise]",
    "extra_params[seed]", "extra_params[num_frames]",
)  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_a_field_that_is_no_number_is_refused(server: Served, text: str) -> None:
    for field in FIELDS:
        form = {"prompt": (None, "a duck"), field: (None, f"{text}x64" if field == "size" else text)}
        answer = server.http.post("/v1/videos", files={**form, "input_reference": ("a.png", png())})
        error = refusal(answer, 400)
        assert len(error["message"]) < 400, field


@pytest.mark.parametrize("key", ["²", "5" * 5000, "٣", "-1", "1_0", "0²"])
@pytest.mark.parametrize("field", ["keyframes", "extra_params", "input_reference", "noise_multipliers", "video"])
def test_a_name_that_looks_like_a_number_is_refused(server: Served, field: str, key: str) -> None:
    for path in ROUTES[:3]:
        form = {"prompt": (None, "a duck"), field: (None, json.dumps({key: 1}))}
        refusal(server.http.post(path, files=form), 400)
        refusal(server.http.post(path, json={"prompt": "a duck", field: {key: 1}}), 400)
        refusal(server.http.post(path, files={"prompt": (None, "a duck"), f"{field}[{key}]": (None, "1")}), 400)


@pytest.mark.parametrize("text", NUMBERS)
def test_a_query_that_is_no_number_is_refused(server: Served, text: str) -> None:
    refusal(server.http.get("/v1/videos", params={"limit": text}), 400)


def test_a_length_that_is_no_number_is_refused(server: Served) -> None:
    url = httpx.URL(server.url)
    for length in (b"\xb2", b"5" * 5000, b"1_0", b"+5", b"-1", b"9" * 19):
        with socket.create_connection((url.host, url.port or 80), timeout=30) as connection:
            connection.sendall(
                b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + length + b"\r\n\r\n{}"
            )
            assert connection.recv(1000)[9:12] in (b"400", b"413")
    assert server.http.get("/health").status_code == 200
