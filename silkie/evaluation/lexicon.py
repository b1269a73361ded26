"""Which objects a text names: a word list, plurals folded to singulars, longest phrase first. No model, no download.

This replaces the part-of-speech tagger and lemmatiser of the official AMBER and CHAIR scorers. Where it can differ from them: a listed
word that is used as another part of speech ("light blue", "watch the game") counts here unless it is in `AMBIGUOUS`; irregular plurals
outside `IRREGULAR` are not folded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

__all__ = ["AMBIGUOUS", "mentions", "singular"]

IRREGULAR = {
    "people": "people", "men": "man", "women": "woman", "children": "child", "feet": "foot", "teeth": "tooth", "geese": "goose",
    "mice": "mouse", "knives": "knife", "shelves": "shelf", "leaves": "leaf", "loaves": "loaf", "wolves": "wolf", "scarves": "scarf",
    "halves": "half", "calves": "calf", "lives": "life", "wives": "wife", "oxen": "ox", "buses": "bus", "movies": "movie",
    "cookies": "cookie", "ties": "tie", "pies": "pie", "shoes": "shoe", "toes": "toe", "canoes": "canoe", "axes": "axe",
    "glasses": "glass", "lenses": "lens",
}  # fmt: skip
UNCHANGED = frozenset({
    "sunglasses", "slippers", "chopsticks", "scissors", "jeans", "pants", "shorts", "trousers", "binoculars", "tennis", "grass", "series",
    "earrings",
})  # fmt: skip

# Listed objects whose word is more often a verb or an adjective: they count only after a determiner, a number or a possessive.
AMBIGUOUS = frozenset({
    "can", "leave", "hot", "watch", "support", "file", "lock", "brush", "switch", "light", "orange", "range", "cream", "rail", "track",
    "note", "lean", "sound",
})  # fmt: skip
DETERMINERS = frozenset({
    "a", "an", "the", "this", "that", "these", "those", "his", "her", "its", "their", "my", "your", "our", "some", "any", "each", "every",
    "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "several", "many", "few",
})  # fmt: skip


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
        vocabulary: surface form -> canonical name (synonyms share a name), or just names. Forms may be phrases ("red circle"); the longest
            wins.

    Returns:
        Canonical names.
    """
    forms = vocabulary if isinstance(vocabulary, Mapping) else {name: name for name in vocabulary}
    table = {tuple(_words(form)): name for form, name in forms.items()}
    table |= {(*key[:-1], singular(key[-1])): name for key, name in table.items() if key and (*key[:-1], singular(key[-1])) not in table}
    longest = max(map(len, table), default=0)
    words = _words(text)
    found, i = [], 0
    while i < len(words):
        for length in range(min(longest, len(words) - i), 0, -1):
            span = words[i : i + length]
            key = next((k for k in (tuple(span), (*span[:-1], singular(span[-1]))) if k in table), None)
            if key is not None and not (length == 1 and span[0] in AMBIGUOUS and (i == 0 or words[i - 1] not in DETERMINERS)):
                found.append(table[key])
                i += length
                break
        else:
            i += 1
    return found


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", text.lower())
