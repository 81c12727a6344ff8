"""Have a language model of the operator's choice enhance or translate prompts.

Any server with OpenAI's chat completions will do. Prompts go to the operator's address and nowhere else: no redirect is
followed, and no proxy of the environment is used.
"""

import json
import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import anyio

from pusa.server.errors import ServiceError
from pusa.server.http.schemas import MAX_PROMPT_CHARACTERS
from pusa.server.settings import ServerSettings

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

Help = Literal["enhance", "translate"]

_AT_ONCE = 4  # questions: a language model answers few at a time
_MAX_ANSWER_BYTES = 2**20
_MOST_WORDS = 400
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_QUOTES = {'"': '"', "“": "”", "«": "»", "'": "'"}

_ENHANCE = (
    "You improve prompts for a model that makes short videos. Keep what the prompt says and its language. Describe the "
    "subject, its motion, the place, the light and the camera in one paragraph of at most 80 words. Answer with the "
    "new prompt alone, without quotes and without comments."
)
_ENHANCE_WITH_WORDS = (
    "You improve prompts for a small model that makes short videos. It knows only these English words and phrases: "
    "{words}. Rewrite the prompt as one short English sentence made of them: one thing, one motion, one place, and a "
    "camera move if the prompt has one. Answer with the new prompt alone, without quotes and without comments."
)
_TRANSLATE = (
    "You translate prompts for a model that makes videos. Translate the prompt to English without adding or leaving "
    "out anything. Answer with the translation alone, without quotes and without comments."
)


class PromptEnhancer:
    """Ask the operator's language model about prompts.

    Args:
        words: the phrases that the video model knows; none for one that reads any text.
        transport: replaces the network, for tests.
    """

    def __init__(
        self,
        settings: ServerSettings,
        words: Iterable[str] = (),
        transport: "httpx.AsyncBaseTransport | None" = None,
    ) -> None:
        self._settings, self._transport = settings, transport
        self._words = list(words)[:_MOST_WORDS]
        self._asking = 0

    @property
    def is_on(self) -> bool:
        """True if the operator has named a language model."""
        return self._settings.prompt_url is not None

    async def ask(self, prompt: str, help: Help) -> str:
        """Return another prompt, which is not empty.

        Raises:
            ServiceError: 501 without a language model, 502 if it fails, does not answer in time or says nothing,
                503 if it is answering others.
        """
        if not self.is_on:
            message = "this server has no prompt enhancer: its operator sets prompt_url and prompt_model"
            raise ServiceError(501, "enhancer_off", message)
        if self._asking >= _AT_ONCE:
            message = f"{_AT_ONCE} prompts are being enhanced, the limit: try again in a moment"
            raise ServiceError(503, "enhancer_busy", message, headers={"retry-after": "3"})
        self._asking += 1
        try:
            with anyio.fail_after(self._settings.prompt_seconds):
                answer = _cleaned(await self._complete(self._instructions(help), prompt))
        except TimeoutError:
            seconds = self._settings.prompt_seconds
            raise _failed(f"the language model did not answer within {seconds:g} s") from None
        finally:
            self._asking -= 1
        if not answer:
            raise _failed("the language model answered with an empty text")
        return answer[:MAX_PROMPT_CHARACTERS]

    def _instructions(self, help: Help) -> str:
        if help == "translate":
            return _TRANSLATE
        return _ENHANCE_WITH_WORDS.format(words=", ".join(self._words)) if self._words else _ENHANCE

    async def _complete(self, instructions: str, prompt: str) -> str:
        """Return the text of a chat completion."""
        import httpx  # takes a third of the server's import time, and few servers have an enhancer

        settings = self._settings
        body = {
            "model": settings.prompt_model,
            "messages": [{"role": "system", "content": instructions}, {"role": "user", "content": prompt}],
            "max_tokens": 1000,
            "stream": False,
        }
        headers = {"authorization": f"Bearer {settings.prompt_key}"} if settings.prompt_key else {}
        address = f"{str(settings.prompt_url).rstrip('/')}/chat/completions"
        content = bytearray()
        try:
            async with (
                httpx.AsyncClient(
                    trust_env=False,
                    follow_redirects=False,
                    timeout=settings.prompt_seconds,
                    transport=self._transport,
                ) as client,
                client.stream("POST", address, json=body, headers=headers) as response,
            ):
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > _MAX_ANSWER_BYTES:
                        raise _failed(f"the language model answered with more than {_MAX_ANSWER_BYTES >> 20} MiB")
                if response.status_code != 200:
                    raise _failed(f"the language model answered with status {response.status_code}")
        except httpx.HTTPError as error:
            raise _failed(f"the language model cannot be reached ({type(error).__name__})") from None
        return _text_of(bytes(content))


def _text_of(content: bytes) -> str:
    """Return the text of a chat completion's JSON. Raises ServiceError (502) for anything else."""
    try:
        answer: Any = json.loads(content)
        text = answer["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise _failed("the language model did not answer as OpenAI's chat completions do") from None
    return text if isinstance(text, str) else ""


def _cleaned(text: str) -> str:
    """Take thoughts and quotes around a text away."""
    text = _THOUGHT.sub("", text).replace("\0", "").strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
    return text.encode(errors="replace").decode()


def _failed(reason: str) -> ServiceError:
    logger.warning("the prompt enhancer failed: %s", reason)
    return ServiceError(502, "enhancer_failed", f"{reason}: the prompt is unchanged, try again later")
