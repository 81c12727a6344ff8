"""Find the words of a prompt that a small model was not trained on, and suggest known ones.

Wan reads any language; the embedded model was trained on a few dozen things, motions, places and camera moves, which
its ``pusa.json`` lists. A prompt with unknown words is accepted; a hint names them and the nearest known words. This
module needs no torch.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer

from pusa import zoo
from pusa.codes import CodedText
from pusa.events import UnknownWord

_MAX_NAMED = 4  # unknown words in one sentence
_MAX_NEAREST = 2
_MAX_LOST = 50  # characters of what is cut off, in a note
_MAX_WORD = 30  # characters; a longer stretch without a blank is no word, or of a language without blanks

# Grammar and filler words of captions, which change no picture.
_GRAMMAR = """
a about above across after again all along also am an and another any are around as at away back be because been
before behind being below beneath beside between beyond both but by can could did do does doing done down during
each either else ever every few first for from gently get gets had has have having he her here hers him his how i if
in inside into is it its itself just last less like many may me more most much my near next no nor not now of off on
once one only onto or other our out outside over own past perhaps please put quite rather same scene see she shot
should shows so some somewhere still such than that the their them then there these they this those through
throughout till to together too toward towards two under until up upon us very video was way we well were what when
where which while who whole whose will with within without would you your
"""

_TRAVELS = (
    "walks runs drives rides rolls travels strolls marches crawls swims sails skates gallops drifts passes crosses "
    "wanders glides"
)

# Unknown words by the nearest known phrase; a model that lacks the phrase ignores the line.
_RELATED = {
    "dog": "wolf wolves hound terrier poodle doggy doggie coyote jackal pet",
    "fox": "wolf wolves coyote jackal",
    "cat": "kitty lynx bobcat pet dog puppy fox lion tiger wolf leopard",
    "rabbit": "hare mouse rat hamster squirrel chipmunk rodent guineapig kangaroo hedgehog",
    "tiger": "leopard cheetah puma jaguar panther cougar",
    "lion": "leopard cheetah puma cougar",
    "bear": "grizzly polar beaver badger",
    "cow": "bull ox buffalo bison calf sheep lamb goat cattle",
    "horse": "pony donkey mule foal stallion mare deer moose reindeer elk",
    "monkey": "ape chimp chimpanzee baboon lemur sloth",
    "gorilla": "ape orangutan",
    "elephant": "mammoth rhino rhinoceros hippo hippopotamus horse cow camel giraffe zebra gorilla bear",
    "pig": "hog boar swine cow bear panda koala sheep monkey",
    "hedgehog": "porcupine mole mouse",
    "duck": "goose duckling drake swan flamingo peacock",
    "penguin": "owl parrot eagle chicken bird",
    "crab": "lobster scorpion shrimp spider",
    "whale": "dolphin shark",
    "parrot": "macaw toucan parakeet crow raven pigeon",
    "swan": "goose stork crane heron",
    "chicken": "rooster cock turkey",
    "eagle": "hawk falcon vulture seagull gull",
    "fish": "salmon tuna trout goldfish clownfish seahorse",
    "dolphin": "seal porpoise orca otter",
    "octopus": "jellyfish squid spider",
    "frog": "toad newt lizard gecko",
    "turtle": "lizard crocodile alligator frog snail",
    "dinosaur": "reptile crocodile alligator lizard monster tyrannosaurus raptor dragon snake unicorn frog",
    "snake": "worm eel serpent python cobra",
    "ladybug": "beetle bug insect bee spider",
    "bee": "wasp hornet mosquito insect",
    "butterfly": "moth dragonfly insect bee bat",
    "spider": "ant scorpion insect",
    "unicorn": "pegasus",
    "robot": "man woman person people boy girl child human android machine somebody someone alien",
    "teddy bear": "toy doll baby child",
    "snowman": "man person teddy",
    "alien": "martian monster",
    "ghost": "spirit phantom spook monster",
    "apple": "fruit peach plum tomato strawberry orange pear",
    "orange": "lemon lime mandarin clementine",
    "strawberry": "raspberry cherry cherries berry berries",
    "bunch of grapes": "blueberry blueberries",
    "carrot": "vegetable radish",
    "eggplant": "vegetable cucumber zucchini pepper",
    "burger": "sandwich cheeseburger hotdog food pizza",
    "pizza": "pie food",
    "donut": "cookie biscuit bagel pretzel",
    "cake": "tart dessert cupcake pie",
    "ice cream": "gelato dessert",
    "teapot": "kettle pot cup mug coffee tea",
    "sunflower": "rose tulip daisy blossom cactus",
    "mushroom": "fungus",
    "cactus": "plant",
    "car": "automobile vehicle van jeep convertible motorcycle bicycle tractor taxi",
    "bus": "lorry van coach tram train tractor",
    "fire ": "truck lorry ambulance",
    "train": "tram subway railway",
    "bicycle": "cycle tricycle scooter",
    "motorcycle": "scooter moped vespa",
    "sailboat": "ship yacht vessel sail canoe ferry",
    "motorboat": "ship ferry",
    "airplane": "aeroplane aircraft jet glider helicopter",
    "rocket": "missile shuttle spacecraft starship ufo",
    "helicopter": "drone chopper",
    "ufo": "spacecraft",
    "balloon": "kite bubble",
    "football": "tennis volleyball",
    "basketball": "volleyball sphere football soccer",
    "guitar": "violin banjo ukulele instrument",
    "star": "asterisk sparkle",
    "gift": "box parcel package",
    "crown": "tiara hat diadem",
    "umbrella": "parasol",
    "pumpkin": "squash gourd lantern",
    "goes left": _TRAVELS,
    "goes right": _TRAVELS,
    "rises": "climbs ascends lifts floats soars launches",
    "sinks": "drops descends dives plunges tumbles lands",
    "bounces": "leaps springs trampolines",
    "comes closer": "approaches nears enlarges expands",
    "goes away": "retreats recedes departs",
    "shrinks": "dwindles diminishes",
    "spins": "twirls whirls tumbles revolves pirouettes twists",
    "swings": "dances waves nods wobbles shakes tilts wiggles",
    "circles around": "orbits loops hovers",
    "fades away": "dissolves melts evaporates explodes",
    "stands still": "sits waits sleeps rests lies stops freezes poses",
    "in a meadow": "field park garden lawn pasture farm hill hills countryside",
    "at the beach": "coast shore seaside island lake river",
    "under the sea": "ocean underwater reef coral aquarium deep lake",
    "in the snow": "icy snowy arctic glacier mountain mountains blizzard antarctic",
    "in the desert": "sahara canyon sandy",
    "in space": "galaxy universe planet cosmos milky outer mars",
    "in the moonlight": "moon midnight moonlit dark",
    "in the forest": "wood woods jungle woodland tree",
    "at sunset": "sunrise dusk dawn twilight sun",
    "in autumn": "october leaf foliage",
    "in a room": "kitchen bedroom house living hall indoors studio office",
    "in the sky": "cloudy heaven air",
    "the camera zooms in": "closeup dolly",
    "the camera pans to the right": "tracking tracks",
    "a photo": "image snapshot photography photographic painting",
    "an abstract pattern": "texture colors swirl",
}


def vocabulary(model: str | Path) -> Mapping[str, Sequence[Sequence[str]]]:
    """List the phrases a model was trained on: kind ("things", "motions", ...) -> groups of synonyms.

    Args:
        model: a name of the zoo, a Hub id or a folder. Empty for a model that reads any text.
    """
    entry = zoo.find(model)
    return entry.words if entry else {}


def unknown_words(prompt: str, model: str | Path) -> list[UnknownWord]:
    """List the words of a prompt that a model was not trained on, each once, in order.

    Args:
        prompt: any text; what is beyond the tokens that the model reads is left out.
        model: see `vocabulary`; a model that reads any text has no unknown words.
    """
    phrases = [phrase for groups in vocabulary(model).values() for group in groups for phrase in group]
    if not phrases:
        return []
    prompt = _part_read(prompt, model)
    by_word: dict[str, list[str]] = {}  # known word -> the phrases that contain it
    for phrase in sorted(phrases, key=len):
        for word in _words(phrase):
            by_word.setdefault(word, []).append(phrase)
    known, grammar = {_stem(word) for word in by_word}, set(_GRAMMAR.split())
    unknown = dict.fromkeys(word for word in _words(prompt) if _stem(word) not in known and word not in grammar)
    return [UnknownWord(word, tuple(_nearest(word, by_word, set(phrases)))) for word in unknown]


def cut_note(name: str, text: str, tokenizer: Any, limit: int) -> CodedText | None:
    """Write a sentence about a text of more than `limit` tokens, with the first words lost; None for a shorter one.

    Args:
        name: of the text, such as "prompt".
        tokenizer: of the model, from transformers.
    """
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    count = len(encoded["input_ids"])
    if count <= limit:
        return None
    lost = text[_end_of_part(text, encoded["offset_mapping"], limit) :].strip()
    named = lost if len(lost) <= _MAX_LOST else lost[:_MAX_LOST].rsplit(" ", 1)[0] + " ..."
    message = (
        f"the {name} has {count} tokens, the limit is {limit}: it is cut before {named!r}; shorten it to keep that"
    )
    number = re.search(r"[0-9]+", name)
    which = {"prompt": "prompt", "negative prompt": "negative_prompt"}.get(name, "part")
    values = {"which": which, "number": int(number[0]) if number else 0, "tokens": count, "limit": limit, "lost": named}
    return CodedText("prompt_cut", message, **values)


@dataclass(frozen=True)
class TokenCount:
    """Count the tokens of a prompt: those that a model reads at most, and the part of the prompt beyond them."""

    tokens: int
    limit: int
    lost: str


def count_tokens(prompt: str, model: str | Path) -> TokenCount | None:
    """Count a prompt's tokens for a model, by its tokenizer on this machine; None where that is not here."""
    entry = zoo.find(model)
    file = None if entry is None else _tokenizer_file(entry)
    if entry is None or file is None:
        return None
    encoded = _tokenizer(file).encode(prompt)
    limit = entry.defaults.max_sequence_length
    end = _end_of_part(prompt, encoded.offsets, limit) if len(encoded.ids) > limit else len(prompt)
    return TokenCount(len(encoded.ids), limit, prompt[end:].strip())


