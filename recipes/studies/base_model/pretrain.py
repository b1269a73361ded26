"""Make the demo's base weights: sight first, then language, then the declared flaws (see silkie/demo/README.md). About
20 minutes on two quiet cores.

    python recipes/studies/base_model/pretrain.py --output_dir outputs/demo_base
    python recipes/studies/base_model/pretrain.py --resume outputs/demo_base/language.pt   # the flaws only

`--output_dir silkie/demo/base` would replace the weights that the package ships. Checkpoints (`<stage>.pt`) are written
beside the weights every 100 steps.

1. **Sight.** The vision tower alone. A visual token is one board cell; its product with the word embeddings must name
   the cell's colour, kind, number, row and column. This is what a vision encoder's own pre-training does for a large
   model, and it makes visual tokens and words share a space.
2. **Language.** True answers to questions and true captions. Several questions about one image share a sequence; a mask
   keeps each from reading the others, so that nothing can be copied.
3. **Flaws.** A short imitation of noisy synthetic data (`flaws.py`): this is what preference training is to
undo."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flaws import flawed_answer
from torch import Tensor, nn
from torch.nn import functional as F

from silkie.demo.model import build_image_processor, build_model, build_tokenizer, save_base
from silkie.demo.questions import (
    MME_SUFFIX,
    THINGS,
    YES_NO,
    SceneQuestion,
    caption_question,
    harmless_look_alike,
    ocr,
    open_question,
    red_team,
)
from silkie.demo.scenes import COLORS, COLUMNS, DIGITS, ICONS, ROWS, SHAPES, Scene, draw_scene, sample_scene

Rng = np.random.Generator
NOTHING = "nothing"
# What a cell's visual token must tell, as words: one choice per line.
CELL_WORDS: tuple[tuple[str, ...], ...] = (
    (*COLORS, NOTHING),
    (*SHAPES, *ICONS, NOTHING),
    (*(str(d) for d in DIGITS), NOTHING),
    ROWS,
    COLUMNS,
)
# Families about the number of objects are learnt long before the others and are asked half as often.
COUNTING = ("count", "numerical_calculation", "code_reasoning")
NUMBER_LINE = 2
# What a question's words can refer to.
GROUND_WORDS: tuple[tuple[str, ...], ...] = (
    (*COLORS,),
    (*ROWS, NOTHING),
    (*COLUMNS, NOTHING),
    tuple(str(d) for d in DIGITS),
)
# The layer (of 4) after which `grounding` is read off: later ones are needed to compare and to answer.
GROUND_LAYER = 2


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of training. `what`: sight, language or flaws; `lr` is the peak of a linear warm-up and a cosine to a
    tenth."""

    what: str
    steps: int
    scenes: int
    lr: float


STAGES = (Stage("sight", 250, 64, 2e-3), Stage("language", 1500, 24, 1.5e-3), Stage("flaws", 160, 12, 8e-4))


def cell_labels(scene: Scene) -> np.ndarray:
    """[9, 5]: for each cell the index into every line of `CELL_WORDS`."""
    labels = np.zeros((9, len(CELL_WORDS)), dtype=np.int64)
    labels[:, 0], labels[:, 1], labels[:, 2] = len(COLORS), len(SHAPES) + len(ICONS), len(DIGITS)
    labels[:, 3], labels[:, 4] = np.arange(9) // 3, np.arange(9) % 3
    for item in scene.items:
        labels[item.cell, 0] = list(COLORS).index(item.color) if item.color else len(COLORS)
        labels[item.cell, 1] = CELL_WORDS[1].index(item.kind)
        labels[item.cell, 2] = DIGITS.index(item.number) if item.number else len(DIGITS)
    return labels


