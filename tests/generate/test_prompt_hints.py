"""Unknown words of a prompt are named with what comes near, and never stop anything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import pusa

from pusa import zoo
from pusa.events import Note
from pusa.generate import prompt_hints as words
from pusa.generate.prompt_hints import UnknownWord, unknown_words

WORDS = {
    "things": [["duck", "mallard"], ["dog", "puppy"], ["elephant"], ["bus"], ["t-rex"], ["bunch of grapes"]],
    "motions": [["slides to the right", "goes right"], ["bounces", "hops"], ["flies in a circle"]],
    "places": [["on the grass", "in a meadow"], ["under the sea"]],
    "cameras": ["the camera zooms in"],
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder that says which words it knows; nothing else is read."""
    for part in ("transformer", "vae", "text_encoder"):
        (tmp_path / "small" / part).mkdir(parents=True)
    card = {"title": "knows little", "defaults": {}, "words": WORDS}
    (tmp_path / "small" / "pusa.json").write_text(json.dumps(card))
    return str(tmp_path / "small")


def test_a_prompt_in_the_models_words_has_no_unknown_ones(model: str) -> None:
    for prompt in (
        "",
        "a duck slides to the right under the sea, the camera zooms in",
        "Two DUCKS are sliding over the grass!",
        "the puppy's bus hopped, and it will hop again",
        "a T-Rex flying with 3 bunches of grapes",
    ):
        assert unknown_words(prompt, model) == [], prompt


@pytest.mark.parametrize(
    ("prompt", "word", "nearest"),
    [
        ("a wolf bounces", "wolf", ("dog",)),
        ("a dog leaping", "leaping", ("bounces",)),
        ("a duck in the ocean", "ocean", ("under the sea",)),
        ("an elefant", "elefant", ("elephant",)),
        ("the camera zoms in", "zoms", ("the camera zooms in",)),
        ("a bee", "bee", ()),  # and not a form of "be"
        ("a xylograph", "xylograph", ()),
        ("一只鸭子", "一只鸭子", ()),
    ],
)
def test_an_unknown_word_comes_with_the_nearest_known_ones(
    prompt: str, word: str, nearest: tuple[str, ...], model: str
) -> None:
    assert unknown_words(prompt, model) == [UnknownWord(word, nearest)]


def test_each_unknown_word_is_named_once_in_order(model: str) -> None:
    found = unknown_words("a wolf, a xylograph, a Wolf and a zeppelin", model)
    assert [one.word for one in found] == ["wolf", "xylograph", "zeppelin"]


def test_models_that_read_any_text_have_no_unknown_words() -> None:
    for source in ("tiny", "wan2.1-14b", "someone/some-model", "no/such/folder"):
        assert unknown_words("ein Wolf im Xylophon", source) == []


def test_the_hint_is_one_sentence_that_says_where_all_words_are(model: str) -> None:
    unknown = [UnknownWord("wolf", ("dog", "fox")), *(UnknownWord(f"x{i}", ()) for i in range(5))]
    assert words.hint(unknown[:1], "mini") == (
        "mini was not trained on 'wolf' (nearest: dog, fox); `pusa models show mini --words` lists what it knows"
    )
    assert "'x2' and 2 more; " in words.hint(unknown, "mini")


def test_the_related_words_are_each_in_one_form_and_not_in_the_grammar() -> None:
    listed = {word for others in words._RELATED.values() for word in others.split()}
    assert not listed & set(words._GRAMMAR.split())


def test_words_need_no_torch() -> None:
    code = (
        "import sys; from pusa.generate.prompt_hints import unknown_words;"
        "unknown_words('a', 'tiny'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_words_of_a_model_are_shown(model: str) -> None:
    shown = pusa("models", "show", model, "--words").stdout
    assert "things\n  duck (mallard)\n  dog (puppy)\n" in shown
    assert "cameras\n  the camera zooms in\n" in shown
    listed = json.loads(pusa("models", "show", model, "--words", "--json").stdout)
    assert listed["motions"][0] == ["slides to the right", "goes right"]


def test_many_words_run_on_in_a_paragraph(model: str) -> None:
    card = json.loads(Path(model, "pusa.json").read_text())
    card["words"]["things"] = [[f"thing{i}"] for i in range(40)]
    Path(model, "pusa.json").write_text(json.dumps(card))
    assert "  thing0, thing1, thing2, " in pusa("models", "show", model, "--words").stdout


def test_a_model_without_a_word_list_is_refused() -> None:
    result = pusa("models", "show", "tiny", "--words")
    assert result.exit_code == 2
    assert "tiny comes without a list of words: write what you like" in result.stderr


def test_a_run_tells_of_unknown_words_and_goes_on(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = zoo.find(model)
    monkeypatch.setitem(zoo.ZOO, "tiny", zoo.ZooModel(**{**vars(zoo.get("tiny")), "words": small.words}))
    assert "12 groups: see --words" in pusa("models", "show", "tiny").stdout
    result = pusa(
        "generate", "a wolf bounces", "--model", "tiny", "--steps", 1, "--frames", 1, "-o", tmp_path / "a.mp4"
    )
    assert result.exit_code == 0
    assert "tiny was not trained on 'wolf' (nearest: dog)" in result.stderr
    result = pusa(
        "generate",
        "a wolf bounces",
        *("--model", "tiny", "--steps", 1, "--frames", 1, "--json"),
        "-o",
        tmp_path / "b.mp4",
    )
    events = [json.loads(line) for line in result.stdout.splitlines()]
    (note,) = (event for event in events if "unknown_words" in event)
    assert note["kind"] == "note"
    assert note["unknown_words"] == [{"word": "wolf", "nearest": ["dog"]}]
    assert events[-1]["kind"] == "done"


def test_an_event_without_unknown_words_does_not_mention_them() -> None:
    assert Note("x").as_json() == {"kind": "note", "message": "x"}
