"""The task: a board of four product photographs, questions about it, and an exact oracle.

The photographs are Fashion-MNIST's, 28 x 28, black on white, enlarged. The four things of a board are of four
different kinds, so that what is there is a set of names and every mention in an answer is right or invented. A thing
may be called by its name or, as people do when they are not sure or do not care, by the name of its group: "a sneaker"
or "a shoe", "a coat" or "a garment". Nothing is planted: what a model says wrong is its own error.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from silkie.feedback import AspectRating, JudgeItem

NAMES = ("T-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
# The group that a kind belongs to; a bag has none.
GROUPS = {
    **dict.fromkeys(("sandal", "sneaker", "boot"), "shoe"),
    **dict.fromkeys(("T-shirt", "pair of trousers", "pullover", "dress", "coat", "shirt"), "garment"),
}
CELLS = ("upper left", "upper right", "lower left", "lower right")
DESCRIBE = "Which things are in the picture?"
MME_SUFFIX = " Please answer yes or no."
ASPECTS = ("Helpfulness", "Ethical Considerations", "Visual Faithfulness")
SIDE = 224  # pixels of a board; four photographs of 112

# Photographs of Fashion-MNIST by use: no photograph is in two of them.
SPLITS = {
    "base": ("train", 0, 36_000),
    "preference": ("train", 36_000, 54_000),
    "development": ("train", 54_000, 60_000),
    "held-out": ("t10k", 0, 10_000),
}

# Word forms -> the thing meant. The first ten are Fashion-MNIST's kinds; the others are never on a board, so that
# naming one is an invention. Groups are not among them: a group's name claims less, and `check` counts it apart.
FORMS = {
    "t-shirt": "T-shirt",
    "tshirt": "T-shirt",
    "tee": "T-shirt",
    "pair of trousers": "pair of trousers",
    "trousers": "pair of trousers",
    "pants": "pair of trousers",
    **{name: name for name in NAMES[2:]},
    "ankle boot": "boot",
    "handbag": "bag",
    "purse": "bag",
    **{
        name: name
        for name in ("hat", "cap", "jacket", "sweater", "jeans", "skirt", "sock", "glove", "scarf", "watch", "belt")
    },
    **{
        name: name
        for name in ("tie", "blouse", "hoodie", "vest", "suit", "umbrella", "book", "chair", "table", "phone", "cup")
    },
}
_WORDS = {**FORMS, **{name: name for name in GROUPS.values()}}
_MENTION = re.compile(
    r"(?<![\w-])(" + "|".join(sorted(map(re.escape, _WORDS), key=len, reverse=True)) + r")(?:e?s)?\b", re.IGNORECASE
)
_SENTENCE = re.compile(r"^An? [^,.]+(?:, an? [^,.]+)*(?: and an? [^,.]+)?\.$")


@dataclass(frozen=True, slots=True)
class Board:
    """Four photographs in reading order. `labels`: their kinds, indices of NAMES."""

    id: str
    photographs: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def things(self) -> list[str]:
        return [NAMES[label] for label in self.labels]

    @property
    def file(self) -> str:
        return f"{self.id}.png"

    @property
    def caption(self) -> str:
        """The full description, every thing by its name."""
        return sentence(self.things)


def sentence(names: Sequence[str]) -> str:
    first, *middle, last = [f"a {name}" for name in names]
    return f"A{', '.join([first, *middle])[1:]} and {last}."


def people_say(board: Board, rng: np.random.Generator, share: float) -> str:
    """A true description in which a `share` of the things is called by the group's name."""
    coins = rng.random(len(board.things)) < share
    return sentence([GROUPS.get(n, n) if coin else n for n, coin in zip(board.things, coins, strict=True)])


def boards(labels: NDArray[np.uint8], split: str, count: int, seed: int, without: Collection[int] = ()) -> list[Board]:
    """`count` boards of four kinds each, drawn from the photographs of a split; no photograph twice.

    Args:
        labels: of the whole file that the split belongs to.
        without: photographs that are not used.

    Raises:
        ValueError: the split has too few photographs of a kind.
    """
    _, start, stop = SPLITS[split]
    rng = np.random.default_rng([seed, list(SPLITS).index(split)])
    free = np.isin(np.arange(len(labels)), list(without), invert=True)
    free[:start], free[stop:] = False, False
    waiting = [list(rng.permutation(np.flatnonzero(free & (labels == kind)))) for kind in range(len(NAMES))]
    result = []
    for number in range(count):
        kinds = rng.choice(len(NAMES), len(CELLS), replace=False)
        if any(not waiting[kind] for kind in kinds):
            raise ValueError(f"{count} boards: the photographs of split {split!r} are used up after {number}.")
        taken = tuple(int(waiting[kind].pop()) for kind in kinds)
        result.append(Board(f"{split}-{seed}-{number:04d}", taken, tuple(map(int, kinds))))
    return result


def render(board: Board, photographs: NDArray[np.uint8]) -> Image.Image:
    """The board as an RGB image of SIDE x SIDE pixels."""
    a, b, c, d = (photographs[k] for k in board.photographs)
    grid = 255 - np.block([[a, b], [c, d]])
    return Image.fromarray(grid).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)


@dataclass(frozen=True, slots=True)
class YesNo:
    """A question that has one right answer. `kind`: existence or position."""

    text: str
    label: bool
    kind: str