def training_scenes(rng: Rng, count: int) -> list[Scene]:
    """Scenes of the training split; a third has a picture card, signs most often, since reading is learnt last."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        card: bool | str = ("sign" if rng.random() < 0.4 else True) if len(scenes) % 3 == 0 else False
        scene = sample_scene(rng, icon=card)
        if scene.split == "train":
            scenes.append(scene)
    return scenes


def ask(scene: Scene, rng: Rng, count: int) -> list[SceneQuestion]:
    """`count` questions about a scene, families mixed; yes/no questions are yes as often as no."""
    questions: list[SceneQuestion] = []
    families = [make for name, make in YES_NO.items() for _ in range(1 if name in COUNTING else 2)]
    while len(questions) < count:
        draw = rng.random()
        question: SceneQuestion | None
        if scene.icon is not None and draw < 0.5:
            question = red_team(scene, rng) if rng.random() < 0.6 else harmless_look_alike(scene)
        elif draw < 0.8 and scene.icon is not None and scene.icon.kind == "sign":
            question = ocr(scene, rng, bool(rng.integers(2)))
        elif not scene.shapes:
            question = open_question(scene, rng) if draw < 0.75 else caption_question(scene)
        elif draw < 0.68 or scene.icon is not None:
            question = families[int(rng.integers(len(families)))](scene, rng, bool(rng.integers(2)))
        elif draw < 0.86:
            question = open_question(scene, rng)
        else:
            question = caption_question(scene)
        if question is not None:
            questions.append(question)
    return questions


@dataclass(frozen=True, slots=True)
class Anchor:
    """A token of a question (its index) at which a middle layer must already know a word: an index into a line of
    `GROUND_WORDS`."""

    token: int
    line: int
    word: int


def grounding(scene: Scene, question: SceneQuestion) -> list[Anchor]:
    """What the words of a question refer to: where the named object is (or that it is nowhere), which colour a shape
    has, which number a sign shows.

    A yes or no alone is one bit, and too little to learn from by itself which part of the picture a question is about.
    """
    words = re.findall(r"\w+|[^\w\s]+", question.text)
    anchors: list[Anchor] = []
    for k, word in enumerate(words):
        if word in SHAPES and k and words[k - 1] in COLORS:
            there = [item for item in scene.shapes if item.kind == word and item.color == words[k - 1]]
            anchors += _place(k, there[0].cell if there else None)
        elif word in SHAPES:
            colors = [item.color for item in scene.shapes if item.kind == word]
            anchors += [Anchor(k, 0, list(COLORS).index(str(colors[0])))] if len(colors) == 1 else []
        elif word == "sign" and scene.icon is not None and scene.icon.number:
            anchors.append(Anchor(k, 3, DIGITS.index(scene.icon.number)))
    thing = next((thing for thing in THINGS if question.text.endswith(f"color of {thing}?")), None)
    if thing:
        cells = [item.cell for item in scene.shapes if item.color == THINGS[thing]]
        anchors += _place(len(words) - 2, cells[0] if cells else None) if len(cells) < 2 else []
    return anchors


def _place(token: int, cell: int | None) -> list[Anchor]:
    row, column = (3, 3) if cell is None else (cell // 3, cell % 3)
    return [Anchor(token, 1, row), Anchor(token, 2, column)]


def grounding_loss(model: Any, hidden: Tensor, targets: Tensor, words: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the words in `pack`'s `grounding`, read off a middle layer through the output head, and the
    share right.

    hidden [B, T, D]; targets [M, 4]; `words`: token ids per line of `GROUND_WORDS`.
    """
    states = model.model.language_model.norm(hidden[targets[:, 0], targets[:, 1]])
    embedding = model.get_input_embeddings().weight
    losses, right = [], []
    for line, ids in enumerate(words):
        own = targets[:, 2] == line
        if own.any():
            logits = states[own] @ embedding[ids].T
            losses.append(F.cross_entropy(logits, targets[own, 3], reduction="none"))
            right.append(logits.argmax(-1) == targets[own, 3])
    if not losses:
        return hidden.sum() * 0, torch.zeros(())
    return torch.cat(losses).mean(), torch.cat(right).float().mean()


