"""Translate the page's texts.

A key names a text. The help of a request's field is written once, in `pusa.request`: English takes it from there, the
other languages translate it under ``help.<field>``.
"""

import json
from functools import cache
from pathlib import Path

from gradio.i18n import I18n, I18nData

from pusa.request import ConditionSpec, GenerationRequest, field_specs

LANGUAGES = {"en": "English", "fr": "Français", "zh": "中文"}
_GRADIO = {"zh": "zh-CN"}  # Gradio's name of a language where it differs
_EXPLAINED = (
    "alpha",
    "alpha_2",
    "steps",
    "negative_prompt",
    "seed",
    "frames",
    "fps",
    "guidance",
    "shift",
    "fit",
    "exact",
    "fast",
)
_FOLDER = Path(__file__).parent / "locales"


@cache
def texts(language: str) -> dict[str, str]:
    """Return all texts of a language by key."""
    written = json.loads((_FOLDER / f"{language}.json").read_text(encoding="utf-8"))
    if language == "en":
        help = {field.name: field.help for field in (*field_specs(ConditionSpec), *field_specs(GenerationRequest))}
        written |= {f"help.{name}": help[name] for name in _EXPLAINED}
    return written


def translations() -> I18n:
    """Return all texts for Gradio, which chooses by the browser's language."""
    return I18n(**{_GRADIO.get(language, language): texts(language) for language in LANGUAGES})


def t(key: str) -> I18nData:
    """Return the text of a key in the visitor's language. Raises KeyError for an unknown one."""
    texts("en")[key]
    return I18nData(key)


def choice(key: str) -> str:
    """Return the text of a key for the name of a choice, which Gradio takes as a plain string only."""
    return str(t(key))
