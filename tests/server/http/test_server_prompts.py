"""Prompts: what the model reads of them, and what the operator's language model makes of them."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import anyio
import httpx
import pytest
from api_samples import Served, refusal, serving

from pusa.generate.prompt_hints import count_tokens, unknown_words
from pusa.server.enhancer import PromptEnhancer
from pusa.server.errors import ServiceError
from pusa.server.settings import ServerSettings
from pusa.server.settings_sources import load_settings

ADDRESS = "http://127.0.0.1:9/v1"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("prompts"), model="mini", workers=0) as served:
        yield served


def check(server: Served, prompt: str) -> dict[str, Any]:
    answer = server.http.post("/v1/prompts/check", json={"prompt": prompt})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_prompt_is_checked_against_what_the_model_knows(server: Served) -> None:
    found = check(server, "a wolf bounces at the beach")
    assert (found["limit"], found["lost"]) == (64, "")
    assert 4 < found["tokens"] < 20
    [unknown] = found["unknown_words"]
    assert unknown["word"] == "wolf"
    assert unknown["nearest"] == ["cat"]
    assert check(server, "") == {"tokens": 1, "limit": 64, "lost": "", "unknown_words": []}


def test_the_end_that_is_not_read_is_named(server: Served) -> None:
    prompt = "a rabbit bounces at the beach " * 30 + "and a wolf"
    found = check(server, prompt)
    assert found["tokens"] > found["limit"] == 64
    assert found["lost"].endswith("and a wolf")
    assert prompt.endswith(found["lost"])
    assert found["unknown_words"] == []  # of what is read
    assert unknown_words(prompt, "mini") == []


def test_without_a_tokenizer_there_are_no_numbers() -> None:
    assert count_tokens("a duck", "wan2.1-14b") is None
    assert count_tokens("a duck", "tiny") is None


def test_without_a_language_model_nothing_is_enhanced(server: Served) -> None:
    error = refusal(server.http.post("/v1/prompts/enhance", json={"prompt": "a duck"}), 501)
    assert error["code"] == "enhancer_off"
    assert server.http.get("/v1/models/mini").json()["enhancer"] is False
    refusal(server.http.post("/v1/prompts/enhance", json={"prompt": ""}), 400)
    assert refusal(server.http.post("/v1/prompts/enhance", json={"prompt": "a", "do": "sing"}), 400)["param"] == "do"


class LanguageModel(BaseHTTPRequestHandler):
    """Answers as OpenAI's chat completions do, with what it was asked."""

    asked: ClassVar[list[tuple[str, dict[str, str], dict[str, Any]]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        text = f'<think>hm</think>\n"{body["messages"][1]["content"]} in the morning light"'
        content = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def test_the_operators_language_model_is_asked(tmp_path: Path) -> None:
    model = ThreadingHTTPServer(("127.0.0.1", 0), LanguageModel)
    threading.Thread(target=model.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{model.server_port}/v1"
    settings = {"prompt_url": address, "prompt_model": "small", "prompt_key": "secret key"}
    try:
        with serving(tmp_path, model="mini", workers=0, **settings) as server:
            assert server.http.get("/v1/models/mini").json()["enhancer"] is True
            answer = server.http.post("/v1/prompts/enhance", json={"prompt": "a duck"})
            assert answer.json() == {"prompt": "a duck in the morning light"}
            server.http.post("/v1/prompts/enhance", json={"prompt": "un canard", "do": "translate"})
    finally:
        model.shutdown()
        model.server_close()
    (path, headers, first), (_, _, second) = LanguageModel.asked
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer secret key"
    assert first["model"] == "small"
    assert "rabbit" in first["messages"][0]["content"]  # the words that the video model knows
    assert "Translate" in second["messages"][0]["content"]
    assert second["messages"][1] == {"role": "user", "content": "un canard"}


def enhancer(answer: Callable[[httpx.Request], httpx.Response], **settings: Any) -> PromptEnhancer:
    chosen = ServerSettings(prompt_url=ADDRESS, prompt_model="small", **settings)
    return PromptEnhancer(chosen, transport=httpx.MockTransport(answer))


def answering(text: Any) -> httpx.Response:
    return httpx.Response(200, json={"choices": [{"message": {"content": text}}]})


def unreachable(_: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("no")


@pytest.mark.parametrize(
    "answer",
    [
        unreachable,
        lambda _: httpx.Response(500, text="no"),
        lambda _: httpx.Response(302, headers={"location": "https://example.org/"}),
        lambda _: httpx.Response(200, text="not JSON"),
        lambda _: httpx.Response(200, json={"choices": []}),
        lambda _: answering(""),
        lambda _: answering(None),
        lambda _: answering("x" * 2_000_000),
    ],
)
def test_a_language_model_that_fails_is_no_error_of_the_visitor(answer: Callable[..., httpx.Response]) -> None:
    with pytest.raises(ServiceError) as failed:
        anyio.run(enhancer(answer).ask, "a duck", "enhance")
    assert (failed.value.status, failed.value.code) == (502, "enhancer_failed")
    assert ADDRESS not in failed.value.message


def test_a_language_model_has_its_time_and_few_are_asked_at_once() -> None:
    ended = anyio.Event()

    async def wait(_: httpx.Request) -> httpx.Response:
        await ended.wait()
        return answering("late")

    slow = enhancer(wait, prompt_seconds=1.0)  # type: ignore[arg-type]
    codes: list[str] = []

    async def ask() -> None:
        try:
            await slow.ask("a duck", "enhance")
        except ServiceError as error:
            codes.append(error.code)

    async def ask_often() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(ask)

    anyio.run(ask_often)
    assert codes == ["enhancer_busy"] * 2 + ["enhancer_failed"] * 4


def test_settings_of_the_enhancer_belong_together(tmp_path: Path) -> None:
    for given in ({"prompt_url": ADDRESS}, {"prompt_model": "small"}):
        with pytest.raises(ValueError, match="is missing"):
            load_settings(environ={}, options=given)
    for address in ("ftp://a/v1", "http://user:key@a/v1", "http://a/v1?x", "a"):
        with pytest.raises(ValueError, match="prompt_url"):
            load_settings(environ={}, options={"prompt_url": address, "prompt_model": "small"})
    settings = load_settings(environ={"PUSA_PROMPT_KEY": "k1"}, options={"prompt_url": ADDRESS, "prompt_model": "m"})
    assert settings.prompt_key == "k1"
    assert "k1" not in repr(settings)