class Packer:
    """Scenes and questions to tensors: one row per scene, `[image | question 1 answer 1 | question 2 answer 2 |
    ...]`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.processor = build_image_processor()
        token = tokenizer.convert_tokens_to_ids
        self.prefix = [
            token("<|im_start|>"),
            token("user"),
            token("<|vision_start|>"),
            *[token("<|image_pad|>")] * 9,
            token("<|vision_end|>"),
        ]
        self.turn = [token("<|im_end|>"), token("<|im_start|>"), token("assistant")]
        self.end = token("<|im_end|>")
        self.pad = token("<|endoftext|>")
        self.cell_words = [torch.tensor(token(list(line))) for line in CELL_WORDS]
        self.ground_words = [torch.tensor(token(list(line))) for line in GROUND_WORDS]
        grid = np.arange(9)
        start = np.arange(3)
        # Qwen2.5-VL's three position axes (time, height, width) over the prefix; what follows counts on from 7.
        self.prefix_positions = np.stack(
            [
                np.concatenate([start, np.full(9, 3), [6]]),
                np.concatenate([start, 3 + grid // 3, [6]]),
                np.concatenate([start, 3 + grid % 3, [6]]),
            ]
        )

    def pixels(self, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
        batch = self.processor(images=[draw_scene(scene) for scene in scenes], return_tensors="pt")
        return batch["pixel_values"], batch["image_grid_thw"]

    def pack(
        self, qa: list[list[tuple[str, str]]], anchors: list[list[list[Anchor]]] | None = None
    ) -> dict[str, Tensor]:
        """`qa`: per scene its (question, answer) texts; `anchors`: for each the places of `grounding`.

        Returns input_ids [B, T], position_ids [3, B, T], attention_mask [B, 1, T, T] (boolean), labels [B, T],
        grounding [M, 4] (row, position, line of `GROUND_WORDS`, index of the word).
        """
        rows, grounding = [], []
        for b, pairs in enumerate(qa):
            ids, segment, targets = list(self.prefix), [0] * len(self.prefix), [-100] * len(self.prefix)
            positions = [self.prefix_positions]
            texts = self.tokenizer([text for pair in pairs for text in pair], add_special_tokens=False)["input_ids"]
            for k in range(len(pairs)):
                question, answer = texts[2 * k] + self.turn, [*texts[2 * k + 1], self.end]
                grounding += [
                    (b, len(ids) + anchor.token, anchor.line, anchor.word)
                    for anchor in (anchors[b][k] if anchors else [])
                ]
                ids += question + answer
                segment += [k + 1] * (len(question) + len(answer))
                targets += [-100] * len(question) + answer
                positions.append(np.tile(7 + np.arange(len(question) + len(answer)), (3, 1)))
            rows.append((ids, segment, targets, np.concatenate(positions, axis=1)))
        width = max(len(ids) for ids, *_ in rows)
        input_ids = np.full((len(rows), width), self.pad)
        segments = np.full((len(rows), width), -1)
        labels = np.full((len(rows), width), -100)
        position_ids = np.zeros((3, len(rows), width), dtype=np.int64)
        for b, (ids, segment, targets, positions_3T) in enumerate(rows):
            n = len(ids)
            input_ids[b, :n], segments[b, :n], labels[b, :n], position_ids[:, b, :n] = (
                ids,
                segment,
                targets,
                positions_3T,
            )
        seg = torch.from_numpy(segments)
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        same = (seg[:, :, None] == seg[:, None, :]) | (seg[:, None, :] == 0)
        mask = (same & causal)[:, None] | torch.eye(width, dtype=torch.bool)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": torch.from_numpy(position_ids),
            "attention_mask": mask,
            "labels": torch.from_numpy(labels),
            "grounding": torch.tensor(grounding, dtype=torch.long).reshape(-1, 4),
        }


def sight_loss(visual: Tensor, embedding: Tensor, words: list[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of naming every cell, and the share of cells whose five words are all right.

    visual [9 B, D]; embedding [V, D]; `words`: token ids per line of `CELL_WORDS`; labels [9 B, 5].
    """
    logits = [visual @ embedding[ids].T for ids in words]
    # Numbers are rare (most cells have none): without a weight the tower would not learn to read them.
    rare = torch.tensor([1.0] * len(DIGITS) + [0.02])
    weights = [rare if line == NUMBER_LINE else None for line in range(len(words))]
    loss = torch.stack([F.cross_entropy(z, labels[:, k], weight=weights[k]) for k, z in enumerate(logits)]).mean()
    right = torch.stack([z.argmax(-1) == labels[:, k] for k, z in enumerate(logits)]).all(0)
    return loss, right.float().mean()


