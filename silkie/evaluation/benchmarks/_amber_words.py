"""Which annotated objects a description names, for AMBER's generative part.

The official scorer takes the nouns (NLTK tagger and WordNet lemmatiser) that are in its list of objects
(`relation.json`: object -> associated words); a noun is safe if it is a true object, an association of one, one of the
few `safe_words.txt`, or closer than 0.8 to one of them in spaCy's `en_core_web_lg` vectors. Everything else in the list
is a hallucination.

Here: the nouns come from `silkie.evaluation.lexicon`, and similarity is equality. The variant "nltk" asks for nltk and
spaCy with `en_core_web_lg` and gives the official number; which of the two is used does not depend on what is
installed, so that one file has one score. Without them CHAIR and Hal can come out slightly higher (a near-synonym
outside the lists is not forgiven) and Cover and Cog slightly lower. A capitalised noun ("Trees line the road") is found
here and not there: the lemmatiser leaves it as it is, and the list is in lower case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from silkie.evaluation.lexicon import mentions
from silkie.evaluation.records import Record, ResultError, read_json, read_text

__all__ = ["Description", "Lexicon", "load_lexicon", "match_words"]

SIMILARITY = 0.8


@dataclass(frozen=True, slots=True)
class Lexicon:
    """Words and how to compare them. `nouns(text)` are candidates in order, with repeats; `similar(a, b)` is True for
    near-synonyms."""

    associations: dict[str, list[str]]
    safe_words: frozenset[str]
    objects: frozenset[str]
    nouns: Callable[[str], list[str]]
    similar: Callable[[str, str], bool]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Description:
    """named: every mention of a listed object; wrong: those that are hallucinated; covered / likely_hit: annotated
    words reached in `truth` / `hallu`."""

    named: list[str]
    wrong: list[str]
    covered: int
    likely_hit: int


def match_words(text: str, truth: Sequence[str], hallu: Sequence[str], lexicon: Lexicon) -> Description:
    """Match a description with its annotation, as the official scorer does.

    A mention reaches the FIRST annotated word it matches, associations before the words themselves; so one mention
    covers one true object."""
    named = [noun for noun in lexicon.nouns(text) if noun in lexicon.objects]
    true_words, likely_words = _with_associations(truth, lexicon), _with_associations(hallu, lexicon)
    covered: set[int] = set()
    hit: set[int] = set()
    wrong = []
    for noun in named:
        if noun in lexicon.safe_words:
            continue
        exact = next((owner for word, owner in true_words if word == noun), None)
        if exact is not None:
            covered.add(exact)
            continue
        if (owner := next((owner for word, owner in likely_words if word == noun), None)) is not None:
            hit.add(owner)
        if (owner := next((owner for word, owner in likely_words if lexicon.similar(noun, word)), None)) is not None:
            hit.add(owner)
        if (owner := next((owner for word, owner in true_words if lexicon.similar(noun, word)), None)) is not None:
            covered.add(owner)
        else:
            wrong.append(noun)
    return Description(named, wrong, len(covered), len(hit))


def load_lexicon(folder: Path, annotations: Iterable[Record], *, nltk: bool = False) -> Lexicon:
    """The word lists beside `annotations.json`, and how nouns are found: by the lists and spelling rules, or by NLTK.

    Without `relation.json` the list of objects is every word of the annotations, without associations; a warning says
    so."""
    warnings = []
    relation, safe_file = folder / "relation.json", folder / "safe_words.txt"
    if relation.is_file():
        associations = read_json(relation)
        lists = isinstance(associations, dict) and all(
            isinstance(words, list) and all(isinstance(word, str) for word in words) for words in associations.values()
        )
        if not lists:
            raise ResultError(relation, None, "expected a JSON object: word -> list of associated words.")
    else:
        words = [
            word
            for record in annotations
            if record.category == "generative"
            for key in ("truth", "hallu")
            for word in record.data.get(key, [])
        ]
        associations = {word: [] for word in dict.fromkeys(words)}
        warnings.append(
            f"no relation.json beside the annotations: the list of objects is their {len(associations)} words, without"
            " associated words; not the official number."
        )
    safe = frozenset(read_text(safe_file).split("\n")) - {""} if safe_file.is_file() else frozenset()
    if not safe_file.is_file():
        warnings.append("no safe_words.txt beside the annotations: no word is always safe; not the official number.")
    objects = frozenset(associations) | {word for related in associations.values() for word in related}
    if nltk:
        nouns, similar = _official_words()
    else:
        nouns, similar = (lambda text: mentions(text, objects)), (lambda a, b: a == b)
        warnings.append(
            "nouns are found by word list and spelling rules: CHAIR, Cover, Hal and Cog are close to the official ones,"
            " not equal. --variant nltk finds them as the official scorer does (needs nltk, and spaCy with"
            " en_core_web_lg)."
        )
    return Lexicon(associations, safe, objects, nouns, similar, warnings)


def _with_associations(words: Sequence[str], lexicon: Lexicon) -> list[tuple[str, int]]:
    """(word, index of the annotated word it stands for): associations first, then the words."""
    related = [(other, i) for i, word in enumerate(words) for other in lexicon.associations.get(word, [])]
    return related + [(word, i) for i, word in enumerate(words)]


def _official_words() -> tuple[Callable[[str], list[str]], Callable[[str, str], bool]]:
    """NLTK's nouns and spaCy's similarity; nothing is downloaded.

    Raises:
        ValueError: one of them, or its data, is not installed.
    """
    try:
        import nltk
        import spacy
        from nltk.stem import WordNetLemmatizer

        vectors = spacy.load("en_core_web_lg")
        lemmatizer = WordNetLemmatizer()
        lemmatizer.lemmatize("cats")
        nltk.pos_tag(nltk.word_tokenize("two cats"))
    except (ImportError, LookupError, OSError) as error:
        raise ValueError(
            f"--variant nltk needs NLTK and spaCy with their data: {str(error).strip().splitlines()[0]}. Install them"
            " (pip install nltk spacy; python -m spacy download en_core_web_lg; python -m nltk.downloader punkt_tab"
            " averaged_perceptron_tagger_eng wordnet), or score without --variant."
        ) from None

    def nouns(text: str) -> list[str]:
        return [
            lemmatizer.lemmatize(word) for word, tag in nltk.pos_tag(nltk.word_tokenize(text)) if tag.startswith("NN")
        ]

    return nouns, lambda a, b: vectors(a).similarity(vectors(b)) > SIMILARITY
