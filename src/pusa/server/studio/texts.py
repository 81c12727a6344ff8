"""What the page says, in each of its languages.

A text is named by a key. The explanations of the knobs are not written here a second time: English takes them from
`pusa.request`, the other languages translate them under ``help.<knob>``.
"""

import json
from functools import cache
from pathlib import Path

from gradio.i18n import I18n, I18nData

from pusa.request import ConditionSpec, GenerationRequest, knobs

LANGUAGES = {"en": "English", "fr": "Français", "zh": "中文"}
_GRADIO = {"zh": "zh-CN"}  # how Gradio calls a language, where it does so otherwise
_EXPLAINED = ("alpha", "alpha_2", "steps", "negative_prompt", "seed", "frames", "fps", "guidance", "shift", "fit")
_FOLDER = Path(__file__).parent / "locales"


@cache
def texts(language: str) -> dict[str, str]:
    """All texts of a language by key."""
    written = json.loads((_FOLDER / f"{language}.json").read_text(encoding="utf-8"))
    if language == "en":
        help = {knob.name: knob.help for knob in (*knobs(ConditionSpec), *knobs(GenerationRequest))}
        written |= {f"help.{name}": help[name] for name in _EXPLAINED}
    return written


def translations() -> I18n:
    """For Gradio, which chooses by the browser's language."""
    return I18n(**{_GRADIO.get(language, language): texts(language) for language in LANGUAGES})


def t(key: str) -> I18nData:
    """The text of a key, in the language of whoever looks. Raises KeyError for an unknown one."""
    texts("en")[key]
    return I18nData(key)


def choice(key: str) -> str:
    """As `t`, for the names of choices, which Gradio takes as plain text only."""
    return str(t(key))