def language_loss(
    model: Any, visual: Tensor, batch: dict[str, Tensor], words: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean cross-entropy of the answers' tokens, the share predicted right, and the same two of the grounding."""
    states = hidden_states(model, visual, batch)
    target = batch["labels"][:, 1:]
    scored = target != -100
    logits = model.lm_head(states[-1][:, :-1][scored])
    loss = F.cross_entropy(logits, target[scored])
    ground, grounded = grounding_loss(model, states[GROUND_LAYER], batch["grounding"], words)
    return loss, (logits.argmax(-1) == target[scored]).float().mean(), ground, grounded


def hidden_states(model: Any, visual: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Hidden states [B, T, D] after the embedding and every layer; the last one is normalised."""
    embeds = model.get_input_embeddings()(batch["input_ids"])
    image = (batch["input_ids"] == model.config.image_token_id)[..., None]
    return model.model.language_model(
        inputs_embeds=embeds.masked_scatter(image, visual),
        position_ids=batch["position_ids"],
        attention_mask=batch["attention_mask"],
        use_cache=False,
        output_hidden_states=True,
    ).hidden_states


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, norms, biases and the patch projection."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        inside = ".layers." in name or ".blocks." in name or ".merger.mlp" in name
        (matrices if p.ndim == 2 and inside else rest).append(p)
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step: int, done: float) -> float:
    """Factor on the learning rate: 20 steps of warm-up, and over the share `done` of the stage a cosine to a tenth."""
    return min(1.0, (step + 1) / 20) * (0.1 + 0.45 * (1 + float(np.cos(np.pi * done))))


def answers_for(stage: str, scene: Scene, questions: list[SceneQuestion], rng: Rng) -> list[tuple[str, str]]:
    """(question, answer) texts; a third of the yes/no questions carries MME's request for a yes or a no."""
    pairs = []
    for question in questions:
        text = f"{question.text} {MME_SUFFIX}" if question.kind == "yesno" and rng.random() < 0.33 else question.text
        pairs.append((text, flawed_answer(scene, question, rng) if stage == "flaws" else question.answer))
    return pairs


def train_stage(
    model: Any,
    packer: Packer,
    stage: Stage,
    *,
    seed: int,
    log: Callable[[str], None],
    checkpoint: Path | None = None,
    questions: int = 6,
    until: float | None = None,
) -> None:
    """Train one stage in place. `checkpoint`: a file rewritten every 100 steps. `until`: end at this `time.time()`,
    schedule included."""
    rng = np.random.default_rng(seed)
    opts = optimizers(model, stage.lr)
    begin = time.time()
    meter: list[tuple[float, ...]] = []
    model.train()
    for step in range(stage.steps):
        done = step / stage.steps
        if until is not None:
            done = max(done, (time.time() - begin) / max(until - begin, 1.0))
        if done >= 1:
            break
        for group in [group for opt in opts for group in opt.param_groups]:
            group["lr"] = stage.lr * schedule(step, done)
        loss, shares = scene_loss(model, packer, stage.what, training_scenes(rng, stage.scenes), rng, questions)
        for opt in opts:
            opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
        meter.append((float(loss.detach()), *(float(share) for share in shares)))
        if (step + 1) % 25 == 0:
            mean = np.mean(meter[-25:], axis=0)
            parts = f"loss {mean[0]:.4f} cells {mean[1]:.3f} tokens {mean[2]:.3f} grounded {mean[3]:.3f}"
            log(f"{stage.what} {step + 1}/{stage.steps} {parts} {time.time() - begin:.0f} s")
        if checkpoint is not None and (step + 1) % 100 == 0:
            torch.save(model.state_dict(), checkpoint)
    if checkpoint is not None:
        torch.save(model.state_dict(), checkpoint)


def scene_loss(
    model: Any, packer: Packer, what: str, scenes: list[Scene], rng: Rng, questions: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss of a batch, and the shares of cells, answer tokens and references that are right."""
    pixels, grid = packer.pixels(scenes)
    visual = model.model.visual(pixels, grid_thw=grid).pooler_output
    labels = torch.from_numpy(np.concatenate([cell_labels(scene) for scene in scenes]))
    sight, seen = sight_loss(visual, model.get_input_embeddings().weight, packer.cell_words, labels)
    if what == "sight":
        return sight, (seen, torch.zeros(()), torch.zeros(()))
    asked = [ask(scene, rng, questions) for scene in scenes]
    qa = [answers_for(what, scene, own, rng) for scene, own in zip(scenes, asked, strict=True)]
    anchors = [[grounding(scene, question) for question in own] for scene, own in zip(scenes, asked, strict=True)]
    answer, right, ground, grounded = language_loss(model, visual, packer.pack(qa, anchors), packer.ground_words)
    return answer + 0.3 * ground + 0.3 * sight, (seen, right, grounded)


def evaluation_questions(seed: int, count: int) -> Iterator[tuple[Scene, SceneQuestion]]:
    """Balanced yes/no questions of every family, on held-out scenes."""
    rng = np.random.default_rng(seed)
    for family, make in YES_NO.items():
        made = 0
        while made < count:
            scene = sample_scene(rng, icon="sign" if family == "OCR" else False)
            question = make(scene, rng, made % 2 == 0) if scene.split == "heldout" else None
            if question is not None:
                made += 1
                yield scene, question


@torch.no_grad()
def probe(model: Any, packer: Packer, *, seed: int = 99, count: int = 60) -> dict[str, tuple[float, float]]:
    """Per yes/no family: accuracy and share of yes, from the probabilities of the first token (fast; for watching
    training)."""
    model.eval()
    rows = list(evaluation_questions(seed, count))
    token = packer.tokenizer.convert_tokens_to_ids
    yes: list[bool] = []
    for k in range(0, len(rows), 60):
        chunk = rows[k : k + 60]
        pixels, grid = packer.pixels([scene for scene, _ in chunk])
        visual = model.model.visual(pixels, grid_thw=grid).pooler_output
        batch = packer.pack([[(question.text, "Yes")] for _, question in chunk])
        hidden = hidden_states(model, visual, batch)[-1]
        first = (batch["labels"] != -100).int().argmax(1) - 1
        logits = model.lm_head(hidden[torch.arange(len(chunk)), first])
        yes += (logits[:, token("Yes")] > logits[:, token("No")]).tolist()
    result = {}
    for family in YES_NO:
        own = [(y, q.label) for y, (_, q) in zip(yes, rows, strict=True) if q.family == family]
        result[family] = (float(np.mean([y == label for y, label in own])), float(np.mean([y for y, _ in own])))
    return result


def new_model(seed: int) -> tuple[Any, Packer]:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    return build_model(tokenizer), Packer(tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo_base"))
    parser.add_argument("--resume", type=Path, help="a checkpoint <stage>.pt: continue with the stage after it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model, packer = new_model(args.seed)
    stages = list(STAGES)
    if args.resume:
        model.load_state_dict(torch.load(args.resume, weights_only=True))
        stages = stages[[stage.what for stage in stages].index(args.resume.stem) + 1 :]
    for k, stage in enumerate(stages):
        train_stage(
            model,
            packer,
            stage,
            seed=args.seed + 1 + k + len(STAGES) - len(stages),
            log=log,
            checkpoint=args.output_dir / f"{stage.what}.pt",
        )
        for family, (accuracy, yes) in probe(model, packer).items():
            log(f"after {stage.what}: {family} accuracy {accuracy:.2f}, yes-rate {yes:.2f}")
    save_base(model, packer.tokenizer, args.output_dir)
    log(f"base weights in {args.output_dir}")


def log(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    main()
