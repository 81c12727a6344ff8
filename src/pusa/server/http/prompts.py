"""Define the routes that check, enhance and translate prompts."""

from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from pusa.fields import StrictModel, field
from pusa.server.enhancer import Help
from pusa.server.http import openapi
from pusa.server.http.api import Service
from pusa.server.http.references import read_request
from pusa.server.http.schemas import Prompt
from pusa.server.service import VideoService, in_thread

router = APIRouter(prefix="/v1")


class CheckPrompt(StrictModel):
    """``POST /v1/prompts/check``."""

    prompt: Prompt = field(..., "What the video shows.")


class EnhancePrompt(StrictModel):
    """``POST /v1/prompts/enhance``."""

    prompt: Annotated[Prompt, Field(min_length=1)] = field(..., "What the video shows, in any language.")
    do: Help = field("enhance", "Describe more of it, or translate it to English.")


class UnknownPromptWord(BaseModel):
    word: str
    nearest: list[str] = Field(description="Phrases that the model knows, the nearest first.")


class PromptCheck(BaseModel):
    """Tell what the model reads of a prompt; numbers are null where its tokenizer is not on this machine."""

    tokens: int | None
    limit: int | None
    lost: str = Field(description="The end of the prompt that is not read, or nothing.")
    unknown_words: list[UnknownPromptWord]


class EnhancedPrompt(BaseModel):
    prompt: str


@router.post(
    "/prompts/check",
    response_model=PromptCheck,
    responses=openapi.errors(400, 413, 415, 503),
    openapi_extra=openapi.body(CheckPrompt),
    summary="Tell what the model reads of a prompt",
)
async def check_prompt(request: Request, service: Service) -> PromptCheck:
    """Returns the prompt's tokens, and the words that a small model was not trained on."""
    async with read_request(request, service) as reader:
        body = await reader.validate(CheckPrompt, {})
    return await in_thread(_check, service, body.prompt)


def _check(service: VideoService, prompt: str) -> PromptCheck:
    from pusa.generate import prompt_hints  # with tokenizers, a third of the server's import time

    model = service.settings.model
    if not service.defaults.has_text:
        return PromptCheck(tokens=None, limit=None, lost="", unknown_words=[])
    count = prompt_hints.count_tokens(prompt, model)
    words = prompt_hints.unknown_words(prompt, model)
    return PromptCheck(
        tokens=None if count is None else count.tokens,
        limit=None if count is None else count.limit,
        lost="" if count is None else count.lost,
        unknown_words=[UnknownPromptWord(word=word.word, nearest=list(word.nearest)) for word in words],
    )


@router.post(
    "/prompts/enhance",
    response_model=EnhancedPrompt,
    responses=openapi.errors(400, 413, 415, 501, 502, 503),
    openapi_extra=openapi.body(EnhancePrompt),
    summary="Enhance or translate a prompt",
)
async def enhance_prompt(request: Request, service: Service) -> EnhancedPrompt:
    """Asks the language model that the operator has named; nothing is stored."""
    async with read_request(request, service) as reader:
        body = await reader.validate(EnhancePrompt, {})
    return EnhancedPrompt(prompt=await service.enhancer.ask(body.prompt, body.do))