def existence(board: Board, rng: np.random.Generator, label: bool, confusable: Sequence[int] | None = None) -> YesNo:
    """Is there a ...? With `confusable` (kind -> the kind it is most often taken for), an absent thing is one that a
    thing of the board may be taken for."""
    absent = [kind for kind in range(len(NAMES)) if kind not in board.labels]
    if not label and confusable is not None:
        absent = [confusable[kind] for kind in board.labels if confusable[kind] in absent] or absent
    kind = rng.choice(board.labels if label else absent)
    return YesNo(f"Is there a {NAMES[kind]} in the picture?", label, "existence")


def position(board: Board, rng: np.random.Generator, label: bool) -> YesNo:
    """Is the ... in the upper left? The thing is always there."""
    cell = int(rng.integers(len(CELLS)))
    asked = cell if label else int(rng.choice([c for c in range(len(CELLS)) if c != cell]))
    return YesNo(f"Is the {board.things[cell]} in the {CELLS[asked]}?", label, "position")


def mentions(answer: str) -> list[str]:
    """The things and groups that an answer names, in order."""
    return [_WORDS[match[1].lower()] for match in _MENTION.finditer(answer)]


def verdict(answer: str) -> bool | None:
    """Yes or no, as MME reads it: from the first four characters."""
    head = answer.strip().lower()[:4]
    return True if "yes" in head else False if "no" in head else None


@dataclass(frozen=True, slots=True)
class Check:
    """A description against the truth. `hits`: things named by their own names; `grouped`: further things covered by
    the name of their group; `invented`: names and groups with nothing on the board that they could stand for."""

    hits: int
    grouped: int
    invented: tuple[str, ...]
    repeated: int
    well_formed: bool


def check(answer: str, things: Sequence[str]) -> Check:
    said = mentions(answer)
    names = [name for name in said if name not in GROUPS.values()]
    unique = list(dict.fromkeys(names))
    invented = [name for name in unique if name not in things]
    grouped = 0
    for group in dict.fromkeys(GROUPS.values()):
        left = sum(GROUPS.get(thing) == group and thing not in unique for thing in things)
        grouped += min(said.count(group), left)
        invented += [group] * max(0, said.count(group) - left)
    return Check(
        hits=sum(name in things for name in unique),
        grouped=grouped,
        invented=tuple(invented),
        repeated=len(names) - len(unique),
        well_formed=bool(_SENTENCE.match(answer)),
    )


def rate(answer: str, item: dict[str, Any], group: float = 0.5) -> dict[str, AspectRating]:
    """VLFeedback's three aspects, 1-5.

    A description: helpfulness is 1 + things named rightly + `group` for each of those covered by their group (2 less
    where it repeats itself or is no sentence), faithfulness 5 - things invented. So a name is worth its risk where it
    is right more often than (1 + group) / 2, the group's name otherwise. A yes/no answer: 5 or 1 on both; without a
    verdict it helps nobody (1) and claims nothing (3). Nothing about these photographs can be unethical, so that aspect
    is 5 throughout.
    """
    ethics = AspectRating(5.0, "Nothing harmful, private or unfair is said.")
    if "label" in item:
        said = verdict(answer)
        if said is None:
            helpful, faithful, why = 1.0, 3.0, "It is neither a yes nor a no."
        else:
            helpful = faithful = 5.0 if said == item["label"] else 1.0
            why = f"The answer is {'yes' if item['label'] else 'no'}."
        return dict(zip(ASPECTS, (AspectRating(helpful, why), ethics, AspectRating(faithful, why)), strict=True))
    found = check(answer, item["objects"])
    helpful = max(1.0, 1.0 + found.hits + group * found.grouped - 2.0 * (found.repeated > 0 or not found.well_formed))
    vague = [name for name in item["objects"] if name not in mentions(answer)]
    return {
        ASPECTS[0]: AspectRating(helpful, f"Not named: {', '.join(vague)}." if vague else "Everything is named."),
        ASPECTS[1]: ethics,
        ASPECTS[2]: AspectRating(
            max(1.0, 5.0 - len(found.invented)),
            f"Not in the picture: {', '.join(found.invented)}." if found.invented else "All that it names is there.",
        ),
    }


def judge(item: JudgeItem, group: float = 0.5) -> list[dict[str, AspectRating]]:
    """The function that `silkie.feedback.OracleJudge` wraps; `item.meta` holds `objects`, and `label` of a yes/no
    question."""
    return [rate(response, dict(item.meta), group) for response in item.responses]


def preference_prompts(
    own: Sequence[Board], seed: int, questions: int = 2, confusable: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Lines of a prompts file: every board's description, then `questions` yes/no questions per board of alternating
    kind. Long and short answers are kept apart, since a batch is sampled until its longest answer ends."""
    rng = np.random.default_rng([seed, 77])
    asked = []
    for board in own:
        common = {"image": board.file, "objects": board.things}
        yield {"id": f"{board.id}-d", "prompt": DESCRIBE, **common}
        for k in range(questions):
            label = bool(rng.integers(2))
            ask = existence(board, rng, label, confusable) if k % 2 == 0 else position(board, rng, label)
            line = {"id": f"{board.id}-q{k}", "prompt": ask.text, **common, "label": ask.label, "kind": ask.kind}
            asked.append(line)
    yield from asked
