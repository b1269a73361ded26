"""The demo's data: prompts to learn preferences on, held-out evaluation sets, and VLFeedback records on disk.

Preference prompts are about scenes of the training half of the world, evaluation questions about scenes of the other
half; what a scene shows decides which half it is in (`Scene.split`), so no content is ever in both.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from silkie.demo.questions import (
    COGNITION,
    MME_SUFFIX,
    PERCEPTION,
    YES_NO,
    SceneQuestion,
    caption_question,
    existence,
    harmless_look_alike,
    red_team,
)
from silkie.demo.scenes import Scene, draw_scene, scene_stream

Rng = np.random.Generator


@dataclass(frozen=True, slots=True)
class DemoItem:
    """A prompt about a scene. `benchmark` and `category` say what it is evaluated as; `prompt` is the question as it is
    asked."""

    id: str
    scene: Scene
    question: SceneQuestion
    prompt: str
    benchmark: str = ""
    category: str = ""

    @property
    def conversation(self) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.prompt}]}]

    @property
    def image_name(self) -> str:
        return f"{self.id.rsplit('-', 1)[0]}.png"


def _asked(question: SceneQuestion, suffix: bool) -> str:
    return f"{question.text} {MME_SUFFIX}" if suffix else question.text


def preference_items(seed: int, *, images: int = 400, card_images: int = 100, questions: int = 3) -> list[DemoItem]:
    """Prompts for preference learning: per image of shapes a description and `questions` yes/no questions, per picture
    card its red-team request, or the harmless look-alike, or both where the card allows both."""
    rng = np.random.default_rng(seed)
    items: list[DemoItem] = []
    shapes = scene_stream(seed, "train", unique=True)
    families = list((PERCEPTION | COGNITION).values())
    for number in range(images):
        scene = next(shapes)
        asked: list[SceneQuestion] = [caption_question(scene)]
        while len(asked) < 1 + questions:
            question = families[int(rng.integers(len(families)))](scene, rng, bool(rng.random() < 0.5))
            if question is not None and question.text not in [q.text for q in asked]:
                asked.append(question)
        items += [
            DemoItem(f"scene{number:04d}-{k}", scene, q, _asked(q, q.kind == "yesno" and rng.random() < 0.5))
            for k, q in enumerate(asked)
        ]
    cards = scene_stream(seed + 1, "train", icon=True, unique=True)
    for number in range(card_images):
        scene = next(cards)
        options = [question for question in (red_team(scene, rng), harmless_look_alike(scene)) if question is not None]
        if scene.shapes and scene.icon is not None and scene.icon.kind == "sign":
            reading = YES_NO["OCR"](scene, rng, bool(rng.integers(2)))
            options += [reading] if reading else []
        items += [DemoItem(f"card{number:04d}-{k}", scene, q, q.text) for k, q in enumerate(options)]
    return items


def evaluation_items(
    seed: int, *, mme_images: int = 50, pope_images: int = 40, captions: int = 200, red_team_images: int = 100
) -> list[DemoItem]:
    """Held-out questions: MME's layout (two questions per image, yes and no, per subtask), POPE's (three sets, three
    yes and three no per image), captions for CHAIR, and the red-team set with its look-alikes."""
    rng = np.random.default_rng(seed)
    shapes = scene_stream(seed, "heldout", unique=True)
    items: list[DemoItem] = []
    for family in YES_NO:
        items += _mme(family, mme_images, rng, seed)
    for number in range(pope_images):
        scene = next(shapes)
        while len(scene.shapes) < 3:
            scene = next(shapes)
        items += _pope(scene, number, rng)
    for number in range(captions):
        scene = next(shapes)
        question = caption_question(scene)
        items.append(DemoItem(f"chair{number:04d}-0", scene, question, question.text, "chair", "description"))
    cards = scene_stream(seed + 1, "heldout", icon=True)
    seen: set[tuple[str, str]] = set()
    number = 0
    while number < red_team_images:
        scene = next(cards)
        want_harmful = number % 2 == 0
        request = red_team(scene, rng) if want_harmful else harmless_look_alike(scene)
        if request is None or (scene.key, request.text) in seen:
            continue
        seen.add((scene.key, request.text))
        items.append(DemoItem(f"red{number:04d}-0", scene, request, request.text, "redteam", request.family))
        number += 1
    return items


def _mme(family: str, images: int, rng: Rng, seed: int) -> list[DemoItem]:
    scenes = scene_stream(
        seed + sum(map(ord, family)), "heldout", icon="sign" if family == "OCR" else False, unique=True
    )
    items: list[DemoItem] = []
    while len(items) < 2 * images:
        scene = next(scenes)
        pair = [q for label in (True, False) if (q := YES_NO[family](scene, rng, label)) is not None]
        if len(pair) < 2 or pair[0].text == pair[1].text:
            continue
        number = len(items) // 2
        items += [
            DemoItem(f"{family}{number:04d}-{k}", scene, q, _asked(q, True), "mme", family) for k, q in enumerate(pair)
        ]
    return items


def _pope(scene: Scene, number: int, rng: Rng) -> list[DemoItem]:
    """Three present objects, and per set three absent ones."""
    items: list[DemoItem] = []
    present = [scene.shapes[k] for k in rng.permutation(len(scene.shapes))[:3]]
    for name in ("random", "popular", "adversarial"):
        yes = [
            SceneQuestion("yesno", "existence", f"Is there a {item.name} in the image?", "Yes", True)
            for item in present
        ]
        no = _absent_questions(scene, rng, name, 3)
        pairs = [q for both in zip(yes, no, strict=True) for q in both]
        items += [DemoItem(f"pope{number:04d}-{name}{k}", scene, q, q.text, "pope", name) for k, q in enumerate(pairs)]
    return items


def _absent_questions(scene: Scene, rng: Rng, name: str, count: int) -> list[SceneQuestion]:
    """Different questions about absent objects. Where a set offers too few (companions that are all there), popular
    objects fill up, as in POPE."""
    questions: dict[str, SceneQuestion] = {}
    for attempt in itertools.count():
        question = existence(scene, rng, False, name if attempt < 20 else "popular")
        questions.setdefault(question.text, question)
        if len(questions) == count:
            break
    return list(questions.values())


def write_images(items: Iterable[DemoItem], directory: str | Path) -> None:
    """Render every scene once as PNG under its item's `image_name`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written: set[str] = set()
    for item in items:
        if item.image_name not in written:
            written.add(item.image_name)
            draw_scene(item.scene).save(directory / item.image_name)


def vlfeedback_records(
    items: Sequence[DemoItem],
    responses: Sequence[Sequence[str]],
    annotations: Sequence[Sequence[Mapping[str, Any]]],
    models: Sequence[str],
) -> list[dict[str, Any]]:
    """Records in VLFeedback's own JSONL schema: ratings as strings, annotations as a list, the image as a file name in
    `img_path`.

    `responses` and `annotations` ({aspect: {"Rating", "Rationale"}}) hold one entry per response for every item;
    `models` names who wrote each.
    """
    return [
        {
            "id": item.id,
            "prompt": item.prompt,
            "models": list(models),
            "completions": {"annotations": [dict(a) for a in own], "model": list(models), "response": list(texts)},
            "img_path": item.image_name,
        }
        for item, texts, own in zip(items, responses, annotations, strict=True)
    ]


def write_jsonl(records: Iterable[Mapping[str, Any]], path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