def _tokenizer_file(entry: zoo.ZooModel) -> Path | None:
    """Find the tokenizer of a model in its folder or in the cache of the Hub."""
    name = "tokenizer/tokenizer.json"
    if entry.folder:
        file = entry.folder / name
        return file if file.is_file() else None
    found = try_to_load_from_cache(entry.hub_id, name) if entry.hub_id else None
    return Path(found) if isinstance(found, str) else None


def _part_read(prompt: str, model: str | Path) -> str:
    """Return the part of a prompt that a model with a tokenizer on this machine reads; all of it for other models."""
    found = count_tokens(prompt, model)
    return prompt if found is None or not found.lost else prompt[: prompt.rindex(found.lost)]


@cache
def _tokenizer(file: Path) -> Tokenizer:
    return Tokenizer.from_file(str(file))


def _end_of_part(text: str, offsets: Sequence[tuple[int, int]], limit: int) -> int:
    """Find where the first word begins that `limit` tokens, of which the last marks the end, do not hold whole."""
    end = offsets[limit - 1][0]
    start_of_word = max(text.rfind(blank, 0, end) for blank in " \n\t") + 1
    return end if text[end].isspace() or end - start_of_word > _MAX_WORD else start_of_word


def hint(unknown: Sequence[UnknownWord], model: str) -> CodedText:
    """Write a sentence that names unknown words, their nearest known phrases and the command that lists all."""
    named = [
        f"{one.word!r}" + (f" (nearest: {', '.join(one.nearest)})" if one.nearest else "")
        for one in unknown[:_MAX_NAMED]
    ]
    more = f" and {len(unknown) - len(named)} more" if len(unknown) > len(named) else ""
    return CodedText(
        "unknown_words",
        f"{model} was not trained on {', '.join(named)}{more}; `pusa models show {model} --words` lists what it knows",
        model=model,
        count=len(unknown),
        words=", ".join(one.word for one in unknown),
        nearest=", ".join(dict.fromkeys(phrase for one in unknown for phrase in one.nearest)),
        unknown=[{"word": one.word, "nearest": list(one.nearest)} for one in unknown],
    )


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:['’-][^\W\d_]+)*", text.lower())


def _stem(word: str) -> str:
    """Reduce an English word to a stem that its forms share: ``slides``, ``sliding``, ``slide``; ``duck's``."""
    word = re.sub(r"['’]s?$", "", word)
    if len(word) > 4 and word.endswith("ies"):
        word = word[:-3] + "y"
    elif len(word) > 3 and not word.endswith("ss"):
        word = re.sub(r"(?<=..)(?:ing|ed|es|s)$", "", word)
    word = word[:-1] if len(word) > 2 and word.endswith("e") else word
    return word[:-1] if len(word) > 2 and word[-1] == word[-2] else word


def _nearest(word: str, by_word: Mapping[str, Sequence[str]], phrases: set[str]) -> Iterator[str]:
    """Yield known phrases near a word: by meaning (`_RELATED`), else by spelling, for typing errors."""
    stem = _stem(word)
    related = [
        phrase for phrase, others in _RELATED.items() if phrase in phrases and stem in map(_stem, others.split())
    ]
    if not related:
        similar = difflib.get_close_matches(word, by_word, n=_MAX_NEAREST, cutoff=0.75)
        related = list(dict.fromkeys(by_word[other][0] for other in similar))
    yield from related[:_MAX_NEAREST]
