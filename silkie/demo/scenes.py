"""The embedded world: small boards with coloured shapes, rendered by code, whose content is known exactly.

A board has 3 x 3 cells of 28 x 28 pixels. Qwen2.5-VL with patch 14 and merge 2 turns each cell into exactly one visual
token. A scene holds 1-4 shapes of different kinds ("red circle"), or one picture card (a person, a robot, a private
card or a public sign with a number) and up to two shapes: the cards are what the red-team questions are about. Shapes
occur together more often than chance (`COMPANION`), as a chair does with a table: that is what makes co-occurrence
hallucinations, and POPE's adversarial questions, possible here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Split = Literal["train", "heldout"]

CELL = 28
SIDE = 3 * CELL
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (40, 160, 70),
    "blue": (45, 85, 215),
    "yellow": (240, 200, 30),
    "purple": (145, 55, 175),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
ICONS = ("person", "robot", "card", "sign")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
DIGITS = (1, 2, 3, 4)

OBJECTS = tuple((color, shape) for color in COLORS for shape in SHAPES)
# A fixed pairing of the 36 kinds: the same number of steps along both wheels, so that companions share neither colour
# nor shape.
COMPANION = {
    (color, shape): (list(COLORS)[(i + 3) % 6], SHAPES[(j + 3) % 6])
    for i, color in enumerate(COLORS)
    for j, shape in enumerate(SHAPES)
}
# Kinds differ in how often they are drawn (1 to 3 times), so that "popular" objects exist.
POPULARITY = {kind: 1.0 + 2.0 * ((7 * k) % 36) / 35 for k, kind in enumerate(OBJECTS)}
_POPULARITY_P = np.array([POPULARITY[kind] for kind in OBJECTS]) / sum(POPULARITY.values())
COMPANION_RATE = 0.4

# 5 x 7 bitmaps, drawn here so that an image does not depend on the fonts of a machine.
_DIGIT_ROWS = {
    1: ("00100", "01100", "00100", "00100", "00100", "00100", "01110"),
    2: ("01110", "10001", "00001", "00110", "01000", "10000", "11111"),
    3: ("11110", "00001", "00001", "01110", "00001", "00001", "11110"),
    4: ("10010", "10010", "10010", "11111", "00010", "00010", "00010"),
}


@dataclass(frozen=True, slots=True)
class SceneItem:
    """One thing on the board. `cell` is 0-8 in reading order; `color` is None for a picture card, `number` None for all
    but cards and signs."""

    kind: str
    cell: int
    color: str | None = None
    number: int | None = None

    @property
    def is_icon(self) -> bool:
        return self.kind in ICONS

    @property
    def name(self) -> str:
        """ "red circle", or "person"."""
        return f"{self.color} {self.kind}" if self.color else self.kind

    @property
    def pair(self) -> tuple[str, str]:
        """(colour, shape); only shapes have it."""
        if self.color is None:
            raise ValueError(f"a {self.kind} has no colour: ask `scene.shapes`, not `scene.items`")
        return self.color, self.kind

    @property
    def row(self) -> str:
        return ROWS[self.cell // 3]

    @property
    def column(self) -> str:
        return COLUMNS[self.cell % 3]


@dataclass(frozen=True, slots=True)
class Scene:
    """A board. `items` are in reading order; `jitter` seeds the drawing (offsets, sizes, tints, grain) and is no part
    of the content."""

    items: tuple[SceneItem, ...]
    jitter: int

    @property
    def shapes(self) -> tuple[SceneItem, ...]:
        return tuple(item for item in self.items if not item.is_icon)

    @property
    def icon(self) -> SceneItem | None:
        return next((item for item in self.items if item.is_icon), None)

    @property
    def key(self) -> str:
        """The content as text: two scenes with the same key show the same things in the same cells."""
        return ";".join(f"{item.cell}:{item.name}:{item.number or ''}" for item in self.items)

    @property
    def split(self) -> Split:
        """The half of the world a scene belongs to: a function of its content alone, hence no content is ever on both
        sides."""
        return "heldout" if hashlib.sha256(self.key.encode()).digest()[0] < 64 else "train"

    def has(self, color: str, shape: str) -> bool:
        return any(item.color == color and item.kind == shape for item in self.items)

    def to_json(self) -> dict:
        items = [
            {"kind": item.kind, "cell": item.cell, "color": item.color, "number": item.number} for item in self.items
        ]
        return {"items": items, "jitter": self.jitter}

    @classmethod
    def from_json(cls, record: dict) -> Scene:
        return cls(tuple(SceneItem(**item) for item in record["items"]), int(record["jitter"]))


def _draw_kinds(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """`count` different kinds: by popularity, and with `COMPANION_RATE` the companion of one that is already there."""
    kinds: list[tuple[str, str]] = []
    while len(kinds) < count:
        if kinds and rng.random() < COMPANION_RATE:
            kind = COMPANION[kinds[rng.integers(len(kinds))]]
        else:
            kind = OBJECTS[rng.choice(len(OBJECTS), p=_POPULARITY_P)]
        if kind not in kinds:
            kinds.append(kind)
    return kinds


def sample_scene(rng: np.random.Generator, *, icon: bool | str = False, count: int | None = None) -> Scene:
    """One random scene. `icon`: put a picture card on the board (a name picks which). `count`: number of shapes (1-4,
    with a card 0-2)."""
    if count is None:
        count = int(rng.integers(0, 3)) if icon else int(rng.integers(1, 5))
    cells = rng.permutation(9)
    items = [
        SceneItem(shape, int(cell), color) for (color, shape), cell in zip(_draw_kinds(rng, count), cells, strict=False)
    ]
    if icon:
        kind = icon if isinstance(icon, str) else ICONS[rng.integers(len(ICONS))]
        number = int(rng.choice(DIGITS)) if kind in ("card", "sign") else None
        items.append(SceneItem(kind, int(cells[count]), None, number))
    items.sort(key=lambda item: item.cell)
    return Scene(tuple(items), int(rng.integers(2**31)))


def scene_stream(seed: int, split: Split, *, icon: bool | str = False, unique: bool = False) -> Iterator[Scene]:
    """Endless scenes of one split. `unique` drops contents that have already been given out."""
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    while True:
        scene = sample_scene(rng, icon=icon)
        if scene.split != split or (unique and scene.key in seen):
            continue
        if unique:
            seen.add(scene.key)
        yield scene


def _polygon(
    center: tuple[float, float], radius: float, angles: list[float], radii: list[float]
) -> list[tuple[float, float]]:
    return [
        (center[0] + radius * r * float(np.cos(np.radians(a))), center[1] + radius * r * float(np.sin(np.radians(a))))
        for a, r in zip(angles, radii, strict=True)
    ]


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, center: tuple[float, float], radius: float, fill: tuple[int, ...]
) -> None:
    x, y = center
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=max(3, round(radius * 0.38)))
    elif shape == "square":
        side = radius * 0.88
        draw.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    elif shape == "triangle":
        draw.polygon(_polygon((x, y + radius * 0.15), radius * 1.1, [-90, 30, 150], [1, 1, 1]), fill=fill)
    elif shape == "star":
        draw.polygon(_polygon(center, radius * 1.15, [-90 + 36 * k for k in range(10)], [1, 0.42] * 5), fill=fill)
    elif shape == "cross":
        arm = radius * 0.34
        draw.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
        draw.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
    else:
        raise ValueError(f"unknown shape {shape!r}; the world has {SHAPES}")


def _draw_number(
    draw: ImageDraw.ImageDraw, number: int, left: float, top: float, pixel: int, fill: tuple[int, ...]
) -> None:
    for r, row in enumerate(_DIGIT_ROWS[number]):
        for c, bit in enumerate(row):
            if bit == "1":
                draw.rectangle(
                    (left + c * pixel, top + r * pixel, left + (c + 1) * pixel - 1, top + (r + 1) * pixel - 1),
                    fill=fill,
                )


def _draw_icon(
    draw: ImageDraw.ImageDraw, item: SceneItem, center: tuple[float, float], rng: np.random.Generator
) -> None:
    x, y = center
    if item.kind == "person":
        skin = [(245, 205, 170), (205, 150, 110), (135, 90, 60)][rng.integers(3)]
        shirt = [(70, 110, 160), (150, 80, 90), (90, 130, 90)][rng.integers(3)]
        draw.ellipse((x - 17, y + 6, x + 17, y + 34), fill=shirt)
        draw.rectangle((x - 20, y + 22, x + 20, y + 36), fill=(226, 226, 222))
        draw.ellipse((x - 12, y - 20, x + 12, y + 8), fill=skin)
        draw.pieslice((x - 12, y - 21, x + 12, y + 3), 180, 360, fill=(60, 40, 30))
        for dx in (-5, 5):
            draw.ellipse((x + dx - 2, y - 8, x + dx + 2, y - 4), fill=(20, 20, 20))
    elif item.kind == "robot":
        draw.rectangle((x - 16, y - 12, x + 16, y + 18), fill=(130, 150, 160), outline=(70, 80, 90), width=3)
        draw.line((x, y - 12, x, y - 22), fill=(70, 80, 90), width=3)
        for dx in (-7, 7):
            draw.rectangle((x + dx - 4, y - 6, x + dx + 4, y + 2), fill=(0, 230, 230))
        draw.rectangle((x - 9, y + 8, x + 9, y + 12), fill=(70, 80, 90))
    elif item.kind == "card":
        draw.rectangle((x - 22, y - 18, x + 22, y + 18), fill=(250, 250, 250), outline=(180, 30, 30), width=3)
        draw.rectangle((x - 19, y - 15, x - 5, y + 15), fill=(235, 150, 150))
        _draw_number(draw, item.number or 1, x + 1, y - 10, 3, (20, 20, 20))
    elif item.kind == "sign":
        draw.rectangle((x - 2, y + 8, x + 2, y + 25), fill=(110, 80, 50))
        draw.rectangle((x - 20, y - 22, x + 20, y + 10), fill=(30, 120, 190), outline=(250, 250, 250), width=2)
        _draw_number(draw, item.number or 1, x - 8, y - 17, 3, (255, 255, 255))
    else:
        raise ValueError(f"unknown picture card {item.kind!r}; the world has {ICONS}")


def draw_scene(scene: Scene) -> Image.Image:
    """The scene as an 84 x 84 RGB image: drawn at twice the size, with seeded offsets, sizes, tints and grain, then
    halved."""
    rng = np.random.default_rng(scene.jitter)
    background = tuple(int(v) for v in rng.integers(216, 236, size=3))
    canvas = Image.new("RGB", (2 * SIDE, 2 * SIDE), background)
    draw = ImageDraw.Draw(canvas)
    # The frame tells where the board ends
    draw.rectangle((0, 0, 2 * SIDE - 1, 2 * SIDE - 1), outline=(95, 85, 75), width=5)
    for item in scene.items:
        offset = rng.uniform(-4, 4, size=2)
        center = ((item.cell % 3) * 56 + 28 + offset[0], (item.cell // 3) * 56 + 28 + offset[1])
        if item.color is None:
            _draw_icon(draw, item, center, rng)
        else:
            tint = np.clip(np.array(COLORS[item.color]) + rng.integers(-14, 15, size=3), 0, 255)
            _draw_shape(draw, item.kind, center, float(rng.uniform(14, 19)), tuple(int(v) for v in tint))
    small = np.asarray(canvas.reduce(2), dtype=np.int16)
    grain = rng.integers(-6, 7, size=(SIDE, SIDE, 1), dtype=np.int16)
    return Image.fromarray(np.clip(small + grain, 0, 255).astype(np.uint8))
