"""Which objects a text names: a word list, plurals folded to singulars, longest phrase first. No model, no download.

This replaces the part-of-speech tagger and lemmatiser of the official AMBER and CHAIR scorers. Where it can differ from
them: a listed word that is used as another part of speech counts here, save for the words in `AMBIGUOUS`, whose
neighbours are looked at ("light blue", "watch the game"); irregular plurals outside `IRREGULAR` are not folded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

__all__ = ["AMBIGUOUS", "mentions", "singular"]

IRREGULAR = {
    "people": "people",
    "men": "man",
    "women": "woman",
    "children": "child",
    "feet": "foot",
    "teeth": "tooth",
    "geese": "goose",
    "mice": "mouse",
    "knives": "knife",
    "shelves": "shelf",
    "leaves": "leaf",
    "loaves": "loaf",
    "wolves": "wolf",
    "scarves": "scarf",
    "halves": "half",
    "calves": "calf",
    "lives": "life",
    "wives": "wife",
    "oxen": "ox",
    "buses": "bus",
    "movies": "movie",
    "cookies": "cookie",
    "ties": "tie",
    "pies": "pie",
    "shoes": "shoe",
    "toes": "toe",
    "canoes": "canoe",
    "axes": "axe",
    "glasses": "glass",
    "lenses": "lens",
}
UNCHANGED = frozenset(
    {
        "sunglasses",
        "slippers",
        "chopsticks",
        "scissors",
        "jeans",
        "pants",
        "shorts",
        "trousers",
        "binoculars",
        "tennis",
        "grass",
        "series",
        "earrings",
    }
)

# Listed objects whose word is as often a verb or an adjective: whether they count is read from their neighbours
# (`_names_a_thing`).
AMBIGUOUS = frozenset(
    {
        "can",
        "leave",
        "hot",
        "watch",
        "support",
        "file",
        "lock",
        "brush",
        "switch",
        "light",
        "orange",
        "range",
        "cream",
        "rail",
        "track",
        "note",
        "lean",
        "sound",
    }
)
DETERMINERS = frozenset(
    {
        "a",
        "an",
        "the",
        "this",
        "that",
        "these",
        "those",
        "his",
        "her",
        "its",
        "their",
        "my",
        "your",
        "our",
        "some",
        "any",
        "each",
        "every",
        "no",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "several",
        "many",
        "few",
    }
)
# What stands before a verb or behind a linking verb ...
NO_NOUN_AFTER = frozenset(
    {
        "to",
        "i",
        "you",
        "we",
        "they",
        "he",
        "she",
        "it",
        "who",
        "which",
        "not",
        "can",
        "could",
        "will",
        "would",
        "may",
        "might",
        "must",
        "should",
        "is",
        "are",
        "was",
        "were",
        "be",
        "look",
        "looks",
        "seem",
        "seems",
        "feels",
        "very",
        "quite",
        "too",
        "so",
        "more",
    }
)
# ... unless these stand before that: "next to", "there is".
NOUN_AFTER = frozenset({"next", "close", "there"})
# A noun ends its phrase: what follows is one of these, or punctuation.
PHRASE_ENDS = frozenset(
    {
        "and",
        "or",
        "but",
        "with",
        "without",
        "on",
        "in",
        "at",
        "near",
        "next",
        "of",
        "by",
        "behind",
        "under",
        "beside",
        "above",
        "below",
        "from",
        "for",
        "to",
        "is",
        "are",
        "was",
        "were",
        "that",
        "which",
        "while",
        "as",
        "can",
        "has",
        "have",
    }
)


def singular(word: str) -> str:
    """A lower-case noun's singular by English spelling rules; a word that is already singular is returned as it is."""
    if word in UNCHANGED or word in IRREGULAR:
        return IRREGULAR.get(word, word)
    if word.endswith(("men",)) and len(word) > 4 and word not in ("specimen", "abdomen", "regimen"):
        return word[:-2] + "an"
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "zzes", "oes")):
        return word[:-2]
    return word[:-1]


def mentions(text: str, vocabulary: Mapping[str, str] | Iterable[str]) -> list[str]:
    """The listed objects that a text names, in order, repeats kept.

    Args:
        vocabulary: surface form -> canonical name (synonyms share a name), or just names. Forms may be phrases ("red
            circle"); the longest wins.

    Returns:
        Canonical names.
    """
    forms = vocabulary if isinstance(vocabulary, Mapping) else {name: name for name in vocabulary}
    table = {tuple(_words(form)): name for form, name in forms.items()}
    table |= {
        (*key[:-1], singular(key[-1])): name
        for key, name in table.items()
        if key and (*key[:-1], singular(key[-1])) not in table
    }
    longest = max(map(len, table), default=0)
    tokens = list(re.finditer(_WORD, text.lower()))
    words = [token.group() for token in tokens]
    found, i = [], 0
    while i < len(words):
        for length in range(min(longest, len(words) - i), 0, -1):
            span = words[i : i + length]
            key = next((k for k in (tuple(span), (*span[:-1], singular(span[-1]))) if k in table), None)
            if key is not None and not (
                length == 1 and singular(span[0]) in AMBIGUOUS and not _names_a_thing(tokens, i)
            ):
                found.append(table[key])
                i += length
                break
        else:
            i += 1
    return found


_WORD = r"[a-z0-9]+(?:-[a-z0-9]+)*"


def _words(text: str) -> list[str]:
    return re.findall(_WORD, text.lower())


def _names_a_thing(tokens: Sequence[re.Match[str]], i: int) -> bool:
    """Whether an ambiguous word is a noun where it stands: after a determiner ("a watch"), or at the end of its phrase
    and not where a verb or a predicate would stand ("a hat, watch and tie"; not "they watch", "is light", "light blue",
    "watches the game")."""
    string, word = tokens[i].string, tokens[i].group()
    # neighbours beyond a comma or a full stop are none
    joined_before = i > 0 and not string[tokens[i - 1].end() : tokens[i].start()].strip()
    joined_after = i + 1 < len(tokens) and not string[tokens[i].end() : tokens[i + 1].start()].strip()
    before = tokens[i - 1].group() if joined_before else ""
    after = tokens[i + 1].group() if joined_after else ""
    if before in DETERMINERS:
        return True
    if before in NO_NOUN_AFTER and not (i > 1 and tokens[i - 2].group() in NOUN_AFTER):
        return False
    plural_noun = word not in AMBIGUOUS and after not in DETERMINERS
    return not after or after in PHRASE_ENDS or plural_noun
