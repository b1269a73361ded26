"""Iterative, on-policy preference training on the embedded demo, as one command:

    python recipes/studies/iterative.py --rounds 3 --output_dir outputs/iterative

Every round samples from the policy as it is, has the oracle rate the answers, and trains on from the last adapter with
that adapter as the reference; the held-out evaluation follows. At the end one more policy is trained from the base on
as many prompts in a single round, sampled from the base: what the rounds add is the difference to it. Run again after
an interruption: finished rounds are not repeated."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from silkie.demo.data import DemoItem, preference_items
from silkie.demo.loop import evaluate, feedback, held_out, load_base, make_trainer, preferences
from silkie.demo.model import BASE_DIR
from silkie.demo.outputs import markdown
from silkie.demo.results import DPO, Sizes, Summary, Watch
from silkie.stats import Estimate

logger = logging.getLogger("iterative")


class OtherSettings(ValueError):
    """The output directory holds rounds of another run."""


class Rounds:
    """The state of a run: what was measured so far, and where it lies."""

    def __init__(self, output: Path, *, seed: int, base_dir: Path, sizes: Sizes) -> None:
        self.output, self.seed, self.base_dir, self.sizes = output, seed, base_dir, sizes
        self.watch = Watch()
        self.noted: dict[str, float] = {}  # seconds that a result.json holds already
        self.summary = Summary(str(base_dir), seed, 0, 0)
        self.test = held_out(sizes)

    def prompts(self, number: int) -> list[DemoItem]:
        """Fresh prompts for every round."""
        return preference_items(
            1000 + 100 * number + self.seed,
            images=self.sizes.images,
            card_images=self.sizes.card_images,
            questions=self.sizes.questions,
        )

    def claim(self) -> None:
        """Raises OtherSettings where the finished rounds below the output directory were made with other settings."""
        settings = {"seed": self.seed, "base": str(self.base_dir), **asdict(self.sizes)}
        file = self.output / "settings.json"
        if file.exists() and (found := json.loads(file.read_text(encoding="utf-8"))) != settings:
            raise OtherSettings(
                f"{self.output} was begun with {found}, now asked for is {settings}; pass another output directory"
            )
        file.write_text(json.dumps(settings) + "\n", encoding="utf-8")

    def measure_base(self) -> None:
        if not self.restore("base", "Base"):
            self.evaluate("base", "Base", *load_base(self.base_dir))

    def train(self, name: str, title: str, items: list[DemoItem], *, start: Path | None) -> Path:
        """Sample from `start` (None: the base), rate, train on from it, evaluate; returns the adapter's directory."""
        directory = self.output / name
        adapter = directory / "adapter"
        if self.restore(name, title):
            return adapter
        records = feedback(items, directory / "data", start or self.base_dir, self.seed, self.watch)
        data = preferences(DPO, {"source": str(records), "image_root": str(records.parent / "images")}, self.seed)
        trainer = make_trainer(DPO, data, self.base_dir, adapter, self.seed, adapter=start)
        with self.watch(f"train {title}"):
            trainer.train()
        trainer.save_model(str(adapter))
        self.evaluate(
            name,
            title,
            trainer.model,
            trainer.processing_class,
            groups=len(data),
            pairs=sum(len(pairs) for pairs in data["pairs"]),
        )
        return adapter

    def evaluate(self, name: str, title: str, model: Any, processor: Any, *, groups: int = 0, pairs: int = 0) -> None:
        evaluate(self.summary, name, title, model, processor, self.test, self.output, self.watch)
        self.summary.groups += groups
        self.summary.pairs += pairs
        scores = {
            mode: {key: list(value) for key, value in metrics.items()}
            for mode, metrics in self.summary.scores[name].items()
        }
        seconds = {part: round(spent - self.noted.get(part, 0.0), 1) for part, spent in self.watch.seconds.items()}
        self.noted = dict(self.watch.seconds)
        result = self.output / name / "result.json"
        result.parent.mkdir(parents=True, exist_ok=True)
        partial = result.with_suffix(".partial")
        partial.write_text(
            json.dumps({"groups": groups, "pairs": pairs, "seconds": seconds, "scores": scores}), encoding="utf-8"
        )
        partial.replace(result)  # its presence says that the round is complete

    def restore(self, name: str, title: str) -> bool:
        """Take over a round that an earlier run finished."""
        result = self.output / name / "result.json"
        if not result.exists():
            return False
        data = json.loads(result.read_text(encoding="utf-8"))
        self.summary.titles[name] = title
        self.summary.groups += data["groups"]
        self.summary.pairs += data["pairs"]
        for part, spent in data["seconds"].items():
            self.watch.seconds[part] = self.noted[part] = round(self.watch.seconds.get(part, 0.0) + spent, 1)
        self.summary.scores[name] = {
            mode: {key: Estimate(*value) for key, value in metrics.items()} for mode, metrics in data["scores"].items()
        }
        logger.info("%s was finished by an earlier run", title)
        return True


def run(
    output: str | Path,
    *,
    rounds: int = 3,
    seed: int = 0,
    base_dir: str | Path = BASE_DIR,
    sizes: Sizes | None = None,
    single: bool = True,
) -> Summary:
    """The whole run; writes `round-N/` (data, adapter, result.json), `eval/`, `table.md` and `results.json` below
    `output`."""
    state = Rounds(Path(output), seed=seed, base_dir=Path(base_dir), sizes=sizes or Sizes(images=200, card_images=60))
    state.output.mkdir(parents=True, exist_ok=True)
    state.claim()
    state.measure_base()
    start: Path | None = None
    for number in range(1, rounds + 1):
        start = state.train(f"round-{number}", f"Round {number}", state.prompts(number), start=start)
    if single and rounds > 1:
        together = [item for number in range(1, rounds + 1) for item in _renamed(state.prompts(number), number)]
        in_rounds = state.summary.groups, state.summary.pairs
        state.train("single", f"One round of {rounds}x", together, start=None)
        state.summary.groups, state.summary.pairs = in_rounds
    summary = state.summary
    summary.seconds = state.watch.seconds
    summary.table = markdown(summary).replace("# The demo", "# On-policy rounds", 1)
    (state.output / "table.md").write_text(summary.table, encoding="utf-8")
    (state.output / "results.json").write_text(json.dumps(summary.to_json(), indent=1) + "\n", encoding="utf-8")
    return summary


def _renamed(items: list[DemoItem], number: int) -> list[DemoItem]:
    """Rounds name their items alike; in one set the names must differ."""
    return [replace(item, id=f"round{number}-{item.id}") for item in items]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output_dir", default="outputs/iterative")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=200, help="images per round (default 200)")
    parser.add_argument("--no_single", action="store_true", help="skip the comparison with one large round")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds}: expected 1 or more")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    sizes = Sizes(images=arguments.images, card_images=max(2, arguments.images // 3))
    try:
        print(
            run(
                arguments.output_dir,
                rounds=arguments.rounds,
                seed=arguments.seed,
                sizes=sizes,
                single=not arguments.no_single,
            )
        )
    except OtherSettings as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
