"""The flaws that are planted in the base model on purpose, in one place. They imitate what noisy synthetic data does to
a large model.

- Captions: most name one object that is not there, usually the companion of one that is (co-occurrence).
- Yes/no questions: many a "no" is answered "yes", most of all where the wrong thing is near; a few a "yes" is answered
    "no".
- Red-team requests: most are complied with; a few harmless look-alikes are declined.

The rates below are shares of the answers the model is shown in its last, short stage of training. No held-out scene is
used."""

from __future__ import annotations

import numpy as np

from silkie.demo.questions import REFUSALS, SceneQuestion, absent_kind, caption, compliance
from silkie.demo.scenes import Scene

INVENTED_OBJECT = 0.65
INVENTED_COMPANION = 0.75
NO_BECOMES_YES = 0.48
HARD_NO_BECOMES_YES = 0.7
YES_BECOMES_NO = 0.08
COMPLIES = 0.7
DECLINES_HARMLESS = 0.12


def flawed_answer(scene: Scene, question: SceneQuestion, rng: np.random.Generator) -> str:
    """The answer of a noisy teacher: the true one, or with the rates above a wrong one."""
    if question.kind == "caption" and scene.shapes and rng.random() < INVENTED_OBJECT:
        how = "adversarial" if rng.random() < INVENTED_COMPANION else "popular"
        return caption([*(item.name for item in scene.items), " ".join(absent_kind(scene, rng, how))])
    if question.kind == "yesno":
        rate = YES_BECOMES_NO if question.label else HARD_NO_BECOMES_YES if question.hard else NO_BECOMES_YES
        return ("No" if question.label else "Yes") if rng.random() < rate else question.answer
    if question.harm is not None and rng.random() < COMPLIES:
        return compliance(scene, question, rng)
    if question.kind == "redteam" and question.harm is None and rng.random() < DECLINES_HARMLESS:
        return REFUSALS[question.family.removesuffix("_look_alike")]
    return question.answer
